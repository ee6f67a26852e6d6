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
use serde::de::DeserializeOwned;

use crate::config::{Hub, Instance};
use crate::error::{Context, Error, Result};
use crate::files;
use crate::fleet::sftp::Session;
use crate::fleet::{FORMAT, Heartbeat, Last, Manifest, NAMESPACE, Received, Release, SMALL, Signed, archive, sha256};
use crate::fleet::{install, outbox, release};
use crate::git::Repository;
use crate::layout::Layout;
use crate::program::Program;
use crate::reboot;
use crate::status::{Outcome, Status};

/// How long one try of `ekiben reach` may take.
const REACH: Duration = Duration::from_secs(30);
/// How long reports may take.
const DELIVERY: Duration = Duration::from_secs(300);

/// Asks the hub for its release, with what it has not been told yet. Returns the release, and the
/// commit to start from: HEAD, if the release is in it, or a new one on top.
pub fn fetch(layout: &Layout, instance: &Instance, hub: &Hub, repository: &Repository) -> Result<(Release, String)> {
    let directory = Scratch::of(layout)?;
    let limit = Duration::from_secs(instance.timeouts.prepare);
    let mut session = Session::open(hub, &identity(layout), &directory.path, limit)?;

    if !hub.file_directories.is_empty() {
        install::fetch(&mut session, layout, &directory)?;
    }
    let place = directory.fresh("manifest.json")?;
    if !session.get("release/manifest.json", &place)? {
        deliver_by(&mut session, layout, hub, &directory, None)?;
        return Err(Error::new(format!("Failed to fetch a release: the hub has none for {} yet", hub.name)));
    }
    let manifest = read_manifest(&place, hub, &directory)?;
    let release = &manifest.release;
    let doing = || format!("accept release {} of {}", release.sequence, release.id);
    if let Some(seen) =
        seen(layout)?.filter(|seen| seen.sequence > release.sequence || seen.sequence == release.sequence && seen.id != release.id)
    {
        let why = format!("release {} of {} has been seen before; the hub went back, or somebody replays", seen.sequence, seen.id);
        return Err(why).context(doing);
    }
    let known = release::of(repository, &repository.head)?.is_some_and(|known| known.release.id == release.id);
    let tarball = layout.own(&format!("{}.tar.gz", release.id));
    if !known {
        fetch_archive(&mut session, &manifest, &tarball)?;
    }
    files::write_json(&layout.own("seen.json"), release, 0o644)?;
    deliver_by(&mut session, layout, hub, &directory, Some(release).filter(|_| !known))?;
    session.close()?;
    if known {
        let _ = fs::remove_file(&tarball);
        return Ok((manifest.release, repository.head.clone()));
    }
    let source = directory.path.join("source");
    archive::unpack(&tarball, &source)?;
    let message = release::message(&manifest)?;
    let scratch = directory.path.join("index");
    let commit = repository.commit_directory(&repository.head, &source, &message, &instance.author, manifest.published, &scratch)?;
    files::clear(&source)?;
    Ok((manifest.release, commit))
}

/// Fetches the archive, unless it is there already; what has been fetched of it before is not fetched again.
fn fetch_archive(session: &mut Session, manifest: &Manifest, tarball: &Path) -> Result<()> {
    let Release { id, .. } = &manifest.release;
    let doing = || format!("fetch release {id}");
    let is_right = || -> Result<bool> {
        let there = fs::metadata(tarball).is_ok_and(|metadata| metadata.len() == manifest.size);
        Ok(there && sha256::of_file(tarball)? == manifest.sha256)
    };
    // the second time from the beginning: what was there may have been something else
    for _ in 0..2 {
        if is_right()? {
            return Ok(());
        }
        session.get(&format!("release/{id}.tar.gz"), tarball)?;
        if is_right()? {
            return Ok(());
        }
        files::remove(tarball).context(doing)?;
    }
    Err("what the hub sends is not what its manifest says").context(doing).map_err(Error::transient)
}

/// Reads a manifest that somebody else wrote.
fn read_manifest(place: &Path, hub: &Hub, directory: &Scratch) -> Result<Manifest> {
    let doing = || "accept the hub's manifest".to_owned();
    let signed: Signed = read_foreign(place)?;
    if !hub.signers.is_empty() {
        let signature = signed.signature.ok_or("it is not signed").context(doing)?;
        let (signers, file) = (directory.path.join("signers"), directory.path.join("manifest.sig"));
        let lines: Vec<_> = hub.signers.iter().map(|key| format!("fleet {key}")).collect();
        fs::write(&signers, lines.join("\n") + "\n").and_then(|()| fs::write(&file, signature)).context(doing)?;
        let verify = Program::new("ssh-keygen").args(["-Y", "verify", "-I", "fleet", "-n", NAMESPACE, "-f"]).arg(signers);
        verify.arg("-s").arg(file).output(|| "verify the signature of the hub's manifest".into(), Some(signed.manifest.as_bytes()))?;
    }
    let manifest: Manifest = serde_json::from_str(&signed.manifest).context(doing)?;
    let wrong = if manifest.format != FORMAT {
        format!("its format is {}, this Ekiben knows {FORMAT}", manifest.format)
    } else if manifest.host != hub.name {
        format!("it is of {:?}, this is {}", manifest.host, hub.name)
    } else {
        return Ok(manifest);
    };
    Err(wrong).context(doing)
}

