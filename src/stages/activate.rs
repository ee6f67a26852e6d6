//! The second of root's stages: run the candidate, and make it what is booted.
//!
//! Root trusts a store path, not a repository: it reads one link, checks that it names a valid
//! NixOS system, and has that system activate itself. First only for now, so that a power cut
//! boots the old one; then, when it has been seen to be well for a while, in the profile and the boot loader.
//!
//! Before each step the journal says which; whatever goes wrong is put right by [`crate::stages::conclude`],
//! which reads it. This stage ends its run by itself, since the switch may have changed or removed
//! the unit that it is part of.

use std::fs;
use std::path::{Path, PathBuf};

use crate::config::{Config, Instance, Operation};
use crate::error::{Context, Error, OrLog, Result};
use crate::fault;
use crate::nix::profile::{self, Generation};
use crate::nix::{self, integrity};
use crate::paths::Paths;
use crate::run::hold::Hold;
use crate::run::journal::{Before, Decision, Phase, Run};
use crate::run::notes::Notes;
use crate::run::status::Status;
use crate::run::{Failure, Stage, Trigger};
use crate::stages::branch::Fate;
use crate::stages::{boot, conclude, rollback, settle, switch, undo};
use crate::system::boot_loader::BootLoader;
use crate::system::units::{Restarts, Units};
use crate::system::{self, BY_ANOTHER, Turn, health, switched};

/// Runs the stage, and the run to its end: that is to start over if another's switch has taken the
/// instance out of the configuration.
pub fn activate(paths: &Paths, config: Option<&Config>) -> Result<()> {
    let Some(mut run) = Status::enter(paths, Stage::Activate)? else { return Ok(()) };
    fault::point("activate: begun");
    let mut turn = None;
    run.boot_loader = config.and_then(|config| config.boot_loader);
    if run.failure.is_some() || run.decision.is_some() {
        // there is nothing to do any more
    } else if config.is_none() && run.trigger != Trigger::Rollback {
        run.decision = Some(Decision::StartOver);
    } else if let Err(error) = attempt(paths, &mut run, &mut turn) {
        log::warn!("{error}.");
        if run.phase != Phase::Begun && system::is_stopping()? {
            // its units have been stopped for that, and could not be started: the next boot goes on from here
            return Err(Error::new("Failed to activate: the machine is shutting down; the run will be ended after the next boot"));
        }
        if run.decision.is_some() {
            // it has not failed, but starts over
            run.failure = None;
        } else {
            run.failure.get_or_insert_with(|| Failure::new(Stage::Activate, &error));
        }
        // the end is the same if this cannot be written, but for the reason in its report
        let _ = run.save();
    }
    conclude::end(paths, run, turn)
}

/// Finds the candidate, and takes the turn to run it; nothing where the run has come to its end already.
fn choose(paths: &Paths, run: &mut Run, turn: &mut Option<Turn>) -> Result<Option<PathBuf>> {
    run.notes = Notes::read_of(paths, &run.id)?;
    if run.notes.as_ref().is_some_and(|notes| notes.overtaken) {
        return run.decide(Decision::StartOver).map(|()| None);
    }
    let proposal = run.proposal().ok_or("there is no proposal").context(|| "activate".into())?;
    if let Some(why) = proposal.withheld.clone() {
        run.warnings.push(why);
        return run.decide(Decision::Withheld).map(|()| None);
    }
    if proposal.unchanged {
        if let Some(mut trial) = Run::load(paths.trial())? {
            let turn = Turn::take()?;
            rollback::withdraw(paths, &mut trial, "withdrawn before it had booted: another system is to run")?;
            trial.end(paths)?;
            drop(turn);
            run.warnings.push("the system that awaited the next boot has been withdrawn: another one is to run".into());
        }
        return run.decide(Decision::Unchanged).map(|()| None);
    }
    let system = nix::trusted_system(&paths.candidate(), paths.name())?;
    run.candidate = Some(system.clone());
    // the user's git may take its time: not while others wait, and again if another run has changed things meanwhile
    while turn.is_none() {
        let count = Turn::count();
        if !settle::settle(paths, run, Fate::Check)? {
            return run.decide(Decision::StartOver).map(|()| None);
        }
        *turn = Turn::take_at(count)?;
    }
    fault::point("activate: candidate checked");
    if renews(paths, run, &system)? {
        return run.enter(Phase::AwaitingBoot).map(|()| None);
    }
    if Hold::read(paths).is_some() {
        // what is asked for then is kept until the hold ends
        return run.decide(Decision::StartOver).map(|()| None);
    }
    Ok(Some(system))
}

