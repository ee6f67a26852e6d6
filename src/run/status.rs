//! What everybody may know of an instance: a file that root writes and anybody may read, and
//! `ekiben status` shows.
//!
//! What a failing program said may hold what is not for everybody; it is in a file of its own
//! that only root can read.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::config::{FlakeRef, Instance};
use crate::error::{Context, Error, Result};
use crate::files;
use crate::layout::Layout;
use crate::nix::profile;
use crate::run::Release;
use crate::run::hold::Hold;
use crate::run::journal::{FORMAT, Run};
use crate::run::notes::{Proposal, run_id};
use crate::run::{Failure, Outcome, Stage, Trigger};
use crate::system::{self, now};

/// How many ended runs are remembered.
const HISTORY: usize = 50;
/// More than a status and a program's output take, in bytes.
const RESERVE: u64 = 128 * 1024;
/// How long what is known to be bad is not tried again when it was tried once, in seconds; twice that for each more.
const FIRST_PAUSE: u64 = 60;
/// No pause is longer.
const LONGEST_PAUSE: u64 = 3600;

/// What is known of one instance.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Status {
    format: u32,
    /// The run under way.
    pub running: Option<Running>,
    /// The highest number of a request that an ended run has served.
    pub served: u64,
    /// The number of a request that is kept until a hold ends.
    pub held: Option<u64>,
    /// What was deployed last.
    pub deployed: Option<Deployed>,
    /// What waits for the next boot.
    pub awaiting: Option<Awaiting>,
    /// What has booted and is not to go on running: in which boot, and the system.
    pub unfit: Option<(String, PathBuf)>,
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
    flake_ref: FlakeRef,
    /// With which arguments.
    flags: Vec<String>,
    /// Higher than that of all earlier deployments by this machine's instances.
    number: u64,
    /// The release of a fleet's hub that it is, or is made from.
    pub release: Option<Release>,
    /// What was new in it.
    pub summary: Option<String>,
    /// In which boot it was switched to, if it has not booted itself since.
    #[serde(default)]
    not_booted_since: Option<String>,
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

/// A candidate that failed by its own fault.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Bad {
    base: String,
    tree: String,
    options: Instance,
    /// The commit that was tried last.
    #[serde(default)]
    pub commit: String,
    /// What came of it.
    #[serde(default)]
    pub error: String,
    /// How often it has been tried.
    #[serde(default)]
    pub tries: u32,
    /// When it was tried last, in seconds since 1970.
    #[serde(default)]
    pub tried: u64,
}

impl Bad {
    fn is(&self, proposal: &Proposal, options: &Instance) -> bool {
        (&*self.base, &*self.tree, &self.options) == (&*proposal.base, &*proposal.tree, options)
    }

    /// How long it is not tried again after it was tried last, in seconds, whoever asks: each try disturbs what
    /// runs, and whoever may ask may not mean well. The first pause is no longer than it takes to mend something.
    fn pause(&self) -> u64 {
        (FIRST_PAUSE << self.tries.saturating_sub(1).min(16)).min(LONGEST_PAUSE)
    }

    /// Whether it may not be tried yet; a clock that has been set back does not make that longer.
    fn is_too_early(&self, now: u64) -> bool {
        now.abs_diff(self.tried) < self.pause()
    }
}

/// A run that has ended.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Ended {
    /// The identifier that systemd gave it.
    pub id: String,
    /// How.
    pub result: Outcome,
    /// Why it began.
    pub trigger: Trigger,
    /// When it began, in seconds since 1970.
    pub started: u64,
    /// When it ended.
    pub finished: u64,
    /// What it proposed to run.
    pub commit: Option<String>,
    /// The commit that this was, or was made from: one that others know.
    #[serde(default)]
    pub base: Option<String>,
    /// What was new in it.
    pub summary: Option<String>,
    /// The release of a fleet's hub that this was, or was made from.
    #[serde(default)]
    pub release: Option<Release>,
    /// In which stage it failed.
    pub stage: Option<Stage>,
    /// Why it failed.
    pub error: Option<String>,
    /// Whether nothing was tried: what it proposes is known to be bad.
    #[serde(default)]
    pub refused: bool,
    /// What to know all the same.
    pub warnings: Vec<String>,
    /// Whether the machine runs the new system only after a reboot.
    pub reboot_needed: bool,
    /// How long its stages took, in seconds.
    #[serde(default)]
    pub stages: Vec<(Stage, u64)>,
}

