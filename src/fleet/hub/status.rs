//! `ekiben fleet status`: the hosts and their states in a table, or as JSON.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::error::{Context, Error, Result};
use crate::fleet::hub::collect::take_in_to_show;
use crate::fleet::hub::host_state::{FAILING, HostState};
use crate::fleet::hub::memory::Memory;
use crate::fleet::hub::plan::{Holds, Plan};
use crate::fleet::hub::publish::DAY;
use crate::fleet::hub::repository::select;
use crate::fleet::hub::rollout::Rollout;
use crate::fleet::hub::served::ServedDirectory;
use crate::fleet::hub::settings::Settings;
use crate::fleet::{Heartbeat, Manifest};
use crate::gather::{gather, sorted};
use crate::names::{HostName, StorePath};
use crate::run::hold::moment;
use crate::system::now;
use crate::text::{short, span};
use crate::{output, table, text};

/// How many columns a table takes.
const WIDTH: usize = 80;

/// What a publisher knows of the fleet.
pub struct Known<'a> {
    /// When hosts are silent.
    pub settings: &'a Settings,
    /// The hosts in the repository, if there is one.
    pub names: Option<BTreeSet<HostName>>,
    /// What was published last.
    pub memory: Memory,
}

/// What there is to show.
pub struct Shown {
    /// Where the roll-out stands, if one is under way; and whether it has been stopped.
    pub rollout: Option<String>,
    pub stopped: bool,
    /// The hosts.
    pub hosts: BTreeMap<HostName, Row>,
}

/// A host, as `--json` shows it.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Row {
    pub(super) state: String,
    pub(super) well: bool,
    /// For which wave of the roll-out it waits.
    wave: Option<usize>,
    /// What there is to see to, in lines.
    pub(super) trouble: Vec<String>,
    /// The beginnings of the hashes of the published and of the running system.
    local_version: String,
    remote_version: String,
    /// When the last heartbeat arrived, in seconds since 1970.
    pub(super) heard: Option<u64>,
    pub(super) published: Option<Manifest>,
    heartbeat: Option<Heartbeat>,
    #[serde(skip)]
    pub(super) state_alone: HostState,
    #[serde(skip)]
    pub(super) exit: u8,
}

impl Row {
    /// When the release was published, and when the host's last run ended.
    pub(super) fn published_at(&self) -> Option<u64> {
        self.published.as_ref().map(|manifest| manifest.published)
    }

    pub(super) fn last_run(&self) -> Option<u64> {
        self.heartbeat.as_ref()?.last.as_ref().map(|last| last.finished)
    }

