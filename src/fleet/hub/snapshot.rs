//! What a publisher elsewhere has to know of all hosts, in one file: the hub writes it whenever it collects, so that nobody
//! has to ask for each host.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::error::{Context, OrLog, Result};
use crate::fleet::hub::memory::Memory;
use crate::fleet::{HEARTBEAT, LARGE, MANIFEST, SMALL, Signed};
use crate::names::HostName;
use crate::system::{now, seconds};
use crate::text::span;
use crate::{files, json};

/// What it is called, among what was collected: no host is called that.
pub const FILE: &str = "all.json";
/// Since when hosts can be heard again, beside it.
const RETURN: &str = "return.json";
/// After how long it says nothing any more: the hub does not collect, or is of a version that does not write it.
const LATE: Duration = Duration::from_secs(600);

/// What there is of a host: the texts of files, and when the latter arrived, in seconds since 1970.
#[derive(Deserialize, Serialize)]
struct KnownHost {
    manifest: Option<String>,
    heartbeat: Option<String>,
    arrived: u64,
}

/// Notes that the hub is back, if it has collected nothing for long: who was silent meanwhile may have spoken to nobody.
pub fn note_return(collected: &Path) -> Result<()> {
    let is_back = files::age(&collected.join(FILE)).is_ok_and(|age| age >= LATE);
    if is_back { files::write_json(&collected.join(RETURN), &now(), 0o644) } else { Ok(()) }
}

/// Since when hosts can be heard without a gap, in seconds since 1970; 0 if since ever.
pub fn hears_since(collected: &Path) -> u64 {
    files::read_json(&collected.join(RETURN)).or_warn().flatten().unwrap_or_default()
}

/// What there is to say of all hosts, if the hub has collected nothing for long.
pub fn stands_still(collected: &Path) -> Option<String> {
    let age = files::age(&collected.join(FILE)).ok().filter(|age| *age >= LATE)?;
    let what = "what hosts have said since is not known; run ekiben status on the hub";
    Some(format!("the hub has collected nothing for {}: {what}", span(age.as_secs())))
}

/// Writes it among what was collected, of hosts whose manifest and heartbeat are in these directories.
pub fn keep(collected: &Path, hosts: impl Iterator<Item = (HostName, PathBuf, PathBuf)>) -> Result<()> {
    let text = |path: &Path| files::read_foreign(path, SMALL).ok().and_then(|text| String::from_utf8(text).ok());
    let mut all = BTreeMap::new();
    for (host, release, received) in hosts {
        let (manifest, heartbeat) = (release.join(MANIFEST), received.join(HEARTBEAT));
        let arrived = heartbeat.metadata().and_then(|metadata| metadata.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
        all.insert(host, KnownHost { manifest: text(&manifest), heartbeat: text(&heartbeat), arrived: seconds(arrived) });
    }
    let path = collected.join(FILE);
    files::put_json(&path, &all, 0o644)?;
    // that nothing has changed is news, too
    let file = File::options().append(true).open(&path);
    file.and_then(|file| file.set_modified(SystemTime::now())).doing("write", &path)
}

/// Puts what the hub has told by that file into `place`, in the hub's paths. Returns which hosts that is all of: not one for
/// which this publisher has published something since.
pub fn lay_out(file: &Path, place: &Path, memory: &Memory) -> io::Result<BTreeSet<HostName>> {
    let mut known = BTreeSet::new();
    let age = files::age(file)?;
    let text = files::read_foreign(file, LARGE)?;
    // what another version writes there says nothing either
    let Some(all) = json::parse::<BTreeMap<HostName, KnownHost>>(&text).ok().filter(|_| age < LATE) else { return Ok(known) };
    for (host, KnownHost { manifest, heartbeat, arrived }) in all {
        let number = |text: &String| {
            let signed: Signed = json::parse(text.as_bytes()).ok()?;
            signed.read().ok().map(|manifest| manifest.release.sequence)
        };
        if memory.last(&host) > manifest.as_ref().and_then(number) {
            continue;
        }
        let arrived = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(arrived)).unwrap_or(SystemTime::UNIX_EPOCH);
        for (directory, name, text) in
            [(format!("hosts/{host}/release"), MANIFEST, manifest), (format!("received/{host}"), HEARTBEAT, heartbeat)]
        {
            let directory = place.join(directory);
            fs::create_dir_all(&directory)?;
            let path = directory.join(name);
            files::remove(&path)?;
            if let Some(text) = text {
                fs::write(&path, text)?;
                File::options().append(true).open(&path)?.set_modified(arrived)?;
            }
        }
        known.insert(host);
    }
    Ok(known)
}
