//! The only caller of git, always as the owner of the repository.
//!
//! Nothing here touches the working tree, the index or a branch, [`Repository::forward`] apart.
//! Hooks, the file system monitor and prompts are off, optional locks are not taken, and what
//! is written is synced: git does not do so by itself.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::config::{Author, Instance};
use crate::error::{Context, Error, Result};
use crate::fault;
use crate::program::Program;
use crate::savepoint::{Changed, Savepoint};

/// How long the other side of a fetch or push may take.
const NETWORK_LIMIT: Duration = Duration::from_secs(300);
/// What git calls an operation under way, by the file that tells.
const UNDER_WAY: [(&str, &str); 7] = [
    ("MERGE_HEAD", "merge"),
    ("rebase-merge", "rebase"),
    ("rebase-apply", "rebase"),
    ("CHERRY_PICK_HEAD", "cherry-pick"),
    ("REVERT_HEAD", "revert"),
    ("sequencer", "cherry-pick or revert"),
    ("BISECT_LOG", "bisect"),
];

/// Settings under which no content is changed, and no program run for it, whatever its attributes say.
const AS_IT_IS: [&str; 3] = ["-c", "core.autocrlf=false", "--attr-source=4b825dc642cb6eb9a060e54bf8d69288fbee4904"];

/// A repository with a working tree, on a branch.
pub struct Repository {
    /// The top of the working tree.
    pub top: PathBuf,
    /// The flake's directory below `top`: empty, or ending in `/`.
    pub prefix: String,
    /// The full name of the branch that HEAD stands for.
    pub branch: String,
    /// The commit that HEAD stands for.
    pub head: String,
    git_directory: PathBuf,
}

impl Repository {
    /// Opens the instance's repository, unless it is in a state that a run must not start from: no
    /// commit, no branch, or something under way. The error says what to do.
    pub fn open(instance: &Instance) -> Result<Self> {
        let directory = &instance.flake_ref.directory;
        let place = instance.flake_path.display();
        fs::metadata(directory).context(|| format!("open {}", directory.display()))?;
        let top = ask(directory, ["rev-parse", "--show-toplevel"], || format!("open the repository {place}"))?;
        let one = |argument: &str| ask(directory, ["rev-parse", argument], || format!("open the repository {place}"));
        let top = PathBuf::from(top);
        if top != fs::canonicalize(&instance.flake_path).context(|| format!("open {place}"))? {
            return Err(Error::new(format!(
                "Failed to open the repository {place}: its top is {}; set flakePath to that, and flakeRef to the flake in it",
                top.display()
            )));
        }
        let git_directory = PathBuf::from(one("--absolute-git-dir")?);
        if !git_directory.starts_with(&top) {
            return Err(Error::new(format!(
                "Failed to open the repository {place}: it is a worktree or submodule of {}; use a clone of its own",
                git_directory.display()
            )));
        }
        let not_now = |why: &str| Err(Error::new(format!("Failed to start from {place}: {why}")));
        let Ok(branch) = ask(directory, ["symbolic-ref", "HEAD"], String::new) else {
            return not_now("HEAD is detached; check a branch out");
        };
        let Ok(head) = ask(directory, ["rev-parse", "--verify", "--quiet", "HEAD^{commit}"], String::new) else {
            return not_now("the branch has no commit yet; commit the flake");
        };
        if let Some((_, what)) = UNDER_WAY.iter().find(|(file, _)| git_directory.join(file).exists()) {
            return not_now(&format!("a {what} is in progress; finish or abort it"));
        }
        Ok(Self { prefix: one("--show-prefix")?, top, branch, head, git_directory })
    }

    /// Whether HEAD is another branch or commit than when these were read; says so.
    pub fn has_moved_from(&self, branch: &str, head: &str) -> bool {
        let moved = self.branch != branch || self.head != head;
        if moved {
            log::info!("{branch} was at {head}, now {} is at {}.", self.branch, self.head);
        }
        moved
    }

    /// The flake's lock file, from the top of the working tree.
    pub fn lock_file(&self) -> String {
        format!("{}flake.lock", self.prefix)
    }

