//! What a publisher remembers of a hub: the number that it published last for each host, and the release that it has
//! found to be its own. A hub that offers a lower number was restored from a backup, or withholds releases.

use std::path::{Path, PathBuf};

use crate::error::{Context, OrLog, Result};
use crate::files;
use crate::fleet::Signed;
use crate::fleet::archive::pack::identity;
use crate::fleet::temporary::home;
use crate::names::{HostName, Sequence};
use crate::run::Release;

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
        files::read_json(&self.0.as_ref()?.join(host)).or_warn().flatten()
    }

    /// Remembers a number that was published.
    pub fn note(&self, host: &HostName, number: Sequence) -> Result<()> {
        let Some(place) = &self.0 else { return Ok(()) };
        std::fs::create_dir_all(place).doing("create", place)?;
        files::write_json(&place.join(host), &number, 0o644)
    }

    /// Remembers the number of a release of this publisher's that the hub offers, since it has begun a wave; where none is known,
    /// only if it `is_current`, as would be published now: that may be renewed, and an old one may not.
    pub fn go_on(&self, host: &HostName, offered: Option<&Release>, is_current: bool) {
        let last = self.last(host);
        let number = offered.map(|release| release.sequence).filter(|number| last.map_or(is_current, |last| last < *number));
        number.and_then(|number| self.note(host, number).or_warn());
    }

    /// Whether a release that the hub offers is, to the letter, the one that was found to be signed with this key last.
    pub fn vouches(&self, host: &HostName, release: &Signed, key: Option<&Path>) -> bool {
        self.proof(host).is_some_and(|proof| std::fs::read_to_string(proof).is_ok_and(|text| text == Self::vouching(release, key)))
    }

    /// Remembers that it is.
    pub fn vouch(&self, host: &HostName, release: &Signed, key: Option<&Path>) -> Result<()> {
        // of a hub to which this publisher has published something
        let Some(proof) = self.proof(host).filter(|proof| proof.parent().is_some_and(Path::is_dir)) else { return Ok(()) };
        // a part of it is as good as none
        std::fs::write(&proof, Self::vouching(release, key)).doing("write", &proof)
    }

    fn proof(&self, host: &HostName) -> Option<PathBuf> {
        // no host has that in its name
        self.0.as_ref().map(|place| place.join(format!("{host}.signed")))
    }

    /// The same key as long as nobody has touched its file.
    fn vouching(release: &Signed, key: Option<&Path>) -> String {
        let key = key.map(|key| key.metadata().map_or(String::new(), |metadata| identity(&metadata)));
        format!("{key:?}\n{:?}\n{}", release.signature, release.manifest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Directory;

    #[test]
    fn only_what_was_found_to_be_ours_is_vouched_for() {
        let place = Directory::new();
        let (memory, host) = (Memory(Some(place.path().join("hub"))), HostName::try_from("web").unwrap());
        let keys = [place.path().join("key"), place.path().join("other")];
        for key in &keys {
            std::fs::write(key, "x").unwrap();
        }
        let release =
            |manifest: &str, signature: Option<&str>| Signed { manifest: manifest.into(), signature: signature.map(String::from) };
        let ours = release("a", Some("b"));
        assert!(!memory.vouches(&host, &ours, Some(&keys[0])));
        memory.note(&host, Sequence::try_from(1).unwrap()).unwrap();
        memory.vouch(&host, &ours, Some(&keys[0])).unwrap();
        assert!(memory.vouches(&host, &ours, Some(&keys[0])));
        for (release, key) in [
            (release("c", Some("b")), Some(&keys[0])),
            (release("a", Some("c")), Some(&keys[0])),
            (release("a", None), Some(&keys[0])),
            (release("a", Some("b")), Some(&keys[1])),
            (release("a", Some("b")), None),
        ] {
            assert!(!memory.vouches(&host, &release, key.map(PathBuf::as_path)));
        }
        std::fs::write(&keys[0], "yy").unwrap();
        assert!(!memory.vouches(&host, &ours, Some(&keys[0])));
        assert!(!Memory::default().vouches(&host, &ours, None));
    }
}
