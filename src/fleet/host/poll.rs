//! A host's part of the fleet: it asks its hub for a release, in one session, and tells how it is.
//!
//! A release is accepted only if its manifest is of this host, is signed where signatures are
//! asked for and does not go back, and if its archive is the one of the manifest. It becomes a
//! commit in a repository of the instance's own, in which nobody else commits; from there on it is
//! a candidate like any other. Nothing here runs as root.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::geteuid;

use crate::config::{Hub, Instance};
use crate::error::{Context, Error, OrLog, Result};
use crate::files;
use crate::fleet::archive::unpack::unpack;
use crate::fleet::host::delivery::deliver_by;
use crate::fleet::host::peers::{self, Peers};
use crate::fleet::host::{heartbeat, release, secrets, seen};
use crate::fleet::place::Place;
use crate::fleet::{FORMAT, Heartbeat, LARGE, LastRun, Manifest, NAMESPACE, SMALL, Signed, sha256};
use crate::git::signature::{BY_NONE, is_signed};
use crate::git::{Repository, own};
use crate::json;
use crate::paths::Paths;
use crate::program::Program;
use crate::run::drift::is_deployed;
use crate::run::status::Status;
use crate::run::{Outcome, Release, Stage};
use crate::system::health::FINAL;
use crate::system::now;
use crate::text::ago;

/// How long one try of `ekiben reach` may take.
const REACH: Duration = Duration::from_secs(30);
/// What is said where the hub is there, and what serves is not. Not who closes or resets a connection: sshd may do that to
/// an address from which others have failed to log in.
const SERVES_NOBODY: [&str; 2] = ["Connection refused", "returned error: 5"];
/// How long a look may.
const LOOK: Duration = Duration::from_secs(120);
/// What the hub's manifest was when it was accepted last, and for which settings.
const ACCEPTED: &str = "accepted";
/// Where the hub has it.
const MANIFEST: &str = "release/manifest.json";

/// Asks the hub for its release, and tells it what became of that, with what it has not been told yet. Returns its
/// manifest, and the commit to start from: HEAD, if the release is in it, or a new one on top.
pub fn fetch(paths: &Paths, instance: &Instance, hub: &Hub, repository: &Repository) -> Result<(Manifest, String)> {
    let scratch = peers::scratch(paths)?;
    let limit = Duration::from_secs(instance.timeouts.prepare);
    let mut peers = Peers::open(paths, hub, scratch.path(), limit, &fetched(hub))?;
    let files = fetch_files(&mut peers, paths, hub, scratch.path());
    let untold = files.as_ref().err().map(ToString::to_string);
    let taken = files.and_then(|()| take(peers.releases()?, paths, instance, hub, repository, scratch.path()));

    let mut beat = heartbeat::now(paths, hub, taken.is_ok());
    beat.files = beat.files.or(untold);
    match &taken {
        Ok((manifest, commit)) => {
            beat.expires = manifest.expires;
            // of what has been tried in vain, the hub knows
            let is_tried = beat.last.as_ref().is_some_and(|last| last.release.as_ref() == Some(&manifest.release));
            beat.running = Some(manifest.release.clone()).filter(|_| *commit != repository.head && !is_tried);
        }
        // what the run will end with
        Err(error) => {
            let (error, finished) = (Some(error.to_string()), now());
            beat.last = Some(LastRun { release: None, result: Outcome::Failed, stage: Some(Stage::Prepare), error, finished });
        }
    }
    // what the hub does not want to be told now, the next poll tells
    let told = deliver_by(&mut peers, paths, hub, scratch.path(), &beat).and_then(|()| peers.close());
    told.or_warn();
    taken
}

/// Fetches the hub's files, and tells it how the instance is; fails unless it still offers the release that was accepted and
/// deployed last.
pub fn look(paths: &Paths, instance: &Instance, hub: &Hub) -> Result<()> {
    let scratch = peers::scratch(paths)?;
    let mut peers = Peers::open(paths, hub, scratch.path(), LOOK, &fetched(hub))?;
    fetch_files(&mut peers, paths, hub, scratch.path())?;
    let manifest = fetch_manifest(peers.releases()?, hub, scratch.path())?;
    let expires = known(paths, instance, hub, &manifest)?.expires;
    deliver_by(&mut peers, paths, hub, scratch.path(), &Heartbeat { expires, ..heartbeat::now(paths, hub, true) })?;
    peers.close()
}

/// Whether the hub offers a later release now than `known`, of something else.
pub fn offers_another(paths: &Paths, hub: &Hub, known: &Release) -> Result<bool> {
    let offered = offered(paths, hub, peers::scratch(paths)?.path(), LOOK)?;
    Ok(offered.id != known.id && offered.sequence > known.sequence)
}

