//! The directory that the hub serves, or what a command knows of one elsewhere: what is where, and
//! whose turn it is.
//!
//! Where publishers, and not only the hub, may write, and on a hub elsewhere, anything can lie: what is
//! read here becomes a type or an error, within limits, and is fit for a terminal. What hosts send is
//! judged by `collect` before it comes here.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use ::nix::fcntl::{Flock, FlockArg, OFlag, openat};
use ::nix::sys::stat::Mode;
use ::nix::unistd::geteuid;
use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Result};
use crate::files;
use crate::fleet::hub::host_state::Heard;
use crate::fleet::hub::remote::{Elsewhere, MEANWHILE, NEXT, SCHEME};
use crate::fleet::{FORMAT, Heartbeat, KNOWN, LARGE, Manifest, REMOVED, ROLLOUT, Received, SMALL, Signed, sha256};
use crate::gather::sorted;
use crate::json;
use crate::names::{HostName, Sha256};
use crate::run::Release;
use crate::text;

const MANIFEST: &str = "manifest.json";
const RECEIVED: &str = "received.json";
/// For how long a file that nothing refers to may be about to be.
const ON_ITS_WAY: Duration = Duration::from_secs(3600);

/// The served directory.
pub struct ServedDirectory {
    directory: PathBuf,
    elsewhere: Option<Elsewhere>,
}

/// Whether this is no directory here, but one of another machine.
pub fn leads_elsewhere(directory: &Path) -> bool {
    directory.to_str().is_some_and(|text| text.starts_with(SCHEME))
}

impl ServedDirectory {
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

    /// The hub, if it is another machine.
    pub fn elsewhere(&self) -> Option<&Elsewhere> {
        self.elsewhere.as_ref()
    }

    /// Fails unless this process is the hub's user, who alone collects.
    pub fn check_ours(&self) -> Result<()> {
        let received = self.collected();
        let doing = || format!("collect into {}", received.display());
        let owner = fs::symlink_metadata(&received).context(doing)?.uid();
        if owner == geteuid().as_raw() {
            Ok(())
        } else {
            Err(format!("owned by {}, who alone can collect", files::user_name(owner))).context(doing)
        }
    }

    /// Opens the directory that a host writes into. Nothing on the way there, below the hub's own, may be a link.
    pub fn open_reports(&self, host: &HostName) -> io::Result<OwnedFd> {
        let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        // openat2 could do this at once, and is refused where RestrictSUIDSGID is on
        let mut parts = ["hosts", host, "reports"].into_iter();
        parts.try_fold(File::open(&self.directory)?.into(), |above: OwnedFd, part| Ok(openat(above, part, flags, Mode::empty())?))
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

    /// Has hosts see a new release: its archive, which is beside `old`, and then its manifest; what was to follow does no more.
    /// Fails, and changes nothing, if `old` is not what they see now.
    pub fn publish(&self, manifest: &Manifest, new: &Signed, old: Option<&Signed>) -> Result<()> {
        let release = self.release(&manifest.host);
        if let Some(elsewhere) = &self.elsewhere {
            let path = release.join("new");
            files::write_json(&path, new, 0o644)?;
            return elsewhere.publish(&manifest.host, &manifest.archive(), &path);
        }
        if self.valid_manifest(&manifest.host)?.map(|(_, signed)| signed).as_ref() != old {
            return Err(MEANWHILE).context(|| format!("publish {}", manifest.host));
        }
        files::write_json(&release.join(MANIFEST), new, 0o644)
    }

    /// Puts a release beside the one that hosts see, to follow that later.
    pub fn stage(&self, manifest: &Manifest, new: &Signed) -> Result<()> {
        let name = next(&manifest.release);
        files::write_json(&self.release(&manifest.host).join(&name), new, 0o644)?;
        self.elsewhere.as_ref().map_or(Ok(()), |elsewhere| elsewhere.stage(&manifest.host, &[&manifest.archive(), &name]))
    }

    /// What was put there.
    pub fn staged(&self, host: &HostName, release: &Release) -> Option<(Manifest, Signed)> {
        let text = read(&self.release(host).join(next(release))).ok()??;
        let (manifest, signed) = parse(&text, host).ok()?;
        manifest.filter(|manifest| manifest.release == *release).map(|manifest| (manifest, signed))
    }

    /// Has hosts see what was put there, if they see `before` now. Returns whether they do see it.
    pub fn follow(&self, host: &HostName, release: &Release, before: Option<&Release>) -> Result<bool> {
        let sees = self.valid_manifest(host)?.map(|(manifest, _)| manifest.release);
        if sees.as_ref() == Some(release) {
            return Ok(true);
        }
        let is_later = before.is_none_or(|before| before.sequence < release.sequence);
        let staged = self.staged(host, release).filter(|(manifest, _)| self.has_archive(manifest, false));
        if sees.as_ref() != before || !is_later || staged.is_none() {
            return Ok(false);
        }
        let (place, path) = (self.release(host), self.release(host).join(MANIFEST));
        match fs::rename(place.join(next(release)), &path) {
            // whoever publishes from elsewhere removes it first
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            other => other.and_then(|()| files::sync_parent(&path)).context(|| format!("publish {host}")).map(|()| true),
        }
    }

    /// Has what was put there not follow; elsewhere the hub removes it.
    pub fn forget_next(&self, host: &HostName, release: &Release) -> Result<()> {
        let path = self.release(host).join(next(release));
        files::remove(&path).context(|| format!("remove {}", path.display()))
    }

    /// Removes all releases of a host but those of which something is in `kept`, and what is on its way, if others may be
    /// about to publish.
    pub fn tidy(&self, host: &HostName, kept: &[Sha256], others: bool) -> Result<()> {
        let release = self.release(host);
        for entry in fs::read_dir(&release).context(|| format!("read {}", release.display()))?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let (id, end) = name.split_once('.').unwrap_or_default();
            // whatever somebody else is writing is neither
            let is_left = match Sha256::try_from(id) {
                Ok(id) => (end.starts_with("tar.gz") || end.ends_with(NEXT)) && !kept.contains(&id),
                Err(_) => name.starts_with(MANIFEST) && name != MANIFEST,
            };
            let age = entry.metadata().and_then(|metadata| metadata.modified()).ok().and_then(|time| time.elapsed().ok());
            if is_left && (!others || age.is_some_and(|age| age > ON_ITS_WAY)) {
                // it is published all the same
                files::remove(&entry.path()).unwrap_or_else(|error| log::warn!("Failed to remove {:?}: {error}.", entry.path()));
            }
        }
        Ok(())
    }

