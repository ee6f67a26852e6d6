//! What hosts have sent: judged, moved to where no host can write, and acknowledged.
//!
//! A host may put into its directory what it likes. Nothing is taken from there but regular files of
//! bounded size, with names and contents that they should have, and nothing of it decides where
//! anything is written. What is not taken is removed.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::Path;
use std::time::{Duration, SystemTime};

use ::nix::fcntl::FlockArg;

use crate::error::{Context, Error, Result};
use crate::files;
use crate::fleet::hub::{self, Hub};
use crate::fleet::{FORMAT, Heartbeat, LARGE, Report, SMALL};

/// How many reports of one host are kept, and how many bytes of logs.
const KEPT: usize = 100;
const KEPT_BYTES: u64 = 4 * LARGE;
/// How many are remembered as arrived: a host that has more waiting must not send them again and again.
const REMEMBERED: usize = 1000;
/// How many files are looked at in one go.
const AT_ONCE: usize = 10_000;
/// How long a file may be on its way.
const ON_ITS_WAY: Duration = Duration::from_secs(3600);

/// Collects from all hosts; trouble with one does not keep the others waiting.
pub fn collect(hub: &Hub) -> Result<()> {
    let failed: Vec<_> = hub.hosts()?.into_iter().filter_map(|host| collect_host(hub, &host).err()).collect();
    for error in &failed {
        log::error!("{error}.");
    }
    if failed.is_empty() { Ok(()) } else { Err(Error::new(format!("Failed to collect from {} hosts", failed.len()))) }
}

fn collect_host(hub: &Hub, host: &str) -> Result<()> {
    let (reports, received) = (hub.reports(host), hub.received(host));
    let doing = || format!("collect from {}", reports.display());
    fs::create_dir_all(&received).context(|| format!("make {}", received.display()))?;
    let _turn = hub::lock(&received, FlockArg::LockExclusive)?;
    let now = SystemTime::now();
    let mut found = Vec::new();
    for entry in fs::read_dir(&reports).context(doing)?.take(AT_ONCE) {
        let entry = entry.context(doing)?;
        let time = entry.metadata().and_then(|metadata| metadata.modified()).unwrap_or(now);
        // a log is nothing without its report
        found.push((entry.path().extension().is_some_and(|end| end == "gz"), time, entry.path()));
    }
    found.sort();
    for (_, time, path) in found {
        let young = now.duration_since(time).unwrap_or_else(|error| error.duration()) < ON_ITS_WAY;
        match take(hub, host, &path, time.min(now)) {
            Ok(Taken::Yes) => {}
            Ok(Taken::NotYet) if young => continue,
            Ok(Taken::NotYet) => log::warn!("Dropped {path:?}: what belongs to it did not arrive."),
            Ok(Taken::No(why)) => log::warn!("Dropped {path:?}: {why}."),
            Ok(Taken::Never(why)) => {
                log::warn!("Passed over {path:?}: {why}.");
                continue;
            }
            Err(error) => return Err(error),
        }
        let removed = fs::remove_file(&path).or_else(|_| fs::remove_dir_all(&path));
        if let Err(error) = removed.or_else(|error| if path.is_symlink() || path.exists() { Err(error) } else { Ok(()) }) {
            log::warn!("Failed to remove {}: {error}.", path.display());
        }
    }
    acknowledge(hub, host)
}

/// What became of a file.
enum Taken {
    Yes,
    /// It may be on its way still, or what belongs to it.
    NotYet,
    No(String),
    /// Nor can it be removed.
    Never(String),
}

