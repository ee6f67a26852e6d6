//! Requests on disk: one file per instance, named after it.
//!
//! Whoever may write the queue's directory (the webhook, root, the members of group ekiben) may
//! ask for a run; a request that is on disk will be served, whatever restarts in between. The
//! file holds a number that grows with every request, so that somebody who waits can tell
//! whether a run came after his own.
//!
//! Many requests before a run are one: they all get the number of the file that is there. A run
//! takes the file by renaming it, so that a request is either in the run or after it.

use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::error::{Context, Result};
use crate::files;
use crate::layout::Layout;

/// No number has more digits.
const NUMBER_BYTES: u64 = 20;
/// How often a request that runs keep taking away is tried again.
const TRIES: u32 = 100;

/// Asks for a run of the instance; returns the request's number when it is safely on disk.
/// `after` is the highest number known to be taken: the clock may have been set back.
pub fn request(layout: &Layout, after: u64) -> Result<u64> {
    let path = layout.request();
    let doing = || format!("write {}", path.display());
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| u64::try_from(time.as_millis()).unwrap_or(0));
    let number = now.max(after + 1);
    for _ in 0..TRIES {
        // one that is there was synced by whoever made it
        match read(&path) {
            Ok(pending) => return Ok(pending),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error).context(doing),
        }
        match create(&path, number) {
            Ok(()) => return Ok(number),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error).context(doing),
        }
    }
    Err(io::Error::from(ErrorKind::ResourceBusy)).context(doing)
}

/// Makes the request appear with its number in it, or not at all.
fn create(path: &Path, number: u64) -> io::Result<()> {
    // of this process, so that nobody else writes to it at the same time
    let new = path.with_file_name(format!(".{}-{}", path.file_name().unwrap_or_default().to_string_lossy(), std::process::id()));
    let _ = fs::remove_file(&new);
    let write = || -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o640).open(&new)?;
        file.write_all(number.to_string().as_bytes())?;
        file.sync_all()?;
        fs::hard_link(&new, path)
    };
    let written = write();
    let _ = fs::remove_file(&new);
    written?;
    files::sync_parent(path)
}

fn read(path: &Path) -> io::Result<u64> {
    let text = files::read_foreign(path, NUMBER_BYTES)?;
    let number = String::from_utf8(text).ok().and_then(|text| text.parse().ok());
    number.ok_or_else(|| io::Error::new(ErrorKind::InvalidData, "expected a number"))
}

/// Takes the request, if there is one, for a run that now begins; returns its number. What lies in
/// its place and is no request counts as one without a number.
pub fn take(layout: &Layout) -> Result<Option<u64>> {
    let (path, taken) = (layout.request(), layout.taken_request());
    // left by a run that was cut off before it had noted the number
    let earlier = read(&taken).ok();
    clear(&taken)?;
    match fs::rename(&path, &taken) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(earlier),
        Err(error) => return Err(error).context(|| format!("take {}", path.display())),
    }
    let _ = files::sync_parent(&path);
    Ok(read(&taken).ok().max(earlier).or(Some(0)))
}

/// Forgets the request that a run took, once its number is safe elsewhere.
pub fn forget(layout: &Layout) -> Result<()> {
    clear(&layout.taken_request())
}

fn clear(path: &Path) -> Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        _ => files::remove(path),
    };
    removed.context(|| format!("remove {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Directory;

    fn layout(directory: &Directory) -> Layout {
        for below in ["queue", "runs"] {
            fs::create_dir(directory.path().join(below)).unwrap();
        }
        Layout::below(directory.path(), "app")
    }

    #[test]
    fn requests_before_a_run_are_one_and_later_ones_are_higher() {
        let directory = Directory::new();
        let layout = layout(&directory);
        assert_eq!(take(&layout).unwrap(), None);
        let first = request(&layout, 0).unwrap();
        assert_eq!(request(&layout, 0).unwrap(), first);
        assert_eq!(take(&layout).unwrap(), Some(first));
        let far = first + 1_000_000_000;
        assert_eq!(request(&layout, far).unwrap(), far + 1);
        assert_eq!(take(&layout).unwrap(), Some(far + 1));
        forget(&layout).unwrap();
        assert_eq!(take(&layout).unwrap(), None);
        assert_eq!(fs::read_dir(directory.path().join("queue")).unwrap().count(), 0);
    }

    #[test]
    fn a_request_taken_by_a_run_that_was_cut_off_is_not_lost() {
        let directory = Directory::new();
        let layout = layout(&directory);
        let first = request(&layout, 0).unwrap();
        take(&layout).unwrap();
        assert_eq!(take(&layout).unwrap(), Some(first));
        let second = request(&layout, first + 5).unwrap();
        assert_eq!(take(&layout).unwrap(), Some(second));
    }

    #[test]
    fn whatever_lies_in_the_place_of_a_request_is_cleared_away() {
        let directory = Directory::new();
        let layout = layout(&directory);
        fs::create_dir_all(layout.request().join("deep")).unwrap();
        assert!(request(&layout, 0).is_err());
        assert_eq!(take(&layout).unwrap(), Some(0));
        std::os::unix::fs::symlink("/etc/passwd", layout.request()).unwrap();
        assert!(request(&layout, 0).is_err());
        assert_eq!(take(&layout).unwrap(), Some(0));
        fs::write(layout.request(), "123456789012345678901234567890").unwrap();
        assert_eq!(take(&layout).unwrap(), Some(0));
        forget(&layout).unwrap();
        assert!(fs::metadata("/etc/passwd").is_ok());
    }
}
