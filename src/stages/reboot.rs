//! Rebooting, where what has been deployed takes that, at a time when it may be; never twice for the same reason.

use std::fs;
use std::path::Path;

use crate::config::{Config, Instance, LoaderKind, Reboot, When, Window};
use crate::error::{Context, Result};
use crate::nix::profile::SYSTEM_PROFILE;
use crate::paths::{Paths, REBOOTED, rebooted_for};
use crate::program::Program;
use crate::run::hold::Hold;
use crate::run::journal::Run;
use crate::run::status::Status;
use crate::system::boot_loader::BootLoader;
use crate::{files, system};

/// How many of them are remembered.
const REMEMBERED: usize = 100;

/// Whether what is booted next differs from what runs, or was booted, in what only a reboot changes.
pub fn is_needed() -> bool {
    let next = fs::canonicalize(SYSTEM_PROFILE).ok();
    let runs = |next: &Path| system::current().is_ok_and(|running| system::is_of(next, &running));
    !next.as_deref().is_some_and(runs) || next.is_some_and(|next| boots_another(&next))
}

/// Whether what has booted is not what this system would boot.
fn boots_another(system: &Path) -> bool {
    let booted = system::named_by("/run/booted-system").ok();
    let of = |system: &Path, what| fs::canonicalize(system.join(what)).ok();
    ["initrd", "kernel", "kernel-modules"].iter().any(|what| {
        let booted = booted.as_ref().and_then(|booted| of(booted, what));
        booted.is_some_and(|booted| of(system, what) != Some(booted))
    })
}

/// What an instance has to do with a reboot.
struct Part<'a> {
    policy: &'a Reboot,
    /// What it has deployed waits for a boot.
    waits: bool,
    /// What it has had booted runs, and is not to.
    unfit: bool,
    /// The profile has what it has deployed.
    deployed: bool,
}

/// A system to boot, or one not to go on with.
#[derive(Debug, PartialEq)]
enum Way {
    Forward,
    Back,
}

/// Reboots, if something waits for that, no run is under way and nothing held, and whoever has deployed it may have it now. Does so once for
/// a system, and once back from one. What another hand has booted or switched to stays.
pub fn reboot(config: &Config) -> Result<()> {
    let next = fs::canonicalize(SYSTEM_PROFILE).doing("read", Path::new(SYSTEM_PROFILE))?;
    let running = system::current()?;
    let parts: Vec<_> = config.instances.iter().map(|(name, instance)| part(name, instance, &running, &next)).collect();
    let Some((way, policy)) = decide(&parts, system::is_of(&next, &running), boots_another(&next)) else { return Ok(()) };
    if Hold::is_any(config) || !Paths::new("").with_journal().is_empty() || !is_time(policy.window.as_ref())? {
        return Ok(());
    }
    let (mark, system) = match way {
        Way::Forward => (next.display().to_string(), &next),
        Way::Back => (format!("from {}", running.display()), &running),
    };
    let rebooted = rebooted_for();
    if rebooted.contains(&mark) {
        log::info!("This machine was already rebooted for {}; not rebooting again.", system.display());
        return Ok(());
    }
    let marks = [&rebooted[..], &[format!("{mark}\t{}", system::boot_id())]].concat();
    let marks = marks[marks.len().saturating_sub(REMEMBERED)..].join("\n");
    files::write(Path::new(REBOOTED), marks.as_bytes(), 0o644).doing("write", Path::new(REBOOTED))?;
    match way {
        Way::Forward => log::warn!("Rebooting into the deployed system."),
        Way::Back => log::warn!("Rebooting into the previous system: the deployed one is not well."),
    }
    by(policy.kexec, config.boot_loader, &next)
}

fn part<'a>(name: &str, instance: &'a Instance, running: &Path, next: &Path) -> Part<'a> {
    let paths = Paths::new(name);
    let status = Status::read(&paths);
    let deployed = status.deployed.is_some_and(|deployed| deployed.system == next);
    // what has waited for this boot is yet to be judged
    let trial = Run::load(paths.trial()).ok().flatten().filter(Run::waits);
    Part {
        policy: &instance.reboot,
        waits: trial.is_some_and(|trial| trial.candidate.as_deref() == Some(next)),
        unfit: status.unfit.is_some_and(|(boot, system)| boot == system::boot_id() && system::is_of(&system, running)),
        deployed,
    }
}

