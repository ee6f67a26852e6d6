//! What the end of a run changes in what is known of its instance.

use crate::error::{Context, Result};
use crate::files;
use crate::names::RunId;
use crate::paths::Paths;
use crate::run::bad::Bad;
use crate::run::ended::{self, Ended};
use crate::run::journal::{Before, Phase, Run};
use crate::run::notes::Proposal;
use crate::run::status::{Awaiting, Deployed, Earlier, Status, Tried, all_deployed};
use crate::run::{Outcome, Stage, Trigger};
use crate::system::{self, now, service};

impl Status {
    /// Says how a run ended, and draws the conclusions for the next.
    pub fn report(paths: &Paths, run: &Run, mut ended: Ended) -> Result<()> {
        let _alone = paths.alone();
        let number = 1 + all_deployed(paths).iter().map(|deployed| deployed.number).max().unwrap_or(0);
        let mut status = Self::read(paths);
        // what has waited for a boot ends also while another run of the instance is under way
        let another = Run::load(paths.journal()).ok().flatten().filter(|other| other.id != run.id);
        let running = if another.is_some() { None } else { status.running.take() };
        ended.stages = ended::durations(running.map(|running| running.stages).unwrap_or_default(), run, ended.finished);
        // a run that has to be started over has served nobody
        if ended.result != Outcome::StartedOver {
            status.served = status.served.max(run.request.unwrap_or(0));
        }
        status.accepted = run.accepted.clone().or(status.accepted);
        let failure = run.failure.as_ref();
        if let Some(notes) = run.notes.as_ref().filter(|notes| notes.release.is_some()) {
            status.expires = notes.expires;
        }
        // not tried at all, because of what came of it before: that is what there is to know
        let is_refusal = failure.is_some_and(|failure| failure.stage == Stage::Prepare)
            && run.proposal().zip(status.bad.as_ref()).is_some_and(|(proposal, bad)| bad.is(proposal, &run.instance));
        ended.refused = is_refusal;
        // the rest of an earlier report has failed, and that counts once
        let is_again = status.runs.iter().any(|known| (&known.id, known.result) == (&ended.id, ended.result));
        if !is_again {
            status.follow(run, &ended, number);
        }
        let awaiting = run.candidate.clone().map(|system| Awaiting { commit: ended.commit.clone().unwrap_or_default(), system });
        status.awaiting = match ended.result {
            Outcome::AwaitingBoot => awaiting,
            _ => status.awaiting.filter(|_| !run.reboot_needed && paths.trial().exists()),
        };
        if ended.result == Outcome::RolledBack && ended.reboot_needed {
            status.unfit = run.candidate.clone().map(|system| (system::boot_id(), system));
        }
        if ended.release.is_some() && !is_again && !ended.is_idle() && ended.stage != Some(Stage::Prepare) {
            let earlier = status.tried.as_ref().filter(|tried| tried.run.release == ended.release);
            // what has waited for a boot since is the same one
            let count = earlier
                .map_or(1, |tried| tried.count + u32::from(tried.run.result != Outcome::AwaitingBoot && ended.result != Outcome::Restored));
            status.tried = Some(Tried { count, run: ended.clone() });
        }
        status.remember(ended);
        status.write(paths)?;
        if !is_again {
            tell(paths, &run.id);
        }
        if is_refusal { Ok(()) } else { keep_output(paths, failure.map_or(&[][..], |failure| &failure.tail)) }
    }

    /// Says that a run failed before it had a journal, unless it has been reported.
    pub fn report_unopened(paths: &Paths, run: &RunId, why: &str) -> Result<()> {
        let _alone = paths.alone();
        let mut status = Self::read(paths);
        status.running = None;
        let (id, mut started) = (run.to_string(), now());
        if let Some(last) = status.runs.first_mut() {
            if last.id == id {
                return Ok(());
            }
            if last.stage == Some(Stage::Begin) {
                // one of many attempts, which count once: since when
                (started, last.id) = (last.started, id.clone());
            }
        }
        let (result, trigger, stage, error) = (Outcome::Failed, Trigger::Timer, Some(Stage::Begin), Some(why.to_owned()));
        status.remember(Ended { id: id.clone(), result, trigger, started, finished: now(), stage, error, ..Ended::default() });
        // what is kept for the report of a run that has begun stays
        status.write_plainly(paths)?;
        tell(paths, &id);
        Ok(())
    }

