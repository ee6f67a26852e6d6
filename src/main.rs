//! Ekiben keeps a NixOS machine up to date from the inside. This file is the command line: which
//! words lead to which function.

mod config;
mod error;
mod fault;
mod files;
mod fleet;
mod gather;
mod git;
mod help;
mod json;
mod names;
mod nix;
mod output;
mod paths;
mod program;
mod run;
mod stages;
mod system;
mod table;
#[cfg(test)]
mod testing;
mod text;
mod webhook;

use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::ExitCode;

use ::nix::sys::stat::{Mode, umask};

use crate::config::{Config, Instance};
use crate::error::{Context, Error, OrLog, Result};
use crate::fleet::host::{delivery, poll, secrets, seen};
use crate::fleet::hub::{candidate, command, offer};
use crate::help::{HELP, misunderstood};
use crate::names::RunId;
use crate::output::print;
use crate::paths::Paths;
use crate::run::ended::Ended;
use crate::run::status::Status;
use crate::run::{Trigger, holding, metrics, notify, show, trigger};
use crate::stages::branch;
use crate::stages::{activate, begin, boot, build, conclude, cut_off, look, prepare, publish, reboot, trial, watch};
#[cfg(feature = "fault-points")]
use crate::system::boot_loader::BootLoader;
use crate::system::{service, units};

fn main() -> ExitCode {
    start_logging();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    run(&arguments).or_error().unwrap_or(ExitCode::FAILURE)
}

fn run(arguments: &[&str]) -> Result<ExitCode> {
    let (config, arguments) = match arguments {
        ["--config", file, rest @ ..] => (*file, rest),
        _ => (config::DEFAULT, arguments),
    };
    let file = Path::new(config);
    let config = || Config::read(file);
    let webhook = || config()?.webhook.ok_or_else(|| Error::new("Failed to listen: no webhook is configured"));
    let done = match arguments {
        ["fleet", "files"] => offer::serve(&config()?.hub.ok_or_else(|| Error::new("Failed to serve files: no hub is configured"))?),
        ["fleet", rest @ ..] => return command::command(rest),
        // behind a command, too, where it would be taken for a name
        [] | ["help", ..] | [.., "--help" | "-h"] => print(HELP),
        ["--version"] => print(concat!("ekiben ", env!("CARGO_PKG_VERSION"), "\n")),
        ["check", file] => Config::read(Path::new(file)).and_then(|_| print(&format!("{file} is valid.\n"))),
        ["trigger", name] => trigger::trigger(&config()?, name),
        ["trigger", "--wait", name] | ["trigger", name, "--wait"] => return trigger::trigger_and_wait(&config()?, name),
        ["rollback", name] => return trigger::roll_back(&config()?, name),
        ["hold", name, words @ ..] => holding::hold(&config()?, name, words),
        ["resume", name] => holding::resume(&config()?, name),
        ["holds"] => holding::end_in_time(),
        ["status", "--json"] => return show::show(&config()?, None, true),
        ["status", "--json", name] | ["status", name, "--json"] => return show::show(&config()?, Some(name), true),
        ["status"] => return show::show(&config()?, None, false),
        ["status", name] if !name.starts_with('-') => return show::show(&config()?, Some(name), false),
        ["log", name, words @ ..] => crate::run::log::log(&config()?, name, words),
        ["forget-releases", name] => seen::forget(name, config()?.instance(name)?),
        // the module's one instance that has a hub
        ["forget-releases"] => config().and_then(|config| seen::forget("fleet", config.instance("fleet")?)),
        ["webhook"] => webhook::webhook(&webhook()?),
        ["tokens"] => webhook::check_tokens(&webhook()?),
        // by another exit status, its unit knows that the request is still there
        ["begin", name] => {
            let begun = stage(file, name, begin::begin).or_error();
            return Ok(begun.map_or(cut_off::TRY_AGAIN.into(), |()| ExitCode::SUCCESS));
        }
        ["watch", name] => stage(file, name, watch::watch),
        ["look", name] => stage(file, name, look::look),
        ["prepare", name] if running(name)?.is_none() => stage(file, name, |paths, instance| {
            delivery::tell(paths, instance);
            Ok(())
        }),
        ["prepare" | "build", name] if matches!(running(name)?, None | Some(Trigger::Rollback)) => Ok(()),
        ["prepare", name] => stage(file, name, prepare::prepare),
        ["build", name] => stage(file, name, build::build),
        ["activate", name] => activate::activate(&paths(name)?, configured(file, name)?.as_ref()),
        ["publish", name] => publish::publish(&paths(name)?, configured(file, name)?.as_ref()),
        ["release", name, run] => {
            let run = RunId::try_from(*run).context(|| "find the run".into())?;
            let publish = configured(file, name)?.and_then(|config| config.instances.get(*name)?.publish.clone());
            // the hosts' own sftp servers have to read it
            umask(Mode::from_bits_truncate(0o022));
            candidate::release(&paths(name)?, &publish.ok_or_else(|| Error::new(format!("Failed to publish: {name} does not")))?, &run)
        }
        ["metrics", file] => metrics::write(&config()?, Path::new(file)),
        ["notify", name, run, on, command] => notify::notify(&paths(name)?, run, on, command),
        ["notified", name, run, on] => notify::note(&paths(name)?, run, on),
        // after the switch, the configuration may know nothing of the instance any more
        ["deliver", name] => stage(file, name, delivery::deliver),
        ["install", name] => stage(file, name, |paths, instance| instance.hub.as_ref().map_or(Ok(()), |hub| secrets::install(paths, hub))),
        ["reach", name] => poll::reach(name, config()?.instance(name)?),
        ["reboot"] => reboot::reboot(&config()?),
        ["boot"] => return Ok(boot::boot()),
        ["give-way"] => trial::give_way(),
        ["conclude"] => conclude::conclude_all(&config()?),
        ["due", name] => paths(name).and_then(|paths| service::start_as_due(paths.name(), "start")),
        ["retry", name] => paths(name).and_then(|paths| begin::retry(&paths)),
        ["conclude", name] => {
            let paths = paths(name)?;
            let ended = conclude::conclude(&paths).or_error();
            if ended.is_none() || !Status::read(&paths).runs.first().is_some_and(Ended::is_idle) {
                // a busy journald would read it when the unit is over, and not know any more which run has said it
                units::sync_journal();
            }
            boot::end_all(&paths);
            return Ok(ended.map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS));
        }
        // root to itself, as the instance's user
        ["forget-own-releases", name] => stage(file, name, seen::forget_own),
        ["candidate", fate, name, about] => {
            let fate = json::from_value(&(*fate).into()).context(|| "read the candidate's fate".into())?;
            let (options, proposal): (_, Option<_>) = json::parse(about.as_bytes()).context(|| "read what it is about".into())?;
            return branch::candidate(fate, &paths(name)?, &options, proposal.as_ref());
        }
        #[cfg(feature = "fault-points")]
        ["fault-points"] => print(&fault::POINTS.map(|point| format!("{point}\n")).concat()),
        #[cfg(feature = "fault-points")]
        ["boot-once", system @ ..] => {
            let loader = BootLoader::of(config()?.boot_loader).ok_or_else(|| Error::new("Failed to boot once: the boot loader cannot"))?;
            system.first().map_or_else(|| loader.forget(), |system| loader.boot_once(Path::new(system)))
        }
        _ => Err(misunderstood("ekiben", HELP, arguments)),
    };
    done.map(|()| ExitCode::SUCCESS)
}

