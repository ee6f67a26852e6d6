//! The running NixOS: what it is, switching it, and taking turns at that. Root only.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use serde::Deserialize;

use crate::error::{Context, Error, Result};
use crate::program::{Ended, Program};

/// What NixOS runs.
const CURRENT: &str = "/run/current-system";
/// Between two attempts to switch while somebody else does.
const PAUSE: Duration = Duration::from_secs(1);
/// What an activation script that fails has NixOS say. It leads to exit status 2, but not if a unit
/// fails, too.
const SNIPPET_FAILED: &str = "Activation script snippet '";
/// Held by whoever changes what this machine runs. Whoever could open it could hold it.
const TURN: &str = "/run/ekiben/turn";

/// Waits until no other run changes what this machine runs, and keeps others waiting until it is
/// dropped.
pub fn turn() -> Result<Flock<File>> {
    let doing = || format!("lock {TURN}");
    if let Some(directory) = Path::new(TURN).parent() {
        DirBuilder::new().recursive(true).mode(0o700).create(directory).context(doing)?;
    }
    let file = File::options().append(true).create(true).mode(0o600).open(TURN).context(doing)?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| error).context(doing)
}

/// The system that runs now.
pub fn current() -> Result<PathBuf> {
    fs::canonicalize(CURRENT).context(|| format!("read {CURRENT}"))
}

/// Whether this machine is on its way down.
pub fn is_stopping() -> Result<bool> {
    let state = Program::as_root("systemctl").args(["show", "--property=SystemState", "--value"]);
    Ok(state.output(|| "ask systemd".into(), None)?.trim_ascii() == b"stopping")
}

/// Cancels a start of the instance's service that waits for the end of the present run.
///
/// A run that is put back after its unit has failed reloads systemd. Its path unit then looks again,
/// still finds the journal, and asks for a start that nobody needs.
pub fn cancel_start(instance: &str) -> Result<()> {
    let list = Program::as_root("systemctl").args(["list-jobs", "--no-legend", "--full", "--no-pager"]);
    let list = list.arg(format!("ekiben-{instance}.service")).output(|| "list systemd's jobs".into(), None)?;
    for line in String::from_utf8_lossy(&list).lines() {
        if let [job, _, "start", "waiting"] = line.split_whitespace().collect::<Vec<_>>()[..] {
            Program::as_root("systemctl").args(["cancel", job]).output(|| format!("cancel job {job}"), None)?;
        }
    }
    Ok(())
}

/// Has a system do one of `switch-to-configuration`'s actions, within a limit in seconds; while
/// somebody else is switching, waits for that, with the same limit. `doing` is what that is for.
pub fn switch_to(system: &Path, action: &str, limit: u64, doing: &str) -> Result<Ended> {
    let deadline = Instant::now() + Duration::from_secs(limit);
    loop {
        log::info!("{}: {action} ...", system.display());
        let program = Program::as_root(system.join("bin/switch-to-configuration")).arg(action).directory(Path::new("/"));
        let ended = program.watch_for(SNIPPET_FAILED).run(Duration::from_secs(limit), || doing.into())?;
        let locked = !ended.status.success() && ended.tail.iter().any(|line| line.contains("Could not acquire lock"));
        if !locked || Instant::now() > deadline {
            return Ok(ended);
        }
        log::info!("Something else is switching this machine; waiting ...");
        std::thread::sleep(PAUSE);
    }
}

/// The units that have failed, or that systemd starts again and again.
pub fn failed_units() -> Result<BTreeSet<String>> {
    #[derive(Deserialize)]
    struct Unit {
        #[serde(rename = "unit")]
        name: String,
        active: String,
        sub: String,
    }
    let list = Program::as_root("systemctl").args(["list-units", "--all", "--full", "--no-pager", "--output=json"]);
    let list = list.output(|| "list the units".into(), None)?;
    let units: Vec<Unit> = serde_json::from_slice(&list).context(|| "read the list of units".into())?;
    let failed = units.into_iter().filter(|unit| unit.active == "failed" || unit.sub == "auto-restart");
    Ok(failed.map(|unit| unit.name).collect())
}

/// Fails if units have failed that had not before.
pub fn check_units(before: &BTreeSet<String>) -> Result<()> {
    let failed = failed_units()?;
    let new: Vec<_> = failed.difference(before).map(String::as_str).collect();
    if new.is_empty() { Ok(()) } else { Err(Error::new(format!("Failed to start {}", new.join(", ")))) }
}
