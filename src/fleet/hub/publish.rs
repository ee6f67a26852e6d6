//! Releases: built first, then published in one step.
//!
//! A manifest that can be read is complete, and its archive is there: the archive is on disk before
//! the manifest is, and the one of the release before stays for hosts that are fetching it.

use std::fs;
use std::path::Path;

use crate::error::{Context, Error, Result};
use crate::files;
use crate::fleet::hub::repository::{FleetRepository, Host};
use crate::fleet::hub::served::ServedDirectory;
use crate::fleet::{FORMAT, Manifest, NAMESPACE, Signed, sha256};
use crate::names::{HostName, Sequence, Sha256, StorePath};
use crate::program::Program;
use crate::run::Release;
use crate::system::now;

/// How far a number may be ahead of the clock, in seconds.
const DAY: u64 = 24 * 60 * 60;

/// How releases are published.
pub struct Manner<'a> {
    /// Whether they are built before.
    pub build: bool,
    /// What they are signed with.
    pub key: Option<&'a Path>,
    /// Whether one without a signature may follow one with it.
    pub unsigned: bool,
}

/// Publishes a host's configuration unless it is published already, signed as it should be; builds it
/// before that, if so asked for. Returns the release's sequence number, and what there is to say of it. `say` is told what
/// is being done.
pub fn deploy(
    hub: &ServedDirectory,
    repository: &FleetRepository,
    host: &Host,
    manner: &Manner,
    say: impl Fn(&str),
) -> Result<Option<(Sequence, &'static str)>> {
    hub.check(&host.name)?;
    let key = manner.key;
    let old = hub.valid_manifest(&host.name)?;
    if key.is_none() && !manner.unsigned && old.as_ref().is_some_and(|(_, signed)| signed.signature.is_some()) {
        let why = "its release is signed, and fleet.json has no signingKey; set it, or pass --unsigned";
        return Err(why).context(|| format!("publish {}", host.name));
    }
    let is_ours = old.as_ref().map(|old| is_ours(old, key, &repository.scratch(&host.name))).transpose()?;
    say("evaluating");
    let system = repository.evaluate(host)?;
    let (source, attr, toplevel) = (&host.source, &host.attr, Some(system.toplevel.clone()));
    let is_same = old.as_ref().is_some_and(|(old, _)| (&old.sha256, &old.attr, &old.toplevel) == (&source.sha256, attr, &toplevel));
    let heartbeat = hub.heartbeat(&host.name)?.map(|(heartbeat, _)| heartbeat);
    let is_refused = heartbeat.as_ref().is_some_and(|heartbeat| heartbeat.refused.is_some());
    if is_same && is_ours == Some(true) && old.as_ref().is_some_and(|(old, _)| hub.has_archive(old, is_refused)) {
        return Ok(None);
    }
    let ours = old.as_ref().filter(|_| is_ours == Some(true)).map(|(ours, _)| ours);
    if manner.build {
        say("building");
        repository.build(host, &system)?;
    }
    say("publishing");
    let heard = heartbeat.map(|heartbeat| [heartbeat.seen, heartbeat.deployed]);
    let heard = heard.into_iter().flatten().flatten().map(|release| release.sequence);
    let published = now();
    let sequence = next(ours.map(|ours| ours.release.sequence), heard, published).context(|| format!("publish {}", host.name))?;
    let manifest = Manifest {
        format: FORMAT,
        host: host.name.clone(),
        release: Release { id: id(&source.sha256, attr.as_ref(), toplevel.as_ref())?, sequence },
        sha256: source.sha256.clone(),
        size: source.size,
        attr: attr.clone(),
        toplevel,
        published,
    };
    let text = serde_json::to_string(&manifest).context(|| format!("write the manifest of {}", host.name))?;
    let signature = key.map(|key| sign(&text, key)).transpose()?;
    let archive = fs::read(&source.archive).context(|| format!("read {}", source.archive.display()))?;
    let place = hub.release(&host.name).join(manifest.archive());
    files::write(&place, &archive, 0o644).context(|| format!("write {}", place.display()))?;
    hub.publish(&manifest, &Signed { manifest: text, signature }, old.as_ref())?;
    Ok(Some((
        sequence,
        match (is_same, is_ours) {
            (false, _) => "",
            (true, Some(false)) => ": the same, signed again",
            (true, _) => ": the same, sent again",
        },
    )))
}

