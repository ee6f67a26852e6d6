//! The end of a run, whatever came before: the candidate becomes the branch, or everything is put
//! back; then the report.
//!
//! It depends on nothing but the journal and what the user's stages noted, so it can follow a
//! stage that failed, was killed or was cut off by a power loss, and be cut off itself and begun
//! again. There are two ends: the new system, in the profile, with the branch on its commit; or the
//! old one, with the repository as it was.

use std::path::Path;
use std::time::Duration;

use sd_notify::NotifyState;

use crate::config::Config;
use crate::error::{Context, Error, OrLog, Result};
use crate::fleet::host::outbox;
use crate::nix::{self, integrity, profile};
use crate::paths::Paths;
use crate::run::drift::{drift, superseded};
use crate::run::ended::Ended;
use crate::run::journal::{Decision, Phase, Run, UNFIT};
use crate::run::notes::{Notes, run_id};
use crate::run::status::Status;
use crate::run::{Failure, Outcome, Stage, Trigger, asker, queue};
use crate::stages::branch::Fate;
use crate::stages::cut_off::{TRY_AGAIN, could_not_begin, cut_off, exit_status, not_undone, report_unopened, service_result};
use crate::stages::{release, rollback, settle, trial, undo};
use crate::system::{self, Turn, boot_id, service};
use crate::text::short;
use crate::{fault, files};

/// Between two looks at something that takes its time.
const PAUSE: Duration = Duration::from_secs(1);
/// How long the end of a run may take, all in all.
const LIMIT: Duration = Duration::from_secs(24 * 60 * 60);

/// Ends the run whose journal is there, if there is one.
pub fn conclude(paths: &Paths) -> Result<()> {
    let has_begun = exit_status() != TRY_AGAIN.to_string() && paths.journal().exists();
    if let Some(why) = could_not_begin(&exit_status(), paths.name()).filter(|_| !has_begun) {
        // which has tried to end what there was to end
        let _ = report_unopened(paths, &why);
        return Ok(());
    }
    if !service_result().is_empty() {
        // the unit's own limit is for what ignores being stopped; each step of this has one
        let _ = sd_notify::notify(&[NotifyState::Custom(&format!("EXTEND_TIMEOUT_USEC={}", LIMIT.as_micros()))]);
    }
    let ended = conclude_as(paths, None);
    // after the unit's stages, not at the beginning of the next run
    if !service_result().is_empty() && !paths.request().exists() {
        let was_stopped = service_result() == "signal" && exit_status() == "TERM";
        service::sort_out_starts(paths.name(), !was_stopped).or_warn();
    }
    ended
}

/// The same; where nothing has failed and changed anything, it may be known what the run came to.
fn conclude_as(paths: &Paths, decision: Option<Decision>) -> Result<()> {
    let Some(run) = Run::load(paths.journal())? else {
        return match service_result().as_str() {
            "" | "success" => Ok(()),
            _ => {
                let unknown = || format!("the run could not start; for the reason, see ekiben log {}", paths.name());
                report_unopened(paths, &not_undone(paths).next().unwrap_or_else(unknown))
            }
        };
    };
    if is_at_work(paths, &run)? {
        let name = paths.name();
        return Err(Error::new(format!(
            "Failed to end the run of {name}: it is under way; wait for its end, or stop it: systemctl stop ekiben-{name}"
        )));
    }
    check_can_end()?;
    let turn = Turn::take()?;
    // while waiting for the turn, the run may have been ended
    match Run::load(paths.journal())? {
        Some(mut run) => {
            if run.phase == Phase::Begun && run.failure.is_none() {
                run.decision = run.decision.or(decision);
            }
            end(paths, run, Some(turn))
        }
        None => Ok(()),
    }
}

/// Fails if units cannot be started any more: the next boot goes on from here.
pub fn check_can_end() -> Result<()> {
    if system::is_stopping()? {
        return Err(Error::new("Failed to end the run: the machine is shutting down; it will be ended after the next boot"));
    }
    Ok(())
}

/// Whether the unit of a run is still at it; what systemd runs in the end of that unit is part of the run.
fn is_at_work(paths: &Paths, run: &Run) -> Result<bool> {
    let is_ours = run_id().is_ok_and(|id| id == run.id);
    Ok(!is_ours && service::is_at_work(paths.name(), &run.id)?)
}

