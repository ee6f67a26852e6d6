//! Files that survive a crash, and files that somebody else can write.
//!
//! A file written here is, after a power cut at any moment, either the old or the new one. A file
//! read here as somebody else's is never a link, a pipe or larger than asked for.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component, Path};

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Context, Result};
use crate::program::Program;

/// Replaces the file `path` by one with these contents and permissions.
pub fn write(path: &Path, contents: &[u8], mode: u32) -> io::Result<()> {
    let mut name = path.file_name().ok_or(ErrorKind::InvalidInput)?.to_owned();
    name.push(".new");
    let new = path.with_file_name(name);
    clear(&new)?;
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&new)?;
    let rename = || match fs::rename(&new, path) {
        Err(error) if error.kind() == ErrorKind::IsADirectory => clear(path).and_then(|()| fs::rename(&new, path)),
        other => other,
    };
    let written = file.write_all(contents).and_then(|()| file.sync_all()).and_then(|()| rename());
    if written.is_err() {
        // a full disk must not stay full because of this file
        let _ = fs::remove_file(&new);
    }
    written?;
    sync_parent(path)
}

/// The same for a value, as JSON. The error says which file.
pub fn write_json(path: &Path, value: &impl Serialize, mode: u32) -> Result<()> {
    let doing = || format!("write {}", path.display());
    write(path, &serde_json::to_vec_pretty(value).context(doing)?, mode).context(doing)
}

/// Reads a JSON file that nobody else can have written; none if it is not there.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let doing = || format!("read {}", path.display());
    match fs::read(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        other => serde_json::from_slice(&other.context(doing)?).map(Some).context(doing),
    }
}

/// Keeps room on the disk, to be given up for something small when the disk is full.
pub fn reserve(path: &Path, size: u64) -> io::Result<()> {
    if path.try_exists()? {
        return Ok(());
    }
    let mut contents = Vec::new();
    // what a file system could compress would keep no room
    File::open("/dev/urandom")?.take(size).read_to_end(&mut contents)?;
    write(path, &contents, 0o600)
}

/// Removes the file `path`, if it is there.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        Ok(()) => sync_parent(path),
    }
}

/// Removes whatever is at `path`, if something is; rm knows its way out of any depth.
pub fn clear(path: &Path) -> io::Result<()> {
    if path.symlink_metadata().is_err_and(|error| error.kind() == ErrorKind::NotFound) {
        return Ok(());
    }
    let remove = Program::new("rm").args(["--recursive", "--force", "--"]).arg(path);
    remove.output(|| format!("remove {}", path.display()), None).map(drop).map_err(|error| io::Error::other(error.to_string()))
}

/// Makes an empty directory in the place of what is there.
pub fn make_directory(path: &Path) -> io::Result<()> {
    clear(path).and_then(|()| fs::create_dir_all(path))
}

/// Makes the creation, renaming or removal of `path` durable.
pub fn sync_parent(path: &Path) -> io::Result<()> {
    sync(path.parent().ok_or(ErrorKind::InvalidInput)?)
}

