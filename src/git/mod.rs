//! The only caller of git, always as the owner of the repository.
//!
//! Nothing here touches the working tree, the index or a branch, [`Repository::forward`] apart.
//! Hooks, the file system monitor and prompts are off, optional locks are not taken, and what
//! is written is synced: git does not do so by itself.

pub mod lockfile;

mod savepoint;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::stat::{Mode, umask};
use nix::unistd::{User, geteuid};

use self::savepoint::{Changed, Savepoint};
use crate::config::{Author, Instance};
use crate::error::{Context, Error, Result};
use crate::fault;
use crate::files;
use crate::gather::gather;
use crate::program::{KILLED, Program};

/// How long the other side of a fetch or push may take.
const NETWORK_LIMIT: Duration = Duration::from_secs(300);
/// The same for only a look at it.
const LOOK_LIMIT: Duration = Duration::from_secs(60);
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
const AS_IT_IS: [&str; 5] =
    ["-c", "core.autocrlf=false", "-c", "core.attributesFile=/dev/null", "--attr-source=4b825dc642cb6eb9a060e54bf8d69288fbee4904"];

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
        for (question, can_read, what) in [("--show-object-format", "sha1", "objects"), ("--show-ref-format", "files", "refs")] {
            // an older git does not know other ones
            if let Some(format) = one(question).ok().filter(|format| format != can_read && format != question) {
                let only = format!("it has {what} of format {format}, Nix reads {can_read} only; use a clone of that format");
                return Err(Error::new(format!("Failed to open the repository {place}: {only}")));
            }
        }
        let shared = ask(directory, ["config", "--get-all", "core.sharedRepository"], String::new)?;
        // the last one is ours
        if let Some(shared) = shared.lines().rev().nth(1) {
            share(shared);
        }
        let not_now = |why: &str| Err(Error::new(format!("Failed to start from {place}: {why}")));
        let Ok(branch) = ask(directory, ["symbolic-ref", "HEAD"], String::new) else {
            return not_now("HEAD is detached; check a branch out");
        };
        if branch.contains('\u{fffd}') {
            return not_now("the name of its branch is not UTF-8; rename the branch");
        }
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

    /// Fails unless the lock file is in the working tree and in the index what it is in HEAD, as git sees
    /// it; bits that have git look away do not count. `scratch` is a directory.
    pub fn check_lock_file_is_clean(&self, scratch: &Path) -> Result<()> {
        let path = self.lock_file();
        let edited = |where_: &str| {
            let place = self.top.join(&path);
            Err(Error::new(format!("Failed to start from {}: it {where_}; commit or restore it", place.display())))
        };
        let committed = self.ask(["rev-parse", "--verify", "--quiet", &format!("HEAD:{path}")]).ok();
        let staged = self.ask(["ls-files", "--stage", "--", &path])?;
        let mut staged = staged.split_whitespace();
        let (mode, staged) = (staged.next().unwrap_or_default(), staged.next().map(String::from));
        if staged != committed {
            return edited("has staged changes");
        }
        let uncommitted = match (fs::symlink_metadata(self.top.join(&path)), staged) {
            (Ok(metadata), _) if !metadata.is_file() => return edited("is no regular file"),
            (there, None) => there.is_ok(),
            // a sparse checkout may leave it out
            (Err(_), Some(_)) => !self.ask(["ls-files", "-t", "--", &path])?.starts_with('S'),
            (Ok(_), Some(blob)) => {
                let index = self.copy_of_index(scratch)?;
                let anew = format!("{mode},{blob},{path}");
                let _ = self.by(&index).args(["update-index", "-q", "--cacheinfo", &anew, "--refresh"]).output(String::new, None);
                let differ = self.by(&index).args(["diff-files", "--name-only", "--", &path]);
                !differ.output(|| format!("compare {path} with the index"), None)?.is_empty()
            }
        };
        if uncommitted { edited("has uncommitted changes") } else { Ok(()) }
    }

    /// Copies the index to a file in a directory; returns that.
    fn copy_of_index(&self, directory: &Path) -> Result<PathBuf> {
        let index = directory.join("index");
        savepoint::copy_index(&self.git_directory.join("index"), &index).map(|()| index)
    }

    /// git with another index than the user's.
    fn by(&self, index: &Path) -> Program {
        // a link that was made to a file, and is gone, is no edit; nothing is to be written beside the index
        self.git().env("GIT_INDEX_FILE", index).args(["-c", "core.trustctime=false"])
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
        files::clear(scratch).context(doing)?;
        let private = || self.git().env("GIT_INDEX_FILE", scratch);
        let blob = text(self.git().args(["hash-object", "-w", "--stdin"]), Some(lock))?;
        text(private().args(["read-tree", base]), None)?;
        let entry = format!("100644,{blob},{}", self.lock_file());
        text(private().args(["update-index", "--add", "--cacheinfo", &entry]), None)?;
        let tree = text(private().args(["write-tree"]), None)?;
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
        files::clear(scratch).context(doing)?;
        let private = || self.git().env("GIT_INDEX_FILE", scratch);
        let add = private().arg("--git-dir").arg(&self.git_directory).arg("--work-tree").arg(directory);
        add.args(AS_IT_IS).args(["add", "--all", "--force", "."]).directory(directory).output(doing, None)?;
        let tree = private().args(["write-tree"]).output(doing, None).map(|bytes| line(&bytes))?;
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
        let index = directory.with_extension("index");
        for left in [&index, &index.with_extension("index.lock")] {
            files::clear(left).context(doing)?;
        }
        // not by git archive, which obeys the attributes of what it packs
        let private = || {
            let git = self.git().env("GIT_INDEX_FILE", &index).arg("--git-dir").arg(&self.git_directory);
            git.arg("--work-tree").arg(directory).args(AS_IT_IS).directory(directory)
        };
        private().args(["read-tree", commit]).output(doing, None)?;
        private().args(["checkout-index", "--all"]).output(doing, None)?;
        fs::remove_file(&index).context(doing)?;
        let touch = Program::new("find").args([".", "-exec", "touch", "--no-dereference", "--date=@0", "{}", "+"]);
        touch.directory(directory).output(doing, None).map(drop)
    }

    /// The message of the newest commit in the history of `commit` with a line that `pattern`, an
    /// extended regular expression, matches.
    pub fn message(&self, commit: &str, pattern: &str) -> Result<Option<String>> {
        let message = self.ask(["log", "-1", "--format=%B", "--extended-regexp", "--grep", pattern, commit])?;
        Ok(Some(message).filter(|message| !message.is_empty()))
    }

    /// Keeps a commit under a ref of ours, so that git does not collect it as garbage.
    pub fn keep(&self, reference: &str, commit: &str) -> Result<()> {
        unlock(&self.git_directory, reference);
        // no reflog for it, whatever the user's setting
        self.ask(["-c", "core.logAllRefUpdates=true", "update-ref", reference, commit]).map(drop)
    }

    /// Fetches the branch's upstream into `reference`. Returns the commit to start from: the
    /// upstream's, or HEAD where that is ahead. `memory` is a file: see [`Upstream`].
    pub fn fetch_upstream(&self, reference: &str, memory: &Path, instance: &str) -> Result<String> {
        let upstream = self.upstream(memory)?;
        let Upstream { remote, branch, .. } = &upstream;
        unlock(&self.git_directory, reference);
        let fetch =
            self.git().args(["-c", "fetch.writeCommitGraph=false", "fetch", "--quiet", "--no-tags", "--no-prune", "--no-prune-tags"]);
        let fetch =
            fetch.args(["--recurse-submodules=no", "--no-write-fetch-head", "--refmap=", remote, &format!("+{branch}:{reference}")]);
        self.guarded(instance, &self.branch, || fetch.run(NETWORK_LIMIT, || format!("fetch {branch} from {remote}"))?.success())?;
        let theirs = self.ask(["rev-parse", reference])?;
        let doing = || format!("pull {branch} from {remote}");
        if let Some(withdrawn) = self.withdrawn(&upstream, &theirs, &self.head) {
            let what = format!("it has withdrawn {withdrawn}, which {} still has; reset or rebase it", self.branch);
            return Err(what).context(doing);
        }
        let base = if self.contains(&theirs, &self.head) {
            theirs.clone()
        } else if self.contains(&self.head, &theirs) {
            self.head.clone()
        } else {
            return Err(format!("{} has other commits; merge or rebase them", self.branch)).context(doing);
        };
        upstream.remember(memory, &theirs)?;
        Ok(base)
    }

    /// Sends a commit to the branch's upstream, unless that has withdrawn some of it. Never overwrites
    /// what others have sent.
    pub fn push(&self, commit: &str, memory: &Path, instance: &str) -> Result<()> {
        let upstream = self.upstream(memory)?;
        let Upstream { remote, branch, .. } = &upstream;
        let doing = || format!("push {commit} to {branch} of {remote}");
        let mut push = self.git().args(["push", "--quiet"]);
        if upstream.last.is_some() {
            let listed = self.git().args(["ls-remote", remote, branch]).run(LOOK_LIMIT, doing)?;
            let theirs = listed.tail.iter().find_map(|line| line.strip_suffix(branch)).unwrap_or_default().trim().to_owned();
            listed.success()?;
            if self.contains(commit, &theirs) {
                if let Some(withdrawn) = self.withdrawn(&upstream, &theirs, commit) {
                    return Err(format!("it has withdrawn {withdrawn}, which {} still has; reset or rebase it", self.branch))
                        .context(doing);
                }
                // it must still be there by then; what comes after it is no force
                push = push.arg(format!("--force-with-lease={branch}:{theirs}"));
            }
        }
        let push = push.args([remote, &format!("{commit}:{branch}")]);
        // git remembers what it has sent
        let sent = self.ask(["rev-parse", "--symbolic-full-name", "@{upstream}"]).unwrap_or_else(|_| self.branch.clone());
        self.guarded(instance, &sent, || push.run(NETWORK_LIMIT, doing)?.success())?;
        upstream.remember(memory, commit)
    }

    /// The newest commit of `ours` that the upstream has had before, and has no longer.
    fn withdrawn(&self, upstream: &Upstream, theirs: &str, ours: &str) -> Option<String> {
        let common = self.ask(["merge-base", upstream.last.as_deref()?, ours]).ok()?;
        (!self.contains(theirs, &common)).then_some(common)
    }

    fn upstream(&self, memory: &Path) -> Result<Upstream> {
        let name = self.branch.trim_start_matches("refs/heads/");
        let setting = |what: &str| self.ask(["config", "--get", &format!("branch.{name}.{what}")]);
        let (Ok(remote), Ok(branch)) = (setting("remote"), setting("merge")) else {
            return Err(Error::new(format!(
                "Failed to find the upstream of {name}: it has none; set it with git branch --set-upstream-to"
            )));
        };
        let known = fs::read_to_string(memory).unwrap_or_default();
        let last = known.strip_prefix(&format!("{remote} {branch} ")).map(String::from);
        let last = last.or_else(|| self.ask(["rev-parse", "--verify", "--quiet", &format!("{name}@{{upstream}}")]).ok());
        Ok(Upstream { remote, branch, last })
    }

    /// Has what a commit's files are, in a clone that fetches objects as git needs them: nix does not.
    pub fn complete(&self, commit: &str) -> Result<()> {
        let Ok(promisors) = self.ask(["config", "--name-only", "--type=bool", "--get-regexp", r"^remote\..*\.promisor$"]) else {
            return Ok(());
        };
        let remote = promisors.lines().next().unwrap_or_default();
        let remote = remote.trim_start_matches("remote.").trim_end_matches(".promisor");
        let doing = || format!("fetch the files of {commit} from {remote}");
        // what is below a tree is known when the tree is there
        loop {
            let all = self.git().args(["rev-list", "--objects", "--no-walk", "--no-object-names", "--missing=print", commit]);
            let all = all.output(doing, None)?;
            let missing: Vec<_> = all.split(|byte| *byte == b'\n').filter_map(|line| line.strip_prefix(b"?")).map(line).collect();
            if missing.is_empty() {
                return Ok(());
            }
            for some in missing.chunks(1000) {
                let fetch = self.git().args(["-c", "fetch.negotiationAlgorithm=noop", "fetch", "--quiet", "--no-tags", "--refmap="]);
                let fetch = fetch.args(["--recurse-submodules=no", "--no-write-fetch-head", "--filter=blob:none", remote]);
                fetch.args(some).run(NETWORK_LIMIT, doing)?.success()?;
            }
        }
    }

    /// Whether `descendant` is `commit` or comes after it.
    pub fn contains(&self, descendant: &str, commit: &str) -> bool {
        self.ask(["merge-base", "--is-ancestor", commit, descendant]).is_ok()
    }

    /// Fails if going from HEAD to `commit` would have to overwrite an uncommitted edit or an
    /// untracked file, or if there would be no way back; changes nothing. `scratch` is a directory.
    pub fn check_forward(&self, commit: &str, instance: &str, scratch: &Path) -> Result<()> {
        let files = self.changed_files(commit)?;
        let savepoint = self.savepoint(instance);
        // git would overwrite those that it ignores
        let removed: BTreeSet<_> = gather(files.iter().filter(|file| file.before).map(|file| file.path.as_path()));
        let new = files.iter().filter(|file| !file.before && file.after);
        if let Some(path) = new.into_iter().find_map(|file| savepoint.in_the_way(&file.path, &removed)) {
            let path = path.display();
            return Err(Error::new(format!("Failed to go from {} to {commit}: {path} is in the way; move or commit it", self.head)));
        }
        let index = self.git_directory.join("index");
        let lock = index.with_extension("lock");
        if lock.symlink_metadata().is_ok() {
            let what = "another git is at work there, or has left that file behind; remove it then";
            return Err(Error::new(format!("Failed to lock {}: {} exists: {what}", index.display(), lock.display())));
        }
        savepoint.check(&self.branch, &files)?;
        let index = self.copy_of_index(scratch)?;
        self.refresh(&index);
        let check = self.by(&index).args(["read-tree", "-n", "-m", "-u", &self.head, commit]);
        check.output(|| format!("go from {} to {commit} without touching your edits", self.head), None).map(drop)
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
    fn refresh(&self, index: &Path) {
        // its status says whether files were edited
        let _ = self.by(index).args(["update-index", "-q", "--refresh"]).output(String::new, None);
    }

    /// Fast-forwards the branch, the index and the working tree from HEAD to `commit`, or changes
    /// nothing. While the files change, the branch is locked at HEAD, so nobody can commit between.
    pub fn forward(&self, commit: &str, instance: &str) -> Result<()> {
        let savepoint = self.savepoint(instance);
        let files = self.changed_files(commit)?;
        let made = savepoint.note_locks(&self.branch).and_then(|()| savepoint.make(&self.head, commit, &self.branch, &files));
        fault::point("accept: saved");
        let mut begun = false;
        let forwarded = made.and_then(|()| {
            self.update_branch(commit, &savepoint, || {
                fault::point("accept: branch locked");
                savepoint.lock_index()?;
                savepoint.copy_index()?;
                savepoint.begin()?;
                self.refresh(&savepoint.index());
                let read = self.by(&savepoint.index()).args(["read-tree", "-m", "-u", &self.head, commit]);
                let read = read.output(|| format!("go from {} to {commit}", self.head), None);
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
                Ok(now) if now == commit => log::warn!("{error}; but the branch has been moved."),
                Ok(_) => return self.go_back(&savepoint).and(Err(error)),
                // nobody knows: that is for the next run to find out
                Err(_) => return Err(error),
            },
            Err(error) => return self.end(&savepoint, &files).and(Err(error)),
            Ok(()) => fault::point("accept: branch moved"),
        }
        if let Err(error) = savepoint.install_index().and_then(|()| savepoint.discard()) {
            log::warn!("{error}.");
        }
        Ok(())
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
            log::warn!("Going back from {}, to which {} was being fast-forwarded ...", cut_off.to, self.branch);
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
                let update = self.by(&savepoint.index()).args(["-c", "core.trustctime=true", "update-index", "-q"]).args(arguments);
                let paths = if arguments.len() > 1 { &skipped[..] } else { &[] };
                // its status says whether files were edited
                let _ = update.args(paths).output(String::new, None);
            }
            savepoint.install_index()?;
        }
        savepoint.discard()
    }

    fn savepoint(&self, instance: &str) -> Savepoint {
        Savepoint::of(&self.top, &self.git_directory, instance)
    }

    /// Does something to a ref by which git, if it is killed, may leave locks behind, and removes those.
    fn guarded<T>(&self, instance: &str, reference: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let savepoint = self.savepoint(instance);
        savepoint.note_locks(reference)?;
        let done = work();
        if done.as_ref().is_err_and(was_killed) {
            savepoint.remove_locks()?;
        }
        savepoint.discard().and(done)
    }

    /// What differs between HEAD and a commit.
    fn changed_files(&self, commit: &str) -> Result<Vec<Changed>> {
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
        let mut git = git.talk(Some(File::create(&errors).context(doing)?))?;
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
        if ended.as_ref().is_err_and(|error| error.to_string().starts_with(KILLED)) {
            savepoint.remove_locks()?;
        }
        done?;
        let explain = |error: std::io::Error| {
            let said = fs::read_to_string(&errors).unwrap_or_default();
            let said = reason(&said.lines().map(String::from).collect::<Vec<_>>());
            format!("git {error}{}", said.map(|said| format!(": {said}")).unwrap_or_default())
        };
        ended.and(asked).map_err(explain).context(doing)
    }

    /// Removes what no ref leads to: commits that have come to nothing.
    pub fn prune(&self) -> Result<()> {
        self.ask(["prune", "--expire=now"]).map(drop)
    }

    fn git(&self) -> Program {
        git(&self.top)
    }

    fn ask<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Result<String> {
        let arguments: Vec<&str> = arguments.into_iter().collect();
        ask(&self.top, arguments.iter(), || format!("run git {} in {}", arguments.join(" "), self.top.display()))
    }
}

