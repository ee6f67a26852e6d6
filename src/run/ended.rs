//! A run that has ended, as the status remembers it.

use serde::{Deserialize, Serialize};

use crate::run::journal::Run;
use crate::run::{Outcome, Release, Stage, Trigger};
use crate::system::now;

/// A run that has ended.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Ended {
    /// The identifier that systemd gave it.
    pub id: String,
    /// How.
    pub result: Outcome,
    /// Why it began.
    pub trigger: Trigger,
    /// Who or what has asked for it.
    pub by: Vec<String>,
    /// The highest number of a request that it was for.
    pub request: Option<u64>,
    /// When it began, in seconds since 1970.
    pub started: u64,
    /// When it ended.
    pub finished: u64,
    /// What it proposed to run.
    pub commit: Option<String>,
    /// The commit that was to be undone.
    pub undid: Option<String>,
    /// The commit that this was, or was made from: one that others know.
    pub base: Option<String>,
    /// What was new in it.
    pub summary: Option<String>,
    /// The same in detail, a line each.
    pub news: Vec<String>,
    /// How the new system differs from what ran, a line each.
    pub changes: Vec<String>,
    /// The release of a fleet's hub that this was, or was made from.
    pub release: Option<Release>,
    /// In which stage it failed.
    pub stage: Option<Stage>,
    /// Why it failed.
    pub error: Option<String>,
    /// Whether nothing was tried: what it proposes is known to be bad.
    pub refused: bool,
    /// What to know all the same.
    pub warnings: Vec<String>,
    /// Whether the machine runs the new system only after a reboot.
    pub reboot_needed: bool,
    /// How long its stages took, in seconds.
    pub stages: Vec<(Stage, u64)>,
}

impl Ended {
    /// The end of `run`, now.
    pub fn new(run: &Run, result: Outcome) -> Self {
        let (notes, failure, proposal) = (run.notes.as_ref(), run.failure.as_ref(), run.proposal());
        Self {
            id: run.id.to_string(),
            result,
            trigger: run.trigger,
            by: run.by.clone(),
            request: run.request,
            started: run.started,
            finished: now(),
            commit: proposal.map(|proposal| proposal.commit.to_string()),
            undid: run.undoes.as_ref().map(|undone| undone.commit.clone()),
            base: proposal.map(|proposal| proposal.base.to_string()),
            summary: proposal.map(|proposal| proposal.summary.clone()),
            news: proposal.map(|proposal| proposal.news.clone()).unwrap_or_default(),
            changes: notes.map(|notes| notes.changes.clone()).unwrap_or_default(),
            release: notes.and_then(|notes| notes.release.clone()),
            stage: failure.map(|failure| failure.stage),
            error: failure.map(|failure| failure.message.clone()),
            warnings: run.warnings.clone(),
            reboot_needed: run.reboot_needed,
            ..Self::default()
        }
    }

    /// Whether it has found nothing to do.
    pub fn is_idle(&self) -> bool {
        matches!(self.result, Outcome::Unchanged | Outcome::Drifted | Outcome::Withheld)
    }
}

/// The run that has served a request: of these, the last one first, the first that was for it and has come to its end.
pub fn serving(runs: &[Ended], number: u64) -> Option<&Ended> {
    runs.iter().rfind(|run| run.request >= Some(number) && run.result != Outcome::StartedOver)
}

/// How long the stages took that have begun then; when the build has, the user's notes say.
pub fn durations(mut begun: Vec<(Stage, u64)>, run: &Run, finished: u64) -> Vec<(Stage, u64)> {
    let end = begun.get(1).map_or(finished, |(_, next)| *next);
    let build = run.notes.as_ref().and_then(|notes| notes.build_began).filter(|began| (run.started..=end).contains(began));
    if let (Some(build), Some((Stage::Prepare, _))) = (build, begun.first()) {
        begun.insert(1, (Stage::Build, build));
    }
    let ends: Vec<_> = begun.iter().skip(1).map(|(_, next)| *next).chain([finished]).collect();
    begun.iter().zip(ends).map(|((stage, began), end)| (*stage, end.saturating_sub(*began))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_served_by_one_run_whatever_follows() {
        let run = |id: &str, request, result| Ended { id: id.into(), request, result, ..Ended::default() };
        let runs = [
            run("timer", None, Outcome::Unchanged),
            run("next", Some(7), Outcome::Failed),
            run("it", Some(5), Outcome::Deployed),
            run("over", Some(4), Outcome::StartedOver),
            run("earlier", Some(3), Outcome::Failed),
        ];
        for (number, id) in [(3, Some("earlier")), (4, Some("it")), (5, Some("it")), (6, Some("next")), (8, None)] {
            assert_eq!(serving(&runs, number).map(|run| &*run.id), id, "{number}");
        }
    }
}