fn take(hub: &Hub, host: &str, path: &Path, time: SystemTime) -> Result<Taken> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let target = hub.received(host).join(name);
    let doing = || format!("write {}", target.display());
    let is_log = name.strip_suffix(".log.gz").is_some_and(is_run);
    let run = name.strip_suffix(".json").filter(|run| is_run(run));
    if name != "heartbeat.json" && run.is_none() && !is_log {
        return Ok(if path.extension().is_some_and(|end| end == "new") { Taken::NotYet } else { Taken::No("nobody asked for it".into()) });
    }
    let bytes = match files::read_foreign(path, if is_log { LARGE } else { SMALL }) {
        Ok(bytes) => bytes,
        Err(error) => match error.kind() {
            ErrorKind::NotFound => return Ok(Taken::NotYet),
            // the host's doing or the hub's: nothing is lost by leaving it there
            ErrorKind::PermissionDenied => return Ok(Taken::Never(error.to_string())),
            _ => return Ok(Taken::No(error.to_string())),
        },
    };
    let contents = if is_log {
        let report = name.replace(".log.gz", ".json");
        if !hub.received(host).join(report).exists() {
            return Ok(Taken::NotYet);
        }
        bytes
    } else {
        let judged = if let Some(run) = run { judge_report(&bytes, host, run) } else { judge_heartbeat(&bytes, host) };
        match judged {
            Ok(contents) => contents,
            Err(why) => return Ok(Taken::No(why)),
        }
    };
    files::write(&target, &contents, 0o644).context(doing)?;
    if name == "heartbeat.json" {
        File::options().append(true).open(&target).and_then(|file| file.set_modified(time)).context(doing)?;
    }
    Ok(Taken::Yes)
}

fn judge_report(bytes: &[u8], host: &str, run: &str) -> Result<Vec<u8>, String> {
    let report: Report = hub::foreign(bytes).map_err(|error| error.to_string())?;
    if (report.format, report.host.as_str(), report.run.id.as_str()) != (FORMAT, host, run) {
        return Err(format!("expected a report of format {FORMAT} by {host} on {run}"));
    }
    serde_json::to_vec_pretty(&report).map_err(|error| error.to_string())
}

fn judge_heartbeat(bytes: &[u8], host: &str) -> Result<Vec<u8>, String> {
    let heartbeat: Heartbeat = hub::foreign(bytes).map_err(|error| error.to_string())?;
    if (heartbeat.format, heartbeat.host.as_str()) != (FORMAT, host) {
        return Err(format!("expected a heartbeat of format {FORMAT} by {host}"));
    }
    serde_json::to_vec_pretty(&heartbeat).map_err(|error| error.to_string())
}

/// Whether `name` can be a run's: an identifier that systemd gave.
pub fn is_run(name: &str) -> bool {
    name.len() == 32 && name.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

/// Tells the host which reports have arrived, and keeps the newest.
fn acknowledge(hub: &Hub, host: &str) -> Result<()> {
    let received = hub.received(host);
    let doing = || format!("read {}", received.display());
    let mut index = hub.index(host)?;
    let known: BTreeSet<String> = index.reports.iter().cloned().collect();
    let mut new = Vec::new();
    for entry in fs::read_dir(&received).context(doing)? {
        let entry = entry.context(doing)?;
        let name = entry.file_name().into_string().unwrap_or_default();
        if let Some(run) = name.strip_suffix(".json").filter(|run| is_run(run) && !known.contains(*run)) {
            new.push((entry.metadata().and_then(|metadata| metadata.modified()).context(doing)?, run.to_owned()));
        }
    }
    if !new.is_empty() {
        new.sort();
        index.reports.extend(new.into_iter().map(|(_, run)| run));
        index.reports.drain(..index.reports.len().saturating_sub(REMEMBERED));
        hub::write(&hub.release(host).join("received.json"), &index)?;
    }
    let (mut kept, mut bytes) = (0, 0);
    for run in index.reports.iter().rev() {
        let (report, log) = (received.join(format!("{run}.json")), received.join(format!("{run}.log.gz")));
        kept += usize::from(report.exists());
        bytes += fs::metadata(&log).map_or(0, |metadata| metadata.len());
        if kept > KEPT || bytes > KEPT_BYTES {
            files::remove(&log).and_then(|()| files::remove(&report)).context(|| format!("remove {}", report.display()))?;
        }
    }
    Ok(())
}
