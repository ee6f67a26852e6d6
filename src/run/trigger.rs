//! `ekiben trigger`: a request by somebody at this machine, who need not be root but a member of group
//! ekiben.

use std::io::IsTerminal;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::SignalFd;
use nix::unistd::{AccessFlags, access, geteuid};

use crate::config::Config;
use crate::error::{Context, Error, Result};
use crate::names::RunId;
use crate::nix::progress;
use crate::output;
use crate::paths::Paths;
use crate::program::Program;
use crate::run::drift::drift;
use crate::run::ended::{Ended, serving};
use crate::run::hold::{Hold, moment};
use crate::run::status::{Running, Status};
use crate::run::{Outcome, Stage, Trigger, asker, queue, undo};
use crate::system::{now, service};
use crate::text::span;

/// The exit status where nobody knows yet: `EX_TEMPFAIL` of sysexits.h.
const AWAITING_BOOT: u8 = 75;
/// So many looks in a row at which a request is nowhere mean that it is lost.
const LOST: u32 = 50;
/// Between two looks at the status, in milliseconds.
const PAUSE: u8 = 200;
/// systemd is asked at each of so many of them.
const LOOKS: u32 = 5;
/// So long a request may lie there unexplained.
const PATIENCE: Duration = Duration::from_secs(15);
/// The exit status where somebody does not want to wait any more, as of a shell: 128 and the signal's number.
const INTERRUPTED: u8 = 130;

/// Asks for a run.
pub fn trigger(config: &Config, name: &str) -> Result<()> {
    let paths = paths(config, name, "trigger", Paths::request)?;
    let number = queue::request(&paths, 0, &asker::this_user())?;
    let held = Hold::read(&paths).map(|hold| held(name, &hold)).unwrap_or_default();
    output::print(&format!("Request {number} for {name}; see ekiben status {name}.\n{held}"))
}

/// Asks for a run and waits for its end, with its log as far as this user may read the journal. Fails
/// if the run does.
pub fn trigger_and_wait(config: &Config, name: &str) -> Result<ExitCode> {
    let paths = paths(config, name, "trigger", Paths::request)?;
    follow(&paths, |interrupt| {
        let number = queue::request(&paths, 0, &asker::this_user())?;
        Ok(wait(&paths, interrupt, false, |status| serving(&status.runs, number).cloned()))
    })
}

/// Has the last deployment undone, and waits for the end of that run as for any other.
pub fn roll_back(config: &Config, name: &str) -> Result<ExitCode> {
    let paths = paths(config, name, "roll back", Paths::rollback)?;
    if config.instance(name)?.publish.is_some() {
        let why = "it deploys nothing on this machine; revert the commit, and have that published";
        return Err(Error::new(format!("Failed to roll back {name}: {why}")));
    }
    follow(&paths, |interrupt| {
        let last = |status: &Status| status.runs.iter().find(|run| run.trigger == Trigger::Rollback).cloned();
        let status = Status::read(&paths);
        undo::ask(&paths, &status.last_deployment(paths.name())?)?;
        let earlier = last(&status).map(|run| (run.id, run.result));
        Ok(wait(&paths, interrupt, true, |status| last(status).filter(|run| earlier != Some((run.id.clone(), run.result)))))
    })
}

/// Asks for a run by `ask`, which waits for its end, and shows its log meanwhile.
fn follow(paths: &Paths, ask: impl FnOnce(&SignalFd) -> Result<Waited>) -> Result<ExitCode> {
    let name = paths.name();
    let unit = service::unit(paths.name());
    // before the thread that shows the log, which would get it
    let signals = SigSet::from(Signal::SIGINT);
    let interrupt = signals.thread_block().and_then(|()| SignalFd::new(&signals)).context(|| "wait for signals".into())?;
    // it takes a moment to begin, and the run may be sooner
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let since = format!("--since=@{}.{:06}", since.as_secs(), since.subsec_micros());
    let log = Program::new("journalctl").args(["--follow", "--no-tail", &since, "--output=cat", "--unit", &unit]);
    let mut log = log.show()?;
    let ended = ask(&interrupt);
    if let Ok(Waited::Ended(run)) = &ended {
        wait_for_unit(name, run);
    }
    // it may be gone already
    let _ = log.kill();
    let _ = log.wait();
    output::print_for_now(None);
    match ended? {
        Waited::Ended(run)
            if matches!(run.result, Outcome::Deployed | Outcome::Unchanged | Outcome::AwaitingBoot | Outcome::Restored)
                // somebody else has had it undone meanwhile
                || (run.result, run.trigger) == (Outcome::Withheld, Trigger::Rollback) =>
        {
            output::print(&format!("The run ended: {}.\n", run.result))?;
            Ok(if run.result == Outcome::AwaitingBoot { ExitCode::from(AWAITING_BOOT) } else { ExitCode::SUCCESS })
        }
        Waited::Ended(run) => {
            // of a drifted machine, nobody has said that yet
            let why = run.error.or(run.warnings.into_iter().next()).or_else(|| drift(paths)).map(|why| format!(": {why}"));
            Err(Error::new(format!("The run ended: {}{}", run.result, why.unwrap_or_default())))
        }
        Waited::Lost => {
            Err(Error::new(format!("Failed to find the run of the request for {name}: nobody has served it, and it is gone; ask again")))
        }
        Waited::Interrupted => {
            output::print(&format!("No longer waiting; the run of {name} goes on: see ekiben status {name}.\n"))?;
            Ok(ExitCode::from(INTERRUPTED))
        }
    }
}