    /// A reference by which Nix reads the flake at a commit, and nothing else of the repository.
    pub fn flake_at(&self, commit: &str, instance: &Instance) -> Result<String> {
        let mut parameters = vec![format!("rev={commit}")];
        if let Some(directory) = self.prefix.strip_suffix('/') {
            parameters.push(format!("dir={directory}"));
        }
        if self.ask(["rev-parse", "--is-shallow-repository"])? == "true" {
            parameters.push("shallow=1".into());
        }
        parameters.extend(instance.flake_ref.parameters.iter().cloned());
        Ok(format!("git+file://{}?{}", self.top.display(), parameters.join("&")))
    }

    /// Fails unless the lock file is in the working tree and in the index what it is in HEAD.
    pub fn check_lock_file_is_clean(&self) -> Result<()> {
        let path = self.lock_file();
        let edited = |where_: &str| {
            let place = self.top.join(&path);
            Err(Error::new(format!("Failed to start from {}: it {where_}; commit or restore it", place.display())))
        };
        let committed = self.ask(["rev-parse", "--verify", "--quiet", &format!("HEAD:{path}")]).ok();
        let staged = self.ask(["ls-files", "--stage", "--", &path])?;
        let staged = staged.split_whitespace().nth(1).map(String::from);
        if staged != committed {
            return edited("has staged changes");
        }
        let file = self.top.join(&path);
        let present = match fs::symlink_metadata(&file) {
            Ok(metadata) if metadata.is_file() => Some(self.ask(["hash-object", "--path", &path, "--", &path])?),
            Ok(_) => return edited("is no regular file"),
            Err(_) => None,
        };
        if present == committed { Ok(()) } else { edited("has uncommitted changes") }
    }

    /// A file as it is in a commit, if it is there.
    pub fn read_file(&self, commit: &str, path: &str) -> Result<Option<Vec<u8>>> {
        let object = format!("{commit}:{path}");
        if self.ask(["rev-parse", "--verify", "--quiet", &object]).is_err() {
            return Ok(None);
        }
        self.git().args(["cat-file", "blob", &object]).output(|| format!("read {object}"), None).map(Some)
    }

    /// A commit's tree.
    pub fn tree(&self, commit: &str) -> Result<String> {
        self.ask(["rev-parse", &format!("{commit}^{{tree}}")])
    }

    /// Makes a commit on top of `base` in which only the lock file differs, and returns its name.
    /// `scratch` is a file for a private index.
    pub fn commit_lock_file(&self, base: &str, lock: &[u8], message: &str, author: &Author, scratch: &Path) -> Result<String> {
        let doing = || format!("commit {}", self.lock_file());
        let text = |program: Program, input| program.output(doing, input).map(|bytes| line(&bytes));
        let _ = fs::remove_file(scratch);
        let private = || self.git().env("GIT_INDEX_FILE", scratch);
        let blob = text(self.git().args(["hash-object", "-w", "--stdin"]), Some(lock))?;
        text(private().args(["read-tree", base]), None)?;
        let entry = format!("100644,{blob},{}", self.lock_file());
        text(private().args(["update-index", "--add", "--cacheinfo", &entry]), None)?;
        let tree = text(private().args(["write-tree"]), None)?;
        let _ = fs::remove_file(scratch);
        let commit = self.git().args(["commit-tree", "-p", base, &tree]);
        text(by(author, commit), Some(message.as_bytes()))
    }

    /// Makes a commit on top of `base` that holds what is in a directory, all of it and nothing else,
    /// and returns its name: the same one for the same arguments. `date` is in seconds since 1970,
    /// `scratch` a file for a private index.
    pub fn commit_directory(
        &self,
        base: &str,
        directory: &Path,
        message: &str,
        author: &Author,
        date: u64,
        scratch: &Path,
    ) -> Result<String> {
        let doing = || format!("commit {}", directory.display());
        let _ = fs::remove_file(scratch);
        let private = || self.git().env("GIT_INDEX_FILE", scratch);
        let add = private().arg("--git-dir").arg(&self.git_directory).arg("--work-tree").arg(directory);
        add.args(AS_IT_IS).args(["add", "--all", "--force", "."]).directory(directory).output(doing, None)?;
        let tree = private().args(["write-tree"]).output(doing, None).map(|bytes| line(&bytes))?;
        let _ = fs::remove_file(scratch);
        let commit = self.git().args(["commit-tree", "-p", base, &tree]);
        let date = format!("@{date} +0000");
        let commit = by(author, commit).env("GIT_AUTHOR_DATE", &date).env("GIT_COMMITTER_DATE", &date);
        commit.output(doing, Some(message.as_bytes())).map(|bytes| line(&bytes))
    }

