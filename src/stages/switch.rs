//! The new system in effect: activated without being what is booted, and watched for a while.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::config::OnUnitFailure;
use crate::error::{Error, Result};
use crate::paths::Paths;
use crate::run::journal::{Before, Decision, Phase, Run};
use crate::run::status::Status;
use crate::run::{Stage, Trigger};
use crate::stages::rollback;
use crate::system::switched::{LOOK, Switched};
use crate::system::units::{self, Restarts, Units, Worse};
use crate::system::{self, health};

/// Between two looks at the units of a system that is observed.
const PAUSE: Duration = Duration::from_secs(1);
/// Each of so many of them is a close one: at what systemd has restarted, and at the health checks.
const LOOKS: u32 = 5;

/// Activates the candidate without making it what is booted. Fails, and has the run start over, if another hand has switched
/// since this was `running`, which what is gone back to need not be.
pub fn switch(run: &mut Run, system: &Path, before: &Before, running: &Path) -> Result<()> {
    let ended = system::switch_to(system, "test", run.instance.timeouts.activate, "activate the new system", &[running]);
    let ended = match ended {
        Err(error) if ![system, running].contains(&&*system::current()?) => {
            // another hand: what it did is to stay
            leave(run)?;
            run.decision = Some(Decision::StartOver).filter(|_| run.trigger != Trigger::Rollback);
            return Err(error);
        }
        ended => ended?,
    };
    match Switched::of(ended)? {
        Switched::Runs { tail, .. } if running != system && system::current()? == running => {
            let why = "Failed to activate the new system: its activation ended half-way, as where one of its scripts says `exit`";
            Err(Error::new(why).with_tail(tail))
        }
        Switched::Runs { units_failed, users, tail } => {
            run.warnings.extend((!users.is_empty()).then(|| units::of_users_failed(&users)));
            let is_well = check_units(run, system, before, None).map_err(|error| error.with_tail(tail))?;
            if units_failed && is_well && users.is_empty() {
                run.warnings.push(failed_again(before)?);
            }
            Ok(())
        }
        Switched::AtBoot(why) => {
            at_boot(run, &why);
            Ok(())
        }
        Switched::Refused(error) => {
            leave(run)?;
            Err(error)
        }
    }
}

/// Notes that nothing but a boot brings the candidate, and why.
pub fn at_boot(run: &mut Run, why: &str) {
    run.warnings.push(format!("the new system takes effect at the next boot: {why}"));
    run.reboot_needed = true;
}

/// Notes that there is nothing to put back.
pub fn leave(run: &mut Run) -> Result<()> {
    run.before = None;
    run.enter(Phase::Begun)
}

/// What to say where units have failed, but not by the switch.
fn failed_again(before: &Before) -> Result<String> {
    let failed = Units::failed_now()?;
    let again: Vec<_> = failed.intersection(&before.units.failed).cloned().collect();
    if let Some(unit) = failed.difference(&before.units.failed).find(|unit| units::is_report(unit) && !unit.starts_with(LOOK)) {
        return Ok(format!("{unit} has failed, not by the switch; see systemctl status {unit}"));
    }
    Ok(if again.is_empty() {
        "switch-to-configuration exited with 4, though no unit of the system has failed; see its output in the journal".into()
    } else {
        format!("units that had failed before the switch have failed again: {}", again.join(", "))
    })
}

/// Whether no unit is worse off than before, nor has died since `restarts`, though systemd has started it again. Fails
/// if one is, unless that is to be kept.
pub fn check_units(run: &mut Run, system: &Path, before: &Before, restarts: Option<&Restarts>) -> Result<bool> {
    let mut worse = Worse::new();
    if restarts.is_some() || run.phase != Phase::Observing {
        worse.append(&mut before.units.omitted_under(system)?);
    }
    if let Some(restarts) = restarts {
        worse.append(&mut restarts.since(&before.units, &before.system, system)?);
    }
    // last: systemd takes its time for the others
    worse.append(&mut before.units.worse_under(&before.system, system)?);
    if worse.is_empty() {
        return Ok(true);
    }
    let error = units::failed_to(if run.phase == Phase::Observing { "keep up" } else { "start" }, &worse);
    if run.instance.on_unit_failure == OnUnitFailure::Rollback {
        run.blamed = worse.into_keys().collect();
        return Err(error);
    }
    let warning = error.to_string();
    if !run.warnings.contains(&warning) {
        run.warnings.push(warning);
    }
    Ok(false)
}

/// The same after health checks, if they have taken a while since they `began`.
pub fn look_again(run: &mut Run, system: &Path, before: &Before, began: Instant) -> Result<()> {
    if began.elapsed() > PAUSE {
        check_units(run, system, before, None)?;
    }
    Ok(())
}

/// Looks at units and health checks again until the end of the time for that: what fails then has failed. `restarts` is
/// how often systemd had started services again by the end of the switch.
pub fn observe(paths: &Paths, run: &mut Run, system: &Path, before: &Before, mut restarts: Restarts) -> Result<()> {
    log::info!("Observing the new system for {} s ...", run.instance.observe);
    run.enter(Phase::Observing)?;
    Status::announce(paths, run, Stage::Observe)?;
    let limit = Duration::from_secs(run.instance.observe);
    let mut until = Instant::now() + limit;
    let patience = until + Duration::from_secs(run.instance.timeouts.activate);
    for look in 1.. {
        let left = until.saturating_duration_since(Instant::now());
        thread::sleep(left.min(PAUSE));
        if system::current()? != system {
            // another hand
            break;
        }
        let is_close = left.is_zero() || look % LOOKS == 0;
        let checked = check_units(run, system, before, is_close.then_some(&restarts));
        let is_to_begin_anew = match checked.and_then(|_| if is_close { verify(paths, run, system, before) } else { Ok(false) }) {
            // that may have stopped it for a moment
            Err(error) if Instant::now() < patience && system::is_being_switched()? => {
                log::info!("{error}, while something else is switching this machine; observing it anew ...");
                run.blamed.clear();
                true
            }
            checked => checked?,
        };
        if is_to_begin_anew {
            run.enter(Phase::Observing)?;
            restarts = Restarts::now()?;
            until = Instant::now() + limit;
        } else if left.is_zero() {
            break;
        }
    }
    Ok(())
}

/// Has the health checks say whether the candidate does its work. Where nothing but another machine
/// fails to answer, the old system is asked whose doing that is: the candidate stays if it is the same there.
/// Whether it has been switched to anew for that.
pub fn verify(paths: &Paths, run: &mut Run, system: &Path, before: &Before) -> Result<bool> {
    let checks = run.instance.health_checks.clone();
    let (remote, local) = health::by_place(&checks, &run.passed);
    let began = Instant::now();
    health::verify(&checks, &local)?;
    let Err(error) = health::verify(&checks, &remote) else {
        look_again(run, system, before, began)?;
        return Ok(false);
    };
    if !run.instance.rollback {
        return Err(error);
    }
    log::warn!("{error}. Rolling back to {} to check whether the old system fails, too ...", before.system.display());
    run.enter(Phase::Returning)?;
    rollback::put_back(paths, run, before, false)?;
    if health::verify(&checks, &remote).is_ok() {
        return Err(error);
    }
    log::warn!("The check fails with the old system, too; keeping the new one.");
    run.warnings.push(format!("{error}; the old system failed, too, so the new one stays"));
    run.passed = local;
    run.enter(Phase::Switching)?;
    switch(run, system, before, &before.system)?;
    health::verify(&checks, &run.passed).map(|()| true)
}
