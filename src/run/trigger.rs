//! `ekiben trigger`: a request by somebody at this machine, who need not be root but a member of group
//! ekiben.

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
use crate::run::queue;
use crate::run::status::{Ended, Status};

/// The exit status where nobody knows yet: `EX_TEMPFAIL` of sysexits.h.
const AWAITING_BOOT: u8 = 75;
/// Between two looks at the status.
const PAUSE: Duration = Duration::from_millis(200);

/// Asks for a run.
pub fn trigger(config: &Config, name: &str) -> Result<()> {
    let number = request(&layout(config, name)?)?;
    output::print(&format!("Request {number} for {name}; see ekiben status {name}.\n"))
}

/// Asks for a run and waits for its end, with its log as far as this user may read the journal. Fails
/// if the run does.
pub fn trigger_and_wait(config: &Config, name: &str) -> Result<ExitCode> {
    let layout = layout(config, name)?;
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
    loop {
        let status = Status::read(layout);
        if status.served >= number && status.running.is_none() {
            return status.runs.into_iter().next();
        }
        std::thread::sleep(PAUSE);
    }
}

/// Where the instance is, if this user may ask for a run of it.
fn layout(config: &Config, name: &str) -> Result<Layout> {
    config.instance(name)?;
    let layout = Layout::new(name);
    let request = layout.request();
    match access(request.parent().unwrap_or(&request), AccessFlags::W_OK) {
        Err(Errno::EACCES) => return Err(Error::new(format!("Failed to trigger {name}: only root and members of the group ekiben may"))),
        Err(Errno::ENOENT) if geteuid().is_root() => layout.restore(),
        _ => {}
    }
    Ok(layout)
}

fn request(layout: &Layout) -> Result<u64> {
    queue::request(layout, Status::read(layout).served)
}
