//! What everybody may know of an instance: a file that root writes and anybody may read, and
//! `ekiben status` shows.
//!
//! What a failing program said may hold what is not for everybody; it is in a file of its own
//! that only root can read.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::config::{FlakeRef, Instance};
use crate::error::{Context, Error, OrLog, Result};
use crate::nix::profile::Generation;
use crate::paths::Paths;
use crate::run::bad::Bad;
use crate::run::ended::Ended;
use crate::run::journal::{FORMAT, Run};
use crate::run::notes::Proposal;
use crate::run::undo::Undone;
use crate::run::{Outcome, Release, Stage, Trigger, asker};
use crate::system::{self, now, service};
use crate::text::{ago, short};
use crate::{files, json};

/// How many ended runs are remembered.
const HISTORY: usize = 50;
/// Of how many of them what was new and what changes is.
const DETAILED: usize = 10;
/// After how long a timer has a run start even if it finds nothing new itself, in seconds.
const LONGEST: u64 = 7 * 24 * 60 * 60;
/// More than a status and a program's output take, in bytes.
const RESERVE: u64 = 128 * 1024;

/// What is known of one instance.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Status {
    format: u32,
    /// Why not all of it could be read; none if it could.
    #[serde(skip)]
    pub unreadable: Option<String>,
    /// The run under way.
    pub running: Option<Running>,
    /// The highest number of a request that an ended run has served.
    pub served: u64,
    /// The number of a request that is kept until a hold ends.
    pub held: Option<u64>,
    /// Who has asked for what is kept.
    pub held_by: Vec<String>,
    /// What was deployed last.
    pub deployed: Option<Deployed>,
    /// The commit that became the branch last, whatever has come of it since.
    pub accepted: Option<String>,
    /// What waits for the next boot.
    pub awaiting: Option<Awaiting>,
    /// What has booted and is not to go on running: in which boot, and the system.
    pub unfit: Option<(String, PathBuf)>,
    /// What was deployed, was undone by hand, and is not deployed again until there is something else.
    pub undone: Option<Undone>,
    /// What could not be built or did not run, and is not tried again by the timer.
    pub bad: Option<Bad>,
    /// The last run that tried to deploy a release of a fleet's hub.
    pub tried: Option<Tried>,
    /// When the release expires that a fleet's hub has offered last, in seconds since 1970.
    pub expires: Option<u64>,
    /// When a run has ended well last, in seconds since 1970.
    pub succeeded: Option<u64>,
    /// How many runs have ended how.
    pub counts: BTreeMap<String, u64>,
    /// The ended runs, the last one first.
    pub runs: Vec<Ended>,
}

/// A run under way.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Running {
    /// The last stage of root's that began.
    pub stage: Stage,
    /// Why the run began.
    pub trigger: Trigger,
    /// Who or what has asked for it.
    #[serde(default)]
    pub by: Vec<String>,
    /// When, in seconds since 1970.
    pub started: u64,
    /// Which stages of root's have begun, and when.
    #[serde(default)]
    pub stages: Vec<(Stage, u64)>,
}

/// A commit that this machine runs.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Deployed {
    /// The commit.
    pub commit: String,
    /// The system it was built to.
    pub system: PathBuf,
    /// From which flake.
    pub flake_ref: FlakeRef,
    /// With which arguments.
    pub flags: Vec<String>,
    /// Higher than that of all earlier deployments by this machine's instances.
    pub number: u64,
    /// The release of a fleet's hub that it is, or is made from.
    pub release: Option<Release>,
    /// What was new in it.
    pub summary: Option<String>,
    /// In which boot it was switched to, if it has not booted itself since.
    pub not_booted_since: Option<String>,
    /// What it was made from, and what was in it.
    #[serde(default)]
    pub base: String,
    /// The same if it is made again.
    #[serde(default)]
    pub tree: String,
    /// What there is to go back to.
    pub before: Option<Box<Earlier>>,
}

/// What ran before something was deployed.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Earlier {
    /// The system.
    pub system: PathBuf,
    /// What was booted.
    pub generation: Option<Generation>,
    /// What the instance had deployed last then.
    pub deployed: Option<Deployed>,
    /// Which units were not well, if that is known.
    pub unwell: Option<BTreeSet<String>>,
    /// Which health checks passed.
    #[serde(default)]
    pub passed: Vec<String>,
}

