//! The way back: the system that was before is put back, and with it what is booted.
//!
//! All that it goes by is in the journal; it may be cut off at any moment and begun again.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::error::{Context, Error, OrLog, Result};
use crate::nix::{self, profile};
use crate::paths::Paths;
use crate::run::journal::{Before, Phase, Run};
use crate::run::status::Status;
use crate::run::{Failure, Outcome, Stage, Trigger};
use crate::system::units::{self, Worse};
use crate::system::{self, Turn, boot_id, health, service};
use crate::{fault, files};

/// Between two looks at the units.
const PAUSE: Duration = Duration::from_secs(1);
/// How long units may take to come back with the old system.
const RECOVERY: Duration = Duration::from_secs(10);
/// How often later runs try again to go back.
const RETURNS: u32 = 3;
/// What is left to do then.
const BY_HAND: &str = "manual intervention is required: run nixos-rebuild, or boot an older generation";

/// Puts back what the journal says was before, unless that is switched off; says so if that fails.
pub fn back(paths: &Paths, run: &mut Run, result: Outcome) -> Outcome {
    let Some(before) = run.before.clone() else { return result };
    if !run.instance.rollback && run.failure.is_some() {
        run.warnings
            .push(format!("rollback is disabled: what the run has done so far stays; the old system is {}", before.system.display()));
        return result;
    }
    log::warn!("Rolling back to {} ...", before.system.display());
    let touched_boot = matches!(run.phase, Phase::Persisting | Phase::Persisted | Phase::AwaitingBoot | Phase::Returning);
    note_failed(run, &before);
    // from here on there is no other way, also if this is cut off
    run.enter(Phase::Returning).or_error();
    fault::point("back: begun");
    match put_back(paths, run, &before, touched_boot).and_then(|worse| with_either(run, worse)) {
        Ok(same) => {
            if !same.is_empty() {
                run.warnings.push(format!("{} with the old system, too", units::failed_to("start", &same)));
            }
            if result != Outcome::Failed {
                return result;
            }
            let is_next = |system: &Path| before.generation.as_ref().is_some_and(|next| next.system == *system);
            if !run.reboot_needed {
                // what was not well before proves nothing
                if !matches!(Run::load_unfit(&before.system), Ok(Some(_))) {
                    excuse(run, &same);
                }
            } else if let Some(current) = system::current().ok().filter(|current| *current != before.system && !is_next(current)) {
                run.warnings.push(format!("this machine runs {} until it is rebooted", current.display()));
            }
            Outcome::RolledBack
        }
        Err(error) => {
            let first = run.failure.as_ref().map(|failure| format!("{}; then ", failure.message)).unwrap_or_default();
            let message = format!("{first}Failed to roll back: {error}; {BY_HAND}");
            // what has not failed by this machine's fault alone is the candidate's doing
            let transient = error.is_transient() && run.failure.as_ref().is_some_and(|failure| failure.transient);
            run.failure = Some(Failure { message, transient, ..Failure::new(Stage::Conclude, &error) });
            Outcome::Stuck
        }
    }
}

/// Notes which units have failed with the candidate, whatever it is put back for.
fn note_failed(run: &mut Run, before: &Before) {
    run.worse.extend(run.blamed.iter().cloned());
    let Some(candidate) = run.candidate.as_ref().filter(|_| run.phase != Phase::Returning && run.boot == boot_id()) else { return };
    let worse = before.units.worse_under(&before.system, candidate).or_warn().unwrap_or_default();
    // the others may wait for the rest of an activation
    run.worse.extend(worse.into_iter().filter(|(_, state)| state == "failed").map(|(name, _)| name));
}

/// Of units that are worse off with the old system, those that were with the candidate, too: that is not its doing.
/// Fails if there are others.
fn with_either(run: &Run, worse: Worse) -> Result<Worse> {
    let (same, mine): (Worse, Worse) = worse.into_iter().partition(|(name, _)| run.worse.contains(name));
    if mine.is_empty() { Ok(same) } else { Err(units::failed_to("start", &mine)) }
}

/// Notes that the candidate may be tried again, if what it has failed for is the same with the old system.
fn excuse(run: &mut Run, same: &Worse) {
    let why = if run.blamed.is_empty() {
        health::verify(&run.instance.health_checks, &run.passed).err()
    } else {
        run.blamed.iter().all(|name| same.contains_key(name)).then(|| units::failed_to("start", same))
    };
    if let (Some(error), Some(failure)) = (why, &mut run.failure) {
        failure.message = format!("{}; the old system fails, too: {error}", failure.message);
        failure.transient = true;
    }
}

