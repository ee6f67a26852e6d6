//! Something about to be replaced in a directory of a hub elsewhere: of several who do so at once, one at a time does, and what
//! those have sent who were cut off, or were silent for too long, is put to no use.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::error::{Context, Error, Result};
use crate::files;
use crate::fleet::sftp::Session;
use crate::fleet::{LARGE, MANIFEST};
use crate::names::Sha256;
use crate::system::host_name;

/// The end of the names of manifests that are to follow.
pub const NEXT: &str = ".next";
/// The file that exists while somebody publishes, and says who.
const CLAIM: &str = "publishing";
/// What is replaced there besides a host's release: of roll-outs.
pub const HOLDS: &str = "holds.json";
pub const PLAN: &str = "plan.json";
/// The end of the name of what is being sent.
const SENT: &str = ".sent";
/// For how long somebody who publishes has to be silent before somebody else does; what the former sent
/// is then removed, so it is no matter if they are slow and not gone.
const STALE: Duration = Duration::from_secs(30);
/// How often the name is tried that nothing seems to have.
const TRIES: usize = 5;

/// Something about to be replaced, such as a host's release.
pub struct Publication {
    pub session: Session,
    /// Its name, such as the host's.
    pub what: String,
    /// Its directory here, and there.
    pub local: PathBuf,
    pub path: String,
    /// Why it is not replaced where somebody else has done so.
    pub meanwhile: &'static str,
    /// What tells this process from all others who publish.
    pub id: String,
}

impl Publication {
    /// What a file is called there.
    pub fn remote(&self, name: &str) -> String {
        format!("{}/{name}", self.path)
    }

    /// What a file is called while it is sent.
    fn sent(&self, name: &str) -> String {
        self.remote(&format!("{}.{name}{SENT}", self.id))
    }

    /// Sends a file that is to be one of this name.
    pub fn send(&mut self, name: &str, local: &Path) -> Result<()> {
        let remote = self.sent(name);
        self.session.send(local, &remote)
    }

    /// Puts what was sent into its place.
    pub fn rename_sent(&mut self, name: &str) -> Result<()> {
        let (sent, remote) = (self.sent(name), self.remote(name));
        self.session.rename(&sent, &remote).map_err(|error| self.or_meanwhile(name, error))
    }

    /// Removes a file, unless its sender has done so.
    fn clear(&mut self, name: &str) -> Result<()> {
        let removed = self.session.remove(&self.remote(name));
        if removed.is_err() && !self.session.list(&self.path)?.iter().any(|there| there == name) { Ok(()) } else { removed }
    }

    /// The error that says why what was sent could not be put to use: `error`, or somebody has removed it.
    fn or_meanwhile(&mut self, name: &str, error: Error) -> Error {
        let sent = self.sent(name);
        let gone = self.session.list(&self.path).is_ok_and(|there| !there.iter().any(|name| self.remote(name) == sent));
        if gone { self.meanwhile() } else { error }
    }

    fn meanwhile(&self) -> Error {
        Error::new(format!("Failed to publish {}: {}", self.what, self.meanwhile))
    }

    /// Waits until nobody else publishes there, and keeps others waiting.
    pub fn claim(&mut self) -> Result<()> {
        let user = std::env::var("USER").unwrap_or_default();
        let (local, claim, sent) = (self.local.join(CLAIM), self.remote(CLAIM), self.sent(CLAIM));
        fs::create_dir_all(&self.local).doing("create", &self.local)?;
        fs::write(&local, format!("{user} at {} as {}", host_name(), self.id)).doing("write", &local)?;
        self.send(CLAIM, &local)?;
        let (mut other, mut since, mut tries) = (Vec::new(), Instant::now(), 0);
        let what = self.what.clone();
        loop {
            match self.session.link(&sent, &claim) {
                Ok(false) => {}
                Ok(true) => return self.session.remove(&sent),
                Err(error) => return Err(self.or_meanwhile(CLAIM, error)),
            }
            match self.read(CLAIM)? {
                None if tries >= TRIES => {
                    return Err(Error::new(format!("Failed to publish {what}: the hub cannot create the link {claim}")));
                }
                None => tries += 1,
                Some(found) if found != other => {
                    log::info!("{what} is being published by {}; waiting ...", String::from_utf8_lossy(&found));
                    (other, since) = (found, Instant::now());
                }
                Some(_) if since.elapsed() > STALE => {
                    log::warn!("The other publisher of {what} has not responded for {} s; continuing.", STALE.as_secs());
                    self.clear(CLAIM)?;
                }
                Some(_) => {}
            }
            std::thread::sleep(Duration::from_secs(1));
        }
    }

