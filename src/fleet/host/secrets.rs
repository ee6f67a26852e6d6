//! The files that the hub has for this host alone, such as secrets: fetched by the instance's user,
//! put in their places by root.
//!
//! The hub says what is in a file, where it belongs and whose it is; the host's own configuration
//! says below which directories that may be, so that not even a hub in wrong hands can write
//! anywhere else. A file that somebody else has made or changed is never replaced or removed.

use std::fs::{self, DirBuilder, File, Metadata, Permissions};
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use nix::unistd::{Group, User};
use serde_json::Value;

use crate::config::Hub;
use crate::error::{Context, Error, OrLog, Result};
use crate::files;
use crate::fleet::place::Place;
use crate::fleet::sftp::Session;
use crate::fleet::{SMALL, Served, sha256};
use crate::json;
use crate::names::Sha256;
use crate::paths::Paths;

/// What there is, here and on the hub; the others are named as in `files` there.
pub const INDEX: &str = "files/index.json";
/// A file on its way to its place, beside that.
const NEW: &str = ".ekiben";
/// The permissions of the directories that are made for files.
const MADE: u32 = 0o711;
/// How many files a hub may have for a host, and how many directories below one of those that are configured
/// each may be in.
const MOST: usize = 256;
const DEPTH: usize = 16;
/// After how long root looks at the files again although the hub has nothing new: some may have been removed.
const AGAIN: Duration = Duration::from_secs(60 * 60);
/// How many troubles the hub is told of.
const SAID: usize = 20;

/// Fetches what the hub has for this host and tells root by replacing the index, if that is another one or it is time to look again. Where the hub has
/// no index, everything is left unchanged.
pub fn fetch(session: &mut Session, paths: &Paths, scratch: &Path) -> Result<()> {
    let kept = paths.own("files");
    let doing = || "fetch files".to_owned();
    fs::create_dir_all(&kept).context(doing)?;
    let index = scratch.join("index.json");
    // an index whose files are gone is an old one
    for _ in 0..2 {
        files::clear(&index).context(doing)?;
        if !session.get(INDEX, &index, SMALL)? {
            return Ok(());
        }
        let contents = files::read_foreign(&index, SMALL).context(doing)?;
        let (served, _) = read_index(&contents)?;
        if fetch_all(session, &served, &kept)? {
            for entry in fs::read_dir(&kept).context(doing)?.flatten() {
                if entry.file_name() != "index.json" && served.iter().all(|served| entry.file_name() != *served.file) {
                    files::clear(&entry.path()).context(doing)?;
                }
            }
            let known = paths.own(INDEX);
            let is_same = fs::read(&known).is_ok_and(|known| known == contents) && files::age(&known).is_ok_and(|age| age < AGAIN);
            // what root could not put in its place before, or was cut off at, may be possible now
            let is_done = is_same && time(&known) == time(&paths.served()) && !paths.trouble_with_files().exists();
            return if is_done { Ok(()) } else { files::write(&known, &contents, 0o600).context(doing) };
        }
    }
    Err("the file does not match the index").context(doing).map_err(Error::transient)
}

fn time(path: &Path) -> Option<SystemTime> {
    path.symlink_metadata().and_then(|metadata| metadata.modified()).ok()
}

