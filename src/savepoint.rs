//! A way back for a fast-forward that fails or is cut off.
//!
//! Before git changes files of the working tree and the index, each of them gets a second name in
//! the git directory: a hard link, which takes no space. git never writes into a file but replaces
//! it, so to go back is to give the old files their names again, with their contents, times and
//! permissions. Going back can be cut off, too, and begun again.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use crate::error::{Context, Result};
use crate::files;

/// Lock files of git that a fast-forward which was killed leaves behind, in the git directory.
const LOCKS: [&str; 3] = ["index.lock", "HEAD.lock", "packed-refs.lock"];

/// The saved files of one fast-forward.
pub struct Savepoint {
    directory: PathBuf,
    top: PathBuf,
    git_directory: PathBuf,
}

/// A file that the fast-forward changes, from the top of the working tree.
#[derive(Clone, Debug, PartialEq)]
pub struct Changed {
    /// Where it is.
    pub path: String,
    /// Whether it was not there before.
    pub new: bool,
}

/// A fast-forward that was cut off.
pub struct CutOff {
    /// The commit it began at.
    pub from: String,
    /// The commit it led to.
    pub to: String,
    /// The files it changes.
    pub files: Vec<Changed>,
}

impl Savepoint {
    /// The savepoint of an instance in a repository, whether it exists or not.
    pub fn of(top: &Path, git_directory: &Path, instance: &str) -> Self {
        let directory = git_directory.join(format!("ekiben-{instance}"));
        Self { directory, top: top.to_owned(), git_directory: git_directory.to_owned() }
    }

    /// Saves the index and these files. Changes nothing that git knows of.
    pub fn make(&self, files: &[Changed]) -> Result<()> {
        let make = || -> io::Result<()> {
            fs::create_dir(&self.directory)?;
            // tells by its time which locks of git's are of this fast-forward
            fs::write(self.made(), "")?;
            fs::hard_link(self.git_directory.join("index"), self.directory.join("index"))?;
            for (number, file) in files.iter().enumerate().filter(|(_, file)| !file.new) {
                fs::hard_link(self.top.join(&file.path), self.saved(number))?;
            }
            files::sync(&self.directory)
        };
        make().context(|| format!("save files to {}", self.directory.display()))
    }

    /// Says that these files are about to be changed, from one commit to another. Without it, a
    /// savepoint means nothing.
    pub fn begin(&self, from: &str, to: &str, files: &[Changed]) -> Result<()> {
        let list: Vec<_> = files.iter().map(|file| format!("{}{}", if file.new { 'N' } else { 'S' }, file.path)).collect();
        let list = format!("{from}\0{to}\0{}", list.join("\0"));
        files::write(&self.list(), list.as_bytes(), 0o600).context(|| format!("write {}", self.list().display()))
    }

    /// Whether there is one: then a fast-forward was cut off.
    pub fn exists(&self) -> bool {
        self.directory.exists()
    }

    /// The fast-forward that was cut off; none if it had changed nothing yet.
    pub fn cut_off(&self) -> Result<Option<CutOff>> {
        let path = self.list();
        let list = match fs::read_to_string(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            other => other.context(|| format!("read {}", path.display()))?,
        };
        let mut parts = list.split('\0').map(String::from);
        let (from, to) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        let files = parts.filter(|part| part.len() > 1).map(|part| Changed { path: part[1..].to_owned(), new: part.starts_with('N') });
        Ok(Some(CutOff { from, to, files: files.collect() }))
    }

    /// Gives the saved files their names again, and removes the locks that git left behind.
    pub fn restore(&self, files: &[Changed], branch: &str) -> Result<()> {
        let restore = || -> io::Result<()> {
            self.remove_locks(branch)?;
            for file in files.iter().filter(|file| file.new) {
                match files::remove(&self.top.join(&file.path)) {
                    // git had not come so far as to make the directory
                    Err(error) if error.kind() == ErrorKind::NotADirectory => {}
                    other => other?,
                }
            }
            for (number, file) in files.iter().enumerate().filter(|(_, file)| !file.new) {
                let path = self.top.join(&file.path);
                fs::create_dir_all(path.parent().unwrap_or(&self.top))?;
                if path.is_dir() && !path.is_symlink() {
                    fs::remove_dir(&path)?;
                }
                rename_if_there(&self.saved(number), &path)?;
            }
            rename_if_there(&self.directory.join("index"), &self.git_directory.join("index"))
        };
        restore().context(|| format!("restore files from {}", self.directory.display()))?;
        self.discard()
    }

    /// Makes what git wrote to these files durable: it does not do so by itself.
    pub fn sync(&self, files: &[Changed]) -> Result<()> {
        let sync = |path: &Path| -> io::Result<()> {
            if path.is_file() && !path.is_symlink() {
                files::sync(path)?;
            }
            if path.parent().is_some_and(Path::is_dir) { files::sync_parent(path) } else { Ok(()) }
        };
        files.iter().try_for_each(|file| {
            let path = self.top.join(&file.path);
            sync(&path).context(|| format!("sync {}", path.display()))
        })
    }

    /// Forgets the saved files of a fast-forward that was cut off before it changed any, or after it
    /// had changed all, and removes the locks that git left behind.
    pub fn clean_up(&self, branch: &str) -> Result<()> {
        self.remove_locks(branch).context(|| format!("remove the locks of the git that {branch} was moved by"))?;
        self.discard()
    }

    /// Forgets the saved files.
    pub fn discard(&self) -> Result<()> {
        // first what gives it a meaning
        let discard = || files::remove(&self.list()).and_then(|()| fs::remove_dir_all(&self.directory));
        discard().context(|| format!("remove {}", self.directory.display()))
    }

