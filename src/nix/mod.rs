//! Nix, as all of this calls it. The user's stages and who publishes fetch, evaluate and build; root asks its store
//! about paths and moves the system profile, and evaluates nothing.

pub mod cache;
pub mod integrity;
pub mod profile;
pub mod progress;
mod read_only;
pub mod substitute;

use std::fs;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use crate::error::{Context, Error, Result};
use crate::names::is_store_path;
use crate::nix::cache::Cache;
use crate::nix::progress::Progress;
use crate::paths::Paths;
use crate::program::Program;
use crate::text;

/// Where root keeps systems from being collected as garbage while a run needs them.
const GC_ROOTS: &str = "/nix/var/nix/gcroots/ekiben";
const STORE: &str = "/nix/store/";
/// How long it may take to compare two systems.
const COMPARISON: Duration = Duration::from_secs(60);

/// What Nix says when it goes on with what it has fetched earlier, though it was to fetch it now; or with
/// another branch than was meant, or because no revision names what it has fetched.
const STALE: &[&str] = &[
    UNLOCKED,
    "; using cached version",
    "; using expired cached ref",
    "; continuing with the most recent version",
    "could not read HEAD ref from repo",
];

/// What Nix says where it has written no lock file, before the input.
const UNLOCKED: &str = "because it has an unlocked input ('";

/// Updates the inputs of a flake, all if none are named, and returns its new lock file; the flake
/// itself is not written to. None if the flake has no inputs. `scratch` is a file to write to. Fails if
/// one of the inputs was not really asked of its source.
pub fn updated_lock_file(cache: &Cache, flake: &str, inputs: &[String], scratch: &Path, limit: Duration) -> Result<Option<Vec<u8>>> {
    crate::files::clear(scratch).doing("remove", scratch)?;
    cache.used(|| update(cache, flake, inputs, scratch, limit))?;
    let lock = crate::files::if_there(fs::read(scratch)).doing("read", scratch)?;
    crate::files::clear(scratch).doing("remove", scratch)?;
    Ok(lock)
}

fn update(cache: &Cache, flake: &str, inputs: &[String], scratch: &Path, limit: Duration) -> Result<()> {
    let doing = || format!("update {}", if inputs.is_empty() { "all inputs".into() } else { inputs.join(", ") });
    let update = cache.give(nix()).reason(reason).args(["flake", "update"]).args(inputs).args(["--flake", flake]);
    // it is not to keep silent about that
    let update = update.args(["--option", "warn-dirty", "true", "--output-lock-file"]).arg(scratch).watch_for(STALE);
    // a server that does not answer may answer another time
    let ended = update.run(limit, doing).map_err(Error::transient)?;
    match ended.seen.first().cloned() {
        Some(stale) if ended.status.success() => {
            // it shows all of the answer, too
            let download = ended.tail.iter().find(|line| line.contains("unable to download")).cloned();
            let unlocked = stale.split_once(UNLOCKED).and_then(|(_, input)| input.split_once('\''));
            let edited = unlocked.map(|(input, _)| format!("{input} has uncommitted changes; commit them"));
            let why = edited.or(download).or_else(|| ended.reason()).unwrap_or(stale);
            Err(Error::new(format!("Failed to {}: {}", doing(), why.trim_start_matches("warning: "))).with_tail(ended.tail))
        }
        _ => ended.success().map_err(|error| locked_out(&error).unwrap_or(error)),
    }
}

/// What says best why nothing was fetched: what git died of first, with what ssh said before that or git after
/// it where it makes no sense alone; else the last error, which is the innermost.
fn reason(tail: &[String]) -> Option<String> {
    let of_git = tail.iter().position(|line| line.contains("fatal: "));
    let at = of_git.or_else(|| tail.iter().rposition(|line| line.contains("error: ")))?;
    let line = tail[at].trim().trim_end_matches('.');
    let more = |at: Option<usize>| at.and_then(|at| tail.get(at)).map(|line| line.trim()).filter(|line| !line.is_empty());
    Some(match (more(at.checked_sub(1)), more(Some(at + 1))) {
        (Some(before), _) if line.contains("Could not read from remote repository") => before.trim_end_matches('.').to_owned(),
        (_, Some(after)) if line.ends_with(':') => format!("{line} {after}"),
        _ => line.to_owned(),
    })
}

