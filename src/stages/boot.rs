//! What a boot is awaited for: after it the runs that have waited are judged and ended; before it they may be withdrawn.

use std::process::ExitCode;

use crate::error::{OrLog, Result};
use crate::nix;
use crate::paths::Paths;
use crate::run::Outcome;
use crate::run::drift::drift;
use crate::run::journal::{Phase, Run};
use crate::run::status::{self, Status};
use crate::stages::{conclude, rollback};
use crate::system::{self, Turn, boot_id, service};

/// Ends all runs that have waited for this boot, and has those that were cut off go on. Fails if one of the former has
/// failed and its system is the one that runs: that is not a boot to count as a good one.
pub fn boot() -> ExitCode {
    let paths = Paths::new("");
    let cut_off = paths.with_journal();
    let is_sick = end_all(&paths);
    for paths in cut_off.iter().filter(|paths| system::has_unit(&service::unit(paths.name()))) {
        service::start(paths.name()).or_warn();
    }
    status::note_boot(&paths).or_warn();
    if let Some(drift) = drift(&paths) {
        log::warn!("After the boot, {drift}.");
    }
    if is_sick { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// The same, on behalf of one of them.
pub fn end_all(paths: &Paths) -> bool {
    let mut all = paths.with_trial();
    all.extend(paths.with_journal());
    let mut is_sick = false;
    for paths in all {
        if end_trial(&paths).or_error().is_none() {
            is_sick |= Status::read(&paths).runs.first().is_some_and(|run| run.reboot_needed);
        }
    }
    is_sick
}

/// Ends what has waited for this boot, if this instance has such a thing: the run goes on where it had ended.
pub fn end_trial(paths: &Paths) -> Result<()> {
    let waiting = || -> Result<Option<Run>> {
        let (journal, trial) = (Run::load(paths.journal())?, Run::load(paths.trial())?);
        let has_waited = |run: &Run| run.reboot_needed && run.boot != boot_id();
        // or is withdrawn by somebody who was cut off
        Ok(journal.filter(has_waited).or(trial.filter(|trial| has_waited(trial) || trial.phase == Phase::Returning)))
    };
    if waiting()?.is_none() {
        return Ok(());
    }
    conclude::check_can_end()?;
    let turn = Turn::take()?;
    waiting()?.map_or(Ok(()), |run| conclude::end(paths, run, Some(turn)))
}

/// The same with all that wait, before `instance` has another system take effect: one waits at a time. What git keeps of
/// another's goes with that one's next run.
pub fn supersede(instance: &Paths) -> Result<()> {
    for paths in instance.with_trial() {
        let Some(mut trial) = Run::load(paths.trial())? else { continue };
        log::warn!("Withdrawing the system of {} that awaits the next boot ...", paths.name());
        let why = format!("superseded before it had booted: {} deploys another system", instance.name());
        rollback::withdraw(&paths, &mut trial, &why)?;
        if paths.name() != instance.name() {
            conclude::report(&paths, &trial, Outcome::Failed)?;
            if !paths.journal().exists() {
                nix::unroot(&paths)?;
            }
        }
        trial.end(&paths)?;
    }
    Ok(())
}
