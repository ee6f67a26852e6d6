//! A release in a host's repository: a commit of ours that says in its message which one it is.

use std::path::Path;

use crate::error::{Context, Error, Result};
use crate::files;
use crate::fleet::Manifest;
use crate::git::Repository;
use crate::json;
use crate::nix::Source;

/// The message of the commit that is a release.
pub fn message(manifest: &Manifest) -> Result<String> {
    let text = serde_json::to_string_pretty(manifest).context(|| "write the manifest".into())?;
    Ok(format!("release {}\n\n{text}\n", manifest.release.sequence))
}

/// The manifest of the release that a commit is, or is made from; `None` if the author of the commit has
/// written something else there.
pub fn of(repository: &Repository, commit: &str) -> Result<Option<Manifest>> {
    let message = repository.message(commit, "^release [0-9]+$")?;
    let manifest = message.as_deref().and_then(|message| message.split_once("\n\n"));
    Ok(manifest.and_then(|(_, text)| json::parse(text.as_bytes()).ok()))
}

/// Builds the system of a commit as the hub does: from a directory with its files and nothing else.
/// What the hub has built may be had without, if a substituter has it, or must be (`only`). `build` does it,
/// `directory` is for the files.
pub fn build(repository: &Repository, commit: &str, directory: &Path, only: bool, build: impl Fn(&Source) -> Result<()>) -> Result<()> {
    let manifest = of(repository, commit)?.ok_or_else(|| Error::new(format!("Failed to build {commit}: not a release")))?;
    let is_the_release = repository.subject(commit)? == format!("release {}", manifest.release.sequence);
    if let Some(system) = manifest.toplevel.as_ref().filter(|_| is_the_release) {
        match build(&Source::Store(system.path())) {
            Err(error) if !only => log::info!("{error}; evaluating the release on this host."),
            result => return result,
        }
    }
    files::make_directory(directory).doing("create", directory)?;
    repository.export(commit, directory)?;
    let result = build(&Source::of(directory, manifest.attr.as_deref()));
    files::clear(directory).doing("remove", directory).and(result)
}
