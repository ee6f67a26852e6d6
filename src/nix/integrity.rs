//! The store and power cuts. Nix writes down that a path is complete, and leaves its contents to the
//! kernel, which may take half a minute to write them: after a power cut a path may be known, but empty.
//!
//! So what is activated is made durable first; and after a run that a power cut has ended, what has come
//! into the store since it began is looked at, and what is damaged is removed, to be recreated.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{Context, Result};
use crate::gather::gather;
use crate::names::is_store_path;
use crate::nix::as_root;
use crate::nix::profile::SYSTEM_PROFILE;
use crate::program::Program;
use crate::system::now;

const STORE: &str = "/nix/store";
/// What is not to be taken away, whatever is wrong with it.
const SYSTEMS: [&str; 3] = ["/run/current-system", "/run/booted-system", SYSTEM_PROFILE];
/// What was complete so long before the run began had been written by then, in seconds.
const WRITTEN: u64 = 120;
/// Of how many paths nix-store is asked at once: a command line has its limits.
const AT_ONCE: usize = 1000;
/// How long to look at what has come into the store, and to repair it, may take.
const LIMIT: Duration = Duration::from_secs(3600);

/// Makes all of the store durable, and the system profile.
pub fn sync() -> Result<()> {
    for place in [Path::new(STORE), Path::new(SYSTEM_PROFILE).parent().unwrap_or(Path::new("/"))] {
        let directory = File::open(place).doing("sync", place)?;
        nix::unistd::syncfs(directory).doing("sync", place)?;
    }
    Ok(())
}

/// Looks at what has come into the store since a time, in seconds since 1970, and takes away, or repairs
/// if a system in use needs it, what is damaged.
pub fn mend(since: u64) -> Result<()> {
    // by a clock that has been set back since, everything may have come later
    let since = if since > now() { 0 } else { i64::try_from(since.saturating_sub(WRITTEN)).unwrap_or(i64::MAX) };
    let entries = fs::read_dir(STORE).doing("list", Path::new(STORE))?.flatten();
    let new = entries.filter(|entry| entry.metadata().is_ok_and(|metadata| metadata.ctime() >= since)).map(|entry| entry.path());
    let new: BTreeSet<PathBuf> = gather(new.filter(|path| is_store_path(path)));
    // what is not valid is recreated when it is needed
    let invalid = ask(&["--check-validity", "--print-invalid"], &new)?;
    let valid: Vec<PathBuf> = new.difference(&invalid).cloned().collect();
    // many at once, as they mostly are
    let suspects = valid.chunks(AT_ONCE).filter(|paths| !are_intact(*paths)).flatten();
    let damaged: BTreeSet<_> = gather(suspects.filter(|path| !are_intact([*path])).cloned());
    if damaged.is_empty() {
        return Ok(());
    }
    let doomed = ask(&["--query", "--referrers-closure"], &damaged)?;
    let used = ask(&["--query", "--requisites"], &gather(SYSTEMS.iter().map(PathBuf::from).filter(|path| path.exists())))?;
    if doomed.is_disjoint(&used) {
        log::warn!("Removing what a power cut has damaged in the store, and what depends on it: {}.", names(&doomed));
        let delete = nix_store().args(["--delete", "--ignore-liveness"]).args(&doomed);
        return delete.run(LIMIT, || format!("remove {}", names(&doomed)))?.success();
    }
    log::warn!("Repairing what a power cut has damaged in the store: {}.", names(&damaged));
    let repair = nix_store().arg("--repair-path").args(&damaged);
    repair.run(LIMIT, || format!("repair {}", names(&damaged)))?.success()
}

/// The paths that nix-store answers with.
fn ask(question: &[&str], paths: &BTreeSet<PathBuf>) -> Result<BTreeSet<PathBuf>> {
    let mut answer = BTreeSet::new();
    for paths in paths.iter().collect::<Vec<_>>().chunks(AT_ONCE) {
        let said = nix_store().args(question).args(paths).said(|| "ask the store".into())?;
        answer.extend(said.lines().map(PathBuf::from));
    }
    Ok(answer)
}

fn are_intact<'a>(paths: impl IntoIterator<Item = &'a PathBuf>) -> bool {
    nix_store().arg("--verify-path").args(paths).output(|| "verify the store".into(), None).is_ok()
}

fn nix_store() -> Program {
    as_root("nix-store")
}

fn names(paths: &BTreeSet<PathBuf>) -> String {
    paths.iter().filter_map(|path| path.file_name()?.to_str()).collect::<Vec<_>>().join(", ")
}