    /// The moments that are shown of it, in seconds since 1970.
    pub(super) fn moments(&self) -> [(&'static str, Option<u64>); 3] {
        [("heard", self.heard), ("last run", self.last_run()), ("published", self.published_at())]
    }
}

fn look(hub: &ServedDirectory, host: &HostName, fleet: &Known, known: bool, (plan, holds): (Option<&Plan>, &Holds)) -> Row {
    // trouble with one host hides no other
    let mut trouble = Vec::new();
    let published = match hub.manifest(host) {
        Ok(found) => found.and_then(|found| found.map_err(|why| trouble.push(format!("Failed to read {why}"))).ok()),
        Err(error) => {
            trouble.push(error.to_string());
            None
        }
    };
    let published = published.map(|(manifest, _)| manifest);
    let heard = hub.heartbeat(host).unwrap_or_else(|error| {
        trouble.push(error.to_string());
        None
    });
    let time = SystemTime::now();
    let age = heard.as_ref().map(|(heartbeat, arrived)| (heartbeat, time.duration_since(*arrived).unwrap_or_default()));
    let heartbeat = heard.as_ref().map(|(heartbeat, _)| heartbeat);
    let listed = fleet.names.as_ref().is_none_or(|names| names.contains(host));
    let last = fleet.memory.last(host).filter(|last| u64::from(*last) <= now() + DAY);
    let offered = published.as_ref().map(|manifest| manifest.release.sequence);
    let wave = plan.and_then(|plan| plan.waits(host, published.as_ref().map(|manifest| &manifest.release)));
    let state = match HostState::of(published.as_ref(), age, fleet.settings.silence(host), now()) {
        _ if !trouble.is_empty() => HostState::Unreadable,
        _ if !known && fleet.names.is_some() && listed => HostState::Unkeyed,
        _ if !known => HostState::Removed,
        _ if !listed => HostState::Unlisted,
        state => match last.filter(|last| Some(*last) > offered) {
            Some(last) if state.trouble() != FAILING => {
                let offers = offered.map_or("no release".into(), |number| format!("release {number}"));
                trouble.push(format!("the hub offers {offers}, and {last} has been published; deploy again"));
                HostState::WentBack
            }
            _ if wave.is_some() && state.trouble() == 0 => HostState::Waiting,
            _ => state,
        },
    };
    match state {
        HostState::Unkeyed => trouble.push("add it to services.ekiben.hub.hosts, or remove it from the repository".into()),
        HostState::Unlisted => trouble.push("remove it from services.ekiben.hub.hosts, or add it to the repository".into()),
        HostState::Removed => {
            let what = hub
                .removed()
                .get(host)
                .map_or("remove its directory there".into(), |when| format!("what the hub has of it is removed on {}", moment(*when)));
            trouble.push(format!("it has no key on the hub, and is not in the repository: {what}"));
        }
        HostState::Stale => trouble.push("its release has expired: deploy, or renew; if that has been done, the hub withholds it".into()),
        _ => {}
    }
    let files = heartbeat.and_then(|heartbeat| heartbeat.files.as_ref());
    let exit = if files.is_some() && state != HostState::Removed { FAILING } else { state.trouble() };
    if let Some(heartbeat) = heartbeat.filter(|_| state.trouble() == FAILING || state == HostState::Silent) {
        let error = heartbeat.refused.as_ref().or_else(|| heartbeat.last.as_ref()?.error.as_ref());
        trouble.extend(error.into_iter().flat_map(|said| said.lines()).map(String::from));
    }
    trouble.extend(files.into_iter().flat_map(|said| said.lines()).map(String::from));
    let deployed = [HostState::AutoUpdated, HostState::ExtraRuns, HostState::UpToDate].contains(&state);
    let held = heartbeat.and_then(|heartbeat| heartbeat.held.as_ref()).filter(|hold| now() < hold.until);
    trouble.extend(held.map(|hold| text::line(&format!("held until {} {}", moment(hold.until), hold.why()))));
    let held_here = holds.said(host);
    let also = [
        (held.is_some() || held_here.is_some(), ", held"),
        (deployed && heartbeat.is_some_and(|beat| beat.reboot_needed), ", reboot needed"),
        (files.is_some(), ", files missing"),
    ];
    trouble.extend(held_here.map(|said| format!("at the hub: {said}")));
    let named = match (state, wave) {
        (HostState::Waiting, Some(wave)) => format!("waiting for wave {wave}"),
        _ => state.to_string(),
    };
    let local = published.as_ref().map(|manifest| manifest.toplevel.as_ref().map_or(short(&manifest.release.id), hash));
    Row {
        state: also.iter().filter(|(is_so, _)| *is_so).fold(named, |state, (_, what)| state + what),
        well: exit == 0,
        wave,
        trouble,
        local_version: local.unwrap_or_default(),
        remote_version: heartbeat.and_then(|heartbeat| heartbeat.system.as_ref().map(hash)).unwrap_or_default(),
        heard: heard.as_ref().and_then(|(_, arrived)| Some(arrived.duration_since(UNIX_EPOCH).ok()?.as_secs())),
        heartbeat: heard.map(|(heartbeat, _)| heartbeat),
        published,
        state_alone: state,
        exit,
    }
}

/// The beginning of a store path's hash.
fn hash(path: &StorePath) -> String {
    path.path().file_name().and_then(|name| name.to_str()).map(short).unwrap_or_default()
}

/// Shows hosts, all if none are named; as JSON, once, or again whenever something changes.
pub fn status(hub: &ServedDirectory, fleet: &Known, wanted: &[&str], json: bool, once: bool, wide: bool) -> Result<ExitCode> {
    let live = !json && !once && std::io::stdout().is_terminal();
    let mut before = String::new();
    loop {
        take_in_to_show(hub, wanted)?;
        let shown = rows(hub, fleet, wanted)?;
        if !live {
            if json { output::print_json(&shown.hosts) } else { output::print(&table(&shown, wide, false, now())) }?;
            return Ok(exit(&shown));
        }
        let text = text::lines(&table(&shown, wide, true, now()));
        if text != before {
            let mut output = std::io::stdout().lock();
            let done = write!(output, "\x1b[H\x1b[2J{text}").and_then(|()| output.flush());
            done.context(|| "write to standard output".into())?;
            before = text;
        }
        std::thread::sleep(hub.pace());
    }
}

/// What there is to show of the hosts of these names, or of all.
pub fn rows(hub: &ServedDirectory, fleet: &Known, wanted: &[&str]) -> Result<Shown> {
    let (served, known) = (hub.hosts()?, hub.known());
    let all: BTreeSet<_> = gather(served.iter().chain(fleet.names.iter().flatten()).cloned());
    let is_known = |host: &HostName| served.contains(host) && known.as_ref().is_none_or(|known| known.contains(host));
    let hosts = select(all.into_iter().collect(), |name: &HostName| name, wanted)?;
    // what cannot be read hides no host
    let told = |error: &Error| log::warn!("{error}.");
    let rollout = Rollout::read(hub).inspect_err(told).ok().flatten();
    let holds = Plan::holds(hub).inspect_err(told).unwrap_or_default();
    // of a hub elsewhere the others are not known
    let line = rollout.as_ref().filter(|_| wanted.is_empty()).and_then(|rollout| rollout.line(hub).inspect_err(told).ok().flatten());
    let plan = rollout.as_ref().map(|rollout| &rollout.plan);
    let row = |host: HostName| (host.clone(), look(hub, &host, fleet, is_known(&host), (plan, &holds)));
    let stopped = rollout.as_ref().is_some_and(|rollout| rollout.stopped().is_some());
    Ok(Shown { rollout: line, stopped, hosts: gather(hosts.into_iter().map(row)) })
}

/// The exit status that says which kind of trouble there is, the gravest of them.
pub fn exit(shown: &Shown) -> ExitCode {
    let of_rollout = (shown.rollout.is_some() && shown.stopped).then_some(FAILING);
    let exit = shown.hosts.values().map(|shown| shown.exit).chain(of_rollout).filter(|exit| *exit > 0).min();
    ExitCode::from(exit.unwrap_or(0))
}

/// The hosts in the order in which they are shown.
pub fn gravest_first(shown: &Shown) -> Vec<(&HostName, &Row)> {
    let by = |row: &Row| (if row.exit > 0 { row.exit } else { u8::MAX }, row.state_alone);
    let hosts = sorted(shown.hosts.iter().map(|(host, row)| (by(row), &row.state, host)));
    hosts.into_iter().filter_map(|(.., host)| shown.hosts.get_key_value(host)).collect()
}

/// How many hosts there are of which state, and one of them.
pub fn totals<'a>(hosts: &[(&'a HostName, &'a Row)]) -> Vec<(usize, &'a Row)> {
    hosts.chunk_by(|(_, one), (_, other)| one.state == other.state).map(|of_state| (of_state.len(), of_state[0].1)).collect()
}

