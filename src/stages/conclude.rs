//! The end of a run, whatever came before: the candidate becomes the branch, or everything is put
//! back; then the report.
//!
//! It depends on nothing but the journal and what the user's stages noted, so it can follow a
//! stage that failed, was killed or was cut off by a power loss, and be cut off itself and begun
//! again. There are two ends: the new system, in the profile, with the branch on its commit; or the
//! old one, with the repository as it was.

use std::path::Path;
use std::time::{Duration, Instant};

use sd_notify::NotifyState;

use crate::config::Config;
use crate::error::{Context, Error, Result};
use crate::fault;
use crate::fleet::host::outbox;
use crate::layout::Layout;
use crate::nix as store;
use crate::nix::integrity;
use crate::program::Program;
use crate::run::journal::{Before, Decision, Phase, Run};
use crate::run::notes::{Notes, run_id};
use crate::run::queue;
use crate::run::status::{self, Ended, Status};
use crate::run::{Failure, Outcome, Stage};
use crate::stages::branch::{Fate, MOVED};
use crate::stages::trial;
use crate::system::boot_id;
use crate::system::boot_loader::BootLoader;
use crate::system::health;
use crate::system::units::{self, Worse};
use crate::system::{self, Turn};

/// How long the way from a commit to the branch, a push included, may take; tests wait for it.
const SETTLE_LIMIT: Duration = Duration::from_secs(if cfg!(feature = "fault-points") { 20 } else { 600 });
/// How often the user's git is asked if it is killed or takes too long.
const TRIES: u32 = 3;
/// Between two looks at something that takes its time.
const PAUSE: Duration = Duration::from_secs(1);
/// How long units may take to come back with the old system.
const RECOVERY: Duration = Duration::from_secs(10);
/// How long the end of a run may take, all in all.
const LIMIT: Duration = Duration::from_secs(24 * 60 * 60);
/// How often later runs try again to go back.
const RETURNS: u32 = 3;

/// How systemd says that a run could not begin, by the exit status of that stage, or those of systemd.exec(5) where
/// directories or credentials could not be set up.
const COULD_NOT_BEGIN: [&str; 4] = ["75", "238", "239", "243"];

/// Ends the run whose journal is there, if there is one.
pub fn conclude(layout: &Layout) -> Result<()> {
    if could_not_begin(&exit_status()) {
        // which has tried to end what there was to end
        let _ = Status::report_unopened(layout, "it could not begin; see the journal of its unit");
        return Ok(());
    }
    if !service_result().is_empty() {
        // the unit's own limit is for what ignores being stopped; each step of this has one
        let _ = sd_notify::notify(&[NotifyState::Custom(&format!("EXTEND_TIMEOUT_USEC={}", LIMIT.as_micros()))]);
    }
    let ended = conclude_as(layout, None);
    // after the unit's stages, not at the beginning of the next run
    if !service_result().is_empty() && !layout.request().exists() {
        let was_stopped = service_result() == "signal" && exit_status() == "TERM";
        if let Err(error) = system::sort_out_starts(layout.name(), !was_stopped) {
            log::warn!("{error}.");
        }
    }
    ended
}

/// Whether a run has ended that could not begin, by what systemd says of its end.
pub fn could_not_begin(exit_status: &str) -> bool {
    COULD_NOT_BEGIN.contains(&exit_status)
}

/// The same; where nothing has failed and changed anything, it may be known what the run came to.
fn conclude_as(layout: &Layout, decision: Option<Decision>) -> Result<()> {
    let Some(run) = Run::load(layout)? else {
        return match service_result().as_str() {
            "" | "success" => Ok(()),
            _ => Status::report_unopened(layout, "the run could not start; see the journal of its unit"),
        };
    };
    if is_at_work(layout, &run)? {
        let name = layout.name();
        return Err(Error::new(format!(
            "Failed to end the run of {name}: it is under way; wait for its end, or stop it: systemctl stop ekiben-{name}"
        )));
    }
    check_can_end()?;
    let turn = Turn::take()?;
    // while waiting for the turn, the run may have been ended
    match Run::load(layout)? {
        Some(mut run) => {
            if run.phase == Phase::Begun && run.failure.is_none() {
                run.decision = run.decision.or(decision);
            }
            end(layout, run, Some(turn))
        }
        None => Ok(()),
    }
}

/// Fails if units cannot be started any more: the next boot goes on from here.
fn check_can_end() -> Result<()> {
    if system::is_stopping()? {
        return Err(Error::new("Failed to end the run: the machine is shutting down; it will be ended after the next boot"));
    }
    Ok(())
}

