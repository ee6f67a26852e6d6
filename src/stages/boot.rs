//! What a boot is awaited for: after it the runs that have waited are judged and ended; before it they may be withdrawn.

use std::process::ExitCode;

use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::nix;
use crate::run::drift::drift;
use crate::run::journal::Run;
use crate::run::status::{self, Status};
use crate::run::{Failure, Outcome, Stage};
use crate::stages::{conclude, rollback};
use crate::system::{Turn, boot_id};

/// Ends all runs that have waited for this boot. Fails if one of them has failed and its system is the one that runs: that
/// is not a boot to count as a good one.
pub fn boot() -> ExitCode {
    let layout = Layout::new("");
    let is_sick = end_all(&layout);
    status::note_boot(&layout).unwrap_or_else(|error| log::warn!("{error}."));
    if let Some(drift) = drift(&layout) {
        log::warn!("This machine {drift}.");
    }
    if is_sick { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// The same, on behalf of one of them.
pub fn end_all(layout: &Layout) -> bool {
    let mut layouts = layout.with_trial();
    layouts.extend(layout.with_journal());
    let mut is_sick = false;
    for layout in layouts {
        if let Err(error) = end_trial(&layout) {
            log::error!("{error}.");
            is_sick |= Status::read(&layout).runs.first().is_some_and(|run| run.reboot_needed);
        }
    }
    is_sick
}

/// Ends what has waited for this boot, if this instance has such a thing: the run goes on where it had ended.
pub fn end_trial(layout: &Layout) -> Result<()> {
    let waiting = || -> Result<Option<Run>> {
        let (journal, trial) = (Run::load(layout)?, Run::load_trial(layout)?);
        Ok([journal, trial].into_iter().flatten().find(|run| run.reboot_needed && run.boot != boot_id()))
    };
    if waiting()?.is_none() {
        return Ok(());
    }
    conclude::check_can_end()?;
    let turn = Turn::take()?;
    waiting()?.map_or(Ok(()), |run| conclude::end(layout, run, Some(turn)))
}

/// Takes what waits for a boot out of the profile and the boot loader; whoever does so has the turn.
pub fn withdraw(layout: &Layout, trial: &Run) -> Result<()> {
    if let Some(before) = &trial.before {
        rollback::put_back(layout, trial, before, true)?;
    }
    trial.end(layout)
}

/// The same with all that wait, before `instance` has another system take effect: one waits at a time. What git keeps of
/// another's goes with that one's next run.
pub fn supersede(instance: &Layout) -> Result<()> {
    for layout in instance.with_trial() {
        let Some(mut trial) = Run::load_trial(&layout)? else { continue };
        log::warn!("Withdrawing the system of {} that awaits the next boot ...", layout.name());
        withdraw(&layout, &trial)?;
        if layout.name() != instance.name() {
            let why = format!("superseded before it had booted: {} has deployed another system", instance.name());
            trial.failure = Some(Failure::new(Stage::Boot, &Error::new(why).transient()));
            conclude::report(&layout, &trial, Outcome::Failed)?;
            nix::unroot(&layout)?;
        }
    }
    Ok(())
}