/// A commit that the next boot of this machine brings.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Awaiting {
    /// The commit.
    pub commit: String,
    /// The system it was built to.
    pub system: PathBuf,
}

/// A try to deploy a release.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Tried {
    /// How many there have been to deploy this release.
    pub count: u32,
    /// The last of them.
    pub run: Ended,
}

impl Deployed {
    /// Whether it is what this machine itself was to run, and not what others fetch.
    pub fn is_own(&self) -> bool {
        self.system.is_absolute()
    }
}

impl Status {
    /// Reads what is known: as much of it as makes sense.
    pub fn read(paths: &Paths) -> Self {
        let (none, path) = (Self { format: FORMAT, ..Self::default() }, paths.status());
        let Some(text) = files::if_there(fs::read(&path)).transpose() else { return none };
        let text = text.map_err(|error| error.to_string());
        let (status, why) = match text.and_then(|text| json::parse_most::<Self>(&text).map_err(|error| error.to_string())) {
            Ok((status, why)) if status.format == FORMAT => (status, why.map(|error| error.to_string())),
            other => (none, Some(other.err().unwrap_or_else(|| "unsupported format".into()))),
        };
        let unreadable = why.inspect(|why| log::warn!("Ignoring what is unreadable of the status file {}: {why}.", path.display()));
        Self { unreadable, ..status }
    }

    /// Whether the last run has failed.
    pub fn has_failed(&self) -> bool {
        self.runs.first().is_some_and(|run| run.result.is_failure())
    }

