//! The index of a fast-forward: locked, made in private, and put into its place when all else is done.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use crate::error::{Context, Result};
use crate::files;
use crate::git::savepoint::locks::once_free;
use crate::git::savepoint::{Savepoint, identity, rename_if_there};

impl Savepoint {
    /// Locks the index, once no other git does: by a file that nobody can take for another's.
    pub fn lock_index(&self) -> Result<()> {
        let lock = self.index_lock();
        let locked = once_free(&lock, || fs::hard_link(self.lock(), &lock)).and_then(|()| files::sync_parent(&lock));
        locked.context(|| format!("lock {}: {}", self.user_index().display(), lock.display()))
    }

    /// Locks the index, unless this has done so before.
    pub fn owns_index(&self) -> Result<()> {
        if self.has_index() { Ok(()) } else { self.lock_index() }
    }

    /// Copies the user's index to the private one. git takes a file for edited that is as young as its
    /// index, so the copy is as old.
    pub fn copy_index(&self) -> Result<()> {
        copy_index(&self.user_index(), &self.index())
    }

    /// Makes the private index the user's, who cannot have changed it.
    pub fn install_index(&self) -> Result<()> {
        let (new, index) = (self.index(), self.user_index());
        files::insist(|| rename_if_there(&new, &index)).doing("replace", &index)
    }

    /// The same after a cut: the user may have removed the lock by hand.
    pub fn install_index_if_unchanged(&self) -> Result<()> {
        let index = self.user_index();
        if fs::read(self.begun()).is_ok_and(|begun| begun == identity(&index).as_bytes()) {
            return self.install_index();
        }
        if self.index().exists() {
            log::warn!("{} has been changed since its fast-forward was interrupted; see git status.", index.display());
        }
        Ok(())
    }
}

/// Copies an index, if there is one, unchanged.
pub fn copy_index(from: &Path, to: &Path) -> Result<()> {
    let copy = || -> io::Result<()> {
        files::clear(to)?;
        let Ok(modified) = from.metadata().and_then(|metadata| metadata.modified()) else { return Ok(()) };
        fs::copy(from, to)?;
        File::options().append(true).open(to)?.set_modified(modified)
    };
    copy().doing("copy", from)
}