    /// Removes git's locks that are younger than this savepoint: they are of the git that was killed.
    fn remove_locks(&self, branch: &str) -> io::Result<()> {
        let Ok(made) = self.made().metadata().and_then(|made| made.modified()) else { return Ok(()) };
        let locks = LOCKS.iter().map(|lock| (*lock).to_owned()).chain([format!("{branch}.lock")]);
        for lock in locks.map(|lock| self.git_directory.join(lock)) {
            if lock.metadata().and_then(|lock| lock.modified()).is_ok_and(|modified| modified >= made) {
                files::remove(&lock)?;
            }
        }
        Ok(())
    }

    fn made(&self) -> PathBuf {
        self.directory.join("made")
    }

    fn saved(&self, number: usize) -> PathBuf {
        self.directory.join(number.to_string())
    }

    fn list(&self) -> PathBuf {
        self.directory.join("list")
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Directory;
    use std::time::SystemTime;

    /// A working tree with a file to change, one to remove, and room for a new one.
    fn tree() -> (Directory, Savepoint, Vec<Changed>) {
        let directory = Directory::new();
        let git_directory = directory.path().join(".git");
        fs::create_dir_all(directory.path().join("below")).unwrap();
        fs::create_dir(&git_directory).unwrap();
        fs::write(git_directory.join("index"), "old index").unwrap();
        fs::write(directory.path().join("changed"), "old").unwrap();
        fs::write(directory.path().join("below/removed"), "old").unwrap();
        let savepoint = Savepoint::of(directory.path(), &git_directory, "app");
        let file = |path: &str, new| Changed { path: path.into(), new };
        (directory, savepoint, vec![file("changed", false), file("below/removed", false), file("new", true)])
    }

    fn snapshot(directory: &Directory) -> Vec<(String, Vec<u8>, SystemTime)> {
        let files = ["changed", "below/removed", "new", ".git/index", ".git/index.lock", ".git/ekiben-app"];
        let present = files.iter().filter(|file| directory.path().join(file).exists());
        let look = |file: &&str| {
            let path = directory.path().join(file);
            ((*file).to_owned(), fs::read(&path).unwrap_or_default(), path.metadata().unwrap().modified().unwrap())
        };
        present.map(look).collect()
    }

    /// What git does to a file.
    fn replace(path: &Path, contents: &str) {
        let _ = fs::remove_file(path);
        fs::write(path, contents).unwrap();
    }

    #[test]
    fn everything_is_as_it_was_wherever_it_was_cut_off() {
        for cut_off_after in 0..=5 {
            let (directory, savepoint, files) = tree();
            let before = snapshot(&directory);
            savepoint.make(&files).unwrap();
            savepoint.begin("abc", "def", &files).unwrap();
            let steps: [&dyn Fn(); 5] = [
                &|| fs::write(directory.path().join(".git/index.lock"), "").unwrap(),
                &|| replace(&directory.path().join("changed"), "half"),
                &|| fs::remove_dir_all(directory.path().join("below")).unwrap(),
                &|| replace(&directory.path().join("new"), "new"),
                &|| fs::rename(directory.path().join(".git/index.lock"), directory.path().join(".git/index")).unwrap(),
            ];
            steps.iter().take(cut_off_after).for_each(|step| step());
            let found = savepoint.cut_off().unwrap().unwrap();
            assert_eq!((found.from.as_str(), found.to.as_str(), &found.files), ("abc", "def", &files));
            savepoint.restore(&found.files, "refs/heads/main").unwrap();
            assert_eq!(snapshot(&directory), before, "cut off after {cut_off_after}");
            assert!(!savepoint.exists());
        }
    }

    #[test]
    fn going_back_can_be_begun_again() {
        let (directory, savepoint, files) = tree();
        let before = snapshot(&directory);
        savepoint.make(&files).unwrap();
        savepoint.begin("abc", "def", &files).unwrap();
        replace(&directory.path().join("changed"), "half");
        replace(&directory.path().join("new"), "new");
        // cut off after the first of the saved files
        fs::remove_file(directory.path().join("new")).unwrap();
        fs::rename(directory.path().join(".git/ekiben-app/0"), directory.path().join("changed")).unwrap();
        savepoint.restore(&files, "refs/heads/main").unwrap();
        assert_eq!(snapshot(&directory), before);
    }

    #[test]
    fn a_lock_of_somebody_else_stays() {
        let (directory, savepoint, files) = tree();
        let lock = directory.path().join(".git/index.lock");
        fs::write(&lock, "").unwrap();
        let old = SystemTime::now() - std::time::Duration::from_secs(60);
        fs::File::options().write(true).open(&lock).unwrap().set_modified(old).unwrap();
        savepoint.make(&files).unwrap();
        savepoint.begin("abc", "def", &files).unwrap();
        savepoint.restore(&files, "refs/heads/main").unwrap();
        assert!(lock.exists());
    }

    #[test]
    fn a_savepoint_that_was_never_begun_is_dropped_with_its_locks() {
        let (directory, savepoint, files) = tree();
        let before = snapshot(&directory);
        savepoint.make(&files).unwrap();
        let lock = directory.path().join(".git/HEAD.lock");
        fs::write(&lock, "").unwrap();
        assert!(savepoint.cut_off().unwrap().is_none());
        savepoint.clean_up("refs/heads/main").unwrap();
        assert!(!lock.exists() && !savepoint.exists());
        assert_eq!(snapshot(&directory), before);
    }
}
