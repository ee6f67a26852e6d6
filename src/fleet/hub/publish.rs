//! Releases: built first, then published in one step.
//!
//! A manifest that can be read is complete, and its archive is there: the archive is on disk before
//! the manifest is, and the one of the release before stays for hosts that are fetching it.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Context, OrLog, Result};
use crate::files;
use crate::fleet::hub::history::{self, Noted};
use crate::fleet::hub::holds::Holds;
use crate::fleet::hub::memory::Memory;
use crate::fleet::hub::numbers::Numbers;
use crate::fleet::hub::plan::{Member, Plan};
use crate::fleet::hub::repository::evaluation::System;
use crate::fleet::hub::repository::{FleetRepository, Host};
use crate::fleet::hub::served::ServedDirectory;
use crate::fleet::hub::signing::{self, id, signed};
use crate::fleet::temporary::Temporary;
use crate::fleet::{DAY, FORMAT, Heartbeat, Manifest, Provenance, Signed};
use crate::names::{HostName, Sequence, Sha256, StorePath};
use crate::run::Release;
use crate::system::now;

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
    /// A directory for what is needed in between.
    pub scratch: Temporary,
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
#[derive(Deserialize, Serialize)]
pub struct Built {
    /// The host.
    pub name: HostName,
    /// The attribute of its flake's `nixosConfigurations`.
    pub attr: Option<HostName>,
    /// The hash and the size of the archive with its configuration.
    pub sha256: Sha256,
    pub size: u64,
    /// What it is built to.
    pub toplevel: StorePath,
    /// In which wave; and after how many seconds it is silent then.
    pub wave: usize,
    pub silent_after: u64,
}

impl Built {
    /// What its configuration has evaluated to, for the first wave.
    pub fn of(host: &Host, system: &System) -> Self {
        let (name, attr, sha256) = (host.name.clone(), host.attr.clone(), host.source.sha256.clone());
        Self { name, attr, sha256, size: host.source.size, toplevel: system.toplevel.clone(), wave: 0, silent_after: 0 }
    }
}

/// What there is to know before a host's release is replaced.
struct Standing<'a> {
    hub: &'a ServedDirectory,
    host: &'a HostName,
    manner: &'a Manner<'a>,
    old: Option<(Manifest, Signed)>,
    /// Whether that is one of this fleet's.
    is_ours: bool,
    /// Why the host does not accept it, if it does not.
    refused: Option<String>,
    numbers: Numbers,
    /// What the host has deployed.
    deployed: Option<Sequence>,
    now: u64,
}

/// Publishes a host's configuration unless it is published already, signed as it should be; builds it
/// before that, if so asked for. `say` is told what is being done.
pub fn deploy(hub: &ServedDirectory, repository: &FleetRepository, host: &Host, manner: &Manner, say: impl Fn(&str)) -> Result<Placed> {
    let before = Standing::that_may_be_replaced(hub, &host.name, manner)?;
    if let Some(held) = before.held(&manner.holds) {
        return Ok(held);
    }
    say("evaluating");
    let system = repository.evaluate(host)?;
    before.replace(&Built::of(host, &system), &host.source.archive, &|| {
        if manner.build {
            say("building");
            repository.build(host, &system)?;
        }
        say("publishing");
        repository.provide(&host.source)
    })
}

/// Publishes what was built for a host, unless it is published already, signed as it should be.
pub fn offer(hub: &ServedDirectory, built: &Built, archive: &Path, manner: &Manner) -> Result<Placed> {
    let before = Standing::that_may_be_replaced(hub, &built.name, manner)?;
    before.held(&manner.holds).map_or_else(|| before.replace(built, archive, &|| Ok(())), Ok)
}

/// Publishes a release of a host's again, by another number, as it was: `noted` is of the hub, and has to be signed as it
/// should be.
pub fn again(hub: &ServedDirectory, noted: &Noted, manner: &Manner) -> Result<Sequence> {
    let old = &noted.manifest;
    let doing = || format!("publish release {} of {} again", old.release.sequence, old.host);
    let from = || old.origin.commit.as_ref().map_or("its configuration".into(), |commit| format!("commit {commit}"));
    let before = Standing::that_may_be_replaced(hub, &old.host, manner)?;
    if !signing::is_ours(old, &noted.signed()?, manner.key, manner.scratch.path())? {
        return Err(format!("it is not known to be signed with the signingKey; check out {}, and deploy", from())).context(doing);
    }
    if !hub.keeps(old)? {
        return Err(format!("its archive is gone; check out {}, and deploy", from())).context(doing);
    }
    before.publish(&Manifest { published: before.now, ..before.renumbered(old)? })
}

