//! The first of root's stages: take the request, open the journal; before that, end a run that was
//! cut off.

use std::time::Duration;

use crate::conclude;
use crate::config::Instance;
use crate::error::{Error, Result};
use crate::fault;
use crate::layout::Layout;
use crate::notes::run_id;
use crate::queue;
use crate::run::{Run, Stage, Trigger};
use crate::status::Status;

/// How soon systemd starts the run that nobody asked for: see [`is_wanted`].
const RECENTLY: Duration = Duration::from_secs(10);

/// Runs the stage.
pub fn begin(layout: &Layout, instance: &Instance) -> Result<()> {
    if let Err(error) = conclude::conclude(layout) {
        // that run has been reported; this one is another
        log::warn!("{error}.");
    }
    if layout.journal().exists() {
        return Err(Error::new("Failed to begin: an earlier run has not come to its end"));
    }
    let mut run = Run::new(run_id(), instance.clone());
    let opened = run.save(layout);
    fault::point("begin: journal opened");
    run.request = queue::take(layout)?;
    run.trigger = if run.request.is_some() { Trigger::Request } else { Trigger::Timer };
    fault::point("begin: request taken");
    let noted = opened.and_then(|()| run.save(layout));
    // even if it could not be noted: it would start run after run
    queue::forget(layout)?;
    noted?;
    Status::announce(layout, &run, Stage::Prepare)
}

/// Whether there is anything to do for a service that was started. A run that is cut off in the switch
/// is put back after it has failed; that reloads systemd, whose path unit then looks again, still
/// finds the journal, and starts a run that nobody asked for.
pub fn is_wanted(layout: &Layout) -> bool {
    let went_back = layout.went_back();
    let recently = went_back.metadata().and_then(|file| file.modified()).is_ok_and(|time| time.elapsed().is_ok_and(|age| age < RECENTLY));
    let _ = std::fs::remove_file(went_back);
    let files = [layout.request(), layout.journal(), layout.taken_request()];
    !recently || files.iter().any(|file| file.symlink_metadata().is_ok())
}
