//! The one thing that changes a branch, its index and its working tree: a fast-forward, whole or not at all.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::error::{Context, Error, OrLog, Result};
use crate::gather::gather;
use crate::git::savepoint::Savepoint;
use crate::git::savepoint::cut_off::Changed;
use crate::git::savepoint::locks::once_free;
use crate::git::{Repository, reason};
use crate::{fault, files};

impl Repository {
    /// Fails if going from HEAD to `commit` would have to overwrite an uncommitted edit or an
    /// untracked file, or if there would be no way back; changes nothing. `scratch` is a directory.
    pub fn check_forward(&self, commit: &str, instance: &str, scratch: &Path) -> Result<()> {
        let files = self.changed_files(commit)?;
        let savepoint = self.savepoint(instance);
        // git would overwrite those that it ignores, and a link in the place of a directory
        let removed: BTreeSet<_> = gather(files.iter().filter(|file| file.before).map(|file| file.path.as_path()));
        let written = files.iter().filter(|file| file.after);
        if let Some(path) = written.into_iter().find_map(|file| savepoint.in_the_way(&file.path, &removed)) {
            let why = format!("{} would be overwritten; move or commit it", path.display());
            return Err(why).context(|| format!("fast-forward from {} to {commit}", self.head));
        }
        for name in ["index", "HEAD", &self.branch] {
            let [file, lock] = [name, &format!("{name}.lock")].map(|name| self.git_directory.join(name));
            let look = || lock.symlink_metadata().map_or(Ok(()), |_| Err(ErrorKind::AlreadyExists.into()));
            if once_free(&lock, look).is_err() {
                let what = "another git process is running, or has left the file behind; in that case remove it";
                return Err(Error::new(format!("Failed to lock {}: {} exists: {what}", file.display(), lock.display())));
            }
        }
        savepoint.check(&self.branch, &files)?;
        let index = self.copy_of_index(scratch)?;
        self.refresh(&index);
        let check = self.by(&index).args(["read-tree", "-n", "-m", "-u", &self.head, commit]);
        let doing = || format!("fast-forward from {} to {commit} without changing your edits", self.head);
        check.output(doing, None)?;
        // before it writes an index, git looks into files that are as young, by whatever filters they need
        self.by(&index).args(["read-tree", "-m", &self.head, commit]).output(doing, None).map(drop)
    }

    /// Goes from HEAD to `commit` in an empty directory, as git will do in the working tree: that shows
    /// whether it can write the files, with whatever filters they need. `scratch` is a directory.
    pub fn rehearse_forward(&self, commit: &str, scratch: &Path) -> Result<()> {
        let tree = scratch.join("tree");
        let doing = || format!("write the files of {commit}");
        files::make_directory(&tree).context(doing)?;
        let git = self.by(&self.copy_of_index(scratch)?).arg("--git-dir").arg(&self.git_directory).arg("--work-tree").arg(&tree);
        git.args(["read-tree", "-m", "-u", &self.head, commit]).directory(&tree).output(doing, None)?;
        files::clear(&tree).context(doing)
    }

    /// Has an index know which files are unchanged; read-tree knows which ones matter.
    pub(super) fn refresh(&self, index: &Path) {
        // its status says whether files were edited
        let _ = self.by(index).args(["update-index", "-q", "--refresh"]).output(String::new, None);
    }

    /// Fast-forwards the branch, the index and the working tree from HEAD to `commit`, or changes
    /// nothing. While the files change, the index and the branch are locked, so nobody can commit between.
    pub fn forward(&self, commit: &str, instance: &str) -> Result<()> {
        let savepoint = self.savepoint(instance);
        let files = self.changed_files(commit)?;
        let made = savepoint.note_locks(&self.branch).and_then(|()| savepoint.make(&self.head, commit, &self.branch, &files));
        fault::point("accept: saved");
        let mut begun = false;
        // in this order, as git's own commit does it: one that has locked the index is to get the branch
        let forwarded = made.and_then(|()| savepoint.lock_index()).and_then(|()| {
            self.update_branch(commit, &savepoint, || {
                fault::point("accept: branch locked");
                savepoint.copy_index()?;
                savepoint.begin()?;
                self.refresh(&savepoint.index());
                let read = self.by(&savepoint.index()).args(["read-tree", "-m", "-u", &self.head, commit]);
                let read = read.output(|| format!("fast-forward from {} to {commit}", self.head), None);
                // git looks before it changes anything; what the user has done meanwhile is to stay
                begun = !read.as_ref().is_err_and(is_refusal);
                read?;
                savepoint.sync(&files)?;
                fault::point("accept: tree updated");
                Ok(())
            })
        });
        match forwarded {
            Err(error) if begun => match self.ask(["rev-parse", "--verify", "--quiet", &self.branch]) {
                // the reflog may have failed
                Ok(now) if now == commit => log::warn!("{error}; the branch has been moved all the same."),
                Ok(_) => return self.go_back(&savepoint).and(Err(error)),
                // nobody knows: that is for the next run to find out
                Err(_) => return Err(error),
            },
            Err(error) => return self.end(&savepoint, &files).and(Err(error)),
            Ok(()) => fault::point("accept: branch moved"),
        }
        savepoint.install_index().and_then(|()| savepoint.discard()).or_warn();
        Ok(())
    }

    /// Whether [`Self::recover`] would change anything.
    pub fn has_to_recover(&self, instance: &str) -> bool {
        self.savepoint(instance).exists()
    }

