//! What a publisher remembers of a hub: the number that it published last for each host. A hub that offers a lower one
//! was restored from a backup, or withholds releases.

use std::path::{Path, PathBuf};

use crate::error::{Context, Result};
use crate::files;
use crate::fleet::temporary::home;
use crate::names::{HostName, Sequence};

/// The numbers of one hub, a file for each host; none where nothing is remembered.
#[derive(Default)]
pub struct Memory(Option<PathBuf>);

impl Memory {
    /// That of the hub with this directory; of nothing, for who has no home.
    pub fn new(hub: &Path) -> Self {
        let name = hub.to_string_lossy().replace('%', "%25").replace('/', "%2f");
        Self(home("XDG_STATE_HOME", ".local/state").ok().map(|state| state.join("published").join(name)))
    }

    /// The number that was published last for a host.
    pub fn last(&self, host: &HostName) -> Option<Sequence> {
        let read = |place: &PathBuf| files::read_json(&place.join(host)).inspect_err(|error| log::warn!("{error}."));
        self.0.as_ref().and_then(|place| read(place).ok().flatten())
    }

    /// Remembers a number that was published.
    pub fn note(&self, host: &HostName, number: Sequence) -> Result<()> {
        let Some(place) = &self.0 else { return Ok(()) };
        std::fs::create_dir_all(place).context(|| format!("create {}", place.display()))?;
        files::write_json(&place.join(host), &number, 0o644)
    }
}
