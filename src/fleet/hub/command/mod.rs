//! `ekiben fleet`: which words lead to which function, on the hub.

mod arguments;
mod build;
mod reports;
mod rollout;
mod update;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use ::nix::sys::stat::{Mode, umask};

use crate::error::{Context, OrLog, Result};
use crate::fleet::SMALL;
use crate::fleet::hub::command::arguments::{Arguments, HELP};
use crate::fleet::hub::jobs::{Board, LINES, parallel};
use crate::fleet::hub::memory::Memory;
use crate::fleet::hub::repository::{FleetRepository, Host, select};
use crate::fleet::hub::served::ServedDirectory;
use crate::fleet::hub::settings::{Settings, find};
use crate::fleet::hub::status::{self, Shown};
use crate::fleet::hub::{collect, guide, metrics, page, terminal};
use crate::help::misunderstood;
use crate::system::now;
use crate::{files, output};

/// Where the fleet is.
struct Fleet<'a> {
    place: Option<PathBuf>,
    settings: Settings,
    hub: ServedDirectory,
    /// What it is of.
    directory: PathBuf,
    arguments: &'a Arguments<'a>,
}

/// Runs `ekiben fleet` with these arguments.
pub fn command(arguments: &[&str]) -> Result<ExitCode> {
    // the hosts' own sftp servers have to read what is published
    umask(Mode::from_bits_truncate(0o022));
    let arguments = Arguments::parse(arguments)?;
    if arguments.has("--help") || arguments.has("-h") || matches!(arguments.words[..], [] | ["help", ..]) {
        return print(HELP);
    }
    let here = std::env::current_dir().context(|| "find the working directory".into())?;
    let named = arguments.options.get("--repository").map(PathBuf::from).or_else(|| std::env::var_os("EKIBEN_FLEET").map(PathBuf::from));
    if arguments.words == ["init"] {
        return print(&guide::init(&named.unwrap_or(here))?);
    }
    let place = named.map(|named| here.join(named)).or_else(|| find(&here).map(Path::to_owned));
    // who only collects may do so before there is one
    let place = place.filter(|place| arguments.words != ["collect"] || place.join("fleet.json").exists());
    let settings = match &place {
        // nothing of it is run, or says where anything is written, and hosts are heard whatever becomes of that file
        Some(place) if arguments.words == ["collect"] && arguments.options.contains_key("--directory") => {
            files::read_foreign_json(&place.join("fleet.json"), SMALL).or_warn().flatten().unwrap_or_default()
        }
        place => place.as_deref().map(Settings::read).transpose()?.unwrap_or_default(),
    };
    let directory = arguments.options.get("--directory").map_or(settings.directory.clone(), PathBuf::from);
    let fleet = Fleet { place, settings, hub: ServedDirectory::new(&directory)?, directory, arguments: &arguments };
    let words = fleet.settings.expand(&arguments.words)?;
    let of_hub = ["abort", "collect", "deploy", "diff", "history", "hold", "log", "renew", "resume", "status"];
    if words.first().is_some_and(|verb| of_hub.contains(verb)) {
        fleet.hub.check_readable()?;
    }
    match words[..] {
        ["build", what @ ("dry-build" | "build" | "test" | "switch"), ref hosts @ ..] => fleet.build(what, hosts),
        ["build", ref hosts @ ..] => fleet.build("build", hosts),
        ["deploy", ref hosts @ ..] => match arguments.options.get("--again") {
            Some(number) => fleet.again(number, hosts),
            None => fleet.deploy(hosts),
        },
        ["hold", ref hosts @ ..] => fleet.hold(hosts),
        ["resume", ref hosts @ ..] => fleet.resume(hosts),
        ["abort"] => fleet.abort(),
        ["collect"] => fleet.collect(),
        ["renew", ref hosts @ ..] => fleet.renew(hosts),
        ["history", ref hosts @ ..] => fleet.history(hosts),
        ["status", ref hosts @ ..] => fleet.status(hosts),
        ["log", ref hosts @ ..] if arguments.words[1..].iter().any(|word| word.starts_with('@')) => {
            hosts.iter().try_fold(ExitCode::SUCCESS, |_, host| print(&format!("{host}:\n")).and_then(|_| fleet.runs(host)))
        }
        ["log", host] => fleet.runs(host),
        ["log", host, run] => fleet.log(host, run),
        ["diff", ref hosts @ ..] => fleet.diff(hosts),
        ["flake-update", ref words @ ..] => fleet.flake_update(words),
        ["bootstrap", host] => print(&guide::bootstrap(&fleet.settings, &fleet.hub, fleet.place.as_deref(), host)?),
        _ => Err(misunderstood("ekiben fleet", HELP, &arguments.words)),
    }
}

