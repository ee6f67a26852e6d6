//! What a client of the webhook may know of an instance: how it is, not why.

use serde_json::json;

use crate::error::{Context, Result};
use crate::paths::Paths;
use crate::run::hold::Hold;
use crate::run::published::Published;
use crate::run::status::{Running, Status};

/// Of how many runs a client is told: more than there are between two looks of a job.
const TOLD: usize = 10;

/// How an instance is, as JSON, for a client of the webhook.
pub fn for_clients(paths: &Paths) -> Result<String> {
    let path = paths.request();
    // before the status: a run that takes the request meanwhile shows there
    let queued = path.try_exists().doing("look for", &path)?;
    let Status { running, served, held, runs, bad, .. } = Status::read(paths);
    let hosts = Published::standings(paths, running.is_some())?;
    let runs = runs.iter().take(TOLD).map(|run| {
        json!({
            "request": run.request,
            "result": run.result,
            "stage": run.stage,
            "commit": run.commit,
            "started": run.started,
            "finished": run.finished,
            "rebootNeeded": run.reboot_needed,
        })
    });
    let runs: Vec<_> = runs.collect();
    let mut state = json!({
        "queued": queued || held.is_some(),
        "hold": Hold::read(paths),
        "running": running.map(|running| Running { by: Vec::new(), ..running }),
        "served": served,
        "last": runs.first(),
        "runs": runs,
        "bad": bad.map(|bad| json!({ "commit": bad.commit, "tries": bad.tries, "retryAfter": bad.retry_after() })),
    });
    // only a fleet that is published has any
    if let Some(hosts) = hosts {
        state["hosts"] = json!(hosts);
    }
    Ok(format!("{state}\n"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Directory, instance};
    use serde_json::{Value, json};
    use std::fs;
    use std::path::Path;

    #[test]
    fn clients_learn_what_is_bad_and_from_when_on_it_is_tried_again() {
        let directory = Directory::new();
        let paths = Paths::of_test(directory.path());
        let options = instance(Path::new("/srv/x"));
        let bad =
            json!({ "base": "0", "tree": "0", "options": options, "commit": "0".repeat(40), "error": "x", "tries": 2, "tried": 1_000_000 });
        let status = json!({ "format": crate::run::journal::FORMAT, "bad": bad });
        fs::write(paths.status(), status.to_string()).unwrap();
        let state: Value = serde_json::from_str(&for_clients(&paths).unwrap()).unwrap();
        assert_eq!(state["bad"], json!({ "commit": "0".repeat(40), "tries": 2, "retryAfter": 1_000_120 }));
    }

    #[test]
    fn what_cannot_be_read_is_not_deployed() {
        let directory = Directory::new();
        let paths = Paths::of_test(directory.path());
        let result = || -> Result<(u64, Option<String>)> {
            let state: Value = serde_json::from_str(&for_clients(&paths)?).unwrap();
            Ok((state["served"].as_u64().unwrap(), state["last"]["result"].as_str().map(String::from)))
        };
        let ended = |started: Value, result: &str| json!({ "id": "1", "result": result, "trigger": "timer", "started": started, "finished": 2, "warnings": [], "rebootNeeded": false });
        let earlier = ended(json!(1), "deployed");
        for last in [ended(json!(1), "quarantined"), ended(json!(1), ""), json!({"id": "1", "started": "x"})] {
            let status = json!({ "format": 1, "served": 7, "runs": [last, earlier] });
            fs::write(paths.status(), status.to_string()).unwrap();
            assert_ne!(result().unwrap(), (7, Some("deployed".into())), "{last}");
        }
        // a job that waits for hosts takes none for all
        fs::write(paths.status(), json!({ "format": 1, "served": 7, "runs": [earlier] }).to_string()).unwrap();
        assert_eq!(result().unwrap(), (7, Some("deployed".into())));
        for text in ["", "{", r#"{"run": "x"}"#] {
            fs::write(paths.hosts(), text).unwrap();
            assert!(result().is_err(), "{text}");
        }
    }
}
