//! What the user's stages tell root's: a file in the instance's own directory.
//!
//! Root reads it as a stranger's: it fills the report, and it says whether there is something to
//! activate, but never what.

use std::fs;

use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, OrLog, Result};
use crate::files;
use crate::names::{Branch, ObjectId, RunId};
use crate::paths::Paths;
use crate::program::TAIL_LINES;
use crate::run::{Failure, Release, Stage};

/// How many lines tell in detail what is new, or changes.
pub const NEWS: usize = 40;
/// More than any run has to say.
const LIMIT: u64 = 256 * 1024;

/// The notes of one run.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Notes {
    /// The run's identifier; notes of another run say nothing about this one.
    run: RunId,
    /// The release of a fleet's hub that the run is about.
    pub release: Option<Release>,
    /// When that expires, in seconds since 1970.
    pub expires: Option<u64>,
    /// What the run proposes.
    pub proposal: Option<Proposal>,
    /// Whether the proposal has been built.
    pub built: bool,
    /// Whether it is not waited for any more, since something newer is wanted.
    #[serde(default)]
    pub overtaken: bool,
    /// How what was built differs from what runs, a line each.
    #[serde(default)]
    pub changes: Vec<String>,
    /// What went wrong.
    pub failure: Option<Failure>,
    /// The stage that wrote last.
    pub stage: Stage,
    /// When the build began, in seconds since 1970.
    pub build_began: Option<u64>,
}

/// What the first stage found.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Proposal {
    /// The commit to start from, which is the branch's or, after a pull, comes after it.
    pub base: ObjectId,
    /// The branch, by its full name.
    pub branch: Branch,
    /// Where the branch was.
    pub head: ObjectId,
    /// The commit that is to run, and to become the branch.
    pub commit: ObjectId,
    /// Its tree: unlike the commit, the same for the same proposal made again.
    pub tree: ObjectId,
    /// What is new, in a line; empty if nothing is.
    pub summary: String,
    /// The same in detail, a line each: the inputs' revisions, and the subjects of what was pulled.
    #[serde(default)]
    pub news: Vec<String>,
    /// Whether this very commit has been deployed before.
    pub unchanged: bool,
    /// Why it is not deployed, though it is not what has been: its deployment was undone by hand.
    pub withheld: Option<String>,
}

/// The identifier of the run that this process belongs to: systemd's, the same in all stages.
pub fn run_id() -> Result<RunId> {
    let id = std::env::var("INVOCATION_ID").unwrap_or_default();
    RunId::try_from(id).map_err(|_| Error::new("Failed to find the run: its unit runs this; ask for a run with ekiben trigger INSTANCE"))
}

impl Notes {
    /// Begins the notes of this run, in the stage `prepare`; earlier ones are gone, and so is the
    /// link to an earlier candidate.
    pub fn begin(paths: &Paths) -> Result<Self> {
        let candidate = paths.candidate();
        files::tidy(&candidate);
        files::clear(&candidate).doing("remove", &candidate)?;
        let notes = Self {
            run: run_id()?,
            release: None,
            expires: None,
            proposal: None,
            built: false,
            overtaken: false,
            changes: Vec::new(),
            failure: None,
            stage: Stage::Prepare,
            build_began: None,
        };
        notes.write(paths)?;
        Ok(notes)
    }

    /// Reads the notes of this run.
    pub fn read(paths: &Paths) -> Result<Self> {
        let notes = Self::read_of(paths, &run_id()?)?;
        notes.ok_or("they belong to another run").doing("read", &paths.notes())
    }

    /// Reads the notes of a run as a stranger's; `None` if there are none of that run.
    pub fn read_of(paths: &Paths, run: &RunId) -> Result<Option<Self>> {
        let path = paths.notes();
        let Some(notes) = files::read_foreign_json::<Self>(&path, LIMIT)? else { return Ok(None) };
        let of_user = |stage: Stage| matches!(stage, Stage::Prepare | Stage::Build);
        if notes.proposal.as_ref().is_some_and(|proposal| proposal.news.len() > NEWS)
            || notes.changes.len() > NEWS + 1
            || !of_user(notes.stage)
            || notes.failure.as_ref().is_some_and(|failure| !of_user(failure.stage) || failure.tail.len() > TAIL_LINES)
        {
            return Err(Error::new("their contents are not valid for this stage")).doing("read", &path);
        }
        Ok((notes.run == *run).then_some(notes))
    }

    /// Notes what a stage failed with and fails with it.
    pub fn fail(&mut self, paths: &Paths, error: Error) -> Result<()> {
        self.failure = Some(Failure::new(self.stage, &error));
        self.write(paths).or_warn();
        Err(error)
    }

    /// Writes the notes.
    pub fn write(&self, paths: &Paths) -> Result<()> {
        let path = paths.notes();
        // a directory of the user's own making in its place is the user's to remove
        fs::metadata(path.parent().unwrap_or(&path)).doing("write", &path)?;
        files::write_json(&path, self, 0o600)
    }
}
