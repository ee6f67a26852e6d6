//! The candidate's fate in the repository, decided by root and carried out as the instance's user:
//! check that it can still become the branch, make it the branch, or drop it.

use std::fmt;
use std::process::ExitCode;

use serde::{Deserialize, Serialize};

use crate::config::Instance;
use crate::error::{Error, OrLog, Result};
use crate::fault;
use crate::git::patience::patiently;
use crate::git::{self, Repository};
use crate::paths::Paths;
use crate::run::notes::Proposal;

/// What root may ask for.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Fate {
    /// Can the branch be fast-forwarded to the candidate, touching no edit?
    Check,
    /// Fast-forward it, and push if that is asked for.
    Accept,
    /// Forget the candidate.
    Drop,
    /// Remember it again: another run has forgotten it.
    Keep,
}

/// The exit status that says: the branch has moved since the run began.
pub const MOVED: u8 = 3;

impl fmt::Display for Fate {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(formatter)
    }
}

/// Does it. Without a proposal there is nothing but to drop it.
pub fn candidate(fate: Fate, paths: &Paths, instance: &Instance, proposal: Option<&Proposal>) -> Result<ExitCode> {
    let carry_out = || carry_out(fate, paths, instance, proposal);
    patiently(instance, carry_out).map_err(|error| git::explain(instance, error))
}

fn carry_out(fate: Fate, paths: &Paths, instance: &Instance, proposal: Option<&Proposal>) -> Result<ExitCode> {
    let repository = Repository::open(instance);
    // before this was cut off, or by the user
    let is_done = match (&repository, proposal) {
        (Ok(now), Some(it)) if fate == Fate::Accept && now.branch == *it.branch => now.contains(&now.head, &it.commit)?,
        _ => false,
    };
    if let Ok(repository) = &repository {
        let recovered = repository.recover(paths.name());
        // the machine runs what is the branch: what is left over then is for the next run
        if is_done {
            recovered.or_warn();
        } else {
            recovered?;
        }
    }
    if fate == Fate::Drop {
        return git::drop_reference(instance, &paths.reference(), paths.name()).map(|()| ExitCode::SUCCESS);
    }
    let proposal = proposal.ok_or_else(|| Error::new("Failed to find the run's proposal"))?;
    let repository = repository?;
    fault::point("candidate: opened");
    if fate == Fate::Keep {
        let is_branch = repository.head == *proposal.commit;
        return if is_branch { Ok(()) } else { repository.keep(&paths.reference(), &proposal.commit) }.map(|()| ExitCode::SUCCESS);
    }
    if is_done {
        // but for what follows
    } else if repository.has_moved_from(&proposal.branch, &proposal.head) {
        return Ok(ExitCode::from(MOVED));
    } else if repository.head != *proposal.commit {
        if let Err(error) = go_forward(fate, &repository, &proposal.commit, paths) {
            // meanwhile
            let moved = Repository::open(instance)?.has_moved_from(&proposal.branch, &proposal.head);
            return if moved { Ok(ExitCode::from(MOVED)) } else { Err(error) };
        }
    }
    if fate == Fate::Accept {
        publish(&repository, proposal, paths, instance);
    }
    Ok(ExitCode::SUCCESS)
}

fn go_forward(fate: Fate, repository: &Repository, commit: &str, paths: &Paths) -> Result<()> {
    let scratch = paths.scratch()?;
    repository.check_lock_file_is_clean(&scratch)?;
    repository.check_forward(commit, paths.name(), &scratch)?;
    if fate == Fate::Accept { repository.forward(commit, paths.name()) } else { Ok(()) }
}

/// What follows once the candidate is the branch; the machine runs it, so no failure undoes that.
fn publish(repository: &Repository, proposal: &Proposal, paths: &Paths, instance: &Instance) {
    git::drop_reference(instance, &paths.reference(), paths.name()).or_warn();
    if instance.push {
        repository.push(&proposal.commit, &paths.upstream(), paths.name()).or_warn();
    }
}
