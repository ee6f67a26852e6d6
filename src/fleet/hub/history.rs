//! The audit log: what has been published for each host, as the hub has seen it. It is where publishers from elsewhere
//! cannot write, a line for each manifest.

use std::cmp::Reverse;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use ::nix::fcntl::FlockArg;
use serde::{Deserialize, Serialize};

use crate::error::{Context, Result};
use crate::fleet::hub::plan::Plan;
use crate::fleet::hub::served::ServedDirectory;
use crate::fleet::{LARGE, Manifest, Signed};
use crate::gather::sorted;
use crate::names::{HostName, Sequence};
use crate::system::now;
use crate::text::ago;
use crate::{files, json, table};

/// How many releases of one host are noted, and of how many the archives stay.
const KEPT: usize = 1000;
const ARCHIVES: usize = 5;
/// The name of the file, among what was collected of a host.
pub const FILE: &str = "history";

/// When a manifest that changes again has another time.
const SETTLED: Duration = Duration::from_secs(60);

/// A release that was published.
#[derive(Clone, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Noted {
    /// When the hub has seen it first, in seconds since 1970.
    seen: u64,
    pub manifest: Manifest,
    /// By whom it was published, line by line; unknown of what an earlier version has noted.
    signature: Option<Vec<String>>,
}

impl Noted {
    /// The same as it was published.
    pub fn signed(&self) -> Result<Signed> {
        let manifest = serde_json::to_string(&self.manifest).context(|| format!("write the manifest of {}", self.manifest.host))?;
        Ok(Signed { manifest, signature: self.signature.as_ref().map(|lines| lines.join("\n") + "\n") })
    }
}

/// The file of a host.
pub fn file(hub: &ServedDirectory, host: &HostName) -> PathBuf {
    hub.received(host).join(FILE)
}

/// Adds what is published for a host, if that is new, and removes what is too old to be published again; whoever does so has
/// the host's turn. `plan` is what is rolled out; `others` may be about to publish at the same time.
pub fn note(hub: &ServedDirectory, host: &HostName, plan: Option<&Plan>, others: bool) -> Result<()> {
    let file = file(hub, host);
    let Some(changed) = hub.changed(host)? else { return Ok(()) };
    let age = SystemTime::now().duration_since(changed).unwrap_or_default();
    // whoever publishes cannot choose that time, but may publish twice within one tick
    if age > SETTLED && fs::metadata(&file).and_then(|metadata| metadata.modified()).is_ok_and(|noted| noted == changed) {
        return Ok(());
    }
    let Some(Ok((manifest, signed))) = hub.manifest(host)? else { return Ok(()) };
    let text = text(&file)?;
    let mut kept = parse(&text);
    if kept.last().is_none_or(|last| last.manifest != manifest) {
        let noted = Noted { seen: now(), manifest, signature: signed.signature.map(|text| text.lines().map(String::from).collect()) };
        let line = serde_json::to_vec(&noted).doing("write", &file)?;
        // what is damaged, or of a newer version, stays
        let lines: Vec<_> = text.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()).chain([&*line]).collect();
        // nor more than can be read again, however much was signed
        let mut room = LARGE;
        let fits = |line: &&&[u8]| room.checked_sub(line.len() as u64 + 1).map(|left| room = left).is_some();
        let count = lines.iter().rev().take(KEPT).take_while(fits).count();
        let contents = lines[lines.len() - count..].join(&b'\n');
        files::write(&file, &[&contents[..], b"\n"].concat(), 0o644).doing("write", &file)?;
        kept.push(noted);
    }
    let mut archives = Vec::new();
    for id in kept.iter().rev().map(|noted| &noted.manifest.release.id) {
        if archives.len() < ARCHIVES && !archives.contains(id) {
            archives.push(id.clone());
        }
    }
    archives.extend(plan.and_then(|plan| plan.get(host)).map(|member| member.release.id.clone()));
    hub.tidy(host, &archives, others)?;
    File::options().append(true).open(&file).and_then(|file| file.set_modified(changed)).doing("write", &file)
}

/// The same, when it is its turn; the hub does so, and nobody else.
pub fn note_in_turn(hub: &ServedDirectory, host: &HostName, plan: Option<&Plan>) -> Result<()> {
    if hub.check_ours().is_err() {
        return Ok(());
    }
    let received = hub.received(host);
    fs::create_dir_all(&received).doing("create", &received)?;
    let _turn = files::lock(&received, FlockArg::LockExclusive)?;
    note(hub, host, plan, false)
}

/// The release of a host that had this number, as it was published last.
pub fn find(hub: &ServedDirectory, host: &HostName, number: Sequence) -> Result<Option<Noted>> {
    Ok(read(&file(hub, host))?.into_iter().rfind(|noted| noted.manifest.release.sequence == number))
}

