//! Files that the hub has for single hosts, such as secrets: put where the host can fetch them, and
//! nobody else can read them.
//!
//! A file is served under the name of its contents, so an index is right for as long as what it names
//! is there: a host that finds something gone has an old index, and asks again.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::config::{Offer, Offers};
use crate::error::{Context, Error, Result};
use crate::files;
use crate::fleet::{KNOWN, SMALL, Served, sha256};
use crate::names::FilePath;

const INDEX: &str = "index.json";
/// For the host's group, which the directory hands on.
const MODE: u32 = 0o640;

/// Serves to each host what it is to have; trouble with one does not keep the others waiting.
pub fn serve(hub: &Offers) -> Result<()> {
    let hosts = hub.directory.join("hosts");
    let mut failed = 0;
    let mut one = |host: &str, wanted: &BTreeMap<FilePath, Offer>| {
        if let Err(error) = serve_host(&hosts, host, wanted) {
            log::error!("{error}.");
            failed += 1;
        }
    };
    for (host, wanted) in &hub.files {
        one(host, wanted);
    }
    // hosts that are gone leave nothing secret behind
    for entry in fs::read_dir(&hosts).context(|| format!("read {}", hosts.display()))?.flatten() {
        let host = entry.file_name().to_string_lossy().into_owned();
        if hub.files.keys().all(|known| **known != *host) && entry.path().join("files").is_dir() {
            one(&host, &BTreeMap::new());
        }
    }
    let known = serde_json::to_vec(&hub.files.keys().collect::<Vec<_>>()).context(|| format!("write {KNOWN}"))?;
    put(&hosts.join(KNOWN), &known, 0o644)?;
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
        put(&directory.join(&sha256), &contents, MODE)?;
        let (path, mode, owner, group) = (path.clone(), *mode, owner.clone(), group.clone());
        index.push(Served { path, mode, owner, group, file: sha256.clone(), sha256 });
    }
    let text = serde_json::to_vec_pretty(&index).context(|| "write an index".into())?;
    put(&directory.join(INDEX), &text, MODE)?;
    for entry in fs::read_dir(&directory).context(|| format!("read {}", directory.display()))?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name != INDEX && index.iter().all(|served| *served.file != *name) {
            files::remove(&entry.path()).context(|| format!("remove {}", entry.path().display()))?;
        }
    }
    Ok(())
}

/// Writes a file, unless it is there as it should be.
fn put(path: &Path, contents: &[u8], mode: u32) -> Result<()> {
    if fs::read(path).is_ok_and(|there| there == contents) {
        return Ok(());
    }
    files::write(path, contents, mode).context(|| format!("write {}", path.display()))
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

    fn index(directory: &Path, host: &str) -> Vec<Served> {
        serde_json::from_slice(&fs::read(directory.join("hosts").join(host).join("files/index.json")).unwrap()).unwrap()
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
        assert_eq!(fs::read_to_string(directory.join("hosts/known.json")).unwrap(), r#"["a","b"]"#);

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
