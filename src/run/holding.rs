//! `ekiben hold` and `ekiben resume`, and what runs do about holds: the request that waits is kept in the status until
//! the hold ends, since systemd would start a run again and again for one that stays in the queue.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use crate::config::{Config, instance_name};
use crate::error::{Context, Result};
use crate::help::{HELP, misunderstood};
use crate::paths::Paths;
use crate::run::hold::{Hold, moment};
use crate::run::status::Status;
use crate::run::{asker, queue, trigger};
use crate::system::{self, now};
use crate::{files, output};

/// How long a hold is if nobody says.
const DEFAULT: &str = "1d";
/// Nobody remembers what a longer one was for, in seconds.
const LONGEST: u64 = 366 * 24 * 60 * 60;
/// Between two looks at the holds that there are, in seconds: another one may have come, or the clock be set.
const PAUSE: u64 = 10;
/// A file that is no hold may become one for so many seconds.
const PATIENCE: u64 = 60;

/// Holds an instance, by the words behind its name: a time span, and `--reason` with a text.
pub fn hold(config: &Config, name: &str, words: &[&str]) -> Result<()> {
    let (span, reason) = match words {
        [] => (DEFAULT, ""),
        ["--reason", reason] => (DEFAULT, *reason),
        [span, "--reason", reason] | ["--reason", reason, span] => (*span, *reason),
        [span] if !span.starts_with('-') => (*span, ""),
        _ => return Err(misunderstood("ekiben", HELP, &[&["hold", name], words].concat())),
    };
    let paths = trigger::paths(config, name, "hold", Paths::hold)?;
    let since = now();
    let until = since + seconds(span)?;
    let by = asker::this_user();
    Hold { since, until, by, reason: reason.to_owned() }.write(&paths)?;
    let run = match Status::read(&paths).running {
        Some(_) => format!(" A run is under way: see ekiben status {name}. It ends before it switches, unless it already does."),
        None => String::new(),
    };
    output::print(&format!("{name} is held until {}; to end that: ekiben resume {name}.{run}\n", moment(until)))
}

/// Ends the hold of an instance; what waits for that runs.
pub fn resume(config: &Config, name: &str) -> Result<()> {
    let paths = trigger::paths(config, name, "resume", Paths::hold)?;
    trigger::paths(config, name, "resume", Paths::request)?;
    let was_held = Hold::read(&paths).is_some();
    let next = if lift(&paths)? { " The request that has waited runs now." } else { "" };
    output::print(&format!("{name} is {}.{next}\n", if was_held { "held no longer" } else { "not held" }))
}

/// Keeps the request that waits for a run until the hold ends; false if none is in force.
pub fn keep(paths: &Paths) -> Result<bool> {
    let Some(hold) = Hold::read(paths) else { return Ok(false) };
    let number = queue::waiting(paths)?;
    let by = number.map(|number| queue::askers(paths, number)).unwrap_or_default();
    Status::keep_request(paths, number, by)?;
    queue::remove(paths, number)?;
    log::info!("Held until {} {}; nothing is deployed, and a request is kept.", moment(hold.until), hold.why());
    // whoever has ended it meanwhile has not seen what is kept
    Ok(Hold::read(paths).is_some())
}

/// Ends holds when they are over, until there are none.
pub fn end_in_time() -> Result<()> {
    let place = Paths::new("x").hold();
    let place = place.parent().unwrap_or(&place);
    loop {
        let names = fs::read_dir(place).doing("read", place)?.flatten();
        let names: Vec<_> = names.filter_map(|file| file.file_name().into_string().ok()).filter(|name| !name.starts_with('.')).collect();
        let mut next = None;
        for name in names {
            let until = match Some(&*name).filter(|name| instance_name(name).is_ok()).map(Paths::new) {
                Some(paths) => match Hold::read(&paths) {
                    None => {
                        lift(&paths)?;
                        continue;
                    }
                    Some(hold) => hold.until,
                },
                None if is_old(&place.join(&name)) => {
                    files::clear(&place.join(&name)).context(|| format!("remove {name} from {}", place.display()))?;
                    continue;
                }
                None => u64::MAX,
            };
            next = Some(until.min(next.unwrap_or(until)));
        }
        let Some(next) = next else { return Ok(()) };
        thread::sleep(Duration::from_secs(next.saturating_sub(now()).clamp(1, PAUSE)));
    }
}

fn is_old(path: &Path) -> bool {
    let changed = path.symlink_metadata().and_then(|file| file.modified());
    changed.is_ok_and(|time| system::seconds(time).abs_diff(now()) > PATIENCE)
}

/// Ends a hold, and has the request that was kept be served; whether there was one. Its file goes last: whatever goes wrong
/// before, [`end_in_time`] finds a hold that is over.
fn lift(paths: &Paths) -> Result<bool> {
    if let Some(hold) = Hold::read(paths) {
        Hold { until: now(), ..hold }.write(paths)?;
    }
    let kept = Status::read(paths).held.map(|number| queue::request(paths, number, asker::NOBODY)).transpose()?;
    Hold::remove(paths).map(|()| kept.is_some())
}

/// A time span as in systemd.time(7), in seconds.
pub fn seconds(span: &str) -> Result<u64> {
    let count = system::microseconds(span).map(|count| count / 1_000_000).filter(|count| (1..=LONGEST).contains(count));
    count
        .ok_or("expected a time span of at most a year, as in systemd.time(7), such as 2h or 3d")
        .context(|| format!("understand the duration {span:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Directory;

    #[test]
    fn a_hold_whose_request_cannot_be_asked_for_again_is_over_and_is_ended_later() {
        let directory = Directory::new();
        let paths = Paths::of_test(directory.path());
        fs::remove_dir(directory.path().join("queue")).unwrap();
        Hold { since: 0, until: now() + 60, by: "alice".into(), reason: String::new() }.write(&paths).unwrap();
        fs::write(paths.status(), r#"{"format": 1, "held": 5}"#).unwrap();
        lift(&paths).unwrap_err();
        assert!(Hold::read(&paths).is_none() && paths.hold().exists());
        fs::create_dir(directory.path().join("queue")).unwrap();
        assert!(lift(&paths).unwrap() && paths.request().exists() && !paths.hold().exists());
    }
}
