//! The system profile and its generations: what is booted.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Context, Error, Result};
use crate::files;
use crate::nix::as_root;

/// Where NixOS keeps its generations.
pub const SYSTEM_PROFILE: &str = "/nix/var/nix/profiles/system";

/// A numbered generation of the system profile.
#[derive(Clone, Debug, PartialEq, serde::Deserialize, serde::Serialize)]
pub struct Generation {
    /// As in `system-<number>-link`.
    pub number: u64,
    /// The system it stands for.
    pub system: PathBuf,
}

impl Generation {
    /// Whether there still is a link by its number to its system.
    pub fn is_there(&self) -> bool {
        fs::read_link(format!("{SYSTEM_PROFILE}-{}-link", self.number)).is_ok_and(|target| target == self.system)
    }
}

/// The generation that the system profile points to; `None` if it has never been set.
pub fn current_generation() -> Result<Option<Generation>> {
    let profile = Path::new(SYSTEM_PROFILE);
    let doing = || format!("read {SYSTEM_PROFILE}");
    let Ok(link) = fs::read_link(profile) else { return Ok(None) };
    let number = link.file_name().and_then(number_of);
    let way_out = || format!("{0} is not a generation; run nix-env --profile {SYSTEM_PROFILE} --set {0}", link.display());
    let number = number.ok_or_else(way_out).context(doing)?;
    Ok(Some(Generation { number, system: fs::canonicalize(profile).context(doing)? }))
}

/// The generations of the system profile, by number, with the links that stand for them.
fn generations() -> Result<BTreeMap<u64, PathBuf>> {
    let profile = Path::new(SYSTEM_PROFILE);
    let doing = || format!("list the generations of {SYSTEM_PROFILE}");
    let directory = profile.parent().unwrap_or(profile);
    let mut generations = BTreeMap::new();
    for entry in fs::read_dir(directory).context(doing)? {
        let name = entry.context(doing)?.file_name();
        generations.extend(number_of(&name).map(|number| (number, directory.join(name))));
    }
    Ok(generations)
}

/// The number of a generation, by the name of its link.
fn number_of(link: &OsStr) -> Option<u64> {
    link.to_str()?.strip_prefix("system-")?.strip_suffix("-link")?.parse().ok()
}

/// The systems that there are generations of.
pub fn systems() -> Result<Vec<PathBuf>> {
    Ok(generations()?.into_values().filter_map(|link| fs::canonicalize(link).ok()).collect())
}

/// What people call a system: the latest generation of it, if there is one.
pub fn name_of(system: &Path) -> String {
    let mut generations = generations().unwrap_or_default().into_iter().rev();
    let latest = generations.find(|(_, link)| fs::read_link(link).is_ok_and(|target| target == system));
    latest.map_or_else(|| system.display().to_string(), |(number, _)| format!("generation {number}"))
}

/// The highest number of a generation.
pub fn last_generation() -> Result<Option<u64>> {
    Ok(generations()?.keys().next_back().copied())
}

/// Makes a new generation of the system profile, unless it already points to this system.
pub fn set_profile(system: &Path) -> Result<()> {
    let doing = || format!("set the system profile to {}", system.display());
    nix_env(&["--set".as_ref(), system.as_ref()], doing)
}

/// Points the system profile back to where it was, also if that generation has been deleted meanwhile.
pub fn restore_profile(old: Option<&Generation>) -> Result<()> {
    if current_generation()?.as_ref() == old {
        return Ok(());
    }
    let doing = || format!("roll back to {}", old.map_or("no generation".into(), |old| format!("generation {}", old.number)));
    let Some(old) = old else { return files::remove(Path::new(SYSTEM_PROFILE)).context(doing) };
    let link = PathBuf::from(format!("{SYSTEM_PROFILE}-{}-link", old.number));
    if fs::symlink_metadata(&link).is_err() {
        std::os::unix::fs::symlink(&old.system, &link).and_then(|()| files::sync_parent(&link)).context(doing)?;
    }
    nix_env(&["--switch-generation".as_ref(), old.number.to_string().as_ref()], doing)?;
    if current_generation()?.as_ref() != Some(old) {
        return Err(format!("it is no longer {}", old.system.display())).context(doing);
    }
    Ok(())
}

/// Removes the generations of a system that are later than the last one there was, but for one that is current.
pub fn remove_generations(system: &Path, last: Option<u64>) -> Result<()> {
    let current = current_generation()?.map(|generation| generation.number);
    for (number, link) in generations()? {
        let is_later = last.is_none_or(|last| number > last) && current != Some(number);
        if is_later && fs::read_link(&link).is_ok_and(|target| target == system) {
            files::remove(&link).doing("remove", &link)?;
        }
    }
    // links that a nix-env which failed, or was killed, has not brought to their places
    for entry in Path::new(SYSTEM_PROFILE).parent().map(fs::read_dir).into_iter().flatten().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_half_made = name.starts_with("system") && name.contains(".tmp-") || name.starts_with('.') && name.contains("_system");
        let is_ours = |target: PathBuf| target == system || target.file_name().and_then(number_of) > last;
        if is_half_made && fs::read_link(entry.path()).is_ok_and(is_ours) {
            files::remove(&entry.path()).doing("remove", &entry.path())?;
        }
    }
    Ok(())
}

/// Has Nix change the system profile. Where it cannot, that is no system's fault.
fn nix_env(arguments: &[&OsStr], doing: impl Fn() -> String) -> Result<()> {
    remove_dead_lock()?;
    let done =
        as_root("nix-env").args(["--profile", SYSTEM_PROFILE]).args(arguments).output(doing, None).map(drop).map_err(Error::transient);
    done.and(remove_dead_lock())
}

/// Removes the lock of the system profile if Nix could not. That has written into it then, at which every other Nix takes
/// it for removed, and looks without end for the one in its place.
fn remove_dead_lock() -> Result<()> {
    let lock = PathBuf::from(format!("{SYSTEM_PROFILE}.lock"));
    match fs::metadata(&lock) {
        Ok(found) if found.len() > 0 => files::remove(&lock).doing("remove", &lock),
        _ => Ok(()),
    }
}