impl Status {
    /// Reads what is known; nothing, if the file is not there or makes no sense.
    pub fn read(layout: &Layout) -> Self {
        let path = layout.status();
        let text = match fs::read(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Self::default(),
            other => other.map_err(|error| error.to_string()),
        };
        let status = text.and_then(|text| serde_json::from_slice::<Self>(&text).map_err(|error| error.to_string()));
        match status {
            Ok(status) if status.format == FORMAT => status,
            other => {
                let why = other.err().unwrap_or_else(|| "unsupported format".into());
                log::warn!("Ignoring unreadable status file {}: {why}.", path.display());
                Self::default()
            }
        }
    }

    /// Whether the last run has failed.
    pub fn has_failed(&self) -> bool {
        self.runs.first().is_some_and(|run| run.result.is_failure())
    }

    /// Fails if what is known to be bad is proposed again without having been asked for, or too soon.
    pub fn check_not_bad(&self, instance: &str, proposal: &Proposal, options: &Instance) -> Result<()> {
        let Some(bad) = self.bad.as_ref().filter(|bad| bad.is(proposal, options)) else { return Ok(()) };
        let is_asked = self.running.as_ref().is_none_or(|running| running.trigger == Trigger::Request);
        let (now, retry) = (now(), bad.tried + bad.pause());
        if is_asked && !bad.is_too_early(now) {
            return Ok(());
        }
        let ask = format!("run `ekiben trigger {instance}` to try it again");
        let wait = if bad.is_too_early(now) { format!(", not before {} s from now", retry.saturating_sub(now)) } else { String::new() };
        let (commit, tries, when) = (&proposal.commit, times(bad.tries), ago(bad.tried, now));
        Err(Error::new(format!(
            "Failed to deploy {commit}: it is known to be bad (tried {tries}, last {when}; {ask}{wait}): {}",
            bad.error
        )))
    }

    /// Says that a run is in one of root's stages.
    pub fn announce(layout: &Layout, run: &Run, stage: Stage) -> Result<()> {
        let status = Self::read(layout);
        let mut stages = status.running.filter(|running| running.started == run.started).map_or(Vec::new(), |running| running.stages);
        stages.push((stage, now()));
        let running = Running { stage, trigger: run.trigger, started: run.started, stages };
        // the run's journal has the number of what was kept
        Self { running: Some(running), held: None, ..status }.write(layout)
    }

    /// Keeps the number of a request, if one waits, until a hold ends; no run is under way.
    pub fn keep_request(layout: &Layout, number: Option<u64>) -> Result<()> {
        let status = Self::read(layout);
        if number <= status.held && status.running.is_none() {
            return Ok(());
        }
        Self { running: None, held: number.max(status.held), ..status }.write(layout)
    }

    /// Says that this process' run failed before it had a journal, unless it has been reported.
    pub fn report_unopened(layout: &Layout, why: &str) -> Result<()> {
        let mut status = Self { running: None, ..Self::read(layout) };
        let id = run_id()?.to_string();
        let mut started = now();
        if let Some(last) = status.runs.first() {
            if last.id == id {
                return Ok(());
            }
            if last.stage == Some(Stage::Begin) {
                // one of many attempts: since when
                started = last.started;
                status.runs.remove(0);
            }
        }
        status.remember(Ended {
            id: id.clone(),
            result: Outcome::Failed,
            trigger: Trigger::Timer,
            started,
            finished: now(),
            commit: None,
            base: None,
            refused: false,
            summary: None,
            release: None,
            stage: Some(Stage::Begin),
            error: Some(why.to_owned()),
            warnings: Vec::new(),
            reboot_needed: false,
            stages: Vec::new(),
        });
        // what is kept for the report of a run that has begun stays
        status.write_plainly(layout)?;
        tell(layout, &id);
        Ok(())
    }

    /// Keeps room for a report on a disk that is full then.
    pub fn reserve(layout: &Layout) {
        if let Err(error) = files::reserve(&layout.reserve(), RESERVE) {
            log::warn!("Failed to write {}: {error}.", layout.reserve().display());
        }
    }

