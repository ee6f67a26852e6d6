//! Rebooting into what has been deployed, if it takes that, at a time when it may be; once for each system.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::error::{Context, Error, Result};
use crate::files;
use crate::layout::Layout;
use crate::nix::SYSTEM_PROFILE;
use crate::program::Program;
use crate::system;

/// Holds the name of the system that this machine was rebooted into last.
const REBOOTED: &str = "/var/lib/ekiben/rebooted";

/// Whether what is booted next differs from what runs, or was booted, in what only a reboot changes.
pub fn is_needed() -> bool {
    let at = |path: &str| fs::canonicalize(path).ok();
    let next = |what: &str| at(&format!("{SYSTEM_PROFILE}/{what}"));
    let booted = system::named_by("/run/booted-system").ok();
    let booted = |what: &str| booted.as_ref().and_then(|booted| fs::canonicalize(booted.join(what)).ok());
    let differ = |what: &&str| booted(what).is_some_and(|booted| next(what) != Some(booted));
    system::current().ok() != at(SYSTEM_PROFILE) || ["initrd", "kernel", "kernel-modules"].iter().any(differ)
}

/// Reboots, if that is needed, no run is under way and it is the time for it. Does so once for a system: if another
/// one has been booted all the same, by hand or since this one does not come up, that is to stay. Options: `--kexec`, to
/// do without the firmware where that works, and `--between LOWER UPPER`, times like `01:00`.
pub fn reboot(options: &[&str]) -> Result<()> {
    let (kexec, window) = match options {
        ["--kexec", window @ ..] => (true, window),
        window => (false, window),
    };
    let is_time = match window {
        [] => true,
        ["--between", lower, upper] => {
            let now = Program::new("date").arg("+%H:%M").output(|| "tell the time".into(), None)?;
            is_between(lower, upper, String::from_utf8_lossy(&now).trim())
        }
        _ => return Err(Error::new(format!("Failed to understand {options:?}"))),
    };
    if !is_needed() || !is_time || !Layout::new("").with_journal().is_empty() {
        return Ok(());
    }
    let next = fs::canonicalize(SYSTEM_PROFILE).context(|| format!("read {SYSTEM_PROFILE}"))?;
    let mark = Path::new(REBOOTED);
    if fs::read(mark).is_ok_and(|system| Path::new(OsStr::from_bytes(&system)) == next) {
        log::info!("This machine was already rebooted for {} and runs another system; not rebooting again.", next.display());
        return Ok(());
    }
    files::write(mark, next.as_os_str().as_bytes(), 0o644).context(|| format!("write {REBOOTED}"))?;
    log::warn!("Rebooting into the deployed system.");
    // what has not begun may be tried again
    by(kexec).inspect_err(|_| drop(files::remove(mark)))
}

/// Reboots now.
fn by(kexec: bool) -> Result<()> {
    let systemctl = |words: &[&str]| Program::new("systemctl").args(words).output(|| words.join(" "), None).map(drop);
    // systemctl finds a kernel by itself only where the boot loader is one of systemd's; NixOS has a service for all
    let by_kexec = || systemctl(&["start", "prepare-kexec.service"]).and_then(|()| systemctl(&["kexec"]));
    match kexec.then(by_kexec) {
        Some(Ok(())) => return Ok(()),
        Some(Err(error)) => log::warn!("{error}; falling back to a full reboot."),
        None => {}
    }
    systemctl(&["reboot"])
}

/// Whether it is that time of day; midnight may lie between the two.
fn is_between(lower: &str, upper: &str, now: &str) -> bool {
    if lower <= upper { lower <= now && now < upper } else { lower <= now || now < upper }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_may_hold_midnight() {
        assert!(is_between("01:00", "05:00", "01:00") && is_between("01:00", "05:00", "04:59"));
        assert!(!is_between("01:00", "05:00", "05:00") && !is_between("01:00", "05:00", "00:59"));
        assert!(is_between("22:00", "02:00", "23:59") && is_between("22:00", "02:00", "00:00"));
        assert!(!is_between("22:00", "02:00", "02:00") && !is_between("22:00", "02:00", "21:59"));
    }
}
