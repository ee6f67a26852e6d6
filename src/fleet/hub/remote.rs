//! A hub that is another machine than this one. What a command has to know of it is fetched into a
//! directory of that command's own, and what is published there is sent.
//!
//! A host sees the release before or the whole new one: a manifest is renamed into its place when its
//! archive is there. Of several who publish for one host, one at a time does, and only on top of what
//! it has seen: a release is never replaced by one of the same number, or of a lower one.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Context, Error, Result};
use crate::files;
use crate::fleet::hub::memory::Memory;
use crate::fleet::hub::snapshot;
use crate::fleet::place::Place;
use crate::fleet::sftp::Session;
use crate::fleet::temporary::Temporary;
use crate::fleet::{KNOWN, LARGE, REMOVED, ROLLOUT};
use crate::names::{HostName, Sha256};
use crate::system;

/// Why a release is not published that is not on top of the last one.
pub const MEANWHILE: &str = "another release was published in the meantime; deploy again";
/// What a publisher calls the hub.
pub const SCHEME: &str = "sftp://";
/// The end of the names of manifests that are to follow.
pub const NEXT: &str = ".next";
/// How long it may take to fetch what is known of the hosts, and to send one release.
const FETCH: Duration = Duration::from_secs(600);
const SEND: Duration = Duration::from_secs(3600);
/// The file that exists while somebody publishes, and says who.
const CLAIM: &str = "publishing";
const MANIFEST: &str = "manifest.json";
const HOLDS: &str = "holds.json";
/// The end of the name of what is being sent.
const SENT: &str = ".sent";
/// For how long somebody who publishes has to be silent before somebody else does; what the former sent
/// is then removed, so it is no matter if they are slow and not gone.
const STALE: Duration = Duration::from_secs(30);
/// For fewer hosts than that, what is told of all of them is not worth the while.
const FEW: usize = 20;
/// How often the name is tried that nothing seems to have.
const TRIES: usize = 5;

/// Where the hub is.
pub struct Elsewhere {
    server: String,
    path: String,
    temporary: Temporary,
    memory: Memory,
    /// One session at a time is enough to send.
    turn: Mutex<()>,
}

impl Elsewhere {
    /// The one of this URL.
    pub fn new(url: &str) -> Result<Self> {
        let (server, path) = parse(url).context(|| format!("understand {url:?}"))?;
        Ok(Self { server, path, temporary: Temporary::new()?, memory: Memory::new(Path::new(url)), turn: Mutex::default() })
    }

    /// Which machine it is, as `sftp://` without a path.
    pub fn server(&self) -> &str {
        &self.server
    }

    /// The directory of what has been fetched, in the paths of the hub's own.
    pub fn place(&self) -> &Path {
        self.temporary.path()
    }

    fn open(&self, limit: Duration) -> Result<Session> {
        Session::open_as_configured(&self.server, &self.path, self.place(), limit)
    }

    /// Fetches which hosts there are; and of those that are named, or all, what is published and what
    /// they said last, with one more of the files that were collected. What the hub tells of all hosts at once may be some
    /// seconds old; `exactly` is to ask for each.
    pub fn fetch(&self, wanted: &[&str], also: Option<&str>, exactly: bool) -> Result<()> {
        let mut session = self.open(FETCH)?;
        let hosts = self.place().join("hosts");
        fs::create_dir_all(&hosts).context(|| format!("create {}", hosts.display()))?;
        for file in [KNOWN, REMOVED] {
            session.fetch(&format!("hosts/{file}"), &hosts.join(file))?;
        }
        for (directory, file) in [(ROLLOUT, "plan.json"), (ROLLOUT, HOLDS), ("received", "rollout.json")] {
            let local = self.place().join(directory);
            fs::create_dir_all(&local).context(|| format!("create {}", local.display()))?;
            session.fetch(&format!("{directory}/{file}"), &local.join(file))?;
        }
        let (all, mut known) = (self.place().join("all.json"), BTreeSet::new());
        let is_for_few = !wanted.is_empty() && wanted.len() < FEW;
        if !exactly && !is_for_few && session.fetch(snapshot::FILE, &all)? {
            known = snapshot::lay_out(&all, self.place(), &self.memory).context(|| format!("read {}", all.display()))?;
        }
        for host in session.list("hosts")?.into_iter().filter_map(|name| HostName::try_from(name).ok()) {
            let files = [("hosts", "/release", MANIFEST), ("received", "", "heartbeat.json")];
            for (above, below, file) in files.into_iter().chain(also.map(|file| ("received", "", file))) {
                let directory = format!("{above}/{host}{below}");
                let local = self.place().join(&directory);
                fs::create_dir_all(&local).context(|| format!("create {}", local.display()))?;
                if (wanted.is_empty() || wanted.contains(&&*host)) && !known.contains(&host) {
                    session.fetch(&format!("{directory}/{file}"), &local.join(file))?;
                }
            }
        }
        session.close()
    }