/// Has all runs that were cut off come to an end. Those of configured instances go on in their own units; those of others,
/// whose last deed was the switch to a system without them, are ended here, once they are no longer at work.
pub fn conclude_all(config: &Config) -> Result<()> {
    // it may be a switch by hand that has this start
    trial::give_way().or_warn();
    let all = Paths::new("").with_journal().into_iter();
    let (own, mut orphans): (Vec<_>, Vec<_>) = all.partition(|paths| config.instance(paths.name()).is_ok());
    for paths in own {
        if !Run::load(paths.journal())?.is_some_and(|run| is_at_work(&paths, &run).unwrap_or(true)) {
            service::start(paths.name())?;
        }
    }
    while !orphans.is_empty() {
        let mut waiting = Vec::new();
        for paths in orphans {
            if Run::load(paths.journal())?.map_or(Ok(false), |run| is_at_work(&paths, &run))? {
                waiting.push(paths);
            } else {
                // it goes on where the instance is there again
                conclude_as(&paths, Some(Decision::StartOver)).or_warn();
            }
        }
        orphans = waiting;
        if !orphans.is_empty() {
            std::thread::sleep(PAUSE);
        }
    }
    Ok(())
}

/// Ends a run; whoever changes what this machine runs has the turn. Fails if the run did, after reporting it.
pub fn end(paths: &Paths, mut run: Run, mut turn: Option<Turn>) -> Result<()> {
    let result = match run.result {
        Some(result) if result != Outcome::Unknown => result,
        _ => come_to_an_end(paths, &mut run, &mut turn)?,
    };
    if let Err(error) = report(paths, &run, result) {
        // all is as it should be, but nobody knows: the next one to end this run says it
        run.result = Some(result);
        return run.save().and(Err(error));
    }
    if result == Outcome::AwaitingBoot {
        Run::await_boot(paths)?;
    }
    drop(turn);
    fault::point("conclude: reported");
    let waits = result == Outcome::AwaitingBoot || !run.reboot_needed && paths.trial().exists();
    let kept = match result {
        Outcome::Deployed | Outcome::Restored => files::remove(&paths.stuck()).doing("remove", &paths.stuck()),
        Outcome::Stuck => run.keep_as(&paths.stuck()),
        Outcome::RolledBack if run.reboot_needed => run.keep_as(Path::new(UNFIT)),
        _ => Ok(()),
    };
    // what is stuck, or on trial, may still be to go back to what is kept for that
    kept.and_then(|()| if waits || paths.stuck().exists() { Ok(()) } else { nix::unroot(paths) }).or_warn();
    if result != Outcome::AwaitingBoot {
        run.end(paths)?;
    }
    if let Some(failure) = run.failure.filter(|_| result != Outcome::Deployed) {
        return Err(Error::new(format!("Run ended: {result} in stage {}: {}", failure.stage, failure.message)));
    }
    log::info!("Run ended: {result}.");
    Ok(())
}