/// Makes the contents of a file, or the names in a directory, durable.
pub fn sync(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Reads a file of which only the directory above it is trusted: no link, no pipe, no device is
/// opened, and a file of more than `limit` bytes is an error.
pub fn read_foreign(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let name = path.file_name().ok_or(ErrorKind::InvalidInput)?;
    read_foreign_below(path.parent().ok_or(ErrorKind::InvalidInput)?, name, limit)
}

/// The same with more than a name, below a directory that is trusted: what leads from there to the file is
/// somebody else's, too, and no link.
pub fn read_foreign_below(directory: &Path, path: impl AsRef<Path>, limit: u64) -> io::Result<Vec<u8>> {
    // openat2 does this by itself, but not in a unit that RestrictSUIDSGID= protects
    let open = |at: &OwnedFd, name: &OsStr, flags: OFlag| openat(at, name, flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty());
    let is_directory = OFlag::O_PATH | OFlag::O_DIRECTORY;
    let mut at: OwnedFd = OpenOptions::new().read(true).custom_flags(is_directory.bits()).open(directory)?.into();
    let mut parts = path.as_ref().components().peekable();
    let file = loop {
        let Some(Component::Normal(name)) = parts.next() else { return Err(ErrorKind::InvalidInput.into()) };
        if parts.peek().is_none() {
            break File::from(open(&at, name, OFlag::O_NONBLOCK | OFlag::O_NOCTTY)?);
        }
        at = open(&at, name, is_directory)?;
    };
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(ErrorKind::InvalidData, "not a regular file"));
    }
    let mut contents = Vec::new();
    file.take(limit + 1).read_to_end(&mut contents)?;
    if contents.len() as u64 > limit {
        return Err(io::Error::new(ErrorKind::FileTooLarge, format!("more than {limit} bytes")));
    }
    Ok(contents)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Directory;
    use std::os::unix::fs::symlink;

    #[test]
    fn whatever_is_in_the_way_of_a_file_is_removed() {
        let place = Directory::new();
        let (there, outside) = (place.path().join("there"), place.path().join("outside"));
        fs::write(&outside, "").unwrap();
        for place in [&there, &place.path().join("there.new")] {
            let make: [&dyn Fn(); 3] = [&|| fs::write(place, "old").unwrap(), &|| symlink(&outside, place).unwrap(), &|| {
                fs::create_dir_all(place.join("a/b")).unwrap();
            }];
            for make in make {
                clear(place).unwrap();
                make();
                write(&there, b"new", 0o600).unwrap();
                assert_eq!(fs::read(&there).unwrap(), b"new");
                clear(place).unwrap();
                make();
                make_directory(place).unwrap();
                assert_eq!(fs::read_dir(place).unwrap().count(), 0);
            }
            clear(place).unwrap();
        }
        assert_eq!(fs::read(&outside).unwrap(), b"");
    }

    #[test]
    fn what_somebody_else_has_put_there_leads_nowhere() {
        let place = Directory::new();
        let (trusted, other) = (place.path().join("trusted"), place.path().join("other"));
        for directory in [&trusted.join("theirs"), &other] {
            fs::create_dir_all(directory).unwrap();
            fs::write(directory.join("file"), "x").unwrap();
        }
        symlink(&other, trusted.join("absolute")).unwrap();
        symlink("theirs", trusted.join("within")).unwrap();
        symlink("file", trusted.join("theirs/link")).unwrap();
        nix::unistd::mkfifo(&trusted.join("theirs/fifo"), Mode::S_IRWXU).unwrap();
        let read = |path: &str, limit| read_foreign_below(&trusted, path, limit).map(|contents| contents.len()).ok();
        assert_eq!(read("theirs/file", 1), Some(1));
        assert_eq!(read("theirs/file", 0), None);
        for odd in ["absolute/file", "within/file", "theirs/link", "theirs/fifo", "theirs", "", "../other/file", "theirs/../../other/file"]
        {
            assert_eq!(read(odd, 1), None, "{odd}");
        }
        assert!(read_foreign(&trusted.join("theirs/link"), 1).is_err());
        // whoever says which directory is trusted may have a link to it
        assert_eq!(read_foreign(&trusted.join("within/file"), 1).unwrap(), b"x");
    }

    #[test]
    fn nothing_is_too_deep_to_be_removed() {
        let place = Directory::new();
        let top = place.path().join("deep");
        fs::create_dir(&top).unwrap();
        let (flags, mode) = (OFlag::O_PATH | OFlag::O_DIRECTORY, Mode::S_IRWXU);
        let mut directory = nix::fcntl::open(&top, flags, mode).unwrap();
        for _ in 0..2_000 {
            nix::sys::stat::mkdirat(&directory, "d", mode).unwrap();
            directory = openat(&directory, "d", flags, mode).unwrap();
        }
        clear(&top).unwrap();
        assert!(!top.exists());
        clear(&top).unwrap();
        symlink("/etc", &top).unwrap();
        clear(&top).unwrap();
        assert!(!top.is_symlink() && Path::new("/etc").exists());
    }
}