    /// The first line of a commit's message.
    pub fn subject(&self, commit: &str) -> Result<String> {
        self.ask(["log", "-1", "--format=%s", commit])
    }

    /// Writes the files of a commit into a directory that is there, and empty; all have the time 0.
    pub fn export(&self, commit: &str, directory: &Path) -> Result<()> {
        let doing = || format!("write {commit} into {}", directory.display());
        let tar = directory.with_extension("tar");
        let export = self.git().args(AS_IT_IS).args(["archive", "--format=tar", "--mtime=1970-01-01T00:00:00Z", "--output"]);
        export.arg(&tar).arg(commit).output(doing, None)?;
        Program::new("tar").arg("--extract").arg("--file").arg(&tar).directory(directory).output(doing, None)?;
        fs::remove_file(&tar).context(doing)
    }

    /// The message of the newest commit in the history of `commit` with a line that `pattern`, an
    /// extended regular expression, matches.
    pub fn message(&self, commit: &str, pattern: &str) -> Result<Option<String>> {
        let message = self.ask(["log", "-1", "--format=%B", "--extended-regexp", "--grep", pattern, commit])?;
        Ok(Some(message).filter(|message| !message.is_empty()))
    }

    /// Keeps a commit under a ref of ours, so that git does not collect it as garbage.
    pub fn keep(&self, reference: &str, commit: &str) -> Result<()> {
        self.unlock(reference);
        // no reflog for it, whatever the user's setting
        self.ask(["-c", "core.logAllRefUpdates=true", "update-ref", reference, commit]).map(drop)
    }

    /// Removes what a run that was cut off has left: no other writes this ref.
    fn unlock(&self, reference: &str) {
        let _ = fs::remove_file(self.git_directory.join(format!("{reference}.lock")));
    }

    /// Fetches the branch's upstream into `reference`. Returns the commit to start from: the
    /// upstream's, or HEAD where that is ahead.
    pub fn fetch_upstream(&self, reference: &str) -> Result<String> {
        let (remote, branch) = self.upstream()?;
        self.unlock(reference);
        let fetch = self.git().args(["fetch", "--quiet", "--no-tags", "--no-write-fetch-head", "--refmap="]);
        let fetch = fetch.args([&remote, &format!("+{branch}:{reference}")]);
        fetch.run(NETWORK_LIMIT, || format!("fetch {branch} from {remote}"))?.success()?;
        let theirs = self.ask(["rev-parse", reference])?;
        if self.contains(&theirs, &self.head) {
            Ok(theirs)
        } else if self.contains(&self.head, &theirs) {
            Ok(self.head.clone())
        } else {
            Err(Error::new(format!("Failed to pull {branch} from {remote}: {} has other commits; merge or rebase them", self.branch)))
        }
    }

    /// Sends a commit to the branch's upstream; never forces.
    pub fn push(&self, commit: &str) -> Result<()> {
        let (remote, branch) = self.upstream()?;
        let push = self.git().args(["push", "--quiet", &remote, &format!("{commit}:{branch}")]);
        push.run(NETWORK_LIMIT, || format!("push {commit} to {branch} of {remote}"))?.success()
    }

    fn upstream(&self) -> Result<(String, String)> {
        let branch = self.branch.trim_start_matches("refs/heads/");
        let setting = |what: &str| self.ask(["config", "--get", &format!("branch.{branch}.{what}")]);
        match (setting("remote"), setting("merge")) {
            (Ok(remote), Ok(merge)) => Ok((remote, merge)),
            _ => Err(Error::new(format!("Failed to find the upstream of {branch}: it has none; set it with git branch --set-upstream-to"))),
        }
    }