/// What a branch follows. What it was when it was seen last is kept in a file, by which a commit that is
/// withdrawn is told from one that has not been sent yet.
struct Upstream {
    remote: String,
    branch: String,
    last: Option<String>,
}

impl Upstream {
    fn remember(&self, memory: &Path, commit: &str) -> Result<()> {
        let text = format!("{} {} {commit}", self.remote, self.branch);
        if fs::read_to_string(memory).is_ok_and(|known| known == text) {
            return Ok(());
        }
        files::write(memory, text.as_bytes(), 0o600).context(|| format!("write {}", memory.display()))
    }
}

/// Makes a repository of our own where there is none yet, with a first commit that holds nothing. It
/// gets its name when it is whole; what is there without a commit is what an attempt has left.
pub fn create(instance: &Instance) -> Result<()> {
    let place = &instance.flake_path;
    let doing = || format!("make the repository {}", place.display());
    let (new, git_directory) = (place.join(".new"), place.join(".git"));
    if !place.is_dir() {
        files::clear(place).context(doing)?;
    }
    files::clear(&new).context(doing)?;
    if place.is_dir() && ask(place, ["rev-parse", "--verify", "--quiet", "HEAD"], doing).is_ok() {
        // nobody else's git is at work there
        return remove_locks(&git_directory).and_then(|()| take_as_it_is(&git_directory)).context(doing);
    }
    fs::create_dir_all(&new).context(doing)?;
    ask(&new, ["init", "--quiet", "--initial-branch=main", "."], doing)?;
    take_as_it_is(&new.join(".git")).context(doing)?;
    let commit = git(&new).args(["commit", "--quiet", "--no-gpg-sign", "--allow-empty", "--message=nothing yet"]);
    by(&instance.author, commit).output(doing, None)?;
    let moved = files::clear(&git_directory).and_then(|()| fs::rename(new.join(".git"), &git_directory));
    moved.and_then(|()| files::sync(place)).and_then(|()| files::clear(&new)).context(doing)
}

