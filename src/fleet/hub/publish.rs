//! Releases: built first, then published in one step.
//!
//! A manifest that can be read is complete, and its archive is there: the archive is on disk before
//! the manifest is, and the one of the release before stays for hosts that are fetching it.

use std::fs;
use std::path::Path;

use crate::error::{Context, Error, Result};
use crate::files;
use crate::fleet::hub::history::{self, Noted};
use crate::fleet::hub::memory::Memory;
use crate::fleet::hub::plan::{Holds, Member, Plan};
use crate::fleet::hub::repository::{FleetRepository, Host};
use crate::fleet::hub::served::ServedDirectory;
use crate::fleet::{FORMAT, Manifest, NAMESPACE, Provenance, Signed, sha256};
use crate::names::{HostName, Sequence, Sha256, StorePath};
use crate::program::Program;
use crate::run::Release;
use crate::system::now;

/// How far a number may be ahead of the clock, in seconds.
pub const DAY: u64 = 24 * 60 * 60;

/// How releases are published.
pub struct Manner<'a> {
    /// Whether they are built before.
    pub build: bool,
    /// What they are signed with.
    pub key: Option<&'a Path>,
    /// Whether one without a signature may follow one with it.
    pub unsigned: bool,
    /// What to do about it if not.
    pub no_key: &'static str,
    /// For how many seconds they count as new; for ever, if that is not said.
    pub lasting: Option<u64>,
    /// What they are made from.
    pub origin: Provenance,
    /// What was published before.
    pub memory: Memory,
    /// For which hosts nothing new is published.
    pub holds: Holds,
    /// What is rolled out, or has been.
    pub plan: Option<Plan>,
    /// Whether something new waits for its wave.
    pub waves: bool,
}

impl Manner<'_> {
    /// Whether what a host sees is to be followed by something in a later wave.
    fn waits(&self, sees: &Manifest) -> bool {
        self.plan.as_ref().and_then(|plan| plan.waits(&sees.host, Some(&sees.release))).is_some()
    }
}

/// What came of publishing for a host.
pub struct Placed {
    /// What it is to run, in the place of what; the same, if that is there. None where it is held, and nothing is there.
    pub member: Option<Member>,
    /// Whether something was published, or is to be.
    pub new: bool,
    /// What there is to say of it.
    pub said: String,
}

/// What a host is to get.
pub struct Built<'a> {
    /// The host.
    pub name: &'a HostName,
    /// The attribute of its flake's `nixosConfigurations`.
    pub attr: &'a Option<HostName>,
    /// The archive with its configuration, and that file's hash and size.
    pub archive: &'a Path,
    pub sha256: &'a Sha256,
    pub size: u64,
    /// What it is built to.
    pub toplevel: StorePath,
}

/// What there is to know before a host's release is replaced.
struct Standing {
    old: Option<(Manifest, Signed)>,
    /// Whether that is one of this fleet's.
    is_ours: bool,
    /// Why the host does not accept it, if it does not.
    refused: Option<String>,
    /// The numbers that are known to have been published.
    known: Vec<Sequence>,
    /// What the host has deployed.
    deployed: Option<Sequence>,
    now: u64,
}

/// Publishes a host's configuration unless it is published already, signed as it should be; builds it
/// before that, if so asked for. `say` is told what is being done.
pub fn deploy(hub: &ServedDirectory, repository: &FleetRepository, host: &Host, manner: &Manner, say: impl Fn(&str)) -> Result<Placed> {
    let before = Standing::that_may_be_replaced(hub, &host.name, manner, &repository.scratch(&host.name))?;
    if let Some(held) = before.held(&host.name, manner) {
        return Ok(held);
    }
    say("evaluating");
    let system = repository.evaluate(host)?;
    let source = &host.source;
    let built = Built {
        name: &host.name,
        attr: &host.attr,
        archive: &source.archive,
        sha256: &source.sha256,
        size: source.size,
        toplevel: system.toplevel.clone(),
    };
    let what = match before.there(hub, &built, manner, &repository.scratch(&host.name))? {
        Ok(there) => return Ok(there),
        Err(what) => what,
    };
    if manner.build {
        say("building");
        repository.build(host, &system)?;
    }
    say("publishing");
    repository.provide(source)?;
    replace(hub, &built, manner, &before, what)
}

/// Publishes what was built for a host, unless it is published already, signed as it should be; `scratch` is a file for it.
pub fn offer(hub: &ServedDirectory, built: &Built, manner: &Manner, scratch: &Path) -> Result<Placed> {
    let before = Standing::that_may_be_replaced(hub, built.name, manner, scratch)?;
    if let Some(held) = before.held(built.name, manner) {
        return Ok(held);
    }
    before.there(hub, built, manner, scratch)?.or_else(|what| replace(hub, built, manner, &before, what))
}

