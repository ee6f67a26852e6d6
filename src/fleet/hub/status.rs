//! The state of the hosts, as the hub sees it.
//!
//! A state follows from what is published and what the host reported last, release by release. No host's
//! clock counts: the clocks of the hub and of the reader decide whether a host is silent.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::error::{Context, Result};
use crate::fleet::hub::collect::take_in;
use crate::fleet::hub::repository::select;
use crate::fleet::hub::served::ServedDirectory;
use crate::fleet::{Heartbeat, LastRun, Manifest};
use crate::names::{HostName, StorePath};
use crate::run::{Outcome, Release};
use crate::system::now;
use crate::{output, table, text};

/// How a host can be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum HostState {
    /// Nothing is published for it.
    NotDeployed,
    /// It has never been heard of.
    NewMachine,
    /// It has not been heard of for long.
    Silent,
    /// What is published for it, or what it has sent, cannot be read.
    Unreadable,
    /// It does not accept what it is offered.
    Refusing,
    /// It is at work on the published release.
    Building,
    /// That could not be built, or was not tried any further.
    Failing,
    /// That did not run well, and the host went back.
    RolledBack,
    /// Nor could it go back.
    RollbackFailed,
    /// The next boot brings the published release, and decides.
    AwaitingBoot,
    /// It runs something else than what it deployed: by another hand.
    Drifted,
    /// It runs the published release, with inputs it has updated by itself.
    AutoUpdated,
    /// It runs the published release, and took more than one run to.
    ExtraRuns,
    /// It runs the published release.
    UpToDate,
    /// It does not have the published release yet, but runs the same system.
    SyncPending,
    /// It does not have the published release yet.
    RebuildPending,
}

impl HostState {
    /// Decides by what is published, and by what was heard of the host how long ago.
    fn of(published: Option<&Manifest>, heard: Option<(&Heartbeat, Duration)>, silent_after: Duration) -> Self {
        if heard.is_some_and(|(heartbeat, age)| age <= silent_after && heartbeat.refused.is_some()) {
            return Self::Refusing;
        }
        let Some(published) = published else { return Self::NotDeployed };
        let Some((heartbeat, age)) = heard else { return Self::NewMachine };
        let is_published = |release: &Option<_>| release.as_ref() == Some(&published.release);
        // what it has under another number it need not deploy again
        let is_same = |deployed: &Release| is_published(&heartbeat.seen) && deployed.id == published.release.id;
        let deployed = is_published(&heartbeat.deployed) || heartbeat.deployed.as_ref().is_some_and(is_same);
        // a run that failed before it knew of any release is about what comes next
        let about = |last: &&LastRun| is_published(&last.release) || (last.release.is_none() && !deployed);
        let result = heartbeat.last.as_ref().filter(about).map(|last| last.result);
        match result {
            _ if age > silent_after => Self::Silent,
            _ if is_published(&heartbeat.running) => Self::Building,
            Some(Outcome::Failed) => Self::Failing,
            Some(Outcome::RolledBack) => Self::RolledBack,
            Some(Outcome::Stuck) => Self::RollbackFailed,
            Some(Outcome::AwaitingBoot) => Self::AwaitingBoot,
            Some(Outcome::Drifted) => Self::Drifted,
            _ if deployed && heartbeat.self_updated => Self::AutoUpdated,
            _ if deployed && heartbeat.runs > 1 => Self::ExtraRuns,
            _ if deployed => Self::UpToDate,
            _ if published.toplevel.is_some() && published.toplevel == heartbeat.system => Self::SyncPending,
            _ => Self::RebuildPending,
        }
    }

    fn is_well(self) -> bool {
        !matches!(
            self,
            Self::Unreadable | Self::Silent | Self::Refusing | Self::Failing | Self::RolledBack | Self::RollbackFailed | Self::Drifted
        )
    }
}

impl fmt::Display for HostState {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::NotDeployed => "not deployed",
            Self::NewMachine => "new machine",
            Self::Silent => "silent",
            Self::Unreadable => "unreadable",
            Self::Refusing => "refusing",
            Self::Building => "building",
            Self::Failing => "failing",
            Self::RolledBack => "rolled back",
            Self::RollbackFailed => "rollback failed",
            Self::AwaitingBoot => "awaiting boot",
            Self::Drifted => "drifted",
            Self::AutoUpdated => "auto updated",
            Self::ExtraRuns => "extra runs",
            Self::UpToDate => "up to date",
            Self::SyncPending => "sync pending",
            Self::RebuildPending => "rebuild pending",
        })
    }
}

