//! How git is called: always as the owner of the repository, whoever has it called.
//!
//! Nothing here touches the working tree, the index or a branch, [`Repository::forward`] apart.
//! Hooks, the file system monitor and prompts are off, optional locks are not taken, and what
//! is written is synced: git does not do so by itself.

pub mod lockfile;

mod forward;
mod objects;
pub mod own;
pub mod patience;
mod savepoint;
pub mod signature;
#[cfg(test)]
mod tests;
mod upstream;

use std::ffi::OsStr;
use std::fs::{self};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::stat::{Mode, umask};
use nix::unistd::{User, geteuid};

use self::savepoint::Savepoint;
use crate::config::Instance;
use crate::error::{Context, Error, Result};
use crate::files;
use crate::gather::sorted;
use crate::program::Program;

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
        fs::read_dir(directory).doing("open", directory)?;
        let doing = || format!("open the repository {place}");
        let formats = [("--show-object-format", "sha1", "objects"), ("--show-ref-format", "files", "refs")];
        let questions = ["rev-parse", "--show-toplevel", "--absolute-git-dir", formats[0].0, formats[1].0, "--show-prefix"];
        // one process, since there are many runs
        let said = ask(directory, questions, doing)?;
        let mut said = said.lines();
        let mut next = || said.next().unwrap_or_default();
        let top = PathBuf::from(next());
        if top != fs::canonicalize(&instance.flake_path).context(|| format!("open {place}"))? {
            return Err(format!("its top is {}; set flakePath to that, and flakeRef to the flake in it", top.display())).context(doing);
        }
        let git_directory = PathBuf::from(next());
        if !git_directory.starts_with(&top) {
            return Err(format!("it is a worktree or submodule of {}; use a clone of its own", git_directory.display())).context(doing);
        }
        for (question, can_read, what) in formats {
            let format = next();
            // an older git does not know other ones
            if format != can_read && format != question {
                let only = format!("it has {what} of format {format}, Nix reads {can_read} only; use a clone of that format");
                return Err(only).context(doing);
            }
        }
        let prefix = next();
        let shared = ask(directory, ["config", "--get-all", "core.sharedRepository"], doing)?;
        // the last one is ours
        if let Some(shared) = shared.lines().rev().nth(1) {
            share(shared);
        }
        let not_now = |why: &str| Err(Error::new(format!("Failed to start from {place}: {why}")));
        // a rebase detaches HEAD, too
        if let Some((_, what)) = UNDER_WAY.iter().find(|(file, _)| git_directory.join(file).exists()) {
            return not_now(&format!("a {what} is in progress; finish or abort it"));
        }
        let commit = || look_for(directory, ["rev-parse", "--verify", "--quiet", "HEAD"], doing);
        // of a file that is empty, as after a crash, git says no more than of one that is not there
        let damaged = "what HEAD stands for cannot be read; see git fsck";
        let Some(branch) = look_for(directory, ["symbolic-ref", "HEAD"], doing)? else {
            return not_now(if commit()?.is_some() { "HEAD is detached; check out a branch" } else { damaged });
        };
        if branch.contains('\u{fffd}') {
            return not_now("the name of its branch is not UTF-8; rename the branch");
        }
        let Some(head) = look_for(directory, ["rev-parse", "--verify", "--quiet", "HEAD^{commit}"], doing)? else {
            if commit()?.is_some() {
                ask(directory, ["rev-list", "--max-count=1", "HEAD"], || format!("start from {place}: {damaged}"))?;
            }
            let is_there = git_directory.join(&branch).exists();
            return not_now(if is_there { damaged } else { "the branch has no commit yet; commit the flake" });
        };
        Ok(Self { prefix: prefix.into(), top, branch, head, git_directory })
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
        let committed = self.look_for(["rev-parse", "--verify", "--quiet", &format!("HEAD:{path}")])?;
        let staged = self.ask(["ls-files", "--stage", "--", &path])?;
        let mut staged = staged.split_whitespace();
        let (mode, staged) = (staged.next().unwrap_or_default(), staged.next().map(String::from));
        if staged != committed {
            return edited("has staged changes");
        }
        let uncommitted = match (fs::symlink_metadata(self.top.join(&path)), staged) {
            (Ok(metadata), _) if !metadata.is_file() => return edited("is not a regular file"),
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
        savepoint::index::copy_index(&self.git_directory.join("index"), &index).map(|()| index)
    }

    /// git with another index than the user's.
    fn by(&self, index: &Path) -> Program {
        // a link that was made to a file, and is gone, is no edit; nothing is to be written beside the index
        self.by_own(index).args(["-c", "core.trustctime=false"])
    }

    /// git with an index that nobody else uses: what one that was killed has left there locks nobody out.
    fn by_own(&self, index: &Path) -> Program {
        let _ = fs::remove_file(index.with_extension("lock"));
        self.git().env("GIT_INDEX_FILE", index)
    }

    /// Removes what no ref leads to: commits that have come to nothing.
    pub fn prune(&self) -> Result<()> {
        self.ask(["prune", "--expire=now"]).map(drop)
    }

    fn savepoint(&self, instance: &str) -> Savepoint {
        Savepoint::of(&self.top, &self.git_directory, instance)
    }

    fn git(&self) -> Program {
        git(&self.top)
    }

    fn ask<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Result<String> {
        let arguments: Vec<&str> = arguments.into_iter().collect();
        ask(&self.top, arguments.iter(), || format!("run git {} in {}", arguments.join(" "), self.top.display()))
    }

    /// The same where there may be no answer.
    fn look_for<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Result<Option<String>> {
        answered(self.ask(arguments))
    }
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
    umask(Mode::from_bits_truncate(0o777 & !(files | ((files & 0o444) >> 2))));
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
            // unless there are refs of other instances
            let _ = files::insist(|| fs::remove_dir(directory));
        }
    };
    remove_directory();
    if look_for(place, ["rev-parse", "--verify", "--quiet", reference], doing)?.is_none() {
        return Ok(());
    }
    // it is among the packed ones
    let drop_it = || {
        let dropped = ask(place, ["update-ref", "-d", reference], doing);
        remove_directory();
        dropped.map(drop)
    };
    let savepoint = Savepoint::of(place, &git_directory, name);
    if savepoint.exists() { drop_it() } else { savepoint.guard(reference, drop_it) }
}

