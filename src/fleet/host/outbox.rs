//! Reports that wait until the hub has them: root writes and removes them, the instance's user
//! sends them.
//!
//! One that was written is there until the hub says that it has it, but for those that more than
//! [`MOST`] later ones have followed.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use crate::config::Hub;
use crate::error::{Context, OrLog, Result};
use crate::files;
use crate::fleet::{FORMAT, RECEIVED, Received, Report, SMALL, reports_in};
use crate::gather::gather;
use crate::names::RunId;
use crate::paths::Paths;
use crate::program::Program;
use crate::run::ended::Ended;
use crate::run::status::Status;
use crate::run::{Outcome, Stage};

/// How many reports wait at most.
const MOST: usize = 32;
/// How many lines of the journal a report comes with, and how many bytes.
const LINES: &str = "5000";
const LOG: &str = "4194304";

/// Adds the report of a run that has ended, with what the journal has of it; not if that had nothing to do, could
/// not begin for the same reason as the one before, or waits for a boot as that one did. Removes what the hub has.
pub fn add(paths: &Paths, hub: &Hub, run: &str) -> Result<()> {
    tidy(paths).or_warn();
    let status = Status::read(paths);
    let mut runs = status.runs.iter().skip_while(|ended| ended.id != run);
    let Some(run) = runs.next().filter(|run| run.release.is_some() && !run.is_idle()) else {
        return Ok(());
    };
    let again = |before: &Ended| match run.result {
        Outcome::AwaitingBoot => (before.result, &before.commit) == (run.result, &run.commit),
        _ => run.stage == Some(Stage::Prepare) && (before.stage, &before.error) == (run.stage, &run.error),
    };
    if runs.next().is_some_and(again) {
        return Ok(());
    }
    let doing = || format!("write the report of run {}", run.id);
    let id = RunId::try_from(run.id.as_str()).context(doing)?;
    let system = fs::canonicalize("/run/current-system").context(doing)?;
    let system = system.as_path().try_into().context(doing)?;
    let report = Report { format: FORMAT, host: hub.name.clone(), system, run: run.clone() };
    // without a journal, the log is what is wrong with that
    let script = r#"{ journalctl --quiet --sync || :
        journalctl --quiet --output=cat --lines="$1" "_SYSTEMD_INVOCATION_ID=$3" + "_BOOT_ID=$3" _SYSTEMD_UNIT=ekiben-boot.service
        } 2>&1 | tail --bytes="$2" | gzip -n"#;
    let log = Program::as_root("/bin/sh").args(["-euc", script, "sh", LINES, LOG, &id]).output(doing, None)?;
    if !paths.outbox().exists() {
        paths.make();
    }
    let [log_file, report_file] = files_of(paths, &id);
    // the log first: what there is a report of is complete
    files::write(&log_file, &log, 0o640).doing("write", &log_file)?;
    files::write_json(&report_file, &report, 0o640)
}

/// Removes the reports that the hub has, by what the instance's user was told, those that are too many, and
/// whatever else is no report.
fn tidy(paths: &Paths) -> Result<()> {
    let doing = || format!("clean up {}", paths.outbox().display());
    let received: Received = files::read_foreign_json(&paths.own(RECEIVED), SMALL).ok().flatten().unwrap_or_default();
    let mut kept = waiting(paths)?;
    kept.retain(|run| !received.reports.contains(run));
    kept.drain(..kept.len().saturating_sub(MOST));
    let kept: BTreeSet<_> = gather(kept.iter().flat_map(|run| files_of(paths, run)));
    for file in fs::read_dir(paths.outbox()).context(doing)? {
        let path = file.context(doing)?.path();
        // root's other unit may be writing it just now
        let is_trouble = path.to_string_lossy().starts_with(&*paths.trouble_with_files().to_string_lossy());
        if !kept.contains(&path) && !is_trouble {
            files::clear(&path).context(doing)?;
        }
    }
    Ok(())
}

/// The runs whose reports wait, the oldest first.
pub fn waiting(paths: &Paths) -> Result<Vec<RunId>> {
    reports_in(&paths.outbox())
}

/// What is sent of a run, in this order: its log, and its report.
pub fn files_of(paths: &Paths, run: &RunId) -> [PathBuf; 2] {
    ["log.gz", "json"].map(|extension| paths.outbox().join(format!("{run}.{extension}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Directory;
    use std::fs::File;
    use std::time::{Duration, SystemTime};

    #[test]
    fn what_waits_is_the_newest_that_the_hub_has_not_got_and_nothing_else() {
        let place = Directory::new();
        let paths = Paths::below(place.path(), "fleet");
        let outbox = paths.outbox();
        fs::create_dir_all(&outbox).unwrap();
        fs::create_dir_all(paths.own("")).unwrap();
        let run = |number: usize| RunId::try_from(format!("{number:032x}")).unwrap();
        for number in 0..MOST + 10 {
            for file in files_of(&paths, &run(number)) {
                let time = SystemTime::UNIX_EPOCH + Duration::from_secs(number as u64);
                File::create(file).unwrap().set_modified(time).unwrap();
            }
        }
        // cut off between the two, in the way, or nobody knows what
        File::create(outbox.join(format!("{}.log.gz", "a".repeat(32)))).unwrap();
        fs::create_dir_all(outbox.join(format!("{}.json/deep", "b".repeat(32)))).unwrap();
        File::create(outbox.join("x.json")).unwrap();
        File::create(paths.trouble_with_files()).unwrap();
        files::write_json(&paths.own(RECEIVED), &Received { reports: vec![run(20), run(MOST + 9)] }, 0o644).unwrap();

        tidy(&paths).unwrap();
        let expected: Vec<_> = (8..MOST + 9).filter(|number| *number != 20).map(run).collect();
        assert_eq!(waiting(&paths).unwrap(), expected);
        assert_eq!(expected.len(), MOST);
        assert_eq!(fs::read_dir(&outbox).unwrap().count(), 2 * MOST + 1);
        // what the user says makes no sense: nothing counts as received
        fs::write(paths.own(RECEIVED), r#"{"reports": ["../../status/fleet"]}"#).unwrap();
        tidy(&paths).unwrap();
        assert_eq!(waiting(&paths).unwrap(), expected);
    }
}
