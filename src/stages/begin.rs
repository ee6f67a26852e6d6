//! The first of root's stages: open the journal, take the request; before that, end a run that was
//! cut off.

use std::thread;
use std::time::{Duration, Instant};

use sd_notify::NotifyState;

use crate::config::Instance;
use crate::error::{Error, Result};
use crate::fault;
use crate::layout::Layout;
use crate::run::journal::Run;
use crate::run::notes::run_id;
use crate::run::queue;
use crate::run::status::Status;
use crate::run::{Stage, Trigger};
use crate::stages::{boot, conclude};
use crate::system::boot_id;

/// The exit status of a run that could not begin: `EX_TEMPFAIL` of sysexits.h, as in module.nix.
pub const TRY_AGAIN: u8 = 75;
/// How long a disk that cannot be written is waited for, before the unit fails and is started again.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two attempts; growing, so that it goes on at once when it can.
const PAUSES: [Duration; 2] = [Duration::from_millis(100), Duration::from_millis(800)];

/// Runs the stage. If it fails, there is no run, and the request is still there.
pub fn begin(layout: &Layout, instance: &Instance) -> Result<()> {
    layout.restore();
    if let Err(error) = conclude::conclude(layout) {
        // that run has been reported; this one is another
        log::warn!("{error}.");
    }
    boot::end_all(layout);
    if layout.journal().exists() || Run::load_trial(layout)?.is_some_and(|trial| trial.boot != boot_id()) {
        return Err(Error::new("Failed to start the run: the previous run has not ended"));
    }
    let mut run = Run::new(run_id()?, instance.clone());
    match conclude::go_back_again(layout) {
        Ok(false) => {}
        Ok(true) => run.warnings.push("the rollback of an earlier run, which had failed, is complete".into()),
        Err(error) => {
            log::error!("{error}.");
            run.warnings.push(format!("the rollback of an earlier run failed again: {error}"));
        }
    }
    let began = Instant::now();
    let mut pause = PAUSES[0];
    while let Err(error) = open(layout, &mut run) {
        if layout.journal().exists() {
            run.end(layout)?;
        }
        if began.elapsed() > PATIENCE {
            let _ = Status::report_unopened(layout, &error.to_string());
            return Err(error);
        }
        if pause == PAUSES[0] {
            log::error!("{error}; retrying until it succeeds.");
            let _ = sd_notify::notify(&[NotifyState::Status(&format!("Waiting: {error}."))]);
        }
        thread::sleep(pause);
        pause = PAUSES[1];
    }
    let _ = sd_notify::notify(&[NotifyState::Status("")]);
    Ok(())
}

/// Opens the journal, and takes the request that waits, if there is one.
fn open(layout: &Layout, run: &mut Run) -> Result<()> {
    run.request = queue::waiting(layout)?;
    run.trigger = if run.request.is_some() { Trigger::Request } else { Trigger::Timer };
    run.save(layout)?;
    fault::point("begin: journal opened");
    Status::reserve(layout);
    Status::announce(layout, run, Stage::Prepare)?;
    queue::remove(layout, run.request)?;
    fault::point("begin: request taken");
    Ok(())
}
