//! What a host has reported, and in what it differs.

use std::io::Read;
use std::process::{Command, ExitCode, Stdio};

use crate::error::{Context, OrLog, Result};
use crate::fleet::hub::command::{Fleet, exit};
use crate::fleet::hub::repository::{Host, select};
use crate::fleet::hub::{collect, history};
use crate::fleet::{LARGE, Report};
use crate::names::{HostName, RunId};
use crate::nix::nix;
use crate::output::{print, print_all, print_json};
use crate::program::Program;
use crate::system::now;
use crate::text::{ago, short};
use crate::{files, table};

/// How many runs of a host are listed.
const LISTED: usize = 30;
/// The newest run of a host, whose identifier nobody has to know.
const LAST: &str = "last";

impl Fleet<'_> {
    /// The host of that name, and its runs of which reports have arrived, the newest last.
    fn reported(&self, host: &str) -> Result<(HostName, Vec<RunId>)> {
        collect::take_in(&self.hub, &[host], None, true)?;
        let host = select(self.hub.hosts()?, |name| name, &[host])?.remove(0);
        self.hub.take_in_file(&self.hub.index_file(&host))?;
        let runs = self.hub.index(&host).reports;
        Ok((host, runs))
    }

    /// Lists the runs of a host, the newest first.
    pub(super) fn runs(&self, host: &str) -> Result<ExitCode> {
        let (host, runs) = self.reported(host)?;
        let mut rows = vec![["ENDED", "RUN", "RESULT", "RELEASE", "ERROR"].map(String::from)];
        for id in runs.iter().rev().take(LISTED) {
            let path = self.hub.received(&host).join(format!("{id}.json"));
            self.hub.take_in_file(&path)?;
            // old ones are removed
            if let Some(Report { run, .. }) = files::read_foreign_json(&path, LARGE).or_warn().flatten() {
                let release = run.release.map(|release| release.sequence.to_string()).unwrap_or_default();
                rows.push([ago(run.finished, now()), short(id), run.result.to_string(), release, run.error.unwrap_or_default()]);
            }
        }
        let lines = if runs.is_empty() { vec!["no report has arrived".into()] } else { table::lines(&rows) };
        print(&(lines.join("\n") + "\n")).map(|()| ExitCode::SUCCESS)
    }

    /// Shows the log of a run of a host: of that whose identifier is or begins so, or of the last one.
    pub(super) fn log(&self, host: &str, run: &str) -> Result<ExitCode> {
        let (host, mut runs) = self.reported(host)?;
        let doing = || format!("show a log of {host}");
        let run = if run == LAST {
            runs.pop().ok_or("no report has arrived").context(doing)?
        } else {
            let known = runs.into_iter().rfind(|id| id.starts_with(run));
            known.ok_or_else(|| format!("no report of run {run:?} has arrived; see ekiben fleet log {host}")).context(doing)?
        };
        let path = self.hub.received(&host).join(format!("{run}.log.gz"));
        self.hub.take_in_file(&path)?;
        if !path.exists() {
            return Err(format!("no log of run {run} has arrived")).context(doing);
        }
        let mut gzip = Command::new("gzip").arg("-dc").arg(path).stdout(Stdio::piped()).spawn().context(doing)?;
        // not for ever: a small file can be a long log
        let mut log = gzip.stdout.take().ok_or("gzip has no output").context(doing)?.take(LARGE);
        print_all(&mut log)?;
        if log.limit() == 0 {
            log::warn!("The log has more than {LARGE} bytes; the rest is left out.");
        }
        drop(log);
        gzip.wait().context(doing)?;
        Ok(ExitCode::SUCCESS)
    }

    pub(super) fn history(&self, wanted: &[&str]) -> Result<ExitCode> {
        collect::take_in(&self.hub, wanted, Some(history::FILE), true)?;
        let all = history::of(&self.hub, &select(self.hub.hosts()?, |name| name, wanted)?)?;
        if self.arguments.has("--json") { print_json(&all) } else { print(&history::lines(&all)) }.map(|()| ExitCode::SUCCESS)
    }

    pub(super) fn diff(&self, wanted: &[&str]) -> Result<ExitCode> {
        collect::take_in(&self.hub, wanted, None, true)?;
        let repository = self.repository()?;
        let (hosts, found) = self.hosts(&repository, wanted)?;
        let nvd = std::env::var_os("PATH").is_some_and(|path| std::env::split_paths(&path).any(|place| place.join("nvd").is_file()));
        let compare = |host: &Host| {
            let Some((heartbeat, _)) = self.hub.heartbeat(&host.name)? else { return Ok("no heartbeat has arrived".into()) };
            let Some(old) = heartbeat.system else { return Ok("its heartbeat names no system".into()) };
            let new = repository.evaluate(host)?.toplevel;
            if old == new {
                return Ok("up to date".into());
            }
            if let Some(missing) = [&old, &new].into_iter().find(|path| !path.path().exists()) {
                return Ok(format!("{missing} is not in the store of this machine"));
            }
            let program = if nvd { Program::new("nvd").arg("diff") } else { nix().args(["store", "diff-closures"]) };
            let said = program.arg(old.path()).arg(new.path()).said(|| format!("compare {}", host.name))?;
            Ok(format!("{old} -> {new}\n{}", said.trim_end()))
        };
        let done = self.each(&repository, &hosts, |host, say| {
            say("comparing");
            compare(host).map(|said| (said, ()))
        })?;
        Ok(exit(found && done.iter().all(Result::is_ok)))
    }
}
