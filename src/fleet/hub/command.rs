//! `ekiben fleet`: which words lead to which function, on the hub.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use ::nix::sys::stat::{Mode, umask};
use ::nix::unistd::geteuid;

use crate::error::{Context, Error, Result};
use crate::fleet::LARGE;
use crate::fleet::hub::jobs::{Board, parallel};
use crate::fleet::hub::repository::{FleetRepository, Host, Settings, find, select};
use crate::fleet::hub::served::ServedDirectory;
use crate::fleet::hub::{collect, guide, publish, push, status};
use crate::git::lockfile::LockFile;
use crate::names::RunId;
use crate::nix::cache::Cache;
use crate::nix::{nix, set_profile, updated_lock_file};
use crate::program::Program;
use crate::{config, files, output, system, text};

const HELP: &str = "\
Publishes NixOS configurations to a fleet of hosts, and shows how they are.

Usage: ekiben fleet [--repository DIR] [--directory DIR] COMMAND

  init                                begin a repository here
  build [dry-build|build|test|switch] [--jobs N] [--target [USER@]ADDRESS] [HOST...]
                                      evaluate; or build; or build this machine's own and activate it, or that of
                                      another one, over SSH
  deploy [--no-build] [--jobs N] [HOST...]
                                      build what has changed, and publish it
  status [--json] [--once] [HOST...]  how the hosts are
  log HOST [RUN]                      what a host's last run, or that run, said
  diff [HOST...]                      what differs between the running and the repository's systems
  flake-update [INPUT...] [HOST...]   update the flakes' inputs
  bootstrap HOST                      what to do for a new host
  collect                             take in what the hosts have reported

Options:
  --repository DIR   the fleet's repository (default: $EKIBEN_FLEET, or what the working directory is in)
  --directory DIR    what the hub serves (default: as fleet.json says, or /var/lib/ekiben-hub); of a hub elsewhere
                     sftp://[user@]host[:port][/path], with what this user's ssh knows
";

/// The options that each command takes besides those that all take.
const OPTIONS: [(&str, &[&str]); 9] = [
    ("init", &[]),
    ("build", &["--jobs", "--target"]),
    ("deploy", &["--jobs", "--no-build"]),
    ("status", &["--json", "--once"]),
    ("log", &[]),
    ("diff", &[]),
    ("flake-update", &[]),
    ("bootstrap", &[]),
    ("collect", &[]),
];
/// How long the update of one flake's inputs may take.
const UPDATE: Duration = Duration::from_secs(3600);
/// How long an activation may take, in seconds.
const SWITCH: u64 = 1800;
/// How many lines of a failing build's log are shown, and how much of one line of any.
const LINES: usize = 10;
const LINE_BYTES: u64 = 64 * 1024;

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
                "--repository" | "--directory" | "--jobs" | "--target" => {
                    rest.next().ok_or("it needs a value").context(|| format!("understand {word}"))?
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
    arguments: &'a Arguments<'a>,
}

