//! The files that the hub has for this host alone, such as secrets: fetched by the instance's user,
//! put in their places by root.
//!
//! The hub says what is in a file, where it belongs and whose it is; the host's own configuration
//! says below which directories that may be, so that not even a hub in wrong hands can write
//! anywhere else. A file that somebody else has made or changed is never replaced or removed.

use std::fs::{self, DirBuilder, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown};
use std::path::{Component, Path, PathBuf};

use nix::unistd::{Group, User};

use crate::config::Hub;
use crate::error::{Context, Error, Result};
use crate::files;
use crate::fleet::client::{Scratch, read_foreign};
use crate::fleet::sftp::Session;
use crate::fleet::{SMALL, Served, sha256};
use crate::layout::Layout;
use crate::names::Sha256;

/// Among what was fetched; the others are named as in `files` on the hub.
const INDEX: &str = "files/index.json";
/// A file on its way to its place, beside that.
const NEW: &str = ".ekiben";

/// Fetches what the hub has for this host and tells root by replacing the index. Where the hub has
/// no index, everything stays as it is.
pub fn fetch(session: &mut Session, layout: &Layout, scratch: &Scratch) -> Result<()> {
    let kept = layout.own("files");
    let doing = || "fetch files".to_owned();
    fs::create_dir_all(&kept).context(doing)?;
    // an index whose files are gone is an old one
    for _ in 0..2 {
        let index = scratch.fresh("index.json")?;
        if !session.get(INDEX, &index)? {
            return Ok(());
        }
        let served: Vec<Served> = read_foreign(&index)?;
        if fetch_all(session, &served, &kept)? {
            for entry in fs::read_dir(&kept).context(doing)?.flatten() {
                if entry.file_name() != "index.json" && served.iter().all(|served| entry.file_name() != *served.file) {
                    files::remove(&entry.path()).context(doing)?;
                }
            }
            // also if it is the same: what could not be put in its place before may be possible now
            return files::write_json(&layout.own(INDEX), &served, 0o600);
        }
    }
    Err("what the hub has is not what its index says").context(doing).map_err(Error::transient)
}

