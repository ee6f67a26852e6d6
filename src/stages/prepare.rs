//! The first of the user's stages: make a candidate, or find that there is nothing new.
//!
//! A candidate is a commit: the branch's head, or its upstream's, with new revisions of the
//! instance's inputs on top. It exists only as an object under a ref of ours. Nothing that the
//! user can see is changed, and nothing at all is written if nothing is new.

use std::fs;
use std::path::Path;
use std::time::Duration;

use ::nix::fcntl::FlockArg;

use crate::config::Instance;
use crate::error::{Context, Error, OrLog, Result};
use crate::fleet::host::poll;
use crate::fleet::hub::candidate;
use crate::git::lockfile::{LockFile, Update};
use crate::git::patience::patiently;
use crate::git::{self, Repository, own};
use crate::names::{Branch, ObjectId};
use crate::nix::cache::Cache;
use crate::paths::Paths;
use crate::run::drift::is_deployed;
use crate::run::notes::{NEWS, Notes, Proposal};
use crate::run::status::Status;
use crate::stages::wording::{describe, message, revisions, summary};
use crate::{fault, files, nix, text};

/// The first pause before fetching is tried again; each is twice as long as the one before.
const PAUSE: Duration = Duration::from_secs(1);
/// What programs say that cannot fetch, and what there is to see to.
const ADVICE: [(&str, &str); 5] = [
    ("could not read Username", PASSWORD),
    ("Authentication failed for", PASSWORD),
    ("HTTP error 401", PASSWORD),
    ("couldn't find remote ref", "it has no such branch, or another server has answered"),
    ("Host key verification failed; fatal", "see to ~/.ssh/known_hosts of the instance's user"),
];
const PASSWORD: &str = "what its server takes as a password now belongs into ~/.netrc of the instance's user";

/// Runs the stage; what comes of it is in the notes.
pub fn prepare(paths: &Paths, instance: &Instance) -> Result<()> {
    // a look comes to its end before
    let _turn = files::lock(&paths.own(""), FlockArg::LockExclusive)?;
    let mut notes = Notes::begin(paths)?;
    let _ = files::clear(&paths.elapsed());
    if let Ok(found) = fs::read_to_string(paths.found()) {
        let _ = files::clear(&paths.found());
        if Status::read(paths).running.is_some_and(|running| running.by == ["timer"]) {
            log::info!("The timer's look found: {found}.");
        }
    }
    fault::point("prepare: begun");
    match propose_from_head(paths, instance, &mut notes).map_err(|error| git::explain(instance, error)) {
        Ok(mut proposal) => {
            let status = Status::read(paths);
            proposal.withheld = status.withholds(paths, &proposal);
            log::info!("{}.", describe(&proposal));
            let known = if proposal.withheld.is_some() { Ok(()) } else { status.check_not_bad(paths.name(), &proposal, instance) };
            notes.proposal = Some(proposal);
            if let Err(error) = known {
                return notes.fail(paths, error);
            }
            notes.write(paths)?;
            fault::point("prepare: noted");
            Ok(())
        }
        Err(error) => notes.fail(paths, error),
    }
}

/// Proposes, again if somebody else commits meanwhile and that gets in the way.
fn propose_from_head(paths: &Paths, instance: &Instance, notes: &mut Notes) -> Result<Proposal> {
    let scratch = paths.scratch()?;
    if instance.hub.is_some() {
        own::create(instance)?;
    }
    let open = || {
        let repository = Repository::open(instance)?;
        repository.recover(paths.name())?;
        repository.check_lock_file_is_clean(&scratch).map(|()| repository)
    };
    loop {
        let repository = patiently(instance, open)?;
        match propose(paths, instance, &repository, &scratch, notes) {
            Err(error) if patiently(instance, || Repository::open(instance))?.has_moved_from(&repository.branch, &repository.head) => {
                log::info!("{error}; starting over.");
            }
            other => return other,
        }
    }
}