/// Does what these words say.
pub fn command(arguments: &[&str]) -> Result<ExitCode> {
    // the hosts' own sftp servers have to read what is published
    umask(Mode::from_bits_truncate(0o022));
    let arguments = Arguments::parse(arguments)?;
    if arguments.has("--help") || arguments.has("-h") || matches!(arguments.words[..], [] | ["help"]) {
        return print(HELP);
    }
    let here = std::env::current_dir().context(|| "find the working directory".into())?;
    let named = arguments.options.get("--repository").map(PathBuf::from).or_else(|| std::env::var_os("EKIBEN_FLEET").map(PathBuf::from));
    if arguments.words == ["init"] {
        let made = guide::init(&named.unwrap_or(here))?;
        return print(&made.into_iter().map(|path| path + " is new.\n").collect::<String>());
    }
    let place = named.map(|named| here.join(named)).or_else(|| find(&here).map(Path::to_owned));
    let settings = place.as_deref().map(Settings::read).transpose()?.unwrap_or_default();
    let hub = ServedDirectory::new(arguments.options.get("--directory").map_or(&settings.directory, Path::new))?;
    let fleet = Fleet { place, settings, hub, arguments: &arguments };
    match arguments.words[..] {
        ["build", what @ ("dry-build" | "build" | "test" | "switch"), ref hosts @ ..] => fleet.build(what, hosts),
        ["build", ref hosts @ ..] => fleet.build("build", hosts),
        ["deploy", ref hosts @ ..] => fleet.deploy(hosts),
        ["collect"] if fleet.hub.is_elsewhere() => Err(Error::new("Failed to collect: the hub does so by itself")),
        ["collect"] => collect::collect(&fleet.hub).map(|()| ExitCode::SUCCESS),
        ["status", ref hosts @ ..] => {
            let (json, once) = (arguments.has("--json"), arguments.has("--once"));
            status::status(&fleet.hub, fleet.settings.silent_after, hosts, json, once)
        }
        ["log", host] => fleet.log(host, None),
        ["log", host, run] => fleet.log(host, Some(run)),
        ["diff", ref hosts @ ..] => fleet.diff(hosts),
        ["flake-update", ref words @ ..] => fleet.flake_update(words),
        ["bootstrap", host] => print(&guide::bootstrap(&fleet.settings, fleet.hub.is_elsewhere(), host)?),
        _ => Err(Error::new(format!("Failed to understand {:?}: see ekiben fleet --help", arguments.words.join(" ")))),
    }
}

fn print(text: &str) -> Result<ExitCode> {
    output::print(text).map(|()| ExitCode::SUCCESS)
}