fn remove_locks(directory: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "lock") {
            files::clear(&path)?;
        } else if path.is_dir() && !path.is_symlink() {
            remove_locks(&path)?;
        }
    }
    Ok(())
}

/// Has what is written be for others, too, as `core.sharedRepository` says.
fn share(setting: &str) {
    let files = match setting {
        "group" | "true" | "yes" | "on" | "1" | "all" | "world" | "everybody" | "2" | "3" => 0o664,
        octal => match u32::from_str_radix(octal, 8) {
            Ok(mode) if octal.starts_with('0') && mode > 0 => mode & 0o666,
            _ => return,
        },
    };
    // where files can be read, directories can be entered
    umask(Mode::from_bits_truncate(0o777 & !(files | (files & 0o444) >> 2)));
}

/// Has a repository take all files as they are, whatever attributes are committed beside them: what is
/// checked out is what was published, and never looks edited.
fn take_as_it_is(git_directory: &Path) -> std::io::Result<()> {
    const ATTRIBUTES: &[u8] = b"* -text !eol !ident !filter !working-tree-encoding\n";
    let path = git_directory.join("info/attributes");
    if fs::read(&path).is_ok_and(|there| there == ATTRIBUTES) {
        return Ok(());
    }
    fs::create_dir_all(git_directory.join("info")).and_then(|()| files::write(&path, ATTRIBUTES, 0o644))
}

