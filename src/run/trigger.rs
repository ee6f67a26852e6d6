//! `ekiben trigger`: a request by somebody at this machine, who need not be root but a member of group
//! ekiben.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use nix::errno::Errno;
use nix::unistd::{AccessFlags, access, geteuid};

use crate::config::Config;
use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::output;
use crate::program::Program;
use crate::run::Outcome;
use crate::run::ended::Ended;
use crate::run::hold::{Hold, moment};
use crate::run::queue;
use crate::run::status::Status;

/// The exit status where nobody knows yet: `EX_TEMPFAIL` of sysexits.h.
const AWAITING_BOOT: u8 = 75;
/// Between two looks at the status.
const PAUSE: Duration = Duration::from_millis(200);

/// Asks for a run.
pub fn trigger(config: &Config, name: &str) -> Result<()> {
    let layout = layout(config, name, "trigger", Layout::request)?;
    let number = request(&layout)?;
    let held = Hold::read(&layout).map(|hold| held(name, &hold)).unwrap_or_default();
    output::print(&format!("Request {number} for {name}; see ekiben status {name}.\n{held}"))
}

/// Asks for a run and waits for its end, with its log as far as this user may read the journal. Fails
/// if the run does.
pub fn trigger_and_wait(config: &Config, name: &str) -> Result<ExitCode> {
    let layout = layout(config, name, "trigger", Layout::request)?;
    let unit = format!("--unit=ekiben-{name}.service");
    let mut log = Program::new("journalctl").args(["--quiet", "--follow", "--lines=0", "--output=cat", &unit]).show()?;
    let ended = request(&layout).map(|number| wait(&layout, number));
    // it may be gone already
    let _ = log.kill();
    let _ = log.wait();
    match ended? {
        Some(run) if matches!(run.result, Outcome::Deployed | Outcome::Unchanged | Outcome::AwaitingBoot) => {
            output::print(&format!("The run ended: {}.\n", run.result))?;
            Ok(if run.result == Outcome::AwaitingBoot { ExitCode::from(AWAITING_BOOT) } else { ExitCode::SUCCESS })
        }
        Some(run) => Err(Error::new(format!("The run ended: {}: {}", run.result, run.error.unwrap_or_default()))),
        None => Err(Error::new(format!("Failed to find the run of the request for {name}"))),
    }
}

/// Waits until a run has served the request; returns the last run.
fn wait(layout: &Layout, number: u64) -> Option<Ended> {
    let mut said = None;
    loop {
        let status = Status::read(layout);
        if status.served >= number && status.running.is_none() {
            return status.runs.into_iter().next();
        }
        let hold = Hold::read(layout).filter(|_| status.running.is_none());
        if let Some(hold) = hold.filter(|hold| said.replace(hold.until) != Some(hold.until)) {
            let _ = output::print(&held(layout.name(), &hold));
        }
        std::thread::sleep(PAUSE);
    }
}

/// Why a request waits, and for how long.
fn held(name: &str, hold: &Hold) -> String {
    format!("{name} is held until {} {}; the request is kept until then, or until ekiben resume {name}.\n", moment(hold.until), hold.why())
}

/// Where the instance is, if this user may write what is asked for.
pub fn layout(config: &Config, name: &str, what: &str, file: fn(&Layout) -> PathBuf) -> Result<Layout> {
    config.instance(name)?;
    let layout = Layout::new(name);
    let file = file(&layout);
    match access(file.parent().unwrap_or(&file), AccessFlags::W_OK) {
        Err(Errno::EACCES) => return Err(Error::new(format!("Failed to {what} {name}: only root and members of the group ekiben may"))),
        Err(Errno::ENOENT) if geteuid().is_root() => layout.restore(),
        _ => {}
    }
    Ok(layout)
}

fn request(layout: &Layout) -> Result<u64> {
    queue::request(layout, Status::read(layout).served)
}
