//! `ekiben trigger`: a request by somebody at this machine, who need not be root but a member of group
//! ekiben.

use std::time::Duration;

use crate::config::Config;
use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::program::Program;
use crate::queue;
use crate::status::{Outcome, Status};
use crate::text;

/// Between two looks at the status.
const PAUSE: Duration = Duration::from_millis(200);

/// Asks for a run.
pub fn trigger(config: &Config, name: &str) -> Result<()> {
    let number = request(config, name)?;
    text::print(&format!("Request {number} for {name}; see ekiben status {name}.\n"))
}

/// Asks for a run and waits for its end, with its log as far as this user may read the journal. Fails
/// if the run does.
pub fn trigger_and_wait(config: &Config, name: &str) -> Result<()> {
    let unit = format!("--unit=ekiben-{name}.service");
    let mut log = Program::new("journalctl").args(["--quiet", "--follow", "--lines=0", "--output=cat", &unit]).show()?;
    let number = request(config, name)?;
    let layout = Layout::new(name);
    let ended = loop {
        let status = Status::read(&layout);
        if status.served >= number && status.running.is_none() {
            break status.runs.into_iter().next();
        }
        std::thread::sleep(PAUSE);
    };
    // it may be gone already
    let _ = log.kill();
    let _ = log.wait();
    match ended {
        Some(run) if matches!(run.result, Outcome::Deployed | Outcome::Unchanged) => {
            text::print(&format!("The run ended: {}.\n", run.result))
        }
        Some(run) => Err(Error::new(format!("The run ended: {}: {}", run.result, run.error.unwrap_or_default()))),
        None => Err(Error::new(format!("Failed to find the run of request {number}"))),
    }
}

fn request(config: &Config, name: &str) -> Result<u64> {
    config.instance(name)?;
    let layout = Layout::new(name);
    queue::request(&layout, Status::read(&layout).served)
}
