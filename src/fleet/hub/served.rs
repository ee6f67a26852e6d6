//! The directory that the hub serves, or what a command knows of one elsewhere: what is where, and
//! whose turn it is.
//!
//! Where publishers, and not only the hub, may write, and on a hub elsewhere, anything can lie: what is
//! read here becomes a type or an error, within limits, and is fit for a terminal. What hosts send is
//! judged by `collect` before it comes here.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use ::nix::errno::Errno;
use ::nix::fcntl::{Flock, FlockArg, OFlag, openat};
use ::nix::sys::stat::Mode;
use ::nix::unistd::{AccessFlags, access, geteuid};

use crate::error::{Context, Error, OrLog, Result};
use crate::files;
use crate::fleet::hub::host_state::Heard;
use crate::fleet::hub::remote::{Elsewhere, SCHEME};
use crate::fleet::{HEARTBEAT, Heartbeat, KNOWN, LARGE, RECEIVED, REMOVED, ROLLOUT, Received, SMALL};
use crate::gather::sorted;
use crate::names::HostName;

/// The served directory.
pub struct ServedDirectory {
    directory: PathBuf,
    elsewhere: Option<Elsewhere>,
}

/// Whether this is no directory here, but one of another machine.
pub fn leads_elsewhere(directory: &Path) -> bool {
    directory.to_str().is_some_and(|text| text.starts_with(SCHEME))
}

/// The hosts that have a directory in this one.
pub fn hosts_in(directory: &Path) -> Result<Vec<HostName>> {
    let entries = fs::read_dir(directory).doing("read", directory)?;
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()?.try_into().ok());
    Ok(sorted(names.filter(|name: &HostName| directory.join(name).is_dir())))
}

impl ServedDirectory {
    /// The one of this directory, here or elsewhere.
    pub fn new(directory: &Path) -> Result<Self> {
        let elsewhere = leads_elsewhere(directory).then(|| Elsewhere::new(&directory.to_string_lossy())).transpose()?;
        let directory = elsewhere.as_ref().map_or(directory, Elsewhere::place).to_owned();
        Ok(Self { directory, elsewhere })
    }

    /// The hub, if it is another machine.
    pub fn elsewhere(&self) -> Option<&Elsewhere> {
        self.elsewhere.as_ref()
    }

    /// Fails unless it is another machine, or is here and may be read.
    pub fn check_readable(&self) -> Result<()> {
        let place = self.directory.display();
        if self.elsewhere().is_some() {
            return Ok(());
        }
        if !self.directory.exists() {
            let why = "this machine is no hub; run this there, or name another machine's as `directory` in fleet.json";
            return Err(Error::new(format!("Failed to find {place}: {why}")));
        }
        if access(&self.directory.join("hosts"), AccessFlags::R_OK) == Err(Errno::EACCES) {
            let why = "this user may not read it; run this as the user who publishes (services.ekiben.hub.user), or as root";
            return Err(Error::new(format!("Failed to look into {place}: {why}")));
        }
        Ok(())
    }

    /// Fails unless this machine is the hub, and this process its user, who alone collects.
    pub fn check_ours(&self) -> Result<()> {
        if self.elsewhere().is_some() {
            return Err(Error::new("Failed to collect: the hub collects on its own"));
        }
        let received = self.collected();
        let owner = fs::symlink_metadata(&received).doing("collect into", &received)?.uid();
        let why = || format!("owned by {}, who alone can collect", files::user_name(owner));
        if owner == geteuid().as_raw() { Ok(()) } else { Err(why()).doing("collect into", &received) }
    }

    /// Opens the directory that a host writes into. Nothing on the way there, below the hub's own, may be a link.
    pub fn open_reports(&self, host: &HostName) -> io::Result<OwnedFd> {
        let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        // openat2 could do this at once, and is refused where RestrictSUIDSGID is on
        let mut parts = ["hosts", host, "reports"].into_iter();
        parts.try_fold(File::open(&self.directory)?.into(), |above: OwnedFd, part| Ok(openat(above, part, flags, Mode::empty())?))
    }

    /// Fetches one of its files, if it is elsewhere.
    pub fn take_in_file(&self, path: &Path) -> Result<()> {
        self.elsewhere.as_ref().map_or(Ok(()), |elsewhere| elsewhere.fetch_file(path))
    }