    /// Whether `descendant` is `commit` or comes after it.
    pub fn contains(&self, descendant: &str, commit: &str) -> bool {
        self.ask(["merge-base", "--is-ancestor", commit, descendant]).is_ok()
    }

    /// Fails if going from HEAD to `commit` would have to overwrite an uncommitted edit or an
    /// untracked file, or if there would be no way back; changes nothing. `scratch` is a file for a
    /// private index.
    pub fn check_forward(&self, commit: &str, instance: &str, scratch: &Path) -> Result<()> {
        let files = self.changed_files(commit)?;
        // git would overwrite those that it ignores
        if let Some(file) = files.iter().find(|file| file.new && self.top.join(&file.path).symlink_metadata().is_ok()) {
            return Err(Error::new(format!("Failed to go from {} to {commit}: {} is in the way; move or commit it", self.head, file.path)));
        }
        let index = self.git_directory.join("index");
        let lock = index.with_extension("lock");
        if lock.exists() {
            let what = "another git is at work there, or has left that file behind; remove it then";
            return Err(Error::new(format!("Failed to lock {}: {} exists: {what}", index.display(), lock.display())));
        }
        fs::copy(&index, scratch).context(|| format!("copy {}", index.display()))?;
        let private = || self.git().env("GIT_INDEX_FILE", scratch);
        // its status says whether files were edited, which is no matter yet
        let _ = private().args(["update-index", "-q", "--refresh"]).output(String::new, None);
        let check = private().args(["read-tree", "-n", "-m", "-u", &self.head, commit]);
        let result = check.output(|| format!("go from {} to {commit} without touching your edits", self.head), None);
        let _ = fs::remove_file(scratch);
        result?;
        let savepoint = self.savepoint(instance);
        let made = savepoint.make(&files);
        savepoint.discard().and(made)
    }

