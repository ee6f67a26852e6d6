//! A roll-out in waves: everything is built and signed at the beginning, and a wave's hosts are offered their releases when
//! those of the wave before have been healthy for a while.
//!
//! Whoever publishes writes the plan, people what is held, and the hub, where nobody else can write, how far it has come: each
//! file has one writer, and is replaced in one step. The order is: archives and signed manifests, beside those that hosts see;
//! the plan; then each host's by a rename. What is cut off before the plan changes nothing, after it the hub goes on when it
//! collects next. A host that has been published for since sees something else than the plan says, and is passed over.

use crate::config::Wave;
use crate::error::Result;
use crate::fleet::hub::headway::Headway;
use crate::fleet::hub::health::{Health, Seen, seen};
use crate::fleet::hub::holds::{Holds, said};
use crate::fleet::hub::plan::{Member, Plan};
use crate::fleet::hub::served::ServedDirectory;
use crate::fleet::hub::{history, snapshot};
use crate::fleet::{FORMAT, Provenance};
use crate::run::hold::moment;
use crate::system::{now, uuid};
use crate::{files, text};

/// How many of those that have failed are named.
const NAMED: usize = 3;

/// All that there is to know of it.
pub struct Rollout {
    pub plan: Plan,
    pub holds: Holds,
    pub headway: Headway,
}

/// Begins to roll out what was placed, in the place of what a plan says, unless that is the same; the first wave sees its
/// releases, if the hub is here.
pub fn propose(hub: &ServedDirectory, old: Option<&Plan>, origin: &Provenance, waves: Vec<Wave>, hosts: Vec<Member>) -> Result<()> {
    let is_there = match old {
        Some(old) => old.waves == waves && old.hosts == hosts,
        None => !hosts.iter().any(Member::is_new),
    };
    if is_there {
        return Ok(());
    }
    let plan = Plan { format: FORMAT, id: uuid()?, origin: origin.clone(), waves, hosts };
    supersede(hub, &plan, old)?;
    let holds = Holds::read(hub)?;
    if hub.elsewhere().is_none() && holds.of(None).is_none() {
        for member in plan.hosts.iter().filter(|member| member.wave == 0 && holds.of(Some(&member.host)).is_none()) {
            offer(hub, &plan, member)?;
        }
    }
    Ok(())
}

/// Ends a roll-out.
pub fn end(hub: &ServedDirectory, plan: Option<&Plan>) -> Result<()> {
    if plan.is_some() { supersede(hub, &Plan::default(), plan) } else { Ok(()) }
}

/// Puts a plan in the place of another one.
fn supersede(hub: &ServedDirectory, plan: &Plan, other: Option<&Plan>) -> Result<()> {
    plan.replace(hub)?;
    for old in other.iter().flat_map(|other| &other.hosts) {
        if plan.get(&old.host).is_none_or(|new| new.release != old.release) {
            hub.forget_next(&old.host, &old.release)?;
        }
    }
    Ok(())
}

/// Has a host see its release, unless it sees something new.
fn offer(hub: &ServedDirectory, plan: &Plan, member: &Member) -> Result<()> {
    let host = &member.host;
    if hub.follow(host, &member.release, member.before.as_ref())? {
        return history::note_in_turn(hub, host, Some(plan));
    }
    log::warn!("{host} is passed over: what was planned for it has been replaced or removed.");
    Ok(())
}

