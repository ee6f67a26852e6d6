//! A hub that publishes by itself: what the stages of its instance do with the fleet's repository.
//!
//! What is updated, evaluated and built is the candidate's commit, checked out on its own: nothing of the working tree
//! counts. The repository says what the hosts are, and no more: where releases go, how nix is called and what they are
//! signed with is this machine's configuration.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::config::{Instance, Publish, Wave};
use crate::error::{Context, Error, Result};
use crate::files;
use crate::fleet::Provenance;
use crate::fleet::hub::holds::Holds;
use crate::fleet::hub::jobs::{LINES, parallel};
use crate::fleet::hub::memory::Memory;
use crate::fleet::hub::plan::{self, Member, Plan};
use crate::fleet::hub::publish::{self, Built, Manner, Placed};
use crate::fleet::hub::repository::{FleetRepository, Host};
use crate::fleet::hub::served::ServedDirectory;
use crate::fleet::hub::settings::Settings;
use crate::fleet::hub::{lost, rollout};
use crate::fleet::temporary::Temporary;
use crate::gather::gather;
use crate::git::Repository;
use crate::git::lockfile::{LockFile, Update};
use crate::names::{HostName, RunId};
use crate::nix::cache::Cache;
use crate::paths::Paths;
use crate::run::notes::run_id;
use crate::run::published::{HostStep, Offered, Published};

/// What the stage that builds hands on to the one that publishes, which evaluates nothing.
#[derive(Deserialize, Serialize)]
struct Handover {
    run: RunId,
    origin: Provenance,
    expires_after: Option<u64>,
    built: Vec<Built>,
    left_out: BTreeMap<HostName, String>,
    unknown: BTreeMap<String, String>,
    lost: Option<String>,
    waves: Vec<Wave>,
}

/// Updates the inputs of all flakes of the repository, as it is in a commit.
pub fn updates(paths: &Paths, instance: &Instance, repository: &Repository, base: &str) -> Result<Vec<Update>> {
    let Some(inputs) = &instance.inputs else { return Ok(Vec::new()) };
    let (fleet, _) = check_out(paths, instance, repository, base)?;
    let top = source(paths).canonicalize().doing("read", &source(paths))?;
    let cache = Cache::own()?;
    let limit = Duration::from_secs(instance.timeouts.prepare);
    let mut updates: BTreeMap<String, Update> = BTreeMap::new();
    for flake in fleet.flakes()? {
        let path = flake.lock_file();
        let old = path.exists().then(|| fs::read(&path)).transpose().doing("read", &path)?;
        let lock = LockFile::parse(old.as_deref())?;
        let asked: Vec<_> = inputs.iter().filter(|input| lock.resolve(input).is_ok()).cloned().collect();
        if asked.is_empty() && !inputs.is_empty() {
            continue;
        }
        let new = fleet.updated(&flake, &cache, &lock.meant_by(&asked), limit)?;
        let below = || path.strip_prefix(&top).or_else(|_| path.strip_prefix(source(paths))).ok().and_then(Path::to_str);
        let path = below().ok_or("it is not in the repository").doing("update", &path)?.to_owned();
        updates.entry(path.clone()).or_insert(Update { path, old, new, asked });
    }
    let unknown = |input: &&String| !updates.values().any(|update| update.asked.contains(input));
    match inputs.iter().find(unknown) {
        Some(input) => Err(Error::new(format!("Failed to update {input}: no flake has an input of this name"))),
        None => Ok(updates.into_values().collect()),
    }
}

/// Builds all hosts of a commit. One that fails leaves out itself only; fails if there is no other.
pub fn build(paths: &Paths, instance: &Instance, publish: &Publish, repository: &Repository, commit: &str) -> Result<()> {
    let (fleet, settings) = check_out(paths, instance, repository, commit)?;
    let jobs = publish.parallel.get();
    let (hosts, failed) = fleet.hosts(jobs)?;
    // where there are none, all are in the only one
    let known: Vec<_> = hosts.iter().map(|host| &host.name).collect();
    let (waves, places) = plan::assign(&publish.waves, &settings.groups, &known, !failed.is_empty())?;
    let archives = archives(paths);
    files::make_directory(&archives).doing("create", &archives)?;
    let done = parallel(&hosts, jobs, |host| make(&fleet, host, &archives));
    let (mut built, mut left_out, mut first) = (Vec::new(), BTreeMap::new(), None);
    for ((host, done), wave) in hosts.iter().zip(done).zip(places) {
        match done {
            Ok(made) => built.push(Built { wave, silent_after: settings.silence(&made.name).as_secs(), ..made }),
            Err(error) => {
                log::error!("{}: {error}.", host.name);
                for line in error.end(LINES) {
                    log::error!("{}: | {line}", host.name);
                }
                left_out.insert(host.name.clone(), error.to_string());
                first = first.or(Some(error));
            }
        }
    }
    let mut unknown = BTreeMap::new();
    for (place, error) in failed {
        log::error!("{place}: {error}.");
        unknown.insert(place, error.to_string());
        first = first.or(Some(error));
    }
    if built.is_empty() {
        return Err(first.unwrap_or_else(|| Error::new("Failed to build: there is no host in the repository")));
    }
    let origin = fleet.commit();
    let replaced = hosts.iter().filter(|host| !left_out.contains_key(&host.name));
    let lost = lost::said(&lost::lost(&ServedDirectory::new(&publish.directory)?, &fleet, &origin, replaced));
    let handover = Handover { run: run_id()?, origin, expires_after: settings.expires_after, built, left_out, unknown, lost, waves };
    files::write_json(&paths.own("built.json"), &handover, 0o600)
}

