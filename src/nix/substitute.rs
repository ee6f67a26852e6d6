//! Systems that are built elsewhere: evaluated here, fetched as soon as some cache has them, and never built.
//!
//! What is asked for is the path of the system, not its derivation: so what NixOS builds nowhere but on the machine itself,
//! by its own word, comes from a cache like the rest, and nothing that only a build would need is fetched.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Context, Error, Result};
use crate::nix::cache::Cache;
use crate::nix::{STORE, Source, locked_out, nix, not_the_candidate};
use crate::program::Program;
use crate::system::show;
use crate::text::span;

/// The first pause before the caches are asked again, and the longest; each is twice as long as the one before.
const PAUSES: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(300)];
/// What Nix says before it lists what no cache has and nobody can build.
const UNKNOWN: &str = "don't know how to build these paths";
/// What it says where it would have to build, in its older and its newer words (2.26, 2.34): other words on that are the configuration's.
const IDLE: &[&str] = &["'--max-jobs'", "(max-jobs = 0)"];
/// What is in the lines that say how many derivations would have to be built, and which, and that a cache cannot be asked.
const LACKING: &[&str] = &[" will be built:", ".drv", "unable to download"];
/// The same where a cache cannot be used, or does not have what is accepted.
const UNUSABLE: &[&str] = &["unable to download", "ignoring substitute", "lacks a signature"];
/// How many paths are named.
const NAMED: usize = 5;

/// A system, by its path and, if it was evaluated here, its derivation.
struct Wanted {
    system: String,
    derivation: Option<String>,
}

/// Has `link` lead to a system as [`super::build_system`] does, and waits, for `limit` at most, until some cache has it, or
/// `is_over`; or it `is_overtaken`, which is asked no more often than the caches are.
pub fn fetch_system(
    source: &Source,
    flags: &[String],
    link: &Path,
    limit: Duration,
    is_over: impl Fn() -> bool,
    is_overtaken: impl Fn() -> bool,
) -> Result<()> {
    let deadline = Instant::now() + limit;
    let left = || deadline.saturating_duration_since(Instant::now());
    let mut wanted = match source {
        Source::Store(system) => Some(Wanted { system: system.display().to_string(), derivation: None }),
        _ => None,
    };
    let mut pause = PAUSES[0];
    loop {
        if wanted.is_none() {
            wanted = evaluate(source, flags, left())?;
        }
        let lacking = match &wanted {
            Some(wanted) => wanted.fetch(flags, link, left())?,
            None => Some("what the evaluation imports is in no cache yet".into()),
        };
        let Some(lacking) = lacking else { return Ok(()) };
        let fail = |why: &str| Err(Error::new(format!("Failed to fetch {}: {lacking}; {why}", source.name())).transient());
        if is_overtaken() {
            return fail("not waited for any more, since something newer has been asked for");
        }
        if left() <= pause {
            return fail(&format!("waited for {}, and nothing is built here", span(limit.as_secs())));
        }
        log::info!("Waiting: {lacking}; asking again in {} s.", pause.as_secs());
        show(&lacking);
        let next = Instant::now() + pause;
        while Instant::now() < next {
            if is_over() {
                return fail("not waited for, since a rollback has been asked for");
            }
            thread::sleep(PAUSES[0]);
        }
        pause = (pause * 2).min(PAUSES[1]);
    }
}

/// Nix that builds nothing, whatever the flags are.
fn idle(command: &str, flags: &[String]) -> Program {
    nix().arg(command).args(flags).args(["--max-jobs", "0", "--builders", ""])
}

/// Evaluates the system; `None` if that needs something that would have to be built.
fn evaluate(source: &Source, flags: &[String], limit: Duration) -> Result<Option<Wanted>> {
    let attempt = || {
        let doing = || format!("evaluate {}", source.name());
        let eval = source.give(idle("eval", flags)).args(["--raw", "--apply", "system: \"${system.drvPath} ${system.outPath}\""]);
        let ended = eval.run(limit, doing)?;
        if !ended.status.success() && would_build(&ended.tail) {
            return Ok(None);
        }
        let said = ended.tail.last().cloned().unwrap_or_default();
        ended.success().map_err(not_the_candidate)?;
        let (derivation, system) = said.split_once(' ').ok_or("expected two paths").context(doing)?;
        Ok(Some(Wanted { system: system.to_owned(), derivation: Some(format!("{derivation}^out")) }))
    };
    Cache::own()?.used(attempt)
}

/// Whether Nix has failed because it would have had to build.
fn would_build(tail: &[String]) -> bool {
    tail.iter().any(|line| IDLE.iter().any(|words| line.contains(words)))
}