/// As far as the candidate running, booted from now on; the branch is the conclusion's.
fn attempt(paths: &Paths, run: &mut Run, turn: &mut Option<Turn>) -> Result<()> {
    let choose = if run.trigger == Trigger::Rollback { undo::choose } else { choose };
    let Some(system) = choose(paths, run, turn)? else { return Ok(()) };
    run.candidate = Some(system.clone());
    if run.instance.operation == Operation::Switch {
        check_outlives_switch(&system, paths.name())?;
    }
    boot::supersede(paths)?;

    let generation = profile::current_generation()?;
    let is_booted = generation.as_ref().is_some_and(|generation| generation.system == system);
    let running = system::current()?;
    let before = before(paths, run, generation.clone())?;
    if (profile::current_generation()?, system::current()?) != (generation.clone(), running.clone()) {
        // another hand, which was waited for: where the run goes on from, it has not looked at
        if run.trigger == Trigger::Rollback {
            return Err(Error::new(format!("Failed to activate: {BY_ANOTHER}")).transient());
        }
        return run.decide(Decision::StartOver);
    }
    run.before = Some(before.clone());
    integrity::sync()?;

    let target = specialised(run, &system, &before)?;
    if run.instance.operation == Operation::Switch && (before.system != target || switched::is_unfinished()) {
        let inhibitors = switched::inhibitors(&system::current()?, &target);
        if inhibitors.is_empty() {
            run.enter(Phase::Switching)?;
            fault::point("activate: switching");
            switch::switch(run, &target, &before, &running)?;
            fault::point("activate: switched");
        } else {
            switch::at_boot(run, &inhibitors.join("; "));
        }
        if !run.reboot_needed {
            let restarts = (run.instance.observe > 0).then(Restarts::now).transpose()?;
            let is_new = switch::verify(paths, run, &target, &before)?;
            fault::point("activate: healthy");
            if let Some(restarts) = restarts {
                let restarts = if is_new { Restarts::now()? } else { restarts };
                let observed = switch::observe(paths, run, &target, &before, restarts);
                observed.inspect_err(|error| run.failure = Some(Failure::new(Stage::Observe, error)))?;
            }
        }
        let is_set = profile::current_generation()? != generation;
        let is_switched = if run.reboot_needed { is_set } else { system::current()? != target };
        let fail = |why| Err(Error::new(format!("Failed to complete the switch: {why}")).transient());
        if is_switched {
            // another hand: what it did is to stay
            switch::leave(run)?;
            return fail(BY_ANOTHER);
        }
        if is_set {
            return fail("something else has set another system for the next boot in the meantime");
        }
    }
    if before.system == target && Run::load_unfit(&target)?.is_some() {
        // it has booted, and was not well: is it now?
        switch::check_units(run, &target, &before, None)?;
        health::verify(&run.instance.health_checks, &run.passed).map_err(Error::transient)?;
    }
    run.reboot_needed |= run.instance.operation == Operation::Boot && !system::is_of(&system, &before.system);
    // also where the profile has it already: whoever put it there may not have come as far as the boot loader
    run.boots_once = run.reboot_needed && !is_booted && generation.is_some() && BootLoader::of(run.boot_loader).is_some();
    run.enter(Phase::Persisting)?;
    fault::point("activate: persisting");
    if !is_booted {
        undo::set_profile(&system, run.generation.as_ref())?;
    }
    fault::point("activate: profile set");
    install(run, &system, generation)?;
    fault::point("activate: boot loader set");
    run.warnings.extend(missing_from(&system, paths.name()));
    integrity::sync()?;
    run.enter(if run.reboot_needed { Phase::AwaitingBoot } else { Phase::Persisted })?;
    fault::point("activate: persisted");
    Ok(())
}

/// What to switch to: the specialisation of the system that is of the same name as the one that runs, if one does.
fn specialised(run: &mut Run, system: &Path, before: &Before) -> Result<PathBuf> {
    let Some(name) = profile::systems()?.iter().find_map(|system| system::specialisation(system, &before.system)) else {
        return Ok(system.to_owned());
    };
    let same = fs::canonicalize(system.join("specialisation").join(&name));
    if same.is_err() && run.instance.operation == Operation::Switch {
        run.warnings.push(format!("the specialisation {name} was left: the new system does not have it"));
    }
    Ok(same.unwrap_or_else(|_| system.to_owned()))
}

