//! How a host can be, as the hub sees it.
//!
//! A state follows from what is published and what the host reported last, release by release. No host's
//! clock counts: the clocks of the hub and of the reader decide whether a host is silent.

use std::fmt;
use std::time::{Duration, SystemTime};

use crate::fleet::{Heartbeat, LastRun, Manifest};
use crate::run::{Outcome, Release};
use crate::system::seconds;

/// The exit status that says that a host is not well.
pub const FAILING: u8 = 2;

/// What a host has said last, and when that has arrived.
pub type Heard = (Heartbeat, SystemTime);

/// Defines the states: what each is called, and which kind of trouble it is, as an exit status; 0 if it is none.
macro_rules! states {
    ($($(#[$doc:meta])* $state:ident: $name:literal, $trouble:expr;)*) => {
        /// How a host can be; what is graver comes first.
        #[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
        pub enum HostState {
            $($(#[$doc])* $state,)*
        }

        impl HostState {
            fn about(self) -> (&'static str, u8) {
                match self {
                    $(Self::$state => ($name, $trouble),)*
                }
            }
        }
    };
}

states! {
    /// The release did not run well, nor could the host go back.
    RollbackFailed: "rollback failed", FAILING;
    /// It could not be built, or was not tried any further.
    Failing: "failing", FAILING;
    /// It did not run well, and the host went back.
    RolledBack: "rolled back", FAILING;
    /// Somebody at the host has had it undone.
    Undone: "undone by hand", FAILING;
    /// The host does not accept what it is offered.
    Refusing: "refusing", FAILING;
    /// It runs something else than what it deployed: by another hand.
    Drifted: "drifted", FAILING;
    /// It runs the published release, and is not well any more.
    Unwell: "not well any more", FAILING;
    /// It has not been heard of for long.
    Silent: "silent", 3;
    /// Its release has expired.
    Stale: "stale", 3;
    /// The hub offers less than what was published last.
    WentBack: "hub went back", 4;
    /// What is published for it, or what it has sent, cannot be read.
    Unreadable: "unreadable", 4;
    /// It is in the repository, and the hub does not know it.
    Unkeyed: "no key on the hub", 4;
    /// The hub serves it, and it is not in the repository.
    Unlisted: "not in repository", 4;
    /// The next boot brings the published release, and decides.
    AwaitingBoot: "awaiting boot", 0;
    /// It is at work on the published release.
    Building: "building", 0;
    /// It does not have the published release yet.
    RebuildPending: "rebuild pending", 0;
    /// It is to get something new in a later wave.
    Waiting: "waiting", 0;
    /// It does not have the published release yet, but runs the same system.
    SyncPending: "sync pending", 0;
    /// It has never been heard of.
    NewMachine: "new machine", 0;
    /// Nothing is published for it.
    NotDeployed: "not deployed", 0;
    /// It runs the published release, and took more than one run to.
    ExtraRuns: "extra runs", 0;
    /// It runs the published release, with inputs it has updated by itself.
    AutoUpdated: "auto updated", 0;
    /// It runs the published release.
    UpToDate: "up to date", 0;
    /// Its directory is what is left of it.
    Removed: "removed", 0;
}

impl HostState {
    /// Decides by what is published, and by what was heard of the host last.
    pub fn of(published: Option<&Manifest>, heard: Option<&Heard>, silent_after: Duration, now: SystemTime) -> Self {
        // what is yet to arrive has arrived, by a clock that was ahead
        let is_silent = |arrived: &SystemTime| now.duration_since(*arrived).unwrap_or_else(|error| error.duration()) > silent_after;
        if heard.is_some_and(|(heartbeat, arrived)| heartbeat.refused.is_some() && !is_silent(arrived)) {
            return Self::Refusing;
        }
        let Some(published) = published else { return Self::NotDeployed };
        let Some((heartbeat, arrived)) = heard else { return Self::NewMachine };
        let now = seconds(now);
        let is_published = |release: &Option<_>| release.as_ref() == Some(&published.release);
        // what it has under another number it need not deploy again
        let is_same = |deployed: &Release| is_published(&heartbeat.seen) && deployed.id == published.release.id;
        let deployed = is_published(&heartbeat.deployed) || heartbeat.deployed.as_ref().is_some_and(is_same);
        // a run that failed before it knew of any release is about what comes next
        let about = |last: &&LastRun| is_published(&last.release) || (last.release.is_none() && !deployed);
        let result = heartbeat.last.as_ref().filter(about).map(|last| last.result);
        match result {
            _ if is_silent(arrived) => Self::Silent,
            _ if is_published(&heartbeat.running) => Self::Building,
            Some(Outcome::Failed | Outcome::Unknown) => Self::Failing,
            Some(Outcome::RolledBack) => Self::RolledBack,
            Some(Outcome::Restored) => Self::Undone,
            Some(Outcome::Stuck) => Self::RollbackFailed,
            Some(Outcome::AwaitingBoot) => Self::AwaitingBoot,
            Some(Outcome::Drifted) => Self::Drifted,
            _ if deployed && heartbeat.unwell.is_some() => Self::Unwell,
            // a host that is held has not asked
            _ if published.has_expired(now) || heartbeat.held.is_none() && heartbeat.expires.is_some_and(|expires| expires < now) => {
                Self::Stale
            }
            _ if deployed && heartbeat.self_updated => Self::AutoUpdated,
            _ if deployed && heartbeat.runs > 1 => Self::ExtraRuns,
            _ if deployed => Self::UpToDate,
            _ if published.toplevel.is_some() && published.toplevel == heartbeat.system => Self::SyncPending,
            _ => Self::RebuildPending,
        }
    }

    /// Whether it runs the published release.
    pub fn is_deployed(self) -> bool {
        matches!(self, Self::UpToDate | Self::ExtraRuns | Self::AutoUpdated)
    }

    /// Which kind of trouble this is, as an exit status; 0 if it is none.
    pub fn trouble(self) -> u8 {
        self.about().1
    }
}

impl fmt::Display for HostState {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.about().0)
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::fleet::{FORMAT, Provenance};
    use crate::run::hold::Hold;

    pub fn release(sequence: u64) -> Release {
        Release { id: format!("{sequence:064x}").try_into().unwrap(), sequence: sequence.try_into().unwrap() }
    }

    pub fn manifest() -> Manifest {
        Manifest {
            format: FORMAT,
            host: "web".try_into().unwrap(),
            release: release(2),
            sha256: "0".repeat(64).try_into().unwrap(),
            size: 0,
            attr: None,
            toplevel: Some("/nix/store/0123456789abcdfghijklmnpqrsvwxyz-new".try_into().unwrap()),
            published: 1000,
            expires: Some(5000),
            origin: Provenance::default(),
        }
    }

    /// Of a host that has deployed some release.
    pub fn heartbeat(deployed: u64) -> Heartbeat {
        Heartbeat {
            format: FORMAT,
            host: "web".try_into().unwrap(),
            version: String::new(),
            seen: None,
            deployed: Some(release(deployed)),
            system: Some("/nix/store/abcdfghijklmnpqrsvwxyz0123456789-old".try_into().unwrap()),
            running: None,
            last: None,
            runs: 1,
            self_updated: false,
            reboot_needed: false,
            files: None,
            refused: None,
            unwell: None,
            held: None,
            expires: None,
            kernel: Some("6.12".into()),
            nixos: Some("25.05.20250101.0123456".into()),
            nixpkgs: None,
        }
    }

    pub fn last(release: Option<Release>, result: Outcome) -> LastRun {
        LastRun { release, result, stage: None, error: Some("no luck".into()), finished: 1000 }
    }

    #[test]
    fn a_state_follows_from_releases() {
        use HostState::{
            AutoUpdated, AwaitingBoot, Building, Drifted, ExtraRuns, Failing, NewMachine, NotDeployed, RebuildPending, Refusing,
            RollbackFailed, RolledBack, Silent, Stale, SyncPending, Undone, Unwell, UpToDate,
        };
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let state = |heartbeat: &Heartbeat, age: u64| {
            let heard = (heartbeat.clone(), at(5000 - age));
            HostState::of(Some(&manifest()), Some(&heard), Duration::from_secs(10), at(5000))
        };
        let of = |published: Option<&Manifest>, heard: Option<&Heartbeat>, now| {
            let heard = heard.map(|heartbeat| (heartbeat.clone(), at(now)));
            HostState::of(published, heard.as_ref(), Duration::ZERO, at(now))
        };
        assert_eq!(of(None, None, 0), NotDeployed);
        assert_eq!(of(None, Some(&heartbeat(2)), 0), NotDeployed);
        assert_eq!(of(None, Some(&Heartbeat { refused: Some("not signed".into()), ..heartbeat(2) }), 0), Refusing);
        assert_eq!(of(Some(&manifest()), None, 0), NewMachine);
        // what is published has expired, or what the host has been offered
        assert_eq!(of(Some(&manifest()), Some(&heartbeat(2)), 5001), Stale);
        assert_eq!(of(Some(&manifest()), Some(&Heartbeat { expires: Some(4000), ..heartbeat(1) }), 4001), Stale);
        // who is held has not asked for a newer one
        let held = Hold { since: 0, until: 9000, by: "alice".into(), reason: String::new() };
        assert_eq!(of(Some(&manifest()), Some(&Heartbeat { held: Some(held), expires: Some(4000), ..heartbeat(1) }), 4001), RebuildPending);
        let old = || heartbeat(1);
        let new = || heartbeat(2);
        let same = || manifest().toplevel;
        for (expected, heartbeat) in [
            (RebuildPending, old()),
            (SyncPending, Heartbeat { system: same(), ..old() }),
            (UpToDate, new()),
            (Unwell, Heartbeat { unwell: Some("Failed to keep up x".into()), ..new() }),
            (RebuildPending, Heartbeat { unwell: Some("Failed to keep up x".into()), ..old() }),
            // another release with the same contents
            (RebuildPending, Heartbeat { deployed: Some(Release { sequence: 1.try_into().unwrap(), ..release(2) }), ..old() }),
            (
                UpToDate,
                Heartbeat { deployed: Some(Release { sequence: 1.try_into().unwrap(), ..release(2) }), seen: Some(release(2)), ..old() },
            ),
            (ExtraRuns, Heartbeat { runs: 2, ..new() }),
            (RebuildPending, Heartbeat { runs: 2, ..old() }),
            (AutoUpdated, Heartbeat { runs: 2, self_updated: true, ..new() }),
            // what it does on top of an old one hides nothing
            (RebuildPending, Heartbeat { self_updated: true, ..old() }),
            (Building, Heartbeat { running: Some(release(2)), last: Some(last(Some(release(2)), Outcome::Failed)), ..old() }),
            (RebuildPending, Heartbeat { running: Some(release(1)), ..old() }),
            (Failing, Heartbeat { last: Some(last(Some(release(2)), Outcome::Failed)), ..old() }),
            (RebuildPending, Heartbeat { last: Some(last(Some(release(1)), Outcome::Failed)), ..old() }),
            (Failing, Heartbeat { last: Some(last(None, Outcome::Failed)), ..old() }),
            (UpToDate, Heartbeat { last: Some(last(None, Outcome::Failed)), ..new() }),
            // whatever it runs
            (Refusing, Heartbeat { refused: Some("not signed".into()), ..new() }),
            (Refusing, Heartbeat { refused: Some("not signed".into()), ..old() }),
            (RolledBack, Heartbeat { last: Some(last(Some(release(2)), Outcome::RolledBack)), ..old() }),
            (RollbackFailed, Heartbeat { last: Some(last(Some(release(2)), Outcome::Stuck)), ..old() }),
            (Undone, Heartbeat { last: Some(last(Some(release(2)), Outcome::Restored)), ..old() }),
            (RebuildPending, Heartbeat { last: Some(last(Some(release(1)), Outcome::Restored)), ..old() }),
            (UpToDate, Heartbeat { last: Some(last(Some(release(2)), Outcome::Unchanged)), ..new() }),
            (AwaitingBoot, Heartbeat { last: Some(last(Some(release(2)), Outcome::AwaitingBoot)), ..old() }),
            (Failing, Heartbeat { last: Some(last(Some(release(2)), Outcome::Unknown)), ..new() }),
            (RebuildPending, Heartbeat { last: Some(last(Some(release(1)), Outcome::AwaitingBoot)), ..old() }),
            (Drifted, Heartbeat { last: Some(last(Some(release(2)), Outcome::Drifted)), ..new() }),
        ] {
            assert_eq!(state(&heartbeat, 10), expected, "{heartbeat:?}");
            assert_eq!(state(&heartbeat, 11), Silent);
        }
        let heard = |arrived| HostState::of(Some(&manifest()), Some(&(new(), at(arrived))), Duration::from_secs(10), at(4900));
        assert_eq!((heard(4910), heard(4911)), (UpToDate, Silent));
    }
}
