//! What a run leaves on disk, and who reads it: the request, the notes of the user's stages, root's journal, and the
//! status that all may read. This file has the words that all of these share.

pub mod asker;
pub mod bad;
pub mod client;
pub mod drift;
pub mod ended;
pub mod hold;
pub mod holding;
pub mod journal;
pub mod log;
pub mod metrics;
pub mod notes;
pub mod notify;
mod problems;
pub mod published;
pub mod queue;
mod report;
pub mod show;
pub mod status;
pub mod trigger;
pub mod undo;

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::names::{Sequence, Sha256};

/// A stage of a run.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Stage {
    /// Take the request; end a run that was cut off.
    Begin,
    /// Make a candidate.
    #[default]
    Prepare,
    /// Build it.
    Build,
    /// Run it.
    Activate,
    /// Or have the hosts of a fleet fetch it.
    Publish,
    /// Look for a while whether it stays well.
    Observe,
    /// Make it the branch and report.
    Conclude,
    /// Look whether it has booted, and is well.
    Boot,
    /// One that only a newer version has.
    #[serde(other)]
    Unknown,
}

impl Stage {
    /// Whether another system may run in it than before, and yet be put back.
    pub fn may_switch(self) -> bool {
        matches!(self, Self::Activate | Self::Observe | Self::Boot)
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        // by the name that it has in JSON
        self.serialize(formatter)
    }
}

/// Why a run began.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Trigger {
    /// Somebody asked: by webhook or by `ekiben trigger`.
    Request,
    /// Somebody wants the last deployment undone: by `ekiben rollback`.
    Rollback,
    /// Nobody: the timer, `systemctl start`, or a run that was cut off.
    #[default]
    #[serde(other)]
    Timer,
}

/// How a run can end.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Outcome {
    /// The machine runs what the run proposed, or all hosts can fetch it, and it is the branch.
    Deployed,
    /// It is the branch, and some hosts can fetch it; others have been left out.
    Partly,
    /// The next boot brings what the run proposed, and decides.
    AwaitingBoot,
    /// Nothing was new.
    Unchanged,
    /// The same, but the machine runs something else than what was deployed last.
    Drifted,
    /// The last deployment was undone, as somebody had asked: what ran before it runs.
    Restored,
    /// Nothing is new since a deployment was undone by hand.
    Withheld,
    /// The branch moved, or something newer was asked for; another run starts from there.
    StartedOver,
    /// It failed before anything was changed.
    Failed,
    /// It failed, and what had been changed was put back.
    RolledBack,
    /// It failed, and putting back what had been changed failed, too.
    Stuck,
    /// In a way that only a newer version knows.
    #[default]
    #[serde(other)]
    Unknown,
}

impl Outcome {
    /// Whether it is for somebody to see to.
    pub fn is_failure(self) -> bool {
        matches!(self, Self::Partly | Self::Failed | Self::RolledBack | Self::Stuck | Self::Unknown)
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Deployed => "deployed",
            Self::Partly => "partly",
            Self::AwaitingBoot => "awaiting boot",
            Self::Unchanged => "unchanged",
            Self::Drifted => "drifted",
            Self::Restored => "restored",
            Self::Withheld => "withheld",
            Self::StartedOver => "started over",
            Self::Failed => "failed",
            Self::RolledBack => "rolled back",
            Self::Stuck => "rollback failed",
            Self::Unknown => "unknown",
        })
    }
}

/// What went wrong, and where.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Failure {
    /// In which stage.
    pub stage: Stage,
    /// In one sentence.
    pub message: String,
    /// What the failing program last said.
    pub tail: Vec<String>,
    /// Whether the same candidate may well succeed another time.
    pub transient: bool,
}

impl Failure {
    /// What an error of a stage comes to.
    pub fn new(stage: Stage, error: &Error) -> Self {
        Self { stage, message: error.to_string(), tail: error.tail().to_vec(), transient: error.is_transient() }
    }
}

/// One release of one host.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Release {
    /// The SHA-256 of all that the release consists of: archive, `attr` and `toplevel`.
    pub id: Sha256,
    /// Higher than that of every release of this host before.
    pub sequence: Sequence,
}