/// Puts back the system that was before, and what is booted if that was touched; returns the units that are
/// worse off all the same. Does all that it can, also if a part of it fails; may be done again.
pub fn put_back(paths: &Paths, run: &Run, before: &Before, touched_boot: bool) -> Result<Worse> {
    // what another hand has done in the meantime is to stay
    let ours = |system: &Path| run.is_candidate(system) || before.system == system;
    let boot = system::again(|| put_back_boot(run, before, touched_boot, ours));
    fault::point("back: profile restored");
    let current = system::current()?;
    // after a reboot the old system has come up by itself; and what only a boot brings, only a boot takes away
    let worse = if ours(&current) && !run.reboot_needed && (run.boot == boot_id() || current != before.system) {
        match put_back_system(paths, run, before, &current) {
            // while that was waited for
            Err(_) if !ours(&system::current()?) => Ok(Worse::new()),
            worse => worse,
        }
    } else {
        Ok(Worse::new())
    };
    fault::point("back: system restored");
    boot.and(worse)
}

fn put_back_boot(run: &Run, before: &Before, touched: bool, ours: impl Fn(&Path) -> bool) -> Result<()> {
    run.booted_by().map_or(Ok(()), |loader| loader.forget())?;
    let now = profile::current_generation()?;
    let is_other = now != before.generation;
    if now.is_some_and(|now| ours(&now.system)) {
        profile::restore_profile(before.generation.as_ref())?;
    }
    if let Some(candidate) = &run.candidate {
        profile::remove_generations(candidate, before.last_generation)?;
    }
    match profile::current_generation()? {
        Some(generation) if touched || is_other => {
            system::switch_unchecked(&generation.system, "boot", run.instance.timeouts.activate, "restore the boot loader", &[])?.switched()
        }
        _ => Ok(()),
    }
}

/// Activates the old system, and again if units that ran before do not come back within a while.
fn put_back_system(paths: &Paths, run: &Run, before: &Before, current: &Path) -> Result<Worse> {
    let candidate = run.candidate.as_deref().unwrap_or(&before.system);
    let mut worse = Worse::new();
    for _ in 0..2 {
        system::again(|| {
            let (limit, from) = (run.instance.timeouts.activate, [current, &before.system]);
            let activate = || system::switch_unchecked(&before.system, "test", limit, "activate the old system", &from);
            let ended = service::letting_go_of_jobs(paths.name(), activate)?;
            if ended.status.code() == Some(4) { Ok(()) } else { ended.switched() }
        })?;
        // what no target wants, and the candidate has taken away or stopped, no switch starts
        let stopped = before.units.stopped_under(&before.system)?;
        service::letting_go_of_jobs(paths.name(), || service::start_all(&stopped, run.instance.timeouts.activate)).or_warn();
        let until = Instant::now() + RECOVERY;
        loop {
            worse = before.units.worse_under(candidate, &before.system)?;
            if worse.is_empty() {
                return Ok(worse);
            }
            if Instant::now() > until {
                break;
            }
            std::thread::sleep(PAUSE);
        }
        if worse.keys().all(|name| run.worse.contains(name)) {
            break;
        }
        log::warn!("{}; trying again.", units::failed_to("start", &worse));
    }
    Ok(worse)
}

/// Takes what waits for a boot out of the profile and the boot loader; whoever does so has the turn, and ends the trial then.
/// Where that is cut off, the next boot does both: the trial has not failed.
pub fn withdraw(paths: &Paths, trial: &mut Run, why: &str) -> Result<()> {
    trial.failure = Some(Failure::new(Stage::Boot, &Error::new(why).transient()));
    trial.enter(Phase::Returning)?;
    if let Some(before) = &trial.before {
        put_back(paths, trial, before, true)?;
    }
    if trial.trigger == Trigger::Rollback { Status::keep_undone(paths) } else { Ok(()) }
}

/// Tries again to go back from a system that the last run could not be put back from, a few times at most; whether
/// that has been done.
pub fn go_back_again(paths: &Paths) -> Result<bool> {
    let Some(mut run) = Run::load(paths.stuck())? else { return Ok(false) };
    let Some(before) = run.before.clone() else { return Ok(false) };
    let _turn = Turn::take()?;
    let current = system::current()?;
    let is_by_hand = !run.is_candidate(&current) && before.system != current;
    if !is_by_hand {
        if run.returns >= RETURNS {
            let system = before.system.display();
            return Err(Error::new(format!("Failed to roll back to {system} ({RETURNS} attempts); {BY_HAND}")));
        }
        run.returns += 1;
        run.save()?;
        log::warn!("Rolling back to {}, which failed before ...", before.system.display());
        with_either(&run, put_back(paths, &run, &before, true)?)?;
    }
    files::remove(&paths.stuck()).doing("remove", &paths.stuck())?;
    nix::unroot(paths)?;
    Ok(!is_by_hand)
}
