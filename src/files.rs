//! Files that survive a crash, and files that somebody else can write.
//!
//! A file written here is, after a power cut at any moment, either the old or the new one. A file
//! read here as somebody else's is never a link, a pipe or larger than asked for.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::fcntl::OFlag;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Context, Result};
use crate::program::Program;

/// Replaces the file `path` by one with these contents and permissions.
pub fn write(path: &Path, contents: &[u8], mode: u32) -> io::Result<()> {
    let mut name = path.file_name().ok_or(ErrorKind::InvalidInput)?.to_owned();
    name.push(".new");
    let new = path.with_file_name(name);
    let mut file =
        OpenOptions::new().write(true).create(true).truncate(true).mode(mode).custom_flags(OFlag::O_NOFOLLOW.bits()).open(&new)?;
    let written = file.write_all(contents).and_then(|()| file.sync_all()).and_then(|()| fs::rename(&new, path));
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

/// Removes the file `path`, if it is there.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        Ok(()) => sync_parent(path),
    }
}

/// Removes whatever is at `path`, if something is; rm knows its way out of any depth.
pub fn clear(path: &Path) -> Result<()> {
    if path.symlink_metadata().is_err_and(|error| error.kind() == ErrorKind::NotFound) {
        return Ok(());
    }
    let remove = Program::new("rm").args(["--recursive", "--force", "--"]).arg(path);
    remove.output(|| format!("remove {}", path.display()), None).map(drop)
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
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let file = OpenOptions::new().read(true).custom_flags(flags.bits()).open(path)?;
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
