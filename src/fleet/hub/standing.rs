//! How each host stands with what is published for it, in a word, for who may know no more: a CI job that waits for hosts.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, SystemTime};

use crate::error::{OrLog, Result};
use crate::files;
use crate::fleet::hub::holds::Holds;
use crate::fleet::hub::host_state::{FAILING, HostState};
use crate::fleet::hub::rollout::Rollout;
use crate::fleet::hub::served::ServedDirectory;
use crate::names::HostName;
use crate::run::published::{HostStanding, HostStep};

/// Writes it down for all hosts, where this is a hub that publishes by itself.
pub fn keep(hub: &ServedDirectory) -> Result<()> {
    let file = hub.heard();
    if !file.parent().is_some_and(Path::exists) {
        return Ok(());
    }
    let (mut all, rollout, holds) = (BTreeMap::new(), Rollout::read(hub)?, Holds::read(hub)?);
    for host in hub.hosts()? {
        // what cannot be read hides no other host
        all.extend(look(hub, &host, rollout.as_ref(), &holds).or_warn().flatten().map(|standing| (host, standing)));
    }
    files::put_json(&file, &all, 0o644)
}

fn look(hub: &ServedDirectory, host: &HostName, rollout: Option<&Rollout>, holds: &Holds) -> Result<Option<HostStanding>> {
    let manifest = hub.manifest(host)?.and_then(Result::ok).map(|(manifest, _)| manifest);
    let sees = manifest.as_ref().map(|manifest| &manifest.release);
    let waits = rollout.and_then(|rollout| Some((rollout, rollout.plan.waits(host, sees)?)));
    let planned = waits.and_then(|(rollout, _)| rollout.plan.get(host)).map(|member| member.release.sequence);
    let state = match waits {
        _ if holds.of(Some(host)).is_some() => Some(HostStep::Held),
        Some((rollout, _)) if rollout.headway.stopped.is_some() => Some(HostStep::Stopped),
        waits => waits.map(|_| HostStep::Waiting),
    };
    if let Some(state) = state {
        let release = planned.or(sees.map(|sees| sees.sequence));
        return Ok(Some(HostStanding { release, state, wave: waits.map(|(_, wave)| wave) }));
    }
    let Some(manifest) = manifest else { return Ok(None) };
    // who waits has a patience of his own
    let state = match HostState::of(Some(&manifest), hub.heartbeat(host)?.as_ref(), Duration::MAX, SystemTime::now()) {
        state if state.is_deployed() => HostStep::Deployed,
        state if state.trouble() == FAILING => HostStep::Failing,
        _ => HostStep::Published,
    };
    Ok(Some(HostStanding { release: Some(manifest.release.sequence), state, wave: None }))
}
