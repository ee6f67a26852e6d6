//! Roll-outs by hand: what is held, what goes on, and what is published again.

use std::process::ExitCode;

use crate::config::Wave;
use crate::error::{Context, Error, OrLog, Result};
use crate::fleet::Provenance;
use crate::fleet::hub::command::{Fleet, exit, print};
use crate::fleet::hub::holds::{Holds, OPEN, said};
use crate::fleet::hub::plan;
use crate::fleet::hub::publish::{self, Manner};
use crate::fleet::hub::repository::{Host, select};
use crate::fleet::hub::rollout::{self, Rollout};
use crate::fleet::hub::{collect, history};
use crate::names::{HostName, Sequence};
use crate::run::hold::Hold;
use crate::run::{asker, holding};
use crate::system::now;

impl Fleet<'_> {
    /// The waves of `fleet.json`, and which host is in which; `some` if there may be other hosts.
    pub(super) fn waves(&self, hosts: &[Host], some: bool) -> Result<(Vec<Wave>, Vec<usize>)> {
        if self.settings.waves.is_empty() {
            return Err("fleet.json has no waves").context(|| "publish in waves".into());
        }
        let known: Vec<_> = hosts.iter().map(|host| &host.name).collect();
        plan::assign(&self.settings.waves, &self.settings.groups, &known, some)
    }

    /// Has nothing new be published for hosts, or no further wave begin, until that is over.
    pub(super) fn hold(&self, wanted: &[&str]) -> Result<ExitCode> {
        let given = |option| self.arguments.options.get(option).copied();
        let until = given("--for").map(holding::seconds).transpose()?.map_or(OPEN, |span| now() + span);
        let hold = Hold { since: now(), until, by: asker::this_user(), reason: given("--reason").unwrap_or_default().to_owned() };
        self.change(wanted, &said(&hold), |holds, host, _| holds.put(host, hold.clone()))
    }

    /// Ends that; has a roll-out that was stopped go on, whoever has failed until now, and one that was not also without a
    /// host of this wave that is well.
    pub(super) fn resume(&self, wanted: &[&str]) -> Result<ExitCode> {
        let said = if wanted.is_empty() { "goes on" } else { "not held" };
        self.change(wanted, said, |holds, host, rollout| {
            holds.end(host);
            // to end a hold is no word on hosts
            let meant = rollout.filter(|rollout| rollout.headway.stopped.is_some() || rollout.holds.of(None).is_none());
            holds.resumed = meant.map(|rollout| rollout.headway.stop()).or(holds.resumed.take());
        })
    }

    /// Changes what is held of hosts, or of the roll-out if none are named; says so in these words.
    fn change(&self, wanted: &[&str], said: &str, change: impl Fn(&mut Holds, Option<&HostName>, Option<&Rollout>)) -> Result<ExitCode> {
        collect::take_in(&self.hub, wanted, None, true)?;
        if wanted.is_empty() {
            let rollout = self.rollout_or_hold()?;
            Holds::change(&self.hub, |holds| change(holds, None, rollout.as_ref()))?;
            return print(&format!("roll-out: {said}\n"));
        }
        let hosts = select(self.hub.hosts()?, |name| name, wanted)?;
        Holds::change(&self.hub, |holds| hosts.iter().for_each(|host| change(holds, Some(host), None)))?;
        print(&hosts.iter().map(|host| format!("{host}: {said}\n")).collect::<Vec<_>>().concat())
    }

    pub(super) fn rollout(&self) -> Result<Rollout> {
        let rollout = Rollout::read(&self.hub)?.filter(|rollout| !rollout.headway.done);
        let how = if self.arguments.words == ["abort"] { "" } else { "name hosts, or " };
        rollout.ok_or_else(|| Error::new(format!("Failed to find a roll-out: none is under way; {how}see ekiben fleet deploy --waves")))
    }

    /// The same; none where the hold of one is left that is over, or whose end was cut off.
    fn rollout_or_hold(&self) -> Result<Option<Rollout>> {
        let is_held = Holds::read(&self.hub)?.of(None).is_some();
        self.rollout().map(Some).or_else(|error| if is_held { Ok(None) } else { Err(error) })
    }

    /// Ends the roll-out, and publishes again what hosts have run well before it.
    pub(super) fn abort(&self) -> Result<ExitCode> {
        let _turn = self.hub.turn()?;
        collect::take_in(&self.hub, &[], Some(history::FILE), true)?;
        let plan = self.rollout_or_hold()?.map(|rollout| rollout.plan);
        let manner = self.manner(Provenance::default())?;
        // before anything is published: what is cut off in between is done by the next one, and no wave begins meanwhile
        let hold = Hold { since: now(), until: OPEN, by: asker::this_user(), reason: "abort".into() };
        Holds::change(&self.hub, |holds| holds.put(None, hold))?;
        let mut well = true;
        for member in plan.iter().flat_map(|plan| &plan.hosts) {
            // by whatever number: it may have been renewed since
            let sees = self.hub.valid_manifest(&member.host)?.map(|(manifest, _)| manifest.release.id);
            if sees.as_ref() == Some(&member.release.id) && member.is_new() {
                well &= self.publish_again(&member.host, member.good, &manner)?;
            }
        }
        if well {
            rollout::end(&self.hub, plan.as_ref())?;
            Holds::change(&self.hub, |holds| holds.end(None))?;
            print("roll-out: ended\n")?;
        }
        Ok(exit(well))
    }

    /// Publishes the release of this number again.
    pub(super) fn again(&self, number: &str, wanted: &[&str]) -> Result<ExitCode> {
        let number = number.parse::<u64>().map_err(|_| format!("expected a number, found {number:?}"));
        let number = number.and_then(Sequence::try_from).context(|| "understand --again".into())?;
        let _turn = self.hub.turn()?;
        collect::take_in(&self.hub, wanted, Some(history::FILE), true)?;
        let manner = self.manner(Provenance::default())?;
        let mut hosts = select(self.hub.hosts()?, |name| name, wanted)?;
        if wanted.is_empty() {
            hosts.retain(|host| history::find(&self.hub, host, number).is_ok_and(|found| found.is_some()));
            if hosts.is_empty() {
                return Err(Error::new(format!("Failed to find release {number}: no host has had it; see ekiben fleet history")));
            }
        }
        let mut well = true;
        for host in &hosts {
            well &= self.publish_again(host, Some(number), &manner)?;
        }
        Ok(exit(well))
    }

    /// The same for one host; whether that went well.
    fn publish_again(&self, host: &HostName, number: Option<Sequence>, manner: &Manner) -> Result<bool> {
        let publish = || -> Result<String> {
            let number = number.ok_or("nothing is known to have run there before").context(|| format!("publish for {host}"))?;
            let found = history::find(&self.hub, host, number)?;
            let found =
                found.ok_or_else(|| Error::new(format!("Failed to find release {number} of {host}: see ekiben fleet history {host}")))?;
            let new = publish::again(&self.hub, &found, manner)?;
            let from = found.manifest.origin.short();
            let from = if from.is_empty() { from } else { format!(", of {from}") };
            Ok(format!("release {new} published: {number} again{from}"))
        };
        let said = manner.holds.said(host).map_or_else(publish, Ok).or_error();
        said.map_or(Ok(false), |said| print(&format!("{host}: {said}\n")).map(|_| true))
    }
}
