//! `ekiben fleet`: which words lead to which function, on the hub.

mod build;
mod reports;
mod rollout;
mod update;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use ::nix::sys::stat::{Mode, umask};

use crate::error::{Context, Error, OrLog, Result};
use crate::fleet::SMALL;
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

const HELP: &str = "\
Publishes NixOS configurations to a fleet of hosts, and shows their state.

Usage: ekiben fleet [--repository DIR] [--directory DIR] COMMAND

  init               create a fleet repository
  bootstrap HOST     print how to add a host
  build [dry-build|build|test|switch] [--jobs N] [--target [USER@]ADDRESS]
        [HOST...]    evaluate, or build; test and switch activate the system of
                     one host, on this machine or over SSH
  deploy [--waves] [--no-build] [--unsigned] [--json] [--jobs N] [HOST...]
                     build what has changed, and publish it; with --waves, in
                     those of fleet.json; with --unsigned, have releases without
                     a signature follow those that have one
  deploy --again NUMBER [HOST...]
                     publish that release again, as it was
  renew [HOST...]    publish again, as it is, what expires before long
  status [--json|--html FILE] [--wide] [--once] [HOST...]
                     show the state of the hosts, trouble first; exit with 2 if
                     one is failing, 3 if one is silent or stale, 4 if hub and
                     repository do not agree
  history [--json] [HOST...]
                     show what has been published, and from which commits
  log HOST [RUN]     show the log of the last run on a host, or of that run
  log --list HOST    list the runs of a host
  diff [HOST...]     show how running systems and repository differ
  hold [--for DURATION] [--reason TEXT] [HOST...]
                     have nothing new be published for hosts; without hosts,
                     have no further wave begin
  resume [HOST...]   end that; without hosts, have a stopped roll-out go on
  abort [--unsigned]
                     end the roll-out, and publish again what ran before it
  flake-update [INPUT...] [HOST...]
                     update the inputs of the flakes
  collect [--html FILE] [--metrics FILE]
                     collect the reports of the hosts; write a page, and metrics

@GROUP in the place of HOST means the hosts of one of the groups in fleet.json.

Options:
  --repository DIR   the fleet's repository (default: $EKIBEN_FLEET, or that of
                     the working directory)
  --directory DIR    what the hub serves (default: as fleet.json says, or
                     /var/lib/ekiben-hub); sftp://[user@]host[:port][/path] for
                     a hub elsewhere, with the ssh configuration of this user
";

/// The options that each command takes besides those that all take.
const OPTIONS: [(&str, &[&str]); 14] = [
    ("init", &[]),
    ("build", &["--jobs", "--target"]),
    ("deploy", &["--again", "--jobs", "--json", "--no-build", "--unsigned", "--waves"]),
    ("hold", &["--for", "--reason"]),
    ("resume", &[]),
    ("abort", &["--unsigned"]),
    ("renew", &["--jobs"]),
    ("status", &["--html", "--json", "--once", "--wide"]),
    ("history", &["--json"]),
    ("log", &["--list"]),
    ("diff", &[]),
    ("flake-update", &[]),
    ("bootstrap", &[]),
    ("collect", &["--html", "--metrics"]),
];
/// A command line, in parts.
struct Arguments<'a> {
    words: Vec<&'a str>,
    options: BTreeMap<&'a str, &'a str>,
}

impl<'a> Arguments<'a> {
    fn parse(arguments: &[&'a str]) -> Result<Self> {
        let (mut words, mut options) = (Vec::new(), BTreeMap::new());
        let mut rest = arguments.iter();
        while let Some(&word) = rest.next() {
            let value = match word {
                "--repository" | "--directory" | "--jobs" | "--target" | "--html" | "--metrics" | "--again" | "--for" | "--reason" => {
                    rest.next().ok_or("value missing").context(|| format!("understand {word}"))?
                }
                _ => "",
            };
            if word.starts_with('-') {
                options.insert(word, value);
            } else {
                words.push(word);
            }
        }
        let command = words.first().copied().unwrap_or_default();
        let taken = OPTIONS.iter().find(|(name, _)| *name == command).map_or(&[][..], |(_, taken)| taken);
        let all = ["--repository", "--directory", "--help", "-h"];
        match options.keys().find(|option| !all.contains(option) && !taken.contains(option)) {
            Some(option) => Err(Error::new(format!("Failed to understand {option:?}: see ekiben fleet --help"))),
            None => Ok(Self { words, options }),
        }
    }

    fn has(&self, option: &str) -> bool {
        self.options.contains_key(option)
    }

    fn jobs(&self) -> Result<usize> {
        let number = |text: &&str| text.parse().ok().filter(|number| *number > 0);
        match self.options.get("--jobs") {
            Some(text) => number(text).ok_or(format!("expected a number, found {text:?}")).context(|| "understand --jobs".into()),
            None => Ok(std::thread::available_parallelism().map_or(2, usize::from)),
        }
    }
}

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
    let is_first = |verb: &&str| words.first() == Some(verb);
    let needs_hub = OPTIONS.iter().any(|(verb, _)| is_first(verb)) && !["build", "flake-update", "bootstrap"].iter().any(is_first);
    if needs_hub {
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
            hosts.iter().try_fold(ExitCode::SUCCESS, |_, host| print(&format!("{host}:\n")).and_then(|_| fleet.log(host, None)))
        }
        ["log", host] if arguments.has("--list") => fleet.runs(host),
        ["log", host] => fleet.log(host, None),
        ["log", host, run] => fleet.log(host, Some(run)),
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
