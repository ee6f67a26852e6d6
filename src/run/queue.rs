//! Requests on disk: one file per instance, named after it.
//!
//! A user who may write the queue's directory (the webhook, root, the members of group ekiben) may
//! ask for a run; a request that is on disk will be served, whatever restarts in between. The
//! file holds a number that grows with every request, so that somebody who waits can tell
//! whether a run came after his own; then the instance's name, and who asks, as far as its owner may say that.
//!
//! Many requests before a run are one: they all get the number of the file that is there, and a few leave files beside
//! it that say so. A run removes the file when its journal has the number, and before it looks at anything that may be new.

use std::io::{self, ErrorKind, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::unistd::{geteuid, linkat};

use crate::error::{Context, Result};
use crate::files;
use crate::paths::Paths;
use crate::run::asker;
use crate::run::status::Status;

/// No request has more bytes.
const LIMIT: u64 = 256;
/// How far a number may be ahead of the clock, which may have been set back since: a day, in milliseconds.
const REACH: u64 = 24 * 60 * 60 * 1000;
/// So many may have joined in a request.
const JOINED: usize = 7;
/// How often a request that runs keep taking away is tried again.
const TRIES: u32 = 100;

/// What lies in the place of a request.
#[derive(Debug, PartialEq)]
enum Found {
    Nothing,
    /// A request with its number.
    Request(u64),
    /// Something else.
    Odd,
}

/// Asks for a run of the instance; returns the request's number when it is safely on disk.
/// `after` is the highest number known to be taken: the clock may have been set back. `by` is for [`asker::of_file`].
pub fn request(paths: &Paths, after: u64, by: &str) -> Result<u64> {
    let path = paths.request();
    let served = Status::read(paths).served;
    let text = |number| format!("{number} {} {by}", paths.name());
    for _ in 0..TRIES {
        match find(&path, served) {
            Found::Request(number) => {
                // its creator may not have synced it yet
                match files::open_foreign(&path).and_then(|file| file.sync_all()) {
                    Err(error) if error.kind() == ErrorKind::NotFound => continue,
                    synced => synced.and_then(|()| files::sync_parent(&path)).doing("write", &path)?,
                }
                join(paths, &text(number)).unwrap_or_else(|error| log::warn!("Failed to say who asks for {}: {error}.", paths.name()));
                return Ok(number);
            }
            // a link that leads nowhere, for one, no run would ever see; a directory one will clear away
            Found::Odd => files::remove(&path).doing("write", &path)?,
            Found::Nothing => {}
        }
        let number = now().max(after.max(served).saturating_add(1));
        match create(&path, &text(number)) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            created => return created.map(|()| number).doing("write", &path),
        }
    }
    Err(io::Error::from(ErrorKind::ResourceBusy)).doing("write", &path)
}

/// Says who joins in a request, once, if there is room for that.
fn join(paths: &Paths, text: &str) -> io::Result<()> {
    let is_mine =
        |path: &Path| files::read_owned(path, LIMIT).is_ok_and(|(said, owner)| said == text.as_bytes() && owner == geteuid().as_raw());
    for path in with_joined(paths) {
        if is_mine(&path) {
            return Ok(());
        }
        match create(&path, text) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            created => return created,
        }
    }
    Ok(())
}

/// The request, and what those leave who join in. No instance has a name with a point.
fn with_joined(paths: &Paths) -> impl Iterator<Item = PathBuf> {
    let request = paths.request();
    let joined: Vec<_> = (1..=JOINED).map(|number| request.with_file_name(format!(".{}.{number}", paths.name()))).collect();
    std::iter::once(request).chain(joined)
}

/// Makes the request appear with its number in it, or not at all. Until then it has no name that could
/// be in anybody's way.
fn create(path: &Path, text: &str) -> io::Result<()> {
    let directory = path.parent().ok_or(ErrorKind::InvalidInput)?;
    let mut file = files::unnamed(directory, 0o640)?;
    file.write_all(text.as_bytes())?;
    let unnamed = format!("/proc/self/fd/{}", file.as_raw_fd());
    linkat(AT_FDCWD, unnamed.as_str(), AT_FDCWD, path, AtFlags::AT_SYMLINK_FOLLOW)?;
    // in this order, one commit of the file system's journal does for both
    file.sync_all()?;
    files::sync_parent(path)
}

/// Looks what is there. A number is one only if it is higher than all that runs have served, and not out
/// of reach: numbers never jump.
fn find(path: &Path, served: u64) -> Found {
    let Some(text) = files::if_there(files::read_foreign(path, LIMIT)).transpose() else { return Found::Nothing };
    let text = text.ok().and_then(|text| String::from_utf8(text).ok());
    let number = text.and_then(|text| text.split(' ').next()?.parse().ok());
    let in_reach = |number: &u64| served < *number && *number <= now().max(served).saturating_add(REACH);
    number.filter(in_reach).map_or(Found::Odd, Found::Request)
}

/// Milliseconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| u64::try_from(time.as_millis()).unwrap_or(0))
}

/// The number of the request that waits for a run, if there is one. What lies in its place and is no request is
/// cleared away, and counts as one without a number.
pub fn waiting(paths: &Paths) -> Result<Option<u64>> {
    match find(&paths.request(), Status::read(paths).served) {
        Found::Nothing => Ok(None),
        Found::Request(number) => Ok(Some(number)),
        Found::Odd => clear(paths).map(|()| Some(0)),
    }
}

