//! Which releases a host knows of, so that nobody can have it go back: not a hub in wrong hands, and not
//! the instance's own user.
//!
//! What was offered last the instance's user writes down; what runs were about is in root's status as well, and
//! what was deployed in the repository, too. An administrator may have a host forget all of that.

use nix::unistd::geteuid;

use crate::config::Instance;
use crate::error::{Context, Error, Result};
use crate::files;
use crate::fleet::DAY;
use crate::fleet::host::release;
use crate::git::Repository;
use crate::json;
use crate::output::{print, print_json};
use crate::paths::Paths;
use crate::program::Program;
use crate::run::Release;
use crate::run::status::Status;

/// The release that the hub has offered last.
const SEEN: &str = "seen.json";
/// How many the user's part of forgetting knows: that one, and the one in the repository.
const OWN: usize = 2;
/// How long a cache may keep what has been replaced, in seconds.
const HOUR: u64 = 60 * 60;
/// A clock that says less, in seconds since 1970, has not been set since the machine was started.
const SET: u64 = 1_735_689_600;

/// Fails unless a release is the newest that is known, or one after it: `committed` is the one in the
/// repository. Neither may its number, which is a time or less than one, be of a day that is yet to come.
pub fn check(paths: &Paths, release: &Release, committed: Option<Release>, now: u64) -> Result<()> {
    let doing = || format!("accept release {} of {}", release.sequence, release.id);
    let highest = now + DAY;
    if u64::from(release.sequence) > highest {
        return if now < SET {
            let why = "this machine's clock is not set, so the number cannot be checked; a later run tries again";
            Err(why).context(doing).map_err(Error::transient)
        } else {
            Err(format!(
                "expected a number of at most {highest}, which is tomorrow by this machine's clock; set that one, or the publisher's"
            ))
            .context(doing)
        };
    }
    match newest(paths, committed)? {
        Some(newest) if newest.sequence > release.sequence || newest.sequence == release.sequence && newest.id != release.id => {
            let why = format!(
                "release {} of {} has been seen before; the hub was restored from a backup, or replays a release: deploy again",
                newest.sequence, newest.id
            );
            Err(why).context(doing)
        }
        _ => Ok(()),
    }
}

/// Writes down what the hub offers.
pub fn remember(paths: &Paths, release: &Release) -> Result<()> {
    files::write_json(&paths.own(SEEN), release, 0o644)
}

/// Whether a later one has been offered a moment ago: what lies on the way may have kept this one.
pub fn is_behind(paths: &Paths, release: &Release) -> bool {
    let seen: Option<Release> = files::read_json(&paths.own(SEEN)).unwrap_or_default();
    let age = paths.own(SEEN).metadata().and_then(|metadata| metadata.modified()).map(|time| time.elapsed());
    seen.is_some_and(|seen| seen.sequence > release.sequence) && age.is_ok_and(|age| age.is_ok_and(|age| age.as_secs() < HOUR))
}

/// Whether it is this that was written down last.
pub fn is_last(paths: &Paths, release: &Release) -> bool {
    files::read_json(&paths.own(SEEN)).is_ok_and(|seen: Option<Release>| seen.as_ref() == Some(release))
}

/// The newest release that is known, `committed` among them, but for those that have been forgotten.
pub fn newest(paths: &Paths, committed: Option<Release>) -> Result<Option<Release>> {
    let way_out = |error| Error::new(format!("{error}; run `ekiben forget-releases {}` as root", paths.name()));
    let seen = files::read_json(&paths.own(SEEN)).map_err(way_out)?;
    let forgotten: Vec<Release> = files::read_json(&paths.forgotten()).map_err(way_out)?.unwrap_or_default();
    let known = reported(paths).into_iter().chain(committed).chain(seen).filter(|release| !forgotten.contains(release));
    Ok(known.max_by_key(|release| release.sequence))
}

/// The releases that runs have been about, as root has written down.
fn reported(paths: &Paths) -> Vec<Release> {
    let status = Status::read(paths);
    let runs = status.runs.into_iter().chain(status.tried.map(|tried| tried.run));
    let deployed = status.deployed.and_then(|deployed| deployed.release);
    runs.filter_map(|run| run.release).chain(deployed).collect()
}

/// Has an instance forget the releases that it knows of now: it takes the next one that its hub offers,
/// whatever number that has, and from then on none before that one.
pub fn forget(name: &str, instance: &Instance) -> Result<()> {
    let paths = Paths::new(name);
    let doing = || format!("forget the releases of {name}");
    if instance.hub.is_none() {
        return Err("the instance has no hub").context(doing);
    }
    if !geteuid().is_root() {
        return Err("must be run as root").context(doing);
    }
    // what lies in the user's files is for the user to read, and to remove
    let own = Program::ourselves_as(&instance.user)?.args(["forget-own-releases", name]).output(doing, None)?;
    let own: Vec<Release> = json::parse(&own).context(doing)?;
    let releases: Vec<_> = own.into_iter().take(OWN).chain(reported(&paths)).collect();
    files::write_json(&paths.forgotten(), &releases, 0o644)?;
    print(&format!("{name} will accept the next release of its hub, whatever its number.\n"))
}