/// Fetches the files that are not there yet. Returns whether all are there then.
fn fetch_all(session: &mut Session, served: &[Served], kept: &Path) -> Result<bool> {
    for served in served {
        let local = kept.join(&served.file);
        let is_right = || Ok(local.exists() && sha256::of_file(&local)? == served.sha256);
        if is_right()? {
            continue;
        }
        files::remove(&local).context(|| "fetch files".into())?;
        if !session.get(&format!("files/{}", served.file), &local)? || !is_right()? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Puts what was fetched in its places, and removes what the hub has no more. What is wrong with one
/// file does not keep the others waiting; the hub is told of it with the next heartbeat.
pub fn install(layout: &Layout, hub: &Hub) -> Result<()> {
    let doing = || "read the hub's files".to_owned();
    let served: Vec<Served> = match files::read_foreign(&layout.own(INDEX), SMALL) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        text => serde_json::from_slice(&text.context(doing)?).context(doing)?,
    };
    let before: Vec<Served> = files::read_json(&layout.installed())?.unwrap_or_default();
    // before anything is put anywhere, or a crash could leave files that are nobody's
    files::write_json(&layout.installed(), &[&before[..], &served].concat(), 0o600)?;
    let (mut installed, mut failed) = (Vec::new(), Vec::new());
    let gone = before.iter().filter(|old| served.iter().all(|new| new.path != old.path)).map(|old| (old, remove(old, hub)));
    let placed = served.iter().map(|new| (new, place(layout, hub, new, &before)));
    for (file, done) in gone.chain(placed) {
        match done {
            Ok(true) => installed.push(file.clone()),
            Ok(false) => {}
            Err(error) => {
                log::error!("{error}.");
                installed.extend(before.iter().filter(|old| old.path == file.path).cloned());
                failed.push(error.to_string());
            }
        }
    }
    files::write_json(&layout.installed(), &installed, 0o600)?;
    let trouble = layout.trouble_with_files();
    let told = if failed.is_empty() { files::remove(&trouble) } else { files::write(&trouble, failed.join("\n").as_bytes(), 0o640) };
    told.context(|| format!("write {}", trouble.display()))?;
    if failed.is_empty() { Ok(()) } else { Err(Error::new(format!("Failed to put {} of the hub's files in their places", failed.len()))) }
}

/// Puts a file in its place, unless it is there; `before` are the files that are ours.
fn place(layout: &Layout, hub: &Hub, served: &Served, before: &[Served]) -> Result<bool> {
    let path = &served.path;
    let doing = || format!("put {path:?} in its place");
    let contents = files::read_foreign(&layout.own("files").join(&served.file), SMALL).context(doing)?;
    if sha256::of(&contents)? != served.sha256 {
        return Err("it is not what the hub says it is").context(doing);
    }
    let mode = u32::from_str_radix(&served.mode, 8).ok().filter(|mode| *mode <= 0o777);
    let mode = mode.ok_or_else(|| format!("expected permissions such as \"0400\", found {:?}", served.mode)).context(doing)?;
    let owner = User::from_name(&served.owner).context(doing)?;
    let owner = owner.ok_or_else(|| format!("there is no user {:?}", served.owner)).context(doing)?.uid.as_raw();
    let group = Group::from_name(&served.group).context(doing)?;
    let group = group.ok_or_else(|| format!("there is no group {:?}", served.group)).context(doing)?.gid.as_raw();

    let directory = directories(path, hub).and_then(|directories| make_directories(&directories)).context(doing)?;
    if let Some(there) = is_there(path).context(doing)? {
        if there == served.sha256 {
            let metadata = fs::metadata(path).context(doing)?;
            if (metadata.mode() & 0o7777, metadata.uid(), metadata.gid()) == (mode, owner, group) {
                return Ok(true);
            }
        } else if !is_ours(path, &there, before) {
            return Err("what is there is not what Ekiben has put there; move it away to get the hub's").context(doing);
        }
    }
    let new = directory.join(NEW);
    files::write(&new, &contents, 0o600).context(doing)?;
    // in this order: without the owner's privileges, only the owner can do the former
    let handed_over = fs::set_permissions(&new, Permissions::from_mode(mode)).and_then(|()| chown(&new, Some(owner), Some(group)));
    handed_over.and_then(|()| fs::rename(&new, path)).and_then(|()| files::sync_parent(path)).context(doing)?;
    log::info!("{} is in its place.", path.display());
    Ok(true)
}

/// Removes a file that is ours. Returns whether it is there all the same.
fn remove(served: &Served, hub: &Hub) -> Result<bool> {
    let path = &served.path;
    let doing = || format!("remove {path:?}");
    if let Err(error) = directories(path, hub) {
        log::warn!("{} stays: {error}.", path.display());
        return Ok(false);
    }
    match is_there(path).context(doing)? {
        None => {}
        Some(there) if there == served.sha256 => {
            files::remove(path).context(doing)?;
            log::info!("{} is removed: the hub has it no more.", path.display());
        }
        Some(_) => log::warn!("The hub has {} no more; it stays, since somebody has changed it.", path.display()),
    }
    Ok(false)
}

fn is_ours(path: &Path, sha256: &Sha256, before: &[Served]) -> bool {
    before.iter().any(|old| old.path == path && old.sha256 == *sha256)
}

/// The SHA-256 of the file that is there, if one is.
fn is_there(path: &Path) -> Result<Option<Sha256>, String> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Ok(metadata) if metadata.is_file() => sha256::of_file(path).map(Some).map_err(|error| error.to_string()),
        Ok(_) => Err("what is there is not a file".into()),
        Err(error) => Err(error.to_string()),
    }
}

/// The directories that lead to a file, from one that the configuration allows to the one that the
/// file is in.
fn directories(path: &Path, hub: &Hub) -> Result<Vec<PathBuf>, String> {
    let plain = path.components().skip(1).all(|part| matches!(part, Component::Normal(_)));
    let inside = hub.file_directories.iter().find(|allowed| path != *allowed && path.starts_with(allowed));
    let (Some(allowed), Some(parent), Some(name)) = (inside.filter(|_| plain && path.is_absolute()), path.parent(), path.file_name())
    else {
        return Err(format!("expected a path below one of services.ekiben.fleet.fileDirectories: {:?}", hub.file_directories));
    };
    if name.to_string_lossy().starts_with(NEW) {
        return Err(format!("expected another name than {NEW}"));
    }
    let mut directories: Vec<_> = parent.ancestors().take_while(|above| above.starts_with(allowed)).map(Path::to_owned).collect();
    directories.reverse();
    Ok(directories)
}

/// Makes directories, each in the one before. Returns the last. Fails if one is a link, or not
/// root's alone to change.
fn make_directories(directories: &[PathBuf]) -> Result<PathBuf, String> {
    for directory in directories {
        let made = DirBuilder::new().mode(0o711).create(directory);
        if let Err(error) = made.or_else(|error| if error.kind() == ErrorKind::AlreadyExists { Ok(()) } else { Err(error) }) {
            return Err(format!("{}: {error}", directory.display()));
        }
        let metadata = fs::symlink_metadata(directory).map_err(|error| error.to_string())?;
        if !metadata.is_dir() || metadata.uid() != 0 || metadata.mode() & 0o022 != 0 {
            return Err(format!("{} is not a directory that nobody but root can change", directory.display()));
        }
    }
    directories.last().cloned().ok_or_else(|| "there is no directory".into())
}
