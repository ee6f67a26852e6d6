//! `ekiben rollback`: somebody's wish to have the last deployment undone, and what is known of one that was. The wish is
//! a file that whoever may ask for a run may write, and the webhook cannot see; it names the commit, so that nothing else
//! is undone that has been deployed meanwhile.

use serde::{Deserialize, Serialize};

use crate::error::{Context, Result};
use crate::files;
use crate::names::ObjectId;
use crate::paths::Paths;
use crate::run::hold::moment;
use crate::run::notes::Proposal;
use crate::run::{Release, asker};
use crate::system::now;
use crate::text::short;

/// More than names of a commit and a user take.
const LIMIT: u64 = 256;
/// Whoever has it undone is not to have it back by a request that was on its way, in seconds.
const PAUSE: u64 = 60;

/// A deployment that was undone by hand, or is to be.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Undone {
    /// The commit that was deployed, or awaited a boot.
    pub commit: String,
    /// What it was made from, and what was in it.
    pub base: String,
    /// The same if it is made again.
    pub tree: String,
    /// What was new in it.
    pub summary: Option<String>,
    /// Of which release of a fleet's hub it was.
    pub release: Option<Release>,
    /// The commit that runs instead, if that was a deployment, too.
    pub before: Option<String>,
    /// Who has asked for that.
    pub by: String,
    /// When, in seconds since 1970.
    pub since: u64,
}

impl Undone {
    /// Whether a candidate is this one.
    pub fn is(&self, proposal: &Proposal) -> bool {
        *proposal.commit == self.commit || (&*proposal.base, &*proposal.tree) == (&*self.base, &*self.tree)
    }

    /// Why a candidate that is this one is not deployed, and what to do; none if one of those who ask may have it again:
    /// somebody at this machine, and not at once.
    pub fn withholds(&self, instance: &str, by: &[String], now: u64) -> Option<String> {
        let is_asked = by.iter().any(|by| by.starts_with("user "));
        (!is_asked || now.abs_diff(self.since) < PAUSE).then(|| self.notice(instance))
    }

    /// What there is to know, and to do, now and later.
    pub fn notice(&self, instance: &str) -> String {
        let (what, go_on) = if self.release.is_some() { ("the hub", "publish") } else { ("the branch", "commit") };
        let (commit, when) = (short(&self.commit), moment(self.since));
        format!(
            "{what} is ahead on purpose: {} had {commit} undone on {when}; whatever is new next is made on top of it, unless you \
             run ekiben hold {instance}; {go_on} something else to go on, \
             or, at least a minute later, run ekiben trigger {instance} to deploy {commit} again",
            self.by
        )
    }
}

/// Asks for that.
pub fn ask(paths: &Paths, commit: &str) -> Result<()> {
    let path = paths.rollback();
    files::write(&path, format!("{commit} {}", asker::this_user()).as_bytes(), 0o644).doing("write", &path)
}

/// Who has asked for that, by whose file it is. What lies in its place and is no such thing is removed.
pub fn waiting(paths: &Paths) -> Result<Option<Undone>> {
    let path = paths.rollback();
    let read = || -> Result<Undone, String> {
        let (text, owner) = files::read_owned(&path, LIMIT).map_err(|error| error.to_string())?;
        let text = String::from_utf8_lossy(&text);
        let (commit, says) = text.split_once(' ').unwrap_or((&text, ""));
        let commit = ObjectId::try_from(commit)?.to_string();
        let by = asker::of_file(owner, Some(says)).unwrap_or_default();
        Ok(Undone { commit, by, since: now(), ..Undone::default() })
    };
    if matches!(files::if_there(path.symlink_metadata()), Ok(None)) {
        return Ok(None);
    }
    read().map(Some).or_else(|why| {
        log::warn!("Ignoring {}: {why}.", path.display());
        remove(paths).map(|()| None)
    })
}

/// Removes it, once the run's journal has it.
pub fn remove(paths: &Paths) -> Result<()> {
    let path = paths.rollback();
    files::clear(&path).and_then(|()| files::sync_parent(&path)).doing("remove", &path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Directory;

    #[test]
    fn what_was_undone_is_had_back_by_somebody_at_this_machine_and_not_at_once() {
        let text = |text: &str| text.repeat(40);
        let undone = Undone {
            commit: text("c"),
            base: text("b"),
            tree: text("d"),
            summary: None,
            release: None,
            before: None,
            by: "alice".into(),
            since: 1000,
        };
        let withheld = |by: &str, now| undone.withholds("app", &[by.to_owned()], now);
        assert!(withheld("user bob", 1060).is_none() && withheld("user bob", 900).is_none());
        for by in ["timer", "project app", "userx"] {
            assert!(withheld(by, 100_000).unwrap().ends_with("run ekiben trigger app to deploy cccccccc again"), "{by}");
        }
        let why = withheld("user bob", 1010).unwrap();
        let begins = format!(
            "the branch is ahead on purpose: alice had cccccccc undone on {}; whatever is new next is made on top of it, \
             unless you run ekiben hold app; commit something else to go on",
            moment(1000)
        );
        assert!(why.starts_with(&begins), "{why}");
        assert!(why.ends_with("or, at least a minute later, run ekiben trigger app to deploy cccccccc again"), "{why}");
    }

    #[test]
    fn what_is_no_wish_is_removed() {
        let directory = Directory::new();
        let paths = Paths::of_test(directory.path());
        assert!(waiting(&paths).unwrap().is_none());
        ask(&paths, &"a".repeat(40)).unwrap();
        assert_eq!(waiting(&paths).unwrap().unwrap().commit, "a".repeat(40));
        remove(&paths).unwrap();
        for odd in ["", "HEAD", &"a".repeat(41), &"1".repeat(10_000)] {
            std::fs::write(paths.rollback(), odd).unwrap();
            assert!(waiting(&paths).unwrap().is_none() && !paths.rollback().exists(), "{odd}");
        }
        std::fs::create_dir_all(paths.rollback().join("deep")).unwrap();
        std::os::unix::fs::symlink("/nowhere", directory.path().join("x")).unwrap();
        assert!(waiting(&paths).unwrap().is_none() && !paths.rollback().exists());
    }
}
