//! What a run that publishes has come to, host by host: told by the instance's user, and checked by root, who keeps it
//! for all to read.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Result};
use crate::gather::gather;
use crate::names::{HostName, RunId, Sequence};
use crate::paths::Paths;
use crate::run::{Failure, Release, Stage};
use crate::{files, text};

/// More than what is said of thousands of hosts takes, in bytes.
const LIMIT: u64 = 4 * 1024 * 1024;
/// How many of those that were left out are named.
const NAMED: usize = 8;

/// What came of all hosts.
#[derive(Debug, Deserialize, Serialize)]
pub struct Published {
    /// In which run.
    pub run: RunId,
    /// Of each host.
    pub hosts: BTreeMap<HostName, Offered>,
    /// Why no host could be found in these directories of the repository.
    pub unknown: BTreeMap<String, String>,
    /// What others have published, and is lost.
    #[serde(default)]
    pub lost: Option<String>,
}

/// How a host stands with what is published for it, as others may know it.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum HostStep {
    /// A run under way is about to publish for it.
    Building,
    /// It is to fetch it in a later wave.
    Waiting,
    /// So it was, and the roll-out has been stopped.
    Stopped,
    /// Nothing new is published for it, since somebody has asked for that.
    Held,
    /// It runs that.
    Deployed,
    /// It was left out, or has failed to run that, or refuses it.
    Failing,
    /// It can fetch what it is to run.
    #[default]
    #[serde(other)]
    Published,
}

/// The same, for one release.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub struct HostStanding {
    /// The release; none, if it was left out.
    pub release: Option<Sequence>,
    /// How it stands with it.
    pub state: HostStep,
    /// For which wave it waits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wave: Option<usize>,
}

/// What came of one.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Offered {
    /// What it can fetch now, unless it was left out.
    pub release: Option<Release>,
    /// Whether it was published in this run.
    pub new: bool,
    /// Why it was left out.
    pub error: Option<String>,
    /// How it stands, until it is heard of.
    #[serde(default)]
    pub state: HostStep,
    /// For which wave it waits.
    pub wave: Option<usize>,
}

impl Offered {
    /// A host that is left out.
    pub fn left_out(error: &str) -> Self {
        Self { release: None, new: false, error: Some(error.to_owned()), state: HostStep::Failing, wave: None }
    }
}

impl Published {
    /// Tells root.
    pub fn tell(&self, paths: &Paths) -> Result<()> {
        files::write_json(&paths.own("published.json"), self, 0o600)
    }

    /// Reads what the instance's user has told of a run, as a stranger's.
    pub fn told(paths: &Paths, run: &RunId) -> Result<Self> {
        let path = paths.own("published.json");
        let told: Self = files::read_foreign_json(&path, LIMIT)?.ok_or("it is not there").doing("read", &path)?;
        if told.run == *run { Ok(told) } else { Err("it belongs to another run").doing("read", &path) }
    }

    /// Keeps it for all.
    pub fn keep(&self, paths: &Paths) -> Result<()> {
        files::write_json(&paths.hosts(), self, 0o644)
    }

    /// How all hosts stand with what the last run has published, by what the hub has heard since; none if the instance
    /// publishes nothing.
    pub fn standings(paths: &Paths, is_running: bool) -> Result<Option<BTreeMap<String, HostStanding>>> {
        let Some(Self { hosts, unknown, .. }) = files::read_foreign_json(&paths.hosts(), LIMIT)? else { return Ok(None) };
        let heard: BTreeMap<HostName, HostStanding> = files::read_foreign_json(&paths.heard(), LIMIT).ok().flatten().unwrap_or_default();
        let standing = |name: &HostName, host: &Offered| {
            let release = host.release.as_ref().map(|release| release.sequence);
            // that is of a later one, where somebody has published since
            let heard = heard.get(name).filter(|heard| heard.release >= release);
            let (state, wave) = match release {
                _ if is_running => (HostStep::Building, None),
                None if host.state != HostStep::Held => (HostStep::Failing, None),
                _ => heard.map_or((host.state, host.wave), |heard| (heard.state, heard.wave)),
            };
            HostStanding { release, state, wave }
        };
        let hosts = hosts.iter().map(|(name, host)| (name.to_string(), standing(name, host)));
        let state = if is_running { HostStep::Building } else { HostStep::Failing };
        let left_out = HostStanding { release: None, state, wave: None };
        Ok(Some(gather(hosts.chain(unknown.into_keys().map(|place| (place, left_out))))))
    }

    /// Whether anything was published.
    pub fn is_new(&self) -> bool {
        self.hosts.values().any(|host| host.new)
    }

    /// Whether nothing can be fetched that was made in this run.
    pub fn is_nothing(&self) -> bool {
        self.hosts.values().all(|host| host.error.is_some())
    }

    /// A line for each host of which there is something to say.
    pub fn lines(&self) -> Vec<String> {
        let said = |(name, host): (&HostName, &Offered)| match (&host.error, &host.release) {
            (Some(error), _) => Some(format!("{name}: {error}")),
            (None, Some(release)) if host.new => Some(match host.wave {
                Some(wave) => format!("{name}: release {} signed, for wave {wave}", release.sequence),
                None => format!("{name}: release {} published", release.sequence),
            }),
            _ if host.state == HostStep::Held => Some(format!("{name}: held")),
            _ => None,
        };
        let unknown = self.unknown.iter().map(|(place, error)| format!("{place}: {error}"));
        self.hosts.iter().filter_map(said).chain(unknown).collect()
    }

