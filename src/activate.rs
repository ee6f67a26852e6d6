//! The second of root's stages: run the candidate, and make it what is booted.
//!
//! Root trusts a store path, not a repository: it reads one link, checks that it names a valid
//! NixOS system, and has that system activate itself. First only for now, so that a power cut
//! boots the old one; then, when it is seen to be well, in the profile and the boot loader.
//!
//! Before each step the journal says which; whatever goes wrong is put right by [`crate::conclude`],
//! which reads it. This stage ends its run by itself, since the switch may have changed or removed
//! the unit that it is part of.

use std::time::Duration;

use crate::candidate::Fate;
use crate::conclude;
use crate::config::Operation;
use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::nix;
use crate::notes::Notes;
use crate::run::{Before, Decision, Failure, Phase, Run, Stage};
use crate::status::Status;
use crate::system;

/// How long a switch may take.
pub const LIMIT: Duration = Duration::from_secs(1800);

/// Runs the stage, and the run to its end.
pub fn activate(layout: &Layout) -> Result<()> {
    let Some(mut run) = Run::load(layout)? else {
        return Err(Error::new("Failed to activate: no run is under way"));
    };
    Status::announce(layout, &run, Stage::Activate)?;
    let turn = system::turn()?;
    if let Err(error) = attempt(layout, &mut run) {
        log::warn!("{error}.");
        run.failure = Some(Failure::new(Stage::Activate, &error));
        run.save(layout)?;
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

    let before = Before { system: system::current()?, generation: nix::current_generation()?, failed_units: system::failed_units()? };
    let booted = before.generation.as_ref().map(|generation| generation.system.clone());
    let runs = before.system == system;
    run.candidate = Some(system.clone());
    run.before = Some(before);

    if run.instance.operation == Operation::Switch && !runs {
        run.enter(Phase::Switching, layout)?;
        switch(run)?;
    }
    if booted.as_ref() != Some(&system) {
        run.enter(Phase::Persisting, layout)?;
        nix::set_profile(&system)?;
        system::switch_to(&system, "boot", LIMIT)?.success(|| "install the boot loader".into())?;
        run.reboot_needed |= run.instance.operation == Operation::Boot;
    }
    run.enter(Phase::Persisted, layout)
}

/// Activates the candidate without making it what is booted.
fn switch(run: &mut Run) -> Result<()> {
    let (Some(system), Some(before)) = (&run.candidate, &run.before) else { return Ok(()) };
    let ended = system::switch_to(system, "test", LIMIT)?;
    match ended.status.code() {
        // the documented ones: all well, some unit failed, only a reboot can bring this
        Some(0) => Ok(()),
        Some(4) => system::check_units(&before.failed_units).map_err(|error| error.with_tail(ended.tail)),
        Some(100) => {
            run.reboot_needed = true;
            Ok(())
        }
        _ => ended.success(|| "activate the new system".into()),
    }
}
