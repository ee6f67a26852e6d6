//! What this machine runs, beside what was deployed, and what is not well any more of that.

use std::fs;
use std::path::Path;

use crate::config::Instance;
use crate::nix::profile;
use crate::paths::Paths;
use crate::run::status::{Deployed, Status, all_deployed};
use crate::system;

/// How what this machine runs differs from what was deployed last, in a line; none if it runs that, or nothing has been
/// deployed.
pub fn drift(paths: &Paths) -> Option<String> {
    let all = all_deployed(paths).into_iter().filter(Deployed::is_own);
    let Deployed { system: deployed, not_booted_since, .. } = all.max_by_key(|deployed| deployed.number)?;
    let running = system::current().ok().filter(|running| !system::is_of(&deployed, running))?;
    let is_booted = system::named_by("/run/booted-system").is_ok_and(|booted| booted == running);
    let (how, but) = match not_booted_since {
        Some(since) if is_booted && since != system::boot_id() => ("", ", but did not boot; deploy another one"),
        None if is_booted => (", chosen at boot", "; reboot to that, or deploy another one"),
        _ => (", switched to by hand", "; switch to that, or deploy another one"),
    };
    let name = |system: &Path| {
        profile::generation_of(system).map_or_else(|| system.display().to_string(), |number| format!("generation {number}"))
    };
    Some(format!("runs {}{how}; {} is deployed{but}", name(&running), name(&deployed)))
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