fn print(text: &str) -> Result<ExitCode> {
    output::print(text).map(|()| ExitCode::SUCCESS)
}

impl Fleet<'_> {
    fn repository(&self) -> Result<FleetRepository> {
        let place =
            self.place.as_deref().ok_or("there is no fleet.json here or in a directory above; see --repository and ekiben fleet init");
        FleetRepository::open(place.context(|| "find the fleet's repository".into())?, &self.settings)
    }

    fn status(&self, wanted: &[&str]) -> Result<ExitCode> {
        // who only looks need not have a repository, nor one that can be read
        let names = self.place.as_ref().and_then(|_| self.repository().and_then(|repository| repository.names()).or_warn());
        let has = |option| self.arguments.has(option);
        let fleet = status::Known { settings: &self.settings, names, memory: Memory::new(&self.directory) };
        if has("--html") {
            let late = collect::take_in(&self.hub, wanted, None, false)?;
            let shown = status::rows(&self.hub, &fleet, wanted, late)?;
            return self.write(&shown).map(|()| status::exit(&shown));
        }
        terminal::show(&self.hub, &fleet, wanted, has("--json"), has("--once"), has("--wide"))
    }

    /// Collects, and writes what is to be seen of the hosts: as the hub sees them, who has no repository.
    fn collect(&self) -> Result<ExitCode> {
        let collected = collect::collect(&self.hub, true);
        let fleet = status::Known { settings: &self.settings, names: None, memory: Memory::default() };
        let written = status::rows(&self.hub, &fleet, &[], None).and_then(|shown| self.write(&shown));
        collected.and(written).map(|()| ExitCode::SUCCESS)
    }

    /// Writes the files that are asked for, each in one step.
    fn write(&self, shown: &Shown) -> Result<()> {
        for (option, text) in [("--html", page::page as fn(&_, _) -> _), ("--metrics", metrics::text)] {
            if let Some(file) = self.arguments.options.get(option) {
                let text: String = text(shown, now());
                files::write(Path::new(file), text.as_bytes(), 0o644).context(|| format!("write {file}"))?;
            }
        }
        Ok(())
    }

    /// The hosts of these names, all if there are none, and whether all could be looked at that may
    /// be meant.
    fn hosts(&self, repository: &FleetRepository, wanted: &[&str]) -> Result<(Vec<Host>, bool)> {
        let (hosts, failed) = repository.hosts(self.arguments.jobs()?)?;
        for (_, error) in &failed {
            log::error!("{error}.");
        }
        if hosts.is_empty() && failed.is_empty() && wanted.is_empty() {
            log::warn!("There are no hosts yet: see ekiben fleet bootstrap.");
        }
        Ok((select(hosts, |host| &host.name, wanted)?, failed.is_empty() || !wanted.is_empty()))
    }

    /// Does `work` for hosts, several at once, and says what came of each, as it returns it beside the rest.
    fn each<T: Send>(
        &self,
        repository: &FleetRepository,
        hosts: &[Host],
        work: impl Fn(&Host, &dyn Fn(&str)) -> Result<(String, T)> + Sync,
    ) -> Result<Vec<Result<T>>> {
        let board = Board::new(self.arguments.has("--json"));
        let done = parallel(hosts, self.arguments.jobs()?, |host| {
            let done = work(host, &|what| board.begin(&host.name, what));
            let said = match &done {
                Ok((said, _)) => said.clone(),
                Err(error) => {
                    let tail: String = error.end(LINES).iter().map(|line| "\n  | ".to_owned() + line).collect();
                    let log = if tail.is_empty() { String::new() } else { format!("\n  see {}", repository.log(&host.name).display()) };
                    format!("{error}.{tail}{log}")
                }
            };
            board.end(&host.name, &said);
            done.map(|(_, rest)| rest)
        });
        // among many that are well
        done.iter().filter_map(|done| done.as_ref().err()).for_each(|error| log::error!("{error}."));
        Ok(done)
    }
}

fn exit(well: bool) -> ExitCode {
    if well { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