/// Publishes a host's release again, by another number, if more than half of its time is over. What is renewed is what
/// was published last: nobody can have an old release renewed.
pub fn renew(hub: &ServedDirectory, host: &HostName, manner: &Manner) -> Result<Option<Sequence>> {
    let before = Standing::new(hub, host, manner)?;
    let doing = || format!("renew the release of {host}");
    // or what is to follow would be no later one
    let Some((old, _)) = before.old.as_ref().filter(|(old, _)| !manner.waits(old)) else { return Ok(None) };
    if !before.is_ours {
        return Err("it is not signed with the signingKey; deploy").context(doing);
    }
    if manner.memory.last(host).is_none_or(|last| last > old.release.sequence) || before.numbers.exceed(&old.release) {
        return Err("it is not known to be the last one that was published; deploy").context(doing);
    }
    before.is_to_be_renewed(old).then(|| before.publish(&before.renumbered(old)?)).transpose()
}

impl<'a> Standing<'a> {
    fn new(hub: &'a ServedDirectory, host: &'a HostName, manner: &'a Manner) -> Result<Self> {
        let (old, memory) = (hub.valid_manifest(host)?, &manner.memory);
        let mut is_ours = false;
        if let Some((old, signed)) = &old {
            let is_vouched_for = memory.vouches(host, signed, manner.key);
            is_ours = is_vouched_for || signing::is_ours(old, signed, manner.key, manner.scratch.path())?;
            if is_ours && !is_vouched_for {
                memory.vouch(host, signed, manner.key).or_warn();
            }
            memory.go_on(host, Some(&old.release).filter(|_| is_ours), false);
        }
        let heartbeat = hub.heartbeat(host)?.map(|(heartbeat, _)| heartbeat);
        let of = |release: fn(&Heartbeat) -> &Option<Release>| Some(release(heartbeat.as_ref()?).as_ref()?.sequence);
        let (seen, deployed, now) = (of(|said| &said.seen), of(|said| &said.deployed), now());
        let others = old.as_ref().filter(|_| !is_ours).map(|(old, _)| &old.release);
        let numbers = Numbers::known(host, [seen, deployed, memory.last(host)], others, now).context(|| format!("publish {host}"))?;
        let refused = heartbeat.and_then(|heartbeat| heartbeat.refused);
        Ok(Self { hub, host, manner, old, is_ours, refused, numbers, deployed, now })
    }

    /// The same; fails unless the hub serves the host, and what it offers may be followed by what is published so.
    fn that_may_be_replaced(hub: &'a ServedDirectory, host: &'a HostName, manner: &'a Manner) -> Result<Self> {
        hub.check(host)?;
        let before = Self::new(hub, host, manner)?;
        let is_signed = before.old.as_ref().is_some_and(|(_, signed)| signed.signature.is_some());
        if is_signed && manner.key.is_none() && !manner.unsigned {
            return Err(manner.no_key).context(|| format!("publish {host}"));
        }
        Ok(before)
    }

    /// What the host sees.
    fn sees(&self) -> Option<&Release> {
        self.old.as_ref().map(|(old, _)| &old.release)
    }

    fn member(&self, release: Release, before: Option<Release>) -> Member {
        let good = self.deployed.or(before.as_ref().map(|before| before.sequence)).filter(|good| *good < release.sequence);
        Member { host: self.host.clone(), wave: 0, release, before, good, silent_after: 0 }
    }

    fn as_before(&self, said: String) -> Placed {
        Placed { member: self.sees().map(|sees| self.member(sees.clone(), Some(sees.clone()))), new: false, said }
    }

    /// That nothing is published, since the host is held; what waits for its wave can be signed meanwhile.
    fn held(&self, holds: &Holds) -> Option<Placed> {
        holds.said(self.host).filter(|_| !self.manner.waves).map(|said| self.as_before(said))
    }

