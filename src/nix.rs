//! The only caller of nix. The user's stages fetch, evaluate and build; root asks its store
//! about paths and moves the system profile, and evaluates nothing.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{Context, Error, Result};
use crate::program::Program;

/// Where NixOS keeps its generations.
pub const SYSTEM_PROFILE: &str = "/nix/var/nix/profiles/system";
/// Where root keeps systems from being collected as garbage while a run needs them.
const GC_ROOTS: &str = "/nix/var/nix/gcroots/ekiben";
const STORE: &str = "/nix/store/";

/// A numbered generation of the system profile.
#[derive(Clone, Debug, PartialEq, serde::Deserialize, serde::Serialize)]
pub struct Generation {
    /// As in `system-<number>-link`.
    pub number: u64,
    /// The system it stands for.
    pub system: PathBuf,
}

/// Updates the inputs of a flake, all if none are named, and returns its new lock file; the flake
/// itself is not written to. None if the flake has no inputs. `scratch` is a file to write to.
pub fn updated_lock_file(flake: &str, inputs: &[String], scratch: &Path, limit: Duration) -> Result<Option<Vec<u8>>> {
    let doing = || format!("read {}", scratch.display());
    crate::files::clear(scratch).context(|| format!("remove {}", scratch.display()))?;
    let update = nix().args(["flake", "update"]).args(inputs).args(["--flake", flake]);
    let update = update.arg("--output-lock-file").arg(scratch);
    let what = if inputs.is_empty() { "all inputs".into() } else { inputs.join(", ") };
    update.run(limit, || format!("update {what}"))?.success()?;
    let lock = scratch.exists().then(|| fs::read(scratch)).transpose().context(doing)?;
    crate::files::clear(scratch).context(|| format!("remove {}", scratch.display()))?;
    Ok(lock)
}

