//! What a host has to do with to ask for its release and to report: a session with its hub, a store, or both.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::config::Hub;
use crate::error::{Context, Error, Result};
use crate::files;
use crate::fleet::https::Store;
use crate::fleet::place::Place;
use crate::fleet::sftp::Session;
use crate::fleet::temporary::Temporary;
use crate::paths::Paths;

/// Both of them, if there are both.
pub struct Peers {
    /// Files come from there, and nowhere else.
    pub session: Option<Session>,
    store: Option<Store>,
}

impl Peers {
    /// Opens what there is, for so long; `directory` is for scratch files, `ahead` what will be fetched in a session. Where
    /// releases come from a store and no files from the hub, the hub need not be there.
    pub fn open(paths: &Paths, hub: &Hub, directory: &Path, limit: Duration, ahead: &[&str]) -> Result<Self> {
        let store = store(paths, hub, paths.own(""), limit);
        let open = || Session::open(hub, &identity(paths)?, directory, limit, ahead);
        let session = match (!hub.servers.is_empty()).then(open).transpose() {
            Err(error) if store.is_some() && hub.file_directories.is_empty() => {
                log::warn!("{error}.");
                None
            }
            session => session?,
        };
        Ok(Self { session, store })
    }

    /// What releases come from alone, of which nothing is kept.
    pub fn of_releases(paths: &Paths, hub: &Hub, directory: &Path, limit: Duration, ahead: &[&str]) -> Result<Self> {
        let store = store(paths, hub, directory.to_owned(), limit);
        let open = || Session::open(hub, &identity(paths)?, directory, limit, ahead);
        let session = store.is_none().then(open).transpose()?;
        Ok(Self { session, store })
    }

    /// Where releases come from.
    pub fn releases(&mut self) -> Result<&mut dyn Place> {
        match (&mut self.store, &mut self.session) {
            (Some(store), _) => Ok(store),
            (None, Some(session)) => Ok(session),
            (None, None) => Err(Error::new("Failed to reach a hub: there is none")),
        }
    }

    /// Where reports go, if that is there now.
    pub fn reports(&mut self, hub: &Hub) -> Option<&mut dyn Place> {
        match (&mut self.store, &mut self.session) {
            (_, Some(session)) => Some(session),
            (Some(store), None) if hub.servers.is_empty() => Some(store),
            _ => None,
        }
    }

    /// Ends it.
    pub fn close(self) -> Result<()> {
        self.session.map_or(Ok(()), Session::close)
    }
}

fn store(paths: &Paths, hub: &Hub, kept: PathBuf, limit: Duration) -> Option<Store> {
    let netrc = Some(credential(paths, "netrc")).filter(|file| file.exists());
    Store::of(hub, netrc, kept, limit)
}

/// systemd's copy of a secret of this host's, which only the instance's user can read.
fn credential(paths: &Paths, name: &str) -> PathBuf {
    let own = std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from);
    // what root has this ask for a run has none of its own
    let of = |unit: &str| PathBuf::from(format!("/run/credentials/ekiben-{unit}.service"));
    own.unwrap_or_else(|| Some(of(paths.name())).filter(|run| run.exists()).unwrap_or_else(|| of("boot"))).join(name)
}

/// The private key. Fails if it is as in module.nix where there is none to copy.
fn identity(paths: &Paths) -> Result<PathBuf> {
    let path = credential(paths, "identity");
    if fs::read(&path).is_ok_and(|key| key.trim_ascii().is_empty()) {
        return Err(Error::new(
            "Failed to read the private key of this host: the file of `services.ekiben.fleet.identityFile` is missing or empty",
        ));
    }
    Ok(path)
}

/// A directory for files that nobody needs later; whatever is in its way is not.
pub fn scratch(paths: &Paths) -> Result<Temporary> {
    let place = paths.own("fetched");
    Temporary::below(&place).or_else(|error| {
        log::warn!("{error}; removing {}.", place.display());
        files::clear(&place).doing("remove", &place).and_then(|()| Temporary::below(&place))
    })
}