/// The releases of a host, the newest last.
fn read(file: &Path) -> Result<Vec<Noted>> {
    text(file).map(|text| parse(&text))
}

fn text(file: &Path) -> Result<Vec<u8>> {
    files::if_there(files::read_foreign(file, LARGE)).doing("read", file).map(Option::unwrap_or_default)
}

fn parse(text: &[u8]) -> Vec<Noted> {
    // what is damaged hides no other
    text.split(|&byte| byte == b'\n').filter_map(|line| json::parse_foreign(line).ok()).collect()
}

/// The releases of these hosts, the newest first.
pub fn of(hub: &ServedDirectory, hosts: &[HostName]) -> Result<Vec<Noted>> {
    let mut all = Vec::new();
    for host in hosts {
        all.extend(read(&file(hub, host))?);
    }
    let order = sorted(all.iter().enumerate().map(|(place, one)| (Reverse((one.seen, one.manifest.release.sequence)), place)));
    Ok(order.into_iter().filter_map(|(_, place)| all.get(place).cloned()).collect())
}

/// A line for each.
pub fn lines(all: &[Noted]) -> String {
    let mut rows = vec![["PUBLISHED", "HOST", "RELEASE", "COMMIT", "SUMMARY"].map(String::from)];
    rows.extend(all.iter().map(|Noted { seen, manifest, .. }| {
        let origin = &manifest.origin;
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        let by = [text(&origin.summary), text(&origin.author)].join(" - ");
        let by = if origin.commit.is_some() { by } else { String::new() };
        [ago(*seen, now()), manifest.host.to_string(), manifest.release.sequence.to_string(), origin.short(), by]
    }));
    table::lines(&rows).join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Directory;
    use serde_json::{Value, json};

    #[test]
    fn each_release_is_noted_once_and_what_is_damaged_hides_no_other() {
        let place = Directory::new();
        let hub = ServedDirectory::new(place.path()).unwrap();
        let host = HostName::try_from("web").unwrap();
        fs::create_dir_all(hub.release(&host)).unwrap();
        fs::create_dir_all(hub.received(&host)).unwrap();
        let publish = |number: u64, more: Value| {
            let mut manifest = json!({
                "format": 1, "host": "web", "id": "a".repeat(64), "sequence": number, "sha256": "b".repeat(64), "size": 1, "attr": null,
                "toplevel": null, "published": 1, "author": "\u{1b}[31mx",
            });
            manifest.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            let signed = json!({"manifest": manifest.to_string(), "signature": null});
            fs::write(hub.release(&host).join("manifest.json"), signed.to_string()).unwrap();
            note(&hub, &host, None, true).unwrap();
        };
        let numbers = || {
            of(&hub, std::slice::from_ref(&host)).unwrap().iter().map(|one| u64::from(one.manifest.release.sequence)).collect::<Vec<_>>()
        };
        publish(1, json!({"commit": "c".repeat(40), "summary": "first"}));
        publish(1, json!({"commit": "c".repeat(40), "summary": "first"}));
        assert_eq!(numbers(), [1]);
        // what is no release for the host is none; the same again is another
        publish(2, json!({"host": "db"}));
        publish(2, json!({"expires": 5}));
        publish(2, json!({"expires": 6}));
        assert_eq!(numbers(), [2, 2, 1]);
        let damaged = fs::read_to_string(file(&hub, &host)).unwrap().replacen('{', "", 1);
        fs::write(file(&hub, &host), damaged).unwrap();
        assert_eq!(numbers(), [2, 2]);
        publish(3, json!({}));
        assert_eq!(numbers(), [3, 2, 2]);
        let shorter = fs::read_to_string(file(&hub, &host)).unwrap();
        assert_eq!(shorter.lines().count(), 4, "what is damaged stays");
        // what fills it up keeps nothing from being noted
        fs::write(file(&hub, &host), ("x".repeat(1024 * 1024 - 1) + "\n").repeat(64)).unwrap();
        publish(3, json!({}));
        assert_eq!(numbers(), [3]);
        fs::write(file(&hub, &host), shorter).unwrap();
        // at a time of the hub's, and not of the publisher's choice
        let manifest = hub.release(&host).join("manifest.json");
        let text = fs::read_to_string(&manifest).unwrap().replace(r#"\"sequence\":3"#, r#"\"sequence\":4"#);
        let old = fs::metadata(&manifest).unwrap().modified().unwrap();
        fs::write(&manifest, text).unwrap();
        File::options().append(true).open(&manifest).unwrap().set_modified(old).unwrap();
        note(&hub, &host, None, true).unwrap();
        assert_eq!(numbers(), [4, 3, 2, 2]);
        let shown = lines(&of(&hub, std::slice::from_ref(&host)).unwrap());
        assert!(!shown.contains('\u{1b}') && shown.lines().count() == 5, "{shown}");
    }
}