    /// Ends what was cut off of the instance: a fast-forward has been done wholly, or not at all, and no
    /// lock of a git that was killed stays.
    pub fn recover(&self, instance: &str) -> Result<()> {
        let savepoint = self.savepoint(instance);
        if !savepoint.exists() {
            return Ok(());
        }
        savepoint.remove_locks()?;
        let cut_off = savepoint.cut_off()?;
        if savepoint.has_begun() && cut_off.from == self.head {
            log::warn!("Rolling back from {}, to which {} was being fast-forwarded ...", cut_off.to, self.branch);
            return self.go_back(&savepoint);
        }
        if savepoint.has_begun() && cut_off.to == self.head {
            savepoint.install_index_if_unchanged()?;
            return savepoint.discard();
        }
        // nothing was changed yet, or somebody has gone on from there by hand
        self.end(&savepoint, &cut_off.files)
    }

    fn go_back(&self, savepoint: &Savepoint) -> Result<()> {
        let cut_off = savepoint.cut_off()?;
        let contents = |path: &Path| {
            let object = [cut_off.to.as_bytes(), b":", path.as_os_str().as_bytes()].concat();
            self.git().args(["cat-file", "--filters"]).arg(OsStr::from_bytes(&object)).output(String::new, None).ok()
        };
        savepoint.restore(&cut_off, &contents)?;
        self.end(savepoint, &cut_off.files)
    }

    /// Forgets a savepoint after which the files are as they were. Entries of the index that have git look
    /// away are never refreshed by it: without this, it would take their files for edited ever after.
    fn end(&self, savepoint: &Savepoint, files: &[Changed]) -> Result<()> {
        let hidden = self.git().args(["ls-files", "-v", "-z"]).output(|| "list the index".into(), None)?;
        let hidden: Vec<_> = hidden
            .split(|byte| *byte == 0)
            .filter_map(|entry| entry.split_at_checked(2))
            .filter(|(tag, path)| {
                let is_changed = files.iter().any(|file| file.before && file.path.as_os_str().as_bytes() == *path);
                (tag[0].is_ascii_lowercase() || tag[0] == b'S') && is_changed
            })
            .collect();
        if !hidden.is_empty() && savepoint.owns_index().is_ok() {
            // the end of a link changes a file's time, too
            savepoint.release_files(files.len())?;
            savepoint.copy_index()?;
            let skipped = hidden.iter().filter(|(tag, _)| tag[0].eq_ignore_ascii_case(&b's'));
            let skipped: Vec<_> = skipped.map(|(_, path)| OsStr::from_bytes(path)).collect();
            for arguments in [&["--no-skip-worktree", "--"][..], &["--really-refresh"], &["--skip-worktree", "--"]] {
                let update =
                    self.by(&savepoint.index()).args(["-c", "core.trustctime=true", "-c", "core.checkStat=default", "update-index", "-q"]);
                let update = update.args(arguments);
                let paths = if arguments.len() > 1 { &skipped[..] } else { &[] };
                // its status says whether files were edited
                let _ = update.args(paths).output(String::new, None);
            }
            savepoint.install_index()?;
        }
        savepoint.discard()
    }

    /// What differs between HEAD and a commit.
    pub(super) fn changed_files(&self, commit: &str) -> Result<Vec<Changed>> {
        let compare = self.git().args(["diff-tree", "-r", "-z", "--no-renames", &self.head, commit]);
        let list = compare.output(|| format!("compare {} with {commit}", self.head), None)?;
        // ":<old mode> <new mode> <old object> <new object> <status>", the path
        let mut parts = list.split(|byte| *byte == 0);
        let mut files = Vec::new();
        while let (Some(what), Some(path)) = (parts.next(), parts.next()) {
            let mut is_file =
                what.splitn(3, |byte| *byte == b' ').map(|mode| !mode.ends_with(b"000000") && mode != b":160000" && mode != b"160000");
            let (before, after) = (is_file.next() == Some(true), is_file.next() == Some(true));
            files.push(Changed { path: OsStr::from_bytes(path).into(), before, after });
        }
        Ok(files)
    }

    /// Moves the branch from HEAD to `commit`, if it is still at HEAD; `meanwhile` is done while it is
    /// locked, and if that fails, the branch stays.
    fn update_branch(&self, commit: &str, savepoint: &Savepoint, meanwhile: impl FnOnce() -> Result<()>) -> Result<()> {
        let doing = || format!("move {} to {commit}", self.branch);
        let git = self.git().args(["update-ref", "-m", "ekiben: fast-forward", "--stdin"]);
        let errors = savepoint.errors();
        let mut git = git.talk(File::create(&errors).context(doing)?)?;
        let locked = git
            .ask("start", "start: ok")
            .and_then(|()| git.say(&format!("update {} {commit} {}", self.branch, self.head)))
            .and_then(|()| git.ask("prepare", "prepare: ok"));
        let (done, asked) = match locked {
            Ok(()) => {
                let done = meanwhile();
                let asked = if done.is_ok() { git.ask("commit", "commit: ok") } else { git.ask("abort", "abort: ok") };
                (done, asked)
            }
            Err(error) => (Ok(()), Err(error)),
        };
        let ended = git.end();
        savepoint.remove_locks()?;
        done?;
        let explain = |error: std::io::Error| {
            let said = fs::read_to_string(&errors).unwrap_or_default();
            let said = reason(&said.lines().map(String::from).collect::<Vec<_>>());
            format!("git {error}{}", said.map(|said| format!(": {said}")).unwrap_or_default())
        };
        ended.and(asked).map_err(explain).context(doing)
    }
}

/// Whether git has found something in its way, and so has changed nothing.
fn is_refusal(error: &Error) -> bool {
    let words = ["Entry '", "Refusing to remove '", "Untracked working tree file '", "Updating '"];
    error.tail().iter().filter_map(|line| line.strip_prefix("error: ")).any(|line| words.iter().any(|words| line.starts_with(words)))
}
