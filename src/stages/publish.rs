//! The second of root's stages, where what was built is for a fleet: hosts are offered it, and nothing is activated here.
//!
//! Root publishes nothing itself: it has a unit do so as the instance's user. A run that is cut off has published some
//! hosts, each wholly, or not at all; the next one publishes the others.

use crate::config::Config;
use crate::error::{Context, Error, Result};
use crate::paths::Paths;
use crate::run::hold::Hold;
use crate::run::journal::{Decision, Phase, Run};
use crate::run::notes::Notes;
use crate::run::published::Published;
use crate::run::status::Status;
use crate::run::{Failure, Stage, Trigger};
use crate::stages::branch::Fate;
use crate::stages::{conclude, release, settle};

/// Runs the stage, and the run to its end.
pub fn publish(paths: &Paths, config: Option<&Config>) -> Result<()> {
    let Some(mut run) = Status::enter(paths, Stage::Publish)? else { return Ok(()) };
    if run.failure.is_some() || run.decision.is_some() {
        // there is nothing to do any more
    } else if config.is_none() {
        run.decision = Some(Decision::StartOver);
    } else if let Err(error) = attempt(paths, &mut run) {
        log::warn!("{error}.");
        // the same may well be published another time
        run.failure.get_or_insert_with(|| Failure::new(Stage::Publish, &error.transient()));
        let _ = run.save();
    }
    conclude::end(paths, run, None)
}

fn attempt(paths: &Paths, run: &mut Run) -> Result<()> {
    run.notes = Notes::read_of(paths, &run.id)?;
    if run.trigger == Trigger::Rollback {
        return Err(Error::new("Failed to roll back: nothing was deployed on this machine"));
    }
    let proposal = run.proposal().ok_or("there is no proposal").context(|| "publish".into())?;
    let is_head = proposal.commit == proposal.head;
    // what is asked for during a hold is kept until that ends
    if Hold::read(paths).is_some() || !settle::settle(paths, run, Fate::Check)? {
        return run.decide(Decision::StartOver);
    }
    release::start(paths, run)?;
    let published = Published::told(paths, &run.id)?;
    for line in published.lines() {
        log::info!("{line}.");
    }
    published.keep(paths)?;
    run.warnings.extend(published.lost.clone());
    run.left_out = published.failure();
    if let Some(failure) = run.left_out.clone().filter(|_| published.is_nothing()) {
        run.failure = Some(failure);
        return run.save();
    }
    if is_head && !published.is_new() && run.left_out.is_none() {
        return run.decide(Decision::Unchanged);
    }
    run.enter(Phase::Persisted)
}
