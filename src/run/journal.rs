//! The journal of a run: which stage it is in, what it will activate, and what to put back.
//!
//! Only root writes it. It is on disk before the first change and gone after the last, so a
//! journal that is found is one of a run that was cut off, and holds all that is needed to end
//! it: even a configuration that no longer knows the instance.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::config::{Instance, LoaderKind};
use crate::error::{Context, Result};
use crate::names::RunId;
use crate::nix::profile::Generation;
use crate::paths::Paths;
use crate::run::notes::{Notes, Proposal};
use crate::run::undo::Undone;
use crate::run::{Failure, Outcome, Trigger};
use crate::system::boot_loader::BootLoader;
use crate::system::units::Units;
use crate::system::{boot_id, is_of, now};
use crate::{files, json};

/// The format of journal and status; a file with another number is set aside.
pub const FORMAT: u32 = 1;
/// The journal of a run of this boot, of whichever instance: see [`Run::load_unfit`].
pub const UNFIT: &str = "/run/ekiben/unfit.json";

/// How far root's part of a run has come. What an interruption leads to depends on it alone; what a newer version calls
/// otherwise counts as the furthest.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Phase {
    /// Nothing was changed.
    Begun,
    /// The candidate may be partly or wholly activated.
    Switching,
    /// The candidate runs, and is being looked at.
    Observing,
    /// The system profile and the boot loader may have been changed.
    Persisting,
    /// The candidate runs, is healthy and will be booted: only the branch is behind.
    Persisted,
    /// The next boot will bring the candidate, or has: it is to prove itself there.
    AwaitingBoot,
    /// What was before is being put back.
    #[serde(other)]
    Returning,
}

/// What a run came to that changed nothing and did not fail.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Decision {
    /// Nothing is new.
    Unchanged,
    /// Nothing is new since a deployment was undone by hand.
    Withheld,
    /// What awaits the next boot is to be withdrawn, by hand.
    Withdraw,
    /// What could not be gone back to runs again.
    Restored,
    /// The branch moved since the run began, or something newer is wanted: another run has to start from there.
    #[serde(other)]
    StartOver,
}

/// What was before root changed anything.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Before {
    /// The running system.
    pub system: PathBuf,
    /// The system profile.
    pub generation: Option<Generation>,
    /// The highest number of a generation that there was.
    pub last_generation: Option<u64>,
    /// How the units were.
    #[serde(flatten, deserialize_with = "json::flat")]
    pub units: Units,
}

/// A run under way.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Run {
    format: u32,
    /// The identifier that systemd gave it.
    pub id: RunId,
    /// The instance as it was configured when the run began.
    pub instance: Instance,
    /// Why it began.
    pub trigger: Trigger,
    /// Who or what has asked for it.
    #[serde(default)]
    pub by: Vec<String>,
    /// The deployment that it is to undo.
    pub undoes: Option<Undone>,
    /// The request it serves.
    pub request: Option<u64>,
    /// When it began, in seconds since 1970.
    pub started: u64,
    /// The boot it began in.
    pub boot: String,
    /// How far root's part has come.
    pub phase: Phase,
    /// What it came to, if it has come to an end without changing anything.
    pub decision: Option<Decision>,
    /// What it activates, once that is known.
    pub candidate: Option<PathBuf>,
    /// What that was booted as, if it is gone back to.
    pub generation: Option<Generation>,
    /// What to put back.
    pub before: Option<Before>,
    /// The health checks that passed before the switch.
    #[serde(default)]
    pub passed: Vec<String>,
    /// The user's notes, as root has read them, once.
    pub notes: Option<Notes>,
    /// The units that the failure is about.
    #[serde(default)]
    pub blamed: BTreeSet<String>,
    /// These, and those that had failed with the new system otherwise.
    #[serde(default)]
    pub worse: BTreeSet<String>,
    /// How often it has been tried to go back, after that had failed.
    #[serde(default)]
    pub returns: u32,
    /// What went wrong so far.
    pub failure: Option<Failure>,
    /// The commit that has become the branch, whatever comes of it then.
    pub accepted: Option<String>,
    /// Which hosts could not be published, while others were.
    pub left_out: Option<Failure>,
    /// How it has ended, if that is still to be reported: the status could not be written.
    pub result: Option<Outcome>,
    /// What should be said about a run that went well.
    pub warnings: Vec<String>,
    /// Whether only a boot brings the candidate, and takes it away.
    pub reboot_needed: bool,
    /// What boots this machine, where it may be able to boot a system once.
    pub boot_loader: Option<LoaderKind>,
    /// Whether the candidate is booted once, and what was before by default.
    #[serde(default)]
    pub boots_once: bool,
    /// Where it is written down.
    #[serde(skip)]
    file: PathBuf,
}