    /// What there is already: it is published, or waits for its wave; or what there is to say of a new release.
    fn there(&self, built: &Built) -> Result<Result<Placed, &'static str>> {
        let manner = self.manner;
        let planned = manner.plan.as_ref().filter(|_| manner.waves).and_then(|plan| plan.get(self.host));
        let Some(what) = self.why_replace(built) else {
            manner.memory.go_on(self.host, self.sees(), true);
            let placed = self.as_before("unchanged".into());
            let planned = planned.filter(|planned| Some(&planned.release) == self.sees()).cloned();
            return Ok(Ok(Placed { member: planned.or(placed.member), ..placed }));
        };
        let Some(planned) = planned.filter(|planned| planned.before.as_ref() == self.sees()) else { return Ok(Err(what)) };
        let Some((manifest, signed)) = self.hub.staged(self.host, &planned.release) else { return Ok(Err(what)) };
        let is_same = planned.release.id == id(&built.sha256, built.attr.as_ref(), Some(&built.toplevel))?;
        let is_ours = signing::is_ours(&manifest, &signed, manner.key, manner.scratch.path())?;
        if !is_same || !is_ours || self.is_to_be_renewed(&manifest) {
            return Ok(Err(what));
        }
        Ok(Ok(Placed { member: Some(planned.clone()), new: false, said: "unchanged".into() }))
    }

    /// What there is to say of a new release in the place of the present one; none if that is the same, and will do.
    fn why_replace(&self, built: &Built) -> Option<&'static str> {
        let new = (&built.sha256, &built.attr, Some(&built.toplevel));
        let same = self.old.as_ref().filter(|(old, _)| (&old.sha256, &old.attr, old.toplevel.as_ref()) == new);
        Some(match same {
            None => "",
            Some(_) if !self.is_ours => ": the same, signed again",
            Some((same, _)) if !self.hub.has_archive(same, self.refused.is_some()) => ": the same, sent again",
            Some((same, _)) if self.numbers.exceed(&same.release) => ": the same, since the hub had gone back",
            Some((same, _)) if self.is_to_be_renewed(same) => ": renewed",
            Some((same, _)) if !self.manner.waves && self.manner.waits(same) => ": the same, instead of what was to follow",
            Some(_) => return None,
        })
    }

    /// Whether more than half of its time is over, or that is not as long as it should be.
    fn is_to_be_renewed(&self, offered: &Manifest) -> bool {
        match offered.expires.zip(self.expires()) {
            Some((expires, latest)) => expires < latest - (latest - self.now) / 2 || expires > latest.saturating_add(DAY),
            None => offered.expires.is_some() != self.manner.lasting.is_some(),
        }
    }

    /// Until when a new release counts as new.
    fn expires(&self) -> Option<u64> {
        self.manner.lasting.map(|lasting| self.now.saturating_add(lasting))
    }

    /// The number for the next release.
    fn next(&self) -> Result<Sequence> {
        let ours = self.sees().filter(|_| self.is_ours).map(|ours| ours.sequence);
        self.numbers.next(ours).context(|| format!("publish {}", self.host))
    }

    /// The next release, with what is in an old one.
    fn renumbered(&self, old: &Manifest) -> Result<Manifest> {
        Ok(Manifest { release: Release { sequence: self.next()?, ..old.release.clone() }, expires: self.expires(), ..old.clone() })
    }

    /// Publishes what was built, or has it wait for its wave, unless that is done already; `make_ready` is done before.
    fn replace(&self, built: &Built, archive: &Path, make_ready: &dyn Fn() -> Result<()>) -> Result<Placed> {
        let what = match self.there(built)? {
            Ok(there) => return Ok(there),
            Err(what) => what,
        };
        make_ready()?;
        // somebody may have held it while it was built
        if let Some(held) = self.held(&Holds::now(self.hub)?) {
            return Ok(held);
        }
        let manifest = Manifest {
            format: FORMAT,
            host: self.host.clone(),
            release: Release { id: id(&built.sha256, built.attr.as_ref(), Some(&built.toplevel))?, sequence: self.next()? },
            sha256: built.sha256.clone(),
            size: built.size,
            attr: built.attr.clone(),
            toplevel: Some(built.toplevel.clone()),
            published: self.now,
            expires: self.expires(),
            origin: self.manner.origin.clone(),
        };
        let place = self.hub.release(self.host).join(manifest.archive());
        files::write(&place, &fs::read(archive).doing("read", archive)?, 0o644).doing("write", &place)?;
        let release = manifest.release.clone();
        // what contains nothing new can do no harm
        let (verb, member) = if self.manner.waves && what.is_empty() {
            self.hub.stage(&manifest, &signed(&manifest, self.manner.key)?)?;
            ("signed", self.member(release, self.sees().cloned()))
        } else {
            self.publish(&manifest)?;
            // what it had before that was planned is what it goes back to
            let planned = self.manner.plan.as_ref().and_then(|plan| plan.get(self.host));
            let planned = planned.filter(|planned| planned.is_new() && planned.release.id == release.id);
            let member = planned.cloned().unwrap_or_else(|| self.member(release.clone(), Some(release.clone())));
            ("published", Member { release, ..member })
        };
        Ok(Placed { said: format!("release {} {verb}{what}", member.release.sequence), member: Some(member), new: true })
    }

    /// Signs a manifest, and puts it in the place of the old one.
    fn publish(&self, manifest: &Manifest) -> Result<Sequence> {
        let Manner { key, memory, plan, .. } = self.manner;
        let (hub, host, number) = (self.hub, self.host, manifest.release.sequence);
        let new = signed(manifest, *key)?;
        hub.publish(manifest, &new, self.old.as_ref().map(|(_, signed)| signed))?;
        // it is published all the same
        let noted = memory.note(host, number).and_then(|()| memory.vouch(host, &new, *key));
        noted.and_then(|()| history::note_in_turn(hub, host, plan.as_ref())).or_warn();
        Ok(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::MANIFEST;
    use crate::fleet::hub::host_state::tests::manifest;
    use crate::run::hold::Hold;
    use crate::testing::Directory;

    #[test]
    fn a_host_that_is_held_while_it_is_built_gets_nothing() {
        let place = Directory::new();
        let hub = ServedDirectory::new(place.path()).unwrap();
        let host = HostName::try_from("web").unwrap();
        let archive = place.path().join("archive");
        fs::create_dir_all(hub.release(&host)).unwrap();
        fs::create_dir_all(hub.rollout()).unwrap();
        fs::write(&archive, "x").unwrap();
        let built = Built {
            name: host.clone(),
            attr: None,
            sha256: Sha256::try_from("0".repeat(64)).unwrap(),
            size: 1,
            toplevel: serde_json::from_value(format!("/nix/store/{}-x", "0".repeat(32)).into()).unwrap(),
            wave: 0,
            silent_after: 0,
        };
        let (origin, memory) = (Provenance::default(), Memory::default());
        let (holds, plan, waves, scratch) = (Holds::default(), None, false, Temporary::below(place.path()).unwrap());
        let manner =
            Manner { build: true, key: None, unsigned: false, no_key: "", lasting: None, origin, memory, holds, plan, waves, scratch };
        let publish = |hold: Option<Hold>| {
            let before = Standing::that_may_be_replaced(&hub, &host, &manner).unwrap();
            let build = || hold.as_ref().map_or(Ok(()), |hold| Holds::change(&hub, |holds| holds.put(Some(&host), hold.clone())));
            before.replace(&built, &archive, &build).unwrap()
        };
        let held = publish(Some(Hold { since: 0, until: u64::MAX, by: "alice".into(), reason: String::new() }));
        assert_eq!((held.new, &*held.said), (false, "held by alice"));
        assert!(hub.valid_manifest(&host).unwrap().is_none());
        Holds::change(&hub, |holds| holds.end(Some(&host))).unwrap();
        assert!(publish(None).new);
        // what another one has published, whose clock is ahead, is followed by a higher number
        let release = Release { sequence: (now() + 100).try_into().unwrap(), ..manifest().release };
        let others = Manifest { release, ..manifest() };
        files::write_json(&hub.release(&host).join(MANIFEST), &signed(&others, None).unwrap(), 0o644).unwrap();
        assert!(publish(None).new);
        assert!(hub.valid_manifest(&host).unwrap().unwrap().0.release.sequence > others.release.sequence);
    }
}
