//! What the user's stages tell root's: a file in the instance's own directory.
//!
//! Root reads it as a stranger's: it fills the report, and it says whether there is something to
//! activate, but never what.

use std::fs;

use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Result};
use crate::files;
use crate::fleet::Release;
use crate::layout::Layout;
use crate::run::{Failure, Stage};
use crate::text;

/// More than any run has to say.
const LIMIT: u64 = 256 * 1024;

/// The notes of one run.
#[derive(Debug, Default, Deserialize, Serialize)]
pub struct Notes {
    /// The run's identifier; notes of another run say nothing about this one.
    run: String,
    /// The release of a fleet's hub that the run is about.
    pub release: Option<Release>,
    /// What the run proposes.
    pub proposal: Option<Proposal>,
    /// Whether the proposal has been built.
    pub built: bool,
    /// What went wrong.
    pub failure: Option<Failure>,
    /// The stage that wrote last.
    pub stage: Stage,
}

/// What the first stage found.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Proposal {
    /// The commit to start from, which is the branch's or, after a pull, comes after it.
    pub base: String,
    /// The branch, by its full name.
    pub branch: String,
    /// Where the branch was.
    pub head: String,
    /// The commit that is to run, and to become the branch.
    pub commit: String,
    /// Its tree: unlike the commit, the same for the same proposal made again.
    pub tree: String,
    /// What is new, in a line; empty if nothing is.
    pub summary: String,
    /// Whether this very commit has been deployed before.
    pub unchanged: bool,
}

/// The identifier of the run that this process belongs to: systemd's, the same in all stages.
pub fn run_id() -> String {
    std::env::var("INVOCATION_ID").unwrap_or_default()
}

impl Notes {
    /// Begins the notes of this run, in the stage `prepare`; earlier ones are gone, and so is the
    /// link to an earlier candidate.
    pub fn begin(layout: &Layout) -> Result<Self> {
        let candidate = layout.candidate();
        files::clear(&candidate).context(|| format!("remove {}", candidate.display()))?;
        let notes = Self { run: run_id(), ..Self::default() };
        notes.write(layout)?;
        Ok(notes)
    }

    /// Reads the notes of this run.
    pub fn read(layout: &Layout) -> Result<Self> {
        let doing = || format!("read {}", layout.notes().display());
        let notes = Self::read_of(layout, &run_id()).context(doing)?;
        notes.ok_or("they are of another run").context(doing)
    }

    /// Reads the notes of a run as a stranger's; none if there are none of that run.
    pub fn read_of(layout: &Layout, run: &str) -> Result<Option<Self>> {
        let path = layout.notes();
        let doing = || format!("read {}", path.display());
        let bytes = match files::read_foreign(&path, LIMIT) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            other => other.context(doing)?,
        };
        let mut notes = serde_json::from_slice(&bytes).context(doing)?;
        text::make_fit(&mut notes);
        let notes: Self = serde_json::from_value(notes).context(doing)?;
        Ok((notes.run == run).then_some(notes))
    }

    /// Notes what a stage failed with and fails with it.
    pub fn fail(&mut self, layout: &Layout, error: Error) -> Result<()> {
        self.failure = Some(Failure::new(self.stage, &error));
        if let Err(error) = self.write(layout) {
            log::warn!("{error}.");
        }
        Err(error)
    }

    /// Writes the notes.
    pub fn write(&self, layout: &Layout) -> Result<()> {
        let path = layout.notes();
        let doing = || format!("write {}", path.display());
        let text = serde_json::to_vec(self).context(doing)?;
        // a directory of the user's own making in its place is the user's to remove
        fs::metadata(path.parent().unwrap_or(&path)).context(doing)?;
        files::write(&path, &text, 0o600).context(doing)
    }
}
