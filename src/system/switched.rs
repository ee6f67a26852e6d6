//! What came of `switch-to-configuration`: its exit statuses and its words, in one place. It is the candidate's own
//! program, of whichever release; what is relied on is listed in `ci/switch-to-configuration.md`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::gather::gather;
use crate::json;
use crate::program::exited::Exited;

/// What it says that its status does not: see [`SNIPPET`] and [`USER`].
pub const WATCHED: &[&str] = &[SNIPPET, USER, UNITS];
/// An activation script has failed. That leads to status 2, but not if a unit fails, too.
const SNIPPET: &str = "Activation script snippet '";
/// Units of a user have failed. That leads to status 4, as those of the system do.
const USER: &str = "warning: user activation for ";
/// Units of the system have failed, and which.
const UNITS: &str = "warning: the following units failed: ";
/// How a unit is called that has failed if a timer could not look: another instance's may, at any moment.
pub const LOOK: &str = "ekiben-look@";
/// A check that is made before anything is changed has failed, and which.
const CHECK: &str = "Pre-switch check '";
/// The last line where one has.
const REFUSED: &str = "Pre-switch checks failed";
/// The check for [`inhibitors`].
const INHIBITORS: &str = "switchInhibitors";
/// The last line where somebody else is switching.
const LOCKED: &str = "Could not acquire lock";
/// Why nothing could be done while it was.
pub const BY_ANOTHER_ALL_THE_TIME: &str =
    "something else has been switching this machine all the time; lslocks says what has switch-to-configuration.lock";
/// More than the file of inhibitors has, in bytes.
const INHIBITORS_BYTES: u64 = 64 * 1024;

/// What came of an activation that did not fail.
pub enum Switched {
    /// The new system runs.
    Runs {
        /// Whether some unit has failed: the system's, or a user's.
        units_failed: bool,
        /// The users of whom units have failed.
        users: BTreeSet<String>,
        /// The last lines that were said.
        tail: Vec<String>,
    },
    /// Nothing has changed: only a boot can bring the new system, for this reason.
    AtBoot(String),
    /// Nothing has changed: a check of the new system's is against it, or somebody else is switching.
    Refused(Error),
}

impl Switched {
    /// What it was; fails if the activation did.
    pub fn of(ended: Exited) -> Result<Self> {
        if ended.is_locked() {
            return Ok(Self::Refused(ended.locked_out()));
        }
        let code = ended.status.code();
        if matches!(code, Some(0 | 4)) {
            if code == Some(4) && ended.seen.iter().any(|line| line.contains(SNIPPET)) {
                return Err(ended.failed("an activation script failed"));
            }
            let users =
                ended.seen.iter().filter_map(|line| line.split_once(USER)?.1.split_once(" failed")).map(|(user, _)| user.to_owned());
            let mut named =
                ended.seen.iter().filter_map(|line| Some(line.split_once(UNITS)?.1)).flat_map(|units| units.split(", ")).peekable();
            let only_looks = named.peek().is_some() && named.all(|unit| unit.starts_with(LOOK));
            return Ok(Self::Runs { units_failed: code == Some(4) && !only_looks, users: gather(users), tail: ended.tail });
        }
        if code == Some(100) {
            return Ok(Self::AtBoot("its init is incompatible with the running one".into()));
        }
        if !ended.says_last(REFUSED) {
            return Err(ended.success().err().unwrap_or_else(|| Error::new("Failed to understand switch-to-configuration")));
        }
        if refusal(&ended.tail).0 == INHIBITORS {
            return Ok(Self::AtBoot(format!("its pre-switch check {INHIBITORS} failed")));
        }
        Ok(Self::Refused(ended.refused()))
    }
}

impl Exited {
    /// Whether the program could do nothing, since somebody else is switching this machine.
    pub fn is_locked(&self) -> bool {
        self.says_last(LOCKED)
    }

    /// Whether it has ended in the middle of a switch for a reason of its own, such as that logind did not answer; what it has
    /// left undone, the next one does.
    pub fn has_broken_off(&self) -> bool {
        let is_known = matches!(self.status.code(), None | Some(2 | 4 | 100)) || self.says_last(REFUSED);
        !is_known && is_unfinished()
    }

