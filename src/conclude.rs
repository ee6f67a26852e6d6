//! The end of a run, whatever came before: the candidate becomes the branch, or everything is put
//! back; then the report.
//!
//! It depends on nothing but the journal and what the user's stages noted, so it can follow a
//! stage that failed, was killed or was cut off by a power loss, and be cut off itself and begun
//! again. There are two ends: the new system, in the profile, with the branch on its commit; or the
//! old one, with the repository as it was.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use nix::fcntl::Flock;

use crate::candidate::{Fate, MOVED};
use crate::config::Config;
use crate::error::{Context, Error, Result};
use crate::fault;
use crate::fleet::outbox;
use crate::health;
use crate::layout::Layout;
use crate::nix as store;
use crate::notes::Notes;
use crate::program::Program;
use crate::queue;
use crate::run::{Before, Decision, Failure, Phase, Run, Stage, boot_id};
use crate::status::{self, Ended, Outcome, Status};
use crate::system;

/// How long the way from a commit to the branch, a push included, may take.
const SETTLE_LIMIT: Duration = Duration::from_secs(600);

/// Ends the run whose journal is there, if there is one.
pub fn conclude(layout: &Layout) -> Result<()> {
    if Run::load(layout)?.is_none() {
        return match service_result().as_str() {
            "" | "success" => Ok(()),
            _ => Status::report_unopened(layout, "it could not begin; see the journal of its unit"),
        };
    }
    if system::is_stopping()? {
        // units cannot be started any more: the next boot goes on from here
        return Err(Error::new("Failed to end the run: the machine is shutting down; it will be ended after the next boot"));
    }
    let turn = system::turn()?;
    // while waiting for the turn, the run may have been ended
    match Run::load(layout)? {
        Some(run) => {
            let ended = end(layout, run, &turn);
            // after the unit's stages, not at the beginning of the next run
            if !service_result().is_empty() && !layout.request().exists() {
                if let Err(error) = system::cancel_start(layout.name()) {
                    log::warn!("{error}.");
                }
            }
            ended
        }
        None => Ok(()),
    }
}

/// Ends the runs that were cut off of instances that are not configured any more: the switch to a
/// system without them was their last deed.
pub fn conclude_orphans(config: &Config) {
    for layout in Layout::new("").with_journal().into_iter().filter(|layout| config.instance(layout.name()).is_err()) {
        if let Err(error) = conclude(&layout) {
            log::warn!("{error}.");
        }
    }
}

/// Ends a run, while it is its turn. Fails if the run did, after reporting it.
pub fn end(layout: &Layout, mut run: Run, _turn: &Flock<File>) -> Result<()> {
    let notes = Notes::read_of(layout, &run.id).unwrap_or_else(|error| {
        log::warn!("{error}.");
        None
    });
    if run.phase == Phase::Persisted {
        match settle(layout, &mut run, Fate::Accept) {
            Ok(true) => {}
            Ok(false) => run.decision = Some(Decision::StartOver),
            Err(error) => run.failure = Some(Failure::new(Stage::Conclude, &error)),
        }
        fault::point("conclude: accepted");
    }
    let accepted = run.phase == Phase::Persisted && run.failure.is_none() && run.decision.is_none();
    if run.phase == Phase::Begun && run.decision.is_none() && service_result() == "success" {
        // no line failed, yet they are over: a switch by another hand has changed them under this run
        run.decision = Some(Decision::StartOver);
    }
    if run.failure.is_none() && run.decision.is_none() && !accepted {
        run.failure = notes.as_ref().and_then(|notes| notes.failure.clone()).or_else(|| Some(cut_off(&run, notes.as_ref())));
    }
    let mut result = match run.decision {
        _ if accepted => Outcome::Deployed,
        Some(Decision::Unchanged) => Outcome::Unchanged,
        Some(Decision::StartOver) => Outcome::StartedOver,
        None => Outcome::Failed,
    };
    if !accepted && run.phase != Phase::Begun {
        result = back(layout, &mut run, result);
    }

    if !matches!(result, Outcome::Deployed | Outcome::Unchanged) {
        // a ref that is left over is overwritten by the next run
        if let Err(error) = settle(layout, &mut run, Fate::Drop) {
            log::warn!("{error}.");
        }
    }
    report(layout, &run, result, notes.as_ref());
    fault::point("conclude: reported");
    if result == Outcome::StartedOver {
        if let Err(error) = queue::request(layout, run.request.unwrap_or(0)) {
            log::error!("{error}.");
        }
    }
    if let Err(error) = store::unroot(layout.name()) {
        log::warn!("{error}.");
    }
    Run::end(layout)?;
    if let Some(failure) = run.failure.filter(|_| result != Outcome::Deployed) {
        return Err(Error::new(format!("Run {result} in stage {}: {}", failure.stage, failure.message)));
    }
    log::info!("Run ended: {result}.");
    Ok(())
}

/// How the unit's stages have ended, as systemd says to what it runs after them; else empty.
fn service_result() -> String {
    std::env::var("SERVICE_RESULT").unwrap_or_default()
}