/// What has come of waiting.
enum Waited {
    Ended(Box<Ended>),
    /// Somebody has removed what asks for the run.
    Lost,
    /// By a key.
    Interrupted,
}

/// Waits until the run that `ended` finds has ended, and shows meanwhile how far it is, or what it waits for.
fn wait(paths: &Paths, interrupt: &SignalFd, is_rollback: bool, ended: impl Fn(&Status) -> Option<Ended>) -> Waited {
    let name = paths.name();
    let known = format!("{name}: ");
    let (mut missed, mut said, began) = (0, String::new(), Instant::now());
    let asks = if is_rollback { paths.rollback() } else { paths.request() };
    for look in 0.. {
        let status = Status::read(paths);
        if let Some(run) = ended(&status) {
            return Waited::Ended(Box::new(run));
        }
        let is_somewhere = status.running.is_some() || !is_rollback && status.held.is_some() || asks.symlink_metadata().is_ok();
        missed = if is_somewhere { 0 } else { missed + 1 };
        if missed > LOST {
            return Waited::Lost;
        }
        let hold = Hold::read(paths).filter(|_| status.running.is_none() && !is_rollback);
        let state = match (&status.running, hold) {
            (Some(running), _) if look % LOOKS == 0 || !said.starts_with(&known) => {
                let behind = is_rollback && running.trigger != Trigger::Rollback;
                let next =
                    if behind { format!("; the rollback follows, at once after systemctl stop ekiben-{name}") } else { String::new() };
                Some(format!("{}{next}\n", at_work(paths, running)))
            }
            (None, Some(hold)) => Some(held(name, &hold)),
            (None, None) if began.elapsed() > PATIENCE => {
                Some(format!("No run takes the request of {name} yet; see ekiben status {name}.\n"))
            }
            _ => None,
        };
        // on a terminal, how long it has been going on is in a line of its own
        if let Some(state) = state.filter(|state| *state != said) {
            said = state;
            if status.running.is_none() || !std::io::stdout().is_terminal() {
                let _ = output::print(&said);
            }
        }
        if let Some(running) = &status.running {
            let elapsed = span(now().saturating_sub(running.started));
            output::print_for_now(Some(&format!("{} ({elapsed})", said.trim_end())));
        }
        let mut ready = [PollFd::new(interrupt.as_fd(), PollFlags::POLLIN)];
        if poll(&mut ready, PAUSE).is_ok_and(|count| count > 0) {
            break;
        }
    }
    Waited::Interrupted
}

/// Waits for the end of the unit of a run that has ended: until then, systemd takes a start of it for the same one.
fn wait_for_unit(name: &str, run: &Ended) {
    let Ok(id) = RunId::try_from(run.id.clone()) else { return };
    let began = Instant::now();
    while began.elapsed() < PATIENCE && service::is_at_work(name, &id).unwrap_or(false) {
        std::thread::sleep(Duration::from_millis(PAUSE.into()));
    }
}

/// What the run under way does, as far as root announces it and systemd knows more.
fn at_work(paths: &Paths, running: &Running) -> String {
    let ask = Program::new("systemctl").args(["show", "--property=StatusText", "--value", "--", &service::unit(paths.name())]);
    let said = ask.said(|| "ask systemd".into()).unwrap_or_default();
    let said = said.trim();
    let what = match said.strip_prefix(progress::BEGIN) {
        Some(progress) => format!("{}: {progress}", Stage::Build),
        None if said.is_empty() => running.stage.to_string(),
        None => format!("waiting: {said}"),
    };
    format!("{}: {what}", paths.name())
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