/// What a system can be built from.
pub enum Source<'a> {
    /// A flake, and the name of one of its configurations.
    Flake(&'a str, &'a str),
    /// A directory with a `configuration.nix`, for the Nixpkgs that `NIX_PATH` names.
    Directory(&'a Path),
    /// It has been built elsewhere: some substituter has it.
    Store(&'a Path),
}

/// Builds a NixOS system, and makes `link` a link to it that keeps it from being collected as garbage.
pub fn build_system(source: &Source, flags: &[String], link: &Path, limit: Duration) -> Result<()> {
    let build = nix().args(["build", "--print-build-logs"]).args(flags).arg("--out-link").arg(link);
    let (build, name) = match source {
        Source::Flake(flake, configuration) => {
            let attribute = format!("{flake}#nixosConfigurations.\"{configuration}\".config.system.build.toplevel");
            (build.arg("--no-update-lock-file").arg(attribute), (*configuration).to_owned())
        }
        Source::Directory(directory) => {
            // as nixos-rebuild does it
            let configuration = directory.join("configuration.nix").display().to_string();
            let build = build.args(["--impure", "-I", &format!("nixos-config={configuration}"), "--file", "<nixpkgs/nixos>"]);
            (build.arg("config.system.build.toplevel"), configuration)
        }
        Source::Store(system) => (build.arg(system), system.display().to_string()),
    };
    build.run(limit, || format!("build {name}"))?.success()
}

/// nix with the features that all of this needs.
pub fn nix() -> Program {
    let nix = Program::new("nix").args(["--extra-experimental-features", "nix-command flakes"]);
    // Nix fetches as this user, but looks for passwords in root's file only
    match std::env::var_os("HOME").map(|home| Path::new(&home).join(".netrc")) {
        Some(netrc) if netrc.exists() => nix.arg("--netrc-file").arg(netrc),
        _ => nix,
    }
}

/// Reads a link that somebody else made, once, and returns the system it names: a valid path of
/// the store that is a NixOS system, kept from being collected as garbage until [`unroot`].
pub fn trusted_system(link: &Path, root: &str) -> Result<PathBuf> {
    let target = fs::read_link(link).context(|| format!("read the candidate {}", link.display()))?;
    let refuse = |why: &str| Err(Error::new(format!("Failed to accept {target:?} as a system: {why}")));
    if !is_store_path(&target) {
        return refuse("it is no path of the store");
    }
    let valid = Program::as_root("nix-store").arg("--check-validity").arg(&target);
    if let Err(error) = valid.output(|| "ask the store".into(), None) {
        return refuse(&error.to_string());
    }
    let keep = Program::as_root("nix-store").args(["--realise", "--add-root"]).arg(Path::new(GC_ROOTS).join(root));
    keep.arg(&target).output(|| format!("keep {}", target.display()), None)?;
    for file in ["init", "nixos-version", "bin/switch-to-configuration"] {
        if !target.join(file).exists() {
            return refuse(&format!("it is no NixOS system, it has no {file}"));
        }
    }
    Ok(target)
}

/// Lets a system that [`trusted_system`] kept be collected as garbage.
pub fn unroot(root: &str) -> Result<()> {
    let root = Path::new(GC_ROOTS).join(root);
    crate::files::remove(&root).context(|| format!("remove {}", root.display()))
}

/// Whether this is a whole path of the store, by its form: `/nix/store/<hash>-<name>`.
pub fn is_store_path(path: &Path) -> bool {
    let name = path.to_str().and_then(|text| text.strip_prefix(STORE)).unwrap_or_default();
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"+-._?=".contains(&byte);
    name.len() > 33 && name.as_bytes()[32] == b'-' && name.bytes().all(plain) && !name.starts_with('.')
}

/// The generation that the system profile points to; none if it has never been set.
pub fn current_generation() -> Result<Option<Generation>> {
    let profile = Path::new(SYSTEM_PROFILE);
    let doing = || format!("read {SYSTEM_PROFILE}");
    let Ok(link) = fs::read_link(profile) else { return Ok(None) };
    let number = link.file_name().and_then(|name| name.to_str()?.strip_prefix("system-")?.strip_suffix("-link")?.parse().ok());
    let number = number.ok_or_else(|| format!("{} is no generation", link.display())).context(doing)?;
    Ok(Some(Generation { number, system: fs::canonicalize(profile).context(doing)? }))
}

/// Makes a new generation of the system profile, unless it already points to this system.
pub fn set_profile(system: &Path) -> Result<()> {
    let set = profile().arg("--set").arg(system);
    set.output(|| format!("set the system profile to {}", system.display()), None).map(drop)
}

/// Points the system profile back to where it was; the later generation that it points to now is
/// removed.
pub fn restore_profile(old: Option<&Generation>) -> Result<()> {
    let now = current_generation()?;
    if now.as_ref() == old {
        return Ok(());
    }
    let doing = || format!("go back to {}", old.map_or("no generation".into(), |old| format!("generation {}", old.number)));
    if let Some(old) = old {
        profile().args(["--switch-generation", &old.number.to_string()]).output(doing, None)?;
        if current_generation()?.as_ref() != Some(old) {
            return Err(format!("it is no longer {}", old.system.display())).context(doing);
        }
    } else {
        crate::files::remove(Path::new(SYSTEM_PROFILE)).context(doing)?;
    }
    match now {
        Some(new) if old.is_none_or(|old| new.number > old.number) => {
            let link = format!("{SYSTEM_PROFILE}-{}-link", new.number);
            crate::files::remove(Path::new(&link)).context(|| format!("remove {link}"))
        }
        _ => Ok(()),
    }
}

fn profile() -> Program {
    Program::as_root("nix-env").args(["--profile", SYSTEM_PROFILE])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_store_paths_are_store_paths() {
        let hash = "0123456789abcdfghijklmnpqrsvwxyz";
        assert!(is_store_path(Path::new(&format!("/nix/store/{hash}-nixos-system-web-25.11"))));
        for path in [
            format!("/nix/store/{hash}-nixos/bin"),
            format!("/nix/store/{hash}"),
            format!("/nix/store/{hash}-"),
            format!("/nix/store/../../tmp/{hash}-x"),
            format!("/nix/store//{hash}-x"),
            format!("/tmp/{hash}-x"),
            format!("nix/store/{hash}-x"),
            format!("/nix/store/{hash}-a b"),
            "/nix/store/".into(),
            String::new(),
        ] {
            assert!(!is_store_path(Path::new(&path)), "{path}");
        }
    }
}
