//! What tells the locks of a git of ours that was killed from those of others: the locks that git makes by itself and that
//! were not there before are noted.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use crate::error::{Context, Result};
use crate::files;
use crate::git::savepoint::cut_off::{join, split};
use crate::git::savepoint::{Savepoint, index};

/// How often a lock that should have gone is looked at, and the time between two looks.
const LOOKS: u32 = 10;
const PAUSE: Duration = Duration::from_millis(100);

impl Savepoint {
    /// Notes which locks and directories, of those that git may make when it moves this branch, or
    /// fetches or removes a ref, are not there.
    pub fn note_locks(&self, branch: &str) -> Result<()> {
        let below = |place: &str| {
            let path = Path::new(place).join(branch);
            path.ancestors().skip(1).filter(|path| !path.as_os_str().is_empty()).map(Path::to_owned).collect::<Vec<_>>()
        };
        let locks = ["HEAD.lock", "packed-refs.lock", "packed-refs.new", "shallow.lock", &format!("{branch}.lock")].map(PathBuf::from);
        let all = locks.into_iter().chain(below("")).chain(below("logs"));
        let absent: Vec<_> = all.filter(|path| self.git_directory.join(path).symlink_metadata().is_err()).collect();
        let exists = self.exists();
        let note = || {
            fs::create_dir_all(&self.directory)?;
            files::write(&self.directory.join("locks"), &join(absent.iter().map(|path| path.as_os_str())), 0o600)
        };
        let noted = note();
        // of what was there before, something may be needed
        if noted.is_err() && !exists {
            let _ = files::clear(&self.directory);
        }
        noted.context(|| format!("write to {}", self.directory.display()))
    }

    /// Removes what [`Self::note_locks`] noted and is there now; only for when git is dead.
    pub fn remove_locks(&self) -> Result<()> {
        for path in self.noted() {
            match path.symlink_metadata() {
                // one that is in use is not empty
                Ok(metadata) if metadata.is_dir() => drop(fs::remove_dir(&path)),
                Ok(_) => files::remove(&path).context(|| format!("remove {}", path.display()))?,
                Err(_) => {}
            }
        }
        Ok(())
    }

    /// The same once a git of ours has ended. One that was not killed has left none, unless the disk failed: those that
    /// stay as they are must be such, for those of another git are soon gone.
    pub fn remove_locks_after(&self, was_killed: bool) -> Result<()> {
        if was_killed {
            return self.remove_locks();
        }
        let files = self.noted().into_iter().filter(|path| path.is_file());
        let mut left: Vec<_> = files.map(|path| (index::identity(&path), path)).collect();
        for _ in 0..LOOKS {
            if left.is_empty() {
                return Ok(());
            }
            thread::sleep(PAUSE);
            left.retain(|(identity, path)| index::identity(path) == *identity);
        }
        left.iter().try_for_each(|(_, path)| {
            log::warn!("Removing {}, which git could not.", path.display());
            files::insist(|| files::remove(path)).context(|| format!("remove {}", path.display()))
        })
    }

    /// What [`Self::note_locks`] noted, if it did.
    fn noted(&self) -> Vec<PathBuf> {
        let noted = fs::read(self.directory.join("locks")).unwrap_or_default();
        split(&noted).map(|path| self.git_directory.join(path)).collect()
    }
}