fn replace(hub: &ServedDirectory, built: &Built, manner: &Manner, before: &Standing, what: &str) -> Result<Placed> {
    let Built { name, attr, archive, sha256, size, toplevel } = built;
    let manifest = Manifest {
        format: FORMAT,
        host: (*name).clone(),
        release: Release { id: id(sha256, attr.as_ref(), Some(toplevel))?, sequence: before.next(name)? },
        sha256: (*sha256).clone(),
        size: *size,
        attr: (*attr).clone(),
        toplevel: Some(toplevel.clone()),
        published: before.now,
        expires: manner.lasting.map(|lasting| before.now + lasting),
        origin: manner.origin.clone(),
    };
    let contents = fs::read(archive).context(|| format!("read {}", archive.display()))?;
    let place = hub.release(name).join(manifest.archive());
    files::write(&place, &contents, 0o644).context(|| format!("write {}", place.display()))?;
    let release = manifest.release.clone();
    // what contains nothing new can do no harm
    let (verb, sees) = if manner.waves && what.is_empty() {
        hub.stage(&manifest, &signed(&manifest, manner)?)?;
        ("signed", before.old.as_ref().map(|(old, _)| old.release.clone()))
    } else {
        publish(hub, &manifest, manner, before.old.as_ref())?;
        ("published", Some(release.clone()))
    };
    Ok(before.placed(name, release.clone(), sees, true, format!("release {} {verb}{what}", release.sequence)))
}

/// Publishes a release of a host's again, by another number, as it was: `noted` is of the hub, and has to be signed as it
/// should be.
pub fn again(hub: &ServedDirectory, noted: &Noted, manner: &Manner, scratch: &Path) -> Result<Sequence> {
    let old = &noted.manifest;
    let doing = || format!("publish release {} of {} again", old.release.sequence, old.host);
    let from = || old.origin.commit.as_ref().map_or("its configuration".into(), |commit| format!("commit {commit}"));
    let before = Standing::that_may_be_replaced(hub, &old.host, manner, scratch)?;
    let signed = noted.signed()?;
    if !is_ours((old, &signed), manner.key, scratch)? {
        return Err(format!("it is not known to be signed with the signingKey; check out {}, and deploy", from())).context(doing);
    }
    if !hub.keeps(old)? {
        return Err(format!("its archive is gone; check out {}, and deploy", from())).context(doing);
    }
    let release = Release { sequence: before.next(&old.host)?, ..old.release.clone() };
    let expires = manner.lasting.map(|lasting| before.now + lasting);
    let new = Manifest { release, published: before.now, expires, ..old.clone() };
    publish(hub, &new, manner, before.old.as_ref())?;
    Ok(new.release.sequence)
}

/// Publishes a host's release again, by another number, if more than half of its time is over. What is renewed is what
/// was published last: nobody can have an old release renewed.
pub fn renew(hub: &ServedDirectory, repository: &FleetRepository, host: &HostName, manner: &Manner) -> Result<Option<Sequence>> {
    let before = Standing::new(hub, host, manner, &repository.scratch(host))?;
    let doing = || format!("renew the release of {host}");
    let Some((old, _)) = &before.old else { return Ok(None) };
    // or what is to follow would be no later one
    if manner.waits(old) {
        return Ok(None);
    }
    if !before.is_ours {
        return Err("it is not signed with the signingKey; deploy").context(doing);
    }
    if manner.memory.last(host).is_none_or(|last| last > old.release.sequence) || before.has_gone_back(old) {
        return Err("it is not known to be the last one that was published; deploy").context(doing);
    }
    if !before.is_to_be_renewed(old, manner.lasting) {
        return Ok(None);
    }
    let release = Release { sequence: before.next(host)?, ..old.release.clone() };
    let renewed = Manifest { release, expires: manner.lasting.map(|lasting| before.now + lasting), ..old.clone() };
    publish(hub, &renewed, manner, before.old.as_ref())?;
    Ok(Some(renewed.release.sequence))
}

/// Signs a manifest, and puts it in the place of the old one.
fn publish(hub: &ServedDirectory, manifest: &Manifest, manner: &Manner, old: Option<&(Manifest, Signed)>) -> Result<()> {
    let host = &manifest.host;
    let new = signed(manifest, manner)?;
    hub.publish(manifest, &new, old.map(|(_, signed)| signed))?;
    // it is published all the same
    let noted = manner.memory.note(host, manifest.release.sequence).and_then(|()| manner.memory.vouch(host, &new, manner.key));
    let noted = noted.and_then(|()| {
        if hub.is_elsewhere() || hub.check_ours().is_err() { Ok(()) } else { history::note_in_turn(hub, host, manner.plan.as_ref()) }
    });
    noted.unwrap_or_else(|error| log::warn!("{error}."));
    Ok(())
}

