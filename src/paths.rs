//! What is kept where: all of it below one directory that root owns, `/var/lib/ekiben`.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use nix::sys::statvfs::{FsFlags, statvfs};

use crate::error::{Context, OrLog, Result};
use crate::files;
use crate::program::Program;
use crate::system;

/// Methods for places: each by its path below the root, in which `<instance>` stands for the instance's name.
macro_rules! places {
    ($($(#[$doc:meta])* $place:ident: $path:literal;)*) => {
        impl Paths {
            $($(#[$doc])*
            pub fn $place(&self) -> PathBuf {
                self.place($path)
            })*
        }
    };
}

places! {
    /// The request that waits for a run. Root and group ekiben may write here.
    request: "queue/<instance>";
    /// What says that nothing is to be deployed for now. Root and group ekiben may write here, the webhook may not.
    hold: "holds/<instance>";
    /// What says that the last deployment is to be undone. Root and group ekiben may write here, the webhook may not see it.
    rollback: "rollbacks/<instance>";
    /// Its time is when a timer has found nothing new last without a run, unless it is empty. The instance's user's.
    looked: "looks/<instance>";
    /// The journal of the run under way; as the two that follow, it is root's only.
    journal: "runs/<instance>.json";
    /// The journal of a run that could not be put back.
    stuck: "runs/<instance>.stuck";
    /// The journal of a run that has ended until the next boot.
    trial: "runs/<instance>.trial";
    /// What everybody may know.
    status: "status/<instance>.json";
    /// Room for the status on a full disk.
    reserve: "status/<instance>.reserve";
    /// The end of the output of the program that failed last. Root's only.
    output: "status/<instance>.output";
    /// Which hosts the last run has published.
    hosts: "status/<instance>.hosts";
    /// How the hosts of a fleet stand, where this is a hub that publishes by itself: what the hub has, as the webhook's unit
    /// sees it.
    heard: "heard/hosts.json";
    /// What is not well any more of what was deployed last, for its hub.
    unwell: "status/<instance>.unwell";
    /// The run that `notify.command` could not tell of, if it was the last to be told.
    untold: "status/<instance>.untold";
    /// Which of its hub's releases an administrator has had it forget.
    forgotten: "status/<instance>.forgotten";
    /// What the user's stages tell root's. As all below this directory, it is the instance's user's own.
    notes: "instances/<instance>/notes.json";
    /// The link to the system that was built; keeps it from being collected as garbage.
    candidate: "instances/<instance>/candidate";
    /// What has the reason for which a timer has a run begin.
    found: "instances/<instance>/found";
    /// What says that a timer has elapsed while a run is under way.
    elapsed: "instances/<instance>/elapsed";
    /// What the branch's upstream was when it was seen last.
    upstream: "instances/<instance>/upstream";
    /// Where reports wait that the fleet's hub has not got yet. Root writes, the instance's user reads.
    outbox: "outbox/<instance>";
    /// What is wrong with the hub's files, for the hub.
    trouble_with_files: "outbox/<instance>/files";
    /// Its time is that of the last index of the hub's files that root has come to the end of.
    served: "files/<instance>.served";
    /// Which of the hub's files are in their places. Root's only.
    installed: "files/<instance>.json";
}

/// What this machine was to be rebooted for, and in which boot, a line each, the last one at the end: see [`rebooted_for`].
pub const REBOOTED: &str = "/var/lib/ekiben/rebooted";
/// What a run has to write before it begins, in bytes.
const ROOM: usize = 64 * 1024;

/// What this machine was rebooted for: it is not rebooted twice for the same. What was noted in this very boot has come to
/// nothing yet.
pub fn rebooted_for() -> Vec<String> {
    let (marks, this_boot) = (fs::read_to_string(REBOOTED).unwrap_or_default(), format!("\t{}", system::boot_id()));
    let before = marks.lines().filter(|mark| !mark.ends_with(&this_boot));
    before.filter_map(|mark| mark.split('\t').next()).map(String::from).collect()
}

/// The places that belong to one instance.
#[derive(Clone, Debug)]
pub struct Paths {
    root: PathBuf,
    name: String,
}

impl Paths {
    /// `name` has to have passed [`crate::config::instance_name`].
    pub fn new(name: &str) -> Self {
        Self::below(Path::new("/var/lib/ekiben"), name)
    }

    /// The same below another directory.
    pub fn below(root: &Path, name: &str) -> Self {
        Self { root: root.to_owned(), name: name.to_owned() }
    }

    fn place(&self, path: &str) -> PathBuf {
        self.root.join(path.replace("<instance>", &self.name))
    }

    /// Those of all instances that anything is known of.
    pub fn with_status(&self) -> Vec<Self> {
        self.with_file_in("status", ".json")
    }

    /// Those of all instances with a journal.
    pub fn with_journal(&self) -> Vec<Self> {
        self.with_file_in("runs", ".json")
    }

    /// Those of all instances with a system that waits for a boot.
    pub fn with_trial(&self) -> Vec<Self> {
        self.with_file_in("runs", ".trial")
    }

    fn with_file_in(&self, directory: &str, suffix: &str) -> Vec<Self> {
        let files = fs::read_dir(self.root.join(directory)).into_iter().flatten().flatten();
        let names = files.filter_map(|file| Some(file.file_name().to_str()?.strip_suffix(suffix)?.to_owned()));
        names.map(|name| Self::below(&self.root, &name)).collect()
    }

    /// Has the directories made that somebody has removed, as at boot; for root only.
    pub fn restore(&self) {
        let files = [self.request(), self.hold(), self.rollback(), self.looked(), self.journal(), self.status()];
        if !files.iter().all(|file| file.parent().is_some_and(Path::exists)) {
            self.make();
        }
    }

    /// Keeps other processes of root's from changing what is known of any instance, until it is dropped.
    pub fn alone(&self) -> Option<Flock<File>> {
        self.journal().parent().and_then(|directory| files::lock(directory, FlockArg::LockExclusive).or_warn()).flatten()
    }

    /// Has the directories made that are missing, for root only.
    pub fn make(&self) {
        let prefix = format!("--prefix={}", self.root.display());
        let make = Program::as_root("systemd-tmpfiles").args(["--create", &prefix]);
        // whose directories are the removed ones
        let restart = Program::as_root("systemctl").args(["try-restart", "--no-block", "ekiben-webhook.service"]);
        for program in [make, restart] {
            program.output(|| format!("recreate {}", self.root.display()), None).or_warn();
        }
    }

    /// Whether there is room for what a run has to write before it begins.
    pub fn check_can_be_written(&self) -> io::Result<()> {
        // where there is a hub, the last run's report, too
        let outbox = Some(self.outbox()).filter(|outbox| outbox.exists());
        let directories = ["", "queue", "runs", "status"].map(|directory| self.root.join(directory));
        directories.into_iter().chain(outbox).try_for_each(|directory| {
            let mut file = files::unnamed(&directory, 0o600)?;
            file.write_all(&vec![0; ROOM]).and_then(|()| file.sync_all())
        })
    }

    /// Why nothing can be written here, and what to do; for whoever asks.
    pub fn why_not_written(&self) -> Option<String> {
        let disk = statvfs(&self.root).ok()?;
        let is_full = disk.blocks_available() * disk.fragment_size() < ROOM as u64 || disk.files() > 0 && disk.files_available() == 0;
        let is_read_only = disk.flags().contains(FsFlags::ST_RDONLY);
        let why = if is_full { "has no room left; make some" } else { "is read-only; remount it" };
        (is_full || is_read_only).then(|| format!("the disk of {} {why}, and what waits goes on by itself", self.root.display()))
    }

    /// The instance.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// When a timer has found nothing new last, in seconds since 1970; none if never.
    pub fn last_looked(&self) -> Option<u64> {
        let file = self.looked().metadata().ok().filter(|file| file.len() > 0)?;
        file.modified().ok().map(system::seconds)
    }

    /// A file of the user's own.
    pub fn own(&self, file: &str) -> PathBuf {
        self.place("instances/<instance>").join(file)
    }

    /// A directory for what nobody needs later, empty: whatever has been left in its place is removed.
    pub fn scratch(&self) -> Result<PathBuf> {
        let path = self.own("scratch");
        files::make_directory(&path).doing("create", &path)?;
        Ok(path)
    }

    /// The git ref that keeps the candidate commit.
    pub fn reference(&self) -> String {
        format!("refs/ekiben/{}", self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Paths {
        /// Those of an instance `app` below a directory in which there is room for all that a run leaves.
        pub fn of_test(root: &Path) -> Self {
            for directory in ["queue", "holds", "rollbacks", "runs", "status", "heard", "instances/app"] {
                fs::create_dir_all(root.join(directory)).unwrap();
            }
            Self::below(root, "app")
        }
    }
}
