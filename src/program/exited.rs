//! How a program has ended, and what is said of that.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use nix::sys::signal::Signal;

use crate::error::{Error, Result};

/// What is said of a program that had no chance to tidy up.
pub const KILLED: &str = "was ended by signal";

/// Finds what says best why a program failed, in the last lines that it printed.
pub type Reason = fn(&[String]) -> Option<String>;

/// How a program ended.
pub struct Exited {
    /// Its exit status.
    pub status: ExitStatus,
    /// The last lines of its output and errors.
    pub tail: Vec<String>,
    /// The lines in which it has said what was watched for, the first of them at least.
    pub seen: Vec<String>,
    pub(super) doing: String,
    pub(super) reason: Reason,
}

impl Exited {
    /// What it said of why it failed, if it did.
    pub fn reason(&self) -> Option<String> {
        (self.reason)(&self.tail)
    }

    /// The error that it has failed, for a reason of ours.
    pub fn failed(self, why: &str) -> Error {
        Error::new(format!("Failed to {}: {why}", self.doing)).with_tail(self.tail)
    }

    /// Fails unless the program succeeded.
    pub fn success(self) -> Result<()> {
        if self.status.success() {
            return Ok(());
        }
        let said = self.reason().map(|line| format!(": {line}")).unwrap_or_default();
        Err(failed(format!("Failed to {}: {}{said}", self.doing, describe(self.status)), self.status, self.tail))
    }
}

/// The error that a program which did not succeed comes to. If somebody else has ended it, or a limit of this machine's on
/// the size of files, the next may well succeed.
pub(super) fn failed(message: String, status: ExitStatus, tail: Vec<String>) -> Error {
    let error = Error::new(message).with_tail(tail);
    let by_others = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGKILL, Signal::SIGTERM, Signal::SIGXFSZ].map(|signal| signal as i32);
    if status.signal().is_some_and(|signal| by_others.contains(&signal)) { error.transient() } else { error }
}

/// The line that says best why a program failed; those that install boot loaders are of Python and Perl.
pub(super) fn reason(tail: &[String]) -> Option<String> {
    let last = |words: &[&str]| tail.iter().rev().map(|line| line.trim()).find(|line| words.iter().any(|word| line.contains(word)));
    let said = last(&["error: ", "fatal: "]).or_else(|| last(&["Error: ", "No space left on device"]))?;
    Some(said.trim_end_matches(['.', ';']).to_owned())
}

pub(super) fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with {code}"),
        (None, Some(signal)) => format!("{KILLED} {signal}"),
        (None, None) => "ended".into(),
    }
}
