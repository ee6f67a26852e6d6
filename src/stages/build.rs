//! The second of the user's stages: build the candidate, from its commit and nothing else.

use std::cell::Cell;
use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::config::{Build, Instance};
use crate::error::{Context, OrLog, Result};
use crate::fault;
use crate::fleet::host::release;
use crate::fleet::hub::candidate;
use crate::git::Repository;
use crate::nix::{self, Source, substitute};
use crate::paths::Paths;
use crate::run::Stage;
use crate::run::notes::{NEWS, Notes};
use crate::stages::look;
use crate::system::{self, now};

/// Runs the stage; the system is what the link `candidate` points to.
pub fn build(paths: &Paths, instance: &Instance) -> Result<()> {
    let mut notes = Notes::read(paths)?;
    let proposal = notes.proposal.as_ref().ok_or("there is no proposal").context(|| "build".into())?;
    if proposal.unchanged || proposal.withheld.is_some() {
        return Ok(());
    }
    let commit = proposal.commit.clone();
    (notes.stage, notes.build_began) = (Stage::Build, Some(now()));
    notes.write(paths)?;
    fault::point("build: begun");
    let overtaken = Cell::new(false);
    let is_overtaken = || {
        overtaken.set(look::is_overtaken(paths, instance, &notes).or_warn().unwrap_or(false));
        overtaken.get()
    };
    let result = Repository::open(instance).and_then(|repository| {
        if let Some(publish) = &instance.publish {
            return candidate::build(paths, instance, publish, &repository, &commit);
        }
        let limit = Duration::from_secs(instance.timeouts.build);
        let (flags, link) = (&instance.flags, paths.candidate());
        let build = |source: &Source| match instance.build {
            Build::Local => nix::build_system(source, flags, &link, limit),
            Build::Substitute => substitute::fetch_system(source, flags, &link, limit, || paths.rollback().exists(), is_overtaken),
        };
        if instance.hub.is_some() {
            return release::build(&repository, &commit, &paths.own("source"), instance.build == Build::Substitute, build);
        }
        build(&Source::Flake(repository.flake_at(&commit, instance)?, &instance.flake_ref.configuration))
    });
    // what systemd knows of it is past
    system::show("");
    fault::point("build: built");
    match result {
        Ok(()) => {
            notes.built = true;
            if instance.publish.is_none() {
                notes.changes = changes(&paths.candidate()).or_warn().unwrap_or_default();
            }
            notes.write(paths)?;
            fault::point("build: noted");
            Ok(())
        }
        Err(error) if overtaken.get() => {
            log::info!("{error}; starting over.");
            notes.overtaken = true;
            notes.write(paths)
        }
        // sources are fetched, too
        Err(error) => notes.fail(paths, error.of_network()),
    }
}

/// How the system that was built differs from what runs; it may be missing from a report.
fn changes(candidate: &Path) -> Result<Vec<String>> {
    let candidate = fs::read_link(candidate).doing("read", candidate)?;
    nix::differences(&system::current()?, &candidate, NEWS)
}