/// Has the candidate be the branch, or everything be as it was; returns which of it.
fn come_to_an_end(paths: &Paths, run: &mut Run, turn: &mut Option<Turn>) -> Result<Outcome> {
    if run.instance.publish.is_some() {
        // nothing is published any more by a run that has ended
        release::stop(paths, run)?;
    }
    let is_later = run.boot != boot_id();
    if is_later && run.phase != Phase::AwaitingBoot {
        integrity::mend(run.started).or_warn();
    }
    let is_rollback = run.trigger == Trigger::Rollback;
    if is_rollback && run.decision == Some(Decision::StartOver) {
        // whoever has asked for it asks again
        run.decision = None;
    }
    if run.decision == Some(Decision::Withdraw) {
        Turn::retake(turn)?;
        if let Err(error) = undo::withdraw(paths, run) {
            (run.decision, run.failure) = (None, Some(Failure::new(Stage::Activate, &error)));
        }
    }
    if run.notes.is_none() && !is_rollback {
        run.notes = Notes::read_of(paths, &run.id).or_warn().flatten();
    }
    if run.phase == Phase::AwaitingBoot && !is_later {
        return Ok(Outcome::AwaitingBoot);
    }
    if run.reboot_needed && is_later && trial::is_due(run) {
        Turn::retake(turn)?;
        run.failure = trial::judge(paths, run).err().map(|error| Failure::new(Stage::Boot, &error));
    }
    if run.phase == Phase::Persisted && run.failure.is_none() && run.decision.is_none() {
        match if is_rollback { settle::check_is_in_place(run).map(|()| true) } else { settle::accept(paths, run, turn) } {
            Ok(true) => {}
            Ok(false) => run.decision = Some(Decision::StartOver),
            Err(error) => run.failure = Some(Failure::new(Stage::Conclude, &error)),
        }
        fault::point("conclude: accepted");
    }
    let accepted = run.phase == Phase::Persisted && run.failure.is_none() && run.decision.is_none();
    if run.phase == Phase::Begun && run.decision.is_none() && service_result() == "success" && !is_rollback {
        // no line failed, yet they are over: a switch by another hand has changed them under this run
        run.decision = Some(Decision::StartOver);
    }
    if run.failure.is_none() && run.decision.is_none() && !accepted {
        run.failure = run.notes.as_ref().and_then(|notes| notes.failure.clone()).or_else(|| Some(cut_off(paths, run)));
    }
    let mut result = outcome(paths, run, accepted);
    if result == Outcome::Partly {
        run.failure.clone_from(&run.left_out);
    }
    if !accepted && run.phase != Phase::Begun && run.instance.publish.is_none() {
        Turn::retake(turn)?;
        result = rollback::back(paths, run, result);
    }

    if !matches!(result, Outcome::Deployed | Outcome::Partly | Outcome::Unchanged | Outcome::Drifted) {
        // what the user's git does keeps nobody else waiting
        *turn = None;
        forget_candidate(paths, run)?;
    }
    if result == Outcome::StartedOver {
        // or else this run has not come to its end: it is ended again
        queue::request(paths, run.request.unwrap_or(0), asker::NOBODY).or_else(|error| run.save().and(Err(error)))?;
    }
    Ok(result)
}

/// What a run has come to, before anything is put back for that.
fn outcome(paths: &Paths, run: &Run, accepted: bool) -> Outcome {
    match run.decision {
        _ if accepted && run.trigger == Trigger::Rollback => Outcome::Restored,
        _ if accepted && run.left_out.is_some() => Outcome::Partly,
        _ if accepted => Outcome::Deployed,
        Some(Decision::Withdraw | Decision::Restored) => Outcome::Restored,
        Some(Decision::Withheld) => Outcome::Withheld,
        Some(Decision::Unchanged) if run.instance.publish.is_none() && drift(paths).is_some() => Outcome::Drifted,
        Some(Decision::Unchanged) => Outcome::Unchanged,
        Some(Decision::StartOver) => Outcome::StartedOver,
        None => Outcome::Failed,
    }
}

/// Has the candidate go, but for one that waits for a boot, which goes on to be kept.
fn forget_candidate(paths: &Paths, run: &mut Run) -> Result<()> {
    let trial = if run.reboot_needed { None } else { Run::load(paths.trial())?.filter(|trial| trial.trigger != Trigger::Rollback) };
    let settled = match trial {
        Some(mut trial) => settle::settle(paths, &mut trial, Fate::Keep),
        None => settle::settle(paths, run, Fate::Drop),
    };
    // a ref that is left over is overwritten by the next run
    settled.or_warn();
    Ok(())
}

/// Reports how a run has ended, to the status and to the hub.
pub fn report(paths: &Paths, run: &Run, result: Outcome) -> Result<()> {
    let mut ended = Ended::new(run, result);
    ended.reboot_needed &= profile::current_generation()?.is_some_and(|next| system::current().is_ok_and(|current| current != next.system));
    if matches!(result, Outcome::Deployed | Outcome::AwaitingBoot) {
        ended.warnings.extend(superseded(paths, run));
    }
    if let Some(undone) = &run.undoes {
        let what = undone.summary.as_deref().filter(|what| !what.is_empty()).map(|what| format!(": {what}")).unwrap_or_default();
        ended.summary = Some(format!("undo {}{what}", short(&undone.commit)));
        ended.commit.clone_from(&undone.before);
        // a hub is told of the release that does not run any more
        ended.release = undone.release.clone().filter(|_| result == Outcome::Restored);
    }
    Status::report(paths, run, ended)?;
    run.instance.hub.as_ref().map_or(Ok(()), |hub| outbox::add(paths, hub, &run.id))
}
