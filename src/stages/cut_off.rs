//! What systemd and the journal say of a run none of whose stages says how it has ended.

use crate::error::Result;
use crate::files;
use crate::paths::Paths;
use crate::run::journal::{Phase, Run};
use crate::run::notes::run_id;
use crate::run::status::Status;
use crate::run::{Failure, Stage, Trigger};
use crate::system::boot_id;

/// The exit status of a run that could not begin: `EX_TEMPFAIL` of sysexits.h.
pub const TRY_AGAIN: u8 = 75;

/// Why a run that has ended could not begin, by what systemd says of its end: the exit status of that stage, or one of those
/// of systemd.exec(5), from 200 on, where it could not set up what the unit needs and has run nothing; none if it could.
pub fn could_not_begin(exit_status: &str, instance: &str) -> Option<String> {
    match exit_status.parse::<u8>().ok()? {
        216 | 217 => Some("the instance's user, or a group of that, does not exist; create it, and the run begins by itself".into()),
        TRY_AGAIN | 200.. => Some(format!("the run could not begin; for the reason, see ekiben log {instance}")),
        _ => None,
    }
}

/// Reports that this process' run failed before it had a journal.
pub fn report_unopened(paths: &Paths, why: &str) -> Result<()> {
    Status::report_unopened(paths, &run_id()?, why)
}

/// How the unit's stages have ended, as systemd says to what it runs after them; else empty.
pub fn service_result() -> String {
    std::env::var("SERVICE_RESULT").unwrap_or_default()
}

/// How the last of them has, or the signal that has ended it.
pub fn exit_status() -> String {
    std::env::var("EXIT_STATUS").unwrap_or_default()
}

/// What to report of a run of which no stage says what went wrong; systemd knows some of it.
pub fn cut_off(paths: &Paths, run: &Run) -> Failure {
    // whatever it was, it is not to happen again and again
    let took_down = run.boot != boot_id() && matches!(run.phase, Phase::Switching | Phase::Observing | Phase::Returning);
    let message = match service_result().as_str() {
        _ if took_down && run.phase == Phase::Observing => "the machine went down while the new system was being observed".into(),
        _ if took_down => "the machine went down while the new system was being activated".into(),
        "timeout" => "the run took too long".into(),
        "signal" | "core-dump" => format!("the run was terminated by signal {}", exit_status()),
        "oom-kill" => "the machine ran out of memory".into(),
        // by systemd.exec(5)
        "exit-code" if could_not_begin(&exit_status(), paths.name()).is_some() => {
            format!("systemd could not set up the stage (status {}): see journalctl --unit ekiben-{}", exit_status(), paths.name())
        }
        // with no room for a note
        "exit-code" => format!(
            "the stage exited with {}, and could not write why into {}: see journalctl --unit ekiben-{}",
            exit_status(),
            paths.notes().display(),
            paths.name()
        ),
        _ => "the run was interrupted".into(),
    };
    Failure { stage: reached(run), message, tail: Vec::new(), transient: !took_down }
}

/// What there is to see to of runs whose journals could not be read.
pub fn not_undone(paths: &Paths) -> impl Iterator<Item = String> {
    let asides = [paths.journal(), paths.trial(), paths.stuck()].into_iter().map(|journal| files::aside(&journal));
    asides.filter(|aside| aside.exists()).map(|aside| {
        let aside = aside.display();
        format!("what a run has changed may still be there, since its journal is unreadable; see to that, and remove {aside}")
    })
}

/// The stage that a run which was cut off had come to.
fn reached(run: &Run) -> Stage {
    match &run.notes {
        _ if run.phase == Phase::Observing => Stage::Observe,
        Some(notes) if notes.built && run.instance.publish.is_some() => Stage::Publish,
        _ if run.phase != Phase::Begun => Stage::Activate,
        _ if run.trigger == Trigger::Rollback => Stage::Activate,
        Some(notes) if notes.built => Stage::Activate,
        Some(notes) => notes.stage,
        None => Stage::Prepare,
    }
}
