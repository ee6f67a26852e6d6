//! Somebody else is at work in the repository: what is in the way may be gone in a moment.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::kill;
use nix::unistd::Pid;

use crate::config::Instance;
use crate::error::Result;
use crate::git::Repository;
use crate::git::savepoint::locks::{is_young, wait_while};

/// How long somebody is waited for who does one thing after the other; tests wait for it.
const LIMIT: Duration = Duration::from_secs(if cfg!(feature = "fault-points") { 1 } else { 10 });
/// The same for a git that collects garbage.
const GC_LIMIT: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(200);

/// Does something to an instance's repository, and if it fails again, for as long as somebody seems to be at work there: a
/// rebase takes its second, and an update is committed in the next one.
pub fn patiently<T>(instance: &Instance, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let until = Instant::now() + LIMIT;
    let mut has_waited = false;
    loop {
        match attempt() {
            Err(error) if Instant::now() < until && is_busy(instance) => {
                if !has_waited {
                    log::info!("{error}; waiting a moment, since somebody is at work there.");
                }
                has_waited = true;
                thread::sleep(PAUSE);
            }
            done => return done,
        }
    }
}

/// Whether something in the repository has just been changed: most of what git does makes a file in its directory, a
/// repack one beside the others, and an editor one beside the lock file, or writes that.
fn is_busy(instance: &Instance) -> bool {
    let (flake, git_directory) = (&instance.flake_ref.directory, instance.flake_path.join(".git"));
    let places = [git_directory.join("objects/pack"), git_directory, flake.join("flake.lock"), flake.clone()];
    places.iter().any(|place| place.symlink_metadata().is_ok() && is_young(place))
}

impl Repository {
    /// Fails unless all of a commit's files are there, and stay: once a ref leads to it, a git gc does not take them away; but
    /// one may, with `--prune=now`, that began before, so such a one is waited for.
    pub fn check_is_whole(&self, commit: &str) -> Result<()> {
        wait_while(GC_LIMIT, || self.is_collecting());
        self.ask(["rev-list", "--objects", "--no-walk", "--quiet", commit]).map(drop)
    }

    /// Whether a git collects garbage, which has left its process and host there.
    fn is_collecting(&self) -> bool {
        let said = fs::read_to_string(self.git_directory.join("gc.pid")).unwrap_or_default();
        let process = said.split(' ').next().and_then(|process| process.parse().ok());
        process.is_some_and(|process| kill(Pid::from_raw(process), None).is_ok())
    }
}
