//! The candidate's fate, as root has the instance's user carry it out: it becomes the branch, is kept for a boot, or goes.

use std::time::Duration;

use crate::error::{Context, Error, Result};
use crate::nix::profile;
use crate::paths::Paths;
use crate::program::Program;
use crate::run::journal::Run;
use crate::stages::branch::{Fate, MOVED};
use crate::system::{self, Turn, boot_id};

/// How long the way from a commit to the branch, a push included, may take; tests wait for it.
const SETTLE_LIMIT: Duration = Duration::from_secs(if cfg!(feature = "fault-points") { 20 } else { 600 });
/// How often the user's git is asked if it is killed or takes too long.
const TRIES: u32 = 3;
/// Before it is asked again.
const PAUSE: Duration = Duration::from_secs(1);

/// Makes the candidate the branch, if it is what this machine runs, before and after; false if the branch has moved.
pub fn accept(paths: &Paths, run: &mut Run, turn: &mut Option<Turn>) -> Result<bool> {
    if run.instance.publish.is_some() {
        // it is other machines that run it
        *turn = None;
        return settle(paths, run, Fate::Accept);
    }
    Turn::retake(turn)?;
    check_is_in_place(run)?;
    let settled = Turn::lend(turn, || settle(paths, run, Fate::Accept));
    Turn::retake(turn)?;
    let is_branch = settled?;
    if is_branch {
        check_is_in_place(run)?;
    }
    Ok(is_branch)
}

/// Fails unless the candidate runs and will be booted: another hand may have switched, or have booted something else.
pub fn check_is_in_place(run: &Run) -> Result<()> {
    let (next, current) = (profile::current_generation()?.map(|generation| generation.system), system::current()?);
    let has_booted = run.boot != boot_id();
    let wrong =
        [next.as_ref().filter(|next| run.candidate.as_ref() != Some(next)), Some(&current).filter(|current| !run.is_candidate(current))];
    let Some(other) = wrong.into_iter().flatten().next() else { return Ok(()) };
    let how = if has_booted && !run.reboot_needed { "booted" } else { "switched to" };
    Err(Error::new(format!("Failed to complete the switch: this machine has been {how} another system, {}", other.display())).transient())
}

/// Has the user's own git deal with the candidate; false if the branch has moved.
pub fn settle(paths: &Paths, run: &mut Run, fate: Fate) -> Result<bool> {
    // the configuration file may already know nothing of the instance
    let about = serde_json::to_string_pretty(&(&run.instance, run.proposal())).context(|| "write what the run is about".into())?;
    let doing = || format!("{fate} the candidate");
    let ask = || {
        let ourselves = Program::ourselves_as(&run.instance.user)?;
        let ended = ourselves.args(["candidate", &fate.to_string(), paths.name(), &about]).run(SETTLE_LIMIT, doing)?;
        let was_killed = ended.status.code().is_none();
        if was_killed { Err(Error::new(format!("Failed to {}: killed", doing())).with_tail(ended.tail)) } else { Ok(ended) }
    };
    // whatever it had done when it was killed or took too long: it may be asked again
    let mut answer = ask();
    for _ in 1..TRIES {
        let Err(error) = &answer else { break };
        log::warn!("{error}; trying again.");
        std::thread::sleep(PAUSE);
        answer = ask();
    }
    let ended = answer.map_err(Error::transient)?;
    if ended.status.code() == Some(i32::from(MOVED)) {
        return Ok(false);
    }
    let said = |level: &str| -> Vec<String> {
        let said = ended.tail.iter().filter_map(|line| line.strip_prefix(level));
        said.map(|line| line.strip_suffix('.').unwrap_or(line).into()).collect()
    };
    if ended.status.success() {
        run.warnings.extend(said("warning: "));
        if fate == Fate::Accept {
            run.accepted = run.proposal().map(|proposal| proposal.commit.to_string());
        }
        return Ok(true);
    }
    let error = said("error: ").pop().unwrap_or_else(|| format!("Failed to {}", doing()));
    // the candidate is not to blame
    Err(Error::new(error).with_tail(ended.tail).transient())
}
