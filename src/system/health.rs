//! Health checks: commands and units that tell whether a new system does its work.
//!
//! A check counts only if it passed before the switch: what was broken before is no reason to go
//! back. One that asks another machine counts only if it passes again with the old system.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::config::HealthCheck;
use crate::error::{Error, Result};
use crate::program::Program;

/// Between two attempts.
const PAUSE: Duration = Duration::from_secs(1);
/// What the last line of a check has in it that is no matter of time; nor is another machine to shut out this one for many attempts.
pub const FINAL: &str = "another attempt is of no use";

/// The checks that pass now, tried once; and what to say of those that do not, and so tell nothing of another system.
pub fn passing(checks: &BTreeMap<String, HealthCheck>) -> (Vec<String>, Vec<String>) {
    let (mut passing, mut ignored) = (Vec::new(), Vec::new());
    for (name, check) in checks {
        match attempt(name, check) {
            Ok(()) => passing.push(name.clone()),
            Err(error) => ignored.push(format!("{error}; it already failed before the switch, and is ignored")),
        }
    }
    (passing, ignored)
}

/// Of these checks, those that ask other machines, and those that do not.
pub fn by_place(checks: &BTreeMap<String, HealthCheck>, names: &[String]) -> (Vec<String>, Vec<String>) {
    names.iter().cloned().partition(|name| checks.get(name).is_some_and(|check| check.remote))
}

/// Fails if one of the checks that passed before does not pass any more, however often it is tried.
pub fn verify(checks: &BTreeMap<String, HealthCheck>, passed_before: &[String]) -> Result<()> {
    for (name, check) in checks.iter().filter(|(name, _)| passed_before.contains(name)) {
        // what fails at once is not given up at once: a network may take its time to come back
        let until = Instant::now() + Duration::from_secs(check.timeout) * (check.retries + 1);
        let mut result = attempt(name, check);
        let mut retries = 0;
        let may_pass = |error: &Error| Instant::now() < until && !error.tail().last().is_some_and(|line| line.contains(FINAL));
        while result.as_ref().is_err_and(|error| if check.remote { may_pass(error) } else { retries < check.retries }) {
            std::thread::sleep(PAUSE);
            result = attempt(name, check);
            retries += 1;
        }
        result?;
    }
    Ok(())
}

fn attempt(name: &str, check: &HealthCheck) -> Result<()> {
    let limit = Duration::from_secs(check.timeout);
    let doing = || format!("pass health check {name}");
    if !check.units.is_empty() {
        Program::as_root("systemctl").args(["is-active", "--"]).args(&check.units).run(limit, doing)?.success()?;
    }
    let Some(command) = &check.command else { return Ok(()) };
    // the programs of the system that is checked
    let path = format!("{}:/run/current-system/sw/bin", std::env::var("PATH").unwrap_or_default());
    let shell = Program::as_root("/bin/sh").args(["-c", command]).env("PATH", path).directory(Path::new("/"));
    shell.run(limit, doing)?.success()
}
