//! What is kept where. All of it lies below one directory that root owns, `/var/lib/ekiben`.
//!
//! ```text
//! queue/<instance>              a request; root and group ekiben may write here
//! holds/<instance>              a hold; root and group ekiben may write here, the webhook may not
//! rollbacks/<instance>          the wish to have the last deployment undone; root and group ekiben may write here, the webhook
//!                               may not see it
//! looks/<instance>              its time is when a timer has found nothing new last, unless it is empty; the instance's user's
//! rebooted                      the system that the machine was rebooted into last
//! runs/<instance>.json          the journal of the run under way; root only
//! runs/<instance>.stuck         the journal of a run that could not be put back; root only
//! status/<instance>.json        what everybody may know
//! status/<instance>.output      what the failing program said; root only
//! status/<instance>.hosts       which hosts the last run has published
//! status/<instance>.unwell      what is not well any more of what was deployed last, for its hub
//! status/<instance>.forgotten   which of its hub's releases an administrator has had it forget
//! heard/hosts.json              how the hosts stand, where this is a hub that publishes by itself; seen by the webhook
//! status/<instance>.reserve     room for the status on a full disk
//! instances/<instance>/         the instance's user's own: notes, candidate, scratch files
//! outbox/<instance>/            reports that the fleet's hub has not got yet; written by root, read by the user
//! files/<instance>.json         which of the hub's files are in their places; root only
//! ```

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::error::{Context, OrLog, Result};
use crate::files;
use crate::program::Program;
use crate::system;

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
            file.write_all(&vec![0; 64 * 1024]).and_then(|()| file.sync_all())
        })
    }

    /// The instance.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The request that waits for a run.
    pub fn request(&self) -> PathBuf {
        self.root.join("queue").join(&self.name)
    }

    /// What says that nothing is to be deployed for now.
    pub fn hold(&self) -> PathBuf {
        self.root.join("holds").join(&self.name)
    }

    /// What says that the last deployment is to be undone.
    pub fn rollback(&self) -> PathBuf {
        self.root.join("rollbacks").join(&self.name)
    }

    /// What has the time at which nothing new was found last without a run.
    pub fn looked(&self) -> PathBuf {
        self.root.join("looks").join(&self.name)
    }

    /// What has the reason for which a timer has a run begin.
    pub fn found(&self) -> PathBuf {
        self.own("found")
    }

    /// When a timer has found nothing new last, in seconds since 1970; none if never.
    pub fn last_looked(&self) -> Option<u64> {
        let file = self.looked().metadata().ok().filter(|file| file.len() > 0)?;
        file.modified().ok().map(system::seconds)
    }

    /// The journal of the run under way.
    pub fn journal(&self) -> PathBuf {
        self.file("runs", "json")
    }

    /// The journal of a run that could not be put back.
    pub fn stuck(&self) -> PathBuf {
        self.file("runs", "stuck")
    }

    /// The journal of a run that has ended until the next boot.
    pub fn trial(&self) -> PathBuf {
        self.file("runs", "trial")
    }

    /// What everybody may know.
    pub fn status(&self) -> PathBuf {
        self.file("status", "json")
    }

    /// Room on the disk for the status.
    pub fn reserve(&self) -> PathBuf {
        self.file("status", "reserve")
    }

    /// The end of the output of the program that failed last.
    pub fn output(&self) -> PathBuf {
        self.file("status", "output")
    }

    /// Which hosts the last run has published.
    pub fn hosts(&self) -> PathBuf {
        self.file("status", "hosts")
    }

    /// How the hosts of a fleet stand: what the hub has, as the webhook's unit sees it.
    pub fn heard(&self) -> PathBuf {
        self.root.join("heard/hosts.json")
    }

    /// What is not well any more of what was deployed last.
    pub fn unwell(&self) -> PathBuf {
        self.file("status", "unwell")
    }

    /// The releases of a fleet's hub that do not count any more.
    pub fn forgotten(&self) -> PathBuf {
        self.file("status", "forgotten")
    }

    /// What the user's stages tell root's.
    pub fn notes(&self) -> PathBuf {
        self.own("notes.json")
    }

    /// The link to the system that was built; keeps it from being collected as garbage.
    pub fn candidate(&self) -> PathBuf {
        self.own("candidate")
    }

    fn file(&self, directory: &str, kind: &str) -> PathBuf {
        self.root.join(directory).join(format!("{}.{kind}", self.name))
    }

    /// A file of the user's own.
    pub fn own(&self, file: &str) -> PathBuf {
        self.root.join("instances").join(&self.name).join(file)
    }

    /// What the branch's upstream was when it was seen last.
    pub fn upstream(&self) -> PathBuf {
        self.own("upstream")
    }

    /// A directory for what nobody needs later, empty: whatever has been left in its place is removed.
    pub fn scratch(&self) -> Result<PathBuf> {
        let path = self.own("scratch");
        files::make_directory(&path).doing("create", &path)?;
        Ok(path)
    }

    /// Where reports for a fleet's hub wait; root writes, the instance's user reads.
    pub fn outbox(&self) -> PathBuf {
        self.root.join("outbox").join(&self.name)
    }

    /// What is wrong with the hub's files, for the hub.
    pub fn trouble_with_files(&self) -> PathBuf {
        self.outbox().join("files")
    }

    /// Which of the hub's files are in their places.
    pub fn installed(&self) -> PathBuf {
        self.root.join("files").join(format!("{}.json", self.name))
    }

    /// The git ref that keeps the candidate commit.
    pub fn reference(&self) -> String {
        format!("refs/ekiben/{}", self.name)
    }
}
