//! Nix's cache of what it has fetched for an instance or a fleet, made fit before each update of inputs.
//!
//! Nix goes on with what it has fetched earlier if it cannot fetch now, and some versions do not even say
//! so. Here nothing is left to go on with: the refs of the repositories in the cache are set aside, where
//! git finds them and fetches only what is new, but Nix does not.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use crate::error::{Context, Error, Result};
use crate::git::git;
use crate::git::own::remove_leftovers;
use crate::nix::read_only;
use crate::program::Program;

/// Where refs are set aside.
const ASIDE: &str = "refs/ekiben-aside/";
/// What git and Nix say of a cache that a power cut, or whatever else, has damaged.
const DAMAGED: [&str; 10] = [
    "bad object",
    "did not send all necessary objects",
    "disk image is malformed",
    "failed to inflate",
    "is not a database",
    "loose object",
    "object file",
    "object not found",
    "packfile",
    "unable to read tree",
];

/// A cache that is nobody else's, and is used by this process alone as long as it has this.
pub struct Cache {
    directory: PathBuf,
    _lock: Flock<File>,
}

impl Cache {
    /// The cache in a directory, which is made if need be.
    pub fn open(directory: &Path) -> Result<Self> {
        fs::create_dir_all(directory).doing("use", directory)?;
        let file = File::open(directory).doing("use", directory)?;
        let lock = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| error).doing("use", directory)?;
        Ok(Self { directory: directory.join("nix"), _lock: lock })
    }

    /// That of the instance whose stage this is: its unit says where.
    pub fn own() -> Result<Self> {
        let doing = || "find the cache".into();
        let directory = std::env::var_os("XDG_CACHE_HOME").ok_or("XDG_CACHE_HOME is not set").context(doing)?;
        Self::open(Path::new(&directory))
    }

    /// Has Nix use it.
    pub fn give(&self, nix: Program) -> Program {
        nix.env("NIX_CACHE_HOME", &self.directory).env("XDG_CACHE_HOME", self.directory.parent().unwrap_or(&self.directory))
    }

    /// Takes away what programs that were killed have left behind, and what Nix could take for fetched.
    fn make_fit(&self) -> Result<()> {
        for place in directories(&self.directory) {
            let name = place.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.starts_with("tarball-cache") {
                remove_leftovers(&place)?;
            }
            for repository in directories(&place).filter(|_| name.starts_with("gitv")) {
                remove_leftovers(&repository)?;
                match set_refs_aside(&repository) {
                    Err(error) if error.is_transient() || error.tail().is_empty() => return Err(error),
                    // half made, or damaged
                    Err(error) => {
                        log::warn!("{error}; it is fetched anew.");
                        fs::remove_dir_all(&repository).doing("remove", &repository)?;
                    }
                    Ok(()) => {}
                }
            }
        }
        Ok(())
    }

    /// Does what uses the cache, once it is fit; once more, without what was in it, if that fails and says
    /// that it is damaged.
    pub fn used<T>(&self, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
        read_only::check()?;
        self.make_fit()?;
        match attempt() {
            Err(error) if self.is_emptied_for(&error)? => attempt(),
            result => result,
        }
    }

    fn is_emptied_for(&self, error: &Error) -> Result<bool> {
        let said = error.tail().iter().map(|line| line.to_ascii_lowercase());
        let damaged = !error.is_transient() && said.into_iter().any(|line| DAMAGED.iter().any(|words| line.contains(words)));
        if damaged {
            log::warn!("{error}; trying again without {}.", self.directory.display());
            fs::remove_dir_all(&self.directory).doing("remove", &self.directory)?;
        }
        Ok(damaged)
    }
}

/// The directories in a directory, if there is one.
fn directories(place: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    let entries = fs::read_dir(place).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path())
}

