//! `ekiben notify`: a command of an administrator's is told how a run has ended, and again if that fails. Its unit runs this
//! as the instance's user, and has root note how it went: see module.nix.
//!
//! One process makes all attempts: a unit that waits to be started again counts as failed wherever somebody switches.

use std::fs;
use std::io::{Seek, Write};
use std::thread;
use std::time::Duration;

use serde_json::json;

use crate::error::{Context, Error, Result};
use crate::files;
use crate::paths::Paths;
use crate::program::Program;
use crate::run::ended::Ended;
use crate::run::status::Status;
use crate::run::{Outcome, Stage, Trigger};
use crate::system::{host_name, seconds};
use crate::text::ago;

/// The format of what is told.
const FORMAT: u32 = 1;
/// How long one attempt may take.
const LIMIT: Duration = Duration::from_secs(300);
/// The pauses between attempts, in seconds.
const PAUSES: [u64; 4] = [5, 15, 40, 120];

/// Runs the command, if the end of the run is to be told by `on`. Fails when the last attempt has.
pub fn notify(paths: &Paths, run: &str, on: &str, command: &str) -> Result<()> {
    let Some(ended) = to_tell(paths, run, on)? else { return Ok(()) };
    let host = host_name();
    let told = json!({ "format": FORMAT, "instance": paths.name(), "host": host, "run": &ended });
    let why = ended.error.as_deref().or(ended.summary.as_deref()).filter(|why| !why.is_empty());
    let title = format!("{} on {host}: {}", paths.name(), ended.result);
    let facts = [
        ("INSTANCE", paths.name()),
        ("HOST", &host),
        ("RUN", &ended.id),
        ("RESULT", &ended.result.to_string()),
        ("SUCCESS", if ended.result.is_failure() { "false" } else { "true" }),
        ("STAGE", &ended.stage.map(|stage| stage.to_string()).unwrap_or_default()),
        ("COMMIT", ended.commit.as_deref().unwrap_or_default()),
        ("BASE", ended.base.as_deref().unwrap_or_default()),
        ("ERROR", ended.error.as_deref().unwrap_or_default()),
        ("SUMMARY", ended.summary.as_deref().unwrap_or_default()),
        ("TITLE", &title),
        ("MESSAGE", &why.map_or_else(|| title.clone(), |why| format!("{title}: {why}"))),
    ];
    let attempt = || {
        let doing = || "write what is told".into();
        let mut input = files::unnamed(&std::env::temp_dir(), 0o600).context(doing)?;
        writeln!(input, "{told}").and_then(|()| input.rewind()).context(doing)?;
        let shell = Program::new("/bin/sh").args(["-c", command]).input(input);
        let shell = facts.iter().fold(shell, |shell, (key, value)| shell.env(&format!("EKIBEN_{key}"), value));
        shell.run(LIMIT, || format!("run notify.command for run {run}"))?.success()
    };
    for pause in PAUSES {
        let Err(error) = attempt() else { return Ok(()) };
        log::warn!("{error}; trying again in {pause} s.");
        thread::sleep(Duration::from_secs(pause));
    }
    attempt()
}

/// Notes for `ekiben status` whether the command has failed, as systemd says of its unit, which runs this as root. A run whose
/// end is not to be told says nothing of that.
pub fn note(paths: &Paths, run: &str, on: &str) -> Result<()> {
    if to_tell(paths, run, on)?.is_none() {
        return Ok(());
    }
    let path = paths.untold();
    if std::env::var("SERVICE_RESULT").is_ok_and(|result| result == "success") {
        return files::remove(&path).doing("remove", &path);
    }
    fs::write(&path, run).doing("write", &path)
}

/// That `notify.command` has failed, and has not succeeded since.
pub fn untold(paths: &Paths, now: u64) -> Option<String> {
    let failed = seconds(paths.untold().metadata().and_then(|file| file.modified()).ok()?);
    Some(format!("notify.command failed {}; see journalctl -u 'ekiben-notify-{}@*'", ago(failed, now), paths.name()))
}

/// A run, if its end is to be told by `on`.
fn to_tell(paths: &Paths, run: &str, on: &str) -> Result<Option<Ended>> {
    let mut runs = Status::read(paths).runs.into_iter().skip_while(|ended| ended.id != run);
    let ended = runs.next().ok_or_else(|| Error::new(format!("Failed to find run {run} of {}", paths.name())))?;
    let earlier: Vec<_> = runs.collect();
    Ok(is_told(&ended, &earlier.iter().collect::<Vec<_>>(), on).then_some(ended))
}

