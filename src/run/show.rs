//! `ekiben status`: what is known of the instances, and of their units, for people and as JSON.

use std::collections::BTreeMap;
use std::fs;
use std::process::ExitCode;

use serde::Serialize;

use crate::config::Config;
use crate::error::Result;
use crate::gather::gather;
use crate::nix::progress;
use crate::paths::Paths;
use crate::run::drift::{awaits, drift, pending, unwell};
use crate::run::hold::{Hold, moment};
use crate::run::log::INVOCATION;
use crate::run::notify::untold;
use crate::run::problems::{Units, ask, hub_problems, is_building, problems, webhook_problems};
use crate::run::status::Status;
use crate::run::{Stage, Trigger};
use crate::system::properties::Properties;
use crate::system::{now, seconds, service};
use crate::text::{ago, short, span, times};
use crate::{output, table};

/// What is of another colour on a terminal, the first of them in a line: red, yellow and green.
const MARKS: [(&str, u8); 13] = [
    ("ahead", 33),
    ("problem", 31),
    ("rollback failed", 31),
    ("rolled back", 31),
    ("failed", 31),
    ("partly", 31),
    ("drifted", 31),
    ("withheld", 33),
    ("held", 33),
    ("restored", 33),
    ("awaiting", 33),
    ("deployed", 32),
    ("unchanged", 32),
];
/// How many columns the names of details take.
const LABEL: usize = 9;
/// How many changes between systems are shown.
const CHANGES: usize = 20;
/// How many earlier runs are shown.
const EARLIER: usize = 10;

/// An instance as `ekiben status --json` shows it.
#[derive(Default, Serialize)]
struct Details {
    /// Whether there is nothing to see to.
    well: bool,
    /// What there is to see to besides the last run.
    problems: Vec<String>,
    /// Whether a request waits for a run; none if this user may not know.
    queued: Option<bool>,
    /// Why it waits, if nothing is deployed for now.
    hold: Option<Hold>,
    /// When its timer looks for something new, in seconds since 1970.
    next: Option<u64>,
    /// When it has found nothing new last without a run, if that was after the last one.
    looked: Option<u64>,
    /// Whether the run under way builds.
    #[serde(skip)]
    is_building: bool,
    /// What the run under way waits for.
    waiting: Option<String>,
    /// For how long it has awaited the next boot, and how that comes about.
    #[serde(skip)]
    awaits: Option<String>,
    /// What it builds and fetches: n of m.
    progress: Option<String>,
    #[serde(flatten)]
    status: Status,
    /// What the program that failed last said; empty if this user may not know.
    output: String,
}

