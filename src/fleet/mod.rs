//! The fleet: a hub publishes a release for each of its hosts, the hosts fetch theirs, deploy it as
//! any other instance and report. This file is what both sides have to agree on.
//!
//! What the hub serves, one OpenSSH chroot for each host, and what it keeps:
//!
//! ```text
//! <directory>/hosts/<host>/release/manifest.json    a Signed; replaced in one step
//! <directory>/hosts/<host>/release/<id>.tar.gz      that host's configuration
//! <directory>/hosts/<host>/release/<id>.<n>.next    a Signed that is to be the manifest in a later wave
//! <directory>/hosts/<host>/release/publishing       who is publishing from elsewhere just now
//! <directory>/hosts/<host>/release/received.json    a Received: which reports have arrived
//! <directory>/hosts/<host>/reports/heartbeat.json   a Heartbeat; replaced by each poll
//! <directory>/hosts/<host>/reports/<run>.json       a Report
//! <directory>/hosts/<host>/reports/<run>.log.gz     what the run said
//! <directory>/hosts/known.json                      a list of the hosts that have a key
//! <directory>/hosts/removed.json                    when the directories of the others are removed
//! <directory>/hosts/<host>/files/index.json         a list of Served; replaced in one step
//! <directory>/hosts/<host>/files/<sha256>           one of these files
//! <directory>/received/<host>/history               the Manifests that have been published, in lines
//! <directory>/rollout/plan.json                     which hosts get what in which wave; publishers may write there
//! <directory>/rollout/holds.json                    what nothing new is published for
//! <directory>/received/rollout.json                 how far the roll-out has come
//! <directory>/heard/hosts.json                      how the hosts stand, for CI jobs that wait for them
//! <directory>/received/<host>/...                   what was collected, and the hub's own received.json; nobody
//!                                                   but the hub can write there, where publishers can in release
//! ```
//!
//! A release is its content and a sequence number, never a time or a file name. What one side reads
//! of the other may be of a newer version: what is unknown is passed over, another format is refused.

pub mod host;
pub mod hub;

mod archive;
mod https;
mod place;
mod sftp;
mod sha256;
mod temporary;

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Context, Result};
use crate::gather::sorted;
use crate::json::{self, Invalid};
use crate::names::{Account, FilePath, HostName, Mode, ObjectId, RunId, Sha256, StorePath};
use crate::run::Stage;
use crate::run::ended::Ended;
use crate::run::hold::Hold;
use crate::run::{Outcome, Release};

/// The format of everything here.
pub const FORMAT: u32 = 1;
/// What signatures are made for, as in `ssh-keygen -Y sign -n`.
pub const NAMESPACE: &str = "ekiben";
/// What a host is offered, how it is, as it says itself, and which of its reports have arrived, by the names of the files.
pub const MANIFEST: &str = "manifest.json";
pub const HEARTBEAT: &str = "heartbeat.json";
pub const RECEIVED: &str = "received.json";
/// How far the number of a release may be ahead of the clock of who publishes it, and of its host, in seconds.
pub const DAY: u64 = 24 * 60 * 60;
/// The file beside the hosts' directories that says which of them have a key.
pub const KNOWN: &str = "known.json";
/// The file beside it that says of which hosts without one what there is of them is removed, and when.
pub const REMOVED: &str = "removed.json";
/// The directory of plans for roll-outs.
pub const ROLLOUT: &str = "rollout";
/// The largest manifest, heartbeat, report or list of reports, in bytes.
pub const SMALL: u64 = 256 * 1024;
/// The largest archive, and the largest log, in bytes.
pub const LARGE: u64 = 64 * 1024 * 1024;

/// A manifest, as it is published: the signature is of exactly that text.
#[derive(Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Signed {
    /// A [`Manifest`] as JSON.
    pub manifest: String,
    /// By one of the fleet's administrators; what `ssh-keygen -Y sign` wrote.
    pub signature: Option<String>,
}

impl Signed {
    /// What it says.
    pub fn read(&self) -> Result<Manifest, Invalid> {
        json::parse_foreign(self.manifest.as_bytes())
    }
}

/// What the hub offers a host.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// [`FORMAT`].
    pub format: u32,
    /// Whose release this is.
    pub host: HostName,
    /// Which release.
    #[serde(flatten, deserialize_with = "json::flat")]
    pub release: Release,
    /// The SHA-256 of the archive.
    pub sha256: Sha256,
    /// The size of the archive in bytes.
    pub size: u64,
    /// The attribute of `nixosConfigurations` to build; `None` for a plain `configuration.nix`.
    pub attr: Option<HostName>,
    /// What it was built to on the hub, if it was.
    pub toplevel: Option<StorePath>,
    /// When it was published, in seconds since 1970; for people to read.
    pub published: u64,
    /// Until when it counts as new, in seconds since 1970; `None` if for ever.
    pub expires: Option<u64>,
    /// The commit of the fleet's repository that it was made from, if that is one of git's.
    #[serde(flatten, deserialize_with = "json::flat")]
    pub origin: Provenance,
}

