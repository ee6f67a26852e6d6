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
use crate::names::{HostName, Sequence};
use crate::program::Program;
use crate::run::now;

/// Publishes a host's configuration unless it is published already, signed as it should be; builds it
/// before that, if so asked for. Returns the release's sequence number. `say` is told what is being done.
pub fn deploy(
    hub: &Hub,
    repository: &Repository,
    host: &Host,
    build: bool,
    key: Option<&Path>,
    say: impl Fn(&str),
) -> Result<Option<Sequence>> {
    hub.check(&host.name)?;
    let old = hub.manifest(&host.name)?;
    say("evaluating");
    let system = repository.evaluate(host)?;
    let (source, attr, toplevel) = (&host.source, &host.attr, Some(system.toplevel.clone()));
    let same = old.as_ref().filter(|(old, _)| (&old.sha256, &old.attr, &old.toplevel) == (&source.sha256, attr, &toplevel));
    let well_signed = same.map(|(_, signed)| is_signed_by(signed, key, &repository.scratch(&host.name))).transpose()?;
    if well_signed == Some(true) {
        return Ok(None);
    }
    if build {
        say("building");
        repository.build(host, &system)?;
    }
    say("publishing");
    let content = format!("{} {} {}\n", source.sha256, attr.as_deref().unwrap_or("-"), system.toplevel);
    let release = match same {
        Some((same, _)) => same.release.clone(),
        None => Release {
            id: sha256::of(content.as_bytes())?,
            sequence: next_sequence(hub, &host.name, old.as_ref().map(|(old, _)| old)).context(|| format!("publish {}", host.name))?,
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
    let text = serde_json::to_string(&manifest).context(|| format!("write the manifest of {}", host.name))?;
    let signature = key.map(|key| sign(&text, key)).transpose()?;
    let archive = fs::read(&source.archive).context(|| format!("read {}", source.archive.display()))?;
    let place = hub.release(&host.name).join(manifest.archive());
    files::write(&place, &archive, 0o644).context(|| format!("write {}", place.display()))?;
    hub.publish(&manifest, &Signed { manifest: text, signature }, old.as_ref())?;
    Ok(Some(sequence))
}

/// A number higher than that of every release before, also of those that only the host remembers.
fn next_sequence(hub: &Hub, host: &HostName, old: Option<&Manifest>) -> Result<Sequence, String> {
    let heartbeat = hub.heartbeat(host).map_err(|error| error.to_string())?.map(|(heartbeat, _)| heartbeat);
    let remembered = heartbeat.into_iter().flat_map(|heartbeat| [heartbeat.seen, heartbeat.deployed]).flatten();
    let highest = remembered.map(|release| release.sequence).chain(old.map(|old| old.release.sequence)).max();
    highest.map_or_else(|| 1.try_into(), Sequence::next)
}

/// Whether this key made the signature, or there is none where there is no key; `scratch` is a file for it.
fn is_signed_by(signed: &Signed, key: Option<&Path>, scratch: &Path) -> Result<bool> {
    let (Some(key), Some(signature)) = (key, &signed.signature) else { return Ok(key.is_none() == signed.signature.is_none()) };
    // "256 SHA256:... comment (ED25519)"
    let known = Program::new("ssh-keygen").args(["-l", "-f"]).arg(key).output(|| format!("read {}", key.display()), None)?;
    let known = String::from_utf8_lossy(&known);
    let print = known.split(' ').nth(1).unwrap_or_default();
    fs::write(scratch, signature).context(|| format!("write {}", scratch.display()))?;
    let check = Program::new("ssh-keygen").args(["-Y", "check-novalidate", "-n", NAMESPACE, "-s"]).arg(scratch);
    let said = check.output(|| "check a signature".into(), Some(signed.manifest.as_bytes()));
    Ok(said.is_ok_and(|said| String::from_utf8_lossy(&said).trim_end().ends_with(print)))
}

fn sign(text: &str, key: &Path) -> Result<String> {
    let doing = || format!("sign with {}", key.display());
    let sign = Program::new("ssh-keygen").args(["-Y", "sign", "-n", NAMESPACE, "-f"]).arg(key);
    let signature = sign.output(doing, Some(text.as_bytes()))?;
    String::from_utf8(signature).map_err(|_| Error::new(format!("Failed to {}: ssh-keygen said something odd", doing())))
}