    /// Fast-forwards the branch, the index and the working tree from HEAD to `commit`, or changes
    /// nothing. While the files change, the branch is locked at HEAD, so nobody can commit between.
    pub fn forward(&self, commit: &str, instance: &str) -> Result<()> {
        let savepoint = self.savepoint(instance);
        let files = self.changed_files(commit)?;
        let made = savepoint.make(&files);
        fault::point("accept: saved");
        let mut begun = false;
        let forwarded = made.and_then(|()| {
            self.update_branch(commit, || {
                fault::point("accept: branch locked");
                savepoint.begin(&self.head, commit, &files)?;
                // its status says whether files were edited; read-tree knows which ones matter
                let _ = self.ask(["update-index", "-q", "--refresh"]);
                let read = self.ask(["read-tree", "-m", "-u", &self.head, commit]);
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
                // git moves the branch before it writes the reflog, which may have failed
                Ok(now) if now == commit => log::warn!("{error}; but the branch has been moved."),
                Ok(_) => return savepoint.restore(&files, &self.branch).and(Err(error)),
                // nobody knows: that is for the next run to find out
                Err(_) => return Err(error),
            },
            Err(error) => return savepoint.discard().and(Err(error)),
            Ok(()) => fault::point("accept: branch moved"),
        }
        if let Err(error) = savepoint.discard() {
            log::warn!("{error}.");
        }
        Ok(())
    }

    /// Ends a fast-forward of the instance that was cut off: all of it has been done, or none of it.
    pub fn recover(&self, instance: &str) -> Result<()> {
        let savepoint = self.savepoint(instance);
        if !savepoint.exists() {
            return Ok(());
        }
        match savepoint.cut_off()? {
            Some(cut_off) if cut_off.from == self.head => {
                log::warn!("Going back from {}, to which {} was being fast-forwarded ...", cut_off.to, self.branch);
                savepoint.restore(&cut_off.files, &self.branch)
            }
            // nothing was changed yet, or all; or somebody has gone on from there by hand
            _ => savepoint.clean_up(&self.branch),
        }
    }

    fn savepoint(&self, instance: &str) -> Savepoint {
        Savepoint::of(&self.top, &self.git_directory, instance)
    }

    /// The files that differ between HEAD and a commit. Submodules are not: git leaves them alone.
    fn changed_files(&self, commit: &str) -> Result<Vec<Changed>> {
        let list = self.ask(["diff-tree", "-r", "-z", "--no-renames", &self.head, commit])?;
        // ":<old mode> <new mode> <old object> <new object> <status>", the path
        let mut parts = list.split('\0');
        let mut files = Vec::new();
        while let (Some(what), Some(path)) = (parts.next(), parts.next()) {
            if !what.contains("160000") {
                files.push(Changed { path: path.to_owned(), new: what.starts_with(":000000") });
            }
        }
        Ok(files)
    }

    /// Moves the branch from HEAD to `commit`, if it is still at HEAD; `meanwhile` is done while it is
    /// locked, and if that fails, the branch stays.
    fn update_branch(&self, commit: &str, meanwhile: impl FnOnce() -> Result<()>) -> Result<()> {
        let doing = || format!("move {} to {commit}", self.branch);
        let mut git = self.git().args(["update-ref", "-m", "ekiben: fast-forward", "--stdin"]).talk(None)?;
        let locked = git
            .ask("start", "start: ok")
            .and_then(|()| git.say(&format!("update {} {commit} {}", self.branch, self.head)))
            .and_then(|()| git.ask("prepare", "prepare: ok"));
        locked.context(doing)?;
        let done = meanwhile();
        let asked = if done.is_ok() { git.ask("commit", "commit: ok") } else { git.ask("abort", "abort: ok") };
        done?;
        asked.and_then(|()| git.end()).context(doing)
    }

    fn git(&self) -> Program {
        git(&self.top)
    }

    fn ask<'a>(&self, arguments: impl IntoIterator<Item = &'a str> + Clone) -> Result<String> {
        let what = arguments.clone().into_iter().collect::<Vec<_>>().join(" ");
        ask(&self.top, arguments, || format!("run git {what} in {}", self.top.display()))
    }
}

/// Makes a repository of our own where there is none yet, with a first commit that holds nothing.
pub fn create(instance: &Instance) -> Result<()> {
    let place = &instance.flake_path;
    let doing = || format!("make the repository {}", place.display());
    if ask(place, ["rev-parse", "--verify", "--quiet", "HEAD"], doing).is_ok() {
        return Ok(());
    }
    fs::create_dir_all(place).context(doing)?;
    ask(place, ["init", "--quiet", "--initial-branch=main", "."], doing)?;
    let commit = git(place).args(["commit", "--quiet", "--allow-empty", "--message=nothing yet"]);
    by(&instance.author, commit).output(doing, None).map(drop)
}

/// Has a program of git's write in this name.
fn by(author: &Author, program: Program) -> Program {
    let program = program.env("GIT_AUTHOR_NAME", &author.name).env("GIT_AUTHOR_EMAIL", &author.mail);
    program.env("GIT_COMMITTER_NAME", &author.name).env("GIT_COMMITTER_EMAIL", &author.mail)
}

/// Removes a ref of ours, if it is there, in whatever state the repository is.
pub fn drop_reference(instance: &Instance, reference: &str) -> Result<()> {
    let doing = || format!("drop {reference}");
    ask(&instance.flake_path, ["update-ref", "-d", reference], doing).map(drop)
}

/// Whether git has found something in its way, and so has changed nothing.
fn is_refusal(error: &Error) -> bool {
    let words = ["would be overwritten", "not uptodate", "index.lock"];
    error.tail.iter().any(|line| words.iter().any(|words| line.contains(words)))
}

fn git(directory: &Path) -> Program {
    let settings = ["core.hooksPath=/dev/null", "core.fsmonitor=false", "core.fsync=all", "gc.auto=0", "maintenance.auto=false"];
    Program::new("git")
        .args(settings.iter().flat_map(|setting| ["-c", setting]))
        .env("GIT_OPTIONAL_LOCKS", "0")
        .env("GIT_TERMINAL_PROMPT", "0")
        .env("LC_ALL", "C")
        .directory(directory)
}

fn ask<A: AsRef<OsStr>>(directory: &Path, arguments: impl IntoIterator<Item = A>, doing: impl Fn() -> String) -> Result<String> {
    git(directory).args(arguments).output(doing, None).map(|bytes| line(&bytes))
}

fn line(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim_end().to_owned()
}