fn make(fleet: &FleetRepository, host: &Host, archives: &Path) -> Result<Built> {
    log::info!("{}: building ...", host.name);
    let system = fleet.evaluate(host)?;
    fleet.build(host, &system)?;
    let source = &host.source;
    let archive = archives.join(&source.sha256);
    // hosts may share it
    if !archive.exists() {
        fleet.provide(source)?;
        files::write(&archive, &fs::read(&source.archive).doing("write", &archive)?, 0o600).doing("write", &archive)?;
    }
    Ok(Built::of(host, &system))
}

/// Publishes what a run has built; its own unit does so, with the key that signs releases.
pub fn release(paths: &Paths, publish: &Publish, run: &RunId) -> Result<()> {
    let path = paths.own("built.json");
    let handover: Handover = files::read_json(&path)?.ok_or("nothing has been built").doing("read", &path)?;
    if handover.run != *run {
        return Err("it belongs to another run").doing("read", &path);
    }
    let key = std::env::var_os("CREDENTIALS_DIRECTORY").map(|directory| PathBuf::from(directory).join("signing-key"));
    let hub = ServedDirectory::new(&publish.directory)?;
    let _turn = hub.turn()?;
    let manner = Manner {
        build: false,
        key: key.as_deref().filter(|key| key.exists()),
        unsigned: false,
        no_key: "its release is signed, and services.ekiben.hub.publish.signingKeyFile is not set; set it",
        lasting: handover.expires_after,
        origin: handover.origin,
        memory: Memory::new(&publish.directory),
        holds: Holds::read(&hub)?,
        plan: Plan::read(&hub),
        waves: !publish.waves.is_empty(),
        scratch: Temporary::below(&std::env::temp_dir())?,
    };
    let offer = |made: &Built| publish::offer(&hub, made, &archives(paths).join(&made.sha256), &manner);
    let mut hosts: BTreeMap<_, _> = gather(handover.left_out.iter().map(|(name, error)| (name.clone(), Offered::left_out(error))));
    let mut members = Vec::new();
    for (made, done) in handover.built.iter().zip(parallel(&handover.built, publish.parallel.get(), offer)) {
        let offered = match done {
            Err(error) => Offered::left_out(&error.to_string()),
            Ok(Placed { member, new, .. }) => {
                let release = member.as_ref().map(|member| member.release.clone());
                let waits = member.as_ref().is_some_and(|member| made.wave > 0 && member.is_new());
                let is_held = manner.holds.of(Some(&made.name)).is_some();
                let (wave, silent_after) = (made.wave, made.silent_after);
                members.extend(member.map(|member| Member { wave, silent_after, ..member }));
                let state = match (is_held, waits) {
                    (true, _) => HostStep::Held,
                    (_, true) => HostStep::Waiting,
                    _ => HostStep::Published,
                };
                Offered { release, new, error: None, state, wave: waits.then_some(wave + 1) }
            }
        };
        hosts.insert(made.name.clone(), offered);
    }
    if manner.waves {
        rollout::propose(&hub, manner.plan.as_ref(), &manner.origin, handover.waves, members)?;
    } else {
        rollout::end(&hub, manner.plan.as_ref())?;
    }
    Published { run: run.clone(), hosts, unknown: handover.unknown, lost: handover.lost }.tell(paths)
}

/// The fleet's repository as it is in a commit. Of its settings, those count that are not about this machine.
fn check_out(paths: &Paths, instance: &Instance, repository: &Repository, commit: &str) -> Result<(FleetRepository, Settings)> {
    let source = source(paths);
    repository.check_out(commit, &source)?;
    let mut settings = Settings::read(&source)?;
    if !settings.flags.is_empty() {
        log::warn!("flags of fleet.json do not count here: set services.ekiben.hub.publish.flags.");
    }
    settings.flags.clone_from(&instance.flags);
    settings.signing_key = None;
    let mut fleet = FleetRepository::open(&source, &settings)?;
    // one that does not come to its end leaves out itself only, too
    fleet.limit = Some(Duration::from_secs(instance.timeouts.build));
    Ok((fleet, settings))
}

fn source(paths: &Paths) -> PathBuf {
    paths.own("source")
}

fn archives(paths: &Paths) -> PathBuf {
    paths.own("archives")
}
