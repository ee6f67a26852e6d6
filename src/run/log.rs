//! `ekiben log`: what a run has printed, shown by journalctl.

use crate::config::Config;
use crate::error::{Error, Result};
use crate::help::{HELP, misunderstood};
use crate::names::RunId;
use crate::paths::Paths;
use crate::program::Program;
use crate::run::status::Status;
use crate::system::service;

/// What of the journal has the identifier of the run that it is from.
pub const INVOCATION: &str = "_SYSTEMD_INVOCATION_ID";

/// Has journalctl show the last run of an instance, or the run of that identifier, or what comes.
pub fn log(config: &Config, name: &str, words: &[&str]) -> Result<()> {
    config.instance(name)?;
    let (run, follow) = match words {
        [] => (None, false),
        ["--follow"] => (None, true),
        [run] if !run.starts_with('-') => (Some(*run), false),
        [run, "--follow"] | ["--follow", run] => (Some(*run), true),
        _ => return Err(misunderstood("ekiben", HELP, &[&["log", name], words].concat())),
    };
    let runs: Vec<String> = Status::read(&Paths::new(name)).runs.into_iter().map(|run| run.id).collect();
    // its beginning will do
    let known = |word: &str| runs.iter().find(|id| id.starts_with(word)).cloned().unwrap_or(word.into());
    let unknown = |word: &str| format!("Failed to find run {word:?}: for those of {name}, see ekiben status {name}");
    let run = run.map(|run| RunId::try_from(known(run)).map_err(|_| Error::new(unknown(run)))).transpose()?;
    let journalctl = Program::new("journalctl").arg("--output=short-iso").args(follow.then_some("--follow"));
    let journalctl = match run.map(|run| run.to_string()).or_else(|| if follow { None } else { runs.first().cloned() }) {
        // what the unit has printed, what systemd says of it, and, of a boot, what has judged it
        Some(run) => journalctl.args([
            format!("{INVOCATION}={run}"),
            "+".into(),
            format!("INVOCATION_ID={run}"),
            "+".into(),
            format!("_BOOT_ID={run}"),
            "_SYSTEMD_UNIT=ekiben-boot.service".into(),
        ]),
        None => journalctl.arg("--unit").arg(service::unit(name)),
    };
    Err(journalctl.replace())
}
