//! Commits as objects: reading them, and making new ones that nothing but a ref of ours leads to.

use std::fs;
use std::path::Path;

use crate::config::Author;
use crate::error::{Context, Result};
use crate::files;
use crate::git::{NETWORK_LIMIT, Repository, line, unlock};
use crate::program::Program;

/// Settings under which no content is changed, and no program run for it, whatever its attributes say.
const AS_IT_IS: [&str; 5] =
    ["-c", "core.autocrlf=false", "-c", "core.attributesFile=/dev/null", "--attr-source=4b825dc642cb6eb9a060e54bf8d69288fbee4904"];

impl Repository {
    /// A file as it is in a commit, if it is there.
    pub fn read_file(&self, commit: &str, path: &str) -> Result<Option<Vec<u8>>> {
        let object = format!("{commit}:{path}");
        if self.look_for(["rev-parse", "--verify", "--quiet", &object])?.is_none() {
            return Ok(None);
        }
        self.git().args(["cat-file", "blob", &object]).output(|| format!("read {object}"), None).map(Some)
    }

    /// A commit's tree.
    pub fn tree(&self, commit: &str) -> Result<String> {
        self.ask(["rev-parse", &format!("{commit}^{{tree}}")])
    }

    /// The subjects of the latest commits that came after `from`, at most `most`.
    pub fn subjects(&self, from: &str, to: &str, most: usize) -> Result<Vec<String>> {
        let log = self.ask(["log", &format!("--max-count={most}"), "--format=%s", &format!("{from}..{to}"), "--"])?;
        Ok(log.lines().map(String::from).collect())
    }

    /// Whether two commits are the same but for who made them, and when.
    pub fn is_same(&self, commit: &str, other: &str) -> bool {
        let contents = |commit: &str| self.ask(["rev-parse", &format!("{commit}^{{tree}}"), &format!("{commit}^@")]).ok();
        contents(commit).is_some_and(|contents_of_it| contents(other) == Some(contents_of_it))
    }

    /// Makes a commit on top of `base` in which only these lock files differ, and returns its name.
    /// `scratch` is a file for a private index.
    pub fn commit_lock_files<'a>(
        &self,
        base: &str,
        locks: impl IntoIterator<Item = (&'a str, &'a [u8])>,
        message: &str,
        author: &Author,
        scratch: &Path,
    ) -> Result<String> {
        let doing = || format!("commit new lock files on top of {base}");
        let text = |program: Program, input| program.output(doing, input).map(|bytes| line(&bytes));
        files::clear(scratch).context(doing)?;
        let private = || self.by_own(scratch);
        text(private().args(["read-tree", base]), None)?;
        for (path, lock) in locks {
            let blob = text(self.git().args(["hash-object", "-w", "--stdin"]), Some(lock))?;
            let known = text(private().args(["ls-files", "--stage", "--", path]), None)?;
            let mode = if known.starts_with("100755") { "100755" } else { "100644" };
            text(private().args(["update-index", "--add", "--cacheinfo", &format!("{mode},{blob},{path}")]), None)?;
        }
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
        let private = || self.by_own(scratch);
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

    /// Has what a commit's files are, in a clone that fetches objects as git needs them: nix does not.
    pub fn complete(&self, commit: &str) -> Result<()> {
        let promisors = self.look_for(["config", "--name-only", "--type=bool", "--get-regexp", r"^remote\..*\.promisor$"])?;
        let mut names = promisors.iter().flat_map(|all| all.lines());
        let Some(remote) = names.find_map(|name| name.strip_prefix("remote.")?.strip_suffix(".promisor")) else {
            return Ok(());
        };
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
    pub fn contains(&self, descendant: &str, commit: &str) -> Result<bool> {
        self.look_for(["merge-base", "--is-ancestor", commit, descendant]).map(|yes| yes.is_some())
    }
}

/// Has a program of git's write in this name.
pub(super) fn by(author: &Author, program: Program) -> Program {
    let program = program.env("GIT_AUTHOR_NAME", &author.name).env("GIT_AUTHOR_EMAIL", &author.mail);
    program.env("GIT_COMMITTER_NAME", &author.name).env("GIT_COMMITTER_EMAIL", &author.mail)
}
