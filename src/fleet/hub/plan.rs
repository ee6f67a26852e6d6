//! What is to be rolled out in waves, what people hold, and how far the hub has come: three files, each with one writer, and
//! replaced in one step. They are read as a stranger's.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ::nix::fcntl::FlockArg;
use serde::{Deserialize, Serialize};

use crate::config::Wave;
use crate::error::{Context, OrLog, Result};
use crate::fleet::hub::served::ServedDirectory;
use crate::fleet::{FORMAT, LARGE, Provenance};
use crate::names::{HostName, Sequence};
use crate::run::Release;
use crate::run::hold::{Hold, moment};
use crate::system::now;
use crate::{files, text};

/// Until when a hold is in force that has no end.
pub const OPEN: u64 = u64::MAX;

/// One of the three files: what the others are for is empty in it.
#[derive(Default, Deserialize, Serialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Plan {
    /// [`FORMAT`], of a plan.
    pub format: u32,
    /// What tells the plan from all others.
    pub id: String,
    /// Which host gets what, and when; and what that is made from.
    pub origin: Provenance,
    pub waves: Vec<Wave>,
    pub hosts: Vec<Member>,
    /// Hosts for which nothing new is published; none stands for the roll-out.
    pub held: Vec<(Option<HostName>, Hold)>,
    /// After which stop it goes on.
    pub resumed: Option<String>,
    /// The last wave that has begun.
    pub wave: usize,
    /// Since when hosts have been healthy.
    pub since: BTreeMap<HostName, u64>,
    /// Since when the hub hears them without a gap, in seconds since 1970.
    pub hears_since: u64,
    /// How often it has been stopped, and why it is.
    pub stops: usize,
    pub stopped: Option<String>,
    /// Whose failures count no more, and how many waves need no host that is well.
    pub forgiven: Vec<HostName>,
    pub waived: usize,
    pub done: bool,
}

/// What people have asked for.
pub type Holds = Plan;
/// How far it has come, as the hub has noted.
pub type Headway = Plan;

/// A host in it.
#[derive(Clone, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Member {
    pub host: HostName,
    /// In which wave, from 0 on.
    pub wave: usize,
    /// What it is to get.
    pub release: Release,
    /// In the place of what; of the same, if it has that already.
    pub before: Option<Release>,
    /// What it ran well when that was planned.
    pub good: Option<Sequence>,
    /// After how many seconds it is silent.
    pub silent_after: u64,
}

impl Member {
    /// Whether it is to get something else than it had when that was planned.
    pub fn is_new(&self) -> bool {
        self.before.as_ref() != Some(&self.release)
    }
}

/// Until when something is held, and by whom.
pub fn said(hold: &Hold) -> String {
    let until = if hold.until == OPEN { String::new() } else { format!("until {} ", moment(hold.until)) };
    text::line(&format!("held {until}{}", hold.why()))
}

impl Plan {
    /// Where it is, and what is held.
    pub fn file(hub: &ServedDirectory) -> PathBuf {
        hub.rollout().join("plan.json")
    }

    pub fn holds_file(hub: &ServedDirectory) -> PathBuf {
        hub.rollout().join("holds.json")
    }

    /// Reads one of the files; an empty one if it is not there.
    pub fn read_from(path: &Path) -> Result<Self> {
        Ok(files::read_foreign_json(path, LARGE)?.unwrap_or_default())
    }

    /// What is held; fails if that cannot be read, since something may be.
    pub fn holds(hub: &ServedDirectory) -> Result<Holds> {
        Self::read_from(&Self::holds_file(hub))
    }