    /// Where plans and holds are.
    pub fn rollout(&self) -> PathBuf {
        self.directory.join(ROLLOUT)
    }

    /// The hosts that the hub serves.
    pub fn hosts(&self) -> Result<Vec<HostName>> {
        hosts_in(&self.directory.join("hosts"))
    }

    /// Those of them that have a key; `None` if nobody says.
    pub fn known(&self) -> Option<BTreeSet<HostName>> {
        files::read_foreign_json(&self.directory.join("hosts").join(KNOWN), LARGE).ok()?
    }

    /// When the hub removes what it has of those that have none, in seconds since 1970.
    pub fn removed(&self) -> BTreeMap<HostName, u64> {
        files::read_foreign_json(&self.directory.join("hosts").join(REMOVED), LARGE).ok().flatten().unwrap_or_default()
    }

    /// Fails unless the hub serves this host.
    pub fn check(&self, host: &HostName) -> Result<()> {
        let place = self.directory.join("hosts").join(host);
        let why = if self.known().is_some_and(|known| !known.contains(host)) {
            "the hub has no key of it".into()
        } else if !place.is_dir() {
            format!("{} does not exist", place.display())
        } else {
            return Ok(());
        };
        Err(format!("{why}; add the host to services.ekiben.hub.hosts")).context(|| format!("publish {host}"))
    }

    /// How the hosts stand, for all to read.
    pub fn heard(&self) -> PathBuf {
        self.directory.join("heard/hosts.json")
    }

    /// What a host may fetch.
    pub fn release(&self, host: &HostName) -> PathBuf {
        self.directory.join("hosts").join(host).join("release")
    }

    /// Where it writes.
    pub fn reports(&self, host: &HostName) -> PathBuf {
        self.directory.join("hosts").join(host).join("reports")
    }

    /// What was collected of all hosts.
    pub fn collected(&self) -> PathBuf {
        self.directory.join("received")
    }

    /// What was collected of that of one.
    pub fn received(&self, host: &HostName) -> PathBuf {
        self.collected().join(host)
    }

    /// What a host said last, and when that arrived.
    pub fn heartbeat(&self, host: &HostName) -> Result<Option<Heard>> {
        let path = self.received(host).join(HEARTBEAT);
        let Some(heartbeat) = files::read_foreign_json::<Heartbeat>(&path, SMALL)? else { return Ok(None) };
        let arrived = fs::symlink_metadata(&path).and_then(|metadata| metadata.modified()).doing("read", &path)?;
        if heartbeat.host == *host { Ok(Some((heartbeat, arrived))) } else { Err("it names another host").doing("read", &path) }
    }

    /// The file with which of its reports have arrived.
    pub fn index_file(&self, host: &HostName) -> PathBuf {
        self.received(host).join(RECEIVED)
    }

    /// These reports, the newest last; what is there of them can be listed anew.
    pub fn index(&self, host: &HostName) -> Received {
        files::read_foreign_json(&self.index_file(host), SMALL).or_warn().flatten().unwrap_or_default()
    }

    /// The turn of who publishes, if nobody has it.
    pub fn turn_if_free(&self) -> Result<Option<Flock<File>>> {
        files::lock(&self.collected(), FlockArg::LockExclusiveNonblock)
    }

    /// Waits until nobody else publishes, and keeps others waiting until it is dropped.
    pub fn turn(&self) -> Result<Flock<File>> {
        let directory = self.collected();
        if !directory.exists() {
            // or the hub's user could not write there ever after
            let above = fs::metadata(&self.directory).doing("create", &directory)?;
            if above.uid() != geteuid().as_raw() {
                return Err(format!("{} does not belong to this user", self.directory.display())).doing("create", &directory);
            }
            fs::create_dir(&directory).doing("create", &directory)?;
        }
        if let Some(turn) = self.turn_if_free()? {
            return Ok(turn);
        }
        log::info!("Another user is publishing; waiting; if that does not end, lslocks says what has {} ...", directory.display());
        files::lock(&directory, FlockArg::LockExclusive)?.ok_or_else(|| Error::new("Failed to wait for another publisher"))
    }
}