/// Goes on as far as that can be: returns the hosts that are to be offered their releases now.
pub fn step<'a>(plan: &Plan, holds: &Holds, headway: &mut Headway, seen: &[Seen<'a>]) -> Vec<&'a Member> {
    if headway.done {
        return Vec::new();
    }
    let mut is_resumed = false;
    if holds.resumed.as_ref() == Some(&headway.stop()) {
        is_resumed = headway.stopped.take().is_some();
        headway.waived = headway.wave + 1;
    }
    loop {
        let current = headway.wave;
        let (mut failed, mut pending, mut well, mut left) = (vec![Vec::new(); current + 1], 0, 0, 0);
        for &(member, ref health, arrived, offered) in seen {
            let (host, wave) = (&member.host, member.wave);
            if wave > current {
                continue;
            }
            let since = headway.since(host, offered, arrived).or_else(|| (*health == Health::Well).then_some(arrived));
            headway.healthy.extend(since.zip(offered).map(|(since, number)| (host.clone(), (number, since))));
            left += usize::from(wave == current && *health != Health::Out);
            let has_soaked = since.is_some_and(|since| arrived >= since.saturating_add(plan.waves[wave].soak));
            let mut fails = |how: String| {
                headway.healthy.remove(host);
                if is_resumed {
                    headway.forgiven.push(host.clone());
                }
                if !headway.forgiven.contains(host) {
                    failed[wave].push(format!("{host} {how}"));
                }
            };
            match health {
                Health::Failed(state) => fails(format!("is {state}")),
                Health::Lost => fails("can no longer get its release: deploy again".into()),
                Health::Gone if !has_soaked => fails("has been silent since it has got the release".into()),
                Health::Well | Health::Gone if has_soaked => well += usize::from(wave == current),
                Health::Silent | Health::Held if !plan.waves[wave].wait_for_silent => {}
                Health::Out => {}
                _ => pending += usize::from(wave == current),
            }
        }
        is_resumed = false;
        let takes_part = plan.hosts.iter().any(|member| member.wave == current);
        let too_many = failed.iter().enumerate().find(|(wave, failed)| failed.len() > plan.waves[*wave].may_fail);
        let why = match too_many {
            Some((wave, failed)) => {
                let more = if failed.len() > NAMED { format!(", and {} more", failed.len() - NAMED) } else { String::new() };
                Some(format!("wave {}: {}{more}", wave + 1, failed[..failed.len().min(NAMED)].join(", ")))
            }
            None if !takes_part && headway.waived <= current => Some(format!("wave {}: none of its hosts could be published", current + 1)),
            None => None,
        };
        if let (Some(why), None) = (why, &headway.stopped) {
            headway.stopped = Some(why);
            headway.stops += 1;
        }
        if headway.stopped.is_some() || holds.of(None).is_some() {
            return Vec::new();
        }
        let is_next = |(member, health, ..): &&Seen| *health == Health::Waits && member.wave <= current;
        let next: Vec<_> = seen.iter().filter(is_next).map(|seen| seen.0).collect();
        let is_last = current + 1 == plan.waves.len();
        // of the last one, nobody need be well if all have got something else
        let is_proved = well > 0 || headway.waived > current || is_last && left == 0;
        if !next.is_empty() || pending > 0 || !is_proved {
            return next;
        }
        if is_last {
            // who is held is waited for here: it may have to be offered its release
            headway.done = !seen.iter().any(|(_, health, ..)| *health == Health::Held);
            return Vec::new();
        }
        headway.wave += 1;
    }
}

/// Begins the next wave if it is time for that; the hub does, each time that it has collected.
pub fn advance(hub: &ServedDirectory) -> Result<()> {
    // whoever publishes may be about to replace the plan
    let Some(_turn) = hub.turn_if_free()? else {
        log::info!("The roll-out waits: somebody is publishing.");
        return Ok(());
    };
    // of what is over, no host need be looked at
    let Some(Rollout { plan, holds, mut headway }) = Rollout::read(hub)?.filter(|rollout| !rollout.headway.done) else { return Ok(()) };
    let was_stopped = headway.stopped.is_some();
    let hears_since = snapshot::hears_since(&hub.collected());
    let seen = seen(hub, &plan, &holds, hears_since)?;
    headway.hear_since(hears_since, &plan, &seen);
    let next = step(&plan, &holds, &mut headway, &seen);
    if let Some(why) = headway.stopped.as_ref().filter(|_| !was_stopped) {
        log::error!("The roll-out of {} is stopped in {why}.", plan.origin.short());
    }
    files::put_json(&Headway::file(hub), &headway, 0o644)?;
    // trouble with one does not keep the others waiting
    next.into_iter().map(|member| offer(hub, &plan, member)).fold(Ok(()), Result::and)
}

impl Rollout {
    /// The one that has been begun last, if nothing has been published since for all hosts at once.
    pub fn read(hub: &ServedDirectory) -> Result<Option<Self>> {
        let Some(plan) = Plan::read(hub) else { return Ok(None) };
        let headway = Headway::read(hub)?.with(&plan);
        Ok(Some(Self { plan, holds: Holds::read(hub)?, headway }))
    }

