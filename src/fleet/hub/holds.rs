//! What people hold back, and what they have go on: no host that is held is published for, and no wave begins. Written by
//! people, here or elsewhere; read as a stranger's.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use ::nix::fcntl::FlockArg;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::fleet::LARGE;
use crate::fleet::hub::served::ServedDirectory;
use crate::names::HostName;
use crate::run::hold::{Hold, moment};
use crate::system::now;
use crate::{files, text};

/// Until when a hold is in force that has no end.
pub const OPEN: u64 = u64::MAX;

/// All that is held.
#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Holds {
    /// Hosts for which nothing new is published; none stands for the roll-out.
    held: Vec<(Option<HostName>, Hold)>,
    /// After which stop the roll-out goes on.
    pub resumed: Option<String>,
}

/// Until when something is held, and by whom.
pub fn said(hold: &Hold) -> String {
    let until = if hold.until == OPEN { String::new() } else { format!("until {} ", moment(hold.until)) };
    text::line(&format!("held {until}{}", hold.why()))
}

impl Holds {
    pub fn file(hub: &ServedDirectory) -> PathBuf {
        hub.rollout().join("holds.json")
    }

    /// Reads them; fails if that cannot be, since something may be held.
    pub fn read(hub: &ServedDirectory) -> Result<Self> {
        let found = files::read_foreign_json(&Self::file(hub), LARGE);
        found.map(Option::unwrap_or_default).map_err(|error| Error::new(format!("{error}; remove it if nothing is to be held")))
    }

    /// The same of a hub that is elsewhere, too, as they are now.
    pub fn now(hub: &ServedDirectory) -> Result<Self> {
        // several hosts are published for at once
        static TURN: Mutex<()> = Mutex::new(());
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        hub.take_in_file(&Self::file(hub)).and_then(|()| Self::read(hub))
    }

    /// Changes them: of several who do so at once, nobody's change is lost.
    pub fn change(hub: &ServedDirectory, change: impl FnOnce(&mut Self)) -> Result<()> {
        let here = || {
            let mut holds = Self::read(hub)?;
            change(&mut holds);
            files::write_json(&Self::file(hub), &holds, 0o644)
        };
        if let Some(elsewhere) = hub.elsewhere() {
            return elsewhere.change_holds(here);
        }
        // not the turn of who publishes: that may take as long as a build
        let _lock = files::lock(&hub.rollout(), FlockArg::LockExclusive)?;
        here()
    }

    /// The hold of a host that is in force; or of the roll-out.
    pub fn of(&self, host: Option<&HostName>) -> Option<&Hold> {
        self.held.iter().find(|held| held.0.as_ref() == host).map(|held| &held.1).filter(|hold| now() < hold.until)
    }

    /// That a host is held, in words.
    pub fn said(&self, host: &HostName) -> Option<String> {
        self.of(Some(host)).map(said)
    }

    /// Holds a host, or the roll-out.
    pub fn put(&mut self, host: Option<&HostName>, hold: Hold) {
        self.end(host);
        self.held.push((host.cloned(), hold));
    }

    /// Ends that.
    pub fn end(&mut self, host: Option<&HostName>) {
        self.held.retain(|held| held.0.as_ref() != host && now() < held.1.until);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Directory;

    #[test]
    fn of_many_who_hold_at_once_nobody_is_forgotten() {
        let place = Directory::new();
        let hub = ServedDirectory::new(place.path()).unwrap();
        std::fs::create_dir(hub.rollout()).unwrap();
        let hosts: Vec<_> = (0..80).map(|number| HostName::try_from(&*format!("host{number}")).unwrap()).collect();
        let hold = |host| {
            let hold = Hold { since: 0, until: OPEN, by: "a".into(), reason: String::new() };
            Holds::change(&hub, |holds| holds.put(Some(host), hold)).unwrap();
        };
        std::thread::scope(|scope| hosts.chunks(10).for_each(|some| drop(scope.spawn(move || some.iter().for_each(hold)))));
        let holds = Holds::read(&hub).unwrap();
        let lost: Vec<_> = hosts.iter().filter(|host| holds.of(Some(host)).is_none()).collect();
        assert!(lost.is_empty(), "{lost:?}");
    }
}