    /// That some were left out, and which, and why; none if all can fetch what they are to run.
    pub fn failure(&self) -> Option<Failure> {
        let of_hosts = self.hosts.iter().filter_map(|(name, host)| Some((name.to_string(), host.error.as_ref()?)));
        let left_out: Vec<_> = of_hosts.chain(self.unknown.iter().map(|(place, error)| (place.clone(), error))).collect();
        if left_out.is_empty() {
            return None;
        }
        let mut named: Vec<_> = left_out.iter().take(NAMED).map(|(name, error)| format!("{name} ({})", text::line(error))).collect();
        if left_out.len() > NAMED {
            named.push(format!("{} more", left_out.len() - NAMED));
        }
        let (count, all) = (left_out.len(), self.hosts.len() + self.unknown.len());
        let message = format!("Failed to publish {count} of {all} hosts, which keep what they have: {}", named.join(", "));
        Some(Failure::new(Stage::Publish, &Error::new(message).transient()))
    }
}

#[cfg(test)]
mod tests {
    use super::HostStep::{Building, Deployed, Failing, Published as Offered};
    use super::*;
    use serde_json::json;

    #[test]
    fn who_was_left_out_is_named_and_the_others_count() {
        let release = json!({"id": "a".repeat(64), "sequence": 5});
        let host = |new: bool| json!({"release": release, "new": new, "error": null});
        let of = |hosts: serde_json::Value, unknown: serde_json::Value| -> Published {
            serde_json::from_value(json!({"run": "0".repeat(32), "hosts": hosts, "unknown": unknown})).unwrap()
        };
        let all = of(json!({"db": host(true), "web": host(false)}), json!({}));
        assert!(all.is_new() && !all.is_nothing() && all.failure().is_none());
        assert_eq!(all.lines(), ["db: release 5 published"]);
        let left_out = json!({"release": null, "new": false, "error": "Failed to build web"});
        let some = of(json!({"db": host(false), "web": left_out}), json!({"hosts/x": "no flake\u{1b}[31m"}));
        let failure = some.failure().unwrap();
        assert!(!some.is_new() && !some.is_nothing() && failure.transient && failure.stage == Stage::Publish);
        assert!(
            failure.message.contains("2 of 3 hosts, which keep what they have: web (Failed to build web), hosts/x (no flake"),
            "{failure:?}"
        );
        assert!(of(json!({"web": left_out}), json!({})).is_nothing());
        let many: serde_json::Map<_, _> = (0..1000).map(|number| (format!("h{number:03}"), left_out.clone())).collect();
        let said = of(many.into(), json!({})).failure().unwrap().message;
        assert!(said.ends_with("h007 (Failed to build web), 992 more") && said.len() < 400, "{said}");
    }

    #[test]
    fn hosts_stand_as_they_were_heard_of_the_release_that_was_published() {
        let directory = crate::testing::Directory::new();
        let paths = Paths::of_test(directory.path());
        assert!(Published::standings(&paths, false).unwrap().is_none());
        let host = json!({"release": {"id": "a".repeat(64), "sequence": 5}, "new": true, "error": null});
        let left_out = json!({"release": null, "new": false, "error": "x"});
        let published = json!({"run": "0".repeat(32), "unknown": {}, "hosts": {"a": host, "b": host, "c": host, "d": left_out, "e": host}});
        std::fs::write(paths.hosts(), published.to_string()).unwrap();
        let states = |is_running| -> Vec<_> {
            Published::standings(&paths, is_running).unwrap().unwrap().into_values().map(|standing| standing.state).collect()
        };
        assert_eq!(states(false), [Offered, Offered, Offered, Failing, Offered]);
        let heard = |release: u64, state: &str| json!({"release": release, "state": state});
        // the last is what was heard of an earlier release
        let heard = json!({"a": heard(5, "deployed"), "b": heard(5, "failing"), "c": heard(6, "deployed"), "d": heard(4, "deployed"), "e": heard(4, "deployed")});
        std::fs::write(paths.heard(), heard.to_string()).unwrap();
        assert_eq!(states(false), [Deployed, Failing, Deployed, Failing, Offered]);
        assert_eq!(states(true), [Building; 5]);
    }

    #[test]
    fn what_another_run_or_a_stranger_has_left_counts_for_nothing() {
        let directory = crate::testing::Directory::new();
        let paths = Paths::of_test(directory.path());
        let run = RunId::try_from("0".repeat(32)).unwrap();
        Published { run: run.clone(), hosts: BTreeMap::new(), unknown: BTreeMap::new(), lost: None }.tell(&paths).unwrap();
        assert!(Published::told(&paths, &run).is_ok());
        assert!(Published::told(&paths, &RunId::try_from("1".repeat(32)).unwrap()).unwrap_err().to_string().ends_with("another run"));
        std::fs::write(paths.own("published.json"), format!(r#"{{"run": "{run}", "hosts": {{"../x": {{}}}}, "unknown": {{}}}}"#)).unwrap();
        assert!(Published::told(&paths, &run).is_err());
    }
}