impl Run {
    /// A run that begins now.
    pub fn new(paths: &Paths, id: RunId, instance: Instance) -> Self {
        Self {
            file: paths.journal(),
            format: FORMAT,
            id,
            instance,
            trigger: Trigger::Timer,
            by: Vec::new(),
            undoes: None,
            request: None,
            started: now(),
            boot: boot_id(),
            phase: Phase::Begun,
            decision: None,
            candidate: None,
            generation: None,
            before: None,
            passed: Vec::new(),
            notes: None,
            blamed: BTreeSet::new(),
            worse: BTreeSet::new(),
            returns: 0,
            failure: None,
            accepted: None,
            left_out: None,
            result: None,
            warnings: Vec::new(),
            reboot_needed: false,
            boot_loader: None,
            boots_once: false,
        }
    }

    /// Reads a journal, if there is one: that of the run under way, of one that has ended until the next boot, or of one that
    /// could not be put back. A journal that makes no sense is set aside.
    pub fn load(file: PathBuf) -> Result<Option<Self>> {
        let read = match files::if_there(fs::read(&file)) {
            Err(error) if error.kind() == ErrorKind::IsADirectory => Err(error.to_string()),
            other => match other.doing("read", &file)? {
                Some(bytes) => json::parse_own::<Self>(&bytes).map_err(|error| error.to_string()),
                None => return Ok(None),
            },
        };
        match read {
            Ok(run) if run.format == FORMAT => Ok(Some(Self { file, ..run })),
            other => {
                let why = other.err().unwrap_or_else(|| "unsupported format".into());
                let doing = || format!("set {} aside", file.display());
                let aside = files::keep_aside(&file).context(doing)?;
                log::error!("Ignoring unreadable journal {} (kept as {}): {why}.", file.display(), aside.display());
                files::remove(&file).context(doing).map(|()| None)
            }
        }
    }

    /// Reads the journal of the run whose system has booted, was not well, and runs on until the next boot, if it does: what
    /// follows is to be as well as what was before that.
    pub fn load_unfit(running: &Path) -> Result<Option<Self>> {
        Ok(Self::load(UNFIT.into())?.filter(|run| run.is_candidate(running)))
    }

    /// Writes the journal; when this returns, it will be there after a crash.
    pub fn save(&self) -> Result<()> {
        self.keep_as(&self.file)
    }

    /// Keeps it beyond the run's end.
    pub fn keep_as(&self, file: &Path) -> Result<()> {
        files::write_json(file, self, 0o600)
    }

    /// Says what the run comes to, which has nothing more to do then.
    pub fn decide(&mut self, decision: Decision) -> Result<()> {
        self.decision = Some(decision);
        self.save()
    }

    /// Whether a system is the candidate, or one of its specialisations.
    pub fn is_candidate(&self, running: &Path) -> bool {
        self.candidate.as_ref().is_some_and(|candidate| is_of(candidate, running))
    }

    /// Whether the candidate waits for the next boot, and is not being withdrawn.
    pub fn waits(&self) -> bool {
        self.phase == Phase::AwaitingBoot && self.boot == boot_id()
    }

    /// What has the candidate boot once, if it is booted so.
    pub fn booted_by(&self) -> Option<BootLoader> {
        BootLoader::of(self.boot_loader).filter(|_| self.boots_once)
    }

    /// Enters a phase, durably, or not at all.
    pub fn enter(&mut self, phase: Phase) -> Result<()> {
        let before = std::mem::replace(&mut self.phase, phase);
        self.save().inspect_err(|_| self.phase = before)
    }

