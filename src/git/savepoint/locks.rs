//! What tells the locks of a git of ours that was killed from those of others: the locks that git makes by itself and that
//! were not there before are noted. Those of a git that is at work are waited for.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Context, Result};
use crate::files;
use crate::git::savepoint::cut_off::{join, split};
use crate::git::savepoint::{Savepoint, above, identity};

/// How old a lock is that no git which is alive holds; and the time between two looks at a younger one.
const OLD: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(100);

impl Savepoint {
    /// Notes which locks and directories, of those that git may make when it moves this branch, or
    /// fetches or removes a ref, are not there.
    pub fn note_locks(&self, branch: &str) -> Result<()> {
        let reflog = Path::new("logs").join(branch);
        let locks = ["HEAD.lock", "packed-refs.lock", "packed-refs.new", "shallow.lock", &format!("{branch}.lock")].map(PathBuf::from);
        let directories = [above(Path::new(branch)), above(&reflog)].concat();
        let all = locks.into_iter().chain(directories.into_iter().map(Path::to_owned));
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

    /// Removes what [`Self::note_locks`] noted and is there now, once a git of ours has ended. Another git that is alive may
    /// have made it since: what is young must stay as it is until it is old.
    pub fn remove_locks(&self) -> Result<()> {
        let (directories, files): (Vec<_>, Vec<_>) = self.noted().into_iter().partition(|path| path.is_dir());
        let mut left: Vec<_> = files.into_iter().filter(|path| path.is_file()).map(|path| (identity(&path), path)).collect();
        wait_while(OLD, || {
            left.retain(|(was, path)| identity(path) == *was);
            left.iter().any(|(_, path)| is_young(path))
        });
        for (_, path) in left {
            log::warn!("Removing {}, which an earlier git has left.", path.display());
            files::insist(|| files::remove(&path)).doing("remove", &path)?;
        }
        // one that is in use is not empty
        for path in directories {
            let _ = fs::remove_dir(path);
        }
        Ok(())
    }

    /// Does something to a ref by which git, if it is killed, may leave locks behind, and removes those.
    pub fn guard<T>(&self, reference: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
        self.note_locks(reference)?;
        let done = work();
        self.remove_locks()?;
        self.discard().and(done)
    }

    /// What [`Self::note_locks`] noted, if it did.
    fn noted(&self) -> Vec<PathBuf> {
        let noted = fs::read(self.directory.join("locks")).unwrap_or_default();
        split(&noted).map(|path| self.git_directory.join(path)).collect()
    }
}

/// Makes a lock, or looks for it, once no git which is alive holds it; fails with [`io::ErrorKind::AlreadyExists`] if it stays.
pub fn once_free(lock: &Path, mut attempt: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    let mut done = Ok(());
    wait_while(OLD, || {
        done = attempt();
        done.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::AlreadyExists) && is_young(lock)
    });
    done
}

/// Looks again and again, until what may be held by a git that is alive is free, or has been held for long.
pub fn wait_while(limit: Duration, mut is_held: impl FnMut() -> bool) {
    let until = Instant::now() + limit;
    while is_held() && Instant::now() < until {
        thread::sleep(PAUSE);
    }
}

/// Whether a git that is alive may hold a lock, or somebody may be at work on another file.
pub fn is_young(lock: &Path) -> bool {
    !lock.symlink_metadata().and_then(|file| file.modified()).is_ok_and(|made| made.elapsed().is_ok_and(|age| age > OLD))
}