impl Fleet<'_> {
    fn repository(&self) -> Result<FleetRepository> {
        let place = self.place.as_deref().ok_or("there is no fleet.json here or above; see --repository and ekiben fleet init");
        FleetRepository::open(place.context(|| "find the fleet's repository".into())?, &self.settings)
    }

    /// The hosts of these names, all if there are none, and whether all could be looked at that may
    /// be meant.
    fn hosts(&self, repository: &FleetRepository, wanted: &[&str]) -> Result<(Vec<Host>, bool)> {
        let (hosts, failed) = repository.hosts(self.arguments.jobs()?)?;
        for error in &failed {
            log::error!("{error}.");
        }
        Ok((select(hosts, |host| &host.name, wanted)?, failed.is_empty() || !wanted.is_empty()))
    }

    /// Does `work` for hosts, several at once; says what came of each. Returns whether all went well.
    fn each(
        &self,
        repository: &FleetRepository,
        hosts: &[Host],
        work: impl Fn(&Host, &dyn Fn(&str)) -> Result<String> + Sync,
    ) -> Result<bool> {
        let board = Board::new();
        let done = parallel(hosts, self.arguments.jobs()?, |host| {
            let done = work(host, &|what| board.begin(&host.name, what));
            let said = match &done {
                Ok(said) => said.clone(),
                Err(error) => {
                    let tail = error.tail.iter().skip(error.tail.len().saturating_sub(LINES));
                    let tail: String = tail.map(|line| "\n  | ".to_owned() + line).collect();
                    let log = if tail.is_empty() { String::new() } else { format!("\n  see {}", repository.log(&host.name).display()) };
                    format!("{error}.{tail}{log}")
                }
            };
            board.end(&host.name, &said);
            done.is_ok()
        });
        Ok(done.into_iter().all(|well| well))
    }

    fn build(&self, what: &str, wanted: &[&str]) -> Result<ExitCode> {
        let activates = what == "test" || what == "switch";
        let target = self.arguments.options.get("--target");
        match target {
            Some(target) if activates && wanted.len() == 1 => push::check(target)?,
            Some(_) => return Err("it is for test and switch of one host").context(|| "understand --target".into()),
            None if activates => check_own(what, wanted)?,
            None => {}
        }
        let repository = self.repository()?;
        let (hosts, found) = self.hosts(&repository, wanted)?;
        let built = OnceLock::new();
        let well = self.each(&repository, &hosts, |host, say| {
            say("evaluating");
            let system = repository.evaluate(host)?;
            if what != "dry-build" {
                say("building");
                repository.build(host, &system)?;
            }
            let said = system.toplevel.to_string();
            // of the only one, if it is to be activated
            let _ = built.set(system.toplevel);
            Ok(said)
        })?;
        if let (true, true, Some(toplevel)) = (well, activates, built.get()) {
            if let Some(target) = target {
                return push::push(toplevel.path(), what, target).map(|()| exit(found));
            }
            let _turn = system::Turn::take()?;
            return activate(toplevel.path(), what == "switch").map(|()| exit(found));
        }
        Ok(exit(well && found))
    }

    fn deploy(&self, wanted: &[&str]) -> Result<ExitCode> {
        let _turn = self.hub.turn()?;
        // what is known to have arrived counts for the sequence numbers
        collect::take_in(&self.hub, wanted)?;
        let repository = self.repository()?;
        let (hosts, found) = self.hosts(&repository, wanted)?;
        let (build, key) = (!self.arguments.has("--no-build"), self.settings.signing_key.as_deref());
        let well = self.each(&repository, &hosts, |host, say| {
            let released = publish::deploy(&self.hub, &repository, host, build, key, say)?;
            Ok(released.map_or("unchanged".into(), |sequence| format!("release {sequence} published")))
        })?;
        Ok(exit(well && found))
    }

    fn log(&self, host: &str, run: Option<&str>) -> Result<ExitCode> {
        collect::take_in(&self.hub, &[host])?;
        let host = select(self.hub.hosts()?, |name| name, &[host])?.remove(0);
        let doing = || format!("show a log of {host}");
        let run = if let Some(run) = run {
            RunId::try_from(run).context(doing)?
        } else {
            self.hub.take_in_file(&self.hub.index_file(&host))?;
            self.hub.index(&host)?.reports.pop().ok_or("none has arrived").context(doing)?
        };
        let path = self.hub.received(&host).join(format!("{run}.log.gz"));
        self.hub.take_in_file(&path)?;
        if !path.exists() {
            return Err(format!("there is none of run {run}")).context(doing);
        }
        let mut gzip = Command::new("gzip").arg("-dc").arg(path).stdout(Stdio::piped()).spawn().context(doing)?;
        // piece by piece, and not for ever: a small file can be a long log
        let mut lines = BufReader::new(gzip.stdout.take().ok_or("gzip has no output").context(doing)?);
        let (mut piece, mut left, mut output) = (Vec::new(), LARGE, std::io::stdout().lock());
        while (&mut lines).take(LINE_BYTES).read_until(b'\n', &mut piece).context(doing)? > 0 {
            let (line, end) = piece.strip_suffix(b"\n").map_or((&piece[..], ""), |line| (line, "\n"));
            if write!(output, "{}{end}", text::line(&String::from_utf8_lossy(line))).is_err() {
                break;
            }
            left = left.saturating_sub(piece.len() as u64);
            if left == 0 {
                log::warn!("The log has more than {LARGE} bytes; the rest is left out.");
                break;
            }
            piece.clear();
        }
        drop(lines);
        gzip.wait().context(doing)?;
        Ok(ExitCode::SUCCESS)
    }

    fn diff(&self, wanted: &[&str]) -> Result<ExitCode> {
        collect::take_in(&self.hub, wanted)?;
        let repository = self.repository()?;
        let (hosts, found) = self.hosts(&repository, wanted)?;
        let nvd = std::env::var_os("PATH").is_some_and(|path| std::env::split_paths(&path).any(|place| place.join("nvd").is_file()));
        let well = self.each(&repository, &hosts, |host, say| {
            say("comparing");
            let Some((heartbeat, _)) = self.hub.heartbeat(&host.name)? else { return Ok("nothing has been heard of it".into()) };
            let Some(old) = heartbeat.system else { return Ok("it does not know what it runs".into()) };
            let new = repository.evaluate(host)?.toplevel;
            if old == new {
                return Ok("runs just that".into());
            }
            if let Some(missing) = [&old, &new].into_iter().find(|path| !path.path().exists()) {
                return Ok(format!("{missing} is not in this machine's store"));
            }
            let program = if nvd { Program::new("nvd").arg("diff") } else { nix().args(["store", "diff-closures"]) };
            let said = program.arg(old.path()).arg(new.path()).output(|| format!("compare {}", host.name), None)?;
            Ok(format!("{old} -> {new}\n{}", String::from_utf8_lossy(&said).trim_end()))
        })?;
        Ok(exit(well && found))
    }

    fn flake_update(&self, words: &[&str]) -> Result<ExitCode> {
        let repository = self.repository()?;
        let flakes = repository.flakes()?;
        // what the hosts are has to be known only where a word may be one
        let hosts = if words.is_empty() { Vec::new() } else { self.hosts(&repository, &[])?.0 };
        let is_host = |word: &&str| hosts.iter().any(|host| *host.name == **word);
        let (named, inputs): (Vec<&str>, Vec<&str>) = words.iter().partition(|word| is_host(word));
        if let Some(odd) = inputs.iter().find(|input| !config::is_input(input)) {
            return Err(Error::new(format!("Failed to find host or input {odd:?}")));
        }
        let inputs: Vec<String> = inputs.into_iter().map(String::from).collect();
        let cache = Cache::open(&repository.cache())?;
        let mut unknown: Vec<&String> = inputs.iter().collect();
        let mut well = true;
        for source in flakes {
            let meant = |host: &Host| host.source.place == source.place && named.contains(&&*host.name);
            if !named.is_empty() && !hosts.iter().any(meant) {
                continue;
            }
            let updated = repository.with_unpacked(&source, "update", |directory| {
                let flake = format!("path:{}", directory.display());
                updated_lock_file(&cache, &flake, &inputs, &directory.with_extension("lock"), UPDATE)
            });
            if let Ok(new) = &updated {
                let lock = LockFile::parse(new.as_deref())?;
                unknown.retain(|input| lock.resolve(input).is_err());
            } else {
                unknown.clear();
            }
            let path = source.directory.join("flake.lock");
            // a lock file that several share is a link
            let path = path.canonicalize().unwrap_or(path);
            let replace = |new: &Vec<u8>| files::write(&path, new, 0o644).context(|| format!("write {}", path.display()));
            let done = match updated {
                Ok(Some(new)) if std::fs::read(&path).ok().as_ref() != Some(&new) => replace(&new).map(|()| "updated"),
                other => other.map(|_| "unchanged"),
            };
            well &= done.is_ok();
            match done {
                Ok(said) => drop(print(&format!("{}: {said}\n", source.place))?),
                Err(error) => log::error!("{}: {error}.", source.place),
            }
        }
        for input in &unknown {
            log::error!("Failed to update {input}: no flake has an input of this name.");
        }
        Ok(exit(well && unknown.is_empty()))
    }
}

