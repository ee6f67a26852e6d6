//! The directory that the hub serves, from the hub's own side: what is where, and whose turn it is.
//!
//! What is read here only the hub can have written; what a host sent has been judged by `collect`,
//! and is fit for a terminal.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use ::nix::fcntl::{Flock, FlockArg};
use serde::de::DeserializeOwned;

use crate::config::host_name;
use crate::error::{Context, Error, Result};
use crate::files;
use crate::fleet::{FORMAT, Heartbeat, Manifest, Received, Signed};
use crate::notes::make_printable;

/// The served directory.
pub struct Hub {
    directory: PathBuf,
}

impl Hub {
    /// The one in this directory.
    pub fn new(directory: &Path) -> Self {
        Self { directory: directory.to_owned() }
    }

    /// The hosts that the hub serves.
    pub fn hosts(&self) -> Result<Vec<String>> {
        let directory = self.directory.join("hosts");
        let entries = fs::read_dir(&directory).context(|| format!("read {}", directory.display()))?;
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        let mut names: Vec<_> = names.filter(|name| host_name(name).is_ok() && directory.join(name).is_dir()).collect();
        names.sort();
        Ok(names)
    }

    /// Fails unless the hub serves this host.
    pub fn check(&self, host: &str) -> Result<()> {
        let place = self.directory.join("hosts").join(host);
        let why = || format!("the hub has no {}; add it to services.ekiben.hub.hosts", place.display());
        if place.is_dir() { Ok(()) } else { Err(why()).context(|| format!("publish {host}")) }
    }

    /// What a host may fetch.
    pub fn release(&self, host: &str) -> PathBuf {
        self.directory.join("hosts").join(host).join("release")
    }

    /// Where it writes.
    pub fn reports(&self, host: &str) -> PathBuf {
        self.directory.join("hosts").join(host).join("reports")
    }

    /// What was collected of that.
    pub fn received(&self, host: &str) -> PathBuf {
        self.directory.join("received").join(host)
    }

    /// What is published for a host, and whether it is signed.
    pub fn manifest(&self, host: &str) -> Result<Option<(Manifest, bool)>> {
        let path = self.release(host).join("manifest.json");
        let Some(signed) = files::read_json::<Signed>(&path)? else { return Ok(None) };
        let doing = || format!("read {}", path.display());
        let manifest: Manifest = serde_json::from_str(&signed.manifest).context(doing)?;
        if manifest.format == FORMAT {
            Ok(Some((manifest, signed.signature.is_some())))
        } else {
            Err("its format is another").context(doing)
        }
    }

    /// What a host said last, and when that arrived.
    pub fn heartbeat(&self, host: &str) -> Result<Option<(Heartbeat, SystemTime)>> {
        let path = self.received(host).join("heartbeat.json");
        let Some(heartbeat) = files::read_json(&path)? else { return Ok(None) };
        let arrived = fs::metadata(&path).and_then(|metadata| metadata.modified());
        Ok(Some((heartbeat, arrived.context(|| format!("read {}", path.display()))?)))
    }

    /// Which reports of a host have arrived, the newest last.
    pub fn index(&self, host: &str) -> Result<Received> {
        Ok(files::read_json(&self.release(host).join("received.json"))?.unwrap_or_default())
    }

    /// Waits until nobody else publishes, and keeps others waiting until it is dropped.
    pub fn turn(&self) -> Result<Flock<File>> {
        let directory = self.directory.join("received");
        fs::create_dir_all(&directory).context(|| format!("make {}", directory.display()))?;
        match lock(&directory, FlockArg::LockExclusiveNonblock) {
            Ok(Some(turn)) => return Ok(turn),
            Ok(None) => log::info!("Somebody else is publishing; waiting ..."),
            Err(error) => return Err(error),
        }
        lock(&directory, FlockArg::LockExclusive)?.ok_or_else(|| Error::new("Failed to wait for whoever is publishing"))
    }
}

/// Locks a directory of the hub's own, which needs no right to write there; none if another has it.
pub fn lock(directory: &Path, how: FlockArg) -> Result<Option<Flock<File>>> {
    let doing = || format!("lock {}", directory.display());
    match Flock::lock(File::open(directory).context(doing)?, how) {
        Err((_, ::nix::errno::Errno::EWOULDBLOCK)) => Ok(None),
        other => other.map(Some).map_err(|(_, error)| error).context(doing),
    }
}

/// Parses what a host has sent, as something to be shown on a terminal.
pub fn foreign<T: DeserializeOwned>(text: &[u8]) -> Result<T, serde_json::Error> {
    let mut value = serde_json::from_slice(text)?;
    make_printable(&mut value);
    serde_json::from_value(value)
}