/// What a system can be built from.
pub enum Source<'a> {
    /// A flake, and the name of one of its configurations.
    Flake(String, &'a str),
    /// A directory with a `configuration.nix`, for the Nixpkgs that `NIX_PATH` names.
    Directory(&'a Path),
    /// It has been built elsewhere: some substituter has it.
    Store(&'a Path),
}

impl<'a> Source<'a> {
    /// What is in a directory by itself: a flake with this configuration, or, if none is named, a `configuration.nix`.
    pub fn of(directory: &'a Path, configuration: Option<&'a str>) -> Self {
        configuration.map_or(Self::Directory(directory), |name| Self::Flake(format!("path:{}", directory.display()), name))
    }

    /// What people call it.
    fn name(&self) -> String {
        match self {
            Self::Flake(_, configuration) => (*configuration).to_owned(),
            Self::Directory(directory) => directory.join("configuration.nix").display().to_string(),
            Self::Store(system) => system.display().to_string(),
        }
    }

    /// Has nix evaluate or build it.
    pub fn give(&self, nix: Program) -> Program {
        match self {
            Self::Flake(flake, configuration) => {
                let attribute = format!("{flake}#nixosConfigurations.\"{configuration}\".config.system.build.toplevel");
                // one that would change here would change elsewhere, too, and not to the same
                nix.arg("--no-update-lock-file").arg(attribute)
            }
            // as nixos-rebuild does it
            Self::Directory(_) => {
                let nix = nix.args(["--impure", "-I", &format!("nixos-config={}", self.name()), "--file", "<nixpkgs/nixos>"]);
                nix.arg("config.system.build.toplevel")
            }
            Self::Store(system) => nix.arg(system),
        }
    }
}

/// Builds a NixOS system, and makes `link` a link to it that keeps it from being collected as garbage.
pub fn build_system(source: &Source, flags: &[String], link: &Path, limit: Duration) -> Result<()> {
    let attempt = || {
        let build = nix().args(["build", "--print-build-logs"]).args(flags).arg("--out-link").arg(link);
        source
            .give(build)
            .heard_by(Progress::teller())
            .run(limit, || format!("build {}", source.name()))?
            .success()
            .map_err(not_the_candidate)
    };
    Cache::own()?.used(attempt)
}

/// The error of a nix, which the candidate is not to blame for if the daemon does not let it in.
fn not_the_candidate(error: Error) -> Error {
    locked_out(&error).map_or(error, Error::transient)
}

/// Which packages of two systems are of other versions, or other sizes, a line each; of many, the first `most`.
pub fn differences(old: &Path, new: &Path, most: usize) -> Result<Vec<String>> {
    let program = nix().args(["store", "diff-closures"]).arg(old).arg(new).within(COMPARISON);
    let said = program.said(|| format!("compare with {}", old.display()))?;
    let mut lines: Vec<_> = said.lines().map(|line| text::line(&without_colours(line))).collect();
    let more = lines.len().saturating_sub(most);
    lines.truncate(most);
    lines.extend((more > 0).then(|| format!("... and {more} more")));
    Ok(lines)
}

/// Nix marks versions on whatever is no terminal, too.
fn without_colours(line: &str) -> String {
    let plain = |part: &str| part.split_once('m').map_or(String::new(), |(_, plain)| plain.to_owned());
    line.split("\x1b[").enumerate().map(|(at, part)| if at == 0 { part.to_owned() } else { plain(part) }).collect()
}

/// What is wrong if a program could not speak with the Nix daemon because that does not let this user in.
fn locked_out(error: &Error) -> Option<Error> {
    if !error.tail().iter().any(|line| line.contains("cannot open connection to remote store")) {
        return None;
    }
    let words =
        |program: Program| -> Option<Vec<String>> { Some(program.said(String::new).ok()?.split_whitespace().map(String::from).collect()) };
    let setting = |name: &str| words(nix().args(["config", "show", name]));
    let allowed = [setting("allowed-users")?, setting("trusted-users")?].concat();
    let user = words(Program::new("id").arg("-un"))?.concat();
    let groups = words(Program::new("id").arg("-Gn"))?;
    let is_in = groups.iter().map(|group| format!("@{group}")).chain([user.clone(), "*".into()]).any(|name| allowed.contains(&name));
    let message = || format!("Failed to connect to the Nix daemon: it does not let {user} in; add that to nix.settings.allowed-users");
    (!is_in).then(|| Error::new(message()))
}

/// nix with the features that all of this needs.
pub fn nix() -> Program {
    let nix = Program::new("nix").by_ssh().args(["--extra-experimental-features", "nix-command flakes"]);
    // Nix fetches as this user, but looks for passwords in root's file only
    match std::env::var_os("HOME").map(|home| Path::new(&home).join(".netrc")) {
        Some(netrc) if netrc.exists() => nix.arg("--netrc-file").arg(netrc),
        _ => nix,
    }
}

/// One of Nix's programs for root, who needs no daemon: see [`read_only`].
fn as_root(program: &str) -> Program {
    Program::as_root(program).env("NIX_REMOTE", "local")
}

/// Reads a link that somebody else made, once, and returns the system it names: a valid path of
/// the store that is a NixOS system, kept from being collected as garbage until [`unroot`].
pub fn trusted_system(link: &Path, root: &str) -> Result<PathBuf> {
    let target = fs::read_link(link).context(|| format!("read the candidate {}", link.display()))?;
    check_system(&target, root).map(|()| target)
}

/// Fails unless this is a valid path of the store that is a NixOS system, and keeps it from being collected as garbage
/// until [`unroot`].
pub fn check_system(target: &Path, root: &str) -> Result<()> {
    let refuse = |why: &str| Err(Error::new(format!("Failed to accept {target:?} as a system: {why}")));
    if !is_store_path(target) {
        return refuse("not a store path");
    }
    let valid = as_root("nix-store").arg("--check-validity").arg(target);
    valid.output(|| format!("accept {target:?} as a system"), None)?;
    keep(target, root)?;
    check_is_system(Path::new(STORE), target).or_else(|why| refuse(&why))
}

/// Keeps a system from being collected as garbage until [`unroot`].
pub fn keep(system: &Path, root: &str) -> Result<()> {
    let keep = as_root("nix-store").args(["--realise", "--add-root"]).arg(Path::new(GC_ROOTS).join(root));
    // a store that cannot do so has no say about the system
    keep.arg(system).output(|| format!("keep {}", system.display()), None).map(drop).map_err(Error::transient)
}

/// What every NixOS system has.
const HAS: [&str; 3] = ["init", "nixos-version", "bin/switch-to-configuration"];
/// What else root, the boot loader or the kernel run or read of a system that has it.
const MAY_HAVE: [&str; 15] = [
    "activate",
    "append-initrd-secrets",
    "boot.json",
    "dry-activate",
    "etc",
    "firmware",
    "init-interface-version",
    "initrd",
    "kernel",
    "kernel-modules",
    "kernel-params",
    "prepare-root",
    "specialisation",
    "sw",
    "switch-inhibitors",
];

/// Says why this is no system of which root may run what is in it: no link of it leads out of the store, where
/// others could change what it leads to.
fn check_is_system(store: &Path, system: &Path) -> Result<(), String> {
    if !fs::symlink_metadata(system).is_ok_and(|metadata| metadata.is_dir()) {
        return Err("not a directory".into());
    }
    let specialisations = fs::read_dir(system.join("specialisation")).into_iter().flatten().flatten();
    let specialised = specialisations.map(|entry| entry.path().join("bin/switch-to-configuration"));
    let may_have = MAY_HAVE.iter().map(|file| system.join(file)).chain(specialised).filter(|path| fs::symlink_metadata(path).is_ok());
    for path in HAS.iter().map(|file| system.join(file)).chain(may_have) {
        if !is_within(store, &path) {
            let why = if fs::symlink_metadata(&path).is_ok() { "leads out of the store, or to nothing" } else { "is missing" };
            return Err(format!("not a NixOS system: {} {why}", path.display()));
        }
    }
    Ok(())
}

/// Whether a path below the store is one also when all links on the way are followed, and is there.
fn is_within(store: &Path, path: &Path) -> bool {
    let Ok(below) = path.strip_prefix(store) else { return false };
    let mut at = store.to_owned();
    let mut ahead: Vec<_> = below.components().rev().map(|part| part.as_os_str().to_owned()).collect();
    // as many links as the kernel follows
    let mut links = 0;
    while let Some(part) = ahead.pop() {
        if part == ".." {
            at.pop();
        } else {
            at.push(part);
        }
        if !at.starts_with(store) {
            return false;
        }
        let Ok(metadata) = fs::symlink_metadata(&at) else { return false };
        if !metadata.is_symlink() {
            continue;
        }
        links += 1;
        let Ok(target) = fs::read_link(&at) else { return false };
        at = match target.strip_prefix(store) {
            Ok(_) => store.to_owned(),
            Err(_) if target.is_absolute() || links > 40 => return false,
            Err(_) => at.with_file_name(""),
        };
        let parts = target.strip_prefix(store).unwrap_or(&target).components().rev();
        ahead.extend(parts.filter(|part| *part != Component::CurDir).map(|part| part.as_os_str().to_owned()));
    }
    at != store
}

/// Lets all that was kept for a run be collected as garbage.
pub fn unroot(paths: &Paths) -> Result<()> {
    let roots = [paths.name().to_owned(), before_root(paths, "system"), before_root(paths, "generation")];
    let remove = |root: &PathBuf| crate::files::remove(root).doing("remove", root);
    // trouble with one does not keep the others
    roots.map(|root| remove(&Path::new(GC_ROOTS).join(root))).into_iter().fold(Ok(()), Result::and)
}

/// The name of a root for what to go back to; no instance has a name like it.
pub fn before_root(paths: &Paths, what: &str) -> String {
    format!("{}.{what}", paths.name())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_root_runs_of_a_system_is_in_the_store() {
        use std::os::unix::fs::symlink;
        let directory = crate::testing::Directory::new();
        let (store, outside) = (directory.path().join("store"), directory.path().join("outside"));
        let system = |name: &str| {
            let system = store.join(name);
            fs::create_dir_all(system.join("bin")).unwrap();
            fs::create_dir_all(outside.join("bin")).unwrap();
            for place in [&system, &outside] {
                for file in HAS {
                    fs::write(place.join(file), "").unwrap();
                }
            }
            system
        };
        let check = |system: &Path| check_is_system(&store, system);
        let good = system("good");
        symlink("bin/switch-to-configuration", good.join("activate")).unwrap();
        symlink(store.join("etc"), good.join("etc")).unwrap();
        fs::create_dir(store.join("etc")).unwrap();
        symlink("../good/./etc/../good/init", store.join("etc/around")).unwrap();
        symlink("../etc/around", good.join("prepare-root")).unwrap();
        assert_eq!(check(&good), Ok(()));

        let link = store.join("link");
        symlink(&outside, &link).unwrap();
        assert_eq!(check(&link), Err("not a directory".into()));
        let nested = store.join("nested");
        symlink(&good, &nested).unwrap();
        assert_eq!(check(&nested), Err("not a directory".into()));
        // back into the store, but by a link that others can change
        symlink(good.join("init"), outside.join("back")).unwrap();
        let ways: [(&str, &str, PathBuf); 7] = [
            ("a", "init", outside.join("init")),
            ("b", "init", "../../outside/init".into()),
            ("c", "init", outside.join("back")),
            ("d", "init", "../link/init".into()),
            ("e", "etc", outside.clone()),
            ("f", "init", "init".into()),
            ("g", "init", store.join("missing")),
        ];
        for (name, file, target) in ways {
            let system = system(name);
            let _ = fs::remove_file(system.join(file));
            symlink(target, system.join(file)).unwrap();
            let error = check(&system).unwrap_err();
            assert!(error.contains(&format!("{name}/{file} leads out of the store")), "{error}");
        }
        let system = system("bin");
        fs::remove_dir_all(system.join("bin")).unwrap();
        symlink(outside.join("bin"), system.join("bin")).unwrap();
        assert!(check(&system).unwrap_err().ends_with("bin/switch-to-configuration leads out of the store, or to nothing"));
        assert!(check(&store.join("etc")).unwrap_err().ends_with("init is missing"));
    }

    #[test]
    fn colours_are_left_out() {
        assert_eq!(without_colours("a: \x1b[1m1\x1b[0m → 2, \x1b[31;1m+8.0 KiB\x1b[0m"), "a: 1 → 2, +8.0 KiB");
    }

    #[test]
    fn the_reason_is_what_git_and_ssh_say() {
        for (said, shown) in [
            ("error: 1\nerror: 2\nmore", Some("error: 2")),
            ("fatal: couldn't find remote ref x\n\nerror: resolving Git reference 'x'", Some("fatal: couldn't find remote ref x")),
            ("Host key verification failed.\nfatal: Could not read from remote repository.\n", Some("Host key verification failed")),
            (
                "fatal: unable to connect to h:\nh[0: ::1]: errno=Connection refused\n",
                Some("fatal: unable to connect to h: h[0: ::1]: errno=Connection refused"),
            ),
            ("nothing", None),
        ] {
            assert_eq!(reason(&said.lines().map(String::from).collect::<Vec<_>>()).as_deref(), shown);
        }
    }
}