/// Whether the system already waits for the next boot, by this instance's doing: then there is nothing to change.
fn renews(paths: &Paths, run: &mut Run, system: &Path) -> Result<bool> {
    let waits = |trial: &Run| trial.waits() && trial.candidate.as_deref() == Some(system);
    let Some(trial) = Run::load(paths.trial())?.filter(waits) else { return Ok(false) };
    if profile::current_generation()?.is_none_or(|next| next.system != system) {
        return Ok(false);
    }
    (run.before, run.passed, run.reboot_needed) = (trial.before, trial.passed, true);
    (run.boot_loader, run.boots_once, run.warnings) = (trial.boot_loader, trial.boots_once, trial.warnings);
    Ok(true)
}

/// Has the boot loader boot the system: by default from now on, or, where only a boot can bring it and the boot loader
/// is able to, once, and what was booted before by default.
fn install(run: &mut Run, system: &Path, old: Option<Generation>) -> Result<()> {
    let (limit, doing) = (run.instance.timeouts.activate, "install the boot loader");
    let unchecked = |system: &Path| system::switch_unchecked(system, "boot", limit, doing, &[])?.switched();
    if !run.reboot_needed {
        // its checks were made when it was switched to
        return unchecked(system);
    }
    if let (Some(loader), Some(old)) = (run.booted_by(), old) {
        if unchecked(&old.system).and_then(|()| loader.boot_once(system)).or_warn().is_some() {
            return Ok(());
        }
    }
    system::switch_to(system, "boot", limit, doing, &[])?.switched()?;
    run.boots_once = false;
    run.warnings.push("the new system is what is booted by default already: the boot loader cannot boot it only once".into());
    Ok(())
}

/// Fails if a switch to the system would end the run that makes it: units are restarted unless they say otherwise,
/// and one that is nobody's but for a setting says nothing.
fn check_outlives_switch(system: &Path, instance: &str) -> Result<()> {
    let name = format!("ekiben-{instance}");
    let unit = fs::read_to_string(system.join("etc/systemd/system").join(format!("{name}.service"))).unwrap_or_default();
    // one that is masked is empty
    if unit.is_empty() || unit.lines().any(|line| line == "X-RestartIfChanged=false") {
        return Ok(());
    }
    Err(Error::new(format!(
        "Failed to accept {}: the switch would restart {name}.service, and so end this run; \
         leave `systemd.services.{name}` out where `services.ekiben.instances.{instance}` is not set",
        system.display()
    )))
}

/// What there is to go back to, kept from being collected as garbage. Where a run could not be put back and
/// its system still runs, that is what was before that one.
fn before(paths: &Paths, run: &mut Run, generation: Option<Generation>) -> Result<Before> {
    let system = system::current()?;
    let stuck = Run::load(paths.stuck())?.filter(|stuck| stuck.is_candidate(&system));
    let before = if let Some((before, passed)) = stuck.and_then(|stuck| Some((stuck.before?, stuck.passed))) {
        run.passed = passed;
        before
    } else {
        let is_new = run.candidate.as_ref() != Some(&system);
        // what another hand's switch has stopped for a moment is not what was broken before
        let ((passing, ignored), units) = system::at_rest(run.instance.timeouts.activate, || {
            let checks = if is_new { health::passing(&run.instance.health_checks) } else { (run.passed.clone(), Vec::new()) };
            Ok((checks, Units::before()?))
        })?;
        run.passed = passing;
        run.warnings.extend(ignored);
        let units = match Run::load_unfit(&system)? {
            // what has booted and is not well is no measure
            Some(Run { before: Some(good), passed, instance: Instance { health_checks, .. }, .. }) => {
                let is_same = |name: &String| run.instance.health_checks.get(name) == health_checks.get(name);
                run.passed.extend(passed.into_iter().filter(is_same));
                run.worse = good.units.worse_under(&good.system, &system)?.into_keys().collect();
                good.units
            }
            _ => units,
        };
        Before { system, generation, last_generation: profile::last_generation()?, units }
    };
    nix::keep(&before.system, &nix::before_root(paths, "system"))?;
    if let Some(generation) = &before.generation {
        nix::keep(&generation.system, &nix::before_root(paths, "generation"))?;
    }
    Ok(before)
}

/// A warning, if the new system does not have what has just deployed it.
fn missing_from(system: &Path, instance: &str) -> Option<String> {
    let instances: Vec<String> = fs::read_dir(system.join("etc/systemd/system"))
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter_map(|name| Some(name.strip_prefix("ekiben-")?.strip_suffix(".path")?.to_owned()))
        .collect();
    if instances.is_empty() {
        return Some("the new system has no instance of Ekiben: this machine will no longer update itself".into());
    }
    let is_gone = !instances.iter().any(|name| name == instance);
    is_gone.then(|| format!("the new system does not have the instance {instance}: it will no longer run"))
}
