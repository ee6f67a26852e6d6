//! The running NixOS: what it is; and, for root only, switching it, and taking turns at that.

pub mod boot_loader;
pub mod health;
mod omitted;
pub mod properties;
pub mod service;
pub mod switched;
pub mod units;

use std::fs::{self, DirBuilder, File, Metadata};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::fcntl::{Flock, FlockArg};
use nix::sys::stat::{major, minor};
use sd_notify::NotifyState;

use crate::error::{Context, Error, Result};
use crate::program::Program;
use crate::program::exited::Exited;
use crate::system::switched::{BY_ANOTHER_ALL_THE_TIME, WATCHED};

/// What NixOS runs.
const CURRENT: &str = "/run/current-system";
/// Held by `switch-to-configuration`.
const SWITCH_LOCK: &str = "/run/nixos/switch-to-configuration.lock";
/// Between two attempts to switch while somebody else does.
const PAUSE: Duration = Duration::from_secs(1);
/// How long what ought to work is tried again.
const PERSISTENCE: Duration = Duration::from_secs(20);
/// How long others wait for what a user may hold up.
const MOMENT: Duration = Duration::from_secs(10);
/// What is of this boot only.
pub const RUNTIME: &str = "/run/ekiben";
/// Why a run does not go on from there.
pub const BY_ANOTHER: &str = "something else has switched this machine in the meantime";
/// Held by whoever changes what this machine runs. Whoever could open it could hold it.
const TURN: &str = "/run/ekiben/turn";

/// Whether the running system has a unit of its own with this file.
pub fn has_unit(file: &str) -> bool {
    Path::new("/etc/systemd/system").join(file).exists()
}

/// The right to change what this machine runs; others wait for it until this is dropped.
pub struct Turn {
    lock: Flock<File>,
    is_used: bool,
}

impl Turn {
    /// Waits until no other run has it.
    pub fn take() -> Result<Self> {
        let doing = || format!("lock {TURN}");
        make_runtime_directory().context(doing)?;
        let file = File::options().append(true).create(true).mode(0o600).open(TURN).context(doing)?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).or_else(|(file, _)| {
            log::info!("Another run is switching this machine; waiting ...");
            show("another run is switching this machine");
            Flock::lock(file, FlockArg::LockExclusive).inspect(|_| show(""))
        });
        Ok(Self { lock: lock.map_err(|(_, error)| error).context(doing)?, is_used: true })
    }

    /// The same, if no turn has ended since [`Self::count`] was this.
    pub fn take_at(count: u64) -> Result<Option<Self>> {
        let mut turn = Self::take()?;
        turn.is_used = Self::count() == count;
        Ok(Some(turn).filter(|turn| turn.is_used))
    }

    /// How many turns have ended: the same before and after taking one if nothing has happened in between.
    pub fn count() -> u64 {
        fs::metadata(TURN).map_or(0, |metadata| metadata.len())
    }

    /// Takes it again, if it has been lost.
    pub fn retake(turn: &mut Option<Self>) -> Result<()> {
        if turn.is_none() {
            *turn = Some(Self::take()?);
        }
        Ok(())
    }

    /// Does what a user may hold up, and lets others have the turn if that takes longer than a moment.
    pub fn lend<T>(turn: &mut Option<Self>, work: impl FnOnce() -> T) -> T {
        unless_soon(work, || drop(turn.take()))
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        // a byte for each: in memory, and so of this boot
        if self.is_used {
            let _ = (&*self.lock).write_all(b".");
        }
    }
}

/// Has systemd know what the run does or waits for, for `ekiben status`.
pub fn show(what: &str) {
    let _ = sd_notify::notify(&[NotifyState::Status(what)]);
}

/// Seconds since 1970.
pub fn now() -> u64 {
    seconds(SystemTime::now())
}

