//! What has to be known of a fast-forward to go back from it, as a file holds it.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What the fast-forward changes at a path, from the top of the working tree. A submodule is no file.
#[derive(Clone, Debug, PartialEq)]
pub struct Changed {
    /// Where it is.
    pub path: PathBuf,
    /// Whether a file is there before.
    pub before: bool,
    /// Whether a file is there afterwards.
    pub after: bool,
}

/// A fast-forward that was cut off.
#[derive(Debug, Default, PartialEq)]
pub struct CutOff {
    /// The commit it began at.
    pub from: String,
    /// The commit it led to.
    pub to: String,
    /// What it changes.
    pub files: Vec<Changed>,
    /// The directories that were there, and their permissions.
    pub directories: BTreeMap<PathBuf, u32>,
    /// The reflogs, below the git directory, how long they were, none if they were not there, and of when.
    pub reflogs: Vec<(PathBuf, Option<u64>, Duration)>,
}

impl CutOff {
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut parts = vec![self.from.clone().into_bytes(), self.to.clone().into_bytes()];
        let mut add = |what: String, path: &Path| parts.push([what.as_bytes(), b" ", path.as_os_str().as_bytes()].concat());
        for file in &self.files {
            add(format!("file {} {}", u8::from(file.before), u8::from(file.after)), &file.path);
        }
        for (path, mode) in &self.directories {
            add(format!("directory {mode} -"), path);
        }
        for (path, length, modified) in &self.reflogs {
            add(format!("reflog {} {}", length.map_or("-".into(), |length| length.to_string()), modified.as_nanos()), path);
        }
        parts.join(&0)
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Self {
        let mut parts = bytes.split(|byte| *byte == 0);
        let text = |part: Option<&[u8]>| String::from_utf8_lossy(part.unwrap_or_default()).into_owned();
        let mut cut_off = Self { from: text(parts.next()), to: text(parts.next()), ..Self::default() };
        for part in parts {
            let mut words = part.splitn(4, |byte| *byte == b' ');
            let (kind, one, two) = (text(words.next()), text(words.next()), text(words.next()));
            let path = PathBuf::from(OsStr::from_bytes(words.next().unwrap_or_default()));
            match kind.as_str() {
                "file" => cut_off.files.push(Changed { path, before: one == "1", after: two == "1" }),
                "directory" => drop(cut_off.directories.insert(path, one.parse().unwrap_or(0o755))),
                _ => cut_off.reflogs.push((path, one.parse().ok(), Duration::from_nanos(two.parse().unwrap_or_default()))),
            }
        }
        cut_off
    }
}

pub(super) fn join<'a>(paths: impl Iterator<Item = &'a OsStr>) -> Vec<u8> {
    paths.map(OsStr::as_bytes).collect::<Vec<_>>().join(&0)
}

pub(super) fn split(bytes: &[u8]) -> impl Iterator<Item = &Path> {
    bytes.split(|byte| *byte == 0).filter(|path| !path.is_empty()).map(|path| Path::new(OsStr::from_bytes(path)))
}