/// The release that the hub offers now.
fn offered(paths: &Paths, hub: &Hub, scratch: &Path, limit: Duration) -> Result<Release> {
    let mut peers = Peers::of_releases(paths, hub, scratch, limit, &[MANIFEST])?;
    let manifest = read_manifest(&fetch_manifest(peers.releases()?, hub, scratch)?, hub, scratch)?;
    peers.close().map(|()| manifest.release)
}

/// What each poll fetches in its session with the hub.
fn fetched(hub: &Hub) -> Vec<&'static str> {
    let index = (!hub.file_directories.is_empty()).then_some(secrets::INDEX);
    index.into_iter().chain(hub.url.is_none().then_some(MANIFEST)).collect()
}

fn fetch_files(peers: &mut Peers, paths: &Paths, hub: &Hub, scratch: &Path) -> Result<()> {
    match &mut peers.session {
        Some(session) if !hub.file_directories.is_empty() => secrets::fetch(session, paths, scratch),
        _ => Ok(()),
    }
}

/// The manifest in a file, which is to be the one that was accepted last, and of what was deployed last.
fn known(paths: &Paths, instance: &Instance, hub: &Hub, file: &Path) -> Result<Manifest> {
    let doing = || "do without a run".to_owned();
    let offered = files::read_foreign(file, SMALL).context(doing)?;
    if fs::read(paths.own(ACCEPTED)).context(doing)? != as_accepted(&offered, hub)? {
        return Err("the hub has another release").context(doing);
    }
    let signed: Signed = json::parse(&offered).context(doing)?;
    let manifest = signed.read().context(doing)?;
    let head = own::head(instance)?;
    let deployed = Status::read(paths).deployed.and_then(|deployed| deployed.release);
    if deployed.as_ref() != Some(&manifest.release) || !seen::is_last(paths, &manifest.release) || !is_deployed(paths, &head, instance) {
        return Err("the release is not what was deployed last").context(doing);
    }
    if hub.url.is_some() {
        // as of now: see `seen::is_behind`
        seen::remember(paths, &manifest.release)?;
    }
    Ok(manifest)
}

fn as_accepted(manifest: &[u8], hub: &Hub) -> Result<Vec<u8>> {
    Ok([manifest, &serde_json::to_vec_pretty(hub).context(|| "write the settings".into())?].concat())
}

/// Takes what the hub offers; what is refused of it is noted, whatever it is refused for.
fn take(
    place: &mut dyn Place,
    paths: &Paths,
    instance: &Instance,
    hub: &Hub,
    repository: &Repository,
    scratch: &Path,
) -> Result<(Manifest, String)> {
    let current = release::of(repository, &repository.head)?;
    let committed = current.as_ref().map(|manifest| manifest.release.clone());
    let (file, source) = (fetch_manifest(place, hub, scratch)?, scratch.join("source"));
    let accept = || {
        let manifest = read_manifest(&file, hub, scratch)?;
        let release = &manifest.release;
        if let Err(error) = seen::check(paths, release, committed.clone(), now()) {
            let Some(current) = current.clone().filter(|_| hub.url.is_some() && seen::is_behind(paths, release)) else { return Err(error) };
            log::warn!("{error}. For an hour, this counts as nothing new: a cache may have kept it.");
            return Ok((current, true));
        }
        let known = committed.is_some_and(|committed| committed.id == release.id);
        if let Some(expires) = manifest.expires.filter(|_| !known && manifest.has_expired(now())) {
            let why = format!("it expired {}; the hub replays it, or nobody has renewed it: deploy again", ago(expires, now()));
            return Err(why).context(|| format!("accept release {} of {}", release.sequence, release.id));
        }
        let tarball = paths.own(&manifest.archive());
        let is_archive = |path: &Path| path.to_string_lossy().ends_with(".tar.gz");
        // of releases that came to nothing
        files::clean(&paths.own(""), |path| !is_archive(path) || !known && path == tarball)?;
        if !known {
            fetch_archive(place, &manifest, &tarball)?;
            unpack(&tarball, &source)?;
        }
        seen::remember(paths, release)?;
        // lost in a crash, it is only made again
        let accepted = files::read_foreign(&file, SMALL).doing("read", &file)?;
        fs::write(paths.own(ACCEPTED), as_accepted(&accepted, hub)?).doing("write", &paths.own(ACCEPTED))?;
        Ok((manifest, known))
    };
    let accepted = accept();
    // whatever becomes of the note, the reason is what the run ends with
    note_refusal(paths, accepted.as_ref().err()).or_warn();
    let (manifest, known) = accepted?;
    if known {
        return Ok((manifest, repository.head.clone()));
    }
    let message = release::message(&manifest)?;
    let index = scratch.join("index");
    // releases that were never deployed would stay for ever
    repository.prune().or_warn();
    // git knows no later times
    let published = manifest.published.min(u64::from(u32::MAX));
    let commit = repository.commit_directory(&repository.head, &source, &message, &instance.author, published, &index)?;
    Ok((manifest, commit))
}

