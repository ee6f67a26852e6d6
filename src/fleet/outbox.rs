//! Reports that wait until the hub has them: root writes and removes them, the instance's user
//! sends them.
//!
//! One that was written is there until the hub says that it has it, but for those that more than
//! [`MOST`] later ones have followed.

use std::fs;
use std::path::PathBuf;

use crate::config::Hub;
use crate::error::{Context, Result};
use crate::files;
use crate::fleet::{FORMAT, Received, Report, SMALL};
use crate::layout::Layout;
use crate::program::Program;
use crate::run::Stage;
use crate::status::{Ended, Outcome, Status};

/// How many reports wait at most.
const MOST: usize = 32;
/// How many lines of the journal a report comes with.
const LINES: &str = "5000";

/// Adds the report of the run that ended last, with what the journal has of it; not if that had
/// nothing to do, or could not begin for the same reason as the one before. Removes what the hub has.
pub fn add_last(layout: &Layout, hub: &Hub) -> Result<()> {
    tidy(layout)?;
    let status = Status::read(layout);
    let Some(run) = status.runs.first().filter(|run| run.release.is_some() && run.result != Outcome::Unchanged) else {
        return Ok(());
    };
    let again = |before: &Ended| run.stage == Some(Stage::Prepare) && (before.stage, &before.error) == (run.stage, &run.error);
    if status.runs.get(1).is_some_and(again) {
        return Ok(());
    }
    let doing = || format!("write the report of run {}", run.id);
    let system = fs::canonicalize("/run/current-system").context(doing)?;
    let system = system.as_path().try_into().context(doing)?;
    let report = Report { format: FORMAT, host: hub.name.clone(), system, run: run.clone() };
    let script = r#"journalctl --quiet --sync; journalctl --quiet --output=cat --lines="$1" "_SYSTEMD_INVOCATION_ID=$2" | gzip -n"#;
    let log = Program::as_root("/bin/sh").args(["-euc", script, "sh", LINES, &run.id]).output(doing, None)?;
    let directory = layout.outbox();
    // the log first: what there is a report of is complete
    files::write(&directory.join(format!("{}.log.gz", run.id)), &log, 0o640).context(doing)?;
    files::write_json(&directory.join(format!("{}.json", run.id)), &report, 0o640)
}

/// Removes the reports that the hub has, by what the instance's user was told, and those that are
/// too many.
fn tidy(layout: &Layout) -> Result<()> {
    let doing = || format!("tidy {}", layout.outbox().display());
    let received = files::read_foreign(&layout.own("received.json"), SMALL).ok();
    let received: Received = received.and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
    let mut left = Vec::new();
    for file in waiting(layout)? {
        let name = file.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let id = name.split('.').next().unwrap_or_default();
        if received.reports.iter().any(|received| **received == *id) {
            files::remove(&file).context(doing)?;
        } else {
            left.push(file);
        }
    }
    for file in left.iter().take(left.len().saturating_sub(2 * MOST)) {
        files::remove(file).context(doing)?;
    }
    Ok(())
}

/// The files that wait, the oldest first, and a log before its report.
pub fn waiting(layout: &Layout) -> Result<Vec<PathBuf>> {
    let directory = layout.outbox();
    let doing = || format!("read {}", directory.display());
    let mut files = Vec::new();
    for file in fs::read_dir(&directory).context(doing)? {
        let file = file.context(doing)?;
        let path = file.path();
        let is = |extension: &str| path.extension().is_some_and(|other| other == extension);
        if is("gz") || is("json") {
            files.push((file.metadata().and_then(|metadata| metadata.modified()).context(doing)?, is("json"), path));
        }
    }
    files.sort();
    Ok(files.into_iter().map(|(.., path)| path).collect())
}