    /// Changes what is held: of several who do so at once, nobody's change is lost.
    pub fn change_holds(hub: &ServedDirectory, change: impl FnOnce(&mut Holds)) -> Result<()> {
        let here = || {
            let mut holds = Self::holds(hub)?;
            change(&mut holds);
            files::write_json(&Self::holds_file(hub), &holds, 0o644)
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

    /// Holds a host, or the roll-out, or ends that.
    pub fn put(&mut self, host: Option<&HostName>, hold: Hold) {
        self.held.retain(|held| held.0.as_ref() != host && now() < held.1.until);
        self.held.push((host.cloned(), hold));
    }

    /// What tells its last stop from others, or, if it is not stopped, where it stands.
    pub fn stop(&self) -> String {
        let stop = format!("{} {}", self.id, self.stops);
        if self.stopped.is_some() { stop } else { format!("{stop} {}", self.wave) }
    }

    /// The one that there is; what is no plan is none.
    pub fn read(hub: &ServedDirectory) -> Option<Self> {
        let found = Self::read_from(&Self::file(hub)).or_warn();
        found.filter(|plan| {
            plan.format == FORMAT && !plan.waves.is_empty() && plan.hosts.iter().all(|member| member.wave < plan.waves.len())
        })
    }

    /// What a host is to get.
    pub fn get(&self, host: &HostName) -> Option<&Member> {
        self.hosts.iter().find(|member| member.host == *host)
    }

    /// The number of the wave, from 1 on, that a host waits for, which sees this release.
    pub fn waits(&self, host: &HostName, sees: Option<&Release>) -> Option<usize> {
        let member = self.get(host)?;
        (sees == member.before.as_ref() && sees != Some(&member.release)).then_some(member.wave + 1)
    }
}

/// In which waves hosts are, in the order of `known`, which are those that there are: who is in none comes last. Of others
/// nothing is known only if `some` could not be looked at.
pub fn assign(
    waves: &[Wave],
    groups: &BTreeMap<HostName, Vec<HostName>>,
    known: &[&HostName],
    some: bool,
) -> Result<(Vec<Wave>, Vec<usize>)> {
    let (mut kept, mut places) = (Vec::new(), vec![usize::MAX; known.len()]);
    let last = Wave { hosts: vec!["*".into()], ..Wave::default() };
    for wave in waves.iter().chain([&last]) {
        let (number, mut is_one) = (kept.len(), false);
        for word in &wave.hosts {
            let group = word.strip_prefix('@').and_then(|name| groups.iter().find(|(group, _)| ***group == *name));
            let is_meant = |host: &HostName| word == "*" || **host == **word || group.is_some_and(|(_, hosts)| hosts.contains(host));
            let mut is_known = word == "*" || group.is_some_and(|(_, hosts)| hosts.is_empty());
            for (_, place) in known.iter().zip(&mut places).filter(|(host, _)| is_meant(host)) {
                is_known = true;
                is_one |= *place == usize::MAX;
                *place = number.min(*place);
            }
            if !is_known && !some {
                let what = if group.is_some() { "host of group" } else { "host or group" };
                return Err(format!("there is no {what} {word:?}")).context(|| "understand the waves".into());
            }
            is_one |= !is_known;
        }
        if is_one {
            kept.push(wave.clone());
        }
    }
    Ok((kept, places))
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
            Plan::change_holds(&hub, |holds| holds.put(Some(host), hold)).unwrap();
        };
        std::thread::scope(|scope| hosts.chunks(10).for_each(|some| drop(scope.spawn(move || some.iter().for_each(hold)))));
        let holds = Plan::holds(&hub).unwrap();
        let lost: Vec<_> = hosts.iter().filter(|host| holds.of(Some(host)).is_none()).collect();
        assert!(lost.is_empty(), "{lost:?}");
    }

    fn name(name: &str) -> HostName {
        name.try_into().unwrap()
    }

    #[test]
    fn hosts_are_in_the_first_wave_that_names_them() {
        let known = ["a", "b", "c", "d"].map(name);
        let groups = [("laptops", &["b", "x", "a"][..]), ("none", &[]), ("gone", &["x", "y"])];
        let groups = groups.map(|(group, hosts)| (name(group), hosts.iter().map(|host| name(host)).collect())).into();
        let places = |waves: &[&[&str]], some| {
            let waves: Vec<_> =
                waves.iter().map(|hosts| Wave { hosts: hosts.iter().map(ToString::to_string).collect(), ..Wave::default() }).collect();
            let known: Vec<_> = known.iter().collect();
            let assigned = assign(&waves, &groups, &known, some).map_err(|error| error.to_string())?;
            let text: Vec<_> = known.iter().zip(&assigned.1).map(|(host, wave)| format!("{host}{wave}")).collect();
            Ok::<_, String>((assigned.0.len(), text.join(" ")))
        };
        let of = |count: usize, text: &str| Ok((count, text.to_owned()));
        assert_eq!(places(&[], false), of(1, "a0 b0 c0 d0"));
        assert_eq!(places(&[&["c"], &["@laptops", "c"], &["*"]], false), of(3, "a1 b1 c0 d2"));
        assert_eq!(places(&[&["*"], &["c"]], false), of(1, "a0 b0 c0 d0"));
        // those that are in none come last, and a wave of nobody is none
        assert_eq!(places(&[&["@none"], &["c"]], false), of(2, "a1 b1 c0 d1"));
        // what is misspelt, or removed, must not have all the others get it at once
        assert!(places(&[&["canary"], &["*"]], false).unwrap_err().contains("no host or group \"canary\""));
        assert!(places(&[&["@canaries"], &["*"]], false).is_err());
        assert!(places(&[&["@gone"], &["*"]], false).unwrap_err().contains("no host of group \"@gone\""));
        // nor must what could not be looked at
        for word in ["canary", "@gone"] {
            assert_eq!(places(&[&[word], &["*"]], true), of(2, "a1 b1 c1 d1"), "{word}");
        }
    }
}
