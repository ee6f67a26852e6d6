//! Directories for what nobody needs any more when this process has ended, however it ends: what a
//! process leaves that was killed, the next one removes.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use ::nix::fcntl::{Flock, FlockArg};
use ::nix::unistd::mkdtemp;

use crate::error::{Context, Result};
use crate::files::lock;

/// Such a directory; this process has it locked.
pub struct Temporary {
    path: PathBuf,
    _lock: Option<Flock<File>>,
}

impl Temporary {
    /// A new one, among what this user has cached.
    pub fn new() -> Result<Self> {
        Self::below(&home("XDG_CACHE_HOME", ".cache")?)
    }

    /// The same among what is in `directory`.
    pub fn below(directory: &Path) -> Result<Self> {
        let all = directory.join("fleet");
        fs::create_dir_all(&all).doing("create", &all)?;
        // one at a time: a directory that another has just made is not locked yet
        let _turn = lock(&all, FlockArg::LockExclusive)?;
        for left in fs::read_dir(&all).doing("read", &all)?.flatten() {
            if lock(&left.path(), FlockArg::LockExclusiveNonblock).is_ok_and(|lock| lock.is_some()) {
                let _ = fs::remove_dir_all(left.path());
            }
        }
        let path = mkdtemp(&all.join("XXXXXX")).context(|| format!("create a directory in {}", all.display()))?;
        let lock = lock(&path, FlockArg::LockExclusiveNonblock)?;
        Ok(Self { path, _lock: lock })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Ekiben's part of one of this user's directories: as `variable` says, or `place` in the home.
pub fn home(variable: &str, place: &str) -> Result<PathBuf> {
    let path = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let found = path(variable).or_else(|| path("HOME").map(|home| home.join(place)));
    let why = || format!("neither {variable} nor HOME is set");
    Ok(found.ok_or_else(why).context(|| "find a place for files".into())?.join("ekiben"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Directory;

    #[test]
    fn what_a_killed_process_left_is_removed_and_nothing_else() {
        let place = Directory::new();
        let left = place.path().join("fleet/left");
        fs::create_dir_all(left.join("deep")).unwrap();
        let first = Temporary::below(place.path()).unwrap();
        assert!(!left.exists());
        let second = Temporary::below(place.path()).unwrap();
        assert!(first.path().exists() && first.path() != second.path());
        let path = first.path().to_owned();
        drop(first);
        assert!(!path.exists() && second.path().exists());
    }
}
