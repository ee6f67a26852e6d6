//! What a client of the webhook may know of an instance: how it is, not why.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::error::{Context, Result};
use crate::paths::Paths;
use crate::run::ended::Ended;
use crate::run::hold::Hold;
use crate::run::published::{HostStanding, Published};
use crate::run::status::{Running, Status};
use crate::run::{Outcome, Stage};

/// An instance as whoever holds a token of it may know it: how it is, not why.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ForClients {
    /// Whether a request waits for a run.
    queued: bool,
    /// Why it waits, if nothing is deployed for now.
    hold: Option<Hold>,
    /// The run under way.
    running: Option<Running>,
    /// The highest number of a request that an ended run has served.
    served: u64,
    /// The run that ended last.
    last: Option<LastForClients>,
    /// What is known to be bad.
    bad: Option<KnownBad>,
    /// How the hosts stand, if it is a fleet that is published.
    #[serde(skip_serializing_if = "Option::is_none")]
    hosts: Option<BTreeMap<String, HostStanding>>,
}

/// A candidate that will not be tried again for now.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct KnownBad {
    commit: String,
    /// How often it has been tried.
    tries: u32,
    /// From when on a request has it tried again, in seconds since 1970.
    retry_after: u64,
}

/// How that run ended.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct LastForClients {
    result: Outcome,
    stage: Option<Stage>,
    commit: Option<String>,
    started: u64,
    finished: u64,
    reboot_needed: bool,
}

/// How an instance is, as JSON, for a client of the webhook.
pub fn for_clients(paths: &Paths) -> Result<String> {
    let path = paths.request();
    // before the status: a run that takes the request meanwhile shows there
    let queued = path.try_exists().context(|| format!("look for {}", path.display()))?;
    let Status { running, served, held, runs, bad, .. } = Status::read(paths);
    let bad = bad.map(|bad| KnownBad { retry_after: bad.retry_after(), commit: bad.commit, tries: bad.tries });
    let last = runs.into_iter().next().map(|run| {
        let Ended { result, stage, commit, started, finished, reboot_needed, .. } = run;
        LastForClients { result, stage, commit, started, finished, reboot_needed }
    });
    let running = running.map(|running| Running { by: Vec::new(), ..running });
    let (queued, hold) = (queued || held.is_some(), Hold::read(paths));
    let hosts = Published::standings(paths, running.is_some());
    serde_json::to_string(&ForClients { queued, hold, running, served, last, bad, hosts })
        .map(|text| text + "\n")
        .context(|| "write the state".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Directory;
    use serde_json::{Value, json};
    use std::fs;

    #[test]
    fn clients_learn_what_is_bad_and_from_when_on_it_is_tried_again() {
        let directory = Directory::new();
        for below in ["queue", "status"] {
            fs::create_dir(directory.path().join(below)).unwrap();
        }
        let paths = Paths::below(directory.path(), "app");
        let options = json!({
            "flakePath": "/srv/x", "flakeRef": "/srv/x#machine", "user": "deploy", "inputs": [], "operation": "switch", "flags": [],
            "pull": false, "push": false, "author": "a <a@example.org>", "healthChecks": {}, "onUnitFailure": "rollback",
            "rollback": true, "networkRetries": 0, "timeouts": { "prepare": 1, "build": 1, "activate": 1 },
        });
        let bad =
            json!({ "base": "0", "tree": "0", "options": options, "commit": "0".repeat(40), "error": "x", "tries": 2, "tried": 1_000_000 });
        let status = json!({ "format": crate::run::journal::FORMAT, "bad": bad });
        fs::write(paths.status(), status.to_string()).unwrap();
        let state: Value = serde_json::from_str(&for_clients(&paths).unwrap()).unwrap();
        assert_eq!(state["bad"], json!({ "commit": "0".repeat(40), "tries": 2, "retryAfter": 1_000_120 }));
    }
}