/// Runs a stage, unless the instance is not configured. Then another's switch has just taken it
/// away: nothing has failed, and the run will start over when the instance is there again.
fn stage(file: &Path, name: &str, stage: fn(&Paths, &Instance) -> Result<()>) -> Result<()> {
    let paths = paths(name)?;
    if let Some(config) = configured(file, name)? {
        return stage(&paths, config.instance(name)?);
    }
    log::warn!("Instance {name} is no longer configured; nothing to do.");
    Ok(())
}

/// Why the run that the first stage has begun is; none while there is a hold.
fn running(name: &str) -> Result<Option<Trigger>> {
    Ok(Status::read(&paths(name)?).running.map(|running| running.trigger))
}

/// The configuration, if it is there and has this instance.
fn configured(file: &Path, name: &str) -> Result<Option<Config>> {
    let config = file.exists().then(|| Config::read(file)).transpose()?;
    Ok(config.filter(|config| config.instances.contains_key(name)))
}

fn paths(name: &str) -> Result<Paths> {
    config::instance_name(name).context(|| "find the instance".into())?;
    Ok(Paths::new(name))
}

/// Log lines for the journal carry their priority in front, as in sd-daemon(3); others say it. They may
/// hold what others have written, so all are made fit to show.
fn start_logging() {
    // standard error may be another than the parent's: see systemd.exec(5)
    let of = |file: std::fs::Metadata| format!("{}:{}", file.dev(), file.ino());
    let journal =
        std::env::var("JOURNAL_STREAM").is_ok_and(|stream| std::fs::metadata("/proc/self/fd/2").is_ok_and(|file| of(file) == stream));
    let format = move |buffer: &mut env_logger::fmt::Formatter, record: &log::Record| {
        let (priority, word) = match record.level() {
            log::Level::Error => (3, "error: "),
            log::Level::Warn => (4, "warning: "),
            log::Level::Info => (6, ""),
            log::Level::Debug | log::Level::Trace => (7, ""),
        };
        text::lines(&record.args().to_string())
            .lines()
            .try_for_each(|line| if journal { writeln!(buffer, "<{priority}>{line}") } else { writeln!(buffer, "{word}{line}") })
    };
    env_logger::Builder::new().filter_level(log::LevelFilter::Info).format(format).init();
}
