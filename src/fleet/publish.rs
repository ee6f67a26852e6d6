//! Releases: built first, then published in one step.
//!
//! A manifest that can be read is complete, and its archive is there: the archive is on disk before
//! the manifest is, and the one of the release before stays for hosts that are fetching it.

use std::fs;
use std::path::Path;

use crate::error::{Context, Error, Result};
use crate::files;
use crate::fleet::hub::Hub;
use crate::fleet::repository::{Host, Repository};
use crate::fleet::{FORMAT, Manifest, NAMESPACE, Release, Signed, sha256};
use crate::program::Program;
use crate::run::now;

/// Publishes a host's configuration unless it is published already, signed as it should be; builds it
/// before that, if so asked for. Returns the release's sequence number. `say` is told what is being done.
pub fn deploy(hub: &Hub, repository: &Repository, host: &Host, build: bool, key: Option<&Path>, say: impl Fn(&str)) -> Result<Option<u64>> {
    hub.check(&host.name)?;
    let (old, is_signed) = hub.manifest(&host.name)?.unzip();
    say("evaluating");
    let system = repository.evaluate(host)?;
    let (source, attr, toplevel) = (&host.source, &host.attr, Some(system.toplevel.clone()));
    let same = old.as_ref().filter(|old| (&old.sha256, &old.attr, &old.toplevel) == (&source.sha256, attr, &toplevel));
    if same.is_some() && is_signed == Some(key.is_some()) {
        return Ok(None);
    }
    if build {
        say("building");
        repository.build(host, &system)?;
    }
    say("publishing");
    let content = format!("{} {} {}\n", source.sha256, attr.as_deref().unwrap_or("-"), system.toplevel.display());
    let release = match same {
        Some(same) => same.release.clone(),
        None => Release {
            id: sha256::of(content.as_bytes())?,
            sequence: next_sequence(hub, &host.name, old.as_ref()).context(|| format!("publish {}", host.name))?,
        },
    };
    let sequence = release.sequence;
    let manifest = Manifest {
        format: FORMAT,
        host: host.name.clone(),
        release,
        sha256: source.sha256.clone(),
        size: source.size,
        attr: attr.clone(),
        toplevel,
        published: now(),
    };
    let archive = fs::read(&source.archive).context(|| format!("read {}", source.archive.display()))?;
    publish(hub, &manifest, &archive, key, old.as_ref())?;
    Ok(Some(sequence))
}

/// A number higher than that of every release before, also of those that only the host remembers.
fn next_sequence(hub: &Hub, host: &str, old: Option<&Manifest>) -> Result<u64, String> {
    let heartbeat = hub.heartbeat(host).map_err(|error| error.to_string())?.map(|(heartbeat, _)| heartbeat);
    let remembered = heartbeat.into_iter().flat_map(|heartbeat| [heartbeat.seen, heartbeat.deployed]).flatten();
    let highest = remembered.map(|release| release.sequence).chain(old.map(|old| old.release.sequence)).max();
    highest.unwrap_or(0).checked_add(1).ok_or_else(|| "the host says that there are no more numbers".into())
}

fn publish(hub: &Hub, manifest: &Manifest, archive: &[u8], key: Option<&Path>, old: Option<&Manifest>) -> Result<()> {
    let release = hub.release(&manifest.host);
    let text = serde_json::to_string(manifest).context(|| format!("write the manifest of {}", manifest.host))?;
    let signature = key.map(|key| sign(&text, key)).transpose()?;
    let file = |manifest: &Manifest| release.join(format!("{}.tar.gz", manifest.release.id));
    files::write(&file(manifest), archive, 0o644).context(|| format!("write {}", file(manifest).display()))?;
    files::write_json(&release.join("manifest.json"), &Signed { manifest: text, signature }, 0o644)?;

    let kept = [Some(file(manifest)), old.map(file)];
    for entry in fs::read_dir(&release).context(|| format!("read {}", release.display()))?.flatten() {
        let path = entry.path();
        // whatever somebody else is writing is not an archive
        let ours = [".tar.gz", ".tar.gz.new"].iter().any(|end| entry.file_name().to_string_lossy().ends_with(end));
        if ours && !kept.contains(&Some(path.clone())) {
            files::remove(&path).context(|| format!("remove {}", path.display()))?;
        }
    }
    Ok(())
}

fn sign(text: &str, key: &Path) -> Result<String> {
    let doing = || format!("sign with {}", key.display());
    let sign = Program::new("ssh-keygen").args(["-Y", "sign", "-n", NAMESPACE, "-f"]).arg(key);
    let signature = sign.output(doing, Some(text.as_bytes()))?;
    String::from_utf8(signature).map_err(|_| Error::new(format!("Failed to {}: ssh-keygen said something odd", doing())))
}