fn signed(manifest: &Manifest, manner: &Manner) -> Result<Signed> {
    let text = serde_json::to_string(manifest).context(|| format!("write the manifest of {}", manifest.host))?;
    let signature = manner.key.map(|key| sign(&text, key)).transpose()?;
    Ok(Signed { manifest: text, signature })
}

impl Standing {
    fn new(hub: &ServedDirectory, host: &HostName, manner: &Manner, scratch: &Path) -> Result<Self> {
        let old = hub.valid_manifest(host)?;
        let is_ours = match &old {
            Some((_, signed)) if manner.memory.vouches(host, signed, manner.key) => true,
            Some((old, signed)) if is_ours((old, signed), manner.key, scratch)? => {
                manner.memory.vouch(host, signed, manner.key).unwrap_or_else(|error| log::warn!("{error}."));
                true
            }
            _ => false,
        };
        // the hub has begun a wave
        if let Some((old, _)) =
            old.as_ref().filter(|(old, _)| is_ours && manner.memory.last(host).is_some_and(|last| last < old.release.sequence))
        {
            manner.memory.note(host, old.release.sequence).unwrap_or_else(|error| log::warn!("{error}."));
        }
        let heartbeat = hub.heartbeat(host)?.map(|(heartbeat, _)| heartbeat);
        let deployed = heartbeat.as_ref().and_then(|heartbeat| heartbeat.deployed.as_ref()).map(|release| release.sequence);
        let heard = heartbeat.as_ref().map(|heartbeat| [&heartbeat.seen, &heartbeat.deployed]);
        let heard = heard.into_iter().flatten().flatten().map(|release| release.sequence);
        let now = now();
        let highest = Sequence::try_from(now + DAY).context(|| format!("publish {host}"))?;
        let (known, far): (Vec<_>, Vec<_>) = heard.chain(manner.memory.last(host)).partition(|number| *number < highest);
        if let Some(number) = far.iter().max() {
            log::warn!(
                "{host} may have seen release {number}, which no later one can exceed: run `ekiben forget-releases` there, as root."
            );
        }
        Ok(Self { old, is_ours, refused: heartbeat.and_then(|heartbeat| heartbeat.refused), known, deployed, now })
    }

    /// The same; fails unless the hub serves the host, and what it offers may be followed by what is published so.
    fn that_may_be_replaced(hub: &ServedDirectory, host: &HostName, manner: &Manner, scratch: &Path) -> Result<Self> {
        hub.check(host)?;
        let before = Self::new(hub, host, manner, scratch)?;
        let is_signed = before.old.as_ref().is_some_and(|(_, signed)| signed.signature.is_some());
        if is_signed && manner.key.is_none() && !manner.unsigned {
            return Err(manner.no_key).context(|| format!("publish {host}"));
        }
        Ok(before)
    }

    fn placed(&self, host: &HostName, release: Release, before: Option<Release>, new: bool, said: String) -> Placed {
        let good = self.deployed.or(before.as_ref().map(|before| before.sequence)).filter(|good| *good < release.sequence);
        Placed { member: Some(Member { host: host.clone(), wave: 0, release, before, good, silent_after: 0 }), new, said }
    }

    /// That nothing is published, since the host is held; what waits for its wave can be signed meanwhile.
    fn held(&self, host: &HostName, manner: &Manner) -> Option<Placed> {
        let said = manner.holds.said(host).filter(|_| !manner.waves)?;
        let sees = self.old.as_ref().map(|(old, _)| old.release.clone());
        let placed = sees.map(|release| self.placed(host, release.clone(), Some(release), false, said.clone()));
        Some(placed.unwrap_or(Placed { member: None, new: false, said }))
    }

