//! The end of a run, whatever came before: the candidate becomes the branch, or everything is put
//! back; then the report.
//!
//! It depends on nothing but the journal and what the user's stages noted, so it can follow a
//! stage that failed, was killed or was cut off by a power loss, and be cut off itself and begun
//! again. There are two ends: the new system, in the profile, with the branch on its commit; or the
//! old one, with the repository as it was.

use std::fs::File;
use std::time::Duration;

use nix::fcntl::Flock;

use crate::candidate::{Fate, MOVED};
use crate::error::{Context, Error, Result};
use crate::layout::Layout;
use crate::nix as store;
use crate::notes::{Notes, Proposal};
use crate::program::Program;
use crate::queue;
use crate::run::{Before, Decision, Failure, Phase, Run, Stage, boot_id};
use crate::status::{self, Ended, Outcome, Status};
use crate::{activate, system};

/// How long the way from a commit to the branch, a push included, may take.
const SETTLE_LIMIT: Duration = Duration::from_secs(600);

/// Ends the run whose journal is there; does nothing if none is.
pub fn conclude(layout: &Layout) -> Result<()> {
    if Run::load(layout)?.is_none() {
        return Ok(());
    }
    let turn = system::turn()?;
    // while waiting for the turn, the run may have been ended
    match Run::load(layout)? {
        Some(run) => end(layout, run, &turn),
        None => Ok(()),
    }
}

/// Ends a run, while it is its turn. Fails if the run did, after reporting it.
pub fn end(layout: &Layout, mut run: Run, _turn: &Flock<File>) -> Result<()> {
    let notes = Notes::read_of(layout, &run.id).unwrap_or_else(|error| {
        log::warn!("{error}.");
        None
    });
    let mut failure = run.failure.clone();
    let result = match (run.phase, run.decision) {
        (Phase::Begun, Some(Decision::Unchanged)) => Outcome::Unchanged,
        (Phase::Begun, Some(Decision::StartOver)) => Outcome::StartedOver,
        (Phase::Begun, None) => {
            failure = failure.or(notes.as_ref().and_then(|notes| notes.failure.clone()));
            Outcome::Failed
        }
        (Phase::Persisted, _) => match settle(layout, &mut run, Fate::Accept) {
            Ok(true) => Outcome::Deployed,
            Ok(false) => back(&run, Outcome::StartedOver, &mut failure),
            Err(error) => {
                failure = Some(Failure::new(Stage::Conclude, &error));
                back(&run, Outcome::RolledBack, &mut failure)
            }
        },
        (Phase::Switching | Phase::Persisting, _) => back(&run, Outcome::RolledBack, &mut failure),
    };
    if matches!(result, Outcome::Failed | Outcome::RolledBack) && failure.is_none() {
        failure = Some(Failure { stage: reached(&run, notes.as_ref()), message: cut_off(), tail: Vec::new() });
    }
    let proposal = notes.and_then(|notes| notes.proposal);
    if !matches!(result, Outcome::Deployed | Outcome::Unchanged) && proposal.is_some() {
        // a ref that is left over is overwritten by the next run
        if let Err(error) = settle(layout, &mut run, Fate::Drop) {
            log::warn!("{error}.");
        }
    }
    report(layout, &run, result, failure.as_ref(), proposal);
    if result == Outcome::StartedOver {
        if let Err(error) = queue::request(layout, run.request.unwrap_or(0)) {
            log::error!("{error}.");
        }
    }
    if let Err(error) = store::unroot(layout.name()) {
        log::warn!("{error}.");
    }
    Run::end(layout)?;
    if let Some(failure) = failure {
        return Err(Error::new(format!("Run {result} in stage {}: {}", failure.stage, failure.message)));
    }
    log::info!("Run ended: {result}.");
    Ok(())
}