/// Whether the unit of a run is still at it; what systemd runs in the end of that unit is part of the run.
fn is_at_work(layout: &Layout, run: &Run) -> Result<bool> {
    let is_ours = run_id().is_ok_and(|id| id == run.id);
    Ok(!is_ours && system::is_at_work(layout.name(), &run.id)?)
}

/// Ends the runs that were cut off of instances that are not configured any more: the switch to a
/// system without them was their last deed. Waits for those that are still at work.
pub fn conclude_orphans(config: &Config) -> Result<()> {
    let mut orphans = Layout::new("").with_journal();
    orphans.retain(|layout| config.instance(layout.name()).is_err());
    while !orphans.is_empty() {
        let mut waiting = Vec::new();
        for layout in orphans {
            match Run::load(&layout)? {
                Some(run) if is_at_work(&layout, &run)? => waiting.push(layout),
                // it goes on where the instance is there again
                _ => conclude_as(&layout, Some(Decision::StartOver)).unwrap_or_else(|error| log::warn!("{error}.")),
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
pub fn end(layout: &Layout, mut run: Run, mut turn: Option<Turn>) -> Result<()> {
    let result = match run.result {
        Some(result) => result,
        None => come_to_an_end(layout, &mut run, &mut turn)?,
    };
    if let Err(error) = report(layout, &run, result) {
        // all is as it should be, but nobody knows: the next one to end this run says it
        run.result = Some(result);
        return run.save(layout).and(Err(error));
    }
    if result == Outcome::AwaitingBoot {
        Run::await_boot(layout)?;
    }
    drop(turn);
    fault::point("conclude: reported");
    let waits = result == Outcome::AwaitingBoot || !run.reboot_needed && layout.trial().exists();
    let kept = match result {
        Outcome::Deployed => Run::forget_stuck(layout),
        Outcome::Stuck => run.keep_stuck(layout),
        _ => Ok(()),
    };
    // what is stuck, or on trial, may still be to go back to what is kept for that
    if let Err(error) = kept.and_then(|()| if waits || layout.stuck().exists() { Ok(()) } else { store::unroot(layout) }) {
        log::warn!("{error}.");
    }
    if result != Outcome::AwaitingBoot {
        run.end(layout)?;
    }
    if let Some(failure) = run.failure.filter(|_| result != Outcome::Deployed) {
        return Err(Error::new(format!("Run ended: {result} in stage {}: {}", failure.stage, failure.message)));
    }
    log::info!("Run ended: {result}.");
    Ok(())
}

/// Has the candidate be the branch, or everything be as it was; returns which of it.
fn come_to_an_end(layout: &Layout, run: &mut Run, turn: &mut Option<Turn>) -> Result<Outcome> {
    let is_later = run.boot != boot_id();
    if is_later && run.phase != Phase::AwaitingBoot {
        if let Err(error) = integrity::mend(run.started) {
            log::warn!("{error}.");
        }
    }
    if run.notes.is_none() {
        run.notes = Notes::read_of(layout, &run.id).unwrap_or_else(|error| {
            log::warn!("{error}.");
            None
        });
    }
    if run.phase == Phase::AwaitingBoot && !is_later {
        return Ok(Outcome::AwaitingBoot);
    }
    if run.reboot_needed && is_later && trial::is_due(run)? {
        take_back(turn)?;
        run.failure = trial::judge(layout, run).err().map(|error| Failure::new(Stage::Boot, &error));
    }
    if run.phase == Phase::Persisted && run.failure.is_none() && run.decision.is_none() {
        match accept(layout, run, turn) {
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
        run.failure = run.notes.as_ref().and_then(|notes| notes.failure.clone()).or_else(|| Some(cut_off(layout, run)));
    }
    let mut result = match run.decision {
        _ if accepted => Outcome::Deployed,
        Some(Decision::Unchanged) if status::drift(layout).is_some() => Outcome::Drifted,
        Some(Decision::Unchanged) => Outcome::Unchanged,
        Some(Decision::StartOver) => Outcome::StartedOver,
        None => Outcome::Failed,
    };
    if !accepted && run.phase != Phase::Begun {
        take_back(turn)?;
        result = back(layout, run, result);
    }

    if !matches!(result, Outcome::Deployed | Outcome::Unchanged | Outcome::Drifted) {
        // what the user's git does keeps nobody else waiting
        *turn = None;
        // what waits for a boot goes on to be kept
        let trial = if run.reboot_needed { None } else { Run::load_trial(layout)? };
        // a ref that is left over is overwritten by the next run
        if let Err(error) = trial.map_or_else(|| settle(layout, run, Fate::Drop), |mut trial| settle(layout, &mut trial, Fate::Keep)) {
            log::warn!("{error}.");
        }
    }
    if result == Outcome::StartedOver {
        // or else this run has not come to its end: it is ended again
        queue::request(layout, run.request.unwrap_or(0)).or_else(|error| run.save(layout).and(Err(error)))?;
    }
    Ok(result)
}

/// Takes the turn again, if it has been lost.
fn take_back(turn: &mut Option<Turn>) -> Result<()> {
    if turn.is_none() {
        *turn = Some(Turn::take()?);
    }
    Ok(())
}

/// Makes the candidate the branch, if it is what this machine runs, before and after; false if the branch has moved.
fn accept(layout: &Layout, run: &mut Run, turn: &mut Option<Turn>) -> Result<bool> {
    take_back(turn)?;
    check_is_in_place(run)?;
    let Some(mine) = turn.take() else { return Ok(false) };
    let (settled, kept) = mine.lend(|| settle(layout, run, Fate::Accept));
    *turn = kept;
    take_back(turn)?;
    let is_branch = settled?;
    if is_branch {
        check_is_in_place(run)?;
    }
    Ok(is_branch)
}

/// Fails unless the candidate runs and will be booted: another hand may have switched, or have booted something else.
fn check_is_in_place(run: &Run) -> Result<()> {
    let (next, current) = (store::current_generation()?.map(|generation| generation.system), system::current()?);
    let has_booted = run.boot != boot_id();
    let wrong = [
        next.as_ref().filter(|next| run.candidate.as_ref() != Some(next)),
        Some(&current).filter(|current| !run.candidate.as_ref().is_some_and(|candidate| system::is_of(candidate, current))),
    ];
    let Some(other) = wrong.into_iter().flatten().next() else { return Ok(()) };
    let how = if has_booted && !run.reboot_needed { "booted" } else { "switched to" };
    Err(Error::new(format!("Failed to complete the switch: this machine has been {how} another system, {}", other.display())).transient())
}

/// How the unit's stages have ended, as systemd says to what it runs after them; else empty.
fn service_result() -> String {
    std::env::var("SERVICE_RESULT").unwrap_or_default()
}

/// How the last of them has, or the signal that has ended it.
fn exit_status() -> String {
    std::env::var("EXIT_STATUS").unwrap_or_default()
}

/// What to report of a run of which no stage says what went wrong; systemd knows some of it.
fn cut_off(layout: &Layout, run: &Run) -> Failure {
    // whatever it was, it is not to happen again and again
    let took_down = run.boot != boot_id() && matches!(run.phase, Phase::Switching | Phase::Observing | Phase::Returning);
    let message = match service_result().as_str() {
        _ if took_down && run.phase == Phase::Observing => "the machine went down while the new system was being observed".into(),
        _ if took_down => "the machine went down while the new system was being activated".into(),
        "timeout" => "the run took too long".into(),
        "signal" | "core-dump" => format!("the run was terminated by signal {}", exit_status()),
        "oom-kill" => "the machine ran out of memory".into(),
        // with no room for a note
        "exit-code" => format!(
            "the stage exited with {}, and could not write why into {}: see journalctl --unit ekiben-{}",
            exit_status(),
            layout.notes().display(),
            layout.name()
        ),
        _ => "the run was interrupted".into(),
    };
    Failure { stage: reached(run), message, tail: Vec::new(), transient: !took_down }
}

/// The stage that a run which was cut off had come to.
fn reached(run: &Run) -> Stage {
    match &run.notes {
        _ if run.phase == Phase::Observing => Stage::Observe,
        _ if run.phase != Phase::Begun => Stage::Activate,
        Some(notes) if notes.built => Stage::Activate,
        Some(notes) => notes.stage,
        None => Stage::Prepare,
    }
}

/// Has the user's own git deal with the candidate; false if the branch has moved.
pub fn settle(layout: &Layout, run: &mut Run, fate: Fate) -> Result<bool> {
    // the configuration file may already know nothing of the instance
    let options = serde_json::to_string_pretty(&run.instance).context(|| "write the run's options".into())?;
    let proposal = serde_json::to_string(&run.proposal()).context(|| "write the run's proposal".into())?;
    let doing = || format!("{} the candidate", fate.word());
    let ask = || {
        let ourselves = Program::ourselves_as(&run.instance.user)?;
        let ended = ourselves.args(["candidate", fate.word(), layout.name(), &options, &proposal]).run(SETTLE_LIMIT, doing)?;
        let was_killed = ended.status.code().is_none();
        if was_killed { Err(Error::new(format!("Failed to {}: killed", doing())).with_tail(ended.tail)) } else { Ok(ended) }
    };
    // whatever it had done when it was killed or took too long: it may be asked again
    let mut answer = ask();
    for _ in 1..TRIES {
        let Err(error) = &answer else { break };
        log::warn!("{error}; trying again.");
        std::thread::sleep(PAUSE);
        answer = ask();
    }
    let ended = answer.map_err(Error::transient)?;
    if ended.status.code() == Some(i32::from(MOVED)) {
        return Ok(false);
    }
    let said = |level: &str| -> Vec<String> {
        let said = ended.tail.iter().filter_map(|line| line.strip_prefix(level));
        said.map(|line| line.strip_suffix('.').unwrap_or(line).into()).collect()
    };
    if ended.status.success() {
        run.warnings.extend(said("warning: "));
        return Ok(true);
    }
    let error = said("error: ").pop().unwrap_or_else(|| format!("Failed to {}", doing()));
    // the candidate is not to blame
    Err(Error::new(error).with_tail(ended.tail).transient())
}

/// Puts back what the journal says was before, unless that is switched off; says so if that fails.
fn back(layout: &Layout, run: &mut Run, result: Outcome) -> Outcome {
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
    if let Err(error) = run.enter(Phase::Returning, layout) {
        log::error!("{error}.");
    }
    fault::point("back: begun");
    match put_back(layout, run, &before, touched_boot).and_then(|worse| with_either(run, worse)) {
        Ok(same) => {
            if !same.is_empty() {
                run.warnings.push(format!("{} with the old system, too", units::failed_to_start(&same)));
            }
            if result != Outcome::Failed {
                return result;
            }
            if !run.reboot_needed {
                excuse(run, &same);
            } else if let Some(current) = system::current().ok().filter(|current| *current != before.system) {
                run.warnings.push(format!("this machine runs {} until it is rebooted", current.display()));
            }
            Outcome::RolledBack
        }
        Err(error) => {
            let first = run.failure.as_ref().map(|failure| format!("{}; then ", failure.message)).unwrap_or_default();
            let message = format!("{first}Failed to roll back: {error}; manual intervention is required");
            run.failure = Some(Failure { message, ..Failure::new(Stage::Conclude, &error) });
            Outcome::Stuck
        }
    }
}

/// Notes which units have failed with the candidate, whatever it is put back for.
fn note_failed(run: &mut Run, before: &Before) {
    run.worse.extend(run.blamed.iter().cloned());
    let Some(candidate) = run.candidate.as_ref().filter(|_| run.phase != Phase::Returning && run.boot == boot_id()) else { return };
    match before.units.worse_under(&before.system, candidate) {
        // the others may wait for the rest of an activation
        Ok(worse) => run.worse.extend(worse.into_iter().filter(|(_, state)| state == "failed").map(|(name, _)| name)),
        Err(error) => log::warn!("{error}."),
    }
}

/// Of units that are worse off with the old system, those that were with the candidate, too: that is not its doing.
/// Fails if there are others.
fn with_either(run: &Run, worse: Worse) -> Result<Worse> {
    let (same, mine): (Worse, Worse) = worse.into_iter().partition(|(name, _)| run.worse.contains(name));
    if mine.is_empty() { Ok(same) } else { Err(units::failed_to_start(&mine)) }
}

/// Notes that the candidate may be tried again, if what it has failed for is the same with the old system.
fn excuse(run: &mut Run, same: &Worse) {
    let why = if run.blamed.is_empty() {
        health::verify(&run.instance.health_checks, &run.passed).err()
    } else {
        run.blamed.iter().all(|name| same.contains_key(name)).then(|| units::failed_to_start(same))
    };
    if let (Some(error), Some(failure)) = (why, &mut run.failure) {
        failure.message = format!("{}; the old system fails, too: {error}", failure.message);
        failure.transient = true;
    }
}

/// Puts back the system that was before, and what is booted if that was touched; returns the units that are
/// worse off all the same. Does all that it can, also if a part of it fails; may be done again.
pub fn put_back(layout: &Layout, run: &Run, before: &Before, touched_boot: bool) -> Result<Worse> {
    // what another hand has done in the meantime is to stay
    let ours = |system: &Path| run.candidate.as_ref().is_some_and(|candidate| system::is_of(candidate, system)) || before.system == system;
    let boot = system::again(|| put_back_boot(run, before, touched_boot, ours));
    fault::point("back: profile restored");
    let current = system::current()?;
    // after a reboot the old system has come up by itself; and what only a boot brings, only a boot takes away
    let worse = if ours(&current) && !run.reboot_needed && (run.boot == boot_id() || current != before.system) {
        put_back_system(layout, run, before)
    } else {
        Ok(Worse::new())
    };
    fault::point("back: system restored");
    boot.and(worse)
}

fn put_back_boot(run: &Run, before: &Before, touched: bool, ours: impl Fn(&Path) -> bool) -> Result<()> {
    if let Some(loader) = BootLoader::of(run.boot_loader).filter(|_| run.boots_once) {
        loader.forget()?;
    }
    let now = store::current_generation()?;
    let is_other = now != before.generation;
    if now.is_some_and(|now| ours(&now.system)) {
        store::restore_profile(before.generation.as_ref())?;
    }
    if let Some(candidate) = &run.candidate {
        store::remove_generations(candidate, before.last_generation)?;
    }
    match store::current_generation()? {
        Some(generation) if touched || is_other => {
            system::switch_back_to(&generation.system, "boot", run.instance.timeouts.activate, "restore the boot loader")?.success()
        }
        _ => Ok(()),
    }
}

/// Activates the old system, and again if units that ran before do not come back within a while.
fn put_back_system(layout: &Layout, run: &Run, before: &Before) -> Result<Worse> {
    let candidate = run.candidate.as_deref().unwrap_or(&before.system);
    let mut worse = Worse::new();
    for _ in 0..2 {
        system::again(|| {
            let activate = || system::switch_back_to(&before.system, "test", run.instance.timeouts.activate, "activate the old system");
            let ended = system::letting_go_of_jobs(layout.name(), activate)?;
            if ended.status.code() == Some(4) { Ok(()) } else { ended.success() }
        })?;
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
        log::warn!("{}; trying again.", units::failed_to_start(&worse));
    }
    Ok(worse)
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
    check_can_end()?;
    let turn = Turn::take()?;
    waiting()?.map_or(Ok(()), |run| end(layout, run, Some(turn)))
}

/// Takes what waits for a boot out of the profile and the boot loader; whoever does so has the turn.
pub fn withdraw(layout: &Layout, trial: &Run) -> Result<()> {
    if let Some(before) = &trial.before {
        put_back(layout, trial, before, true)?;
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
            report(&layout, &trial, Outcome::Failed)?;
            store::unroot(&layout)?;
        }
    }
    Ok(())
}

/// Tries again to go back from a system that the last run could not be put back from, a few times at most; whether
/// that has been done.
pub fn go_back_again(layout: &Layout) -> Result<bool> {
    let Some(mut run) = Run::load_stuck(layout)? else { return Ok(false) };
    let Some(before) = run.before.clone() else { return Ok(false) };
    let _turn = Turn::take()?;
    let current = system::current()?;
    let is_by_hand = !run.candidate.as_ref().is_some_and(|candidate| system::is_of(candidate, &current)) && before.system != current;
    if !is_by_hand {
        if run.returns >= RETURNS {
            let system = before.system.display();
            return Err(Error::new(format!("Failed to roll back to {system} ({RETURNS} attempts); manual intervention is required")));
        }
        run.returns += 1;
        run.keep_stuck(layout)?;
        log::warn!("Rolling back to {}, which failed before ...", before.system.display());
        with_either(&run, put_back(layout, &run, &before, true)?)?;
    }
    Run::forget_stuck(layout)?;
    store::unroot(layout)?;
    Ok(!is_by_hand)
}

fn report(layout: &Layout, run: &Run, result: Outcome) -> Result<()> {
    let failure = run.failure.as_ref();
    let proposal = run.proposal();
    let mut ended = Ended::new(run, result, failure);
    ended.reboot_needed &= store::current_generation()?.is_some_and(|next| system::current().is_ok_and(|current| current != next.system));
    ended.release = run.notes.as_ref().and_then(|notes| notes.release.clone());
    ended.commit = proposal.map(|proposal| proposal.commit.to_string());
    ended.summary = proposal.map(|proposal| proposal.summary.clone());
    Status::report(layout, run, ended)?;
    run.instance.hub.as_ref().map_or(Ok(()), |hub| outbox::add_last(layout, hub))
}
