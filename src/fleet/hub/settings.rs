//! `fleet.json`, at the top of the fleet's repository.

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::geteuid;
use serde::{Deserialize, Serialize};

use crate::config::Wave;
use crate::error::{Context, Result};
use crate::fleet::SMALL;
use crate::fleet::hub::served;
use crate::names::HostName;
use crate::{files, json};

/// `fleet.json`.
#[derive(Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Settings {
    /// What the hub serves; here, or `sftp://` where.
    pub directory: PathBuf,
    /// The private key to sign releases with.
    pub signing_key: Option<PathBuf>,
    /// After how many seconds without a heartbeat a host is silent.
    pub silent_after: u64,
    /// The same for single hosts, by their names.
    pub silent_after_of: BTreeMap<HostName, u64>,
    /// Hosts under one name, which stands for them behind an `@`.
    pub groups: BTreeMap<HostName, Vec<HostName>>,
    /// Which hosts get releases first, and which later, by `deploy --waves`.
    pub waves: Vec<Wave>,
    /// For how many seconds a release counts as new.
    pub expires_after: Option<u64>,
    /// More arguments for `nix eval` and `nix build`.
    pub flags: Vec<String>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            directory: "/var/lib/ekiben-hub".into(),
            signing_key: None,
            silent_after: 3600,
            silent_after_of: BTreeMap::new(),
            groups: BTreeMap::new(),
            waves: Vec::new(),
            expires_after: Some(30 * 24 * 60 * 60),
            flags: Vec::new(),
        }
    }
}

impl Settings {
    /// Reads the settings of the repository in this directory, which say what is run and what is signed:
    /// they have to be this user's own, as the directory that they are in.
    pub fn read(repository: &Path) -> Result<Self> {
        let path = repository.join("fleet.json");
        let file = File::open(&path).doing("read", &path)?;
        check_owner(&path, &file.metadata().doing("read", &path)?)?;
        check_owner(repository, &fs::metadata(repository).doing("read", &path)?)?;
        let text = io::read_to_string(file.take(SMALL)).doing("read", &path)?;
        let mut settings: Self = json::parse(text.as_bytes()).doing("read", &path)?;
        if !settings.directory.is_absolute() && !served::leads_elsewhere(&settings.directory) {
            return Err(format!("directory: expected an absolute path or sftp://..., found {:?}", settings.directory)).doing("read", &path);
        }
        // of several who publish, each has a key of their own
        settings.signing_key = settings.signing_key.map(|key| match (key.strip_prefix("~"), std::env::var_os("HOME")) {
            (Ok(below), Some(home)) => PathBuf::from(home).join(below),
            _ => repository.join(key),
        });
        Ok(settings)
    }

    /// The same words, with the hosts of a group in the place of its name.
    pub fn expand<'a>(&'a self, words: &[&'a str]) -> Result<Vec<&'a str>> {
        let mut expanded = Vec::new();
        for &word in words {
            let Some(name) = word.strip_prefix('@') else {
                expanded.push(word);
                continue;
            };
            let doing = || format!("find group {name:?}");
            let known: Vec<_> = self.groups.keys().map(|name| &**name).collect();
            let known = if known.is_empty() { "no group".into() } else { known.join(", ") };
            match self.groups.iter().find(|(group, _)| ***group == *name) {
                // without a host, all would be meant
                Some((_, hosts)) if hosts.is_empty() => return Err("fleet.json has no host in it").context(doing),
                Some((_, hosts)) => expanded.extend(hosts.iter().map(|host| &**host)),
                None => return Err(format!("fleet.json has {known}")).context(doing),
            }
        }
        Ok(expanded)
    }

    /// How long a host may be silent.
    pub fn silence(&self, host: &HostName) -> Duration {
        Duration::from_secs(self.silent_after_of.get(host).copied().unwrap_or(self.silent_after))
    }
}

/// Fails unless a file or a directory is this user's, or root's, and not everybody's to change.
fn check_owner(path: &Path, metadata: &Metadata) -> Result<()> {
    let (owner, user) = (metadata.uid(), geteuid().as_raw());
    let why = if ![user, 0].contains(&owner) {
        let (owner, user) = (files::user_name(owner), files::user_name(user));
        format!("owned by {owner}, not by {user}; run this as {owner}, change the owner, or use --repository")
    } else if metadata.mode() & 0o002 != 0 {
        "world-writable; remove the permission with chmod o-w".into()
    } else {
        return Ok(());
    };
    Err(why).doing("trust", path)
}

/// The repository that `directory` is in.
pub fn find(directory: &Path) -> Option<&Path> {
    directory.ancestors().find(|place| place.join("fleet.json").exists())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Directory;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn settings_are_checked() {
        let place = Directory::new();
        let read = |text: &str| {
            fs::write(place.path().join("fleet.json"), text).unwrap();
            Settings::read(place.path())
        };
        let settings = read("{}").unwrap();
        assert_eq!((settings.directory, settings.signing_key, settings.silent_after), ("/var/lib/ekiben-hub".into(), None, 3600));
        assert_eq!(read(r#"{"signingKey": "key"}"#).unwrap().signing_key, Some(place.path().join("key")));
        let home = PathBuf::from(std::env::var_os("HOME").unwrap());
        assert_eq!(read(r#"{"signingKey": "~/.ssh/key"}"#).unwrap().signing_key, Some(home.join(".ssh/key")));
        for (text, error) in [
            (r#"{"silentafter": 1}"#, "silentafter: unknown field"),
            (r#"{"silentAfter": -1}"#, "silentAfter: invalid value"),
            (r#"{"flags": "-L"}"#, "flags: invalid type"),
            (r#"{"directory": "served"}"#, "directory: expected an absolute path or sftp://..., found \"served\""),
        ] {
            let said = read(text).unwrap_err().to_string();
            assert!(said.contains("fleet.json: ") && said.contains(error), "{said}");
        }
        let groups = read(r#"{"groups": {"servers": ["web", "db"], "none": []}}"#).unwrap();
        assert_eq!(groups.expand(&["deploy", "@servers", "desk"]).unwrap(), ["deploy", "web", "db", "desk"]);
        for (group, why) in
            [("@none", "no host in it"), ("@laptops", "fleet.json has none, servers"), ("@", "fleet.json has none, servers")]
        {
            assert!(groups.expand(&[group]).unwrap_err().to_string().contains(why), "{group}");
        }
        assert!(Settings::default().expand(&["@x"]).unwrap_err().to_string().ends_with("fleet.json has no group"));
        assert!(read(r#"{"groups": {"all": ["../web"]}}"#).is_err());
        // everybody's is nobody's
        for path in [place.path().to_owned(), place.path().join("fleet.json")] {
            let before = fs::metadata(&path).unwrap().permissions();
            fs::set_permissions(&path, PermissionsExt::from_mode(0o777)).unwrap();
            assert!(Settings::read(place.path()).unwrap_err().to_string().contains("world-writable"));
            fs::set_permissions(&path, before).unwrap();
        }
        fs::create_dir_all(place.path().join("hosts/web")).unwrap();
        assert_eq!(find(&place.path().join("hosts/web")), Some(place.path()));
    }
}
