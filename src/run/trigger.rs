//! `ekiben trigger`: a request by somebody at this machine, who need not be root but a member of group
//! ekiben.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use nix::errno::Errno;
use nix::unistd::{AccessFlags, access, geteuid};

use crate::config::Config;
use crate::error::{Error, Result};
use crate::output;
use crate::paths::Paths;
use crate::program::Program;
use crate::run::asker;
use crate::run::ended::Ended;
use crate::run::hold::{Hold, moment};
use crate::run::queue;
use crate::run::status::Status;
use crate::run::undo;
use crate::run::{Outcome, Trigger};

/// The exit status where nobody knows yet: `EX_TEMPFAIL` of sysexits.h.
const AWAITING_BOOT: u8 = 75;
/// So many looks in a row at which a request is nowhere mean that it is lost.
const LOST: u32 = 50;
/// Between two looks at the status.
const PAUSE: Duration = Duration::from_millis(200);

/// Asks for a run.
pub fn trigger(config: &Config, name: &str) -> Result<()> {
    let paths = paths(config, name, "trigger", Paths::request)?;
    let number = request(&paths)?;
    let held = Hold::read(&paths).map(|hold| held(name, &hold)).unwrap_or_default();
    output::print(&format!("Request {number} for {name}; see ekiben status {name}.\n{held}"))
}

/// Asks for a run and waits for its end, with its log as far as this user may read the journal. Fails
/// if the run does.
pub fn trigger_and_wait(config: &Config, name: &str) -> Result<ExitCode> {
    let paths = paths(config, name, "trigger", Paths::request)?;
    follow(&paths, |paths| {
        let number = request(paths)?;
        Ok(wait(paths, false, |status| {
            let run = status.runs.first().filter(|_| status.served >= number);
            run.cloned()
        }))
    })
}

/// Has the last deployment undone, and waits for the end of that run as for any other.
pub fn roll_back(config: &Config, name: &str) -> Result<ExitCode> {
    let paths = paths(config, name, "roll back", Paths::rollback)?;
    if config.instance(name)?.publish.is_some() {
        let why = "it deploys nothing on this machine; revert the commit, and have that published";
        return Err(Error::new(format!("Failed to roll back {name}: {why}")));
    }
    follow(&paths, |paths| {
        let last = |status: &Status| status.runs.iter().find(|run| run.trigger == Trigger::Rollback).cloned();
        let status = Status::read(paths);
        undo::ask(paths, &status.last_deployment(paths.name())?)?;
        let earlier = last(&status).map(|run| (run.id, run.result));
        Ok(wait(paths, true, |status| last(status).filter(|run| earlier != Some((run.id.clone(), run.result)))))
    })
}

/// Asks for a run by `ask`, which waits for its end, and shows its log meanwhile.
fn follow(paths: &Paths, ask: impl FnOnce(&Paths) -> Result<Option<Ended>>) -> Result<ExitCode> {
    let name = paths.name();
    let unit = format!("--unit=ekiben-{name}.service");
    let mut log = Program::new("journalctl").args(["--quiet", "--follow", "--lines=0", "--output=cat", &unit]).show()?;
    let ended = ask(paths);
    // it may be gone already
    let _ = log.kill();
    let _ = log.wait();
    match ended? {
        Some(run) if matches!(run.result, Outcome::Deployed | Outcome::Unchanged | Outcome::AwaitingBoot | Outcome::Restored) => {
            output::print(&format!("The run ended: {}.\n", run.result))?;
            Ok(if run.result == Outcome::AwaitingBoot { ExitCode::from(AWAITING_BOOT) } else { ExitCode::SUCCESS })
        }
        Some(run) => {
            let why = run.error.or_else(|| run.warnings.into_iter().next()).unwrap_or_default();
            Err(Error::new(format!("The run ended: {}: {why}", run.result)))
        }
        None => {
            Err(Error::new(format!("Failed to find the run of the request for {name}: nobody has served it, and it is gone; ask again")))
        }
    }
}

/// Waits until the run that `ended` finds has ended; none if what asks for it has been lost: somebody has removed it.
fn wait(paths: &Paths, is_rollback: bool, ended: impl Fn(&Status) -> Option<Ended>) -> Option<Ended> {
    let (mut said, mut missed) = (None, 0);
    let asks = if is_rollback { paths.rollback() } else { paths.request() };
    loop {
        let status = Status::read(paths);
        if let Some(run) = ended(&status).filter(|_| status.running.is_none()) {
            return Some(run);
        }
        let is_somewhere = status.running.is_some() || !is_rollback && status.held.is_some() || asks.symlink_metadata().is_ok();
        missed = if is_somewhere { 0 } else { missed + 1 };
        if missed > LOST {
            return None;
        }
        let hold = Hold::read(paths).filter(|_| status.running.is_none() && !is_rollback);
        if let Some(hold) = hold.filter(|hold| said.replace(hold.until) != Some(hold.until)) {
            let _ = output::print(&held(paths.name(), &hold));
        }
        std::thread::sleep(PAUSE);
    }
}

/// Why a request waits, and for how long.
fn held(name: &str, hold: &Hold) -> String {
    format!("{name} is held until {} {}; the request is kept until then, or until ekiben resume {name}.\n", moment(hold.until), hold.why())
}

/// Where the instance is, if this user may write what is asked for.
pub fn paths(config: &Config, name: &str, what: &str, file: fn(&Paths) -> PathBuf) -> Result<Paths> {
    config.instance(name)?;
    let paths = Paths::new(name);
    let file = file(&paths);
    match access(file.parent().unwrap_or(&file), AccessFlags::W_OK) {
        Err(Errno::EACCES) => return Err(Error::new(format!("Failed to {what} {name}: only root and members of the group ekiben may"))),
        Err(Errno::ENOENT) if geteuid().is_root() => paths.restore(),
        _ => {}
    }
    Ok(paths)
}

fn request(paths: &Paths) -> Result<u64> {
    queue::request(paths, Status::read(paths).served, &asker::this_user())
}
