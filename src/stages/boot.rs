//! After a boot: the runs that have waited for it are judged and ended.

use std::process::ExitCode;

use crate::layout::Layout;
use crate::run::status::{self, Status};
use crate::stages::conclude;

/// Ends all runs that have waited for this boot. Fails if one of them has failed and its system is the one that runs: that
/// is not a boot to count as a good one.
pub fn boot() -> ExitCode {
    let layout = Layout::new("");
    let is_sick = end_all(&layout);
    status::note_boot(&layout).unwrap_or_else(|error| log::warn!("{error}."));
    if is_sick { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// The same, on behalf of one of them.
pub fn end_all(layout: &Layout) -> bool {
    let mut layouts = layout.with_trial();
    layouts.extend(layout.with_journal());
    let mut is_sick = false;
    for layout in layouts {
        if let Err(error) = conclude::end_trial(&layout) {
            log::error!("{error}.");
            is_sick |= Status::read(&layout).runs.first().is_some_and(|run| run.reboot_needed);
        }
    }
    is_sick
}
