//! The unit that publishes for a hub: apart from the run's own, since it has the key that signs releases, which nothing
//! that evaluates or builds shall see.

use std::time::Duration;

use crate::error::Result;
use crate::paths::Paths;
use crate::program::Program;
use crate::run::journal::Run;
use crate::system;

/// Publishes what the run has built, to the end of it.
pub fn start(paths: &Paths, run: &Run) -> Result<()> {
    let unit = unit(paths, run);
    let limit = Duration::from_secs(run.instance.timeouts.activate);
    let start = Program::as_root("systemctl").args(["start", "--quiet", "--", &unit]);
    // it may wait for another publisher, and can tell its own journal only
    system::show(&format!("for {unit}"));
    let ended = start.run(limit, || format!("publish; see journalctl --unit {unit}"));
    system::show("");
    ended?.success()
}

/// Has it come to its end, whoever still waits for it.
pub fn stop(paths: &Paths, run: &Run) -> Result<()> {
    system::systemctl(&["stop", "--", &unit(paths, run)]).map(drop)
}

fn unit(paths: &Paths, run: &Run) -> String {
    format!("ekiben-release-{}@{}.service", paths.name(), run.id)
}
