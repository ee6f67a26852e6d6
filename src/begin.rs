//! The first of root's stages: take the request, open the journal; before that, end a run that was
//! cut off.

use crate::conclude;
use crate::config::Instance;
use crate::error::{Error, Result};
use crate::fault;
use crate::layout::Layout;
use crate::notes::run_id;
use crate::queue;
use crate::run::{Run, Stage, Trigger};
use crate::status::Status;

/// Runs the stage.
pub fn begin(layout: &Layout, instance: &Instance) -> Result<()> {
    if let Err(error) = conclude::conclude(layout) {
        // that run has been reported; this one is another
        log::warn!("{error}.");
    }
    if layout.journal().exists() {
        return Err(Error::new("Failed to begin: an earlier run has not come to its end"));
    }
    let again = conclude::go_back_again(layout);
    let mut run = Run::new(run_id()?, instance.clone());
    match again {
        Ok(false) => {}
        Ok(true) => run.warnings.push("the roll back of an earlier run, which had failed, has been completed".into()),
        Err(error) => {
            log::error!("{error}.");
            run.warnings.push(format!("the roll back of an earlier run has failed again: {error}"));
        }
    }
    let opened = run.save(layout);
    fault::point("begin: journal opened");
    run.request = queue::take(layout)?;
    run.trigger = if run.request.is_some() { Trigger::Request } else { Trigger::Timer };
    fault::point("begin: request taken");
    let noted = opened.and_then(|()| run.save(layout));
    // even if it could not be noted: it would start run after run
    queue::forget(layout)?;
    noted?;
    Status::reserve(layout);
    Status::announce(layout, &run, Stage::Prepare)
}
