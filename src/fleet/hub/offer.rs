//! Files that the hub has for single hosts, such as secrets: put where the host can fetch them, and
//! nobody else can read them.
//!
//! A file is served under the name of its contents, so an index is right for as long as what it names
//! is there: a host that finds something gone has an old index, and asks again.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::config::{Offer, Offers};
use crate::error::{Context, Error, OrLog, Result};
use crate::files;
use crate::fleet::hub::served::hosts_in;
use crate::fleet::{KNOWN, REMOVED, SMALL, Served, sha256};
use crate::names::{FilePath, HostName};
use crate::run::hold::moment;
use crate::system::now;

const INDEX: &str = "index.json";
/// For the host's group, which the directory hands on.
const MODE: u32 = 0o640;
/// For how long there is a way back for a host that was removed, in seconds.
const GRACE: u64 = 30 * 24 * 60 * 60;
/// Where systemd-tmpfiles removes what lies there.
const ASIDE: &str = ".removed";

/// Serves to each host what it is to have; trouble with one does not keep the others waiting.
pub fn serve(hub: &Offers) -> Result<()> {
    let hosts = hub.directory.join("hosts");
    let mut failed = 0;
    let mut one = |host: &str, wanted: &BTreeMap<FilePath, Offer>| {
        failed += usize::from(serve_host(&hosts, host, wanted).or_error().is_none());
    };
    for (host, wanted) in &hub.files {
        one(host, wanted);
    }
    // hosts that are gone leave nothing secret behind
    for host in hosts_in(&hosts)?.iter().filter(|host| !hub.files.contains_key(host) && hosts.join(host).join("files").is_dir()) {
        one(host, &BTreeMap::new());
    }
    files::put_json(&hosts.join(KNOWN), &hub.files.keys().collect::<Vec<_>>(), 0o644)?;
    put_aside(&hosts, |host| hub.files.contains_key(host), now())?;
    if failed == 0 { Ok(()) } else { Err(Error::new(format!("Failed to serve files to {failed} hosts"))) }
}

fn serve_host(hosts: &Path, host: &str, wanted: &BTreeMap<FilePath, Offer>) -> Result<()> {
    let directory = hosts.join(host).join("files");
    let mut index = Vec::new();
    for (path, Offer { source, mode, owner, group }) in wanted {
        let doing = || format!("serve {} to {host}", source.display());
        // what manages secrets makes links
        let contents = files::read_for_others(source, SMALL).context(doing)?;
        let sha256 = sha256::of(&contents)?;
        files::put(&directory.join(&sha256), &contents, MODE)?;
        let (path, mode, owner, group) = (path.clone(), *mode, owner.clone(), group.clone());
        index.push(Served { path, mode, owner, group, file: sha256.clone(), sha256 });
    }
    files::put_json(&directory.join(INDEX), &index, MODE)?;
    files::clean(&directory, |path| path.ends_with(INDEX) || index.iter().any(|served| path.ends_with(&served.file)))
}

