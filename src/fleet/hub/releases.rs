//! What is published for each host: the manifest that it sees, those that are to follow in later waves, and archives.
//!
//! Publishers may write there: what is read becomes a manifest or an error.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, SystemTime};

use serde::Deserialize;

use crate::error::{Context, OrLog, Result};
use crate::fleet::hub::publication::NEXT;
use crate::fleet::hub::remote::MEANWHILE;
use crate::fleet::hub::served::ServedDirectory;
use crate::fleet::{FORMAT, MANIFEST, Manifest, SMALL, Signed, sha256};
use crate::names::{HostName, Sha256};
use crate::run::Release;
use crate::system::now;
use crate::{files, json, text};

/// For how long a file that nothing refers to may be about to be.
const ON_ITS_WAY: Duration = Duration::from_secs(3600);
/// For how long somebody may be about to replace what is to follow.
const AT_WORK: Duration = Duration::from_secs(60);

impl ServedDirectory {
    /// Has hosts see a new release: its archive, which is beside `old`, and then its manifest; what was to follow does no more.
    /// Fails, and changes nothing, if `old` is not what they see now.
    pub fn publish(&self, manifest: &Manifest, new: &Signed, old: Option<&Signed>) -> Result<()> {
        let release = self.release(&manifest.host);
        if let Some(elsewhere) = self.elsewhere() {
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
        self.elsewhere().map_or(Ok(()), |elsewhere| elsewhere.stage(&manifest.host, &[&manifest.archive(), &name]))
    }

    /// What was put there.
    pub fn staged(&self, host: &HostName, release: &Release) -> Option<(Manifest, Signed)> {
        let text = files::read_foreign(&self.release(host).join(next(release)), SMALL).ok()?;
        parse(&text, host).ok()?.filter(|(manifest, _)| manifest.release == *release)
    }

    /// Whether all is there for that, and its host would take it.
    fn can_follow(&self, host: &HostName, release: &Release) -> bool {
        self.staged(host, release).is_some_and(|(manifest, _)| !manifest.has_expired(now()) && self.has_archive(&manifest, false))
    }

    /// Whether something of what was put there is gone, and nobody is at work there.
    pub fn has_lost(&self, host: &HostName, release: &Release) -> bool {
        self.elsewhere().is_none() && !self.can_follow(host, release) && files::age(&self.release(host)).is_ok_and(|age| age > AT_WORK)
    }

    /// Has hosts see what was put there, if they see `before` now. Returns whether they do see it.
    pub fn follow(&self, host: &HostName, release: &Release, before: Option<&Release>) -> Result<bool> {
        let sees = self.valid_manifest(host)?.map(|(manifest, _)| manifest.release);
        if sees.as_ref() == Some(release) {
            return Ok(true);
        }
        let is_later = before.is_none_or(|before| before.sequence < release.sequence);
        if sees.as_ref() != before || !is_later || !self.can_follow(host, release) {
            return Ok(false);
        }
        let (place, path) = (self.release(host), self.release(host).join(MANIFEST));
        // whoever publishes from elsewhere removes it first
        let renamed = files::if_there(fs::rename(place.join(next(release)), &path)).context(|| format!("publish {host}"))?;
        renamed.map_or(Ok(false), |()| files::sync_parent(&path).map(|()| true)).context(|| format!("publish {host}"))
    }

    /// Has what was put there not follow; elsewhere the hub removes it.
    pub fn forget_next(&self, host: &HostName, release: &Release) -> Result<()> {
        let path = self.release(host).join(next(release));
        files::remove(&path).doing("remove", &path)
    }

    /// Removes all releases of a host but those of which something is in `kept`, and what is on its way, if others may be
    /// about to publish.
    pub fn tidy(&self, host: &HostName, kept: &[Sha256], others: bool) -> Result<()> {
        let release = self.release(host);
        for entry in fs::read_dir(&release).doing("read", &release)?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let (id, end) = name.split_once('.').unwrap_or_default();
            // whatever somebody else is writing is neither
            let is_left = match Sha256::try_from(id) {
                Ok(id) => (end.starts_with("tar.gz") || end.contains(NEXT)) && !kept.contains(&id),
                Err(_) => name.starts_with(MANIFEST) && name != MANIFEST,
            };
            let age = entry.metadata().and_then(|metadata| metadata.modified()).ok().and_then(|time| time.elapsed().ok());
            if is_left && (!others || age.is_some_and(|age| age > ON_ITS_WAY)) {
                // it is published all the same
                files::remove(&entry.path()).context(|| format!("remove {:?}", entry.path())).or_warn();
            }
        }
        Ok(())
    }