/// Which way to reboot, if at all, and by whose policy: that of whoever is concerned; if that is nobody, of any that permits.
fn decide<'a>(parts: &[Part<'a>], runs_next: bool, boots_another: bool) -> Option<(Way, &'a Reboot)> {
    let way = if runs_next {
        boots_another.then_some(Way::Forward)?
    } else if parts.iter().any(|part| part.unfit) {
        Way::Back
    } else {
        parts.iter().any(|part| part.waits).then_some(Way::Forward)?
    };
    let is_concerned = |part: &&Part| if way == Way::Back { part.unfit } else { part.waits || part.deployed };
    let is_known = parts.iter().any(|part| is_concerned(&part));
    let mut policies = parts.iter().filter(|part| !is_known || is_concerned(part)).map(|part| part.policy);
    let policy = policies.find(|policy| policy.when == When::Needed)?;
    Some((way, policy))
}

/// Reboots now. By kexec, a system that the boot loader was to boot once needs none: if it hangs, the next power cycle
/// boots another.
fn by(kexec: bool, loader: Option<LoaderKind>, next: &Path) -> Result<()> {
    let is_armed = |paths: &Paths| Run::load(paths.trial()).is_ok_and(|trial| trial.is_some_and(|trial| trial.boots_once));
    let loader = BootLoader::of(loader).filter(|_| Paths::new("").with_trial().iter().any(is_armed));
    let systemctl = |words: &[&str]| Program::new("systemctl").args(words).output(|| words.join(" "), None).map(drop);
    // systemctl finds a kernel by itself only where the boot loader is one of systemd's; NixOS has a service for all
    let forget = || loader.as_ref().map_or(Ok(()), BootLoader::forget);
    let by_kexec = || systemctl(&["start", "prepare-kexec.service"]).and_then(|()| forget()).and_then(|()| systemctl(&["kexec"]));
    match kexec.then(by_kexec) {
        Some(Ok(())) => return Ok(()),
        Some(Err(error)) => {
            log::warn!("{error}; falling back to a full reboot.");
            loader.map_or(Ok(()), |loader| loader.boot_once(next))?;
        }
        None => {}
    }
    systemctl(&["reboot"])
}

fn is_time(window: Option<&Window>) -> Result<bool> {
    let Some(window) = window else { return Ok(true) };
    let now = Program::new("date").arg("+%H:%M").said(|| "tell the time".into())?;
    Ok(is_between(&window.lower, &window.upper, now.trim()))
}

/// Whether it is that time of day; midnight may lie between the two, and between a time and itself lies a whole day.
fn is_between(lower: &str, upper: &str, now: &str) -> bool {
    if lower < upper { lower <= now && now < upper } else { lower <= now || now < upper }
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
        // as `system.autoUpgrade` has it
        assert!(is_between("03:00", "03:00", "03:00") && is_between("00:00", "00:00", "12:00"));
    }

    #[test]
    fn it_is_rebooted_for_what_was_deployed_by_the_policy_of_who_has_deployed_it() {
        let [may, may_not] = [When::Needed, When::Never].map(|when| Reboot { when, ..Reboot::default() });
        let part = |policy, what: &str| Part { policy, waits: what == "waits", unfit: what == "unfit", deployed: what == "deployed" };
        let way = |parts: &[Part], runs_next, boots_another| decide(parts, runs_next, boots_another).map(|(way, _)| way);
        let [waits, unfit, deployed, idle] = ["waits", "unfit", "deployed", ""].map(|what| part(&may, what));

        assert_eq!(way(&[waits], false, true), Some(Way::Forward));
        assert_eq!(way(&[unfit], false, true), Some(Way::Back));
        // switched to, with another kernel; by another hand, too
        assert_eq!(way(&[deployed], true, true), Some(Way::Forward));
        assert_eq!(way(&[idle], true, true), Some(Way::Forward));
        // another hand has booted something else
        for what in ["deployed", ""] {
            assert_eq!(way(&[part(&may, what)], false, true), None, "{what}");
        }
        assert_eq!(way(&[part(&may, "deployed")], true, false), None);
        // another instance's policy is none for this one's
        for what in ["waits", "unfit"] {
            assert_eq!(way(&[part(&may_not, what), part(&may, "")], false, true), None, "{what}");
            assert!(way(&[part(&may_not, ""), part(&may, what)], false, true).is_some(), "{what}");
        }
        assert_eq!(way(&[part(&may_not, "deployed"), part(&may, "")], true, true), None);
        assert_eq!(way(&[part(&may_not, ""), part(&may, "")], true, true), Some(Way::Forward));
    }
}