/// Writes down why what the hub offers is refused, or that it is not.
fn note_refusal(paths: &Paths, error: Option<&Error>) -> Result<()> {
    let path = paths.own(heartbeat::REFUSED);
    match error {
        // the next poll may well accept the same
        Some(error) if error.is_transient() => Ok(()),
        Some(error) => files::write(&path, error.to_string().as_bytes(), 0o644),
        None => files::remove(&path),
    }
    .doing("write", &path)
}

/// Fetches the archive, unless it is there already; what has been fetched of it before is not fetched again.
fn fetch_archive(place: &mut dyn Place, manifest: &Manifest, tarball: &Path) -> Result<()> {
    let doing = || format!("fetch release {}", manifest.release.id);
    if manifest.size > LARGE {
        return Err(format!("its archive has {} bytes, more than {LARGE}", manifest.size)).context(doing);
    }
    let size = || tarball.metadata().map_or(0, |metadata| metadata.len());
    let is_right = || size() == manifest.size && sha256::of_file(tarball).is_ok_and(|sha256| sha256 == manifest.sha256);
    // the second time from the beginning: what was there may have been something else
    for _ in 0..2 {
        if is_right() {
            return Ok(());
        }
        if size() >= manifest.size || !tarball.is_file() {
            files::clear(tarball).context(doing)?;
        }
        if !place.get(&format!("release/{}", manifest.archive()), tarball, LARGE)? {
            return Err("the hub does not have its archive").context(doing);
        }
        if is_right() {
            return Ok(());
        }
        files::clear(tarball).context(doing)?;
    }
    Err("the archive does not match the manifest").context(doing)
}

/// Reads a manifest that somebody else wrote.
fn read_manifest(place: &Path, hub: &Hub, scratch: &Path) -> Result<Manifest> {
    let doing = || "accept the hub's manifest".to_owned();
    let no_manifest = |why| format!("{why}; it is damaged, or another server has answered: see to that, or deploy again");
    let signed: Signed = json::parse(&files::read_foreign(place, SMALL).context(doing)?).map_err(no_manifest).context(doing)?;
    if !hub.signers.is_empty() {
        let signature = signed.signature.as_ref().ok_or("not signed").context(doing)?;
        if !is_signed(signed.manifest.as_bytes(), signature.as_bytes(), NAMESPACE, &hub.signers, scratch)? {
            return Err(BY_NONE).context(doing);
        }
    }
    let manifest = signed.read().context(doing)?;
    let wrong = if manifest.format != FORMAT {
        format!("unsupported format {}, expected {FORMAT}", manifest.format)
    } else if manifest.host != hub.name {
        format!("it is for host {:?}, this is {}", &*manifest.host, hub.name)
    } else {
        return Ok(manifest);
    };
    Err(wrong).context(doing)
}

/// Fails unless the hub offers a release now that is this host's, or the hub serves nobody. Root, whose health check this
/// is where a system has no unit for it, asks as the instance's user.
pub fn reach(name: &str, instance: &Instance) -> Result<()> {
    let hub = instance.hub.as_ref().ok_or_else(|| Error::new(format!("Failed to reach the hub of {name}: the instance has no hub")))?;
    if geteuid().is_root() {
        let ourselves = Program::ourselves_as(&instance.user)?.args(["reach", name]);
        return ourselves.output(|| "reach the hub".into(), None).map(drop);
    }
    let paths = Paths::new(name);
    let scratch = peers::scratch(&paths)?;
    match offered(&paths, hub, scratch.path(), REACH).map(drop) {
        // the network is there, and so is the hub; what serves is not, which is no doing of this machine's
        Err(error) if SERVES_NOBODY.iter().any(|words| error.to_string().contains(words)) => Ok(()),
        Err(error) if !error.is_transient() => Err(Error::new(format!("{error}; {FINAL}"))),
        reached => reached,
    }
}

/// Fetches the manifest into a file of `directory`, which it returns.
fn fetch_manifest(place: &mut dyn Place, hub: &Hub, directory: &Path) -> Result<PathBuf> {
    let file = directory.join("manifest.json");
    if place.get(MANIFEST, &file, SMALL)? {
        return Ok(file);
    }
    Err(Error::new(format!("Failed to fetch a release: the hub has none for {} yet", hub.name)))
}