    /// Fails unless it did what it was to do besides activating a system.
    pub fn switched(self) -> Result<()> {
        if self.is_locked() {
            return Err(self.locked_out());
        }
        if self.says_last(REFUSED) { Err(self.refused()) } else { self.success() }
    }

    fn refused(self) -> Error {
        let (check, said) = refusal(&self.tail);
        let said = if said.is_empty() { said } else { format!(": {said}") };
        // it has looked at this machine, too, which may be another way next time
        self.failed(&format!("pre-switch check {check} failed{said}")).transient()
    }

    fn locked_out(self) -> Error {
        self.failed(BY_ANOTHER_ALL_THE_TIME).transient()
    }

    /// Whether it has failed in none of the documented ways, and its last line begins like this.
    fn says_last(&self, words: &str) -> bool {
        let last = self.tail.iter().map(|line| line.trim()).rfind(|line| !line.is_empty());
        !matches!(self.status.code(), None | Some(0 | 2 | 4 | 100)) && last.is_some_and(|last| last.starts_with(words))
    }
}

/// Which check has failed first, and the last line that it said.
fn refusal(tail: &[String]) -> (String, String) {
    let at = tail.iter().position(|line| line.starts_with(CHECK)).unwrap_or(tail.len().saturating_sub(1));
    let name = tail.get(at).and_then(|line| Some(line.strip_prefix(CHECK)?.split_once('\'')?.0));
    let said = tail[..at].iter().map(|line| line.trim()).rfind(|line| !line.is_empty());
    (name.unwrap_or("(unnamed)").to_owned(), said.unwrap_or_default().to_owned())
}

/// Whether a switch was cut off: what it was to start, restart or reload yet is noted for the next one.
pub fn is_unfinished() -> bool {
    ["start", "restart", "reload"].iter().any(|what| fs::metadata(format!("/run/nixos/{what}-list")).is_ok_and(|list| list.len() > 0))
}

/// In what the system `new` differs from the running one that must not change while a system runs, by its own account.
pub fn inhibitors(running: &Path, new: &Path) -> Vec<String> {
    let (old, new) = (inhibitors_of(running), inhibitors_of(new));
    let both = old.iter().filter_map(|(name, value)| Some((name, value, new.get(name)?)));
    both.filter(|(_, old, new)| old != new).map(|(name, old, new)| format!("switch inhibitor {name} changes from {old} to {new}")).collect()
}