    /// Says how a run ended, and draws the conclusions for the next.
    pub fn report(layout: &Layout, run: &Run, mut ended: Ended) -> Result<()> {
        let number = 1 + all_deployed(layout).iter().map(|deployed| deployed.number).max().unwrap_or(0);
        let mut status = Self::read(layout);
        let running = status.running.take();
        ended.stages = durations(running.map(|running| running.stages).unwrap_or_default(), run, ended.finished);
        // a run that has to be started over has served nobody
        if ended.result != Outcome::StartedOver {
            status.served = status.served.max(run.request.unwrap_or(0));
        }
        let options = run.instance.clone();
        let failure = run.failure.as_ref();
        if let Some(notes) = run.notes.as_ref().filter(|notes| notes.release.is_some()) {
            status.expires = notes.expires;
        }
        // not tried at all, because of what came of it before: that is what there is to know
        let is_refusal = failure.is_some_and(|failure| failure.stage == Stage::Prepare)
            && run.proposal().zip(status.bad.as_ref()).is_some_and(|(proposal, bad)| bad.is(proposal, &options));
        ended.refused = is_refusal;
        // the rest of an earlier report has failed, and that counts once
        let is_again = status.runs.iter().any(|known| (&known.id, known.result) == (&ended.id, ended.result));
        match (ended.result, run.proposal()) {
            _ if is_again => {}
            (Outcome::Deployed, Some(Proposal { commit, .. })) => {
                let Instance { flake_ref, flags, .. } = options;
                let (commit, system) = (commit.to_string(), run.candidate.clone().unwrap_or_default());
                let (release, summary) = (ended.release.clone(), ended.summary.clone());
                let not_booted_since = (!run.reboot_needed).then(system::boot_id);
                status.deployed = Some(Deployed { commit, system, flake_ref, flags, number, release, summary, not_booted_since });
                status.bad = None;
            }
            (Outcome::Unchanged | Outcome::Drifted, _) => status.bad = None,
            (Outcome::Failed | Outcome::RolledBack | Outcome::Stuck, Some(proposal))
                if failure.is_some_and(|failure| failure.stage != Stage::Prepare)
                    && (ended.result == Outcome::Stuck || failure.is_some_and(|failure| !failure.transient)) =>
            {
                let tries = 1 + status.bad.as_ref().filter(|bad| bad.is(proposal, &options)).map_or(0, |bad| bad.tries);
                let (base, tree, commit) = (proposal.base.to_string(), proposal.tree.to_string(), proposal.commit.to_string());
                let error = ended.error.clone().unwrap_or_default();
                status.bad = Some(Bad { base, tree, options, commit, error, tries, tried: now() });
            }
            _ => {}
        }
        let awaiting = run.candidate.clone().zip(ended.commit.clone()).map(|(system, commit)| Awaiting { commit, system });
        status.awaiting = match ended.result {
            Outcome::AwaitingBoot => awaiting,
            _ => status.awaiting.filter(|_| !run.reboot_needed && layout.trial().exists()),
        };
        if ended.result == Outcome::RolledBack && ended.reboot_needed {
            status.unfit = run.candidate.clone().map(|system| (system::boot_id(), system));
        }
        if ended.release.is_some() && !is_again && !ended.is_idle() && ended.stage != Some(Stage::Prepare) {
            let earlier = status.tried.as_ref().filter(|tried| tried.run.release == ended.release);
            // what has waited for a boot since is the same one
            let count = earlier.map_or(1, |tried| tried.count + u32::from(tried.run.result != Outcome::AwaitingBoot));
            status.tried = Some(Tried { count, run: ended.clone() });
        }
        status.remember(ended);
        status.write(layout)?;
        if !is_again {
            tell(layout, &run.id);
        }
        if is_refusal { Ok(()) } else { keep_output(layout, failure.map_or(&[][..], |failure| &failure.tail)) }
    }

    fn remember(&mut self, ended: Ended) {
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
    }

    fn write(mut self, layout: &Layout) -> Result<()> {
        self.write_plainly(layout).or_else(|error| {
            files::remove(&layout.reserve()).map_err(|_| error)?;
            self.write_plainly(layout)
        })
    }

    fn write_plainly(&mut self, layout: &Layout) -> Result<()> {
        self.format = FORMAT;
        files::write_json(&layout.status(), self, 0o644)?;
        system::start_if_there("ekiben-metrics.service", "ekiben-metrics.service");
        Ok(())
    }
}

impl Ended {
    /// The end of `run`, now.
    pub fn new(run: &Run, result: Outcome, failure: Option<&Failure>) -> Self {
        Self {
            id: run.id.to_string(),
            result,
            trigger: run.trigger,
            started: run.started,
            finished: now(),
            commit: None,
            base: None,
            refused: false,
            summary: None,
            release: None,
            stage: failure.map(|failure| failure.stage),
            error: failure.map(|failure| failure.message.clone()),
            warnings: run.warnings.clone(),
            reboot_needed: run.reboot_needed,
            stages: Vec::new(),
        }
    }

    /// Whether it has found nothing to do.
    pub fn is_idle(&self) -> bool {
        matches!(self.result, Outcome::Unchanged | Outcome::Drifted)
    }
}