    /// Why a timer has a run start whatever may be new; none if the last one has left all as it should be.
    pub fn unsettled(&self, now: u64) -> Option<&'static str> {
        let Some(last) = self.runs.first() else { return Some("there was none yet") };
        let is_well = matches!(last.result, Outcome::Deployed | Outcome::Unchanged) && last.warnings.is_empty();
        let reasons = [
            (self.running.is_some(), "one is under way, or was cut off"),
            (self.held.is_some(), "a request is kept"),
            (!is_well, "the last one has not left all as it should be"),
            (last.reboot_needed || self.awaiting.is_some(), "a reboot is awaited"),
            (self.bad.is_some() || self.undone.is_some(), "there is something that is not deployed"),
            (now.abs_diff(last.finished) > LONGEST, "the last one was long ago"),
        ];
        reasons.iter().find_map(|(is_so, why)| is_so.then_some(*why))
    }

    /// Fails if what is known to be bad is proposed again without having been asked for, or too soon.
    pub fn check_not_bad(&self, instance: &str, proposal: &Proposal, options: &Instance) -> Result<()> {
        let is_asked = self.running.as_ref().is_none_or(|running| running.trigger == Trigger::Request);
        self.bad.as_ref().map_or(Ok(()), |bad| bad.check(instance, proposal, options, is_asked))
    }

    /// Why a candidate is withheld, if it is: its deployment was undone by hand, by whichever instance, and it has not been
    /// deployed again.
    pub fn withholds(&self, paths: &Paths, proposal: &Proposal) -> Option<String> {
        if proposal.unchanged && self.awaiting.is_none() {
            return None;
        }
        let by = self.running.as_ref().map_or(&[][..], |running| &running.by);
        let undone = paths.with_status().iter().filter_map(|instance| Self::read(instance).undone).find(|undone| undone.is(proposal));
        undone?.withholds(paths.name(), by, now())
    }

    /// The commit of the deployment that can be undone: what awaits the next boot, or else what was deployed last.
    pub fn last_deployment(&self, instance: &str) -> Result<String> {
        let why = match (&self.awaiting, &self.deployed, &self.undone) {
            (Some(next), _, Some(undone)) if undone.before.as_deref().unwrap_or_default() == next.commit => {
                format!("the next boot undoes {} already; reboot", short(&undone.commit))
            }
            (Some(Awaiting { commit, .. }), ..) | (_, Some(Deployed { commit, before: Some(_), .. }), _) => return Ok(commit.clone()),
            (.., Some(undone)) => {
                let when = ago(undone.since, now());
                format!("{} was undone {when} by {}, and what ran before that is not known", short(&undone.commit), undone.by)
            }
            (_, Some(_), _) => "what ran before its last deployment is not known; use nixos-rebuild switch --rollback".into(),
            _ => "it has deployed nothing".into(),
        };
        Err(Error::new(format!("Failed to roll back {instance}: {why}")))
    }

    /// Says that a run is in one of root's stages.
    pub fn announce(paths: &Paths, run: &Run, stage: Stage) -> Result<()> {
        let _alone = paths.alone();
        let status = Self::read(paths);
        let mut stages = status.running.filter(|running| running.started == run.started).map_or(Vec::new(), |running| running.stages);
        stages.push((stage, now()));
        let running = Running { stage, trigger: run.trigger, by: run.by.clone(), started: run.started, stages };
        // the run's journal has the number of what was kept
        let is_kept = run.trigger == Trigger::Rollback;
        let (held, held_by) = if is_kept { (status.held, status.held_by) } else { (None, Vec::new()) };
        Self { running: Some(running), held, held_by, ..status }.write(paths)
    }

    /// The run under way, which enters one of root's last stages; none if none has begun.
    pub fn enter(paths: &Paths, stage: Stage) -> Result<Option<Run>> {
        match Run::load(paths.journal())? {
            Some(run) => Self::announce(paths, &run, stage).map(|()| Some(run)),
            None if Self::read(paths).running.is_none() => Ok(None),
            None => Err(Error::new(format!("Failed to {stage}: no run is under way"))),
        }
    }

    /// Keeps the number of a request, if one waits, until a hold ends; no run is under way.
    pub fn keep_request(paths: &Paths, number: Option<u64>, by: Vec<String>) -> Result<()> {
        let _alone = paths.alone();
        let mut status = Self::read(paths);
        if number <= status.held && status.running.is_none() {
            return Ok(());
        }
        status.held_by = asker::all(status.held_by.into_iter().chain(by));
        Self { running: None, held: number.max(status.held), ..status }.write(paths)
    }

    /// What the next boot was to undo stays.
    pub fn keep_undone(paths: &Paths) -> Result<()> {
        let _alone = paths.alone();
        Self { undone: None, ..Self::read(paths) }.write(paths)
    }

    /// Keeps room for a report on a disk that is full then.
    pub fn reserve(paths: &Paths) {
        let path = paths.reserve();
        files::reserve(&path, RESERVE).doing("write", &path).or_warn();
    }

    /// Puts an ended run before the others.
    pub(super) fn remember(&mut self, ended: Ended) {
        if !self.runs.iter().any(|run| (&run.id, run.result) == (&ended.id, ended.result)) {
            *self.counts.entry(ended.result.to_string()).or_default() += 1;
        }
        if !ended.result.is_failure() && ended.result != Outcome::StartedOver {
            self.succeeded = Some(ended.finished);
        }
        // a report that was cut off is made again
        self.runs.retain(|run| run.id != ended.id);
        self.runs.insert(0, ended);
        self.runs.truncate(HISTORY);
        for run in self.runs.iter_mut().skip(DETAILED) {
            (run.news, run.changes) = (Vec::new(), Vec::new());
        }
    }

    /// Writes it down, into the room that is kept for that on a disk that is full.
    pub(super) fn write(mut self, paths: &Paths) -> Result<()> {
        self.write_plainly(paths).or_else(|error| {
            files::remove(&paths.reserve()).map_err(|_| error)?;
            self.write_plainly(paths)
        })
    }

    pub(super) fn write_plainly(&mut self, paths: &Paths) -> Result<()> {
        self.format = FORMAT;
        let path = paths.status();
        if self.unreadable.is_some() {
            files::keep_aside(&path).doing("keep", &path)?;
            self.unreadable = None;
        }
        files::write_json(&path, self, 0o644)?;
        service::start_if_there("ekiben-metrics.service");
        Ok(())
    }
}