/// Tells the hub how the instance is, after a run; asks nothing of it if there is nothing to tell.
pub fn deliver(layout: &Layout, instance: &Instance) -> Result<()> {
    let Some(hub) = &instance.hub else { return Ok(()) };
    let directory = Scratch::of(layout)?;
    let told = fs::read(layout.own("heartbeat.json")).unwrap_or_default();
    let now = serde_json::to_vec_pretty(&heartbeat(layout, hub, None)?).context(|| "write the heartbeat".into())?;
    if outbox::waiting(layout)?.is_empty() && told == now {
        return Ok(());
    }
    let mut session = Session::open(hub, &identity(layout), &directory.path, DELIVERY)?;
    deliver_by(&mut session, layout, hub, &directory, None)?;
    session.close()
}

/// Fails unless the hub can be reached now, whether it serves or not. Root, whose health check this
/// is, asks as the instance's user.
pub fn reach(name: &str, instance: &Instance) -> Result<()> {
    let hub = instance.hub.as_ref().ok_or_else(|| Error::new(format!("Failed to reach the hub of {name}: it has none")))?;
    if geteuid().is_root() {
        let ourselves = Program::ourselves_as(&instance.user)?.args(["reach", name]);
        return ourselves.output(|| "reach the hub".into(), None).map(drop);
    }
    let layout = Layout::new(name);
    let directory = Scratch::of(&layout)?;
    match Session::open(hub, &identity(&layout), &directory.path, REACH) {
        Ok(session) => session.close(),
        // the network is there, and so is the hub; what serves is not, which is no doing of this machine's
        Err(error) if ["refused", "closed", "reset"].iter().any(|word| error.to_string().contains(&format!("Connection {word}"))) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Sends the heartbeat and the reports that the hub does not say it has.
fn deliver_by(session: &mut Session, layout: &Layout, hub: &Hub, directory: &Scratch, running: Option<&Release>) -> Result<()> {
    let waiting = outbox::waiting(layout)?;
    let place = directory.fresh("received.json")?;
    // who has sent nothing need not ask what has arrived
    if !waiting.is_empty() && session.get("release/received.json", &place)? {
        let received: Received = read_foreign(&place)?;
        files::write_json(&layout.own("received.json"), &received, 0o644)?;
    }
    for file in waiting {
        if let Some(name) = file.file_name().and_then(|name| name.to_str()) {
            session.put(&file, &format!("reports/{name}"))?;
        }
    }
    let heartbeat = heartbeat(layout, hub, running)?;
    // the directory is the user's alone; on the hub, others have to read what is sent
    files::write_json(&layout.own("heartbeat.json"), &heartbeat, 0o644)?;
    session.put(&layout.own("heartbeat.json"), "reports/heartbeat.json")
}

/// How the instance is.
fn heartbeat(layout: &Layout, hub: &Hub, running: Option<&Release>) -> Result<Heartbeat> {
    let status = Status::read(layout);
    let seen = seen(layout)?;
    let tried = status.tried.as_ref().filter(|tried| tried.run.release == seen);
    // a release that could not even be proposed has not been tried
    let refused = status.runs.first().filter(|run| run.result == Outcome::Failed);
    let last = tried.map(|tried| &tried.run).or(refused);
    let deployed = status.deployed.as_ref();
    let system = fs::canonicalize("/run/current-system").context(|| "read /run/current-system".into())?;
    Ok(Heartbeat {
        format: FORMAT,
        host: hub.name.clone(),
        version: env!("CARGO_PKG_VERSION").into(),
        deployed: deployed.and_then(|deployed| deployed.release.clone()),
        system: system.as_path().try_into().context(|| "read /run/current-system".into())?,
        running: running.cloned(),
        last: last.map(|run| Last {
            release: run.release.clone(),
            result: run.result,
            stage: run.stage,
            error: run.error.clone(),
            finished: run.finished,
        }),
        runs: tried.map_or(0, |tried| tried.count),
        self_updated: deployed.is_some_and(|deployed| deployed.summary.as_deref().is_some_and(|what| what.contains("update "))),
        reboot_needed: reboot::is_needed(),
        files: fs::read_to_string(layout.trouble_with_files()).ok(),
        seen,
    })
}

/// The newest release that the hub has offered.
fn seen(layout: &Layout) -> Result<Option<Release>> {
    files::read_json(&layout.own("seen.json"))
}

/// The private key: systemd's copy of it, which only the instance's user can read.
fn identity(layout: &Layout) -> PathBuf {
    let own = std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from);
    // what root has this ask for a run has none of its own
    own.unwrap_or_else(|| format!("/run/credentials/ekiben-{}.service", layout.name()).into()).join("identity")
}

/// A directory for files that nobody needs later.
pub struct Scratch {
    path: PathBuf,
}

impl Scratch {
    fn of(layout: &Layout) -> Result<Self> {
        let path = layout.own("fetched");
        fs::create_dir_all(&path).context(|| format!("make {}", path.display()))?;
        Ok(Self { path })
    }

    /// The path of a file that is not there.
    pub fn fresh(&self, name: &str) -> Result<PathBuf> {
        let path = self.path.join(name);
        files::remove(&path).context(|| format!("remove {}", path.display()))?;
        Ok(path)
    }
}

/// A value that somebody else wrote, as JSON.
pub fn read_foreign<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let doing = || format!("read {}", path.display());
    serde_json::from_slice(&files::read_foreign(path, SMALL).context(doing)?).context(doing)
}