/// The stage that a run which was cut off had come to.
fn reached(run: &Run, notes: Option<&Notes>) -> Stage {
    match notes {
        _ if run.phase != Phase::Begun => Stage::Activate,
        Some(notes) if notes.built => Stage::Activate,
        Some(notes) => notes.stage,
        None => Stage::Prepare,
    }
}

/// Has the user's own git deal with the candidate; false if the branch has moved.
pub fn settle(layout: &Layout, run: &mut Run, fate: Fate) -> Result<bool> {
    // the configuration file may already know nothing of the instance
    let options = serde_json::to_string(&run.instance).context(|| "write the run's options".into())?;
    let ourselves = Program::ourselves_as(&run.instance.user)?;
    let ended = ourselves.args(["candidate", fate.word(), layout.name(), &run.id, &options]).run(SETTLE_LIMIT)?;
    if ended.status.code() == Some(i32::from(MOVED)) {
        return Ok(false);
    }
    let said = |level: &str| ended.tail.iter().filter_map(|line| line.strip_prefix(level)).map(String::from).collect::<Vec<_>>();
    if ended.status.success() {
        run.warnings.extend(said("warning: "));
        return Ok(true);
    }
    let error = said("error: ").pop().unwrap_or_else(|| format!("Failed to {} the candidate", fate.word()));
    Err(Error::new(error).with_tail(ended.tail))
}

/// Puts back what the journal says was before; says so if that fails.
fn back(run: &Run, result: Outcome, failure: &mut Option<Failure>) -> Outcome {
    let Some(before) = &run.before else { return result };
    log::warn!("Going back to {} ...", before.system.display());
    match put_back(run, before) {
        Ok(()) => result,
        Err(error) => {
            let first = failure.as_ref().map(|failure| format!("{}; then ", failure.message)).unwrap_or_default();
            let message = format!("{first}going back failed: {error}; this machine needs a hand");
            *failure = Some(Failure { stage: Stage::Conclude, message, tail: error.tail });
            Outcome::Stuck
        }
    }
}

fn put_back(run: &Run, before: &Before) -> Result<()> {
    if matches!(run.phase, Phase::Persisting | Phase::Persisted) {
        store::restore_profile(before.generation.as_ref())?;
        if let Some(generation) = &before.generation {
            let boot = system::switch_to(&generation.system, "boot", activate::LIMIT)?;
            boot.success(|| "restore the boot loader".into())?;
        }
    }
    // after a reboot the old system has come up by itself
    if run.boot == boot_id() || system::current()? != before.system {
        let ended = system::switch_to(&before.system, "test", activate::LIMIT)?;
        if ended.status.code() != Some(4) {
            ended.success(|| "activate the old system".into())?;
        }
        system::check_units(&before.failed_units)?;
    }
    Ok(())
}

fn report(layout: &Layout, run: &Run, result: Outcome, failure: Option<&Failure>, proposal: Option<Proposal>) {
    let mut ended = Ended::new(run, result, failure);
    let mut deployed = None;
    if let Some(proposal) = proposal {
        if result == Outcome::Deployed {
            deployed = run.candidate.clone().map(|system| (proposal.commit.clone(), system));
        }
        ended.commit = Some(proposal.commit);
        ended.summary = Some(proposal.summary);
    }
    let tail = failure.map_or(&[][..], |failure| &failure.tail);
    let reported = Status::report(layout, run, ended, deployed).and_then(|()| status::keep_output(layout, tail));
    if let Err(error) = reported {
        // the machine is as it should be; only the report is missing, but for these lines
        log::error!("{error}.");
    }
}

/// Why a run ended without any stage saying so: systemd knows.
fn cut_off() -> String {
    match std::env::var("SERVICE_RESULT").as_deref() {
        Ok("timeout") => "it took too long".into(),
        Ok("signal" | "core-dump") => format!("it was ended by signal {}", std::env::var("EXIT_STATUS").unwrap_or_default()),
        Ok("oom-kill") => "the machine ran out of memory".into(),
        _ => "it was cut off".into(),
    }
}