fn set_refs_aside(repository: &Path) -> Result<()> {
    let doing = || format!("use {}", repository.display());
    let git = || git(repository).args(["--git-dir", "."]);
    let list = git().args(["for-each-ref", "--format=%(objectname) %(refname)"]).said(doing)?;
    let refs = list.lines().filter_map(|line| line.split_once(' ')).filter(|(_, name)| !name.starts_with(ASIDE));
    // flat: a branch `a` may have become a branch `a/b`
    let flat = |name: &str| name.trim_start_matches("refs/").replace('/', "%");
    let changes: Vec<_> = refs.map(|(object, name)| format!("update {ASIDE}{} {object}\ndelete {name}\n", flat(name))).collect();
    git().args(["update-ref", "--stdin"]).output(doing, Some(changes.concat().as_bytes()))?;
    // broken ones are not listed, but there
    for left in directories(&repository.join("refs")).filter(|left| !left.ends_with("ekiben-aside")) {
        fs::remove_dir_all(&left).doing("remove", &left)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Directory;

    /// A cache with one repository that has fetched `main` of `remote`.
    fn fetched(scratch: &Directory) -> (Cache, PathBuf) {
        let (remote, repository) = (scratch.path().join("remote"), scratch.path().join("nix/gitv3/hash"));
        for directory in [&remote, &repository] {
            fs::create_dir_all(directory).unwrap();
        }
        run(&remote, &["init", "-q", "-b", "main"]);
        run(&remote, &["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "1"]);
        run(&repository, &["init", "-q", "--bare"]);
        fetch(&repository);
        (Cache::open(scratch.path()).unwrap(), repository)
    }

    fn run(directory: &Path, arguments: &[&str]) -> String {
        let output = git(directory).args(arguments).output(|| format!("{arguments:?}"), None).unwrap();
        String::from_utf8(output).unwrap().trim_end().to_owned()
    }

    fn fetch(repository: &Path) {
        run(repository, &["fetch", "-q", "../../../remote", "refs/heads/main:refs/heads/main"]);
    }

    #[test]
    fn what_was_fetched_earlier_is_known_to_git_only() {
        let scratch = Directory::new();
        let (cache, repository) = fetched(&scratch);
        let commit = run(&repository, &["rev-parse", "main"]);
        for _ in 0..2 {
            cache.make_fit().unwrap();
            assert_eq!(
                run(&repository, &["for-each-ref", "--format=%(objectname) %(refname)"]),
                format!("{commit} refs/ekiben-aside/heads%main")
            );
        }
        fetch(&repository);
        assert_eq!(run(&repository, &["rev-parse", "main"]), commit);
        cache.make_fit().unwrap();
        assert!(!repository.join("refs/heads").exists());
    }

    #[test]
    fn what_a_dead_git_has_left_goes() {
        let scratch = Directory::new();
        let (cache, repository) = fetched(&scratch);
        let left = [
            "refs/heads/main.lock",
            "packed-refs.lock",
            "HEAD.lock",
            "config.lock",
            "shallow.lock",
            "objects/pack/tmp_pack_x",
            "objects/info/commit-graphs/x.lock",
        ];
        for file in left {
            let path = repository.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        fs::create_dir(scratch.path().join("nix/gitv3/half-made")).unwrap();
        let broken = repository.join("refs/heads/broken");
        fs::write(&broken, "").unwrap();
        cache.make_fit().unwrap();
        assert!(left.iter().all(|file| !repository.join(file).exists()));
        assert!(!scratch.path().join("nix/gitv3/half-made").exists() && !broken.exists());
        fetch(&repository);
    }

    #[test]
    fn a_damaged_cache_is_emptied() {
        let scratch = Directory::new();
        let (cache, repository) = fetched(&scratch);
        let failure = |line: &str| Error::new("Failed to update app").with_tail(vec![line.into()]);
        assert!(!cache.is_emptied_for(&failure("fatal: couldn't find remote ref")).unwrap());
        assert!(cache.is_emptied_for(&failure("error: object file ./objects/ab/cd is empty")).unwrap());
        assert!(!repository.exists());
        cache.make_fit().unwrap();
    }
}