/// Notes, after a boot, that what was deployed has booted; says so if something else has.
pub fn note_boot(layout: &Layout) -> Result<()> {
    let running = system::current()?;
    for layout in layout.with_status() {
        let mut status = Status::read(&layout);
        let deployed = status.deployed.as_mut().filter(|deployed| system::is_of(&deployed.system, &running));
        if deployed.is_some_and(|deployed| deployed.not_booted_since.take().is_some()) {
            status.write(&layout)?;
        }
    }
    if let Some(drift) = drift(layout) {
        log::warn!("This machine {drift}.");
    }
    Ok(())
}

/// How what this machine runs differs from what was deployed last, in a line; none if it runs that, or nothing has been
/// deployed.
pub fn drift(layout: &Layout) -> Option<String> {
    let Deployed { system: deployed, not_booted_since, .. } = all_deployed(layout).into_iter().max_by_key(|deployed| deployed.number)?;
    let running = system::current().ok().filter(|running| !system::is_of(&deployed, running))?;
    let is_booted = system::named_by("/run/booted-system").is_ok_and(|booted| booted == running);
    let (how, but) = match not_booted_since {
        Some(since) if is_booted && since != system::boot_id() => ("", ", but did not boot"),
        None if is_booted => (", chosen at boot", ""),
        _ => (", switched to by hand", ""),
    };
    let name = |system: &Path| {
        profile::generation_of(system).map_or_else(|| system.display().to_string(), |number| format!("generation {number}"))
    };
    Some(format!("runs {}{how}; {} is deployed{but}", name(&running), name(&deployed)))
}

/// How long the stages took that have begun then; when the build has, the user's notes say.
fn durations(mut begun: Vec<(Stage, u64)>, run: &Run, finished: u64) -> Vec<(Stage, u64)> {
    let end = begun.get(1).map_or(finished, |(_, next)| *next);
    let build = run.notes.as_ref().and_then(|notes| notes.build_began).filter(|began| (run.started..=end).contains(began));
    if let (Some(build), Some((Stage::Prepare, _))) = (build, begun.first()) {
        begun.insert(1, (Stage::Build, build));
    }
    let ends: Vec<_> = begun.iter().skip(1).map(|(_, next)| *next).chain([finished]).collect();
    begun.iter().zip(ends).map(|((stage, began), end)| (*stage, end.saturating_sub(*began))).collect()
}

/// Has whoever wants to know be told of the end of a run.
fn tell(layout: &Layout, run: &str) {
    let unit = |run: &str| format!("ekiben-notify-{}@{run}.service", layout.name());
    system::start_if_there(&unit(run), &unit(""));
}

/// Whether this very commit is what was last deployed of its flake, by whichever instance.
pub fn is_deployed(layout: &Layout, commit: &str, instance: &Instance) -> bool {
    let same_flake = |deployed: &Deployed| deployed.flake_ref == instance.flake_ref && deployed.flags == instance.flags;
    let last = all_deployed(layout).into_iter().filter(same_flake).max_by_key(|deployed| deployed.number);
    last.is_some_and(|deployed| deployed.commit == commit)
}

/// What each of this machine's instances deployed last.
fn all_deployed(layout: &Layout) -> Vec<Deployed> {
    layout.with_status().iter().filter_map(|instance| Status::read(instance).deployed).collect()
}

/// Keeps the end of a failing program's output for root; removes an earlier one's if there is none.
fn keep_output(layout: &Layout, tail: &[String]) -> Result<()> {
    let path = layout.output();
    let doing = || format!("write {}", path.display());
    if tail.is_empty() { files::remove(&path) } else { files::write(&path, (tail.join("\n") + "\n").as_bytes(), 0o600) }.context(doing)
}

/// An instance as whoever holds a token of it may know it: how it is, not why.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ForClients {
    /// Whether a request waits for a run.
    queued: bool,
    /// Why it waits, if nothing is deployed for now.
    hold: Option<Hold>,
    /// The run under way.
    running: Option<Running>,
    /// The highest number of a request that an ended run has served.
    served: u64,
    /// The run that ended last.
    last: Option<LastForClients>,
    /// What is known to be bad.
    bad: Option<KnownBad>,
}

/// A candidate that will not be tried again for now.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct KnownBad {
    commit: String,
    /// How often it has been tried.
    tries: u32,
    /// From when on a request has it tried again, in seconds since 1970.
    retry_after: u64,
}

/// How that run ended.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct LastForClients {
    result: Outcome,
    stage: Option<Stage>,
    commit: Option<String>,
    started: u64,
    finished: u64,
    reboot_needed: bool,
}