impl Wanted {
    /// Fetches the system, or says what is lacking for that.
    fn fetch(&self, flags: &[String], link: &Path, limit: Duration) -> Result<Option<String>> {
        let doing = || format!("fetch {}", self.system);
        let ask = idle("build", flags).arg("--dry-run").arg(&self.system).args(&self.derivation);
        let mut ended = ask.quietly().watch_for(LACKING).run(limit, doing).map_err(Error::transient)?;
        if ended.status.success() {
            if unknown(&ended.tail).any(|path| path == self.system) {
                return Ok(Some(lacking(&ended.tail, &ended.seen)));
            }
            show("");
            let fetch = idle("build", flags).arg("--out-link").arg(link).arg(&self.system);
            ended = fetch.watch_for(UNUSABLE).run(limit, doing).map_err(Error::transient)?;
        }
        let of_cache = ended.seen.iter().find(|line| UNUSABLE.iter().any(|words| line.contains(words))).map(|line| plain(line));
        let why = of_cache.or_else(|| ended.reason());
        match ended.success() {
            Ok(()) => Ok(None),
            Err(error) => {
                locked_out(&error).map_or_else(|| Ok(Some(why.unwrap_or_else(|| error.to_string()))), |error| Err(error.transient()))
            }
        }
    }
}

/// The paths that nobody has, by the last lines of what Nix said.
fn unknown(lines: &[String]) -> impl Iterator<Item = &str> {
    lines.iter().skip_while(|line| !line.starts_with(UNKNOWN)).skip(1).map(|line| line.trim()).take_while(|line| line.starts_with('/'))
}

/// How many paths are in no cache, which, and what is wrong with a cache.
fn lacking(lines: &[String], seen: &[String]) -> String {
    let count = seen.iter().find_map(|line| line.strip_suffix("derivations will be built:")?.split(' ').nth(1)?.parse().ok());
    let mut names: Vec<_> = seen.iter().filter_map(|line| line.trim().strip_suffix(".drv")).filter(|line| line.starts_with('/')).collect();
    if names.is_empty() {
        names.extend(unknown(lines));
    }
    let count: usize = count.unwrap_or(names.len());
    let shown: Vec<_> = names.iter().take(NAMED).map(|path| path.get(STORE.len() + 33..).unwrap_or(path)).collect();
    let more = if count > shown.len() { ", ..." } else { "" };
    let wrong = seen.iter().find(|line| line.contains(UNUSABLE[0])).map(|line| format!("; {}", plain(line))).unwrap_or_default();
    format!("{count} path{} in no cache yet: {}{more}{wrong}", if count == 1 { " is" } else { "s are" }, shown.join(", "))
}

/// A warning of Nix without what is of no interest here.
fn plain(line: &str) -> String {
    let from = UNUSABLE.iter().filter_map(|words| line.find(words)).min().unwrap_or(0);
    line[from..].split("; retrying").next().unwrap_or(line).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(lines: &[&str]) -> Vec<String> {
        lines.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn that_nothing_is_built_here_is_told_by_each_version_of_nix() {
        assert!(would_build(&lines(&["error: unable to start any build; either increase '--max-jobs' or enable remote builds."])));
        let newer = ["       error: Cannot build '/nix/store/x.drv'.", "       Reason: local builds are disabled (max-jobs = 0)"];
        assert!(would_build(&lines(&newer)));
        assert!(!would_build(&lines(&["error: Cannot build '/nix/store/x.drv'.", "       Reason: builder failed with exit code 1."])));
    }

    #[test]
    fn what_is_lacking_is_counted_and_named() {
        let path = |name: &str| format!("/nix/store/{}-{name}", "0".repeat(32));
        let system = path("system");
        let tail = lines(&[&format!("  {system}.drv"), "don't know how to build these paths:", &format!("  {system}")]);
        let one = lines(&["this derivation will be built:", &format!("  {system}.drv")]);
        assert_eq!(unknown(&tail).collect::<Vec<_>>(), [&system]);
        assert_eq!(lacking(&tail, &one), "1 path is in no cache yet: system");
        assert_eq!(lacking(&tail, &[]), "1 path is in no cache yet: system");
        let mut many = lines(&[
            "warning: unable to download 'http://cache/x.narinfo': HTTP error 500; retrying in 300 ms",
            "these 60 derivations will be built:",
        ]);
        many.extend((0..49).map(|number| format!("  {}.drv", path(&format!("lib-{number}")))));
        let said = "60 paths are in no cache yet: lib-0, lib-1, lib-2, lib-3, lib-4, ...; unable to download 'http://cache/x.narinfo': HTTP error 500";
        assert_eq!(lacking(&tail, &many), said);
    }
}
