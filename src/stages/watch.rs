//! Whether what a fleet's host has deployed still is well: before each poll root looks, and the hub is told.

use crate::config::{Instance, OnUnitFailure};
use crate::error::{Context, Error, Result};
use crate::files;
use crate::paths::Paths;
use crate::run::status::{Deployed, Status};
use crate::system::units::{Units, failed_to, newly_failed};
use crate::system::{self, health};

/// Notes what is not well any more of what was deployed last, in the terms of that run.
pub fn watch(paths: &Paths, instance: &Instance) -> Result<()> {
    // what a switch is about is judged by its own run
    if instance.hub.is_none() || !paths.with_journal().is_empty() {
        return Ok(());
    }
    let path = paths.unwell();
    let trouble = match Status::read(paths).deployed {
        // nor is what another hand's switch has stopped for a moment: the next look comes soon
        Some(deployed) => system::at_rest(0, || trouble(instance, &deployed))?.map(|why| format!("{} {why}", deployed.number)),
        None => None,
    };
    match trouble {
        Some(trouble) => files::put(&path, trouble.as_bytes(), 0o644),
        // systemd is asked only where its answer counts: there are many polls
        None if path.exists() && system::has_come_up()? => files::remove(&path).doing("remove", &path),
        None => Ok(()),
    }
}

/// What is not well any more of what was deployed, if it still runs; health checks are for a machine that has come up.
fn trouble(instance: &Instance, deployed: &Deployed) -> Result<Option<Error>> {
    let current = system::current()?;
    let before = deployed.before.as_ref().filter(|_| system::is_of(&deployed.system, &current));
    let Some((before, unwell)) = before.and_then(|before| Some((before, before.unwell.as_ref()?))) else { return Ok(None) };
    if instance.on_unit_failure == OnUnitFailure::Rollback {
        let failed = newly_failed(&Units::failed_now()?, unwell, &[&current]);
        if !failed.is_empty() {
            return Ok(Some(failed_to("keep up", &failed)));
        }
    }
    let (_, local) = health::by_place(&instance.health_checks, &before.passed);
    if local.is_empty() || !system::has_come_up()? {
        return Ok(None);
    }
    Ok(health::verify(&instance.health_checks, &local).err())
}
