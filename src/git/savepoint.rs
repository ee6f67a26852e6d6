//! A way back for a fast-forward that fails or is cut off, and what tells the locks of a git of ours
//! that was killed from those of others.
//!
//! All of it is in one directory in the git directory. Before git changes files of the working tree,
//! each of them gets a second name there: a hard link, which takes no space. git never writes into a
//! file but replaces it, so to go back is to give the old files their names again, with their
//! contents, times and permissions. The index is made there, too, and replaces the user's only when
//! all else is done; until then its lock is a hard link of a file of ours. Of the locks that git makes
//! by itself, the ones that were not there before are noted. Going back can be cut off and begun again.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{self, File, Metadata, Permissions};
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use nix::unistd::{AccessFlags, access, geteuid};

use crate::error::{Context, Result};
use crate::files;
use crate::gather::gather;

/// The saved files of one fast-forward.
pub struct Savepoint {
    directory: PathBuf,
    top: PathBuf,
    git_directory: PathBuf,
}

/// What the fast-forward changes at a path, from the top of the working tree. A submodule is no file.
#[derive(Clone, Debug, PartialEq)]
pub struct Changed {
    /// Where it is.
    pub path: PathBuf,
    /// Whether a file is there before.
    pub before: bool,
    /// Whether a file is there afterwards.
    pub after: bool,
}

/// A fast-forward that was cut off.
#[derive(Debug, Default, PartialEq)]
pub struct CutOff {
    /// The commit it began at.
    pub from: String,
    /// The commit it led to.
    pub to: String,
    /// What it changes.
    pub files: Vec<Changed>,
    /// The directories that were there, and their permissions.
    directories: BTreeMap<PathBuf, u32>,
    /// The reflogs, below the git directory, how long they were, none if they were not there, and of when.
    reflogs: Vec<(PathBuf, Option<u64>, Duration)>,
}