/// What a release is called that consists of these.
fn id(archive: &Sha256, attr: Option<&HostName>, toplevel: Option<&StorePath>) -> Result<Sha256> {
    let or_none = |name: Option<&str>| name.unwrap_or("-").to_owned();
    let content = format!("{archive} {} {}\n", or_none(attr.map(|attr| &**attr)), or_none(toplevel.map(|toplevel| &**toplevel)));
    sha256::of(content.as_bytes())
}

/// The number for a new release: no lower than the seconds since 1970, and higher than that of the release
/// before and than those that the host has told of. It never jumps: what a host tells counts up to a day
/// ahead of the clock, and a release that is farther ahead is not followed by any.
fn next(before: Option<Sequence>, heard: impl Iterator<Item = Sequence>, now: u64) -> Result<Sequence, String> {
    let highest = Sequence::try_from(now + DAY)?;
    let (near, far): (Vec<_>, Vec<_>) = heard.partition(|number| *number < highest);
    if let Some(number) = far.iter().max() {
        log::warn!("The host has seen release {number}, which no later one can exceed: run `ekiben forget-releases` there, as root.");
    }
    let before = before.into_iter().chain(near).max().map(Sequence::next).transpose()?;
    let next = before.max(Some(now.try_into()?)).filter(|next| *next <= highest);
    next.ok_or_else(|| "the number of the last release is more than a day ahead of this machine's clock; set the clock".into())
}

/// Whether a release is one of this fleet's: signed with its key, if it has one, and named by its contents.
fn is_ours((manifest, signed): &(Manifest, Signed), key: Option<&Path>, scratch: &Path) -> Result<bool> {
    let is_named_so = id(&manifest.sha256, manifest.attr.as_ref(), manifest.toplevel.as_ref())? == manifest.release.id;
    Ok(is_named_so && is_signed_by(signed, key, scratch)?)
}

/// Whether this key made the signature, or there is none where there is no key; `scratch` is a file for it.
fn is_signed_by(signed: &Signed, key: Option<&Path>, scratch: &Path) -> Result<bool> {
    let (Some(key), Some(signature)) = (key, &signed.signature) else { return Ok(key.is_none() == signed.signature.is_none()) };
    let doing = || format!("read {}", key.display());
    // "256 SHA256:... comment (ED25519)"
    let known = Program::new("ssh-keygen").args(["-l", "-f"]).arg(key).output(doing, None)?;
    let known = String::from_utf8_lossy(&known);
    let print = known.split(' ').nth(1).filter(|print| print.starts_with("SHA256:"));
    let print = print.ok_or("unexpected output of ssh-keygen").context(doing)?;
    fs::write(scratch, signature).context(|| format!("write {}", scratch.display()))?;
    let check = Program::new("ssh-keygen").args(["-Y", "check-novalidate", "-n", NAMESPACE, "-s"]).arg(scratch);
    let said = check.output(|| "check a signature".into(), Some(signed.manifest.as_bytes()));
    Ok(said.is_ok_and(|said| String::from_utf8_lossy(&said).trim_end().ends_with(&format!(" {print}"))))
}

fn sign(text: &str, key: &Path) -> Result<String> {
    let doing = || format!("sign with {}", key.display());
    let sign = Program::new("ssh-keygen").args(["-Y", "sign", "-n", NAMESPACE, "-f"]).arg(key);
    let signature = sign.output(doing, Some(text.as_bytes()))?;
    String::from_utf8(signature).map_err(|_| Error::new(format!("Failed to {}: ssh-keygen returned invalid UTF-8", doing())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_follow_the_clock_and_never_jump() {
        const NOW: u64 = 1_800_000_000;
        let number = |number: u64| Sequence::try_from(number).unwrap();
        let next =
            |before: Option<u64>, heard: &[u64]| next(before.map(number), heard.iter().map(|heard| number(*heard)), NOW).map(u64::from);
        for (before, heard, expected) in [
            (None, &[][..], NOW),
            (Some(1), &[2], NOW),
            // twice in one second, or by a clock that is ahead
            (Some(NOW), &[], NOW + 1),
            (Some(5), &[NOW + 100], NOW + 101),
            (Some(NOW + DAY - 1), &[], NOW + DAY),
            // what no publisher can have said
            (Some(5), &[NOW + DAY, 1 << 40], NOW),
            (Some(NOW + 3), &[1 << 40, NOW + 1], NOW + 4),
        ] {
            assert_eq!(next(before, heard), Ok(expected), "{before:?} {heard:?}");
        }
        assert!(next(Some(NOW + DAY), &[]).unwrap_err().contains("clock"));
        assert!(next(Some(1 << 40), &[]).is_err());
    }
}
