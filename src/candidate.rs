//! The candidate's fate in the repository, decided by root and carried out as the instance's user:
//! check that it can still become the branch, make it the branch, or drop it.

use std::process::ExitCode;

use crate::config::Instance;
use crate::error::{Error, Result};
use crate::git::{self, Repository};
use crate::layout::Layout;
use crate::notes::{Notes, Proposal};

/// What root may ask for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fate {
    /// Can the branch be fast-forwarded to the candidate, touching no edit?
    Check,
    /// Fast-forward it, and push if that is asked for.
    Accept,
    /// Forget the candidate.
    Drop,
}

/// The exit status that says: the branch has moved since the run began.
pub const MOVED: u8 = 3;

impl Fate {
    /// As an argument.
    pub fn word(self) -> &'static str {
        match self {
            Self::Check => "check",
            Self::Accept => "accept",
            Self::Drop => "drop",
        }
    }

    /// From an argument.
    pub fn from_word(word: &str) -> Option<Self> {
        [Self::Check, Self::Accept, Self::Drop].into_iter().find(|fate| fate.word() == word)
    }
}

/// Does it. `run` is the run that the notes must be of.
pub fn candidate(fate: Fate, layout: &Layout, instance: &Instance, run: &str) -> Result<ExitCode> {
    if fate == Fate::Drop {
        return git::drop_reference(instance, &layout.reference()).map(|()| ExitCode::SUCCESS);
    }
    let notes = Notes::read_of(layout, run)?;
    let Some(proposal) = notes.and_then(|notes| notes.proposal) else {
        return Err(Error::new("Failed to find the run's proposal"));
    };
    let repository = Repository::open(instance)?;
    let already = repository.head == proposal.commit && repository.branch == proposal.branch;
    if !already && (repository.branch != proposal.branch || repository.head != proposal.head) {
        log::warn!("{} was at {}, now {} is at {}.", proposal.branch, proposal.head, repository.branch, repository.head);
        return Ok(ExitCode::from(MOVED));
    }
    if !already {
        repository.check_lock_file_is_clean()?;
        repository.check_forward(&proposal.commit, &layout.own("index"))?;
    }
    if fate == Fate::Accept {
        accept(&repository, &proposal, layout, instance, already)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn accept(repository: &Repository, proposal: &Proposal, layout: &Layout, instance: &Instance, already: bool) -> Result<()> {
    if !already {
        repository.forward(&proposal.commit)?;
    }
    if let Err(error) = git::drop_reference(instance, &layout.reference()) {
        log::warn!("{error}.");
    }
    // the machine runs the commit: that others do not know of it yet does not undo that
    if instance.push {
        if let Err(error) = repository.push(&proposal.commit) {
            log::warn!("{error}.");
        }
    }
    Ok(())
}