/// Removes the lock of a ref of ours, and what has it stand for another ref, which would be changed: nobody else writes it.
fn unlock(git_directory: &Path, reference: &str) {
    let file = git_directory.join(reference);
    let _ = files::clear(&git_directory.join(format!("{reference}.lock")));
    if file.is_symlink() || fs::read(&file).is_ok_and(|text| text.starts_with(b"ref:")) {
        let _ = files::clear(&file);
    }
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
    let tail = if said.contains("dubious ownership") { Vec::new() } else { error.tail().to_vec() };
    Error::new(message).with_tail(tail)
}

/// The first file in a repository that belongs to somebody else, and to whom.
fn foreign_file(path: &Path) -> Option<(PathBuf, u32)> {
    let metadata = fs::symlink_metadata(path).ok()?;
    if metadata.uid() != geteuid().as_raw() {
        return Some((path.to_owned(), metadata.uid()));
    }
    let entries = if metadata.is_dir() { fs::read_dir(path).ok()? } else { return None };
    sorted(entries.flatten().map(|entry| entry.path())).iter().find_map(|path| foreign_file(path))
}

/// What git said, up to what it died of: the cause is often in the line before.
fn reason(tail: &[String]) -> Option<String> {
    let end =
        tail.iter().position(|line| line.starts_with("fatal: ")).or_else(|| tail.iter().rposition(|line| line.starts_with("error: ")))?;
    let end = if tail[end].ends_with(':') { (end + 1).min(tail.len() - 1) } else { end };
    let said = tail[..=end].iter().map(|line| line.trim()).filter(|line| !line.is_empty() && !line.starts_with("hint: "));
    let said: Vec<_> = said.map(|line| line.trim_end_matches(['.', '\r'])).collect();
    Some(said[said.len().saturating_sub(3)..].join("; "))
}

/// What git would run hooks for, which since 2.54 can stand in its configuration.
const HOOKS: [&str; 8] = [
    "reference-transaction",
    "post-index-change",
    "post-checkout",
    "pre-push",
    "pre-commit",
    "prepare-commit-msg",
    "commit-msg",
    "post-commit",
];

/// git in a directory, with settings of ours.
pub fn git(directory: &Path) -> Program {
    let settings = [
        "core.hooksPath=/dev/null",
        "core.fsmonitor=false",
        "core.fsync=all",
        // milliseconds, for another git that is at work; that of the index has no such setting
        "core.filesRefLockTimeout=10000",
        "core.packedRefsTimeout=10000",
        "gc.auto=0",
        "maintenance.auto=false",
        // what is read is to be the same whatever the user likes to read
        "i18n.logOutputEncoding=UTF-8",
        "log.showSignature=false",
        "status.showUntrackedFiles=normal",
        // what is written or sent, too: this much, in formats that Nix reads
        "i18n.commitEncoding=UTF-8",
        "init.defaultObjectFormat=sha1",
        "init.defaultRefFormat=files",
        "push.followTags=false",
        "submodule.recurse=false",
        // no part of an index beside it
        "core.splitIndex=false",
        // by set-group-id bits, which the sandbox forbids; our umask does the same
        "core.sharedRepository=umask",
    ];
    Program::new("git")
        .reason(reason)
        .args(settings.iter().flat_map(|setting| ["-c", setting]))
        .args(HOOKS.iter().flat_map(|event| ["-c".into(), format!("hook.{event}.enabled=false")]))
        .by_ssh()
        .env("GIT_OPTIONAL_LOCKS", "0")
        .env("GIT_TERMINAL_PROMPT", "0")
        // an object is what its name says, as it is to Nix and to whoever it is pushed to
        .env("GIT_NO_REPLACE_OBJECTS", "1")
        .env("GIT_GRAFT_FILE", "")
        .env("LC_ALL", "C")
        .directory(directory)
}

fn ask<A: AsRef<OsStr>>(directory: &Path, arguments: impl IntoIterator<Item = A>, doing: impl Fn() -> String) -> Result<String> {
    git(directory).args(arguments).output(doing, None).map(|bytes| line(&bytes))
}

fn look_for<'a>(directory: &Path, arguments: impl IntoIterator<Item = &'a str>, doing: impl Fn() -> String) -> Result<Option<String>> {
    answered(ask(directory, arguments, doing))
}

/// A git that fails says no; one that was killed, or that this machine has let down, says nothing.
fn answered(answer: Result<String>) -> Result<Option<String>> {
    match answer {
        Err(error) if !error.is_transient() => Ok(None),
        other => other.map(Some),
    }
}

fn line(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim_end().to_owned()
}