fn propose(paths: &Paths, instance: &Instance, repository: &Repository, scratch: &Path, notes: &mut Notes) -> Result<Proposal> {
    let index = scratch.join("index");
    let reference = paths.reference();
    let retries = instance.network_retries;
    let base = if let Some(hub) = &instance.hub {
        let (manifest, commit) = persist(retries, || poll::fetch(paths, instance, hub, repository))?;
        (notes.release, notes.expires) = (Some(manifest.release), manifest.expires);
        commit
    } else if instance.pull {
        persist(retries, || repository.fetch_upstream(&reference, &paths.upstream(), paths.name()))?
    } else {
        repository.head.clone()
    };

    // what has become the branch is Ekiben's own commit on one that was signed
    let Status { deployed, accepted, awaiting, .. } = Status::read(paths);
    let mut ours = deployed.as_ref().map(|deployed| &deployed.commit).into_iter().chain(&accepted);
    if !instance.signers.is_empty() && !ours.any(|ours| *ours == base) {
        repository.check_signed(&base, &instance.signers, scratch)?;
    }
    persist(retries, || repository.complete(&base))?;
    let updates = persist(retries, || match &instance.publish {
        Some(_) => candidate::updates(paths, instance, repository, &base),
        None => update(instance, repository, &base, scratch),
    })?;
    fault::point("prepare: inputs updated");
    let (mut changes, mut locks) = (Vec::new(), Vec::new());
    for update in &updates {
        let changed = update.changes()?;
        locks.extend(update.new.as_deref().filter(|_| !changed.is_empty()).map(|new| (&*update.path, new)));
        // the same in several flakes
        changes.extend(changed.into_iter().filter(|change| !changes.contains(change)).collect::<Vec<_>>());
    }

    let propose = || {
        let commit = if locks.is_empty() {
            base.clone()
        } else {
            repository.commit_lock_files(&base, locks.iter().copied(), &message(&changes), &instance.author, &index)?
        };
        // what already waits for the next boot is the same when it is proposed again
        let awaiting = awaiting.as_ref().filter(|awaiting| repository.is_same(&awaiting.commit, &commit));
        let commit = awaiting.map_or(commit, |awaiting| awaiting.commit.clone());
        fault::point("prepare: committed");
        if commit == repository.head {
            git::drop_reference(instance, &reference, paths.name()).or_warn();
        } else {
            repository.check_forward(&commit, paths.name(), scratch)?;
            repository.rehearse_forward(&commit, scratch)?;
            repository.keep(&reference, &commit)?;
            repository.check_is_whole(&commit)?;
        }
        Ok(commit)
    };
    let has_moved = || Repository::open(instance).is_ok_and(|now| now.has_moved_from(&repository.branch, &repository.head));
    let commit = patiently(instance, || match propose() {
        Err(error) if has_moved() => Ok(Err(error)),
        other => other.map(Ok),
    })??;
    // what hosts can fetch is known when all of them have been looked at
    let unchanged = instance.publish.is_none() && is_deployed(paths, &commit, instance);
    let tree = repository.tree(&commit)?;
    let summary = summary(&repository.head, &base, &changes, notes.release.as_ref());
    let last =
        deployed.map(|deployed| deployed.commit).filter(|last| repository.contains(&base, last).is_ok_and(|comes_after| comes_after));
    let subjects = repository.subjects(last.as_ref().unwrap_or(&repository.head), &base, NEWS)?;
    let news = changes.iter().map(revisions).chain(subjects).take(NEWS).map(|line| text::line(&line)).collect();
    let id = |hash: &str| ObjectId::try_from(hash).context(|| "describe the candidate".into());
    Ok(Proposal {
        base: id(&base)?,
        branch: Branch::try_from(&*repository.branch).context(|| "describe the candidate".into())?,
        head: id(&repository.head)?,
        commit: id(&commit)?,
        tree: id(&tree)?,
        summary,
        news,
        unchanged,
        withheld: None,
    })
}

/// The lock file of the instance's flake, with its inputs updated.
pub fn update(instance: &Instance, repository: &Repository, base: &str, scratch: &Path) -> Result<Vec<Update>> {
    let Some(asked) = &instance.inputs else { return Ok(Vec::new()) };
    let path = repository.lock_file();
    let old = repository.read_file(base, &path)?;
    // of a release, inputs are the hub's business
    if instance.hub.as_ref().is_some_and(|hub| !hub.self_update || old.is_none()) {
        return Ok(Vec::new());
    }
    let inputs = LockFile::parse(old.as_deref())?.meant_by(asked);
    let flake = repository.flake_at(base, instance)?;
    let limit = Duration::from_secs(instance.timeouts.prepare);
    let new = nix::updated_lock_file(&Cache::own()?, &flake, &inputs, &scratch.join("flake.lock"), limit)?;
    Ok(vec![Update { path, old, new, asked: asked.clone() }])
}

/// The same error with what there is to see to, where that is known, and another try is of no use.
fn advised(error: Error) -> Error {
    let message = error.to_string();
    match ADVICE.iter().find(|(words, _)| message.contains(words)) {
        Some((_, advice)) if !error.is_transient() => Error::new(format!("{message}; {advice}")).with_tail(error.tail().to_vec()),
        _ => error,
    }
}

/// Tries again what the network failed, with growing pauses.
fn persist<T>(retries: u32, attempt: impl Fn() -> Result<T>) -> Result<T> {
    let attempt = || attempt().map_err(Error::of_network).map_err(advised);
    let mut pause = PAUSE;
    for _ in 0..retries {
        match attempt() {
            Err(error) if error.is_transient() => {
                log::warn!("{error}; trying again in {} s.", pause.as_secs());
                std::thread::sleep(pause);
                pause *= 2;
            }
            result => return result,
        }
    }
    attempt().map_err(|error| {
        if !error.is_transient() {
            return error;
        }
        let whose = if error.is_of_network() { "the network or the other side" } else { "this machine" };
        let attempts = if retries > 0 { format!(" ({} attempts)", retries + 1) } else { String::new() };
        let message = format!("{error}{attempts}; this looks like a problem of {whose}, not of the configuration");
        Error::new(message).with_tail(error.tail().to_vec()).transient()
    })
}