    /// What there is already: it is published, or waits for its wave; or what there is to say of a new release.
    fn there(&self, hub: &ServedDirectory, built: &Built, manner: &Manner, scratch: &Path) -> Result<Result<Placed, &'static str>> {
        let planned = manner.plan.as_ref().filter(|_| manner.waves).and_then(|plan| plan.get(built.name));
        let sees = self.old.as_ref().map(|(old, _)| &old.release);
        let what = self.why_replace(hub, built, manner);
        if let (None, Some(sees)) = (what, sees) {
            let member = planned.filter(|planned| planned.release == *sees).cloned();
            let placed = self.placed(built.name, sees.clone(), Some(sees.clone()), false, "unchanged".into());
            return Ok(Ok(Placed { member: member.or(placed.member), ..placed }));
        }
        let what = what.unwrap_or_default();
        let Some(planned) = planned.filter(|planned| planned.before.as_ref() == sees) else { return Ok(Err(what)) };
        let Some((manifest, signed)) = hub.staged(built.name, &planned.release) else { return Ok(Err(what)) };
        let is_same = planned.release.id == id(built.sha256, built.attr.as_ref(), Some(&built.toplevel))?;
        if !is_same || !is_ours((&manifest, &signed), manner.key, scratch)? || self.is_to_be_renewed(&manifest, manner.lasting) {
            return Ok(Err(what));
        }
        Ok(Ok(Placed { member: Some(planned.clone()), new: false, said: "unchanged".into() }))
    }

    /// What there is to say of a new release in the place of the present one; none if that is the same, and will do.
    fn why_replace(&self, hub: &ServedDirectory, built: &Built, manner: &Manner) -> Option<&'static str> {
        let new = (built.sha256, built.attr, Some(&built.toplevel));
        let same = self.old.as_ref().filter(|(old, _)| (&old.sha256, &old.attr, old.toplevel.as_ref()) == new);
        Some(match same {
            None => "",
            Some(_) if !self.is_ours => ": the same, signed again",
            Some((same, _)) if !hub.has_archive(same, self.refused.is_some()) => ": the same, sent again",
            Some((same, _)) if self.has_gone_back(same) => ": the same, since the hub had gone back",
            Some((same, _)) if self.is_to_be_renewed(same, manner.lasting) => ": renewed",
            Some((same, _)) if !manner.waves && manner.waits(same) => ": the same, instead of what was to follow",
            Some(_) => return None,
        })
    }

    /// Whether a later release than this one is known to have been published.
    fn has_gone_back(&self, offered: &Manifest) -> bool {
        self.known.iter().any(|number| *number > offered.release.sequence)
    }

    /// Whether more than half of its time is over, or that is not as long as it should be.
    fn is_to_be_renewed(&self, offered: &Manifest, lasting: Option<u64>) -> bool {
        match (offered.expires, lasting) {
            (Some(expires), Some(lasting)) => expires < self.now + lasting / 2 || expires > self.now + lasting + DAY,
            (expires, lasting) => expires.is_some() != lasting.is_some(),
        }
    }

    /// The number for the next release.
    fn next(&self, host: &HostName) -> Result<Sequence> {
        let ours = self.old.as_ref().filter(|_| self.is_ours).map(|(ours, _)| ours.release.sequence);
        next(ours, &self.known, self.now).context(|| format!("publish {host}"))
    }
}

/// What a release is called that consists of these.
fn id(archive: &Sha256, attr: Option<&HostName>, toplevel: Option<&StorePath>) -> Result<Sha256> {
    let or_none = |name: Option<&str>| name.unwrap_or("-").to_owned();
    let content = format!("{archive} {} {}\n", or_none(attr.map(|attr| &**attr)), or_none(toplevel.map(|toplevel| &**toplevel)));
    sha256::of(content.as_bytes())
}

/// The number for a new release: no lower than the seconds since 1970, and higher than that of the release
/// before and than those that are known. It never jumps: none is more than a day ahead of the clock.
fn next(before: Option<Sequence>, known: &[Sequence], now: u64) -> Result<Sequence, String> {
    let highest = Sequence::try_from(now + DAY)?;
    let before = before.iter().chain(known).max().map(|last| last.next()).transpose()?;
    let next = before.max(Some(now.try_into()?)).filter(|next| *next <= highest);
    next.ok_or_else(|| "the number of the last release is more than a day ahead of this machine's clock; set the clock".into())
}

/// Whether a release is one of this fleet's: signed with its key, if it has one, and named by its contents.
fn is_ours((manifest, signed): (&Manifest, &Signed), key: Option<&Path>, scratch: &Path) -> Result<bool> {
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
        let next = |before: Option<u64>, known: &[u64]| {
            let known: Vec<_> = known.iter().map(|known| number(*known)).collect();
            next(before.map(number), &known, NOW).map(u64::from)
        };
        for (before, known, expected) in [
            (None, &[][..], NOW),
            (Some(1), &[2], NOW),
            // twice in one second, or by a clock that is ahead
            (Some(NOW), &[], NOW + 1),
            (Some(5), &[NOW + 100], NOW + 101),
            (Some(NOW + DAY - 1), &[], NOW + DAY),
            (Some(NOW + 3), &[NOW + 1], NOW + 4),
        ] {
            assert_eq!(next(before, known), Ok(expected), "{before:?} {known:?}");
        }
        assert!(next(Some(NOW + DAY), &[]).unwrap_err().contains("clock"));
        assert!(next(Some(1 << 40), &[]).is_err());
    }
}