    /// Where plans and holds are.
    pub fn rollout(&self) -> PathBuf {
        self.directory.join(ROLLOUT)
    }

    /// Replaces one of the files there.
    pub fn write(&self, path: &Path, content: &impl Serialize) -> Result<()> {
        if self.is_elsewhere() {
            let directory = self.rollout();
            fs::create_dir_all(&directory).context(|| format!("create {}", directory.display()))?;
        }
        files::write_json(path, content, 0o644)?;
        match (&self.elsewhere, path.strip_prefix(&self.directory)) {
            (Some(elsewhere), Ok(file)) => elsewhere.send_file(&file.to_string_lossy()),
            _ => Ok(()),
        }
    }

    /// The hosts that the hub serves.
    pub fn hosts(&self) -> Result<Vec<HostName>> {
        let directory = self.directory.join("hosts");
        let entries = fs::read_dir(&directory).context(|| format!("read {}", directory.display()))?;
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()?.try_into().ok());
        Ok(sorted(names.filter(|name: &HostName| directory.join(name).is_dir())))
    }

    /// Those of them that have a key; `None` if nobody says.
    pub fn known(&self) -> Option<BTreeSet<HostName>> {
        let said = files::read_foreign(&self.directory.join("hosts").join(KNOWN), LARGE).ok()?;
        json::parse_foreign(&said).ok()
    }

    /// When the hub removes what it has of those that have none, in seconds since 1970.
    pub fn removed(&self) -> BTreeMap<HostName, u64> {
        let said = files::read_foreign(&self.directory.join("hosts").join(REMOVED), LARGE).ok();
        said.and_then(|said| json::parse_foreign(&said).ok()).unwrap_or_default()
    }

    /// Fails unless the hub serves this host.
    pub fn check(&self, host: &HostName) -> Result<()> {
        let place = self.directory.join("hosts").join(host);
        if self.known().is_some_and(|known| !known.contains(host)) {
            return Err("the hub has no key of it; add the host to services.ekiben.hub.hosts").context(|| format!("publish {host}"));
        }
        let why = || format!("{} does not exist; add the host to services.ekiben.hub.hosts", place.display());
        if place.is_dir() { Ok(()) } else { Err(why()).context(|| format!("publish {host}")) }
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

    /// What is published for a host; the error says why it is of no use to it.
    pub fn manifest(&self, host: &HostName) -> Result<Option<Result<(Manifest, Signed), String>>> {
        let path = self.release(host).join(MANIFEST);
        let doing = || format!("read {}", path.display());
        let parsed = match read(&path) {
            Err(error) if matches!(error.kind(), ErrorKind::InvalidData | ErrorKind::FileTooLarge) => Err(error.to_string()),
            other => match other.context(doing)? {
                Some(text) => parse(&text, host),
                None => return Ok(None),
            },
        };
        match parsed {
            Ok((Some(manifest), signed)) => Ok(Some(Ok((manifest, signed)))),
            Ok((None, _)) => Err("unsupported format").context(doing),
            Err(why) => Ok(Some(Err(format!("{}: {}", path.display(), text::line(&why))))),
        }
    }

    /// When that was changed last; no publisher can choose that.
    pub fn changed(&self, host: &HostName) -> Result<Option<SystemTime>> {
        let path = self.release(host).join(MANIFEST);
        match fs::symlink_metadata(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            other => {
                let metadata = other.context(|| format!("read {}", path.display()))?;
                let (seconds, rest) = (metadata.ctime().try_into().unwrap_or(0), metadata.ctime_nsec().try_into().unwrap_or(0));
                Ok(Some(SystemTime::UNIX_EPOCH + Duration::new(seconds, rest)))
            }
        }
    }

    /// What is published for a host, for who replaces it: nothing, if that is of no use.
    pub fn valid_manifest(&self, host: &HostName) -> Result<Option<(Manifest, Signed)>> {
        let found = self.manifest(host)?;
        Ok(found.and_then(|found| found.inspect_err(|why| log::warn!("Ignoring {why}.")).ok()))
    }

    /// Whether the archive of a manifest is where its host looks for it; `thorough` is to look into it. Of a hub elsewhere,
    /// that is what the host says.
    pub fn has_archive(&self, manifest: &Manifest, thorough: bool) -> bool {
        let path = self.release(&manifest.host).join(manifest.archive());
        if self.is_elsewhere() {
            return !thorough;
        }
        let is_there = fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.is_file() && metadata.len() == manifest.size);
        is_there && (!thorough || sha256::of_file(&path).is_ok_and(|sha256| sha256 == manifest.sha256))
    }

    /// Whether there is an archive of that name, at least.
    pub fn keeps(&self, manifest: &Manifest) -> Result<bool> {
        match &self.elsewhere {
            Some(elsewhere) => elsewhere.has(&format!("hosts/{}/release", manifest.host), &manifest.archive()),
            None => Ok(self.has_archive(manifest, true)),
        }
    }

    /// What a host said last, and when that arrived.
    pub fn heartbeat(&self, host: &HostName) -> Result<Option<Heard>> {
        let path = self.received(host).join("heartbeat.json");
        let doing = || format!("read {}", path.display());
        let Some(text) = read(&path).context(doing)? else { return Ok(None) };
        let arrived = fs::symlink_metadata(&path).and_then(|metadata| metadata.modified()).context(doing)?;
        let heartbeat: Heartbeat = json::parse_foreign(&text).context(doing)?;
        if heartbeat.host == *host { Ok(Some((heartbeat, arrived))) } else { Err("it names another host").context(doing) }
    }

    /// The file that tells a host which of its reports have arrived; publishers may write there.
    pub fn acknowledged(&self, host: &HostName) -> PathBuf {
        self.release(host).join(RECEIVED)
    }

    /// The hub's own of the same.
    pub fn index_file(&self, host: &HostName) -> PathBuf {
        self.received(host).join(RECEIVED)
    }

    /// These reports, the newest last.
    pub fn index(&self, host: &HostName) -> Result<Received> {
        let path = self.index_file(host);
        let doing = || format!("read {}", path.display());
        let text = read(&path).context(doing)?;
        Ok(text.map(|text| json::parse_foreign(&text)).transpose().context(doing)?.unwrap_or_default())
    }

    /// The turn of who publishes, if nobody has it.
    pub fn turn_if_free(&self) -> Result<Option<Flock<File>>> {
        files::lock(&self.collected(), FlockArg::LockExclusiveNonblock)
    }

    /// Waits until nobody else publishes, and keeps others waiting until it is dropped.
    pub fn turn(&self) -> Result<Flock<File>> {
        let directory = self.collected();
        let doing = || format!("create {}", directory.display());
        if !directory.exists() {
            // or the hub's user could not write there ever after
            let above = fs::metadata(&self.directory).context(doing)?;
            if above.uid() != geteuid().as_raw() {
                return Err(format!("{} does not belong to this user", self.directory.display())).context(doing);
            }
            fs::create_dir(&directory).context(doing)?;
        }
        match files::lock(&directory, FlockArg::LockExclusiveNonblock) {
            Ok(Some(turn)) => return Ok(turn),
            Ok(None) => log::info!("Another user is publishing; waiting ..."),
            Err(error) => return Err(error),
        }
        files::lock(&directory, FlockArg::LockExclusive)?.ok_or_else(|| Error::new("Failed to wait for another publisher"))
    }
}

/// What the manifest of a release is called that is to follow.
fn next(release: &Release) -> String {
    format!("{}.{}{NEXT}", release.id, release.sequence)
}

/// Reads a file in which anything may be; `None` if it is not there.
fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match files::read_foreign(path, SMALL) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

/// The manifest of a host that is in a file; none in the place of one of another format.
fn parse(text: &[u8], host: &HostName) -> Result<(Option<Manifest>, Signed), String> {
    #[derive(Deserialize)]
    struct Format {
        format: u32,
    }
    let signed: Signed = json::parse(text).map_err(|error| error.to_string())?;
    let Format { format } = json::parse(signed.manifest.as_bytes()).map_err(|error| error.to_string())?;
    if format != FORMAT {
        return Ok((None, signed));
    }
    let manifest: Manifest = json::parse_foreign(signed.manifest.as_bytes()).map_err(|error| error.to_string())?;
    if manifest.host == *host { Ok((Some(manifest), signed)) } else { Err(format!("it is for host {}", manifest.host)) }
}
