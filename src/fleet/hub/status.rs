//! What there is to show of the hosts: the state of each, what there is to see to, and what comes first.

use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;
use std::time::SystemTime;

use serde::Serialize;

use crate::error::{OrLog, Result};
use crate::fleet::hub::holds::{Holds, said};
use crate::fleet::hub::host_state::{FAILING, HostState};
use crate::fleet::hub::memory::Memory;
use crate::fleet::hub::plan::Plan;
use crate::fleet::hub::repository::select;
use crate::fleet::hub::rollout::Rollout;
use crate::fleet::hub::served::ServedDirectory;
use crate::fleet::hub::settings::Settings;
use crate::fleet::{DAY, Heartbeat, Manifest};
use crate::gather::{gather, sorted};
use crate::names::{HostName, StorePath};
use crate::run::hold::moment;
use crate::system::{now, seconds};
use crate::text::short;

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
    /// Why the hosts are not as they have said last.
    pub late: Option<String>,
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
    pub(super) wave: Option<usize>,
    /// What there is to see to, in lines.
    pub(super) trouble: Vec<String>,
    /// The beginnings of the hashes of the published and of the running system.
    pub(super) local_version: String,
    pub(super) remote_version: String,
    /// When the last heartbeat arrived, in seconds since 1970.
    pub(super) heard: Option<u64>,
    pub(super) published: Option<Manifest>,
    pub(super) heartbeat: Option<Heartbeat>,
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
    let published = hub.manifest(host).map_err(|error| error.to_string());
    let published = published.and_then(|found| found.transpose().map_err(|why| format!("Failed to read {why}; deploy again")));
    let published = published.map_err(|why| trouble.push(why)).ok().flatten().map(|(manifest, _)| manifest);
    let heard = hub.heartbeat(host).map_err(|error| trouble.push(error.to_string())).ok().flatten();
    let heartbeat = heard.as_ref().map(|(heartbeat, _)| heartbeat);
    let listed = fleet.names.as_ref().is_none_or(|names| names.contains(host));
    let last = fleet.memory.last(host).filter(|last| u64::from(*last) <= now() + DAY);
    let offered = published.as_ref().map(|manifest| manifest.release.sequence);
    let wave = plan.and_then(|plan| plan.waits(host, published.as_ref().map(|manifest| &manifest.release)));
    let state = match HostState::of(published.as_ref(), heard.as_ref(), fleet.settings.silence(host), SystemTime::now()) {
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
            let when = hub.removed().get(host).map(|when| format!("what the hub has of it is removed on {}", moment(*when)));
            let what = when.unwrap_or_else(|| "remove its directory there".into());
            trouble.push(format!("it has no key on the hub, and is not in the repository: {what}"));
        }
        HostState::Stale => trouble.push("its release has expired: deploy, or renew; if that has been done, the hub withholds it".into()),
        _ => {}
    }
    let files = heartbeat.and_then(|heartbeat| heartbeat.files.as_ref());
    let exit = if files.is_some() && state != HostState::Removed { FAILING } else { state.trouble() };
    if let Some(heartbeat) = heartbeat.filter(|_| state.trouble() == FAILING || state == HostState::Silent) {
        let error = heartbeat.refused.as_ref().or(heartbeat.unwell.as_ref()).or_else(|| heartbeat.last.as_ref()?.error.as_ref());
        trouble.extend(error.cloned());
    }
    trouble.extend(files.cloned());
    let held = heartbeat.and_then(|heartbeat| heartbeat.held.as_ref()).filter(|hold| now() < hold.until);
    trouble.extend(held.map(said));
    let held_here = holds.said(host);
    let also = [
        (held.is_some() || held_here.is_some(), ", held"),
        (state.is_deployed() && heartbeat.is_some_and(|beat| beat.reboot_needed), ", reboot needed"),
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
        heard: heard.as_ref().map(|(_, arrived)| seconds(*arrived)),
        heartbeat: heard.map(|(heartbeat, _)| heartbeat),
        published,
        state_alone: state,
        exit,
    }
}

/// The beginning of a store path's hash.
pub fn hash(path: &StorePath) -> String {
    path.path().file_name().and_then(|name| name.to_str()).map(short).unwrap_or_default()
}

/// What there is to show of the hosts of these names, or of all, and what `late` says of it.
pub fn rows(hub: &ServedDirectory, fleet: &Known, wanted: &[&str], late: Option<String>) -> Result<Shown> {
    let (served, known) = (hub.hosts()?, hub.known());
    let all: BTreeSet<_> = gather(served.iter().chain(fleet.names.iter().flatten()).cloned());
    let is_known = |host: &HostName| served.contains(host) && known.as_ref().is_none_or(|known| known.contains(host));
    let hosts = select(all.into_iter().collect(), |name: &HostName| name, wanted)?;
    // what cannot be read hides no host
    let rollout = Rollout::read(hub).or_warn().flatten();
    let holds = Holds::read(hub).or_warn().unwrap_or_default();
    // of a hub elsewhere the others are not known
    let line = rollout.as_ref().filter(|_| wanted.is_empty()).and_then(|rollout| rollout.line(hub).or_warn().flatten());
    let plan = rollout.as_ref().map(|rollout| &rollout.plan);
    let row = |host: HostName| (host.clone(), look(hub, &host, fleet, is_known(&host), (plan, &holds)));
    let stopped = rollout.as_ref().is_some_and(|rollout| rollout.headway.stopped.is_some());
    Ok(Shown { late, rollout: line, stopped, hosts: gather(hosts.into_iter().map(row)) })
}

/// The exit status that says which kind of trouble there is, the gravest of them.
pub fn exit(shown: &Shown) -> ExitCode {
    let of_rollout = (shown.rollout.is_some() && shown.stopped).then_some(FAILING);
    let late = shown.late.as_ref().map(|_| HostState::Silent.trouble());
    let exit = shown.hosts.values().map(|shown| shown.exit).chain(of_rollout).chain(late).filter(|exit| *exit > 0).min();
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
