//! The first of root's stages: open the journal, take the request; before that, end a run that was
//! cut off.

use std::thread;
use std::time::Duration;

use crate::config::Instance;
use crate::error::{Error, OrLog, Result};
use crate::fault;
use crate::names::RunId;
use crate::paths::Paths;
use crate::run::journal::{Decision, Run};
use crate::run::notes::run_id;
use crate::run::status::Status;
use crate::run::{Failure, Outcome, Stage, Trigger, asker, holding, queue, undo};
use crate::stages::watch::watch;
use crate::stages::{boot, conclude, cut_off, rollback};
use crate::system::{boot_id, has_unit, now, service};

/// Between two looks at a disk that cannot be written; growing.
const PAUSES: [Duration; 2] = [Duration::from_millis(100), Duration::from_millis(800)];
/// The shortest and the longest time until the next try where nothing is seen to be in the way, in seconds; in between, as
/// long as it has been going on already.
const SHORTEST: u64 = 1;
const LONGEST: u64 = 10;

/// Runs the stage. If it fails, there is no run, and the request is still there.
pub fn begin(paths: &Paths, instance: &Instance) -> Result<()> {
    paths.restore();
    let is_due = service::is_due(paths.name());
    let goes_on = paths.journal().exists();
    let concluded = conclude::conclude(paths);
    boot::end_all(paths);
    if paths.journal().exists() || Run::load(paths.trial())?.is_some_and(|trial| trial.boot != boot_id()) {
        let why = concluded.err().unwrap_or_else(|| Error::new("Failed to start the run: the previous run has not ended"));
        let _ = cut_off::report_unopened(paths, &why.to_string());
        return Err(why);
    }
    // that run has been reported; this one is another
    concluded.or_warn();
    watch(paths, instance).or_warn();
    // a hold is about deployments
    let undoes = undo::waiting(paths)?;
    match if undoes.is_some() { Ok(false) } else { holding::keep(paths) } {
        Ok(false) => {}
        Ok(true) => return Ok(()),
        Err(error) => {
            let _ = cut_off::report_unopened(paths, &error.to_string());
            return Err(error);
        }
    }
    let mut run = Run::new(paths, run_id()?, instance.clone());
    run.undoes = undoes;
    run.warnings.extend(cut_off::not_undone(paths));
    match rollback::go_back_again(paths) {
        Ok(false) => {}
        Ok(true) => {
            run.warnings.push("the rollback of an earlier run, which had failed, is complete".into());
            // that is what was meant
            run.decision = run.undoes.as_ref().map(|_| Decision::Restored);
        }
        Err(error) => {
            log::error!("{error}.");
            run.warnings.push(format!("the rollback of an earlier run failed again: {error}"));
            run.failure = run.undoes.as_ref().map(|_| Failure::new(Stage::Begin, &error));
        }
    }
    open(paths, &mut run, goes_on, is_due).or_else(|error| {
        if paths.journal().exists() {
            run.end(paths)?;
        }
        let _ = cut_off::report_unopened(paths, &error.to_string());
        Err(error)
    })
}

/// After a run that has failed: if it could not begin, or has not come to its end, has another one start as soon as it
/// can. Until then the unit is seen to have failed.
pub fn retry(paths: &Paths) -> Result<()> {
    let ended = |what: &str| std::env::var(what).unwrap_or_default();
    let (run, exit_status) = (ended("MONITOR_INVOCATION_ID"), ended("MONITOR_EXIT_STATUS"));
    let has_begun = Status::read(paths).runs.first().is_some_and(|last| last.id == run && last.stage != Some(Stage::Begin));
    let could_not_begin = cut_off::could_not_begin(&exit_status, paths.name()).filter(|_| !has_begun);
    if could_not_begin.is_none() && !paths.journal().exists() {
        return Ok(());
    }
    paths.restore();
    if let Some((why, run)) =
        could_not_begin.as_ref().zip(RunId::try_from(run).ok()).filter(|_| exit_status != cut_off::TRY_AGAIN.to_string())
    {
        // systemd could run nothing at all, so nothing has reported that
        let _ = Status::report_unopened(paths, &run, why);
    }
    if paths.check_can_be_written().is_ok() {
        let runs = Status::read(paths).runs;
        let since = runs.first().filter(|run| run.stage == Some(Stage::Begin)).map_or(0, |run| run.started);
        let longest = if could_not_begin.is_some() { LONGEST } else { SHORTEST };
        thread::sleep(Duration::from_secs(now().saturating_sub(since).clamp(SHORTEST, longest)));
    }
    let unit = service::unit(paths.name());
    let mut pause = PAUSES[0];
    while has_unit(&unit) && paths.check_can_be_written().is_err() {
        thread::sleep(pause);
        pause = PAUSES[1];
    }
    if !has_unit(&unit) {
        // a switch has taken the instance away
        return Ok(());
    }
    if service::was_due(paths.name()) { service::start_as_due(paths.name(), "start") } else { service::start(paths.name()) }
}

/// Opens the journal, and takes the request that waits, if there is one; `goes_on` where a run was cut off before, `is_due`
/// where a timer has it run.
fn open(paths: &Paths, run: &mut Run, goes_on: bool, is_due: bool) -> Result<()> {
    let waiting = queue::waiting(paths)?;
    if let Some(undone) = &run.undoes {
        (run.trigger, run.by) = (Trigger::Rollback, vec![undone.by.clone()]);
    } else {
        let status = Status::read(paths);
        run.request = waiting.max(status.held);
        run.trigger = if run.request.is_some() { Trigger::Request } else { Trigger::Timer };
        // it is still the same that they ask for
        let started_over = status.runs.into_iter().next().filter(|last| last.result == Outcome::StartedOver && run.request.is_some());
        let earlier = started_over.map(|last| last.by).unwrap_or_default().into_iter().chain(status.held_by);
        run.by = asker::all(earlier.chain(waiting.map(|number| queue::askers(paths, number)).unwrap_or_default()));
        if run.by.is_empty() {
            run.by.push(asker::unasked(goes_on, is_due).into());
        }
    }
    if run.decision.is_some() {
        run.undoes = None;
    }
    run.save()?;
    fault::point("begin: journal opened");
    Status::reserve(paths);
    Status::announce(paths, run, Stage::Prepare)?;
    if run.trigger == Trigger::Rollback { undo::remove(paths) } else { queue::remove(paths, waiting) }?;
    service::forget_due(paths.name());
    fault::point("begin: request taken");
    Ok(())
}