/// Whether the end of a run is told, by what it is and the runs before it, the last one first.
fn is_told(ended: &Ended, earlier: &[&Ended], on: &str) -> bool {
    // what somebody else's commit has led to be done again is about to end otherwise
    let last = earlier.iter().find(|run| run.result != Outcome::StartedOver);
    let has_recovered = last.is_some_and(|last| last.result.is_failure());
    match ended.result {
        Outcome::StartedOver => false,
        _ if on == "always" => true,
        Outcome::Withheld => false,
        // one report for all attempts to begin
        result if result.is_failure() && ended.stage == Some(Stage::Begin) => ended.started == ended.finished,
        // nobody has asked, and it was told
        result if result.is_failure() => {
            let is_same = |last: &&Ended| (last.result, last.stage, words(last)) == (ended.result, ended.stage, words(ended));
            ended.trigger == Trigger::Request || !ended.refused && !last.is_some_and(is_same)
        }
        Outcome::Unchanged => has_recovered,
        Outcome::Drifted => has_recovered || on == "change" && last.is_none_or(|last| last.result != Outcome::Drifted),
        _ => has_recovered || on == "change",
    }
}

/// What does not change of a reason: no numbers, hashes and names with such.
fn words(run: &Ended) -> Vec<&str> {
    let words = run.error.iter().flat_map(|error| error.split_whitespace());
    words.filter(|word| !word.contains(|letter: char| letter.is_ascii_digit())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(result: &str, trigger: &str, stage: &str, times: [u64; 2]) -> Ended {
        let [started, finished] = times;
        let stage = Some(stage).filter(|stage| !stage.is_empty());
        serde_json::from_value(serde_json::json!({
            "id": "0", "result": result, "trigger": trigger, "started": started, "finished": finished, "commit": "c", "stage": stage,
            "warnings": [], "reboot_needed": false, "rebootNeeded": false,
        }))
        .unwrap()
    }

    #[test]
    fn failures_and_the_first_success_after_them_are_told() {
        let run = |result: &str| ended(result, "request", "", [1, 2]);
        let told = |results: &[&str], on| {
            let runs: Vec<_> = results.iter().map(|result| run(result)).collect();
            is_told(&runs[0], &runs[1..].iter().collect::<Vec<_>>(), on)
        };
        for failure in ["failed", "rolledBack", "stuck"] {
            assert!(told(&[failure], "failure") && told(&[failure, "failed"], "failure") && told(&[failure, "deployed"], "change"));
            for success in ["deployed", "unchanged", "awaitingBoot"] {
                assert!(told(&[success, failure], "failure") && told(&[success, "startedOver", failure], "failure"), "{success} {failure}");
                assert!(!told(&[success, "deployed", failure], "failure") && !told(&[success], "failure"), "{success} {failure}");
            }
        }
        assert!(told(&["deployed"], "change") && !told(&["unchanged"], "change") && told(&["unchanged"], "always"));
        assert!(told(&["drifted", "unchanged"], "change") && !told(&["drifted", "drifted"], "change"));
        for on in ["failure", "change", "always"] {
            assert!(!told(&["startedOver", "failed"], on));
        }
    }

    #[test]
    fn what_nobody_has_asked_for_and_has_been_told_is_not_told_again() {
        let same = |trigger, stage| {
            let [before, now] = ["build", stage].map(|stage| ended("failed", trigger, stage, [1, 2]));
            is_told(&now, &[&before], "failure")
        };
        assert!(same("request", "build") && same("timer", "prepare") && !same("timer", "build"));
        let mut runs = ["Failed to fetch a (6 attempts)", "Failed to fetch a (5 attempts)", "Failed to fetch b"].map(|error| {
            let run = ended("failed", "timer", "prepare", [1, 2]);
            Ended { error: Some(error.into()), ..run }
        });
        assert!(!is_told(&runs[0], &[&runs[1]], "change") && is_told(&runs[0], &[&runs[2]], "failure"));
        assert!(is_told(&runs[0], &[&runs[1]], "always") && is_told(&runs[0], &[], "failure"));
        runs[0].refused = true;
        assert!(!is_told(&runs[0], &[], "failure"));
        let begins = |times| is_told(&ended("failed", "timer", "begin", times), &[], "failure");
        assert!(begins([5, 5]) && !begins([5, 15]));
    }
}
