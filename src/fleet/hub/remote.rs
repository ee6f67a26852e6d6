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
use std::time::Duration;

use crate::error::{Context, Result};
use crate::fleet::hub::memory::Memory;
use crate::fleet::hub::publication::{HOLDS, PLAN, Publication};
use crate::fleet::hub::snapshot;
use crate::fleet::sftp::Session;
use crate::fleet::temporary::Temporary;
use crate::fleet::{HEARTBEAT, KNOWN, MANIFEST, REMOVED, ROLLOUT};
use crate::names::HostName;
use crate::system;
use crate::text::consists_of;

/// Why a release is not published that is not on top of the last one.
pub const MEANWHILE: &str = "another release was published in the meantime; deploy again";
/// What a publisher calls the hub.
pub const SCHEME: &str = "sftp://";
/// How long it may take to fetch what is known of the hosts, and to send one release.
const FETCH: Duration = Duration::from_secs(600);
const SEND: Duration = Duration::from_secs(3600);
/// For fewer hosts than that, what is told of all of them is not worth the while.
const FEW: usize = 20;

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
        for (directory, file) in [("hosts", KNOWN), ("hosts", REMOVED), (ROLLOUT, PLAN), (ROLLOUT, HOLDS), ("received", "rollout.json")] {
            self.fetch_by(&mut session, directory, file)?;
        }
        let mut known = BTreeSet::new();
        let is_for_few = !wanted.is_empty() && wanted.len() < FEW;
        if !exactly && !is_for_few && self.fetch_by(&mut session, "received", snapshot::FILE)? {
            let all = self.place().join("received").join(snapshot::FILE);
            known = snapshot::lay_out(&all, self.place(), &self.memory).doing("read", &all)?;
        }
        for host in session.list("hosts")?.into_iter().filter_map(|name| HostName::try_from(name).ok()) {
            let (release, received) = (format!("hosts/{host}/release"), format!("received/{host}"));
            if (wanted.is_empty() || wanted.contains(&&*host)) && !known.contains(&host) {
                for (directory, file) in
                    [(&release, MANIFEST), (&received, HEARTBEAT)].into_iter().chain(also.map(|also| (&received, also)))
                {
                    self.fetch_by(&mut session, directory, file)?;
                }
            } else {
                self.make(&release)?;
            }
        }
        session.close()
    }

    /// Fetches a file into the same place here, if it is there. Returns whether it is.
    fn fetch_by(&self, session: &mut Session, directory: &str, file: &str) -> Result<bool> {
        session.fetch(&format!("{directory}/{file}"), &self.make(directory)?.join(file))
    }

    /// Makes one of the hub's directories here.
    fn make(&self, directory: &str) -> Result<PathBuf> {
        let place = self.place().join(directory);
        fs::create_dir_all(&place).doing("create", &place).map(|()| place)
    }

    /// Fetches one more file into its place here, if it is there.
    pub fn fetch_file(&self, place: &Path) -> Result<()> {
        let Ok(file) = place.strip_prefix(self.place()) else { return Ok(()) };
        let mut session = self.open(FETCH)?;
        session.fetch(&file.to_string_lossy(), place)?;
        session.close()
    }

    /// Sends the file `new` as the plan. Fails, and changes nothing, if somebody else has since [`Self::fetch`].
    pub fn plan(&self, new: &Path) -> Result<()> {
        self.publication_of(PLAN, ROLLOUT.into(), MEANWHILE)?.publish(PLAN, new, None)
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
        let done = fetched.and_then(|_| change()).and_then(|()| holds.send(HOLDS, &local)).and_then(|()| holds.rename_in_turn(HOLDS));
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
        release.publish(MANIFEST, new, Some(archive))
    }
}

/// The server, and the path of the directory there; `None` for the one that the server begins in.
fn parse(url: &str) -> Result<(String, String), &'static str> {
    let rest = url.strip_prefix(SCHEME).unwrap_or_default();
    let (server, path) = rest.split_once('/').unwrap_or((rest, ""));
    if server.is_empty() || server.starts_with('-') || !consists_of(server, b"._-@:[]%") || !consists_of(path, b"._-/") {
        return Err("expected sftp://[user@]host[:port][/path]");
    }
    let path = path.trim_end_matches('/');
    Ok((format!("{SCHEME}{server}"), if path.is_empty() { String::new() } else { format!("/{path}") }))
}

#[cfg(test)]
mod tests {
    use super::*;

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
