//! Rebooting into what has been deployed, if it takes that, at a time when it may be.

use std::fs;

use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::nix::SYSTEM_PROFILE;
use crate::program::Program;
use crate::system;

/// Whether what is booted next differs from what runs, or was booted, in what only a reboot changes.
pub fn is_needed() -> bool {
    let at = |path: &str| fs::canonicalize(path).ok();
    let next = |what: &str| at(&format!("{SYSTEM_PROFILE}/{what}"));
    let booted = system::named_by("/run/booted-system").ok();
    let booted = |what: &str| booted.as_ref().and_then(|booted| fs::canonicalize(booted.join(what)).ok());
    let differ = |what: &&str| booted(what).is_some_and(|booted| next(what) != Some(booted));
    system::current().ok() != at(SYSTEM_PROFILE) || ["initrd", "kernel", "kernel-modules"].iter().any(differ)
}

/// Reboots, if that is needed, no run is under way and it is the time for it. Options: `--kexec`, to
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
    log::warn!("Rebooting: what has been deployed takes that.");
    let systemctl = |words: &[&str]| Program::new("systemctl").args(words).output(|| words.join(" "), None).map(drop);
    // systemctl finds a kernel by itself only where the boot loader is one of systemd's; NixOS has a service for all
    let by_kexec = || systemctl(&["start", "prepare-kexec.service"]).and_then(|()| systemctl(&["kexec"]));
    match kexec.then(by_kexec) {
        Some(Ok(())) => return Ok(()),
        Some(Err(error)) => log::warn!("{error}; rebooting by the firmware."),
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