/// What a commit has at a path, as git writes it.
pub type Contents<'a> = &'a dyn Fn(&Path) -> Option<Vec<u8>>;

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
        let note = || {
            fs::create_dir_all(&self.directory)?;
            files::write(&self.directory.join("locks"), &join(absent.iter().map(|path| path.as_os_str())), 0o600)
        };
        // unless there is something in it that is needed
        let noted = note().inspect_err(|_| drop(fs::remove_dir(&self.directory)));
        noted.context(|| format!("write to {}", self.directory.display()))
    }

    /// Removes what [`Self::note_locks`] noted and is there now; only for when git is dead.
    pub fn remove_locks(&self) -> Result<()> {
        let Ok(noted) = fs::read(self.directory.join("locks")) else { return Ok(()) };
        for path in split(&noted).map(|path| self.git_directory.join(path)) {
            match path.symlink_metadata() {
                // one that is in use is not empty
                Ok(metadata) if metadata.is_dir() => drop(fs::remove_dir(&path)),
                Ok(_) => files::remove(&path).context(|| format!("remove {}", path.display()))?,
                Err(_) => {}
            }
        }
        Ok(())
    }

    /// Fails if this user may not move the branch, or if there would be no way back.
    pub fn check(&self, branch: &str, files: &[Changed]) -> Result<()> {
        let doing = || format!("save files to {}", self.directory.display());
        let me = geteuid();
        let reflog = Path::new("logs").join(branch);
        for path in ["HEAD".as_ref(), branch.as_ref(), "logs/HEAD".as_ref(), reflog.as_path()].map(|path| self.git_directory.join(path)) {
            let place = path.ancestors().skip(1).find(|place| place.is_dir()).unwrap_or(&self.git_directory);
            let is_log = path.ends_with("logs/HEAD") || path.ends_with(&reflog);
            let log = Some((path.as_path(), AccessFlags::W_OK)).filter(|_| is_log && path.exists());
            for (path, needed) in [(place, AccessFlags::W_OK | AccessFlags::X_OK)].into_iter().chain(log) {
                access(path, needed).map_err(|error| format!("{}: {}", path.display(), error.desc())).context(doing)?;
            }
        }
        for file in files {
            let path = self.top.join(&file.path);
            let place = path.ancestors().skip(1).find(|place| place.is_dir()).unwrap_or(&self.top);
            let file = fs::symlink_metadata(&path).ok().filter(|_| file.before);
            // those that the kernel lets us make links of
            let is_ours = |file: &Metadata| {
                file.uid() == me.as_raw() || file.is_file() && access(&path, AccessFlags::R_OK | AccessFlags::W_OK).is_ok()
            };
            let foreign = if file.as_ref().is_none_or(is_ours) { place } else { &path };
            if foreign == path || access(place, AccessFlags::W_OK | AccessFlags::X_OK).is_err() {
                return Err(format!("{}: Permission denied", foreign.display())).context(doing);
            }
        }
        Ok(())
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
            let above: Vec<_> = file.path.ancestors().skip(1).filter(|path| !path.as_os_str().is_empty()).collect();
            for path in above.into_iter().rev() {
                if let Some(metadata) = self.at(path).filter(Metadata::is_dir) {
                    directories.insert(path.to_owned(), metadata.mode() & 0o7777);
                }
            }
            if self.at(&file.path).is_some_and(|metadata| metadata.is_dir()) && file.after {
                self.look_below(&file.path, &mut directories)?;
            } else if let Some(metadata) = self.at(&file.path).filter(Metadata::is_dir) {
                directories.insert(file.path.clone(), metadata.mode() & 0o7777);
            }
        }
        let reflogs = [PathBuf::from("logs/HEAD"), Path::new("logs").join(branch)];
        let reflogs = reflogs.into_iter().map(|path| {
            let metadata = self.git_directory.join(&path).metadata();
            let modified = metadata.as_ref().ok().and_then(|metadata| metadata.modified().ok()?.duration_since(UNIX_EPOCH).ok());
            (path, metadata.map(|metadata| metadata.len()).ok(), modified.unwrap_or_default())
        });
        let reflogs = reflogs.collect();
        Ok(CutOff { from: from.to_owned(), to: to.to_owned(), files: files.to_vec(), directories, reflogs })
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

    /// Locks the index: by a file that nobody can take for another's.
    pub fn lock_index(&self) -> Result<()> {
        let lock = self.index_lock();
        let locked = fs::hard_link(self.lock(), &lock).and_then(|()| files::sync_parent(&lock));
        locked.context(|| format!("lock {}: {}", self.user_index().display(), lock.display()))
    }

    /// Locks the index, unless this has done so before.
    pub fn owns_index(&self) -> Result<()> {
        match (self.lock().symlink_metadata(), self.index_lock().symlink_metadata()) {
            (Ok(ours), Ok(lock)) if is_same(&ours, &lock) => Ok(()),
            _ => self.lock_index(),
        }
    }

    /// Copies the user's index to the private one. git takes a file for edited that is as young as its
    /// index, so the copy is as old.
    pub fn copy_index(&self) -> Result<()> {
        copy_index(&self.user_index(), &self.index())
    }

    /// Says that the saved files are about to be changed. Without it, a savepoint means nothing.
    pub fn begin(&self) -> Result<()> {
        let identity = identity(&self.user_index());
        files::write(&self.begun(), identity.as_bytes(), 0o600).context(|| format!("write {}", self.begun().display()))
    }

    /// Makes the private index the user's, who cannot have changed it.
    pub fn install_index(&self) -> Result<()> {
        let (new, index) = (self.index(), self.user_index());
        rename_if_there(&new, &index).context(|| format!("replace {}", index.display()))
    }

    /// The same after a cut: the user may have removed the lock by hand.
    pub fn install_index_if_unchanged(&self) -> Result<()> {
        let index = self.user_index();
        if fs::read(self.begun()).is_ok_and(|begun| begun == identity(&index).as_bytes()) {
            return self.install_index();
        }
        if self.index().exists() {
            log::warn!("{} has been changed since its fast-forward was cut off; see git status.", index.display());
        }
        Ok(())
    }

    /// Whether the fast-forward that was cut off may have changed anything.
    pub fn has_begun(&self) -> bool {
        self.begun().exists()
    }

    /// The fast-forward that was cut off; an empty one if that was before it was noted.
    pub fn cut_off(&self) -> Result<CutOff> {
        let path = self.directory.join("list");
        match fs::read(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound && !self.has_begun() => Ok(CutOff::default()),
            other => Ok(CutOff::from_bytes(&other.context(|| format!("read {}", path.display()))?)),
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
                log::warn!("{} has been changed since its fast-forward was cut off: that stays.", self.top.join(path).display());
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
        log::warn!("Moved {} to {}: it is in the way of what was there before.", place.display(), free.display());
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

    /// What is at a path, without following links on the way there.
    fn at(&self, path: &Path) -> Option<Metadata> {
        let above = path.ancestors().skip(1).filter(|above| !above.as_os_str().is_empty());
        let reached = above.into_iter().all(|above| self.top.join(above).symlink_metadata().is_ok_and(|above| above.is_dir()));
        self.top.join(path).symlink_metadata().ok().filter(|_| reached)
    }

    /// What is in the way of a path that the fast-forward makes anew; what it removes is not.
    pub fn in_the_way(&self, path: &Path, removed: &BTreeSet<&Path>) -> Option<PathBuf> {
        let foreign = |path: &Path| !removed.contains(path);
        let above: Vec<_> = path.ancestors().skip(1).filter(|above| !above.as_os_str().is_empty()).collect();
        for above in above.into_iter().rev() {
            match self.at(above) {
                Some(there) if there.is_dir() => {}
                Some(_) => return Some(above.to_owned()).filter(|above| foreign(above)),
                None => return None,
            }
        }
        match self.at(path) {
            Some(there) if there.is_dir() => self.first_file(path, &foreign),
            Some(_) => Some(path.to_owned()),
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
        paths.into_iter().try_for_each(|path| sync(&path).context(|| format!("sync {}", path.display())))
    }

    /// Forgets the saved files, once all of them have their names.
    pub fn release_files(&self, count: usize) -> Result<()> {
        let mut saved = (0..count).map(|number| self.saved(number));
        saved.try_for_each(|saved| files::remove(&saved).context(|| format!("remove {}", saved.display())))
    }

    /// Forgets all of it, and unlocks the index.
    pub fn discard(&self) -> Result<()> {
        let discard = || -> io::Result<()> {
            // first what gives it a meaning
            files::remove(&self.begun()).or_else(|error| if self.directory.is_dir() { Err(error) } else { Ok(()) })?;
            let lock = self.index_lock();
            if let (Ok(ours), Ok(lock_)) = (self.lock().symlink_metadata(), lock.symlink_metadata()) {
                if is_same(&ours, &lock_) {
                    files::remove(&lock)?;
                }
            }
            files::clear(&self.directory)
        };
        discard().context(|| format!("remove {}", self.directory.display()))
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

impl CutOff {
    fn to_bytes(&self) -> Vec<u8> {
        let mut parts = vec![self.from.clone().into_bytes(), self.to.clone().into_bytes()];
        let mut add = |what: String, path: &Path| parts.push([what.as_bytes(), b" ", path.as_os_str().as_bytes()].concat());
        for file in &self.files {
            add(format!("file {} {}", u8::from(file.before), u8::from(file.after)), &file.path);
        }
        for (path, mode) in &self.directories {
            add(format!("directory {mode} -"), path);
        }
        for (path, length, modified) in &self.reflogs {
            add(format!("reflog {} {}", length.map_or("-".into(), |length| length.to_string()), modified.as_nanos()), path);
        }
        parts.join(&0)
    }

    fn from_bytes(bytes: &[u8]) -> Self {
        let mut parts = bytes.split(|byte| *byte == 0);
        let text = |part: Option<&[u8]>| String::from_utf8_lossy(part.unwrap_or_default()).into_owned();
        let mut cut_off = Self { from: text(parts.next()), to: text(parts.next()), ..Self::default() };
        for part in parts {
            let mut words = part.splitn(4, |byte| *byte == b' ');
            let (kind, one, two) = (text(words.next()), text(words.next()), text(words.next()));
            let path = PathBuf::from(OsStr::from_bytes(words.next().unwrap_or_default()));
            match kind.as_str() {
                "file" => cut_off.files.push(Changed { path, before: one == "1", after: two == "1" }),
                "directory" => drop(cut_off.directories.insert(path, one.parse().unwrap_or(0o755))),
                _ => cut_off.reflogs.push((path, one.parse().ok(), Duration::from_nanos(two.parse().unwrap_or_default()))),
            }
        }
        cut_off
    }
}

/// Copies an index, if there is one, as it is.
pub fn copy_index(from: &Path, to: &Path) -> Result<()> {
    let copy = || -> io::Result<()> {
        files::clear(to)?;
        let Ok(modified) = from.metadata().and_then(|metadata| metadata.modified()) else { return Ok(()) };
        fs::copy(from, to)?;
        File::options().append(true).open(to)?.set_modified(modified)
    };
    copy().context(|| format!("copy {}", from.display()))
}

/// What a file has in common with no other, and with no later one of its name.
fn identity(path: &Path) -> String {
    // without the device, which some file systems number anew at each boot
    path.symlink_metadata()
        .map_or("none".into(), |metadata| format!("{} {} {} {}", metadata.ino(), metadata.size(), metadata.ctime(), metadata.ctime_nsec()))
}

fn mode_of(path: &Path) -> u32 {
    path.symlink_metadata().map_or(0, |metadata| metadata.mode() & 0o7777)
}

fn is_same(one: &Metadata, other: &Metadata) -> bool {
    one.dev() == other.dev() && one.ino() == other.ino()
}

fn join<'a>(paths: impl Iterator<Item = &'a OsStr>) -> Vec<u8> {
    paths.map(OsStr::as_bytes).collect::<Vec<_>>().join(&0)
}

fn split(bytes: &[u8]) -> impl Iterator<Item = &Path> {
    bytes.split(|byte| *byte == 0).filter(|path| !path.is_empty()).map(|path| Path::new(OsStr::from_bytes(path)))
}

/// A file that has its name again was restored before. One that never lost it stays as it is:
/// rename(2) does nothing between two names of the same file.
fn rename_if_there(from: &Path, to: &Path) -> io::Result<()> {
    match fs::rename(from, to) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        Ok(()) => files::sync_parent(to),
    }
}
