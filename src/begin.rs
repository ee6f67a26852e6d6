//! The first of root's stages: take the request, open the journal; before that, end a run that was
//! cut off.

use std::path::Path;

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
    let request = queue::take(layout)?;
    fault::point("begin: request taken");
    let run = Run::new(run_id(), instance.clone(), trigger(request), request);
    let opened = run.save(layout);
    // also if the journal cannot be written: the request would start run after run
    queue::forget(layout)?;
    opened?;
    fault::point("begin: journal opened");
    Status::announce(layout, &run, Stage::Prepare)
}

fn trigger(request: Option<u64>) -> Trigger {
    // systemd says which unit started this one
    let timer = std::env::var("TRIGGER_UNIT").is_ok_and(|unit| Path::new(&unit).extension() == Some("timer".as_ref()));
    match request {
        Some(_) => Trigger::Request,
        None if timer => Trigger::Timer,
        None => Trigger::Start,
    }
}