/// Fetches the files that are not there yet. Returns whether all are there then.
fn fetch_all(session: &mut Session, served: &[Served], kept: &Path) -> Result<bool> {
    for served in served {
        let local = kept.join(&served.file);
        let is_right = || local.is_file() && sha256::of_file(&local).is_ok_and(|sha256| sha256 == served.sha256);
        if is_right() {
            continue;
        }
        files::clear(&local).context(|| "fetch files".into())?;
        if !session.get(&format!("files/{}", served.file), &local, SMALL)? || !is_right() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// What the hub says it has, by the contents of its index, and what is wrong with the rest of that.
fn read_index(contents: &[u8]) -> Result<(Vec<Served>, Vec<String>)> {
    let doing = || "read the index of the hub's files".to_owned();
    let entries: Vec<Value> = json::parse(contents).context(doing)?;
    if entries.len() > MOST {
        return Err(format!("expected at most {MOST} files, found {}", entries.len())).context(doing);
    }
    let (mut served, mut failed) = (Vec::new(), Vec::new());
    for entry in entries {
        match json::from_value(&entry).context(|| "accept a file from the hub".into()) {
            Ok(file) => served.push(file),
            Err(error) => failed.push(error.to_string()),
        }
    }
    Ok((served, failed))
}

/// Puts what was fetched in its places, and removes what the hub has no more. What is wrong with one
/// file does not keep the others waiting; the hub is told of it with the next heartbeat.
pub fn install(paths: &Paths, hub: &Hub) -> Result<()> {
    let read = time(&paths.own(INDEX));
    let contents = files::if_there(files::read_foreign_below(&paths.own(""), INDEX, SMALL));
    let Some(contents) = contents.context(|| "read the index of the hub's files".into())? else { return Ok(()) };
    let (served, mut failed) = read_index(&contents)?;
    for why in &failed {
        log::error!("{why}.");
    }
    // what is in its place as it should be counts as ours again
    let before: Vec<Served> = files::read_json(&paths.installed()).or_warn().flatten().unwrap_or_default();
    // before anything is put anywhere, or a crash could leave files that are nobody's
    files::write_json(&paths.installed(), &[&before[..], &served].concat(), 0o600)?;
    let mut installed = Vec::new();
    let gone = before.iter().filter(|old| served.iter().all(|new| new.path != old.path)).map(|old| (old, remove(old, hub).map(|()| None)));
    let placed = served.iter().map(|new| (new, place(paths, hub, new, &before).map(|()| Some(new))));
    for (file, done) in gone.chain(placed) {
        match done {
            Ok(there) => installed.extend(there.cloned()),
            Err(error) => {
                log::error!("{error}.");
                installed.extend(before.iter().filter(|old| old.path == file.path).cloned());
                failed.push(error.to_string());
            }
        }
    }
    files::write_json(&paths.installed(), &installed, 0o600)?;
    let trouble = paths.trouble_with_files();
    let text = failed.iter().take(SAID).map(String::as_str).collect::<Vec<_>>().join("; ");
    let told = if failed.is_empty() { files::remove(&trouble) } else { files::write(&trouble, text.as_bytes(), 0o640) };
    told.doing("write", &trouble)?;
    let served = File::create(paths.served()).and_then(|file| read.map_or(Ok(()), |time| file.set_modified(time)));
    served.doing("write", &paths.served())?;
    if failed.is_empty() { Ok(()) } else { Err(Error::new(format!("Failed to install {} of the hub's files", failed.len()))) }
}

/// Puts a file in its place, unless it is there; `before` are the files that are ours.
fn place(paths: &Paths, hub: &Hub, served: &Served, before: &[Served]) -> Result<()> {
    let path: &Path = served.path.as_ref();
    let doing = || format!("install {path:?}");
    let contents = files::read_foreign_below(&paths.own(""), format!("files/{}", served.file), SMALL).context(doing)?;
    if sha256::of(&contents)? != served.sha256 {
        return Err("the file does not match the index").context(doing);
    }
    let mode = served.mode.into();
    let owner = User::from_name(&served.owner).context(doing)?;
    let owner = owner.ok_or_else(|| format!("there is no user {:?}", &*served.owner)).context(doing)?.uid.as_raw();
    let group = Group::from_name(&served.group).context(doing)?;
    let group = group.ok_or_else(|| format!("there is no group {:?}", &*served.group)).context(doing)?.gid.as_raw();

    let directories = directories(path, hub).context(doing)?;
    directories.iter().try_for_each(|directory| make_directory(directory)).context(doing)?;
    if let Some(there) = is_there(path).context(doing)? {
        if there == served.sha256 {
            let metadata = fs::metadata(path).context(doing)?;
            if (metadata.mode() & 0o7777, metadata.uid(), metadata.gid()) == (mode, owner, group) {
                return Ok(());
            }
        } else if !before.iter().any(|old| old.path == served.path && old.sha256 == there) {
            return Err("the file was not installed by Ekiben; move it away to have it replaced").context(doing);
        }
    }
    let new = path.with_file_name(NEW);
    files::clear(&new).and_then(|()| files::write(&new, &contents, 0o600)).context(doing)?;
    // in this order: without the owner's privileges, only the owner can do the former
    let handed_over = fs::set_permissions(&new, Permissions::from_mode(mode)).and_then(|()| chown(&new, Some(owner), Some(group)));
    handed_over.and_then(|()| fs::rename(&new, path)).and_then(|()| files::sync_parent(path)).context(doing)?;
    log::info!("Installed {}.", path.display());
    Ok(())
}

/// Removes a file that is ours.
fn remove(served: &Served, hub: &Hub) -> Result<()> {
    let path: &Path = served.path.as_ref();
    let doing = || format!("remove {path:?}");
    let directories = directories(path, hub).and_then(|directories| {
        let other = directories.iter().find(|directory| !directory.symlink_metadata().is_ok_and(|metadata| is_roots(&metadata)));
        other.map_or(Ok(directories.clone()), |other| Err(format!("{} is not a directory owned by root", other.display())))
    });
    let keeping = |error: &String| log::warn!("Keeping {}: {error}.", path.display());
    let Ok(directories) = directories.inspect_err(keeping) else { return Ok(()) };
    match is_there(path).context(doing)? {
        None => {}
        Some(there) if there == served.sha256 => {
            files::remove(path).context(doing)?;
            // those that were made for it, as long as nothing else is in them
            let made =
                directories[1..].iter().rev().take_while(|made| made.metadata().is_ok_and(|metadata| metadata.mode() & 0o7777 == MADE));
            for directory in made {
                if fs::remove_dir(directory).is_err() {
                    break;
                }
            }
            log::info!("Removed {}: no longer offered by the hub.", path.display());
        }
        Some(_) => log::warn!("Keeping {}: no longer offered by the hub, but changed on this host.", path.display()),
    }
    Ok(())
}

/// The SHA-256 of the file that is there, if one is.
fn is_there(path: &Path) -> Result<Option<Sha256>, String> {
    match files::if_there(fs::symlink_metadata(path)).map_err(|error| error.to_string())? {
        Some(metadata) if !metadata.is_file() => Err("not a regular file".into()),
        there => there.map(|_| sha256::of_file(path)).transpose().map_err(|error| error.to_string()),
    }
}

/// The directories that lead to a file, from one that the configuration allows to the one that the
/// file is in.
fn directories(path: &Path, hub: &Hub) -> Result<Vec<PathBuf>, String> {
    let inside = hub.file_directories.iter().find(|allowed| path != *allowed && path.starts_with(allowed));
    let (Some(allowed), Some(parent)) = (inside, path.parent()) else {
        return Err(format!("expected a path below one of services.ekiben.fleet.fileDirectories: {:?}", hub.file_directories));
    };
    if path.iter().any(|part| part.as_bytes().starts_with(NEW.as_bytes())) {
        return Err(format!("expected another name than {NEW}"));
    }
    if path.iter().count() > allowed.iter().count() + DEPTH + 1 {
        return Err(format!("expected a path with at most {DEPTH} directories below {}", allowed.display()));
    }
    let mut directories: Vec<_> = parent.ancestors().take_while(|above| above.starts_with(allowed)).map(Path::to_owned).collect();
    directories.reverse();
    Ok(directories)
}

/// Makes a directory, unless it is there. Fails if it is a link, or not root's alone to change.
fn make_directory(directory: &Path) -> Result<(), String> {
    let why = |error: io::Error| format!("{}: {error}", directory.display());
    match DirBuilder::new().mode(MADE).create(directory) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(why(error)),
        _ => {}
    }
    if is_roots(&fs::symlink_metadata(directory).map_err(why)?) {
        return Ok(());
    }
    Err(format!("{} is not a directory that only root can change", directory.display()))
}

fn is_roots(metadata: &Metadata) -> bool {
    metadata.is_dir() && metadata.uid() == 0 && metadata.mode() & 0o022 == 0
}
