//! A hold on an instance: nothing is deployed until it ends. It is a file that whoever may ask for a run may write, and
//! the webhook may only read.

use std::os::unix::fs::MetadataExt;

use nix::unistd::User;
use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::error::{Context, Result};
use crate::paths::Paths;
use crate::program::Program;
use crate::system::now;
use crate::{files, json};

/// More than anybody has to say.
const LIMIT: u64 = 8 * 1024;

/// Why nothing is deployed, until when, and who says so.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Hold {
    /// When it began, in seconds since 1970.
    pub since: u64,
    /// When it ends by itself.
    pub until: u64,
    /// Who has asked for it.
    pub by: String,
    /// What for.
    pub reason: String,
}

impl Hold {
    /// The hold that is in force, if one is.
    pub fn read(paths: &Paths) -> Option<Self> {
        let path = paths.hold();
        let bytes = files::if_there(files::read_foreign(&path, LIMIT)).transpose()?.map_err(|error| error.to_string());
        let hold = bytes.and_then(|bytes| json::parse_foreign::<Self>(&bytes).map_err(|error| error.to_string()));
        let mut hold = hold.inspect_err(|why| log::warn!("Ignoring unreadable hold {}: {why}.", path.display())).ok()?;
        // root speaks for others by sudo; all others are who they are, where that can be seen
        let owner = path.symlink_metadata().ok().map(|file| file.uid()).filter(|user| *user != 0);
        if let Some(user) = owner.and_then(|user| User::from_uid(user.into()).ok().flatten()) {
            hold.by = user.name;
        }
        (now() < hold.until).then_some(hold)
    }

    /// Whether one is in force of any of this machine's instances.
    pub fn is_any(config: &Config) -> bool {
        config.instances.keys().any(|name| Self::read(&Paths::new(name)).is_some())
    }

    /// Has it be in force, in the place of an earlier one.
    pub fn write(&self, paths: &Paths) -> Result<()> {
        files::write_json(&paths.hold(), self, 0o644)
    }

    /// Ends it, whatever lies in its place.
    pub fn remove(paths: &Paths) -> Result<()> {
        let path = paths.hold();
        files::clear(&path).and_then(|()| files::sync_parent(&path)).doing("remove", &path)
    }

    /// Who holds what for, behind "held ".
    pub fn why(&self) -> String {
        if self.reason.is_empty() { format!("by {}", self.by) } else { format!("by {}: {}", self.by, self.reason) }
    }
}

/// A moment as people here write it.
pub fn moment(seconds: u64) -> String {
    let said = Program::new("date").args([format!("--date=@{seconds}"), "+%a %F %R %Z".into()]).said(|| "tell the time".into());
    said.map_or_else(|_| format!("{seconds} s after 1970"), |said| said.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Directory;

    #[test]
    fn a_hold_ends_by_itself_and_what_is_none_holds_nothing() {
        let directory = Directory::new();
        let paths = Paths::of_test(directory.path());
        let hold = |until| Hold { since: 0, until, by: "alice".into(), reason: "audit\n\u{1b}[2J".into() };
        assert!(Hold::read(&paths).is_none());
        hold(now() + 60).write(&paths).unwrap();
        let why = Hold::read(&paths).unwrap().why();
        assert!(why.ends_with(": audit\u{fffd}\u{fffd}[2J"), "{why}");
        hold(now()).write(&paths).unwrap();
        assert!(Hold::read(&paths).is_none());
        for odd in ["", "{}", "x", &"1".repeat(10_000)] {
            std::fs::write(paths.hold(), odd).unwrap();
            assert!(Hold::read(&paths).is_none(), "{odd}");
        }
        Hold::remove(&paths).unwrap();
        std::fs::create_dir_all(paths.hold().join("deep")).unwrap();
        assert!(Hold::read(&paths).is_none());
        Hold::remove(&paths).unwrap();
        Hold::remove(&paths).unwrap();
        assert!(!paths.hold().exists());
    }
}