/// Fails unless the one host that is named is this very machine, and this process may switch it.
fn check_own(what: &str, wanted: &[&str]) -> Result<()> {
    let own = std::fs::read_to_string("/proc/sys/kernel/hostname").context(|| "read this machine's name".into())?;
    let own = own.trim_end();
    let refuse = |why: String| Err(why).context(|| format!("{what} the configuration"));
    match wanted {
        [host] if *host != own => refuse(format!("{host:?} is not this machine, which is {own:?}: deploy it")),
        [_] if !geteuid().is_root() => refuse("it takes root".into()),
        [_] => Ok(()),
        _ => refuse(format!("expected one host, this machine's own {own:?}")),
    }
}

/// Has this machine run a system, and, if that is to last, boot it; not what has been refused, or has broken off.
fn activate(system: &Path, to_last: bool) -> Result<()> {
    let activated = system::switch_to(system, "test", SWITCH, &format!("activate {}", system.display()))?;
    // some unit may have failed, and some systems wait for a boot
    if to_last && matches!(activated.status.code(), Some(0 | 4 | 100)) {
        set_profile(system)?;
        system::switch_to(system, "boot", SWITCH, "install the boot loader")?.success()?;
    }
    activated.success()
}

fn exit(well: bool) -> ExitCode {
    if well { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
