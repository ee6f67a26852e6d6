//! How the hosts of a roll-out do with their releases, by what each is offered and what it has said since.

use std::time::{Duration, SystemTime};

use crate::error::{OrLog, Result};
use crate::fleet::Manifest;
use crate::fleet::hub::holds::Holds;
use crate::fleet::hub::host_state::{FAILING, Heard, HostState};
use crate::fleet::hub::plan::{Member, Plan};
use crate::fleet::hub::served::ServedDirectory;
use crate::names::Sequence;
use crate::run::Release;
use crate::system::seconds;

/// How a host does with its release.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Health {
    /// It has not been offered it.
    Waits,
    /// Nor can it be: it is gone.
    Lost,
    /// It has not tried it yet.
    Pending,
    /// It has been silent since before, or somebody there has it held.
    Silent,
    /// It has fetched it, and has been silent since.
    Gone,
    Well,
    Failed(HostState),
    /// It is offered something else.
    Out,
    /// Nothing is published for it now.
    Held,
}

/// A host of a plan, its health, when what that follows from has arrived, in seconds since 1970, and which number it is offered.
pub type Seen<'a> = (&'a Member, Health, u64, Option<Sequence>);

/// How a host does, by what it is offered since when, and by what it said when.
pub fn health(member: &Member, offered: Option<(&Manifest, SystemTime)>, heard: Option<&Heard>, now: SystemTime) -> Health {
    // by whatever later number: another release proves nothing of this one
    let is_meant = |release: &Release| release.id == member.release.id && release.sequence >= member.release.sequence;
    let Some((manifest, since)) = offered.filter(|(manifest, _)| is_meant(&manifest.release)) else {
        let is_as_before = offered.map(|(manifest, _)| &manifest.release) == member.before.as_ref();
        return if is_as_before { Health::Waits } else { Health::Out };
    };
    let state = HostState::of(Some(manifest), heard, Duration::from_secs(member.silent_after), now);
    let Some((heartbeat, arrived)) = heard else { return Health::Silent };
    let mut has = [&heartbeat.running, &heartbeat.seen, &heartbeat.deployed].into_iter().flatten();
    match state {
        _ if state.is_deployed() => Health::Well,
        // what it said before is about something else
        _ if state.trouble() == FAILING && *arrived > since => Health::Failed(state),
        HostState::Silent if has.any(|release| *release == manifest.release) => Health::Gone,
        HostState::Silent => Health::Silent,
        _ if heartbeat.held.is_some() => Health::Silent,
        _ => Health::Pending,
    }
}

/// How all hosts of a plan do; the hub hears them without a gap since then, in seconds since 1970.
pub fn seen<'a>(hub: &ServedDirectory, plan: &'a Plan, holds: &Holds, hears_since: u64) -> Result<Vec<Seen<'a>>> {
    let served = hub.hosts()?;
    let look = |member: &'a Member| -> Result<Seen<'a>> {
        let host = &member.host;
        let manifest = hub.manifest(host)?.and_then(Result::ok).map(|(manifest, _)| manifest);
        let heard = hub.heartbeat(host)?;
        let (changed, now) = (hub.changed(host)?, SystemTime::now());
        // by a clock that was ahead: nobody knows when
        let changed = changed.map(|changed| if changed > now { SystemTime::UNIX_EPOCH } else { changed });
        let offered = manifest.as_ref().zip(changed);
        let health = match health(member, offered, heard.as_ref(), now) {
            health @ (Health::Well | Health::Out) => health,
            _ if holds.of(Some(host)).is_some() => Health::Held,
            Health::Waits if hub.has_lost(host, &member.release) => Health::Lost,
            // it may have spoken to nobody
            Health::Silent | Health::Gone if seconds(now) < hears_since.saturating_add(member.silent_after) => Health::Pending,
            health => health,
        };
        Ok((member, health, heard.map_or(0, |(_, arrived)| seconds(arrived)), offered.map(|(manifest, _)| manifest.release.sequence)))
    };
    let mut all = Vec::new();
    for member in plan.hosts.iter().filter(|member| served.contains(&member.host)) {
        // what cannot be read holds up its wave, and no other host
        all.push(look(member).or_warn().unwrap_or((member, Health::Pending, 0, None)));
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::Heartbeat;
    use crate::fleet::hub::host_state::tests::{heartbeat, last, manifest, release};
    use crate::run::Outcome;
    use crate::run::hold::Hold;
    use Health::{Failed, Gone, Out, Pending, Silent, Waits, Well};
    use HostState::RolledBack;
    use std::time::UNIX_EPOCH;

    fn member() -> Member {
        let host = "web".try_into().unwrap();
        Member { host, wave: 0, release: release(2), before: Some(release(1)), good: None, silent_after: 100 }
    }

    fn hold() -> Hold {
        Hold { since: 0, until: u64::MAX, by: "alice".into(), reason: String::new() }
    }

    #[test]
    fn how_a_host_does_follows_from_what_it_said_since_it_was_offered_that() {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        // 3 is another release, and 4 is 2 by another number
        let release = |sequence| Release { id: release(if sequence == 4 { 2 } else { sequence }).id, ..release(sequence) };
        let heartbeat = |sequence| Heartbeat { deployed: Some(release(sequence)), ..heartbeat(1) };
        let offered = |sequence: u64| Manifest { release: release(sequence), expires: None, ..manifest() };
        let of = |sees: Option<u64>, heard: Option<(&Heartbeat, u64)>| {
            let (sees, heard) = (sees.map(offered), heard.map(|(beat, arrived)| (beat.clone(), at(arrived))));
            health(&member(), sees.as_ref().map(|sees| (sees, at(1060))), heard.as_ref(), at(1150))
        };
        let failed = |number| Heartbeat { last: Some(last(Some(release(number)), Outcome::RolledBack)), ..heartbeat(1) };
        let refused = Heartbeat { refused: Some("x".into()), ..heartbeat(1) };
        for (expected, sees, heard, arrived) in [
            (Waits, Some(1), heartbeat(1), 1100),
            (Waits, Some(1), failed(1), 1100),
            (Out, None, heartbeat(1), 1100),
            (Pending, Some(2), heartbeat(1), 1100),
            (Well, Some(2), heartbeat(2), 1100),
            (Failed(RolledBack), Some(2), failed(2), 1100),
            (Pending, Some(2), failed(1), 1100),
            // before it could see it
            (Pending, Some(2), refused.clone(), 1060),
            (Failed(HostState::Refusing), Some(2), refused, 1100),
            // silent, with and without it
            (Silent, Some(2), heartbeat(1), 1049),
            (Gone, Some(2), heartbeat(2), 1049),
            (Gone, Some(2), Heartbeat { seen: Some(release(2)), ..heartbeat(1) }, 1049),
            (Silent, Some(2), Heartbeat { held: Some(hold()), ..heartbeat(1) }, 1100),
            // the same by a later number is as good; another one is not
            (Well, Some(4), heartbeat(4), 1100),
            (Pending, Some(4), heartbeat(2), 1100),
            (Out, Some(3), heartbeat(3), 1100),
            (Out, Some(3), heartbeat(2), 1100),
        ] {
            assert_eq!(of(sees, Some((&heard, arrived))), expected, "{heard:?} {arrived}");
        }
        assert_eq!(of(Some(2), None), Silent);
    }
}
