//! Whether there is anything to do, by the means by which a run finds out, but neither repository nor inputs are written to:
//! a timer looks first, and asks for a run unless it is sure that there is not; and a run that waits for a cache looks
//! whether it still waits for what is wanted.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use ::nix::fcntl::FlockArg;

use crate::config::Instance;
use crate::error::{Context, Error, Result};
use crate::files;
use crate::fleet::host::poll;
use crate::git::Repository;
use crate::paths::Paths;
use crate::run::Outcome;
use crate::run::drift::{drift, is_deployed};
use crate::run::ended::Ended;
use crate::run::hold::Hold;
use crate::run::notes::Notes;
use crate::run::status::Status;
use crate::stages::prepare::update;
use crate::system::{now, service};

/// Why a look has a run begin comes after this.
const NEEDED: &str = "Failed to do without a run: ";

/// Looks for a timer: leaves in a file why a run is to begin, unless that would surely find all as the last one has left
/// it. Whatever goes wrong is a run's to report; that has the reason in its log. Fails if nothing can be left.
pub fn look(paths: &Paths, instance: &Instance) -> Result<()> {
    let found = paths.found();
    look_around(paths, instance).or_else(|error| fs::write(&found, error.to_string().trim_start_matches(NEEDED)).doing("write", &found))
}

fn look_around(paths: &Paths, instance: &Instance) -> Result<()> {
    if service::has_been_at_work(paths.name()) {
        log::info!("A run is under way; at its end, another one follows.");
        return File::create(paths.elapsed()).map(drop).doing("write", &paths.elapsed());
    }
    if instance.publish.is_some() {
        return Err(needed("all hosts have to be looked at"));
    }
    let status = Status::read(paths);
    let held = || Hold::read(paths).map(|hold| format!("held {}", hold.why()));
    if let Some(why) = status.unsettled(now()).map(String::from).or_else(held).or_else(|| drift(paths)) {
        return Err(needed(&why));
    }
    let turn = files::lock(&paths.own(""), FlockArg::LockExclusiveNonblock)?;
    let _turn = turn.ok_or_else(|| needed("a run is under way"))?;
    if let Some(hub) = &instance.hub {
        poll::look(paths, instance, hub)?;
    }
    if instance.hub.as_ref().is_none_or(|hub| hub.self_update) {
        look_at_repository(paths, instance)?;
    }
    files::clear(&paths.found()).doing("remove", &paths.found())?;
    let looked = paths.looked();
    // root has made it; it is its time that counts
    let written = File::options().write(true).open(&looked).and_then(|mut file| file.write_all(b"\n"));
    written.doing("write", &looked)
}

/// The part of a look that is about the repository and the inputs: neither is written to.
fn look_at_repository(paths: &Paths, instance: &Instance) -> Result<()> {
    let scratch = paths.scratch()?;
    let repository = Repository::open(instance)?;
    if repository.has_to_recover(paths.name()) {
        return Err(needed("a run was cut off"));
    }
    repository.check_lock_file_is_clean(&scratch)?;
    if !is_deployed(paths, &repository.head, instance) {
        return Err(needed("there is another commit"));
    }
    news(paths, instance, &repository, &repository.head, &scratch)?.map_or(Ok(()), |news| Err(needed(news)))
}

fn needed(why: &str) -> Error {
    Error::new(format!("{NEEDED}{why}"))
}

/// What there is that was not there when a commit was proposed or deployed, if anything.
fn news(paths: &Paths, instance: &Instance, repository: &Repository, commit: &str, scratch: &Path) -> Result<Option<&'static str>> {
    if instance.pull && !repository.knows_upstream(&paths.upstream())? {
        return Ok(Some("the upstream has changed"));
    }
    for updated in update(instance, repository, commit, scratch)? {
        if !updated.changes()?.is_empty() {
            return Ok(Some("inputs have changed"));
        }
    }
    Ok(None)
}

/// Whether somebody, or the timer, has asked for a run meanwhile that would be about something else than the one that has
/// left the notes.
pub fn is_overtaken(paths: &Paths, instance: &Instance, notes: &Notes) -> Result<bool> {
    let is_asked = paths.request().exists() || paths.elapsed().exists();
    let (Some(proposal), Some(began), true) = (&notes.proposal, notes.build_began, is_asked) else { return Ok(false) };
    if now().saturating_sub(began) < patience(&Status::read(paths).runs, began) {
        return Ok(false);
    }
    if let Some((hub, release)) = instance.hub.as_ref().zip(notes.release.as_ref()) {
        if poll::offers_another(paths, hub, release)? {
            return Ok(true);
        }
    }
    let repository = Repository::open(instance)?;
    let has_moved = repository.has_moved_from(&proposal.branch, &proposal.head);
    Ok(has_moved || news(paths, instance, &repository, &proposal.commit, &paths.scratch()?)?.is_some())
}

/// For how long a run that has begun then waits, whatever is newer: as long as those before it have been starting over.
/// Where changes come faster than the cache gets them, there would always be something newer.
fn patience(runs: &[Ended], began: u64) -> u64 {
    let first = runs.iter().take_while(|run| run.result == Outcome::StartedOver).last();
    first.map_or(0, |first| began.saturating_sub(first.finished))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_overtaken_again_and_again_is_waited_for_longer_and_longer() {
        let run = |result, finished| Ended { result, finished, ..Ended::default() };
        let (over, deployed) = (|finished| run(Outcome::StartedOver, finished), run(Outcome::Deployed, 10));
        assert_eq!(patience(&[], 100), 0);
        assert_eq!(patience(&[deployed.clone(), over(5)], 100), 0);
        assert_eq!(patience(&[over(100), deployed.clone()], 101), 1);
        assert_eq!(patience(&[over(130), over(100), deployed.clone(), over(5)], 131), 31);
    }
}
