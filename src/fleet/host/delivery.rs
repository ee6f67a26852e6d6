//! What a host tells its hub: a heartbeat each time, and the reports that wait.

use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::config::{Hub, Instance};
use crate::error::{Context, OrLog, Result};
use crate::files;
use crate::fleet::host::peers::{self, Peers};
use crate::fleet::host::{heartbeat, outbox};
use crate::fleet::{HEARTBEAT, Heartbeat, RECEIVED, Received, SMALL};
use crate::paths::Paths;

/// How long reports may take.
const DELIVERY: Duration = Duration::from_secs(300);

/// Tells the hub how the instance is, after a run; asks nothing of it if there is nothing to tell.
pub fn deliver(paths: &Paths, instance: &Instance) -> Result<()> {
    let Some(hub) = &instance.hub else { return Ok(()) };
    // what the hub has taken last
    let told = fs::read(paths.own(HEARTBEAT)).unwrap_or_default();
    let is_told = outbox::waiting(paths)?.is_empty() && told == text(&heartbeat::now(paths, hub, false))?;
    if is_told { Ok(()) } else { send(paths, hub) }
}

/// Tells the hub how the instance is where a run fetches nothing since there is a hold: it is not silent.
pub fn tell(paths: &Paths, instance: &Instance) {
    // where that fails, the next poll tells, and no run has failed
    instance.hub.as_ref().map_or(Ok(()), |hub| send(paths, hub)).or_warn();
}

fn text(heartbeat: &Heartbeat) -> Result<Vec<u8>> {
    serde_json::to_vec_pretty(heartbeat).context(|| "write the heartbeat".into())
}

/// Opens a session for a heartbeat and the reports that wait.
fn send(paths: &Paths, hub: &Hub) -> Result<()> {
    let scratch = peers::scratch(paths)?;
    let mut peers = Peers::open(paths, hub, scratch.path(), DELIVERY, &[])?;
    deliver_by(&mut peers, paths, hub, scratch.path(), &heartbeat::now(paths, hub, false))?;
    peers.close()
}

/// Sends a heartbeat and the reports that the hub does not say it has. What it refuses does not keep the
/// rest waiting; what counts as told is what it has taken.
pub fn deliver_by(peers: &mut Peers, paths: &Paths, hub: &Hub, scratch: &Path, heartbeat: &Heartbeat) -> Result<()> {
    let Some(place) = peers.reports(hub) else { return Ok(()) };
    let mut waiting = outbox::waiting(paths)?;
    let (file, known, keeps) = (scratch.join(RECEIVED), paths.own(RECEIVED), place.keeps_reports());
    // what the hub has, root removes with the next run
    let mut received: Received = files::read_json(&known).ok().flatten().unwrap_or_default();
    received.reports.retain(|run| waiting.contains(run));
    waiting.retain(|run| !received.reports.contains(run));
    // who has sent nothing need not ask what has arrived
    if !keeps && !waiting.is_empty() && place.get(&format!("release/{RECEIVED}"), &file, SMALL)? {
        received = files::read_foreign_json(&file, SMALL)?.unwrap_or_default();
        files::write_json(&known, &received, 0o644)?;
        waiting.retain(|run| !received.reports.contains(run));
    }
    let mut send = |file: &Path| {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        place.put(file, &format!("reports/{name}")).context(|| format!("send {name}"))
    };
    let reports: Vec<_> = waiting.iter().map(|run| outbox::files_of(paths, run).iter().try_for_each(|file| send(file))).collect();
    if keeps && reports.iter().any(Result::is_ok) {
        received.reports.extend(waiting.into_iter().zip(&reports).filter(|(_, sent)| sent.is_ok()).map(|(run, _)| run));
        files::write_json(&known, &received, 0o644)?;
    }
    let beat = scratch.join(HEARTBEAT);
    fs::write(&beat, text(heartbeat)?).doing("write", &beat)?;
    send(&beat)?;
    fs::rename(&beat, paths.own(HEARTBEAT)).doing("write", &paths.own(HEARTBEAT))?;
    reports.into_iter().collect()
}