    /// What is deployed, undone, or bad, after a run that has ended so; `number` is that of its deployment.
    fn follow(&mut self, run: &Run, ended: &Ended, number: u64) {
        let failure = run.failure.as_ref();
        match (ended.result, run.proposal()) {
            (Outcome::Deployed, Some(proposal)) => {
                let earlier = self.deployed.take().map(|deployed| Deployed { before: None, ..deployed });
                self.deployed = Some(deployed(run, ended, proposal, number, earlier));
                (self.bad, self.undone) = (None, None);
            }
            (Outcome::Unchanged | Outcome::Drifted, proposal) => {
                self.bad = None;
                // another instance has gone on
                let deployed = self.deployed.as_ref().map(|deployed| &*deployed.commit);
                self.undone.take_if(|_| proposal.map(|proposal| &*proposal.commit) != deployed);
            }
            (Outcome::Restored, _) if run.undoes.is_some() => {
                self.undone.clone_from(&run.undoes);
                if run.phase == Phase::Persisted {
                    self.deployed = self.deployed.take().and_then(|deployed| deployed.before?.deployed);
                }
            }
            (Outcome::AwaitingBoot, _) if run.undoes.is_some() => self.undone.clone_from(&run.undoes),
            // it had waited for a boot to be undone, and stays
            _ if run.undoes.is_some() && run.reboot_needed => self.undone = None,
            (Outcome::Failed | Outcome::RolledBack | Outcome::Stuck, Some(proposal))
                if failure.is_some_and(|failure| failure.stage != Stage::Prepare && !failure.transient) =>
            {
                let tries = 1 + self.bad.as_ref().filter(|bad| bad.is(proposal, &run.instance)).map_or(0, |bad| bad.tries);
                let (base, tree, commit) = (proposal.base.to_string(), proposal.tree.to_string(), proposal.commit.to_string());
                let (error, options) = (ended.error.clone().unwrap_or_default(), run.instance.clone());
                self.bad = Some(Bad { base, tree, options, commit, error, tries, tried: now() });
            }
            _ => {}
        }
    }
}

/// Has whoever wants to know be told of the end of a run.
fn tell(paths: &Paths, run: &str) {
    service::start_if_there(&format!("ekiben-notify-{}@{run}.service", paths.name()));
}

/// What a run has deployed, after what had been deployed `earlier`.
fn deployed(run: &Run, ended: &Ended, proposal: &Proposal, number: u64, earlier: Option<Deployed>) -> Deployed {
    let before = run.before.clone().map(|Before { system, generation, units, .. }| {
        let (unwell, passed) = (Some(&units.failed | &units.restless), run.passed.clone());
        Box::new(Earlier { system, generation, deployed: earlier, unwell, passed })
    });
    Deployed {
        commit: proposal.commit.to_string(),
        system: run.candidate.clone().unwrap_or_default(),
        flake_ref: run.instance.flake_ref.clone(),
        flags: run.instance.flags.clone(),
        number,
        release: ended.release.clone(),
        summary: ended.summary.clone(),
        not_booted_since: (!run.reboot_needed).then(system::boot_id),
        base: proposal.base.to_string(),
        tree: proposal.tree.to_string(),
        before,
    }
}

/// Keeps the end of a failing program's output for root; removes an earlier one's if there is none.
fn keep_output(paths: &Paths, tail: &[String]) -> Result<()> {
    let path = paths.output();
    if tail.is_empty() { files::remove(&path) } else { files::write(&path, (tail.join("\n") + "\n").as_bytes(), 0o600) }
        .doing("write", &path)
}