/// Has a program of git's write in this name.
fn by(author: &Author, program: Program) -> Program {
    let program = program.env("GIT_AUTHOR_NAME", &author.name).env("GIT_AUTHOR_EMAIL", &author.mail);
    program.env("GIT_COMMITTER_NAME", &author.name).env("GIT_COMMITTER_EMAIL", &author.mail)
}

/// Removes a ref of ours, if it is there, in whatever state the repository is.
pub fn drop_reference(instance: &Instance, reference: &str, name: &str) -> Result<()> {
    let place = &instance.flake_path;
    let doing = || format!("drop {reference}");
    let git_directory = PathBuf::from(ask(place, ["rev-parse", "--absolute-git-dir"], doing)?);
    unlock(&git_directory, reference);
    // nobody else writes it; git would lock all refs for this
    let file = git_directory.join(reference);
    files::clear(&file).context(doing)?;
    let remove_directory = || {
        if let Some(directory) = file.parent() {
            // unless there are refs of other instances; a disk may fail once
            let _ = fs::remove_dir(directory).or_else(|_| fs::remove_dir(directory));
        }
    };
    remove_directory();
    if ask(place, ["rev-parse", "--verify", "--quiet", reference], doing).is_err() {
        return Ok(());
    }
    // it is among the packed ones
    let drop_it = || {
        let dropped = ask(place, ["update-ref", "-d", reference], doing);
        remove_directory();
        dropped.map(drop)
    };
    let savepoint = Savepoint::of(place, &git_directory, name);
    if savepoint.exists() {
        return drop_it();
    }
    savepoint.note_locks(reference)?;
    let dropped = drop_it();
    if dropped.as_ref().is_err_and(was_killed) {
        savepoint.remove_locks()?;
    }
    savepoint.discard().and(dropped)
}