/// Shows one instance, or all; for humans, with an exit status that says whether all are well; or as JSON, which says so itself.
pub fn show(config: &Config, instance: Option<&str>, json: bool) -> Result<ExitCode> {
    let names: Vec<&str> = match instance {
        Some(name) => config.instance(name).map(|_| vec![name])?,
        None => config.instances.keys().map(String::as_str).collect(),
    };
    // before all else: what began later is no fault
    let said = ask(&names);
    let units = Properties::by_name(&said);
    // of the machine, not of one of them
    let machine: Vec<_> = [drift, pending].iter().filter_map(|of| of(&Paths::new(""))).collect();
    let shown: BTreeMap<String, Details> =
        gather(names.iter().map(|name| ((*name).to_owned(), Details::of(config, name, &units, &machine))));
    if json {
        return output::print_json(&shown).map(|()| ExitCode::SUCCESS);
    }
    let mut is_well = true;
    if let (Some(name), Some(shown)) = (instance, shown.values().next()) {
        output::print_marked(&details(name, shown, now()), LABEL + 3, &MARKS)?;
        output::print(&shown.output.lines().flat_map(|line| ["  | ", line, "\n"]).collect::<String>())?;
    } else {
        let hub: Vec<_> = config.hub.iter().flat_map(|_| hub_problems(&units, now())).collect();
        let of_hub: String = hub.iter().flat_map(|what| ["hub: ", what, "\n"]).collect();
        output::print_marked(&(table(&shown, now()) + &of_hub), 2, &MARKS)?;
        is_well = hub.is_empty();
    }
    Ok(if is_well && shown.values().all(|shown| shown.well) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A line for each instance; then, for each, what there is to know and to do.
fn table(shown: &BTreeMap<String, Details>, now: u64) -> String {
    if shown.is_empty() {
        return "no instances; for those who publish, see ekiben fleet status\n".into();
    }
    let mut rows = vec![["INSTANCE", "STATE", "LAST RUN", "WHEN", "NEXT", "COMMIT"].map(String::from)];
    for (name, shown) in shown {
        let last = shown.status.runs.first();
        rows.push([
            name.clone(),
            shown.state(),
            last.map_or("never".into(), |run| run.result.to_string()),
            last.map_or(String::new(), |run| ago(run.finished, now)),
            shown.next.map_or(String::new(), |next| format!("in {}", span(next.saturating_sub(now)))),
            shown.status.deployed.as_ref().map_or(String::new(), |deployed| short(&deployed.commit)),
        ]);
    }
    let mut lines = table::lines(&rows);
    // what is said of several, such as what is the matter with the whole machine, is said once
    let mut said: Vec<(String, Vec<&str>)> = Vec::new();
    for (name, shown) in shown {
        let looked = shown.looked.map(|looked| format!("looked {}: nothing new", ago(looked, now)));
        let failure = shown.status.runs.first().filter(|run| run.result.is_failure()).map(|run| {
            let stage = run.stage.map(|stage| format!(" in stage {stage}")).unwrap_or_default();
            format!("{}{stage}; see ekiben status {name}", run.result)
        });
        let held =
            shown.hold.as_ref().map(|hold| format!("held until {} {}; to end that: ekiben resume {name}", moment(hold.until), hold.why()));
        let awaiting = shown.awaits.as_ref().map(|how| format!("awaits the next boot{how}"));
        let ahead = shown.status.undone.as_ref().map(|undone| undone.notice(name));
        let waiting = shown.waiting.as_ref().map(|what| format!("waiting: {what}"));
        let known =
            looked.into_iter().chain(shown.problems.iter().cloned()).chain(failure).chain(waiting).chain(held).chain(awaiting).chain(ahead);
        for what in known {
            match said.iter_mut().find(|(known, _)| *known == what) {
                Some((_, names)) => names.push(name),
                None => said.push((what, vec![name])),
            }
        }
    }
    lines.extend(said.into_iter().map(|(what, names)| format!("{}: {what}", names.join(", "))));
    lines.join("\n") + "\n"
}

/// All that is known of one instance.
fn details(name: &str, shown: &Details, now: u64) -> String {
    let mut lines = vec![format!("{name}: {}", shown.state())];
    let mut add = |what: &str, value: &str| {
        if !value.is_empty() {
            lines.push(format!("  {what:<LABEL$} {value}"));
        }
    };
    for problem in &shown.problems {
        add("problem", problem);
    }
    if let Some(running) = &shown.status.running {
        add("running", &format!("since {}, {}", moment(running.started), asked(running.trigger, &running.by)));
        add("waiting", shown.waiting.as_deref().unwrap_or_default());
        add("progress", shown.progress.as_deref().unwrap_or_default());
    }
    if let Some(hold) = &shown.hold {
        add("held", &format!("until {} {}; run ekiben resume {name} to end that", moment(hold.until), hold.why()));
    }
    let ahead = shown.status.undone.as_ref().map(|undone| undone.notice(name)).unwrap_or_default();
    add("ahead", &ahead);
    add("looked", &shown.looked.map(|looked| format!("{}: nothing new", ago(looked, now))).unwrap_or_default());
    add("next", &shown.next.map(|next| format!("by the timer, {}", moment(next))).unwrap_or_default());
    if let Some(deployed) = &shown.status.deployed {
        add("deployed", &deployed.commit);
        add("system", &deployed.system.display().to_string());
    }
    if let Some(run) = shown.status.runs.first() {
        add("last run", &format!("{}, {}, {}", run.result, ago(run.finished, now), asked(run.trigger, &run.by)));
        add("proposed", run.commit.as_deref().unwrap_or_default());
        add("summary", run.summary.as_deref().unwrap_or_default());
        for line in &run.news {
            add("new", line);
        }
        for line in run.changes.iter().take(CHANGES) {
            add("changed", line);
        }
        if run.changes.len() > CHANGES {
            add("changed", &format!("more; see ekiben status --json {name}"));
        }
        let took: Vec<_> = run.stages.iter().map(|(stage, seconds)| format!("{stage} {}", span(*seconds))).collect();
        add("took", &took.join(", "));
        add("stage", &run.stage.map(|stage| stage.to_string()).unwrap_or_default());
        add("error", run.error.as_deref().unwrap_or_default());
        for warning in run.warnings.iter().filter(|warning| **warning != ahead) {
            add("warning", warning);
        }
        if let Some(bad) = shown.status.bad.as_ref().filter(|bad| run.error.as_ref() != Some(&bad.error)) {
            add("bad", &format!("{}, tried {}, last {}: {}", bad.commit, times(bad.tries), ago(bad.tried, now), bad.error));
        }
        if run.reboot_needed {
            let which = if shown.status.has_failed() { "old" } else { "new" };
            add("reboot", &format!("needed to run the {which} system"));
        }
        add("log", &format!("ekiben log {name} {}", run.id));
        add("journal", &format!("journalctl {INVOCATION}={}", run.id));
    }
    if let (Some(awaiting), Some(how)) = (&shown.status.awaiting, &shown.awaits) {
        add("awaiting", &format!("the next boot: {}{how}", awaiting.commit));
    }
    for run in shown.status.runs.iter().skip(1).take(EARLIER) {
        let commit = run.commit.as_deref().map(short).unwrap_or_default();
        add("earlier", &format!("{}, {:<15}  {commit:<8}  {}", moment(run.finished), run.result.to_string(), short(&run.id)));
    }
    lines.join("\n") + "\n"
}

/// Who or what has asked for a run.
fn asked(trigger: Trigger, by: &[String]) -> String {
    let by = by.join(", ");
    match trigger {
        Trigger::Request if by.is_empty() => "asked for".into(),
        Trigger::Request => format!("asked for by {by}"),
        Trigger::Rollback => format!("rollback by {by}"),
        Trigger::Timer if by.is_empty() => "by the timer or by hand".into(),
        Trigger::Timer => format!("by {by}"),
    }
}

impl Details {
    fn of(config: &Config, name: &str, units: &Units, machine: &[String]) -> Self {
        let paths = Paths::new(name);
        let has_webhook = config.webhook.iter().flat_map(|webhook| webhook.projects.values()).any(|project| project.instance == name);
        let (request, status) = (paths.request(), Status::read(&paths));
        let since = request.symlink_metadata().and_then(|metadata| metadata.modified()).ok().map(seconds);
        let service = units.get(&*service::unit(name));
        let said = service.map(|service| service.of("StatusText")).filter(|said| !said.is_empty() && status.running.is_some());
        let mut problems = problems(&paths, units, &status, since, now());
        problems.extend(unwell(&paths, &status).map(|why| format!("not well any more: {why}; see to that, or run ekiben rollback {name}")));
        problems.extend_from_slice(machine);
        problems.extend(untold(&paths, now()));
        problems.extend(has_webhook.then(|| webhook_problems(units, now())).into_iter().flatten());
        Self {
            well: problems.is_empty() && !status.has_failed(),
            problems,
            queued: if status.held.is_some() { Some(true) } else { request.try_exists().ok() },
            hold: Hold::read(&paths),
            next: units.get(&*format!("ekiben-{name}.timer")).map(|timer| timer.number("NextElapseUSecRealtime")).filter(|next| *next > 0),
            looked: paths.last_looked().filter(|looked| status.runs.first().is_some_and(|last| last.finished <= *looked)),
            is_building: service.is_some_and(is_building),
            waiting: said.filter(|text| !text.starts_with(progress::BEGIN)).map(String::from),
            awaits: config.instances.get(name).and_then(|instance| awaits(config, &status, &instance.reboot, now())),
            progress: said.and_then(|text| text.strip_prefix(progress::BEGIN).map(String::from)),
            status,
            output: fs::read_to_string(paths.output()).unwrap_or_default(),
        }
    }

    fn state(&self) -> String {
        match (&self.status.running, &self.hold, self.queued) {
            (Some(running), ..) => format!("running ({})", if self.is_building { Stage::Build } else { running.stage }),
            (None, Some(_), Some(true)) => "held, queued".into(),
            (None, Some(_), _) => "held".into(),
            (None, None, Some(true)) => "queued".into(),
            (None, None, _) => "idle".into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Directory;

    #[test]
    fn what_is_the_matter_with_the_machine_is_said_once() {
        let directory = Directory::new();
        let of = |name: &str, problems: &[&str]| {
            let status = Status::read(&Paths::below(directory.path(), name));
            // of an instance that nothing is known of yet, too
            assert_eq!(serde_json::to_value(&status).unwrap()["format"], 1);
            let problems = problems.iter().map(ToString::to_string).collect();
            (name.to_owned(), Details { problems, status, ..Details::default() })
        };
        let full = "the disk is full";
        let shown = [of("app", &[full, "ekiben-app.path is masked"]), of("live", &[]), of("web", &[full])];
        let expected = "\
INSTANCE  STATE  LAST RUN  WHEN  NEXT  COMMIT
app       idle   never
live      idle   never
web       idle   never
app, web: the disk is full
app: ekiben-app.path is masked
";
        assert_eq!(table(&shown.into(), 0), expected);
        assert!(table(&BTreeMap::new(), 0).starts_with("no instances"));
    }
}
