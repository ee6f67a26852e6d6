//! A way back for a fast-forward that fails or is cut off.
//!
//! All of it is in one directory in the git directory. Before git changes files of the working tree,
//! each of them gets a second name there: a hard link, which takes no space. git never writes into a
//! file but replaces it, so to go back is to give the old files their names again, with their
//! contents, times and permissions. The index is made there, too, and replaces the user's only when
//! all else is done; until then its lock is a hard link of a file of ours.
//! Going back can be cut off and begun again.

pub mod cut_off;
pub mod index;
pub mod locks;

mod check;
mod restore;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, Metadata};
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use crate::error::{Context, Result};
use crate::files;
use crate::git::savepoint::cut_off::{Changed, CutOff};

/// The saved files of one fast-forward.
pub struct Savepoint {
    directory: PathBuf,
    top: PathBuf,
    git_directory: PathBuf,
}

impl Savepoint {
    /// The savepoint of an instance in a repository, whether it exists or not.
    pub fn of(top: &Path, git_directory: &Path, instance: &str) -> Self {
        let directory = git_directory.join(format!("ekiben-{instance}"));
        Self { directory, top: top.to_owned(), git_directory: git_directory.to_owned() }
    }

    /// Whether there is one: then something was cut off.
    pub fn exists(&self) -> bool {
        self.directory.symlink_metadata().is_ok()
    }

    /// The path of a private index.
    pub fn index(&self) -> PathBuf {
        self.directory.join("index")
    }

    /// Saves these files, and what there is to know for going back. Changes nothing that git knows of.
    pub fn make(&self, from: &str, to: &str, branch: &str, files: &[Changed]) -> Result<()> {
        let make = || -> io::Result<()> {
            fs::create_dir_all(&self.directory)?;
            File::create(self.lock())?;
            files::write(&self.directory.join("list"), &self.look(from, to, branch, files)?.to_bytes(), 0o600)?;
            for (number, file) in files.iter().enumerate().filter(|(_, file)| file.before) {
                match fs::hard_link(self.top.join(&file.path), self.saved(number)) {
                    // git knows whether that is an edit
                    Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {}
                    other => other?,
                }
            }
            files::sync(&self.directory)
        };
        make().context(|| format!("save files to {}", self.directory.display()))
    }

    fn look(&self, from: &str, to: &str, branch: &str, files: &[Changed]) -> io::Result<CutOff> {
        let mut directories = BTreeMap::new();
        for file in files {
            for path in above(&file.path).into_iter().chain([&*file.path]) {
                if let Some(metadata) = self.at(path).filter(Metadata::is_dir) {
                    directories.insert(path.to_owned(), metadata.mode() & 0o7777);
                }
            }
            if file.after && directories.contains_key(&file.path) {
                self.look_below(&file.path, &mut directories)?;
            }
        }
        let reflogs = [PathBuf::from("logs/HEAD"), Path::new("logs").join(branch)];
        let reflogs = reflogs.into_iter().map(|path| {
            let metadata = self.git_directory.join(&path).metadata();
            let modified = metadata.as_ref().ok().and_then(|metadata| metadata.modified().ok()?.duration_since(UNIX_EPOCH).ok());
            (path, metadata.map(|metadata| metadata.len()).ok(), modified.unwrap_or_default())
        });
        let reflogs = reflogs.collect();
        // git writes again what the user has removed
        let is_there = |file: &Changed| Changed { before: file.before && self.at(&file.path).is_some(), ..file.clone() };
        let files = files.iter().map(is_there).collect();
        Ok(CutOff { from: from.to_owned(), to: to.to_owned(), files, directories, reflogs })
    }

