//! The directory that the hub serves, or what a command knows of one elsewhere: what is where, and
//! whose turn it is.
//!
//! What is read here only the hub can have written, and is fit for a terminal; what a host sent has been
//! judged by `collect`.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use ::nix::fcntl::{Flock, FlockArg};
use serde::de::DeserializeOwned;

use crate::error::{Context, Error, Result};
use crate::files;
use crate::fleet::collect::collect;
use crate::fleet::elsewhere::{Elsewhere, SCHEME};
use crate::fleet::{FORMAT, Heartbeat, Manifest, Received, Signed};
use crate::names::HostName;
use crate::text;

/// Why a release is not published that is not on top of the last one.
pub const MEANWHILE: &str = "somebody else has published for it meanwhile; deploy again";

/// The served directory.
pub struct Hub {
    directory: PathBuf,
    elsewhere: Option<Elsewhere>,
}

/// Whether this is no directory here, but one of another machine.
pub fn leads_elsewhere(directory: &Path) -> bool {
    directory.to_str().is_some_and(|text| text.starts_with(SCHEME))
}

impl Hub {
    /// The one of this directory, here or elsewhere.
    pub fn new(directory: &Path) -> Result<Self> {
        let elsewhere = leads_elsewhere(directory).then(|| Elsewhere::new(&directory.to_string_lossy())).transpose()?;
        let directory = elsewhere.as_ref().map_or(directory, Elsewhere::place).to_owned();
        Ok(Self { directory, elsewhere })
    }

    /// Whether it is another machine.
    pub fn is_elsewhere(&self) -> bool {
        self.elsewhere.is_some()
    }

    /// Takes in what the named hosts have said, or all: what they have sent, or what the hub elsewhere
    /// knows of them.
    pub fn take_in(&self, wanted: &[&str]) -> Result<()> {
        match &self.elsewhere {
            Some(elsewhere) => elsewhere.fetch(wanted),
            // whoever may only look sees what was collected before
            None => collect(self).or(Ok(())),
        }
    }

    /// How long to wait before that is worth the while again.
    pub fn pace(&self) -> Duration {
        Duration::from_secs(if self.elsewhere.is_some() { 10 } else { 1 })
    }

    /// The same for one file below the directory.
    pub fn take_in_file(&self, path: &Path) -> Result<()> {
        match (&self.elsewhere, path.strip_prefix(&self.directory)) {
            (Some(elsewhere), Ok(file)) => elsewhere.fetch_file(&file.to_string_lossy()),
            _ => Ok(()),
        }
    }

    /// Has hosts see a new release: its archive, which is beside `old`, and then its manifest. Keeps no other
    /// archives but that one's. Fails, and changes nothing, if `old` is not what they see now.
    pub fn publish(&self, manifest: &Manifest, new: &Signed, old: Option<&(Manifest, Signed)>) -> Result<()> {
        let release = self.release(&manifest.host);
        let kept: Vec<_> = old.iter().map(|(old, _)| old).chain([manifest]).map(Manifest::archive).collect();
        if let Some(elsewhere) = &self.elsewhere {
            let path = release.join("new");
            files::write_json(&path, new, 0o644)?;
            return elsewhere.publish(&manifest.host, &manifest.archive(), &path, &kept);
        }
        if self.manifest(&manifest.host)?.map(|(_, signed)| signed).as_ref() != old.map(|(_, signed)| signed) {
            return Err(MEANWHILE).context(|| format!("publish {}", manifest.host));
        }
        files::write_json(&release.join("manifest.json"), new, 0o644)?;
        for entry in fs::read_dir(&release).context(|| format!("read {}", release.display()))?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            // whatever somebody else is writing is not an archive
            if [".tar.gz", ".tar.gz.new"].iter().any(|end| name.ends_with(end)) && !kept.contains(&name) {
                files::remove(&entry.path()).context(|| format!("remove {}", entry.path().display()))?;
            }
        }
        Ok(())
    }

    /// The hosts that the hub serves.
    pub fn hosts(&self) -> Result<Vec<HostName>> {
        let directory = self.directory.join("hosts");
        let entries = fs::read_dir(&directory).context(|| format!("read {}", directory.display()))?;
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()?.try_into().ok());
        let mut names: Vec<HostName> = names.filter(|name| directory.join(name).is_dir()).collect();
        names.sort();
        Ok(names)
    }

    /// Fails unless the hub serves this host.
    pub fn check(&self, host: &HostName) -> Result<()> {
        let place = self.directory.join("hosts").join(host);
        let why = || format!("the hub has no {}; add it to services.ekiben.hub.hosts", place.display());
        if place.is_dir() { Ok(()) } else { Err(why()).context(|| format!("publish {host}")) }
    }

    /// What a host may fetch.
    pub fn release(&self, host: &HostName) -> PathBuf {
        self.directory.join("hosts").join(host).join("release")
    }

    /// Where it writes.
    pub fn reports(&self, host: &HostName) -> PathBuf {
        self.directory.join("hosts").join(host).join("reports")
    }

    /// What was collected of that.
    pub fn received(&self, host: &HostName) -> PathBuf {
        self.directory.join("received").join(host)
    }

    /// What is published for a host.
    pub fn manifest(&self, host: &HostName) -> Result<Option<(Manifest, Signed)>> {
        let path = self.release(host).join("manifest.json");
        let Some(signed) = files::read_json::<Signed>(&path)? else { return Ok(None) };
        let doing = || format!("read {}", path.display());
        let manifest: Manifest = foreign(signed.manifest.as_bytes()).context(doing)?;
        if manifest.format == FORMAT { Ok(Some((manifest, signed))) } else { Err("its format is another").context(doing) }
    }

    /// What a host said last, and when that arrived.
    pub fn heartbeat(&self, host: &HostName) -> Result<Option<(Heartbeat, SystemTime)>> {
        let path = self.received(host).join("heartbeat.json");
        let Some(heartbeat) = files::read_json(&path)? else { return Ok(None) };
        let arrived = fs::metadata(&path).and_then(|metadata| metadata.modified());
        Ok(Some((heartbeat, arrived.context(|| format!("read {}", path.display()))?)))
    }

    /// The file that says which reports of a host have arrived.
    pub fn acknowledged(&self, host: &HostName) -> PathBuf {
        self.release(host).join("received.json")
    }

    /// These reports, the newest last.
    pub fn index(&self, host: &HostName) -> Result<Received> {
        Ok(files::read_json(&self.acknowledged(host))?.unwrap_or_default())
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
    text::make_fit(&mut value);
    serde_json::from_value(value)
}