    /// What is published for a host; the error says why it is of no use to it.
    pub fn manifest(&self, host: &HostName) -> Result<Option<Result<(Manifest, Signed), String>>> {
        let path = self.release(host).join(MANIFEST);
        let parsed = match files::if_there(files::read_foreign(&path, SMALL)) {
            Err(error) if matches!(error.kind(), ErrorKind::InvalidData | ErrorKind::FileTooLarge) => Err(error.to_string()),
            other => match other.doing("read", &path)? {
                Some(text) => parse(&text, host),
                None => return Ok(None),
            },
        };
        match parsed {
            Ok(Some(found)) => Ok(Some(Ok(found))),
            Ok(None) => Err("unsupported format").doing("read", &path),
            Err(why) => Ok(Some(Err(format!("{}: {}", path.display(), text::line(&why))))),
        }
    }

    /// When that was changed last; no publisher can choose that.
    pub fn changed(&self, host: &HostName) -> Result<Option<SystemTime>> {
        let path = self.release(host).join(MANIFEST);
        let metadata = files::if_there(fs::symlink_metadata(&path)).doing("read", &path)?;
        Ok(metadata.map(|metadata| {
            let (seconds, rest) = (metadata.ctime().try_into().unwrap_or(0), metadata.ctime_nsec().try_into().unwrap_or(0));
            SystemTime::UNIX_EPOCH + Duration::new(seconds, rest)
        }))
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
        if self.elsewhere().is_some() {
            return !thorough;
        }
        let is_there = fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.is_file() && metadata.len() == manifest.size);
        is_there && (!thorough || sha256::of_file(&path).is_ok_and(|sha256| sha256 == manifest.sha256))
    }

    /// Whether there is an archive of that name, at least.
    pub fn keeps(&self, manifest: &Manifest) -> Result<bool> {
        match self.elsewhere() {
            Some(elsewhere) => elsewhere.has(&format!("hosts/{}/release", manifest.host), &manifest.archive()),
            None => Ok(self.has_archive(manifest, true)),
        }
    }
}

/// What the manifest of a release is called that is to follow.
fn next(release: &Release) -> String {
    format!("{}.{}{NEXT}", release.id, release.sequence)
}

/// The manifest of a host that is in a file; none if it is of another format.
fn parse(text: &[u8], host: &HostName) -> Result<Option<(Manifest, Signed)>, String> {
    #[derive(Deserialize)]
    struct Format {
        format: u32,
    }
    let signed: Signed = json::parse(text).map_err(|error| error.to_string())?;
    let Format { format } = json::parse(signed.manifest.as_bytes()).map_err(|error| error.to_string())?;
    if format != FORMAT {
        return Ok(None);
    }
    let manifest = signed.read().map_err(|error| error.to_string())?;
    if manifest.host == *host { Ok(Some((manifest, signed))) } else { Err(format!("it is for host {}", manifest.host)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::hub::host_state::tests::{manifest, release};
    use crate::testing::Directory;

    #[test]
    fn what_somebody_was_writing_who_was_killed_does_not_stay() {
        let place = Directory::new();
        let hub = ServedDirectory::new(place.path()).unwrap();
        let (host, id) = (HostName::try_from("web").unwrap(), "0".repeat(64));
        fs::create_dir_all(hub.release(&host)).unwrap();
        for name in [MANIFEST, "manifest.json.7.new", &format!("{id}.tar.gz.7.new"), &format!("{id}.5.next.7.new")] {
            fs::write(hub.release(&host).join(name), "").unwrap();
        }
        hub.tidy(&host, &[], false).unwrap();
        let left: Vec<_> = fs::read_dir(hub.release(&host)).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, [MANIFEST]);
    }

    #[test]
    fn what_has_expired_while_it_waited_is_not_offered() {
        let place = Directory::new();
        let hub = ServedDirectory::new(place.path()).unwrap();
        for (expires, is_offered) in [(Some(1000), false), (Some(now() + 1000), true)] {
            let next = Manifest { release: release(2), expires, ..manifest() };
            fs::create_dir_all(hub.release(&next.host)).unwrap();
            fs::write(hub.release(&next.host).join(next.archive()), vec![0; usize::try_from(next.size).unwrap()]).unwrap();
            hub.stage(&next, &Signed { manifest: serde_json::to_string(&next).unwrap(), signature: None }).unwrap();
            assert_eq!(hub.follow(&next.host, &next.release, None).unwrap(), is_offered);
            assert_eq!(hub.manifest(&next.host).unwrap().is_some(), is_offered);
        }
    }
}
