//! New revisions of the inputs of a fleet's flakes.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::ExitCode;
use std::time::Duration;

use crate::error::{Context, Error, Result};
use crate::fleet::hub::command::{Fleet, exit, print};
use crate::fleet::hub::repository::Host;
use crate::git::lockfile::LockFile;
use crate::nix::cache::Cache;
use crate::{config, files};

/// How long the update of one flake's inputs may take.
const UPDATE: Duration = Duration::from_secs(3600);

impl Fleet<'_> {
    pub(super) fn flake_update(&self, words: &[&str]) -> Result<ExitCode> {
        let repository = self.repository()?;
        let flakes = repository.flakes()?;
        // what the hosts are has to be known only where a word may be one
        let hosts = if words.is_empty() { Vec::new() } else { self.hosts(&repository, &[])?.0 };
        let is_host = |word: &&str| hosts.iter().any(|host| *host.name == **word);
        let (named, inputs): (Vec<&str>, Vec<&str>) = words.iter().partition(|word| is_host(word));
        if let Some(odd) = inputs.iter().find(|input| !config::is_input(input)) {
            return Err(Error::new(format!("Failed to find host or input {odd:?}")));
        }
        let inputs: Vec<String> = inputs.into_iter().map(String::from).collect();
        let cache = Cache::open(&repository.cache())?;
        let mut unknown: Vec<&String> = inputs.iter().collect();
        let mut all = Vec::new();
        for source in flakes {
            let meant = |host: &Host| host.source.place == source.place && named.contains(&&*host.name);
            if !named.is_empty() && !hosts.iter().any(meant) {
                continue;
            }
            let updated = repository.updated(&source, &cache, &inputs, UPDATE);
            if let Ok(new) = &updated {
                let lock = LockFile::parse(new.as_deref())?;
                unknown.retain(|input| lock.resolve(input).is_err());
            } else {
                unknown.clear();
            }
            all.push((source, updated));
        }
        // before anything is changed
        if let Some(input) = unknown.first() {
            return Err(Error::new(format!("Failed to update {input}: no flake has an input of this name")));
        }
        let mut well = true;
        for (source, updated) in all {
            let path = source.lock_file();
            let mode = fs::metadata(&path).map_or(0o644, |metadata| metadata.mode() & 0o777);
            let replace = |new: &Vec<u8>| files::write(&path, new, mode).doing("write", &path);
            let done = match updated {
                Ok(Some(new)) if fs::read(&path).ok().as_ref() != Some(&new) => replace(&new).map(|()| "updated"),
                other => other.map(|_| "unchanged"),
            };
            well &= done.is_ok();
            match done {
                Ok(said) => drop(print(&format!("{}: {said}\n", source.place))?),
                Err(error) => log::error!("{}: {error}.", source.place),
            }
        }
        Ok(exit(well))
    }
}
