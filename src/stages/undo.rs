//! What a run does instead of deploying where somebody has asked for the last deployment to be undone: the system that ran
//! before becomes its candidate, and goes the way of any other; or what awaits a boot is withdrawn.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::nix;
use crate::nix::profile::{self, Generation};
use crate::paths::Paths;
use crate::run::journal::{Decision, Run};
use crate::run::status::{Deployed, Status, all_deployed};
use crate::stages::rollback;
use crate::system::{self, Turn, service};

/// Finds the system to go back to, and what was booted with it; nothing where the run has come to its end already.
pub fn choose(paths: &Paths, run: &mut Run, turn: &mut Option<Turn>) -> Result<Option<PathBuf>> {
    let name = paths.name();
    let fail = |why: &str| Error::new(format!("Failed to roll back {name}: {why}"));
    *turn = Some(Turn::take()?);
    let status = Status::read(paths);
    let Some(undone) = run.undoes.as_mut().filter(|undone| status.last_deployment(name).is_ok_and(|last| last == undone.commit)) else {
        if let Some(known) = status.undone.filter(|known| run.undoes.take_if(|undone| undone.commit == known.commit).is_some()) {
            // somebody else had asked for the same
            run.warnings.push(known.notice(name));
            return run.decide(Decision::Withheld).map(|()| None);
        }
        Status::read(paths).last_deployment(name)?;
        return Err(fail(&format!("something else has been deployed since that was asked for; see ekiben status {name}")));
    };
    if let Some(trial) = Run::load(paths.trial())? {
        if let Some(proposal) = trial.proposal() {
            (undone.base, undone.tree) = (proposal.base.to_string(), proposal.tree.to_string());
            undone.summary = Some(proposal.summary.clone());
        }
        undone.release = trial.notes.and_then(|notes| notes.release);
        undone.before = commit_of(&system::current()?, all_deployed(paths));
        return run.decide(Decision::Withdraw).map(|()| None);
    }
    let Some((deployed, before)) = status.deployed.and_then(|deployed| deployed.before.clone().map(|before| (deployed, before))) else {
        return Err(fail("what ran before its last deployment is not known"));
    };
    (undone.base, undone.tree) = (deployed.base, deployed.tree);
    (undone.summary, undone.release) = (deployed.summary, deployed.release);
    let earlier = all_deployed(paths).into_iter().filter(|other| other.number < deployed.number);
    undone.before = commit_of(&before.system, earlier.chain(before.deployed));
    for other in paths.with_status() {
        if Status::read(&other).deployed.is_some_and(|other| other.is_own() && other.number > deployed.number) {
            let other = other.name();
            let way_out = if system::has_unit(&service::unit(other)) {
                format!("run ekiben rollback {other} before")
            } else {
                format!("{other} is no longer configured: revert the commit and run ekiben trigger {name} instead")
            };
            return Err(fail(&format!("{other} has deployed since, which would be undone, too; {way_out}")));
        }
    }
    // what another hand has switched to stays, but for what is gone back to
    let generation = before.generation.filter(|generation| system::is_of(&generation.system, &before.system));
    let system = generation.as_ref().map_or(before.system, |generation| generation.system.clone());
    let next = profile::current_generation()?.map(|next| next.system);
    for other in next.into_iter().chain([system::current()?]) {
        if ![&deployed.system, &system].iter().any(|known| system::is_of(known, &other)) {
            let other = profile::name_of(&other);
            return Err(fail(&format!("this machine has been switched to {other} by hand; use nixos-rebuild to go on from there")));
        }
    }
    nix::check_system(&system, name).map_err(|error| {
        fail(&format!("{error}; if it has been collected as garbage, revert the commit and run ekiben trigger {name} instead"))
    })?;
    run.generation = generation;
    run.save()?;
    Ok(Some(system))
}

/// The commit that a system was built from, as one of these deployments says, of whichever instance.
fn commit_of(system: &Path, deployed: impl IntoIterator<Item = Deployed>) -> Option<String> {
    let known = deployed.into_iter().filter(|deployed| system::is_of(&deployed.system, system));
    known.max_by_key(|deployed| deployed.number).map(|deployed| deployed.commit)
}

/// Makes the system what is booted: by the generation that it was, if that still is it.
pub fn set_profile(system: &Path, generation: Option<&Generation>) -> Result<()> {
    let generation = generation.filter(|generation| generation.is_there());
    generation.map_or_else(|| profile::set_profile(system), |generation| profile::restore_profile(Some(generation)))
}

/// Withdraws what awaits the next boot. Fails if that has booted meanwhile, and so become what is deployed.
pub fn withdraw(paths: &Paths, run: &Run) -> Result<()> {
    if let Some(mut trial) = Run::load(paths.trial())? {
        rollback::withdraw(paths, &mut trial, "withdrawn before it had booted, as somebody had asked")?;
        return trial.end(paths);
    }
    // else done before this was cut off, or by the boot since
    let deployed = Status::read(paths).deployed;
    let has_booted = deployed.zip(run.undoes.as_ref()).is_some_and(|(deployed, undone)| deployed.commit == undone.commit);
    if has_booted { Err(Error::new("Failed to withdraw what awaited the next boot: that has booted")) } else { Ok(()) }
}