    /// Removes the journal: the run has ended. So has what waited for a boot, if this has come to change what is booted.
    pub fn end(&self, paths: &Paths) -> Result<()> {
        let trial = Some(paths.trial()).filter(|_| self.reboot_needed);
        trial.iter().chain([&self.file]).try_for_each(|file| files::remove(file).doing("remove", file))
    }

    /// Keeps the journal until the next boot: the run has ended until then.
    pub fn await_boot(paths: &Paths) -> Result<()> {
        let (journal, trial) = (paths.journal(), paths.trial());
        fs::rename(&journal, &trial).and_then(|()| files::sync_parent(&trial)).doing("rename", &journal)
    }

    /// What the run proposes, by the user's notes.
    pub fn proposal(&self) -> Option<&Proposal> {
        self.notes.as_ref()?.proposal.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Directory, instance};
    use serde_json::{Value, json};

    fn journal(directory: &Directory) -> (PathBuf, Value) {
        let (paths, id) = (Paths::of_test(directory.path()), RunId::try_from("0".repeat(32)).unwrap());
        let run = Run::new(&paths, id, instance(Path::new("/srv/x")));
        (paths.journal(), serde_json::to_value(run).unwrap())
    }

    #[test]
    fn what_a_newer_version_has_begun_is_neither_lost_nor_taken_for_deployed() {
        let directory = Directory::new();
        let (path, mut run) = journal(&directory);
        for key in ["phase", "decision", "trigger", "result", "bootLoader", "boot_loader"] {
            run[key] = json!("newer");
        }
        for key in ["operation", "build", "onUnitFailure"] {
            run["instance"][key] = json!("newer");
        }
        run["instance"]["reboot"]["when"] = json!("newer");
        run["failure"] = json!({"stage": "newer", "message": "x", "tail": [], "transient": true});
        run["before"] = json!({"system": "/nix/store/x", "generation": {"number": 5, "system": "/nix/store/x"}, "failed_units": []});
        fs::write(&path, run.to_string()).unwrap();
        let run = serde_json::to_value(Run::load(path).unwrap().expect("it is set aside")).unwrap();
        let expected = json!({"phase": "returning", "decision": "startOver", "trigger": "timer", "result": "unknown", "boot_loader": null});
        for (key, expected) in expected.as_object().unwrap() {
            assert_eq!(&run[key], expected, "{key}");
        }
        assert_eq!((&run["failure"]["stage"], &run["before"]["generation"]["number"]), (&json!("unknown"), &json!(5)));
        assert_eq!((&run["instance"]["operation"], &run["instance"]["onUnitFailure"]), (&json!("switch"), &json!("rollback")));
    }

    #[test]
    fn a_journal_that_makes_no_sense_is_kept_and_in_nobodys_way() {
        let directory = Directory::new();
        let (path, run) = journal(&directory);
        let aside = files::aside(&path);
        let changed = |key: &str, value: Value| {
            let mut run = run.clone();
            run[key] = value;
            run.to_string()
        };
        fs::write(&path, run.to_string()).unwrap();
        assert!(Run::load(path.clone()).unwrap().is_some() && !aside.exists());
        let cut = run.to_string().split_off(9);
        // what is to be put back is not guessed
        let before = json!({"system": "/nix/store/x", "generation": {"number": "5", "system": "/nix/store/x"}, "failed_units": []});
        for text in ["", "{", &cut, "\0\0\0", &changed("format", json!(2)), &changed("started", json!("x")), &changed("before", before)] {
            fs::write(&path, text).unwrap();
            assert!(Run::load(path.clone()).unwrap().is_none(), "{text}");
            assert!(!path.exists() && fs::read_to_string(&aside).unwrap() == text);
        }
        fs::create_dir_all(path.join("deep")).unwrap();
        assert!(Run::load(path.clone()).unwrap().is_none() && !path.exists() && aside.join("deep").is_dir());
        fs::write(&path, "x").unwrap();
        assert!(Run::load(path.clone()).unwrap().is_none() && aside.is_file());
    }
}