/// Removes the lock of a ref of ours: nobody else writes it.
fn unlock(git_directory: &Path, reference: &str) {
    let _ = files::clear(&git_directory.join(format!("{reference}.lock")));
}

/// The same error, with what mends it where files of somebody else's are the cause.
pub fn explain(instance: &Instance, error: Error) -> Error {
    const WORDS: [&str; 4] = ["permission denied", "operation not permitted", "insufficient permission", "dubious ownership"];
    let said = error.to_string().to_ascii_lowercase();
    let is_about_access = WORDS.iter().any(|words| said.contains(words));
    let top = fs::canonicalize(&instance.flake_path).unwrap_or_else(|_| instance.flake_path.clone());
    let Some((path, owner)) = Some(()).filter(|()| is_about_access).and_then(|()| foreign_file(&top)) else { return error };
    let owner = User::from_uid(owner.into()).ok().flatten().map_or(format!("user {owner}"), |owner| owner.name);
    let user = &instance.user;
    let (path, top) = (path.display(), top.display());
    let message = format!("{error}; {path} belongs to {owner}, not to {user}: run chown -R {user}: {top}");
    // git's advice would be another one
    let tail = if said.contains("dubious ownership") { Vec::new() } else { error.tail };
    Error::new(message).with_tail(tail)
}

/// The first file in a repository that belongs to somebody else, and to whom.
fn foreign_file(path: &Path) -> Option<(PathBuf, u32)> {
    let metadata = fs::symlink_metadata(path).ok()?;
    if metadata.uid() != geteuid().as_raw() {
        return Some((path.to_owned(), metadata.uid()));
    }
    let entries = if metadata.is_dir() { fs::read_dir(path).ok()? } else { return None };
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    paths.iter().find_map(|path| foreign_file(path))
}

/// What git said, up to what it died of: the cause is often in the line before.
fn reason(tail: &[String]) -> Option<String> {
    let end =
        tail.iter().position(|line| line.starts_with("fatal: ")).or_else(|| tail.iter().rposition(|line| line.starts_with("error: ")))?;
    let said = tail[..=end].iter().map(|line| line.trim()).filter(|line| !line.is_empty() && !line.starts_with("hint: "));
    let said: Vec<_> = said.map(|line| line.trim_end_matches(['.', '\r'])).collect();
    Some(said[said.len().saturating_sub(3)..].join("; "))
}

/// Whether git has had no chance to remove its locks.
fn was_killed(error: &Error) -> bool {
    error.to_string().contains(KILLED)
}

/// Whether git has found something in its way, and so has changed nothing.
fn is_refusal(error: &Error) -> bool {
    let words = ["Entry '", "Refusing to remove '", "Untracked working tree file '", "Updating '"];
    error.tail.iter().filter_map(|line| line.strip_prefix("error: ")).any(|line| words.iter().any(|words| line.starts_with(words)))
}

