//! The second of root's stages: run the candidate, and make it what is booted.
//!
//! Root trusts a store path, not a repository: it reads one link, checks that it names a valid
//! NixOS system, and has that system activate itself. First only for now, so that a power cut
//! boots the old one; then, when it is seen to be well, in the profile and the boot loader.
//!
//! Before each step the journal says which; whatever goes wrong is put right by [`crate::conclude`],
//! which reads it. This stage ends its run by itself, since the switch may have changed or removed
//! the unit that it is part of.

use std::path::Path;

use crate::candidate::Fate;
use crate::conclude;
use crate::config::{OnUnitFailure, Operation};
use crate::error::{Error, Result};
use crate::fault;
use crate::health;
use crate::layout::Layout;
use crate::nix;
use crate::notes::Notes;
use crate::run::{Before, Decision, Failure, Phase, Run, Stage};
use crate::status::Status;
use crate::system;

/// Runs the stage, and the run to its end: that is to start over if another's switch has taken the
/// instance out of the configuration.
pub fn activate(layout: &Layout, configured: bool) -> Result<()> {
    let Some(mut run) = Run::load(layout)? else {
        return Err(Error::new("Failed to activate: no run is under way"));
    };
    Status::announce(layout, &run, Stage::Activate)?;
    let turn = system::turn()?;
    fault::point("activate: begun");
    if !configured {
        run.decision = Some(Decision::StartOver);
    } else if let Err(error) = attempt(layout, &mut run) {
        log::warn!("{error}.");
        run.failure = Some(Failure::new(Stage::Activate, &error));
        // the end is the same if this cannot be written, but for the reason in its report
        let _ = run.save(layout);
    }
    conclude::end(layout, run, &turn)
}

/// As far as the candidate running, booted from now on; the branch is the conclusion's.
fn attempt(layout: &Layout, run: &mut Run) -> Result<()> {
    let notes = Notes::read_of(layout, &run.id)?;
    let Some(proposal) = notes.as_ref().and_then(|notes| notes.proposal.as_ref()) else {
        return Err(Error::new("Failed to activate: there is no proposal"));
    };
    if proposal.unchanged {
        run.decision = Some(Decision::Unchanged);
        return run.save(layout);
    }
    let system = nix::trusted_system(&layout.candidate(), layout.name())?;
    if !conclude::settle(layout, run, Fate::Check)? {
        run.decision = Some(Decision::StartOver);
        return run.save(layout);
    }
    fault::point("activate: candidate checked");

    let before = Before { system: system::current()?, generation: nix::current_generation()?, failed_units: system::failed_units()? };
    let is_booted = before.generation.as_ref().is_some_and(|generation| generation.system == system);
    let runs = before.system == system;
    run.candidate = Some(system.clone());
    run.before = Some(before.clone());

    if run.instance.operation == Operation::Switch && !runs {
        run.passed = health::passing(&run.instance.health_checks);
        run.enter(Phase::Switching, layout)?;
        fault::point("activate: switching");
        switch(run, &system, &before)?;
        fault::point("activate: switched");
        verify(layout, run, &system, &before)?;
        fault::point("activate: healthy");
        if !run.reboot_needed && system::current()? != system || nix::current_generation()? != before.generation {
            // another hand: what it did is to stay
            run.before = None;
            run.enter(Phase::Begun, layout)?;
            return Err(Error::new("Failed to complete the switch: something else has switched this machine in the meantime").transient());
        }
    }
    if !is_booted {
        run.enter(Phase::Persisting, layout)?;
        fault::point("activate: persisting");
        nix::set_profile(&system)?;
        fault::point("activate: profile set");
        system::switch_to(&system, "boot", run.instance.timeouts.activate, "install the boot loader")?.success()?;
        fault::point("activate: boot loader set");
        run.reboot_needed |= run.instance.operation == Operation::Boot;
    }
    run.enter(Phase::Persisted, layout)?;
    fault::point("activate: persisted");
    Ok(())
}

/// Activates the candidate without making it what is booted.
fn switch(run: &mut Run, system: &Path, before: &Before) -> Result<()> {
    let ended = system::switch_to(system, "test", run.instance.timeouts.activate, "activate the new system")?;
    match ended.status.code() {
        // the documented ones: all well, some unit failed, only a reboot can bring this
        Some(0) => Ok(()),
        Some(4) if ended.seen => Err(Error::new("Failed to activate the new system: an activation script failed").with_tail(ended.tail)),
        Some(4) => {
            let new = system::check_units(&before.failed_units);
            let keep = run.instance.on_unit_failure == OnUnitFailure::Keep;
            match new {
                Err(error) if !keep => Err(error.with_tail(ended.tail)),
                Err(error) => {
                    run.warnings.push(error.to_string());
                    Ok(())
                }
                Ok(()) => {
                    run.warnings.push("units that had failed before the switch have failed again".into());
                    Ok(())
                }
            }
        }
        Some(100) => {
            run.reboot_needed = true;
            Ok(())
        }
        _ => ended.success(),
    }
}

/// Has the health checks say whether the candidate does its work. Where nothing but another machine
/// fails to answer, the old system is asked whose doing that is: the candidate stays if it is the same there.
fn verify(layout: &Layout, run: &mut Run, system: &Path, before: &Before) -> Result<()> {
    let checks = run.instance.health_checks.clone();
    let (remote, local): (Vec<_>, Vec<_>) = run.passed.iter().cloned().partition(|name| checks.get(name).is_some_and(|check| check.remote));
    health::verify(&checks, &local)?;
    let Err(error) = health::verify(&checks, &remote) else { return Ok(()) };
    if !run.instance.rollback {
        return Err(error);
    }
    log::warn!("{error}. Going back to {}, to see whether it is the same there ...", before.system.display());
    run.enter(Phase::Returning, layout)?;
    conclude::put_back(run, before, false)?;
    if health::verify(&checks, &remote).is_ok() {
        return Err(error);
    }
    log::warn!("It is the same there: the new system is not to blame.");
    run.warnings.push(format!("{error}; it was the same with the old system, so the new one stays"));
    run.passed = local;
    run.enter(Phase::Switching, layout)?;
    switch(run, system, before)?;
    health::verify(&checks, &run.passed)
}