/// The user's part of that: says which releases are in the instance's own files.
pub fn forget_own(paths: &Paths, instance: &Instance) -> Result<()> {
    let seen = files::read_json(&paths.own(SEEN)).unwrap_or_default();
    let committed = Repository::open(instance).and_then(|repository| release::of(&repository, &repository.head)).unwrap_or_default();
    files::clear(&paths.own(SEEN)).doing("remove", &paths.own(SEEN))?;
    print_json(&seen.into_iter().chain(committed.map(|manifest| manifest.release)).collect::<Vec<Release>>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::journal::FORMAT;
    use crate::testing::Directory;
    use serde_json::{Value, json};
    use std::fs::File;
    use std::time::{Duration, SystemTime};

    const NOW: u64 = 1_800_000_000;

    fn release(sequence: u64, digit: &str) -> Release {
        Release { id: digit.repeat(64).try_into().unwrap(), sequence: sequence.try_into().unwrap() }
    }

    fn write(path: &std::path::Path, value: &Value) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, value.to_string()).unwrap();
    }

    #[test]
    fn a_release_that_any_place_knows_of_is_not_gone_back_from() {
        let place = Directory::new();
        let paths = Paths::below(place.path(), "fleet");
        let refusal = |sequence, id, committed| check(&paths, &release(sequence, id), committed, NOW).err().map(|error| error.to_string());
        assert_eq!(refusal(1, "a", None), None);
        let run = json!({
            "id": "x", "result": "rolledBack", "trigger": "timer", "started": 0, "finished": 0, "commit": null, "summary": null,
            "release": release(5, "a"), "stage": null, "error": null, "warnings": [], "rebootNeeded": false,
        });
        for status in [json!({"format": FORMAT, "runs": [run]}), json!({"format": FORMAT, "tried": {"count": 1, "run": run}})] {
            write(&paths.status(), &status);
            assert!(refusal(4, "b", None).unwrap().contains("release 5 of aaaa"));
            assert!(refusal(5, "b", None).is_some() && refusal(5, "a", None).is_none() && refusal(6, "b", None).is_none());
        }
        std::fs::remove_file(paths.status()).unwrap();
        assert!(refusal(4, "b", Some(release(5, "a"))).is_some());
        write(&paths.own(SEEN), &json!(release(7, "c")));
        assert!(refusal(6, "b", Some(release(5, "a"))).is_some());

        // forgotten once, known again with the next one
        write(&paths.forgotten(), &json!([release(5, "a"), release(7, "c")]));
        assert_eq!(refusal(2, "d", Some(release(5, "a"))), None);
        remember(&paths, &release(2, "d")).unwrap();
        assert!(refusal(1, "e", Some(release(5, "a"))).is_some());

        // of an earlier version, or of somebody else's making
        write(&paths.own(SEEN), &json!({"id": "a".repeat(64), "sequence": u64::MAX}));
        assert!(refusal(9, "f", None).unwrap().ends_with("run `ekiben forget-releases fleet` as root"));
    }

    #[test]
    fn what_a_cache_has_kept_is_told_from_what_is_replayed() {
        let place = Directory::new();
        let paths = Paths::below(place.path(), "fleet");
        assert!(!is_behind(&paths, &release(1, "a")));
        std::fs::create_dir_all(paths.own("")).unwrap();
        remember(&paths, &release(5, "a")).unwrap();
        assert!(is_behind(&paths, &release(4, "b")) && !is_behind(&paths, &release(5, "b")) && !is_behind(&paths, &release(6, "b")));
        for time in [SystemTime::now() - Duration::from_secs(HOUR + 1), SystemTime::now() + Duration::from_secs(60)] {
            File::options().append(true).open(paths.own(SEEN)).unwrap().set_modified(time).unwrap();
            assert!(!is_behind(&paths, &release(4, "b")));
        }
    }

    #[test]
    fn a_number_of_days_to_come_is_refused() {
        let place = Directory::new();
        let paths = Paths::below(place.path(), "fleet");
        let refusal = |sequence, now| check(&paths, &release(sequence, "a"), None, now).err();
        assert!(refusal(NOW + DAY, NOW).is_none());
        let refused = refusal(NOW + DAY + 1, NOW).unwrap();
        assert!(!refused.is_transient() && refused.to_string().contains("tomorrow"));
        // started without a clock of its own
        let refused = refusal(NOW, 60).unwrap();
        assert!(refused.is_transient() && refused.to_string().contains("clock is not set"));
        assert!(refusal(3, 60).is_none());
    }
}