/// Puts aside the directories of hosts that have had no key for [`GRACE`], and writes down when it will be that for others.
fn put_aside(hosts: &Path, is_known: impl Fn(&HostName) -> bool, now: u64) -> Result<()> {
    let before: BTreeMap<String, u64> = files::read_json(&hosts.join(REMOVED)).ok().flatten().unwrap_or_default();
    let mut removed = BTreeMap::new();
    for host in hosts_in(hosts)?.into_iter().filter(|host| !is_known(host)) {
        let when = before.get(&*host).map_or(now + GRACE, |when| *when.min(&(now + GRACE)));
        if when <= now {
            let (place, aside) = (hosts.join(&host), hosts.join(ASIDE).join(format!("{host}.{now}")));
            fs::rename(&place, aside).doing("remove", &place)?;
            log::info!("Removed {}.", place.display());
            continue;
        }
        if !before.contains_key(&*host) {
            log::info!("{host} has no key any more; what there is of it is removed on {}.", moment(when));
        }
        removed.insert(host.to_string(), when);
    }
    files::put_json(&hosts.join(REMOVED), &removed, 0o644)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Directory;

    fn serve_text(directory: &Path, files: &str) -> Result<()> {
        serve(&serde_json::from_str(&format!(r#"{{"directory": "{}", "files": {files}}}"#, directory.display())).unwrap())
    }

    fn source(directory: &Path, name: &str) -> String {
        format!(r#"{{"source": "{}/{name}", "mode": "0400", "owner": "root", "group": "wheel"}}"#, directory.display())
    }

    #[test]
    fn what_there_is_of_a_host_is_removed_after_a_while_unless_it_comes_back() {
        let scratch = Directory::new();
        let hosts = scratch.path();
        for place in ["a/release", "b", ASIDE] {
            fs::create_dir_all(hosts.join(place)).unwrap();
        }
        fs::write(hosts.join("file"), "").unwrap();
        let at = |known: &str, now| put_aside(hosts, |host| known.contains(&**host), now).unwrap();
        let removed = || fs::read_to_string(hosts.join(REMOVED)).unwrap();
        at("ab", 1000);
        assert_eq!(removed(), "{}");
        at("b", 1000);
        at("b", 1000 + GRACE - 1);
        assert_eq!(removed(), format!("{{\n  \"a\": {}\n}}", 1000 + GRACE));
        // it is there again
        at("ab", 1000 + GRACE);
        at("b", 5000 + GRACE);
        assert!(hosts.join("a/release").is_dir());
        // by a clock that was ahead, and by nobody
        for odd in [format!("{{\"a\":{}}}", u64::MAX), "x".into()] {
            fs::write(hosts.join(REMOVED), odd).unwrap();
            at("b", 1000);
            assert_eq!(removed(), format!("{{\n  \"a\": {}\n}}", 1000 + GRACE));
        }
        at("b", 1000 + GRACE);
        assert!(!hosts.join("a").exists() && hosts.join("b").exists() && hosts.join("file").exists());
        assert_eq!((removed(), fs::read_dir(hosts.join(ASIDE)).unwrap().count()), ("{}".into(), 1));
    }

    fn index(directory: &Path, host: &str) -> Vec<Served> {
        crate::json::parse(&fs::read(directory.join("hosts").join(host).join("files/index.json")).unwrap()).unwrap()
    }

    #[test]
    fn a_host_is_served_what_is_said_and_nothing_else() {
        let scratch = Directory::new();
        let directory = scratch.path();
        for host in ["a", "b", "gone"] {
            fs::create_dir_all(directory.join(format!("hosts/{host}/files"))).unwrap();
        }
        fs::write(directory.join("hosts/gone/files/secret"), "old").unwrap();
        fs::write(directory.join("one"), "1").unwrap();
        std::os::unix::fs::symlink(directory.join("one"), directory.join("link")).unwrap();
        let (one, link) = (source(directory, "one"), source(directory, "link"));

        serve_text(directory, &format!(r#"{{"a": {{"/x": {one}, "/y": {link}}}, "b": {{}}}}"#)).unwrap();
        let first = index(directory, "a");
        assert_eq!(first.iter().map(|served| &*served.path).collect::<Vec<_>>(), ["/x", "/y"]);
        assert_eq!(*first[0].sha256, *"6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b");
        assert_eq!(fs::read_to_string(directory.join("hosts/a/files").join(&first[0].file)).unwrap(), "1");
        assert!(index(directory, "b").is_empty() && index(directory, "gone").is_empty());
        assert!(!directory.join("hosts/gone/files/secret").exists());
        assert_eq!(fs::read_to_string(directory.join("hosts/known.json")).unwrap(), "[\n  \"a\",\n  \"b\"\n]");

        // a source that is not there: all stays as it was, and the other host is served
        fs::write(directory.join("two"), "2").unwrap();
        let (missing, two) = (source(directory, "none"), source(directory, "two"));
        serve_text(directory, &format!(r#"{{"a": {{"/x": {two}, "/z": {missing}}}, "b": {{"/x": {two}}}}}"#)).unwrap_err();
        assert_eq!(index(directory, "a"), first);
        assert_eq!(fs::read_to_string(directory.join("hosts/a/files").join(&first[0].file)).unwrap(), "1");
        assert_eq!(index(directory, "b").len(), 1);

        serve_text(directory, &format!(r#"{{"a": {{"/x": {two}}}, "b": {{}}}}"#)).unwrap();
        assert_eq!(fs::read_dir(directory.join("hosts/a/files")).unwrap().count(), 2);
        assert_ne!(index(directory, "a")[0].sha256, first[0].sha256);
    }
}