/// A host, as `--json` shows it.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    state: String,
    well: bool,
    /// Why nothing else is known of it.
    trouble: Option<String>,
    /// The beginnings of the hashes of the published and of the running system.
    local_version: String,
    remote_version: String,
    /// When the last heartbeat arrived, in seconds since 1970.
    heard: Option<u64>,
    published: Option<Manifest>,
    heartbeat: Option<Heartbeat>,
}

fn look(hub: &ServedDirectory, host: &HostName, silent_after: Duration) -> Row {
    // trouble with one host hides no other
    let mut trouble = None;
    let mut note = |error: String| trouble = Some(error);
    let published = match hub.manifest(host) {
        Ok(Some(Ok((manifest, _)))) => Some(manifest),
        Ok(None) => None,
        Ok(Some(Err(why))) => {
            note(format!("Failed to read {why}"));
            None
        }
        Err(error) => {
            note(error.to_string());
            None
        }
    };
    let heard = hub.heartbeat(host).unwrap_or_else(|error| {
        note(error.to_string());
        None
    });
    let now = SystemTime::now();
    let age = heard.as_ref().map(|(heartbeat, arrived)| (heartbeat, now.duration_since(*arrived).unwrap_or_default()));
    let state = if trouble.is_some() { HostState::Unreadable } else { HostState::of(published.as_ref(), age, silent_after) };
    let deployed = [HostState::AutoUpdated, HostState::ExtraRuns, HostState::UpToDate].contains(&state);
    let reboot = deployed && heard.as_ref().is_some_and(|(heartbeat, _)| heartbeat.reboot_needed);
    let local = published.as_ref().map(|manifest| manifest.toplevel.as_ref().map_or(short(&manifest.release.id), hash));
    let files = heard.as_ref().is_some_and(|(heartbeat, _)| heartbeat.files.is_some());
    let also = [(reboot, ", reboot needed"), (files, ", files missing")];
    Row {
        trouble,
        state: also.iter().filter(|(is_so, _)| *is_so).fold(state.to_string(), |state, (_, what)| state + what),
        well: state.is_well() && !files,
        local_version: local.unwrap_or_default(),
        remote_version: heard.as_ref().and_then(|(heartbeat, _)| heartbeat.system.as_ref().map(hash)).unwrap_or_default(),
        heard: heard.as_ref().and_then(|(_, arrived)| Some(arrived.duration_since(UNIX_EPOCH).ok()?.as_secs())),
        heartbeat: heard.map(|(heartbeat, _)| heartbeat),
        published,
    }
}

/// The beginning of a store path's hash.
fn hash(path: &StorePath) -> String {
    path.path().file_name().and_then(|name| name.to_str()).map(short).unwrap_or_default()
}

fn short(text: &str) -> String {
    text.chars().take(8).collect()
}

