//! How each host stands with what is published for it, in a word, for who may know no more: a CI job that waits for hosts.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, SystemTime};

use crate::error::Result;
use crate::files;
use crate::fleet::hub::host_state::{FAILING, HostState};
use crate::fleet::hub::served::ServedDirectory;
use crate::names::HostName;
use crate::run::published::{HostStanding, HostStep};
use crate::system::now;

/// Writes it down for all hosts, where this is a hub that publishes by itself.
pub fn keep(hub: &ServedDirectory) -> Result<()> {
    let file = hub.heard();
    if !file.parent().is_some_and(Path::exists) {
        return Ok(());
    }
    let mut all = BTreeMap::new();
    for host in hub.hosts()? {
        all.extend(look(hub, &host)?.map(|standing| (host, standing)));
    }
    if files::read_json(&file).is_ok_and(|known| known.as_ref() == Some(&all)) {
        return Ok(());
    }
    files::write_json(&file, &all, 0o644)
}

fn look(hub: &ServedDirectory, host: &HostName) -> Result<Option<HostStanding>> {
    let Some(Ok((manifest, _))) = hub.manifest(host)? else { return Ok(None) };
    let heard = hub.heartbeat(host)?;
    let age = |arrived: SystemTime| SystemTime::now().duration_since(arrived).unwrap_or_default();
    let heard = heard.as_ref().map(|(heartbeat, arrived)| (heartbeat, age(*arrived)));
    // who waits has a patience of his own
    let state = match HostState::of(Some(&manifest), heard, Duration::MAX, now()) {
        HostState::UpToDate | HostState::ExtraRuns | HostState::AutoUpdated => HostStep::Deployed,
        state if state.trouble() == FAILING => HostStep::Failing,
        _ => HostStep::Published,
    };
    Ok(Some(HostStanding { release: Some(manifest.release.sequence), state }))
}