    /// Fetches one more file, if it is there.
    pub fn fetch_file(&self, file: &str) -> Result<()> {
        let mut session = self.open(FETCH)?;
        session.fetch(file, &self.place().join(file))?;
        session.close()
    }

    /// Sends one such file.
    pub fn send_file(&self, file: &str) -> Result<()> {
        let mut session = self.open(SEND)?;
        session.put(&self.place().join(file), file)?;
        session.close()
    }

    /// Whether a file is there.
    pub fn has(&self, directory: &str, name: &str) -> Result<bool> {
        let mut session = self.open(FETCH)?;
        let found = session.list(directory)?.iter().any(|there| there == name);
        session.close().map(|()| found)
    }

    /// Sends files of a host's release, one after the other.
    pub fn stage(&self, host: &HostName, names: &[&str]) -> Result<()> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let mut release = self.publication(host)?;
        for name in names {
            release.send(name, &release.local.join(name))?;
            release.rename_sent(name)?;
        }
        release.session.close()
    }

    fn publication(&self, host: &HostName) -> Result<Publication> {
        self.publication_of(host, format!("hosts/{host}/release"), MEANWHILE)
    }

    fn publication_of(&self, what: &str, path: String, meanwhile: &'static str) -> Result<Publication> {
        let (id, local) = (system::uuid()?, self.place().join(&path));
        Ok(Publication { session: self.open(SEND)?, what: what.into(), local, path, id, meanwhile })
    }

    /// Has `change` read and write what is held in the directory [`Self::place`]; of several who do so at once, one at a time.
    pub fn change_holds(&self, change: impl FnOnce() -> Result<()>) -> Result<()> {
        let mut holds = self.publication_of(HOLDS, ROLLOUT.into(), "somebody else has changed it in the meantime; try again")?;
        holds.claim()?;
        let (local, remote) = (holds.local.join(HOLDS), holds.remote(HOLDS));
        let fetched = holds.clear_others().and_then(|_| holds.session.fetch(&remote, &local));
        let done = fetched.and_then(|_| change()).and_then(|()| holds.send(HOLDS, &local)).and_then(|()| holds.rename_sent(HOLDS));
        holds.end(done)
    }

    /// Sends a host's archive, and then the file `new` as its manifest. Fails, and changes nothing, if somebody else has
    /// published since [`Self::fetch`].
    pub fn publish(&self, host: &HostName, archive: &str, new: &Path) -> Result<()> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let mut release = self.publication(host)?;
        let local = release.local.join(archive);
        // what is renewed is there
        if local.exists() {
            release.send(archive, &local)?;
            release.rename_sent(archive)?;
        }
        release.send(MANIFEST, new)?;
        release.claim()?;
        let done = release.replace(archive);
        release.end(done)
    }
}

/// Something about to be replaced, such as a host's release.
struct Publication {
    session: Session,
    /// Its name, such as the host's.
    what: String,
    /// Its directory here, and there.
    local: PathBuf,
    path: String,
    /// Why it is not replaced where somebody else has done so.
    meanwhile: &'static str,
    /// What tells this process from all others who publish.
    id: String,
}

impl Publication {
    fn remote(&self, name: &str) -> String {
        format!("{}/{name}", self.path)
    }

    /// What a file is called while it is sent.
    fn sent(&self, name: &str) -> String {
        self.remote(&format!("{}.{name}{SENT}", self.id))
    }

    fn send(&mut self, name: &str, local: &Path) -> Result<()> {
        let remote = self.sent(name);
        self.session.send(local, &remote)
    }