    fn look_below(&self, path: &Path, directories: &mut BTreeMap<PathBuf, u32>) -> io::Result<()> {
        let place = self.top.join(path);
        directories.insert(path.to_owned(), place.symlink_metadata()?.mode() & 0o7777);
        for entry in fs::read_dir(&place)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                self.look_below(&path.join(entry.file_name()), directories)?;
            }
        }
        Ok(())
    }

    /// A file for what git says meanwhile.
    pub fn errors(&self) -> PathBuf {
        self.directory.join("errors")
    }

    /// Says that the saved files are about to be changed. Without it, a savepoint means nothing.
    pub fn begin(&self) -> Result<()> {
        let identity = identity(&self.user_index());
        files::write(&self.begun(), identity.as_bytes(), 0o600).doing("write", &self.begun())
    }

    /// Whether the fast-forward that was cut off may have changed anything.
    pub fn has_begun(&self) -> bool {
        self.begun().exists()
    }

    /// What is at a path, without following links on the way there.
    fn at(&self, path: &Path) -> Option<Metadata> {
        let reached = above(path).into_iter().all(|above| self.top.join(above).symlink_metadata().is_ok_and(|above| above.is_dir()));
        self.top.join(path).symlink_metadata().ok().filter(|_| reached)
    }

    /// What is in the way of a path that the fast-forward writes; what it replaces or removes is not.
    pub fn in_the_way(&self, path: &Path, removed: &BTreeSet<&Path>) -> Option<PathBuf> {
        let foreign = |path: &Path| !removed.contains(path);
        for above in above(path).into_iter().rev() {
            match self.at(above) {
                Some(there) if there.is_dir() => {}
                Some(_) => return Some(above.to_owned()).filter(|above| foreign(above)),
                None => return None,
            }
        }
        match self.at(path) {
            Some(there) if there.is_dir() => self.first_file(path, &foreign),
            Some(_) => Some(path.to_owned()).filter(|path| foreign(path)),
            None => None,
        }
    }

    fn first_file(&self, path: &Path, wanted: &dyn Fn(&Path) -> bool) -> Option<PathBuf> {
        let Ok(entries) = fs::read_dir(self.top.join(path)) else { return Some(path.to_owned()) };
        entries.flatten().find_map(|entry| {
            let path = path.join(entry.file_name());
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                return self.first_file(&path, wanted);
            }
            wanted(&path).then_some(path)
        })
    }

    /// Makes what git wrote to these files durable: it does not do so by itself.
    pub fn sync(&self, files: &[Changed]) -> Result<()> {
        let sync = |path: &Path| -> io::Result<()> {
            if path.is_file() && !path.is_symlink() {
                files::sync(path)?;
            }
            if path.parent().is_some_and(Path::is_dir) { files::sync_parent(path) } else { Ok(()) }
        };
        let paths = files.iter().map(|file| self.top.join(&file.path)).chain([self.index()]);
        paths.into_iter().try_for_each(|path| sync(&path).doing("sync", &path))
    }

    /// Forgets the saved files, once all of them have their names.
    pub fn release_files(&self, count: usize) -> Result<()> {
        let mut saved = (0..count).map(|number| self.saved(number));
        saved.try_for_each(|saved| files::remove(&saved).doing("remove", &saved))
    }

    /// Forgets all of it, and unlocks the index.
    pub fn discard(&self) -> Result<()> {
        let discard = || -> io::Result<()> {
            // first what gives it a meaning
            files::remove(&self.begun()).or_else(|error| if self.directory.is_dir() { Err(error) } else { Ok(()) })?;
            if self.has_index() {
                files::remove(&self.index_lock())?;
            }
            files::clear(&self.directory)
        };
        files::insist(discard).doing("remove", &self.directory)
    }

    /// Whether it is this that has locked the index.
    fn has_index(&self) -> bool {
        let [ours, lock] = [self.lock(), self.index_lock()].map(|path| path.symlink_metadata());
        ours.is_ok_and(|ours| lock.is_ok_and(|lock| is_same(&ours, &lock)))
    }

    fn user_index(&self) -> PathBuf {
        self.git_directory.join("index")
    }

    fn index_lock(&self) -> PathBuf {
        self.git_directory.join("index.lock")
    }

    fn lock(&self) -> PathBuf {
        self.directory.join("lock")
    }

    fn begun(&self) -> PathBuf {
        self.directory.join("begun")
    }

    fn saved(&self, number: usize) -> PathBuf {
        self.directory.join(number.to_string())
    }
}

/// The directories that lead to a path, the deepest first.
fn above(path: &Path) -> Vec<&Path> {
    path.ancestors().skip(1).filter(|above| !above.as_os_str().is_empty()).collect()
}

fn mode_of(path: &Path) -> u32 {
    path.symlink_metadata().map_or(0, |metadata| metadata.mode() & 0o7777)
}

fn is_same(one: &Metadata, other: &Metadata) -> bool {
    one.dev() == other.dev() && one.ino() == other.ino()
}

/// A file that has its name again was restored before. One that never lost it is left unchanged:
/// rename(2) does nothing between two names of the same file.
fn rename_if_there(from: &Path, to: &Path) -> io::Result<()> {
    files::if_there(fs::rename(from, to))?.map_or(Ok(()), |()| files::sync_parent(to))
}

/// What a file has in common with no other, and with no later one of its name.
fn identity(path: &Path) -> String {
    // without the device, whose number changes at each boot on some file systems
    path.symlink_metadata()
        .map_or("none".into(), |metadata| format!("{} {} {} {}", metadata.ino(), metadata.size(), metadata.ctime(), metadata.ctime_nsec()))
}
