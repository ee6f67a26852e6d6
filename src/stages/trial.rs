//! The system of a run that waited for a boot: whether it has booted, and is well.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Context, Error, OrLog, Result};
use crate::fault;
use crate::names::RunId;
use crate::nix::{integrity, profile};
use crate::paths::Paths;
use crate::run::Stage;
use crate::run::journal::{Phase, Run};
use crate::run::status::Status;
use crate::stages::switch;
use crate::system::units::Restarts;
use crate::system::{self, boot_id, health, service};

/// Between two looks at a system that has booted.
const PAUSE: Duration = Duration::from_secs(5);

/// Whether a run of an earlier boot has come so far that its system is to be judged: it may have been cut off when
/// what it waited for had come about.
pub fn is_due(run: &Run) -> bool {
    let runs = || system::current().is_ok_and(|current| run.is_candidate(&current));
    run.phase == Phase::AwaitingBoot || run.phase == Phase::Persisting && runs()
}

/// Has the system be what is booted from now on, if it has booted and stays well for a while.
pub fn judge(paths: &Paths, run: &mut Run) -> Result<()> {
    let on_trial = run.candidate.clone().zip(run.before.clone());
    let (system, before) = on_trial.ok_or_else(|| Error::new("Failed to find what is on trial"))?;
    // a report of its own, with what the journal has of this boot
    run.id = RunId::try_from(boot_id().replace('-', "")).context(|| "name the boot".into())?;
    Status::announce(paths, run, Stage::Boot).or_warn();
    fault::point("boot: begun");
    check_has_booted(run, &system)?;
    log::info!("{} has booted; observing it ...", system.display());
    service::wait_for_jobs(run.instance.timeouts.activate)?;
    let restarts = Restarts::now()?;
    let until = Instant::now() + Duration::from_secs(run.instance.observe);
    let (remote, local) = health::by_place(&run.instance.health_checks, &run.passed);
    loop {
        // what another hand's switch stops for a moment is not this system's doing
        let trouble = system::at_rest(run.instance.timeouts.activate, || {
            run.blamed.clear();
            let checked = switch::check_units(run, &system, &before, Some(&restarts));
            let began = Instant::now();
            let checked = checked.and_then(|_| health::verify(&run.instance.health_checks, &local));
            // nobody can ask with the old system whose doing it is
            let checked = checked.and_then(|()| health::verify(&run.instance.health_checks, &remote).map_err(Error::transient));
            Ok(checked.and_then(|()| switch::look_again(run, &system, &before, began)))
        })?;
        check_has_booted(run, &system)?;
        trouble?;
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        thread::sleep(left.min(PAUSE));
    }
    fault::point("boot: well");
    system::switch_to(&system, "boot", run.instance.timeouts.activate, "install the boot loader", &[])?.switched()?;
    run.booted_by().map_or(Ok(()), |loader| loader.forget())?;
    fault::point("boot: boot loader set");
    integrity::sync()?;
    run.enter(Phase::Persisted)
}

/// Fails unless the system is the one that has booted and runs.
fn check_has_booted(run: &Run, system: &Path) -> Result<()> {
    let booted = system::named_by("/run/booted-system")?;
    let current = system::current()?;
    let Some(other) = [booted, current].into_iter().find(|other| !system::is_of(system, other)) else { return Ok(()) };
    // a boot past the boot loader, such as by kexec
    let is_untried = run.booted_by().is_some_and(|loader| loader.is_armed());
    let why = if is_untried { ", and the boot loader has not tried to boot it" } else { "" };
    let error = Error::new(format!("Failed to boot {}: this machine runs {} instead{why}", system.display(), other.display()));
    // another hand has chosen something else
    let is_chosen = profile::current_generation()?.is_none_or(|next| next.system != system);
    Err(if is_chosen || is_untried { error.transient() } else { error })
}

/// Has the next boot be an ordinary one where another hand has chosen something else since a system was to be booted once.
pub fn give_way() -> Result<()> {
    for paths in Paths::new("").with_trial() {
        let Some(trial) = Run::load(paths.trial())?.filter(|trial| trial.boot == boot_id()) else { continue };
        let next = profile::current_generation()?.map(|generation| generation.system);
        if let Some(loader) = trial.booted_by().filter(|_| trial.candidate != next) {
            loader.forget()?;
        }
    }
    Ok(())
}