/// What to report of a run of which no stage says what went wrong; systemd knows some of it.
fn cut_off(run: &Run, notes: Option<&Notes>) -> Failure {
    let message = match service_result().as_str() {
        "timeout" => "it took too long".into(),
        "signal" | "core-dump" => format!("it was ended by signal {}", std::env::var("EXIT_STATUS").unwrap_or_default()),
        "oom-kill" => "the machine ran out of memory".into(),
        _ => "it was cut off".into(),
    };
    Failure { stage: reached(run, notes), message, tail: Vec::new(), transient: true }
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
    let ended = ourselves
        .args(["candidate", fate.word(), layout.name(), &run.id, &options])
        .run(SETTLE_LIMIT, || format!("{} the candidate", fate.word()))?;
    if ended.status.code() == Some(i32::from(MOVED)) {
        return Ok(false);
    }
    let said = |level: &str| ended.tail.iter().filter_map(|line| line.strip_prefix(level)).map(String::from).collect::<Vec<_>>();
    if ended.status.success() {
        run.warnings.extend(said("warning: "));
        return Ok(true);
    }
    let error = said("error: ").pop().unwrap_or_else(|| format!("Failed to {} the candidate", fate.word()));
    // the candidate is not to blame
    Err(Error::new(error).with_tail(ended.tail).transient())
}

/// Puts back what the journal says was before, unless that is switched off; says so if that fails.
fn back(layout: &Layout, run: &mut Run, result: Outcome) -> Outcome {
    let Some(before) = run.before.clone() else { return result };
    if !run.instance.rollback && run.failure.is_some() {
        run.warnings
            .push(format!("rollback is off: what the run has done so far stays; before, this machine ran {}", before.system.display()));
        return result;
    }
    log::warn!("Going back to {} ...", before.system.display());
    let touched_boot = matches!(run.phase, Phase::Persisting | Phase::Persisted | Phase::Returning);
    // from here on there is no other way, also if this is cut off
    if let Err(error) = run.enter(Phase::Returning, layout) {
        log::error!("{error}.");
    }
    fault::point("back: begun");
    match put_back(run, &before, touched_boot) {
        Ok(()) if result == Outcome::Failed => {
            if let (Err(error), Some(failure)) = (health::verify(&run.instance.health_checks, &run.passed), &mut run.failure) {
                // so it was not the candidate's doing, and may be tried again
                failure.message = format!("{}; with the old system it is the same: {error}", failure.message);
                failure.transient = true;
            }
            Outcome::RolledBack
        }
        Ok(()) => result,
        Err(error) => {
            let first = run.failure.as_ref().map(|failure| format!("{}; then ", failure.message)).unwrap_or_default();
            let message = format!("{first}going back failed: {error}; this machine needs a hand");
            run.failure = Some(Failure { message, ..Failure::new(Stage::Conclude, &error) });
            Outcome::Stuck
        }
    }
}

/// Puts back the system that was before, and what is booted if that was touched. May be done again.
pub fn put_back(run: &Run, before: &Before, touched_boot: bool) -> Result<()> {
    let limit = run.instance.timeouts.activate;
    // what another hand has done in the meantime is to stay
    let ours = |system: &Path| run.candidate.as_deref() == Some(system) || before.system == system;
    if touched_boot {
        let now = store::current_generation()?;
        if now.as_ref().is_some_and(|now| ours(&now.system)) {
            store::restore_profile(before.generation.as_ref())?;
        }
        if let Some(generation) = store::current_generation()? {
            system::switch_to(&generation.system, "boot", limit, "restore the boot loader")?.success()?;
        }
    }
    fault::point("back: profile restored");
    let current = system::current()?;
    // after a reboot the old system has come up by itself
    if ours(&current) && (run.boot == boot_id() || current != before.system) {
        let ended = system::switch_to(&before.system, "test", limit, "activate the old system")?;
        if ended.status.code() != Some(4) {
            ended.success()?;
        }
        system::check_units(&before.failed_units)?;
    }
    fault::point("back: system restored");
    Ok(())
}

fn report(layout: &Layout, run: &Run, result: Outcome, notes: Option<&Notes>) {
    let failure = run.failure.as_ref();
    let proposal = notes.and_then(|notes| notes.proposal.as_ref());
    let mut ended = Ended::new(run, result, failure);
    ended.release = notes.and_then(|notes| notes.release.clone());
    ended.commit = proposal.map(|proposal| proposal.commit.clone());
    ended.summary = proposal.map(|proposal| proposal.summary.clone());
    let tail = failure.map_or(&[][..], |failure| &failure.tail);
    let reported = Status::report(layout, run, ended, proposal).and_then(|()| status::keep_output(layout, tail));
    let reported = reported.and_then(|()| run.instance.hub.as_ref().map_or(Ok(()), |hub| outbox::add_last(layout, hub)));
    if let Err(error) = reported {
        // the machine is as it should be; only the report is missing, but for the journal's
        log::error!("{error}.");
    }
}