/// Notes, after a boot, that what was deployed has booted.
pub fn note_boot(paths: &Paths) -> Result<()> {
    let _alone = paths.alone();
    let running = system::current()?;
    for paths in paths.with_status() {
        let mut status = Status::read(&paths);
        let deployed = status.deployed.as_mut().filter(|deployed| system::is_of(&deployed.system, &running));
        if deployed.is_some_and(|deployed| deployed.not_booted_since.take().is_some()) {
            status.write(&paths)?;
        }
    }
    Ok(())
}

/// What each of this machine's instances deployed last.
pub fn all_deployed(paths: &Paths) -> Vec<Deployed> {
    paths.with_status().iter().filter_map(|instance| Status::read(instance).deployed).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::RunId;
    use crate::testing::Directory;
    use serde_json::{Value, json};

    fn ended(id: &str, result: &str) -> Value {
        json!({
            "id": id, "result": result, "trigger": "timer", "started": 1, "finished": 2, "commit": null, "summary": null, "stage": null,
            "error": null, "warnings": [], "rebootNeeded": false, "stages": [["prepare", 1], ["quarantine", 2]],
        })
    }

    #[test]
    fn what_a_newer_version_has_written_hides_nothing_else() {
        let directory = Directory::new();
        let paths = Paths::of_test(directory.path());
        let mut odd = ended("3", "deployed");
        (odd["started"], odd["release"]) = (json!("now"), json!({"id": 5}));
        let status = json!({
            "format": 1, "served": 7, "held": 9, "heldBy": ["alice"], "accepted": "c", "bad": {"tree": "t"},
            "running": {"stage": "quarantine", "trigger": "newer", "started": 5},
            "runs": [ended("4", "quarantined"), odd, ended("2", "deployed")],
        });
        let text = status.to_string();
        fs::write(paths.status(), &text).unwrap();
        let status = Status::read(&paths);
        assert_eq!((status.served, status.held, status.accepted.as_deref()), (7, Some(9), Some("c")));
        assert_eq!(status.running.as_ref().unwrap().stage.to_string(), "unknown");
        // the last one is not taken for one that went well
        let runs: Vec<_> = status.runs.iter().map(|run| format!("{} {}", run.id, run.result)).collect();
        assert_eq!(runs, ["4 unknown", "3 deployed", "2 deployed"]);
        assert!(status.has_failed() && status.unsettled(3).is_some() && status.bad.is_none());
        assert!(status.unreadable.as_ref().unwrap().starts_with("bad"), "{:?}", status.unreadable);
        status.write(&paths).unwrap();
        assert_eq!(fs::read_to_string(files::aside(&paths.status())).unwrap(), text);
        let status = Status::read(&paths);
        assert!(status.unreadable.is_none() && status.runs.len() == 3 && status.held == Some(9));
    }

    #[test]
    fn all_attempts_to_begin_are_one_run() {
        let directory = Directory::new();
        let paths = Paths::of_test(directory.path());
        for id in ["a", "a", "b", "c"].map(|id| RunId::try_from(id.repeat(32)).unwrap()) {
            Status::report_unopened(&paths, &id, "no room").unwrap();
            let status = Status::read(&paths);
            assert_eq!((status.runs.len(), &*status.runs[0].id, status.counts["failed"]), (1, &*id, 1));
        }
    }

    #[test]
    fn a_status_that_makes_no_sense_is_said_to_and_kept() {
        let directory = Directory::new();
        let paths = Paths::of_test(directory.path());
        let (path, aside) = (paths.status(), files::aside(&paths.status()));
        assert!(Status::read(&paths).unreadable.is_none());
        for text in ["", "{", "[]", "\0\0\0", r#"{"format": 99, "served": 5}"#, r#"{"served": 5}"#, r#"{"format": "x"}"#] {
            fs::write(&path, text).unwrap();
            let status = Status::read(&paths);
            assert!(status.unreadable.is_some() && status.served == 0, "{text}");
            status.write(&paths).unwrap();
            assert_eq!(fs::read_to_string(&aside).unwrap(), text);
            assert!(Status::read(&paths).unreadable.is_none());
        }
        fs::remove_file(&path).unwrap();
        fs::create_dir_all(path.join("deep")).unwrap();
        Status::read(&paths).write(&paths).unwrap();
        assert!(path.is_file() && aside.join("deep").is_dir());
    }
}