    /// Whether it is this process's turn still, and nobody has gone on without it.
    fn is_ours(&mut self) -> Result<bool> {
        let found = self.read(CLAIM)?;
        Ok(found.is_some_and(|found| String::from_utf8_lossy(&found).ends_with(&self.id)))
    }

    /// Puts what was sent into its place, unless somebody has gone on without this process.
    pub fn rename_in_turn(&mut self, name: &str) -> Result<()> {
        if self.is_ours()? { self.rename_sent(name) } else { Err(self.meanwhile()) }
    }

    /// Lets others have their turn, and closes the session; `done` tells what has come of the one of this process.
    pub fn end(mut self, done: Result<()>) -> Result<()> {
        let gone = match self.is_ours() {
            Ok(true) => self.clear(CLAIM),
            other => other.map(drop),
        };
        done?;
        gone.and_then(|()| self.session.close())
    }

    /// Has a publisher that comes later, however late, find nothing to put into place; nor does the hub, which may be about to
    /// begin a wave. Returns what was there.
    pub fn clear_others(&mut self) -> Result<Vec<String>> {
        let (there, id) = (self.session.list(&self.path)?, self.id.clone());
        for name in there.iter().filter(|name| (is_sent(name) || is_next(name)) && !name.starts_with(&id)) {
            self.clear(name)?;
        }
        Ok(there)
    }

    /// Sends the file `new`, and puts it into its place by this name, on top of what was fetched and of nothing else; there has
    /// to be what it `needs` besides.
    pub fn publish(mut self, name: &str, new: &Path, needs: Option<&str>) -> Result<()> {
        self.send(name, new)?;
        self.claim()?;
        let done = self.replace(name, needs);
        self.end(done)
    }

    fn replace(&mut self, name: &str, needs: Option<&str>) -> Result<()> {
        let there = self.clear_others()?;
        let place = self.local.join(name);
        let fetched = files::if_there(files::read_foreign(&place, LARGE)).doing("read", &place)?;
        if self.read(name)? != fetched || needs.is_some_and(|needs| !there.iter().any(|name| name == needs)) {
            return Err(self.meanwhile());
        }
        self.rename_sent(name)
    }

    /// What a file says now; `None` if it is not there.
    fn read(&mut self, name: &str) -> Result<Option<Vec<u8>>> {
        let local = self.local.join("now");
        if !self.session.fetch(&self.remote(name), &local)? {
            return Ok(None);
        }
        files::read_foreign(&local, LARGE).map(Some).doing("read", &local)
    }
}

/// Whether a name is one that [`Publication::sent`] makes; other names there are nobody's here.
fn is_sent(name: &str) -> bool {
    let name = name.strip_suffix(SENT).and_then(|name| name.split_once('.'));
    let is_id = |id: &str| id.len() == 36 && id.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-');
    name.is_some_and(|(id, name)| is_id(id) && ([CLAIM, MANIFEST, HOLDS, PLAN].contains(&name) || is_archive(name) || is_next(name)))
}

/// Whether it is that of a manifest that is to follow.
fn is_next(name: &str) -> bool {
    let parts = name.strip_suffix(NEXT).and_then(|name| name.split_once('.'));
    parts.is_some_and(|(id, number)| Sha256::try_from(id).is_ok() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

fn is_archive(name: &str) -> bool {
    name.strip_suffix(".tar.gz").is_some_and(|id| Sha256::try_from(id).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_ours_is_removed() {
        let (id, sha) = ("0b6f5d0c-7b9a-4c8e-9a51-000000000000", "0".repeat(64));
        for name in ["manifest.json".into(), "publishing".into(), format!("{sha}.tar.gz")] {
            assert!(is_sent(&format!("{id}.{name}.sent")));
        }
        assert!(is_next(&format!("{sha}.5.next")) && is_sent(&format!("{id}.{sha}.5.next.sent")));
        assert!(!is_next(&format!("{sha}.x.next")) && !is_next("x.5.next") && !is_next(&format!("../{sha}.5.next")));
        for name in ["x.sent", "../x.sent", "x\".tar.gz.sent", &format!("{id}./../x.sent"), &format!("{id}.manifest.json")] {
            assert!(!is_sent(name), "{name}");
        }
        assert!(is_archive(&format!("{sha}.tar.gz")) && !is_archive("x\".tar.gz") && !is_archive(&format!("../{sha}.tar.gz")));
    }
}