/// Shows hosts, all if none are named; as JSON, once, or again whenever something changes. Fails
/// softly if one is not well.
pub fn status(hub: &ServedDirectory, silent_after: u64, wanted: &[&str], json: bool, once: bool) -> Result<ExitCode> {
    let live = !json && !once && std::io::stdout().is_terminal();
    let mut before = String::new();
    loop {
        take_in(hub, wanted)?;
        let hosts = select(hub.hosts()?, |name| name, wanted)?;
        let mut shown = BTreeMap::new();
        for host in hosts {
            let of_host = look(hub, &host, Duration::from_secs(silent_after));
            shown.insert(host, of_host);
        }
        if !live {
            if json { output::print_json(&shown) } else { output::print(&table(&shown, now())) }?;
            return Ok(if shown.values().all(|shown| shown.well) { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        let text = text::lines(&table(&shown, now()));
        if text != before {
            let mut output = std::io::stdout().lock();
            let done = write!(output, "\x1b[H\x1b[2J{text}").and_then(|()| output.flush());
            done.context(|| "write to standard output".into())?;
            before = text;
        }
        std::thread::sleep(hub.pace());
    }
}

fn table(shown: &BTreeMap<HostName, Row>, now: u64) -> String {
    let mut rows = vec![["MACHINE", "LOCAL VERSION", "REMOTE VERSION", "STATE", "LAST RUN", "PUBLISHED"].map(String::from)];
    for (name, shown) in shown {
        let mark = match shown {
            Row { heartbeat: Some(heartbeat), published: Some(published), .. } => match &published.toplevel {
                Some(toplevel) if Some(toplevel) == heartbeat.system.as_ref() => " =",
                _ if shown.state.starts_with("auto updated") => " +",
                Some(_) => " ≠",
                None => "",
            },
            _ => "",
        };
        let last = shown.heartbeat.as_ref().and_then(|heartbeat| heartbeat.last.as_ref());
        rows.push([
            name.to_string(),
            shown.local_version.clone(),
            format!("{}{mark}", shown.remote_version),
            shown.state.clone(),
            last.map_or(String::new(), |last| elapsed(last.finished, now)),
            shown.published.as_ref().map_or(String::new(), |manifest| elapsed(manifest.published, now)),
        ]);
    }
    let mut text = String::new();
    for (shown, line) in [None].into_iter().chain(shown.values().map(Some)).zip(table::lines(&rows)) {
        text.extend([&line, "\n"]);
        let heartbeat = shown.filter(|shown| !shown.well).and_then(|shown| shown.heartbeat.as_ref());
        let error = heartbeat.and_then(|beat| beat.refused.as_ref().or_else(|| beat.last.as_ref()?.error.as_ref()));
        let files = heartbeat.and_then(|heartbeat| heartbeat.files.as_ref());
        for line in shown.and_then(|shown| shown.trouble.as_ref()).into_iter().chain(error).chain(files).flat_map(|said| said.lines()) {
            text.extend(["  ", line, "\n"]);
        }
    }
    text
}

/// How long ago a moment is, in its two largest units.
fn elapsed(then: u64, now: u64) -> String {
    let seconds = now.saturating_sub(then);
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        3600..86400 => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
        _ => format!("{} d {} h", seconds / 86400, seconds / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::FORMAT;

    fn release(sequence: u64) -> Release {
        Release { id: format!("{sequence:064x}").try_into().unwrap(), sequence: sequence.try_into().unwrap() }
    }

    fn manifest() -> Manifest {
        Manifest {
            format: FORMAT,
            host: "web".try_into().unwrap(),
            release: release(2),
            sha256: "0".repeat(64).try_into().unwrap(),
            size: 0,
            attr: None,
            toplevel: Some("/nix/store/0123456789abcdfghijklmnpqrsvwxyz-new".try_into().unwrap()),
            published: 1000,
        }
    }

    /// Of a host that has deployed some release.
    fn heartbeat(deployed: u64) -> Heartbeat {
        Heartbeat {
            format: FORMAT,
            host: "web".try_into().unwrap(),
            version: String::new(),
            seen: None,
            deployed: Some(release(deployed)),
            system: Some("/nix/store/abcdfghijklmnpqrsvwxyz0123456789-old".try_into().unwrap()),
            running: None,
            last: None,
            runs: 1,
            self_updated: false,
            reboot_needed: false,
            files: None,
            refused: None,
        }
    }

    fn last(release: Option<Release>, result: Outcome) -> LastRun {
        LastRun { release, result, stage: None, error: Some("no luck".into()), finished: 1000 }
    }

    #[test]
    fn a_state_follows_from_releases() {
        use HostState::{
            AutoUpdated, AwaitingBoot, Building, Drifted, ExtraRuns, Failing, NewMachine, NotDeployed, RebuildPending, Refusing,
            RollbackFailed, RolledBack, Silent, SyncPending, UpToDate,
        };
        let state = |heartbeat: &Heartbeat, age| {
            HostState::of(Some(&manifest()), Some((heartbeat, Duration::from_secs(age))), Duration::from_secs(10))
        };
        assert_eq!(HostState::of(None, None, Duration::ZERO), NotDeployed);
        assert_eq!(HostState::of(None, Some((&heartbeat(2), Duration::ZERO)), Duration::ZERO), NotDeployed);
        assert_eq!(HostState::of(Some(&manifest()), None, Duration::ZERO), NewMachine);
        let old = || heartbeat(1);
        let new = || heartbeat(2);
        let same = || manifest().toplevel;
        for (expected, heartbeat) in [
            (RebuildPending, old()),
            (SyncPending, Heartbeat { system: same(), ..old() }),
            (UpToDate, new()),
            // another release with the same contents
            (RebuildPending, Heartbeat { deployed: Some(Release { sequence: 1.try_into().unwrap(), ..release(2) }), ..old() }),
            (
                UpToDate,
                Heartbeat { deployed: Some(Release { sequence: 1.try_into().unwrap(), ..release(2) }), seen: Some(release(2)), ..old() },
            ),
            (ExtraRuns, Heartbeat { runs: 2, ..new() }),
            (RebuildPending, Heartbeat { runs: 2, ..old() }),
            (AutoUpdated, Heartbeat { runs: 2, self_updated: true, ..new() }),
            // what it does on top of an old one hides nothing
            (RebuildPending, Heartbeat { self_updated: true, ..old() }),
            (Building, Heartbeat { running: Some(release(2)), last: Some(last(Some(release(2)), Outcome::Failed)), ..old() }),
            (RebuildPending, Heartbeat { running: Some(release(1)), ..old() }),
            (Failing, Heartbeat { last: Some(last(Some(release(2)), Outcome::Failed)), ..old() }),
            (RebuildPending, Heartbeat { last: Some(last(Some(release(1)), Outcome::Failed)), ..old() }),
            (Failing, Heartbeat { last: Some(last(None, Outcome::Failed)), ..old() }),
            (UpToDate, Heartbeat { last: Some(last(None, Outcome::Failed)), ..new() }),
            // whatever it runs
            (Refusing, Heartbeat { refused: Some("not signed".into()), ..new() }),
            (Refusing, Heartbeat { refused: Some("not signed".into()), ..old() }),
            (RolledBack, Heartbeat { last: Some(last(Some(release(2)), Outcome::RolledBack)), ..old() }),
            (RollbackFailed, Heartbeat { last: Some(last(Some(release(2)), Outcome::Stuck)), ..old() }),
            (UpToDate, Heartbeat { last: Some(last(Some(release(2)), Outcome::Unchanged)), ..new() }),
            (AwaitingBoot, Heartbeat { last: Some(last(Some(release(2)), Outcome::AwaitingBoot)), ..old() }),
            (RebuildPending, Heartbeat { last: Some(last(Some(release(1)), Outcome::AwaitingBoot)), ..old() }),
            (Drifted, Heartbeat { last: Some(last(Some(release(2)), Outcome::Drifted)), ..new() }),
        ] {
            assert_eq!(state(&heartbeat, 10), expected, "{heartbeat:?}");
            assert_eq!(state(&heartbeat, 11), Silent);
        }
    }

    #[test]
    fn the_table_says_what_is_wrong() {
        let shown = |heartbeat: Heartbeat, state: HostState| Row {
            state: state.to_string(),
            well: state.is_well(),
            trouble: None,
            local_version: hash(manifest().toplevel.as_ref().unwrap()),
            remote_version: hash(heartbeat.system.as_ref().unwrap()),
            heard: None,
            published: Some(manifest()),
            heartbeat: Some(heartbeat),
        };
        let failing = Heartbeat { last: Some(last(None, Outcome::Failed)), ..heartbeat(1) };
        let same = Heartbeat { system: manifest().toplevel, ..heartbeat(2) };
        let hosts = [
            ("a", shown(failing, HostState::Failing)),
            ("b", shown(same, HostState::UpToDate)),
            ("c", shown(heartbeat(2), HostState::AutoUpdated)),
        ];
        let hosts = hosts.into_iter().map(|(name, shown)| (name.try_into().unwrap(), shown)).collect();
        let expected = "\
MACHINE  LOCAL VERSION  REMOTE VERSION  STATE         LAST RUN    PUBLISHED
a        01234567       abcdfghi ≠      failing       1 min 40 s  1 min 40 s
  no luck
b        01234567       01234567 =      up to date                1 min 40 s
c        01234567       abcdfghi +      auto updated              1 min 40 s
";
        assert_eq!(table(&hosts, 1100), expected);
    }

    #[test]
    fn durations_have_two_units() {
        for (seconds, text) in
            [(59, "59 s"), (60, "1 min 0 s"), (3600, "1 h 0 min"), (7500, "2 h 5 min"), (3 * 86400 + 4 * 3600 + 59, "3 d 4 h")]
        {
            assert_eq!(elapsed(0, seconds), text);
        }
        assert_eq!(elapsed(10, 0), "0 s");
    }
}
