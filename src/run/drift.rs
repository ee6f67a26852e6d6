//! What this machine runs, beside what was deployed, and what is not well any more of that.

use std::fs;
use std::path::Path;

use crate::config::{Config, Instance, Reboot, When, Window};
use crate::nix::profile::{self, Generation, SYSTEM_PROFILE};
use crate::paths::{Paths, rebooted_for};
use crate::run::Outcome;
use crate::run::hold::Hold;
use crate::run::journal::Run;
use crate::run::status::{Deployed, Status, all_deployed};
use crate::system;
use crate::text::span;

/// How what this machine runs differs from what was deployed last, in a line; none if it runs that, nothing has been
/// deployed, or a run of another instance than this one may just be switching.
pub fn drift(paths: &Paths) -> Option<String> {
    let mut all = Vec::new();
    for instance in paths.with_status() {
        let status = Status::read(&instance);
        if instance.name() != paths.name() && status.running.as_ref().is_some_and(|running| running.stage.may_switch()) {
            return None;
        }
        all.push(status);
    }
    let deployed = all.iter().filter_map(|status| status.deployed.as_ref()).filter(|deployed| deployed.is_own());
    let Deployed { system: deployed, not_booted_since, .. } = deployed.max_by_key(|deployed| deployed.number)?;
    let running = system::current().ok().filter(|running| !system::is_of(deployed, running))?;
    let is_booted = system::named_by("/run/booted-system").is_ok_and(|booted| booted == running);
    let (how, but) = match not_booted_since {
        Some(since) if is_booted && *since != system::boot_id() => ("", ", but did not boot; deploy another one"),
        None if is_booted => (", chosen at boot", "; reboot to that, or deploy another one"),
        _ if all.iter().any(is_stuck) => (", whose rollback failed", "; switch to that, or deploy another one"),
        _ => (", switched to by hand", "; switch to that, or deploy another one"),
    };
    Some(format!("this machine runs {}{how}; {} is deployed{but}", profile::name_of(&running), profile::name_of(deployed)))
}

/// What is set for the next boot by hand, in a line: it neither runs, nor is anything that Ekiben has had be booted.
pub fn pending(paths: &Paths) -> Option<String> {
    let all: Vec<_> = paths.with_status().iter().map(Status::read).collect();
    let is_ours = |status: &Status| status.running.as_ref().is_some_and(|running| running.stage.may_switch()) || is_stuck(status);
    let (next, running) = (profile::current_generation().ok()??, system::current().ok()?);
    let is_awaited = all.iter().any(|status| status.awaiting.as_ref().is_some_and(|awaiting| awaiting.system == next.system));
    // what has booted and is not well has had what was before be booted next
    let unfit = all.iter().any(|status| status.unfit.as_ref().is_some_and(|(boot, _)| *boot == system::boot_id()));
    if unfit || is_awaited || all.iter().any(is_ours) {
        return None;
    }
    is_by_hand(paths, &next, &running).then(|| {
        format!("generation {} is set for the next boot by hand; reboot to that, or it is superseded by what is deployed next", next.number)
    })
}

/// That a run whose system is booted from now on has taken the place of what was set for that by hand, and how to have it back.
pub fn superseded(paths: &Paths, run: &Run) -> Option<String> {
    let before = run.before.as_ref()?;
    let next = before.generation.as_ref().filter(|next| !run.is_candidate(&next.system) && is_by_hand(paths, next, &before.system))?;
    if matches!(Run::load_unfit(&before.system), Ok(Some(_))) {
        return None;
    }
    Some(format!(
        "generation {number}, which was set for the next boot by hand, is superseded; to have it back: \
         nix-env -p {SYSTEM_PROFILE} --switch-generation {number} && {SYSTEM_PROFILE}/bin/switch-to-configuration boot",
        number = next.number
    ))
}

/// Whether a generation neither runs nor is what an instance has deployed last.
fn is_by_hand(paths: &Paths, next: &Generation, running: &Path) -> bool {
    !system::is_of(&next.system, running) && all_deployed(paths).iter().all(|deployed| deployed.system != next.system)
}

/// Whether the last run that has changed what this machine runs could not undo that.
fn is_stuck(status: &Status) -> bool {
    let mut results = status.runs.iter().map(|run| run.result);
    let changed = results.find(|result| matches!(result, Outcome::Deployed | Outcome::RolledBack | Outcome::Restored | Outcome::Stuck));
    changed == Some(Outcome::Stuck)
}

/// For how long something has awaited the next boot, and how that comes about; none if nothing does.
pub fn awaits(config: &Config, status: &Status, policy: &Reboot, now: u64) -> Option<String> {
    let system = &status.awaiting.as_ref()?.system;
    let since = status.runs.iter().take_while(|run| run.result == Outcome::AwaitingBoot).last();
    let since = since.map(|run| format!(", for {} so far", span(now.saturating_sub(run.finished)))).unwrap_or_default();
    let was_rebooted = rebooted_for().iter().any(|known| Path::new(known) == system);
    let once = match &status.running {
        _ if Hold::is_any(config) => ", once nothing is held",
        Some(_) => ", once no run is under way",
        None => "",
    };
    let how = match (policy.when, &policy.window) {
        (When::Needed, Some(Window { lower, upper })) if !was_rebooted => format!("this machine reboots between {lower} and {upper}{once}"),
        (When::Needed, None) if !was_rebooted => format!("this machine reboots within minutes{once}"),
        _ => "reboot to have it deployed".into(),
    };
    Some(format!("{since}; {how}"))
}

/// What root has found not to be well any more of what was deployed last, on a host of a fleet.
pub fn unwell(paths: &Paths, status: &Status) -> Option<String> {
    let number = status.deployed.as_ref()?.number.to_string();
    Some(fs::read_to_string(paths.unwell()).ok()?.strip_prefix(&number)?.strip_prefix(' ')?.to_owned())
}

/// Whether this very commit is what was last deployed of its flake, by whichever instance.
pub fn is_deployed(paths: &Paths, commit: &str, instance: &Instance) -> bool {
    let same_flake = |deployed: &Deployed| deployed.flake_ref == instance.flake_ref && deployed.flags == instance.flags;
    let last = all_deployed(paths).into_iter().filter(same_flake).max_by_key(|deployed| deployed.number);
    last.is_some_and(|deployed| deployed.commit == commit)
}
