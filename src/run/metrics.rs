//! `ekiben metrics`: the state of all instances as a text file for Prometheus. A moment is a number of seconds since 1970, so
//! that the file says the same for as long as nothing has happened.

use std::path::Path;

use crate::config::Config;
use crate::error::{Context, Result};
use crate::files;
use crate::paths::Paths;
use crate::run::drift::drift;
use crate::run::hold::Hold;
use crate::run::status::Status;

/// Labels of a value, and the value.
pub type Sample = (String, u64);

/// One family of metrics: its name behind `ekiben_`, what it tells, and its samples of an instance: the labels besides the
/// instance's name, and the value.
type Family = (&'static str, &'static str, fn(&Paths, &Status) -> Vec<Sample>);

const FAMILIES: [Family; 14] = [
    ("running", "Whether a run is under way.", |_, status| one(status.running.is_some())),
    ("request_waiting", "Whether a request waits for a run.", |paths, status| one(status.held.is_some() || paths.request().exists())),
    ("hold_end_timestamp_seconds", "When the hold on the instance ends by itself.", |paths, _| {
        some(Hold::read(paths).map(|hold| hold.until))
    }),
    ("last_run_timestamp_seconds", "When the last run has ended.", |_, status| some(status.runs.first().map(|run| run.finished))),
    ("last_run_success", "Whether the last run has not failed.", |_, status| {
        status.runs.first().map_or_else(Vec::new, |run| one(!run.result.is_failure()))
    }),
    ("last_run_result", "How the last run has ended.", |_, status| {
        status.runs.first().map(|run| (label("result", &run.result.to_string()), 1)).into_iter().collect()
    }),
    ("last_run_stage_seconds", "How long the stages of the last run took.", |_, status| {
        let stages = status.runs.first().map(|run| &run.stages[..]).unwrap_or_default();
        stages.iter().map(|(stage, seconds)| (label("stage", &stage.to_string()), *seconds)).collect()
    }),
    ("last_success_timestamp_seconds", "When a run has ended well last, or the timer has found nothing new.", |paths, status| {
        some(status.succeeded.max(paths.last_looked()))
    }),
    ("reboot_awaited", "Whether what was deployed takes effect at the next boot.", |_, status| {
        one(status.awaiting.is_some() || status.runs.first().is_some_and(|run| run.reboot_needed))
    }),
    ("drifted", "Whether the machine runs something else than what was deployed.", |_, _| one(drift(&Paths::new("")).is_some())),
    ("undone", "Whether the last deployment was undone by hand.", |_, status| one(status.undone.is_some())),
    ("release_expiry_timestamp_seconds", "When the release of the fleet's hub expires.", |_, status| some(status.expires)),
    ("deployed_info", "Which revision was deployed last.", |_, status| {
        status.deployed.iter().map(|deployed| (label("revision", &deployed.commit), 1)).collect()
    }),
    ("runs_total", "How many runs have ended how.", |_, status| {
        status.counts.iter().map(|(result, count)| (label("result", result), *count)).collect()
    }),
];

/// Writes the file, in one step. The next time is when something has happened, which may be in days.
pub fn write(config: &Config, file: &Path) -> Result<()> {
    let instances: Vec<_> = config.instances.keys().map(|name| Paths::new(name)).collect();
    let instances: Vec<_> = instances.iter().map(|paths| (paths, Status::read(paths))).collect();
    files::insist(|| files::write(file, text(&instances).as_bytes(), 0o644)).doing("write", file)
}

fn text(instances: &[(&Paths, Status)]) -> String {
    let mut lines = Vec::new();
    for (name, help, samples) in FAMILIES {
        let of_one = |(paths, status): &(&Paths, Status)| {
            let name = paths.name().to_owned();
            samples(paths, status).into_iter().map(move |(labels, value)| (format!("name=\"{name}\"{labels}"), value))
        };
        family(&mut lines, name, help, instances.iter().flat_map(of_one).collect());
    }
    lines.join("\n") + "\n"
}

/// A family, unless there is nothing of it; its name tells the kind, as Prometheus has it.
pub fn family(lines: &mut Vec<String>, name: &str, help: &str, samples: Vec<Sample>) {
    if !samples.is_empty() {
        let kind = if name.ends_with("_total") { "counter" } else { "gauge" };
        lines.push(format!("# HELP ekiben_{name} {help}\n# TYPE ekiben_{name} {kind}"));
        lines.extend(samples.into_iter().map(|(labels, value)| format!("ekiben_{name}{{{labels}}} {value}")));
    }
}

fn one(is_so: bool) -> Vec<Sample> {
    vec![(String::new(), u64::from(is_so))]
}

fn some(value: Option<u64>) -> Vec<Sample> {
    value.map(|value| (String::new(), value)).into_iter().collect()
}

/// A label behind others. Debug escapes as Prometheus does.
pub fn label(name: &str, value: &str) -> String {
    format!(",{name}={value:?}")
}