/// How many hosts there are of which state; then a line for each, and what there is to see to.
fn table(shown: &Shown, wide: bool, terminal: bool, now: u64) -> String {
    let wrapped = |text: &str, indent: &str| if terminal { wrapped(text, indent) } else { format!("{indent}{text}\n") };
    let hosts = gravest_first(shown);
    if hosts.is_empty() {
        return "no hosts: see ekiben fleet bootstrap\n".into();
    }
    let totals: Vec<_> = totals(&hosts).into_iter().map(|(count, row)| format!("{count} {}", row.state)).collect();
    let rollout = shown.rollout.as_ref().map(|line| wrapped(line, ""));
    let mut text = rollout.unwrap_or_default();
    text += &wrapped(&format!("{} host{}: {}", hosts.len(), if hosts.len() == 1 { "" } else { "s" }, totals.join("; ")), "");
    let wide_heads = ["LOCAL", "REMOTE", "RELEASE", "COMMIT", "AUTHOR", "KERNEL", "NIXOS", "NIXPKGS"];
    let mut rows =
        vec![["HOST", "STATE", "HEARD", "RUN", "PUBLISHED"].iter().chain(&wide_heads).map(ToString::to_string).collect::<Vec<_>>()];
    let age = |then: Option<u64>| then.map_or(String::new(), |then| span(now.saturating_sub(then)));
    for (name, shown) in &hosts {
        let (beat, manifest) = (shown.heartbeat.as_ref(), shown.published.as_ref());
        let mark = match (beat.and_then(|beat| beat.system.as_ref()), manifest.and_then(|manifest| manifest.toplevel.as_ref())) {
            (Some(runs), Some(toplevel)) if runs == toplevel => " =",
            (Some(_), Some(_)) if shown.state_alone == HostState::AutoUpdated => " +",
            (Some(_), Some(_)) => " ≠",
            _ => "",
        };
        let said = |value: Option<&Option<String>>| value.cloned().flatten().unwrap_or_default();
        let mut row = vec![name.to_string(), shown.state.clone()];
        row.extend(shown.moments().map(|(_, moment)| age(moment)));
        row.extend([
            shown.local_version.clone(),
            format!("{}{mark}", shown.remote_version),
            manifest.map_or(String::new(), |manifest| manifest.release.sequence.to_string()),
            manifest.map_or(String::new(), |manifest| manifest.origin.short()),
            said(manifest.map(|manifest| &manifest.origin.author)),
            said(beat.map(|beat| &beat.kernel)),
            said(beat.map(|beat| &beat.nixos)),
            said(beat.map(|beat| &beat.nixpkgs)),
        ]);
        rows.push(row);
    }
    if !wide {
        for row in &mut rows {
            row.truncate(row.len() - wide_heads.len());
        }
    }
    for (shown, line) in [None].into_iter().chain(hosts.iter().map(|(_, shown)| Some(shown))).zip(table::lines(&rows)) {
        text.extend([&line, "\n"]);
        text.extend(shown.iter().flat_map(|shown| &shown.trouble).map(|line| wrapped(line, "  ")));
    }
    text
}