/// A moment in these.
pub fn seconds(moment: SystemTime) -> u64 {
    moment.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// What tells one boot from another.
pub fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// What this machine is called.
pub fn host_name() -> String {
    fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned()
}

/// The system that runs now.
pub fn current() -> Result<PathBuf> {
    named_by(CURRENT)
}

/// Whether what runs is a system, or one of its specialisations.
pub fn is_of(system: &Path, running: &Path) -> bool {
    system == running || specialisation(system, running).is_some()
}

/// The specialisation of a system that this one is.
pub fn specialisation(system: &Path, running: &Path) -> Option<String> {
    let all = fs::read_dir(system.join("specialisation")).into_iter().flatten().flatten();
    all.filter(|entry| fs::canonicalize(entry.path()).is_ok_and(|path| path == running))
        .find_map(|entry| entry.file_name().into_string().ok())
}

/// The system that a link in `/run` names; in the sandbox of the user's stages, what it named when they began.
pub fn named_by(link: &str) -> Result<PathBuf> {
    let doing = || format!("read {link}");
    let path = fs::canonicalize(link).context(doing)?;
    if path != Path::new(link) {
        return Ok(path);
    }
    // there, what the link names is mounted in its place
    let mounts = fs::read_to_string("/proc/self/mountinfo").context(doing)?;
    mounted(&mounts, link).ok_or_else(|| Error::new(format!("Failed to {}: expected a link or a mount", doing())))
}

/// What is mounted at `place`, by its name in the store.
fn mounted(mounts: &str, place: &str) -> Option<PathBuf> {
    let fields = |line: &str| line.split(' ').skip(3).take(2).map(String::from).collect::<Vec<_>>();
    let source = mounts.lines().map(fields).rfind(|fields| fields.get(1).is_some_and(|at| at == place))?;
    Some(Path::new("/nix/store").join(Path::new(source.first()?).file_name()?))
}

/// Whether this machine is on its way down.
pub fn is_stopping() -> Result<bool> {
    Ok(state()? == "stopping")
}

/// Whether it has come up since it was booted, and is not on its way down.
pub fn has_come_up() -> Result<bool> {
    Ok(["running", "degraded"].contains(&&*state()?))
}

fn state() -> Result<String> {
    Ok(systemctl(&["show", "--property=SystemState", "--value"])?.trim().to_owned())
}

fn make_runtime_directory() -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(RUNTIME)
}

/// A name that nobody else can know, nor has.
pub fn uuid() -> Result<String> {
    const PATH: &str = "/proc/sys/kernel/random/uuid";
    fs::read_to_string(PATH).doing("read", Path::new(PATH)).map(|uuid| uuid.trim_end().to_owned())
}

/// What systemctl answers to a question; asked again for a while, since systemd does not answer while it
/// executes itself anew. Moments are UTC's, also those that `--timestamp` is not about.
pub fn systemctl(question: &[&str]) -> Result<String> {
    again(|| Program::as_root("systemctl").args(question).env("TZ", "UTC").said(|| "ask systemd".into())).map_err(Error::transient)
}

/// How many microseconds a time span is, as in systemd.time(7) and as systemctl shows it; none if it is none, or has no end.
pub fn microseconds(span: &str) -> Option<u64> {
    let said = Program::new("systemd-analyze").args(["timespan", "--", span]).said(String::new).ok()?;
    said.lines().nth(1)?.rsplit(' ').next()?.parse().ok().filter(|count| *count < u64::MAX)
}

/// Does something, and `late` whenever it has taken another moment.
fn unless_soon<T>(work: impl FnOnce() -> T, mut late: impl FnMut() + Send) -> T {
    let (done, is_done) = mpsc::channel::<()>();
    thread::scope(|scope| {
        scope.spawn(move || {
            while is_done.recv_timeout(MOMENT) == Err(RecvTimeoutError::Timeout) {
                late();
            }
        });
        let result = work();
        drop(done);
        result
    })
}

/// Tries something until it succeeds, a few times within a while, with growing pauses.
pub fn again<T>(mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let until = Instant::now() + PERSISTENCE;
    let mut pause = PAUSE;
    loop {
        match attempt() {
            Err(error) if Instant::now() + pause < until => {
                log::warn!("{error}; trying again in {} s.", pause.as_secs());
                thread::sleep(pause);
                pause *= 2;
            }
            result => return result,
        }
    }
}

/// Has a system do one of `switch-to-configuration`'s actions, within a limit in seconds; while
/// somebody else is switching, waits for that, with the same limit. `doing` is what that is for. Does nothing, and fails, if
/// the system that runs then is none of `from`, where these are given: another hand has switched.
pub fn switch_to(system: &Path, action: &str, limit: u64, doing: &str, from: &[&Path]) -> Result<Exited> {
    switch(system, action, limit, doing, from, true)
}

/// The same without the system's pre-switch checks: on the way back, in which none may stand, and where a switch has made them.
pub fn switch_unchecked(system: &Path, action: &str, limit: u64, doing: &str, from: &[&Path]) -> Result<Exited> {
    switch(system, action, limit, doing, from, false)
}