/// git in a directory, with settings of ours.
pub fn git(directory: &Path) -> Program {
    let settings = [
        "core.hooksPath=/dev/null",
        "core.fsmonitor=false",
        "core.fsync=all",
        "gc.auto=0",
        "maintenance.auto=false",
        // no part of an index beside it
        "core.splitIndex=false",
        // by set-group-id bits, which the sandbox forbids; our umask does the same
        "core.sharedRepository=umask",
    ];
    Program::new("git")
        .reason(reason)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Directory;
    use std::os::unix::fs::PermissionsExt;
    use std::time::SystemTime;

    /// What a pull may change: before, and afterwards.
    const CHANGES: [(&str, &str); 8] = [
        ("echo 1 > plain; chmod 755 plain", "echo 2 > plain; mkdir -p new/deep/er; echo 2 > new/deep/er/file; echo 2 > top"),
        ("echo 1 > plain", "rm plain; mkdir -p plain/a/b; echo 2 > plain/a/b/x; echo 2 > plain/c"),
        ("mkdir -m 700 -p d/e; echo 1 > d/x; echo 1 > d/e/y", "rm -r d; echo 2 > d"),
        ("echo 1 > plain; ln -s plain link", "rm link; mkdir -p link/y; echo 2 > link/y/z"),
        ("mkdir d; echo 1 > d/z; ln -s d link", "rm link; mkdir link; echo 2 > link/z; echo 2 > link/new"),
        ("mkdir -p d/e; echo 1 > d/e/x", "rm -r d; ln -s plain d"),
        ("mkdir -p a/b/c; echo 1 > a/b/c/only", "rm -r a; mkdir b; echo 2 > b/x"),
        (
            "printf 1 > \"$(printf 'odd\\377\\nname')\"; echo 1 > ' file'",
            "printf 2 > \"$(printf 'odd\\377\\nname')\"; mkdir \"$(printf '\\376')\"; echo 2 > \"$(printf '\\376')\"/x",
        ),
    ];

    fn shell(directory: &Path, script: &str) -> String {
        let program = Program::new("sh").args(["-euc", script]).directory(directory).env("GIT_CONFIG_GLOBAL", "/dev/null");
        let program = program.env("GIT_AUTHOR_NAME", "a").env("GIT_AUTHOR_EMAIL", "a").env("GIT_COMMITTER_NAME", "a");
        line(&program.env("GIT_COMMITTER_EMAIL", "a").output(|| script.into(), None).unwrap())
    }

    /// A repository that stands before a change, and the commit after it.
    fn repository(directory: &Directory, before: &str, after: &str) -> (Repository, String) {
        let top = directory.path().to_owned();
        let commit = "git add -A -f; git commit -qm x";
        shell(&top, &format!("git init -qb feature/main; mkdir kept; echo 1 > kept/file; {before}; {commit}; {after}; {commit}"));
        let to = shell(&top, "git rev-parse HEAD");
        // empty directories are in no commit
        shell(&top, "git reset -q --hard HEAD^; test ! -e d/e || mkdir -m 700 -p d/empty/one");
        let head = shell(&top, "git rev-parse HEAD");
        let git_directory = top.join(".git");
        (Repository { top, prefix: String::new(), branch: "refs/heads/feature/main".into(), head, git_directory }, to)
    }

    type Found = Vec<(PathBuf, u32, SystemTime, Vec<u8>)>;

    /// All that there is, but for objects.
    fn snapshot(place: &Path) -> Found {
        let mut found = Vec::new();
        for entry in fs::read_dir(place).unwrap() {
            let path = entry.unwrap().path();
            let metadata = path.symlink_metadata().unwrap();
            let mut one = |time, contents| found.push((path.clone(), metadata.permissions().mode(), time, contents));
            if metadata.is_symlink() {
                one(SystemTime::UNIX_EPOCH, fs::read_link(&path).unwrap().into_os_string().into_encoded_bytes());
            } else if metadata.is_file() {
                one(metadata.modified().unwrap(), fs::read(&path).unwrap());
            } else if !path.ends_with(".git/objects") {
                one(SystemTime::UNIX_EPOCH, Vec::new());
                found.extend(snapshot(&path));
            }
        }
        found.sort();
        found
    }

    /// Does what a fast-forward does before git changes files.
    fn begin(repository: &Repository, to: &str) -> (Savepoint, Vec<Changed>) {
        let savepoint = repository.savepoint("app");
        let files = repository.changed_files(to).unwrap();
        savepoint.note_locks(&repository.branch).unwrap();
        savepoint.make(&repository.head, to, &repository.branch, &files).unwrap();
        savepoint.lock_index().unwrap();
        savepoint.copy_index().unwrap();
        savepoint.begin().unwrap();
        repository.refresh(&savepoint.index());
        (savepoint, files)
    }

    fn read_tree(repository: &Repository, savepoint: &Savepoint, to: &str) {
        let read = repository.by(&savepoint.index()).args(["read-tree", "-m", "-u", &repository.head, to]);
        read.output(|| "read".into(), None).unwrap();
    }

    #[test]
    fn a_repository_of_our_own_is_made_whatever_is_there() {
        let directory = Directory::new();
        let place = directory.path().join("repository");
        let instance = format!(
            r#"{{"author": "a <a>", "flags": [], "flakePath": "{0}", "flakeRef": "{0}#x", "healthChecks": {{}}, "inputs": [],
            "networkRetries": 0, "onUnitFailure": "rollback", "operation": "switch", "pull": false, "push": false, "rollback": true,
            "timeouts": {{"activate": 1, "build": 1, "prepare": 1}}, "user": "a"}}"#,
            place.display()
        );
        let instance = serde_json::from_str(&instance).unwrap();
        for left in [
            "true",
            "mkdir -p repository/.git; touch repository/.git/config.lock repository/.git/HEAD",
            "git init -q repository; touch repository/.git/index.lock",
            "mkdir -p repository/.new/.git/x",
            "echo > repository",
            "git init -q x; mv x/.git x/y; mkdir repository; mv x/y repository/.git; mkdir -p repository/.git/HEAD.lock/x",
        ] {
            shell(directory.path(), &format!("rm -rf repository; {left}"));
            create(&instance).unwrap();
            assert_eq!(shell(&place, "git status --porcelain; git log --format=%s; ls -A"), "nothing yet\n.git");
            shell(&place, "touch .git/index.lock .git/config.lock .git/refs/heads/main.lock");
            create(&instance).unwrap();
            shell(&place, "git commit -q --allow-empty -m x; git config a.b c");
        }
        drop_reference(&instance, "refs/ekiben/app", "app").unwrap();
        shell(&place, "git update-ref refs/ekiben/app HEAD; touch .git/refs/ekiben/app.lock");
        drop_reference(&instance, "refs/ekiben/app", "app").unwrap();
        shell(&place, "git update-ref refs/ekiben/app HEAD; git pack-refs --all");
        drop_reference(&instance, "refs/ekiben/app", "app").unwrap();
        assert_eq!(shell(&place, "git for-each-ref refs/ekiben; ls -d .git/ekiben* .git/refs/ekiben 2> /dev/null || true"), "");
    }

    #[test]
    fn whatever_upstream_changes_is_followed() {
        for (before, after) in CHANGES {
            let directory = Directory::new();
            let (repository, to) = repository(&directory, before, after);
            let untouched = snapshot(directory.path());
            let scratch = Directory::new();
            repository.check_forward(&to, "app", scratch.path()).unwrap();
            repository.rehearse_forward(&to, scratch.path()).unwrap();
            assert_eq!(snapshot(directory.path()), untouched, "{after}");
            repository.forward(&to, "app").unwrap();
            assert_eq!(
                shell(directory.path(), "git status --porcelain; git rev-parse HEAD; ls -d .git/*.lock .git/ekiben* || true"),
                to,
                "{after}"
            );
        }
    }

    #[test]
    fn a_fast_forward_that_is_cut_off_leaves_nothing() {
        for (number, (before, after)) in CHANGES.into_iter().enumerate() {
            for cut in if number == 0 { 0..7 } else { 1..4 } {
                let directory = Directory::new();
                let (repository, to) = repository(&directory, before, after);
                // the branch is among the packed refs, as after git gc
                shell(directory.path(), "git pack-refs --all");
                let untouched = snapshot(directory.path());
                let (savepoint, files) = begin(&repository, &to);
                if cut == 1 {
                    for file in files.iter().filter(|file| file.before).take(1) {
                        fs::remove_file(directory.path().join(&file.path)).unwrap();
                    }
                }
                if cut >= 2 {
                    read_tree(&repository, &savepoint, &to);
                }
                let half = files.iter().find(|file| file.after && cut == 3).map(|file| directory.path().join(&file.path));
                if let Some(half) = half.filter(|half| half.is_file()) {
                    fs::write(half, "").unwrap();
                }
                if cut >= 4 {
                    shell(directory.path(), "mkdir -p .git/refs/heads/feature; touch .git/HEAD.lock .git/refs/heads/feature/main.lock");
                }
                if cut >= 5 {
                    let entry = format!("{} {to} a <a> 1 +0000\tekiben: fast-forward", repository.head);
                    let entry = if cut == 5 { entry.split_at(50).0.to_owned() } else { entry + "\n" };
                    shell(directory.path(), &format!("printf '{entry}' | tee -a .git/logs/HEAD >> .git/logs/refs/heads/feature/main"));
                }
                repository.recover("app").unwrap();
                let found = snapshot(directory.path());
                let difference = found.iter().find(|one| !untouched.contains(one)).or(untouched.iter().find(|one| !found.contains(one)));
                assert_eq!(difference, None, "{after}, {cut}");
            }
        }
    }

    #[test]
    fn a_fast_forward_that_was_cut_off_at_its_end_is_ended() {
        let directory = Directory::new();
        let (mut repository, to) = repository(&directory, CHANGES[0].0, CHANGES[0].1);
        let (savepoint, _) = begin(&repository, &to);
        read_tree(&repository, &savepoint, &to);
        shell(directory.path(), &format!("git update-ref HEAD {to}"));
        repository.head.clone_from(&to);
        repository.recover("app").unwrap();
        assert_eq!(shell(directory.path(), "git status --porcelain; ls -d .git/*.lock .git/ekiben* 2> /dev/null || true"), "");
    }

    #[test]
    fn what_somebody_has_written_since_stays() {
        let directory = Directory::new();
        let (repository, to) =
            repository(&directory, "echo 1 > file; echo 1 > plain", "echo 2 > file; rm plain; mkdir plain; echo 2 > plain/x; echo 2 > new");
        let (savepoint, _) = begin(&repository, &to);
        read_tree(&repository, &savepoint, &to);
        shell(directory.path(), "echo mine > file; echo mine > plain/mine; echo mine > new");
        repository.recover("app").unwrap();
        assert_eq!(shell(directory.path(), "cat file plain plain.kept-1/mine new"), "mine\n1\nmine\nmine");
        assert_eq!(shell(directory.path(), "git status --porcelain"), " M file\n?? new\n?? plain.kept-1/");
        assert!(!savepoint.exists());
    }

    #[test]
    fn locks_of_others_stay() {
        let directory = Directory::new();
        let (repository, to) = repository(&directory, "echo 1 > file", "echo 2 > file");
        shell(directory.path(), "touch .git/packed-refs.lock");
        begin(&repository, &to);
        // by hand, and then the user's git takes it
        shell(directory.path(), "rm .git/index.lock; touch .git/index.lock .git/HEAD.lock");
        repository.recover("app").unwrap();
        assert_eq!(shell(directory.path(), "ls .git/*.lock"), ".git/index.lock\n.git/packed-refs.lock");
        let refused = repository.check_forward(&to, "app", directory.path()).unwrap_err();
        assert!(refused.to_string().contains("index.lock exists"));
    }

    #[test]
    fn what_is_in_the_way_is_named() {
        for (before, after, edit, named) in [
            ("echo .ig > .gitignore", "echo 2 > .ig", "echo mine > .ig", ".ig is in the way"),
            (
                "mkdir d; echo 1 > d/x; echo .ig > .gitignore",
                "rm -r d; echo 2 > d",
                "mkdir d/e; echo mine > d/e/.ig",
                "d/e/.ig is in the way",
            ),
            ("true > x", "mkdir d; echo 2 > d/x", "echo mine > d", "d is in the way"),
            ("true > x", "mkdir d; echo 2 > d/x", "mkdir away; ln -s away d", "d is in the way"),
            ("echo 1 > x", "echo 2 > x", "echo mine > x", "without touching your edits"),
        ] {
            let directory = Directory::new();
            let (repository, to) = repository(&directory, before, after);
            shell(directory.path(), edit);
            let (untouched, scratch) = (snapshot(directory.path()), Directory::new());
            let refused = repository.check_forward(&to, "app", scratch.path()).unwrap_err();
            assert!(refused.to_string().contains(named), "{refused}");
            assert_eq!(snapshot(directory.path()), untouched);
        }
    }

    #[test]
    fn a_file_that_git_was_told_not_to_look_at_can_be_merged_ever_after() {
        for (bit, tag) in [("--assume-unchanged", "h"), ("--skip-worktree", "S")] {
            for cut in [false, true] {
                let directory = Directory::new();
                let (mut repository, to) = repository(&directory, "echo 1 > file", "echo 2 > file");
                shell(directory.path(), &format!("git update-index {bit} file"));
                let scratch = Directory::new();
                repository.check_forward(&to, "app", scratch.path()).unwrap();
                if cut {
                    let (savepoint, _) = begin(&repository, &to);
                    read_tree(&repository, &savepoint, &to);
                    repository.recover("app").unwrap();
                    assert_eq!(shell(directory.path(), "git ls-files -v file"), format!("{tag} file"));
                } else {
                    repository.forward(&to, "app").unwrap();
                    shell(directory.path(), "git update-index --no-skip-worktree --really-refresh; git reset -q --hard HEAD^");
                    shell(directory.path(), &format!("git update-index {bit} file"));
                    repository.head = shell(directory.path(), "git rev-parse HEAD");
                    // refused in the very moment: git has not changed anything
                    repository
                        .savepoint("app")
                        .make(&repository.head, &to, &repository.branch, &repository.changed_files(&to).unwrap())
                        .unwrap();
                    repository.recover("app").unwrap();
                }
                shell(directory.path(), &format!("git merge -q --ff-only {to}; test $(cat file) = 2"));
            }
        }
    }

    #[test]
    fn the_lock_file_is_clean_if_git_says_so() {
        let scratch = Directory::new();
        for (set_up, edit) in [
            ("true", ""),
            (
                "git config core.autocrlf true; printf '{\\r\\n}\\r\\n' > flake.lock; git -c core.autocrlf=false commit -qam crlf; touch flake.lock",
                "",
            ),
            ("echo >> flake.lock", "has uncommitted changes"),
            ("git update-index --assume-unchanged flake.lock; echo >> flake.lock", "has uncommitted changes"),
            ("git update-index --skip-worktree flake.lock", ""),
            ("git update-index --skip-worktree flake.lock; echo >> flake.lock", "has uncommitted changes"),
            ("echo >> flake.lock; git add .", "has staged changes"),
            ("rm flake.lock", "has uncommitted changes"),
            ("rm flake.lock; ln -s kept flake.lock", "is no regular file"),
        ] {
            let directory = Directory::new();
            let (repository, _) = repository(&directory, "echo '{}' > flake.lock", "true > x");
            shell(directory.path(), set_up);
            let untouched = snapshot(directory.path());
            match repository.check_lock_file_is_clean(scratch.path()) {
                Ok(()) => assert_eq!(edit, "", "{set_up}"),
                Err(error) => assert!(!edit.is_empty() && error.to_string().contains(edit), "{set_up}: {error}"),
            }
            assert_eq!(snapshot(directory.path()), untouched);
        }
    }

    #[test]
    fn the_reason_is_what_git_said_up_to_its_death() {
        let said = |text: &str| reason(&text.lines().map(String::from).collect::<Vec<_>>()).unwrap_or_default();
        assert_eq!(
            said(
                "Host key verification failed.\r\nfatal: Could not read from remote repository.\n\nPlease make sure you have the correct access rights"
            ),
            "Host key verification failed; fatal: Could not read from remote repository"
        );
        assert_eq!(said("error: insufficient permission for x\nhint: y\nerror: z"), "error: insufficient permission for x; error: z");
        assert_eq!(said("no"), "");
    }

    #[test]
    fn what_is_committed_comes_out_as_it_went_in_whatever_it_says_of_itself() {
        let place = Directory::new();
        let (top, source, out) = (place.path().join("repository"), place.path().join("source"), place.path().join("out"));
        let script = "git init -qb main repository; cd repository; git commit -qm nothing --allow-empty; git rev-parse HEAD";
        let head = shell(place.path(), script);
        shell(
            place.path(),
            r"mkdir -p source/sub/deep out; cd source
            printf '* text eol=crlf ident export-subst\nsub export-ignore\nwide working-tree-encoding=UTF-16\n* filter=no\n' > .gitattributes
            printf 'export-ignore' > sub/.gitattributes; echo '*' > .gitignore; printf 'a\r\nb\n' > sub/deep/mixed
            echo '$Id: x$ $Format:%H$' > says; echo wide > wide; touch run; chmod +x run; echo x > 'a b'",
        );
        let (git_directory, branch) = (top.join(".git"), "refs/heads/main".into());
        let repository = Repository { git_directory, prefix: String::new(), branch, head: head.clone(), top };
        let author = Author { name: "a".into(), mail: "a".into() };
        let commit = repository.commit_directory(&head, &source, "release", &author, 0, &place.path().join("index")).unwrap();
        fs::write(place.path().join("out.index.lock"), "").unwrap();
        repository.export(&commit, &out).unwrap();
        let found = shell(place.path(), "diff -r source out; find out -newermt @1; find out -executable -type f; ls");
        assert_eq!(found, "out/run\nindex\nout\nrepository\nsource");
        // nor does it look edited when it is checked out
        take_as_it_is(&repository.git_directory).unwrap();
        repository.forward(&commit, "app").unwrap();
        assert_eq!(shell(place.path(), "diff -r -x .git source repository; git -C repository status --porcelain"), "");
    }
}