/// A text in lines that fit on a terminal, unless a word does not.
fn wrapped(text: &str, indent: &str) -> String {
    let (mut lines, mut line) = (String::new(), indent.to_owned());
    for word in text.split(' ') {
        if line.len() > indent.len() && line.chars().count() + 1 + word.chars().count() > WIDTH {
            lines.extend([&line, "\n"]);
            indent.clone_into(&mut line);
        } else if line.len() > indent.len() {
            line.push(' ');
        }
        line.push_str(word);
    }
    lines + &line + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::hub::host_state::tests::{heartbeat, last, manifest};
    use crate::run::Outcome;

    #[test]
    fn the_table_begins_with_the_gravest_and_fits() {
        let shown = |heartbeat: Heartbeat, state: HostState, trouble: &str| Row {
            state: state.to_string(),
            well: state.trouble() == 0,
            wave: None,
            trouble: trouble.lines().map(String::from).collect(),
            local_version: hash(manifest().toplevel.as_ref().unwrap()),
            remote_version: hash(heartbeat.system.as_ref().unwrap()),
            heard: Some(1080),
            published: Some(manifest()),
            heartbeat: Some(heartbeat),
            state_alone: state,
            exit: state.trouble(),
        };
        let failing = Heartbeat { last: Some(last(None, Outcome::Failed)), ..heartbeat(1) };
        let same = Heartbeat { system: manifest().toplevel, ..heartbeat(2) };
        let hosts = [
            ("a", shown(same.clone(), HostState::UpToDate, "")),
            ("b", shown(heartbeat(2), HostState::Unlisted, "")),
            ("c", shown(failing, HostState::Failing, "no luck ".repeat(12).trim_end())),
            ("d", shown(heartbeat(2), HostState::AutoUpdated, "")),
            ("e", shown(same, HostState::UpToDate, "")),
        ];
        let hosts = hosts.into_iter().map(|(name, shown)| (name.try_into().unwrap(), shown)).collect();
        let rollout = "roll-out of 3f2a91c04b7d: stopped in wave 1: canary is rolled back; ekiben fleet resume, or abort";
        let hosts = Shown { rollout: Some(rollout.into()), stopped: true, hosts };
        let expected = "\
roll-out of 3f2a91c04b7d: stopped in wave 1: canary is rolled back; ekiben fleet
resume, or abort
5 hosts: 1 failing; 1 not in repository; 1 auto updated; 2 up to date
HOST  STATE              HEARD  RUN    PUBLISHED
c     failing            20 s   1 min  1 min
  no luck no luck no luck no luck no luck no luck no luck no luck no luck no
  luck no luck no luck
b     not in repository  20 s          1 min
d     auto updated       20 s          1 min
a     up to date         20 s          1 min
e     up to date         20 s          1 min
";
        assert_eq!(table(&hosts, false, true, 1100), expected);
        let wide = table(&hosts, true, false, 1100);
        let line = wide.lines().find(|line| line.starts_with('e')).unwrap();
        assert!(line.contains("01234567  01234567 =  2 ") && line.ends_with("6.12    25.05.20250101.0123456"), "{wide}");
        assert!(wide.contains("abcdfghi ≠") && wide.contains("abcdfghi +"), "{wide}");
    }
}