    /// Puts what was sent into its place.
    fn rename_sent(&mut self, name: &str) -> Result<()> {
        let (sent, remote) = (self.sent(name), self.remote(name));
        match self.session.rename(&sent, &remote) {
            Err(error) => Err(self.or_meanwhile(name, error)),
            Ok(()) => Ok(()),
        }
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
    fn claim(&mut self) -> Result<()> {
        let user = std::env::var("USER").unwrap_or_default();
        let machine = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let (local, claim, sent) = (self.local.join(CLAIM), self.remote(CLAIM), self.sent(CLAIM));
        fs::create_dir_all(&self.local).context(|| format!("create {}", self.local.display()))?;
        fs::write(&local, format!("{user} at {} as {}", machine.trim_end(), self.id)).context(|| format!("write {}", local.display()))?;
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

    /// Lets others have their turn, and closes the session; `done` tells what has come of the one of this process.
    fn end(mut self, done: Result<()>) -> Result<()> {
        let gone = match self.read(CLAIM) {
            Ok(Some(found)) if String::from_utf8_lossy(&found).ends_with(&self.id) => self.clear(CLAIM),
            other => other.map(drop),
        };
        done?;
        gone.and_then(|()| self.session.close())
    }

    /// Has a publisher that comes later, however late, find nothing to put into place; nor does the hub, which may be about to
    /// begin a wave. Returns what was there.
    fn clear_others(&mut self) -> Result<Vec<String>> {
        let (there, id) = (self.session.list(&self.path)?, self.id.clone());
        for name in there.iter().filter(|name| (is_sent(name) || is_next(name)) && !name.starts_with(&id)) {
            self.clear(name)?;
        }
        Ok(there)
    }

    /// Puts the new manifest into its place, on top of what was fetched and of nothing else.
    fn replace(&mut self, archive: &str) -> Result<()> {
        let there = self.clear_others()?;
        let fetched = files::if_there(files::read_foreign(&self.local.join(MANIFEST), LARGE));
        let fetched = fetched.context(|| format!("read the manifest of {}", self.what))?;
        if self.read(MANIFEST)? != fetched || !there.iter().any(|name| name == archive) {
            return Err(self.meanwhile());
        }
        self.rename_sent(MANIFEST)
    }

    /// What a file says now; `None` if it is not there.
    fn read(&mut self, name: &str) -> Result<Option<Vec<u8>>> {
        let local = self.local.join("now");
        if !self.session.fetch(&self.remote(name), &local)? {
            return Ok(None);
        }
        files::read_foreign(&local, LARGE).map(Some).context(|| format!("read {}", local.display()))
    }
}

/// Whether a name is one that [`Publication::sent`] makes; other names there are nobody's here.
fn is_sent(name: &str) -> bool {
    let name = name.strip_suffix(SENT).and_then(|name| name.split_once('.'));
    let is_id = |id: &str| id.len() == 36 && id.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-');
    name.is_some_and(|(id, name)| is_id(id) && ([CLAIM, MANIFEST, HOLDS].contains(&name) || is_archive(name) || is_next(name)))
}

/// Whether it is that of a manifest that is to follow.
fn is_next(name: &str) -> bool {
    let parts = name.strip_suffix(NEXT).and_then(|name| name.split_once('.'));
    parts.is_some_and(|(id, number)| Sha256::try_from(id).is_ok() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

fn is_archive(name: &str) -> bool {
    name.strip_suffix(".tar.gz").is_some_and(|id| Sha256::try_from(id).is_ok())
}

/// The server, and the path of the directory there; `None` for the one that the server begins in.
fn parse(url: &str) -> Result<(String, String), &'static str> {
    let rest = url.strip_prefix(SCHEME).unwrap_or_default();
    let (server, path) = rest.split_once('/').unwrap_or((rest, ""));
    let is =
        |text: &str, more: &[u8]| text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte) || more.contains(&byte));
    if server.is_empty() || server.starts_with('-') || !is(server, b"@:[]%") || !is(path, b"/") {
        return Err("expected sftp://[user@]host[:port][/path]");
    }
    let path = path.trim_end_matches('/');
    Ok((format!("{SCHEME}{server}"), if path.is_empty() { String::new() } else { format!("/{path}") }))
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

    #[test]
    fn a_url_is_a_server_and_a_path() {
        let found = |url| parse(url).map(|(server, path)| format!("{server} {path}"));
        for (url, expected) in [
            ("sftp://hub", "sftp://hub "),
            ("sftp://hub/", "sftp://hub "),
            ("sftp://alice@hub.example.org:2222/srv/hub/", "sftp://alice@hub.example.org:2222 /srv/hub"),
            ("sftp://[::1]:22", "sftp://[::1]:22 "),
        ] {
            assert_eq!(found(url).unwrap(), expected);
        }
        for url in
            ["sftp://", "sftp:///srv", "sftp://-oProxyCommand=x", "sftp://hub/a b", "sftp://hub/*", "sftp://hub\nrm", "/srv", "http://hub"]
        {
            assert!(found(url).is_err(), "{url}");
        }
    }
}