    /// Where it stands, in a line; none if it is at its end.
    pub fn line(&self, hub: &ServedDirectory) -> Result<Option<String>> {
        let Self { plan, holds, headway } = self;
        if headway.done {
            return Ok(None);
        }
        let (wave, all) = (headway.wave, plan.waves.len());
        let seen = seen(hub, plan, holds, headway.hears_since)?;
        let ours = || seen.iter().filter(|(member, ..)| member.wave == wave);
        let count = |wanted: &[Health]| ours().filter(|(_, health, ..)| wanted.contains(health)).count();
        let since = ours().filter_map(|&(member, _, arrived, offered)| headway.since(&member.host, offered, arrived));
        let ready = since.map(|since| since.saturating_add(plan.waves[wave].soak)).max();
        let stands = match (&headway.stopped, holds.of(None)) {
            (Some(why), _) => format!("stopped in {why}; ekiben fleet resume, or abort"),
            (None, Some(hold)) => format!("wave {} of {all}: {}; ekiben fleet resume, or abort", wave + 1, said(hold)),
            (None, None) => {
                let held = seen.iter().filter(|(member, health, ..)| member.wave <= wave && *health == Health::Held).count();
                let (well, silent) = (count(&[Health::Well]), count(&[Health::Silent, Health::Gone]) + held);
                let silent = if silent > 0 { format!(", {silent} silent or held") } else { String::new() };
                let soaks = ready.filter(|ready| *ready > now() && count(&[Health::Waits, Health::Pending]) == 0);
                let soaks = soaks.map_or(String::new(), |ready| format!("; soaks until {}", moment(ready)));
                let is_stuck = well == 0 && headway.waived <= wave && count(&[Health::Waits, Health::Pending]) == 0;
                let go_on = if is_stuck { "; ekiben fleet resume, to go on without" } else { "" };
                format!("wave {} of {all}: {well} of {} healthy{silent}{soaks}{go_on}", wave + 1, ours().count())
            }
        };
        let origin = plan.origin.short();
        let of = if origin.is_empty() { String::new() } else { format!(" of {origin}") };
        Ok(Some(text::line(&format!("roll-out{of}: {stands}"))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::hub::host_state::HostState;
    use crate::fleet::hub::host_state::tests::release;
    use crate::names::HostName;
    use crate::run::hold::Hold;

    fn name(name: &str) -> HostName {
        name.try_into().unwrap()
    }

    fn wave(hosts: &[&str], soak: u64, may_fail: usize, wait_for_silent: bool) -> Wave {
        Wave { hosts: hosts.iter().map(ToString::to_string).collect(), soak, may_fail, wait_for_silent }
    }

    fn member(host: &str, wave: usize) -> Member {
        Member { host: name(host), wave, release: release(2), before: Some(release(1)), good: None, silent_after: 100 }
    }

    fn hold() -> Hold {
        Hold { since: 0, until: u64::MAX, by: "alice".into(), reason: String::new() }
    }

    /// A plan, and what has become of it.
    struct Story {
        plan: Plan,
        holds: Holds,
        headway: Headway,
        /// The number that all are offered.
        offered: u64,
        /// Since when the hub hears them.
        hears_since: u64,
    }

    impl Story {
        fn new(waves: &[Wave], hosts: &[(&str, usize)]) -> Self {
            let hosts = hosts.iter().map(|(host, wave)| member(host, *wave)).collect();
            let plan = Plan { format: FORMAT, id: "x".into(), origin: Provenance::default(), waves: waves.to_vec(), hosts };
            Self { plan, holds: Holds::default(), headway: Headway::default(), offered: 2, hears_since: 0 }
        }

        /// Who is offered something, by how hosts do, and by when that arrived.
        fn step(&mut self, seen: &[(&str, Health, u64)]) -> String {
            let members: Vec<_> = seen.iter().map(|(host, ..)| self.plan.get(&name(host)).unwrap().clone()).collect();
            let offered = self.offered.try_into().ok();
            let seen: Vec<_> =
                members.iter().zip(seen).map(|(member, (_, health, arrived))| (member, *health, *arrived, offered)).collect();
            self.headway = std::mem::take(&mut self.headway).with(&self.plan);
            self.headway.hear_since(self.hears_since, &self.plan, &seen);
            let next = step(&self.plan, &self.holds, &mut self.headway, &seen);
            next.iter().map(|member| member.host.to_string()).collect::<Vec<_>>().join(" ")
        }

        fn stopped(&self) -> &str {
            self.headway.stopped.as_deref().unwrap_or_default()
        }
    }

    use Health::{Failed, Gone, Held, Lost, Out, Pending, Silent, Waits, Well};
    use HostState::RolledBack;

    #[test]
    fn a_wave_begins_when_all_of_the_one_before_have_been_healthy_for_so_long() {
        let mut story = Story::new(&[wave(&["a", "b"], 10, 0, false), wave(&["*"], 0, 0, false)], &[("a", 0), ("b", 0), ("c", 1)]);
        assert_eq!(story.step(&[("a", Waits, 5), ("b", Waits, 5), ("c", Waits, 5)]), "a b");
        assert_eq!(story.step(&[("a", Pending, 6), ("b", Pending, 6), ("c", Waits, 5)]), "");
        assert_eq!(story.step(&[("a", Well, 20), ("b", Pending, 6), ("c", Waits, 5)]), "");
        // one has been for long enough, the other just now, and what has been heard once is no proof
        assert_eq!(story.step(&[("a", Well, 30), ("b", Well, 30), ("c", Waits, 5)]), "");
        assert_eq!(story.step(&[("a", Well, 30), ("b", Well, 39), ("c", Waits, 5)]), "");
        // what is told again and again does not move the beginning
        assert_eq!(story.step(&[("a", Gone, 30), ("b", Well, 40), ("c", Waits, 5)]), "c");
        assert!(!story.headway.done);
        assert_eq!(story.step(&[("a", Well, 30), ("b", Well, 40), ("c", Pending, 50)]), "");
        assert_eq!(story.step(&[("a", Well, 30), ("b", Well, 40), ("c", Well, 60)]), "");
        assert!(story.headway.done);
    }

    #[test]
    fn time_that_the_hub_was_away_or_its_clock_has_skipped_is_no_soak() {
        let hosts = [("a", 0), ("b", 0), ("c", 1)];
        let mut story = Story::new(&[wave(&["a", "b"], 10, 0, false), wave(&["*"], 0, 0, false)], &hosts);
        assert_eq!(story.step(&[("a", Well, 20), ("b", Well, 25), ("c", Waits, 5)]), "");
        // the one has soaked by then
        assert_eq!(story.step(&[("a", Well, 30), ("b", Well, 34), ("c", Waits, 5)]), "");
        story.hears_since = 1000;
        assert_eq!(story.step(&[("a", Pending, 30), ("b", Pending, 34), ("c", Waits, 5)]), "");
        assert_eq!(story.step(&[("a", Gone, 30), ("b", Well, 1003), ("c", Waits, 5)]), "");
        assert_eq!(story.step(&[("a", Gone, 30), ("b", Well, 1009), ("c", Waits, 5)]), "");
        assert_eq!(story.stopped(), "");
        // and back: what is to come proves nothing
        story.hears_since = 40;
        assert_eq!(story.step(&[("a", Pending, 30), ("b", Pending, 1009), ("c", Waits, 5)]), "");
        assert_eq!(story.step(&[("a", Well, 41), ("b", Well, 45), ("c", Waits, 5)]), "");
        assert_eq!(story.step(&[("a", Well, 41), ("b", Well, 55), ("c", Waits, 5)]), "c");
    }

    #[test]
    fn who_fails_stops_it_until_somebody_has_it_go_on() {
        let waves = [wave(&["a"], 10, 0, false), wave(&["b"], 10, 0, false), wave(&["*"], 0, 0, false)];
        for (how, said) in
            [(Failed(RolledBack), "wave 1: a is rolled back"), (Gone, "wave 1: a has been silent since it has got the release")]
        {
            let mut story = Story::new(&waves, &[("a", 0), ("b", 1), ("c", 2)]);
            story.step(&[("a", Well, 20), ("b", Waits, 5), ("c", Waits, 5)]);
            assert_eq!(story.step(&[("a", how, 25), ("b", Waits, 5), ("c", Waits, 5)]), "");
            assert_eq!(story.stopped(), said);
            // to be well again is not enough
            assert_eq!(story.step(&[("a", Well, 26), ("b", Waits, 5), ("c", Waits, 5)]), "");
            assert_eq!(story.step(&[("a", Well, 40), ("b", Waits, 5), ("c", Waits, 5)]), "");
            // neither is what was said of another stop, or of another plan
            for odd in ["x 0", "y 1"] {
                story.holds.resumed = Some(odd.into());
                assert_eq!(story.step(&[("a", Failed(RolledBack), 40), ("b", Waits, 5), ("c", Waits, 5)]), "");
            }
            story.holds.resumed = Some("x 1".into());
            assert_eq!(story.step(&[("a", Failed(RolledBack), 40), ("b", Waits, 5), ("c", Waits, 5)]), "b");
            // that counted for the failures until then
            assert_eq!(story.step(&[("a", Failed(RolledBack), 50), ("b", Failed(RolledBack), 50), ("c", Waits, 5)]), "");
            assert_eq!((story.stopped(), story.headway.stops), ("wave 2: b is rolled back", 2));
        }
        // of a wave that is over as well, before the next one
        let mut story = Story::new(&waves, &[("a", 0), ("b", 1), ("c", 2)]);
        story.step(&[("a", Well, 20), ("b", Waits, 5), ("c", Waits, 5)]);
        assert_eq!(story.step(&[("a", Well, 30), ("b", Waits, 5), ("c", Waits, 5)]), "b");
        assert_eq!(story.step(&[("a", Failed(RolledBack), 45), ("b", Well, 45), ("c", Waits, 5)]), "");
        assert_eq!(story.stopped(), "wave 1: a is rolled back");
    }

    #[test]
    fn some_may_fail_and_the_silent_hold_up_nothing_unless_they_shall() {
        let hosts = [("a", 0), ("b", 0), ("c", 1)];
        let mut story = Story::new(&[wave(&["a", "b"], 0, 1, false), wave(&["*"], 0, 0, false)], &hosts);
        assert_eq!(story.step(&[("a", Failed(RolledBack), 5), ("b", Well, 5), ("c", Waits, 5)]), "c");
        // none is well
        let mut story = Story::new(&[wave(&["a", "b"], 0, 1, false), wave(&["*"], 0, 0, false)], &hosts);
        assert_eq!(story.step(&[("a", Failed(RolledBack), 5), ("b", Silent, 5), ("c", Waits, 5)]), "");
        assert_eq!(story.stopped(), "");
        assert_eq!(story.step(&[("a", Failed(RolledBack), 5), ("b", Failed(RolledBack), 5), ("c", Waits, 5)]), "");
        assert_eq!(story.stopped(), "wave 1: a is rolled back, b is rolled back");
        for (waits, next) in [(false, "c"), (true, "")] {
            let mut story = Story::new(&[wave(&["a", "b"], 0, 0, waits), wave(&["*"], 0, 0, false)], &hosts);
            for how in [Silent, Held] {
                assert_eq!(story.step(&[("a", how, 5), ("b", Well, 5), ("c", Waits, 5)]), next);
            }
        }
        // somebody has published something else for one, and another could not be built
        let mut story = Story::new(&[wave(&["a"], 0, 0, false), wave(&["*"], 0, 0, false)], &[("a", 0), ("c", 1)]);
        assert_eq!(story.step(&[("a", Out, 5), ("c", Waits, 5)]), "");
        // in the last wave, it has nothing to prove to others
        let mut last = Story::new(&[wave(&["a"], 0, 0, false), wave(&["*"], 0, 0, false)], &[("a", 0), ("c", 1)]);
        assert_eq!(last.step(&[("a", Well, 5), ("c", Out, 5)]), "");
        assert!(last.headway.done);
        // to go on counts for the wave that it was said of
        for (said, next) in [("x 0 1", ""), ("x 0", ""), ("x 0 0", "c")] {
            let mut story = Story::new(&[wave(&["a"], 0, 0, false), wave(&["*"], 0, 0, false)], &[("a", 0), ("c", 1)]);
            story.holds.resumed = Some(said.into());
            assert_eq!(story.step(&[("a", Silent, 5), ("c", Waits, 5)]), next);
            story.step(&[("a", Failed(RolledBack), 5), ("c", Silent, 5)]);
            assert!(story.stopped().contains("a is rolled back") && !story.headway.done);
        }
        // what is to follow is gone
        let mut gone = Story::new(&[wave(&["a"], 0, 0, false), wave(&["*"], 0, 0, false)], &[("a", 0), ("c", 1)]);
        assert_eq!(gone.step(&[("a", Lost, 5), ("c", Waits, 5)]), "");
        assert_eq!(gone.stopped(), "wave 1: a can no longer get its release: deploy again");
        gone.holds.resumed = Some("x 1".into());
        assert_eq!(gone.step(&[("a", Lost, 5), ("c", Waits, 5)]), "c");
        story.plan.hosts.remove(0);
        assert_eq!(story.step(&[("c", Waits, 5)]), "");
        assert_eq!(story.stopped(), "wave 1: none of its hosts could be published");
        story.holds.resumed = Some("x 1".into());
        assert_eq!(story.step(&[("c", Waits, 5)]), "c");
    }

    #[test]
    fn what_is_held_is_passed_over_and_comes_when_that_is_over() {
        let mut story = Story::new(&[wave(&["a", "b"], 0, 0, false), wave(&["*"], 0, 0, false)], &[("a", 0), ("b", 0), ("c", 1)]);
        assert_eq!(story.step(&[("a", Well, 5), ("b", Held, 5), ("c", Waits, 5)]), "c");
        assert_eq!(story.step(&[("a", Well, 5), ("b", Waits, 5), ("c", Pending, 5)]), "b");
        // however late that is
        assert_eq!(story.step(&[("a", Well, 5), ("b", Held, 5), ("c", Well, 5)]), "");
        assert!(!story.headway.done);
        assert_eq!(story.step(&[("a", Well, 5), ("b", Waits, 5), ("c", Well, 5)]), "b");
        assert_eq!(story.step(&[("a", Well, 5), ("b", Well, 5), ("c", Well, 5)]), "");
        assert!(story.headway.done);
        let mut story = Story::new(&[wave(&["a"], 0, 0, false), wave(&["*"], 0, 0, false)], &[("a", 0), ("c", 1)]);
        story.holds.put(None, hold());
        assert_eq!(story.step(&[("a", Waits, 5), ("c", Waits, 5)]), "");
        assert_eq!(story.step(&[("a", Well, 5), ("c", Waits, 5)]), "");
        story.holds.end(None);
        assert_eq!(story.step(&[("a", Well, 5), ("c", Waits, 5)]), "c");
    }

    #[test]
    fn another_plan_begins_anew_and_knows_who_is_healthy_on_the_same_release() {
        let mut story = Story::new(&[wave(&["a"], 10, 0, false), wave(&["*"], 0, 0, false)], &[("a", 0), ("c", 1)]);
        story.step(&[("a", Well, 5), ("c", Waits, 5)]);
        story.step(&[("a", Failed(RolledBack), 6), ("c", Waits, 5)]);
        assert!(!story.stopped().is_empty());
        story.plan.id = "y".into();
        assert_eq!(story.step(&[("a", Well, 20), ("c", Waits, 5)]), "");
        story.plan.id = "z".into();
        assert_eq!(story.step(&[("a", Well, 30), ("c", Waits, 5)]), "c");
        // by a clock that was ahead
        story.headway.healthy.insert(name("a"), (2.try_into().unwrap(), 1000));
        story.plan.id = "after that".into();
        assert_eq!(story.step(&[("a", Well, 31), ("c", Waits, 5)]), "");
        assert_eq!(story.step(&[("a", Well, 41), ("c", Waits, 5)]), "c");
        story.plan.id = "another release".into();
        story.offered = 3;
        assert_eq!(story.step(&[("a", Well, 50), ("c", Waits, 5)]), "");
    }
}
