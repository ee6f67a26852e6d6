//! What a host tells its hub of itself.

use std::fs;

use crate::config::Hub;
use crate::fleet::host::seen;
use crate::fleet::{FORMAT, Heartbeat, LastRun};
use crate::paths::Paths;
use crate::run::drift::unwell;
use crate::run::ended::Ended;
use crate::run::hold::Hold;
use crate::run::status::Status;
use crate::run::{Outcome, Stage};
use crate::stages::reboot;
use crate::text;

/// Why what the hub offers was refused, if it was.
pub const REFUSED: &str = "refused";

/// How the instance is; `is_fetched` where its hub has just been asked with success, so that an earlier failure to is past.
pub fn now(paths: &Paths, hub: &Hub, is_fetched: bool) -> Heartbeat {
    let status = Status::read(paths);
    // a host that cannot read what it has seen is to be heard all the same
    let seen = seen::newest(paths, None).unwrap_or_default();
    let tried = status.tried.as_ref().filter(|tried| tried.run.release == seen);
    // it stays undone under another number
    let undone =
        status.undone.as_ref().filter(|undone| undone.release.as_ref().zip(seen.as_ref()).is_some_and(|(is, sees)| is.id == sees.id));
    // a release that could not even be proposed has not been tried
    let refused = status.runs.first().filter(|run| run.result == Outcome::Failed);
    // the latest failure, unless it is only that what was tried is known to be bad
    let failed = refused.filter(|run| !is_fetched && !run.refused && run.stage == Some(Stage::Prepare));
    let drifted = status.runs.first().filter(|run| run.result == Outcome::Drifted);
    let told = |run: &Ended| LastRun {
        release: run.release.clone(),
        result: run.result,
        stage: run.stage,
        error: run.error.clone(),
        finished: run.finished,
    };
    let last = drifted.or(failed).or(tried.map(|tried| &tried.run)).map(told);
    let undone =
        undone.map(|undone| LastRun { release: seen.clone(), result: Outcome::Restored, stage: None, error: None, finished: undone.since });
    let last = last.or(undone).or(refused.map(told));
    let deployed = status.deployed.as_ref();
    let system = crate::system::current().ok();
    let nixos = fs::read_to_string("/run/current-system/nixos-version").ok().map(|version| text::line(version.trim_end()));
    let revision = nixos.as_deref().and_then(|version| version.rsplit('.').next());
    let is_revision = |text: &&str| text.len() >= 7 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    Heartbeat {
        format: FORMAT,
        host: hub.name.clone(),
        version: env!("CARGO_PKG_VERSION").into(),
        deployed: deployed.and_then(|deployed| deployed.release.clone()),
        system: system.and_then(|system| system.as_path().try_into().ok()),
        running: None,
        last,
        runs: tried.map_or(0, |tried| tried.count),
        self_updated: deployed.is_some_and(|deployed| deployed.summary.as_deref().is_some_and(|what| what.contains("update "))),
        reboot_needed: reboot::is_needed(),
        files: fs::read_to_string(paths.trouble_with_files()).ok(),
        refused: fs::read_to_string(paths.own(REFUSED)).ok(),
        unwell: unwell(paths, &status),
        held: Hold::read(paths),
        expires: status.expires,
        kernel: fs::read_to_string("/proc/sys/kernel/osrelease").ok().map(|version| version.trim_end().to_owned()),
        nixpkgs: revision.filter(is_revision).map(String::from),
        nixos,
        seen,
    }
}
