//! Health checks: commands and units that tell whether a new system does its work.
//!
//! A check counts only if it passed before the switch: what was broken before is no reason to go
//! back.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use crate::config::HealthCheck;
use crate::error::{Error, Result};
use crate::program::Program;

/// Between two attempts.
const PAUSE: Duration = Duration::from_secs(1);

/// The checks that pass now, tried once.
pub fn passing(checks: &BTreeMap<String, HealthCheck>) -> Vec<String> {
    let passes = |(name, check): (&String, &HealthCheck)| match attempt(name, check) {
        Ok(()) => Some(name.clone()),
        Err(error) => {
            log::warn!("Health check {name} does not count: {error}.");
            None
        }
    };
    checks.iter().filter_map(passes).collect()
}

/// Fails if one of the checks that passed before does not pass any more, however often it is tried.
pub fn verify(checks: &BTreeMap<String, HealthCheck>, passed_before: &[String]) -> Result<()> {
    for (name, check) in checks.iter().filter(|(name, _)| passed_before.contains(name)) {
        let mut result = attempt(name, check);
        for _ in 0..check.retries {
            if result.is_ok() {
                break;
            }
            std::thread::sleep(PAUSE);
            result = attempt(name, check);
        }
        result?;
    }
    Ok(())
}

fn attempt(name: &str, check: &HealthCheck) -> Result<()> {
    let limit = Duration::from_secs(check.timeout);
    let doing = || format!("pass health check {name}");
    if !check.units.is_empty() {
        let active = Program::as_root("systemctl").args(["is-active", "--"]).args(&check.units).run(limit)?;
        active.success(doing)?;
    }
    let Some(command) = &check.command else { return Ok(()) };
    // the programs of the system that is checked
    let path = format!("{}:/run/current-system/sw/bin", std::env::var("PATH").unwrap_or_default());
    let shell = Program::as_root("/bin/sh").args(["-c", command]).env("PATH", path).directory(Path::new("/"));
    let ended = shell.run(limit).map_err(|error| Error::new(format!("Failed to {}: {error}", doing())).with_tail(error.tail))?;
    ended.success(doing)
}
