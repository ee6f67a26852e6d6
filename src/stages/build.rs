//! The second of the user's stages: build the candidate, from its commit and nothing else.

use std::time::Duration;

use crate::config::{Build, Instance};
use crate::error::{Error, Result};
use crate::fault;
use crate::fleet::host::release;
use crate::git::Repository;
use crate::nix::{self, Source, substitute};
use crate::paths::Paths;
use crate::run::Stage;
use crate::run::notes::Notes;
use crate::system::now;

/// Runs the stage; the system is what the link `candidate` points to.
pub fn build(paths: &Paths, instance: &Instance) -> Result<()> {
    let mut notes = Notes::read(paths)?;
    let Some(proposal) = &notes.proposal else {
        return Err(Error::new("Failed to build: there is no proposal"));
    };
    if proposal.unchanged {
        return Ok(());
    }
    let commit = proposal.commit.clone();
    (notes.stage, notes.build_began) = (Stage::Build, Some(now()));
    notes.write(paths)?;
    fault::point("build: begun");
    let result = Repository::open(instance).and_then(|repository| {
        let limit = Duration::from_secs(instance.timeouts.build);
        let get = match instance.build {
            Build::Local => nix::build_system,
            Build::Substitute => substitute::fetch_system,
        };
        let build = |source: &Source| get(source, &instance.flags, &paths.candidate(), limit);
        if instance.hub.is_some() {
            return release::build(&repository, &commit, &paths.own("source"), instance.build == Build::Substitute, build);
        }
        build(&Source::Flake(&repository.flake_at(&commit, instance)?, &instance.flake_ref.configuration))
    });
    fault::point("build: built");
    match result {
        Ok(()) => {
            notes.built = true;
            notes.write(paths)?;
            fault::point("build: noted");
            Ok(())
        }
        // sources are fetched, too
        Err(error) => notes.fail(paths, error.of_network()),
    }
}
