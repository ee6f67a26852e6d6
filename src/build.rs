//! The second of the user's stages: build the candidate, from its commit and nothing else.

use std::time::Duration;

use crate::config::Instance;
use crate::error::{Error, Result};
use crate::git::Repository;
use crate::layout::Layout;
use crate::nix;
use crate::notes::Notes;
use crate::run::Stage;

/// How long evaluating and building may take.
const LIMIT: Duration = Duration::from_secs(4 * 3600);

/// Runs the stage; the system is what the link `candidate` points to.
pub fn build(layout: &Layout, instance: &Instance) -> Result<()> {
    let mut notes = Notes::read(layout)?;
    let Some(proposal) = &notes.proposal else {
        return Err(Error::new("Failed to build: there is no proposal"));
    };
    if proposal.unchanged {
        return Ok(());
    }
    let commit = proposal.commit.clone();
    notes.stage = Stage::Build;
    notes.write(layout)?;
    let result = Repository::open(instance).and_then(|repository| {
        let flake = repository.flake_at(&commit, instance)?;
        let configuration = &instance.flake_ref.configuration;
        nix::build_system(&flake, configuration, &instance.flags, &layout.candidate(), LIMIT)
    });
    match result {
        Ok(()) => {
            notes.built = true;
            notes.write(layout)
        }
        Err(error) => notes.fail(layout, error),
    }
}
