//! What a branch follows: fetching it, and pushing what is deployed.

use std::fs;
use std::path::Path;

use crate::error::{Context, Result};
use crate::files;
use crate::git::{LOOK_LIMIT, NETWORK_LIMIT, Repository, unlock};

/// What a branch follows. What it was when it was seen last is kept in a file, by which a commit that is
/// withdrawn is told from one that has not been sent yet.
struct Upstream {
    remote: String,
    branch: String,
    last: Option<String>,
}

impl Upstream {
    fn remember(&self, memory: &Path, commit: &str) -> Result<()> {
        files::put(memory, self.text(commit).as_bytes(), 0o600)
    }

    fn text(&self, commit: &str) -> String {
        format!("{} {} {commit}", self.remote, self.branch)
    }
}

impl Repository {
    /// Whether the branch's upstream is where it was when it was fetched or sent to last, as its server says.
    pub fn knows_upstream(&self, memory: &Path) -> Result<bool> {
        let upstream = self.upstream(memory)?;
        let theirs = self.listed(&upstream, || format!("look at {} of {}", upstream.branch, upstream.remote))?;
        Ok(fs::read_to_string(memory).is_ok_and(|known| known == upstream.text(&theirs)))
    }

    /// The commit of the upstream, as its server says; empty if it has none.
    fn listed(&self, Upstream { remote, branch, .. }: &Upstream, doing: impl Fn() -> String) -> Result<String> {
        let listed = self.git().args(["ls-remote", remote, branch]).run(LOOK_LIMIT, doing)?;
        // others may end in the same; a tab has become a space
        let theirs = listed.tail.iter().find_map(|line| line.strip_suffix(branch)?.strip_suffix(' ')).unwrap_or_default().to_owned();
        listed.success().map(|()| theirs)
    }

    /// Fetches the branch's upstream into `reference`. Returns the commit to start from: the
    /// upstream's, or HEAD where that is ahead. `memory` is a file: see [`Upstream`].
    pub fn fetch_upstream(&self, reference: &str, memory: &Path, instance: &str) -> Result<String> {
        let upstream = self.upstream(memory)?;
        let Upstream { remote, branch, .. } = &upstream;
        unlock(&self.git_directory, reference);
        // git 2.48 and 2.49 would make refs/remotes/<remote>/HEAD; a path has no settings
        let no_head = Some(format!("--config-env=remote.{remote}.followRemoteHEAD=NEVER")).filter(|_| !remote.starts_with('/'));
        // nor is there a reflog of it, whatever the user's setting
        let settings = ["-c", "fetch.writeCommitGraph=false", "-c", "core.logAllRefUpdates=true"];
        let fetch = self.git().env("NEVER", "never").args(no_head).args(settings).args(["fetch", "--quiet"]);
        let fetch = fetch.args(["--no-tags", "--no-prune", "--no-prune-tags", "--recurse-submodules=no", "--no-write-fetch-head"]);
        let fetch = fetch.args(["--refmap=", remote, &format!("+{branch}:{reference}")]);
        self.savepoint(instance).guard(&self.branch, || fetch.run(NETWORK_LIMIT, || format!("fetch {branch} from {remote}"))?.success())?;
        // a tag may be followed, too
        let theirs = self.ask(["rev-parse", &format!("{reference}^{{commit}}")])?;
        let doing = || format!("pull {branch} from {remote}");
        self.check_nothing_withdrawn(&upstream, &theirs, &self.head, doing)?;
        let base = if self.contains(&theirs, &self.head)? {
            theirs.clone()
        } else if self.contains(&self.head, &theirs)? {
            self.head.clone()
        } else {
            let top = self.top.display();
            return Err(format!("{} and its upstream have diverged; merge or rebase them, as by git -C {top} pull --rebase", self.branch))
                .context(doing);
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
            let theirs = self.listed(&upstream, doing)?;
            if self.contains(commit, &theirs)? {
                self.check_nothing_withdrawn(&upstream, &theirs, commit, doing)?;
                // it must still be there by then; what comes after it is no force
                push = push.arg(format!("--force-with-lease={branch}:{theirs}"));
            }
        }
        let push = push.args([remote, &format!("{commit}:{branch}")]);
        // git remembers what it has sent
        let sent = self.ask(["rev-parse", "--symbolic-full-name", "@{upstream}"]).unwrap_or_else(|_| self.branch.clone());
        self.savepoint(instance).guard(&sent, || push.run(NETWORK_LIMIT, doing)?.success())?;
        upstream.remember(memory, commit)
    }

    /// Fails if there is a commit in `ours` that the upstream has had before, and has no longer.
    fn check_nothing_withdrawn(&self, upstream: &Upstream, theirs: &str, ours: &str, doing: impl FnOnce() -> String) -> Result<()> {
        let Some(last) = &upstream.last else { return Ok(()) };
        match self.look_for(["merge-base", last, ours])? {
            Some(newest) if !self.contains(theirs, &newest)? => {
                Err(format!("the upstream no longer has {newest}, but {} has; reset or rebase it", self.branch)).context(doing)
            }
            _ => Ok(()),
        }
    }

    fn upstream(&self, memory: &Path) -> Result<Upstream> {
        let name = self.branch.strip_prefix("refs/heads/").unwrap_or(&self.branch);
        let setting = |what: &str| self.look_for(["config", "--get", &format!("branch.{name}.{what}")]);
        let found = setting("remote")?.zip(setting("merge")?).ok_or("it has none; set it with git branch --set-upstream-to");
        let (remote, branch) = found.context(|| format!("find the upstream of {name}"))?;
        let known = fs::read_to_string(memory).unwrap_or_default();
        let last = known.strip_prefix(&format!("{remote} {branch} ")).map(String::from);
        let last = match last {
            None => self.look_for(["rev-parse", "--verify", "--quiet", "@{upstream}"])?,
            last => last,
        };
        Ok(Upstream { remote, branch, last })
    }
}