/// How an instance is, as JSON, for a client of the webhook.
pub fn for_clients(layout: &Layout) -> Result<String> {
    let path = layout.request();
    // before the status: a run that takes the request meanwhile shows there
    let queued = path.try_exists().context(|| format!("look for {}", path.display()))?;
    let Status { running, served, held, runs, bad, .. } = Status::read(layout);
    let bad = bad.map(|bad| KnownBad { retry_after: bad.tried + bad.pause(), commit: bad.commit, tries: bad.tries });
    let last = runs.into_iter().next().map(|run| {
        let Ended { result, stage, commit, started, finished, reboot_needed, .. } = run;
        LastForClients { result, stage, commit, started, finished, reboot_needed }
    });
    let (queued, hold) = (queued || held.is_some(), Hold::read(layout));
    serde_json::to_string(&ForClients { queued, hold, running, served, last, bad })
        .map(|text| text + "\n")
        .context(|| "write the state".into())
}

/// How often something was done.
pub fn times(count: u32) -> String {
    if count == 1 { "once".into() } else { format!("{count} times") }
}

/// How long ago a moment is, in its largest unit.
pub fn ago(then: u64, now: u64) -> String {
    let seconds = now.saturating_sub(then);
    let (count, unit) = match seconds {
        0..60 => (seconds, "s"),
        60..3600 => (seconds / 60, "min"),
        3600..86400 => (seconds / 3600, "h"),
        _ => (seconds / 86400, "d"),
    };
    format!("{count} {unit} ago")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Directory;

    fn bad(tries: u32, tried: u64) -> Bad {
        let options = serde_json::json!({
            "flakePath": "/srv/x", "flakeRef": "/srv/x#machine", "user": "deploy", "inputs": [], "operation": "switch", "flags": [],
            "pull": false, "push": false, "author": "a <a@example.org>", "healthChecks": {}, "onUnitFailure": "rollback",
            "rollback": true, "networkRetries": 0, "timeouts": { "prepare": 1, "build": 1, "activate": 1 },
        });
        let (hash, error) = ("0".repeat(40), "Failed to pass health check app".into());
        let options = serde_json::from_value(options).unwrap();
        Bad { base: hash.clone(), tree: hash.clone(), options, commit: hash, error, tries, tried }
    }

    fn check(bad: &Bad, trigger: Trigger) -> Result<()> {
        let running = Some(Running { stage: Stage::Prepare, trigger, started: 0, stages: Vec::new() });
        let proposal = serde_json::json!({
            "base": bad.base, "branch": "refs/heads/main", "head": bad.base, "commit": bad.commit, "tree": bad.tree,
            "summary": "", "unchanged": false,
        });
        let proposal = serde_json::from_value(proposal).unwrap();
        let status = Status { bad: Some(bad.clone()), running, ..Status::default() };
        status.check_not_bad("app", &proposal, &bad.options)
    }

    #[test]
    fn what_is_bad_is_tried_again_when_asked_for_and_less_and_less_often() {
        let now = now();
        assert!(check(&bad(1, now - 61), Trigger::Request).is_ok());
        let error = check(&bad(1, now - 61), Trigger::Timer).unwrap_err().to_string();
        assert!(error.contains("known to be bad (tried once, last 1 min ago; run `ekiben trigger app`"), "{error}");
        assert!(error.ends_with("Failed to pass health check app"), "{error}");
        let error = check(&bad(3, now - 61), Trigger::Request).unwrap_err().to_string();
        assert!(error.contains("not before 179 s from now") || error.contains("not before 178 s from now"), "{error}");
        assert!(check(&bad(3, now - 241), Trigger::Request).is_ok());
        assert!(check(&bad(100, now - 3590), Trigger::Request).is_err());
        assert!(check(&bad(100, now - 3601), Trigger::Request).is_ok());
        // the clock has been set back by a day
        assert!(check(&bad(1, now + 86400), Trigger::Request).is_ok());
    }

    #[test]
    fn clients_learn_what_is_bad_and_from_when_on_it_is_tried_again() {
        let directory = Directory::new();
        for below in ["queue", "status"] {
            fs::create_dir(directory.path().join(below)).unwrap();
        }
        let layout = Layout::below(directory.path(), "app");
        Status { bad: Some(bad(2, 1_000_000)), ..Status::default() }.write(&layout).unwrap();
        let state: serde_json::Value = serde_json::from_str(&for_clients(&layout).unwrap()).unwrap();
        assert_eq!(state["bad"], serde_json::json!({ "commit": "0".repeat(40), "tries": 2, "retryAfter": 1_000_120 }));
    }
}