fn switch(system: &Path, action: &str, limit: u64, doing: &str, from: &[&Path], with_checks: bool) -> Result<Exited> {
    let deadline = Instant::now() + Duration::from_secs(limit);
    let mut broken_off = None;
    loop {
        // not by the program itself: some wait, and then have their system take effect whatever runs by then
        if is_being_switched()? && Instant::now() < deadline {
            wait_for_another();
            continue;
        }
        let is_half_there = broken_off.is_some() && current()? == system;
        if !is_half_there && !from.is_empty() && !from.contains(&&*current()?) {
            return Err(Error::new(format!("Failed to {doing}: {BY_ANOTHER}")).transient());
        }
        show("");
        log::info!("{}: {action} ...", system.display());
        let program = Program::as_root(system.join("bin/switch-to-configuration")).arg(action).directory(Path::new("/"));
        let program = if with_checks && broken_off.is_none() { program } else { program.env("NIXOS_NO_CHECK", "1") };
        let ended = program.watch_for(WATCHED).run(Duration::from_secs(limit), || doing.into())?;
        if ended.is_locked() {
            if Instant::now() > deadline {
                return Ok(broken_off.unwrap_or(ended));
            }
            wait_for_another();
        } else if action == "test" && broken_off.is_none() && ended.has_broken_off() {
            log::warn!("switch-to-configuration has ended half-way; having it complete that ...");
            broken_off = Some(ended);
        } else {
            return Ok(ended);
        }
    }
}

fn wait_for_another() {
    log::info!("Something else is switching this machine; waiting ...");
    show("something else is switching this machine");
    thread::sleep(PAUSE);
}

/// Looks at this machine while nobody else switches it, and again where somebody has meanwhile; within a limit in seconds.
pub fn at_rest<T>(limit: u64, mut look: impl FnMut() -> Result<T>) -> Result<T> {
    let deadline = Instant::now() + Duration::from_secs(limit);
    loop {
        let before = switched_at();
        let seen = if is_being_switched()? { None } else { Some(look()?) };
        if let Some(seen) = seen.filter(|_| is_being_switched().is_ok_and(|is| !is) && switched_at() == before) {
            show("");
            return Ok(seen);
        }
        if Instant::now() > deadline {
            return Err(Error::new(format!("Failed to look at what runs: {BY_ANOTHER_ALL_THE_TIME}")).transient());
        }
        wait_for_another();
    }
}

/// Whether somebody switches this machine. Who took the lock to find out would have another's switch fail.
pub fn is_being_switched() -> Result<bool> {
    let locks = fs::read_to_string("/proc/locks").doing("read", Path::new("/proc/locks"))?;
    // as there: where a file is, and which it is
    let name = |lock: Metadata| format!("{:02x}:{:02x}:{}", major(lock.dev()), minor(lock.dev()), lock.ino());
    Ok(has_lock(&locks, &fs::metadata(SWITCH_LOCK).map(name).unwrap_or_default()))
}

/// What tells one switch from the next.
fn switched_at() -> Option<SystemTime> {
    fs::symlink_metadata(CURRENT).and_then(|metadata| metadata.modified()).ok()
}

/// Whether somebody has the lock of a file, rather than waits for it.
fn has_lock(locks: &str, file: &str) -> bool {
    locks.lines().any(|line| line.contains(" FLOCK ") && !line.contains(" -> ") && line.split_whitespace().any(|word| word == file))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_a_lock_is_told_from_who_waits_for_it() {
        let locks = "1: FLOCK  ADVISORY  WRITE 71 00:1a:123 0 EOF\n1: -> FLOCK  ADVISORY  WRITE 72 00:1a:124 0 EOF\n\
                     2: POSIX  ADVISORY  WRITE 73 00:1a:125 0 EOF\n";
        let files = ["00:1a:123", "00:1b:123", "00:1a:23", "00:1a:124", "00:1a:125", ""];
        let held: Vec<&str> = files.into_iter().filter(|file| has_lock(locks, file)).collect();
        assert_eq!(held, ["00:1a:123"]);
    }

    #[test]
    fn the_running_system_is_found_in_a_sandbox() {
        let mounts = "\
            30 1 0:26 / / rw - ext4 /dev/sda rw\n\
            31 30 0:27 /@nix/store/abc-nixos /run/current-system ro,nosuid shared:1 - btrfs /dev/sda rw\n\
            32 30 0:28 / /run/current-system/sub rw - tmpfs tmpfs rw\n";
        assert_eq!(mounted(mounts, CURRENT), Some("/nix/store/abc-nixos".into()));
        assert_eq!(mounted("30 1 0:26 / / rw - ext4 /dev/sda rw\n", CURRENT), None);
    }
}
