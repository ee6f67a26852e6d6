//! The way back from a fast-forward that was cut off: what a savepoint has kept, in its place again.

use std::collections::BTreeSet;
use std::fs::{self, File, Permissions};
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use crate::error::{Context, Result};
use crate::files;
use crate::gather::gather;
use crate::git::savepoint::cut_off::CutOff;
use crate::git::savepoint::{Savepoint, is_same, mode_of, rename_if_there};

/// What a commit has at a path, as git writes it.
pub type Contents<'a> = &'a dyn Fn(&Path) -> Option<Vec<u8>>;

impl Savepoint {
    /// The fast-forward that was cut off; an empty one if that was before it was noted.
    pub fn cut_off(&self) -> Result<CutOff> {
        let path = self.directory.join("list");
        match fs::read(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound && !self.has_begun() => Ok(CutOff::default()),
            other => Ok(CutOff::from_bytes(&other.doing("read", &path)?)),
        }
    }

    /// Puts everything back; `contents` are the new commit's. What somebody else has written since stays.
    pub fn restore(&self, cut_off: &CutOff, contents: Contents) -> Result<()> {
        let restore = || -> io::Result<()> {
            let new = cut_off.files.iter().filter(|file| !file.before && file.after);
            for path in new.map(|file| &file.path) {
                if self.is_gits(path, contents) {
                    files::remove(&self.top.join(path))?;
                }
            }
            let above: BTreeSet<_> = gather(cut_off.files.iter().flat_map(|file| file.path.ancestors()));
            // the deepest first
            for path in above.into_iter().rev().filter(|path| !path.as_os_str().is_empty()) {
                if !cut_off.directories.contains_key(path) && self.at(path).is_some_and(|there| there.is_dir()) {
                    // one that somebody else uses is not empty
                    let _ = fs::remove_dir(self.top.join(path));
                }
            }
            for (number, file) in cut_off.files.iter().enumerate().filter(|(_, file)| file.before) {
                self.restore_file(&self.saved(number), &file.path, cut_off, contents)?;
            }
            for path in cut_off.directories.keys() {
                self.restore_directory(path, cut_off)?;
            }
            self.restore_reflogs(cut_off)
        };
        restore().context(|| format!("restore files from {}", self.directory.display()))
    }

    fn restore_file(&self, saved: &Path, path: &Path, cut_off: &CutOff, contents: Contents) -> io::Result<()> {
        // if it has its name again
        let Ok(old) = saved.symlink_metadata() else { return Ok(()) };
        match self.at(path) {
            Some(there) if is_same(&there, &old) => return Ok(()),
            Some(there) if there.is_dir() => self.move_away(path)?,
            Some(_) if !self.is_gits(path, contents) => {
                log::warn!("{} has been changed since its fast-forward was interrupted: that stays.", self.top.join(path).display());
                return Ok(());
            }
            _ => self.restore_directory(path.parent().unwrap_or(Path::new("")), cut_off)?,
        }
        rename_if_there(saved, &self.top.join(path))
    }

    fn restore_directory(&self, path: &Path, cut_off: &CutOff) -> io::Result<()> {
        match self.at(path) {
            _ if path.as_os_str().is_empty() => return Ok(()),
            Some(there) if there.is_dir() => return Ok(()),
            Some(_) => self.move_away(path)?,
            None => self.restore_directory(path.parent().unwrap_or(Path::new("")), cut_off)?,
        }
        let place = self.top.join(path);
        fs::create_dir(&place)?;
        if let Some(&mode) = cut_off.directories.get(path).filter(|mode| **mode != mode_of(&place)) {
            let set = |mode| fs::set_permissions(&place, Permissions::from_mode(mode));
            // the sandbox forbids the set-group-id bit
            set(mode).or_else(|_| set(mode & 0o777))?;
        }
        files::sync_parent(&place)
    }

    /// Takes what somebody else has written in the meantime out of the way.
    fn move_away(&self, path: &Path) -> io::Result<()> {
        let place = self.top.join(path);
        let names = (1..).map(|number| {
            let mut name = place.clone().into_os_string();
            name.push(format!(".kept-{number}"));
            PathBuf::from(name)
        });
        let free = names.into_iter().find(|name| name.symlink_metadata().is_err()).ok_or(ErrorKind::AlreadyExists)?;
        log::warn!("Moved {} to {}: it was in the way of the rollback.", place.display(), free.display());
        fs::rename(&place, &free)
    }

    /// A reflog has an entry of a move before the move; of one that never was it is removed.
    fn restore_reflogs(&self, cut_off: &CutOff) -> io::Result<()> {
        let entry = format!("{} {} ", cut_off.from, cut_off.to);
        for (path, length, modified) in &cut_off.reflogs {
            let path = self.git_directory.join(path);
            let Ok(bytes) = fs::read(&path) else { continue };
            let length = length.unwrap_or(0);
            let new = usize::try_from(length).ok().and_then(|length| bytes.get(length..)).unwrap_or_default();
            let is_last = new.iter().position(|byte| *byte == b'\n').is_none_or(|end| end + 1 == new.len());
            let begins = new.starts_with(entry.as_bytes()) || entry.as_bytes().starts_with(new);
            if new.is_empty() || !begins || !is_last {
                continue;
            }
            let file = File::options().write(true).open(&path)?;
            file.set_len(length)?;
            file.set_modified(UNIX_EPOCH + *modified)?;
            file.sync_all()?;
        }
        for (path, ..) in cut_off.reflogs.iter().filter(|(_, length, _)| length.is_none()) {
            let path = self.git_directory.join(path);
            if path.metadata().is_ok_and(|metadata| metadata.len() == 0) {
                files::remove(&path)?;
            }
        }
        Ok(())
    }

    /// Whether what is at a path is what git has written there, or the beginning of it.
    fn is_gits(&self, path: &Path, contents: Contents) -> bool {
        let place = self.top.join(path);
        let there = match self.at(path) {
            Some(there) if there.is_symlink() => fs::read_link(&place).map(|target| target.as_os_str().as_bytes().to_vec()),
            Some(there) if there.is_file() => fs::read(&place),
            _ => return false,
        };
        there.is_ok_and(|there| contents(path).is_some_and(|new| new.starts_with(&there)))
    }
}