/// Who has asked for the request of this number that waits.
pub fn askers(paths: &Paths, number: u64) -> Vec<String> {
    let asker = |path: PathBuf| {
        let (text, owner) = files::read_owned(&path, LIMIT).ok()?;
        let text = String::from_utf8(text).ok()?;
        let mut words = text.split(' ');
        let is_it = words.next()?.parse() == Ok(number);
        // not one that was written for another instance, whoever has put it here
        let is_here = words.next().is_none_or(|name| name == paths.name());
        if is_it && is_here { asker::of_file(owner, words.next()) } else { None }
    };
    with_joined(paths).filter_map(asker).collect()
}

/// Removes the request that a run has found waiting, once its journal has the number.
pub fn remove(paths: &Paths, number: Option<u64>) -> Result<()> {
    // without a number, it is gone, and what is there now is another
    if number > Some(0) { clear(paths) } else { Ok(()) }
}

fn clear(paths: &Paths) -> Result<()> {
    for path in with_joined(paths).filter(|path| path.symlink_metadata().is_ok()) {
        files::clear(&path).doing("remove", &path)?;
    }
    let path = paths.request();
    // it has been taken, and must not be lost; one that a crash brings back leads to one run more
    let _ = files::sync_parent(&path);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::testing::Directory;

    /// What a run does about requests, up to the end of it.
    fn take(paths: &Paths) -> Option<u64> {
        let number = waiting(paths).unwrap();
        let served = number.unwrap_or(0).max(Status::read(paths).served);
        fs::write(paths.status(), format!("{{\"format\": 1, \"served\": {served}}}")).unwrap();
        remove(paths, number).unwrap();
        number
    }

    #[test]
    fn requests_before_a_run_are_one_and_later_ones_are_higher() {
        let directory = Directory::new();
        let paths = Paths::of_test(directory.path());
        assert_eq!(take(&paths), None);
        let first = request(&paths, 0, "alice").unwrap();
        assert_eq!(request(&paths, 0, "alice").unwrap(), first);
        assert_eq!(take(&paths), Some(first));
        let far = first + 1_000_000;
        assert_eq!(request(&paths, far, "alice").unwrap(), far + 1);
        assert_eq!(take(&paths), Some(far + 1));
        assert_eq!(take(&paths), None);
        assert_eq!(fs::read_dir(directory.path().join("queue")).unwrap().count(), 0);
    }

    #[test]
    fn those_who_join_in_are_said_once_and_of_this_request_alone() {
        let directory = Directory::new();
        let paths = Paths::of_test(directory.path());
        let me = asker::of_file(geteuid().as_raw(), Some("alice")).unwrap();
        fs::write(with_joined(&paths).nth(2).unwrap(), "5 app alice").unwrap();
        fs::write(with_joined(&paths).nth(4).unwrap(), "x").unwrap();
        let number = request(&paths, 0, "alice").unwrap();
        assert_eq!(askers(&paths, number), [&*me]);
        for _ in 0..20 {
            request(&paths, 0, "alice").unwrap();
        }
        assert_eq!(askers(&paths, number), [&*me]);
        request(&paths, 0, "bob").unwrap();
        for other in 0..20 {
            request(&paths, 0, &format!("another{other}")).unwrap();
        }
        assert_eq!(askers(&paths, number).len(), 1 + JOINED - 2);
        fs::write(paths.request(), format!("{number} other alice")).unwrap();
        assert_eq!(askers(&paths, number).len(), JOINED - 2);
        assert_eq!(take(&paths), Some(number));
        assert_eq!(fs::read_dir(directory.path().join("queue")).unwrap().count(), 0);
    }

    #[test]
    fn a_number_out_of_reach_is_none() {
        let directory = Directory::new();
        let paths = Paths::of_test(directory.path());
        let first = request(&paths, 0, "alice").unwrap();
        take(&paths);
        for odd in [&u64::MAX.to_string(), &(now() + 2 * REACH).to_string(), &first.to_string(), "1", "-1", "x", "", &"1".repeat(30)] {
            fs::write(paths.request(), odd).unwrap();
            assert_eq!(take(&paths), Some(0), "{odd}");
            fs::write(paths.request(), odd).unwrap();
            let next = request(&paths, 0, "alice").unwrap();
            assert!(first < next && next <= now().max(Status::read(&paths).served) + 1, "{odd}");
            assert_eq!(take(&paths), Some(next), "{odd}");
        }
    }

    #[test]
    fn whatever_lies_in_the_place_of_a_request_is_cleared_away_but_no_request_that_follows() {
        let directory = Directory::new();
        let paths = Paths::of_test(directory.path());
        fs::create_dir_all(paths.request().join("deep")).unwrap();
        assert!(request(&paths, 0, "alice").is_err());
        let odd = waiting(&paths).unwrap();
        let next = request(&paths, 0, "alice").unwrap();
        remove(&paths, odd).unwrap();
        assert_eq!((odd, take(&paths)), (Some(0), Some(next)));
        for target in ["/etc/passwd", "/nowhere"] {
            std::os::unix::fs::symlink(target, paths.request()).unwrap();
            // a path unit would not see the latter
            let number = request(&paths, 0, "alice").unwrap();
            assert_eq!(take(&paths), Some(number));
        }
        assert!(fs::metadata("/etc/passwd").is_ok());
        assert_eq!(fs::read_dir(directory.path().join("queue")).unwrap().count(), 0);
    }
}