/// A system that says nothing of them, or nothing that makes sense, has none: its own check will say so.
fn inhibitors_of(system: &Path) -> BTreeMap<String, Value> {
    let mut text = Vec::new();
    let read = File::open(system.join("switch-inhibitors")).and_then(|file| file.take(INHIBITORS_BYTES).read_to_end(&mut text));
    read.ok().and_then(|_| json::parse(&text).ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::program::Program;

    fn ended(status: u8, said: &str) -> Exited {
        let program = Program::new("sh").args(["-c", "printf '%b' \"$2\"; exit \"$1\"", "sh", &status.to_string(), said]);
        program.watch_for(WATCHED).run(Duration::from_secs(10), || "activate it".into()).unwrap()
    }

    fn of(status: u8, said: &str) -> String {
        match Switched::of(ended(status, said)) {
            Ok(Switched::Runs { units_failed, users, .. }) => format!("runs {units_failed} {users:?}"),
            Ok(Switched::AtBoot(why)) => format!("at boot: {why}"),
            Ok(Switched::Refused(error)) => format!("refused: {error}"),
            Err(error) => format!("failed: {error}"),
        }
    }

    #[test]
    fn every_status_means_what_the_words_say() {
        let refused = "no room\n\nPre-switch check 'disk' failed\nPre-switch checks failed\n";
        for (status, said, meaning) in [
            (0, "finished\n", "runs false {}"),
            (4, "warning: the following units failed: a.service\n", "runs true {}"),
            (4, "warning: the following units failed: ekiben-look@a.service, ekiben-look@b.service\n", "runs false {}"),
            (4, "warning: the following units failed: a.service, ekiben-look@a.service\n", "runs true {}"),
            (4, "warning: the following units failed: ekiben-look@a.service, b.service\n", "runs true {}"),
            (4, "warning: user activation for alice failed\nwarning: user activation for bob failed\n", "runs true {\"alice\", \"bob\"}"),
            (2, "Activation script snippet 'x' failed (1)\n", "failed: Failed to activate it: exited with 2"),
            (4, "Activation script snippet 'x' failed (1)\n", "failed: Failed to activate it: an activation script failed"),
            (100, "Warning: the new ...\n", "at boot: its init is incompatible with the running one"),
            (1, "Failed to install bootloader\n", "failed: Failed to activate it: exited with 1"),
            (1, refused, "refused: Failed to activate it: pre-switch check disk failed: no room"),
            (25, refused, "refused: Failed to activate it: pre-switch check disk failed: no room"),
            (
                1,
                "Pre-switch check 'silent' failed\nPre-switch checks failed",
                "refused: Failed to activate it: pre-switch check silent failed",
            ),
            (1, "Pre-switch checks failed\n", "refused: Failed to activate it: pre-switch check (unnamed) failed"),
            (
                1,
                "Pre-switch check 'switchInhibitors' failed\nPre-switch checks failed\n",
                "at boot: its pre-switch check switchInhibitors failed",
            ),
            (
                11,
                "Could not acquire lock\n",
                "refused: Failed to activate it: something else has been switching this machine all the time; lslocks says what has switch-to-configuration.lock",
            ),
            // it is somebody else who says so, in the middle of an activation
            (2, refused, "failed: Failed to activate it: exited with 2"),
            (1, "Pre-switch checks failed\nactivating the configuration...\n", "failed: Failed to activate it: exited with 1"),
        ] {
            assert_eq!(of(status, said), meaning, "{status} {said}");
        }
    }

    #[test]
    fn a_check_that_refuses_a_boot_is_told_from_a_boot_loader_that_fails() {
        let failed = |said| ended(1, said).switched().unwrap_err();
        let refused = failed("Pre-switch check 'disk' failed\nPre-switch checks failed\n");
        assert_eq!(refused.to_string(), "Failed to activate it: pre-switch check disk failed");
        let error = failed("Failed to install bootloader\n");
        assert_eq!(error.to_string(), "Failed to activate it: exited with 1");
        assert!(refused.is_transient() && !error.is_transient());
    }

    #[test]
    fn the_lock_is_held_where_the_program_says_so_and_not_where_a_unit_does() {
        assert!(ended(11, "Could not acquire lock\n").is_locked());
        assert!(ended(11, "Could not acquire lock - Resource temporarily unavailable at x line 1.\n").is_locked());
        assert!(!ended(4, "app[7]: Could not acquire lock\n").is_locked());
        assert!(!ended(4, "Could not acquire lock\n").is_locked());
    }

    #[test]
    fn inhibitors_are_what_both_systems_have_and_differs() {
        let directory = crate::testing::Directory::new();
        let system = |name: &str, text: &str| {
            let system = directory.path().join(name);
            std::fs::create_dir(&system).unwrap();
            std::fs::write(system.join("switch-inhibitors"), text).unwrap();
            system
        };
        let old = system("old", r#"{ "dbus-implementation": "dbus", "same": "1", "gone": "1" }"#);
        let new = system("new", r#"{ "dbus-implementation": "broker", "same": "1", "more": "1" }"#);
        assert_eq!(inhibitors(&old, &new), ["switch inhibitor dbus-implementation changes from \"dbus\" to \"broker\""]);
        assert!(inhibitors(&old, &old).is_empty() && inhibitors(directory.path(), &new).is_empty());
        for nonsense in ["", "[]", "{", "{ \"dbus-implementation\"", &format!("{{ \"a\": \"{}\" }}", "x".repeat(100_000))] {
            assert!(inhibitors(&old, &system(&nonsense.len().to_string(), nonsense)).is_empty());
        }
    }
}