/// Where a release comes from; for people to read.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Provenance {
    /// The commit.
    pub commit: Option<ObjectId>,
    /// Who has made it.
    pub author: Option<String>,
    /// The first line of its message.
    pub summary: Option<String>,
    /// Whether files differed from that.
    pub dirty: bool,
}

impl Manifest {
    /// Whether it counts as new no longer.
    pub fn has_expired(&self, now: u64) -> bool {
        self.expires.is_some_and(|expires| expires < now)
    }

    /// The name of the release's archive.
    pub fn archive(&self) -> String {
        format!("{}.tar.gz", self.release.id)
    }
}

impl Provenance {
    /// The commit in short, with a mark if files differed from it; empty if it is not known.
    pub fn short(&self) -> String {
        let commit = self.commit.as_ref().map(|commit| commit.chars().take(12).collect::<String>());
        commit.map_or(String::new(), |commit| commit + if self.dirty { "+" } else { "" })
    }
}

/// The reports that the hub has, so that the host need not keep them any more.
#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Received {
    /// Identifiers of runs, the newest last.
    pub reports: Vec<RunId>,
}

/// How a host is, as it says itself; sent with each poll, and after each run that did something.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Heartbeat {
    /// [`FORMAT`].
    pub format: u32,
    /// The host.
    pub host: HostName,
    /// The version of its Ekiben.
    pub version: String,
    /// The newest release it has seen.
    pub seen: Option<Release>,
    /// The release it deployed last.
    pub deployed: Option<Release>,
    /// The system it runs, if it knows.
    pub system: Option<StorePath>,
    /// The release of a run that is under way.
    pub running: Option<Release>,
    /// The last run that was about this release, or that failed.
    pub last: Option<LastRun>,
    /// How many runs have ended that tried to deploy the newest release, or something on top of it.
    pub runs: u32,
    /// Whether it runs something on top of the release: inputs it has updated by itself.
    pub self_updated: bool,
    /// Whether it has to be rebooted to run what it deployed.
    pub reboot_needed: bool,
    /// Why files of the hub are not in their places.
    pub files: Option<String>,
    /// Why it does not accept what the hub offers, if it does not.
    pub refused: Option<String>,
    /// What is not well any more of the release it deployed last.
    pub unwell: Option<String>,
    /// Why nothing is deployed there now, if somebody has asked for that.
    pub held: Option<Hold>,
    /// When the release that it was offered last expires, in seconds since 1970.
    pub expires: Option<u64>,
    /// The version of the kernel that runs.
    pub kernel: Option<String>,
    /// The version of the system that runs.
    pub nixos: Option<String>,
    /// The revision of its Nixpkgs, if that is in the version.
    pub nixpkgs: Option<String>,
}

/// How a run has ended, in short.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LastRun {
    /// What it was about.
    pub release: Option<Release>,
    /// How it ended.
    pub result: Outcome,
    /// In which stage it failed.
    pub stage: Option<Stage>,
    /// Why it failed.
    pub error: Option<String>,
    /// When, in seconds since 1970 by the host's clock; for people to read.
    pub finished: u64,
}

/// A run of a host, for the hub; its log lies beside it.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// [`FORMAT`].
    pub format: u32,
    /// The host.
    pub host: HostName,
    /// The system that runs after it.
    pub system: StorePath,
    /// The run, and the release that it was about.
    #[serde(flatten, deserialize_with = "json::flat")]
    pub run: Ended,
}

/// The runs of which there are reports in a directory, by the times of these, the oldest first.
pub fn reports_in(directory: &Path) -> Result<Vec<RunId>> {
    let mut runs = Vec::new();
    for file in fs::read_dir(directory).doing("read", directory)? {
        let file = file.doing("read", directory)?;
        let run = file.file_name().to_str().and_then(|name| RunId::try_from(name.strip_suffix(".json")?).ok());
        if let (Some(run), Ok(metadata)) = (run, file.metadata()) {
            if metadata.is_file() {
                runs.push((metadata.modified().doing("read", directory)?, run));
            }
        }
    }
    Ok(sorted(runs).into_iter().map(|(_, run)| run).collect())
}

/// A file that a host gets besides its configuration.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Served {
    /// Where it belongs on the host.
    pub path: FilePath,
    /// Its permissions there.
    pub mode: Mode,
    /// Whose it is there.
    pub owner: Account,
    /// Its group there.
    pub group: Account,
    /// Its name in `files`.
    pub file: Sha256,
    /// The SHA-256 of its contents.
    pub sha256: Sha256,
}
