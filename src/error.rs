//! The one error type: a sentence for the administrator, "Failed to <verb> <object>: <cause>",
//! and the last lines of what a failing program said.

use std::fmt;

use crate::text;

/// What fails here fails with an [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why something could not be done.
#[derive(Debug)]
pub struct Error {
    message: String,
    /// The end of the failing program's output; empty if no program was involved.
    pub tail: Vec<String>,
    transient: bool,
}

impl Error {
    /// An error that is said in one sentence, without a full stop. It will be shown, and stands in files
    /// that everybody may read: what others have written in it is made fit for that.
    pub fn new(message: impl AsRef<str>) -> Self {
        Self { message: text::line(message.as_ref()), tail: Vec::new(), transient: false }
    }

    /// The same error, as one that has to do with this moment rather than with what was asked for.
    pub fn transient(self) -> Self {
        Self { transient: true, ..self }
    }

    /// Whether the same may well succeed another time: said so, or by what the failing program said.
    pub fn is_transient(&self) -> bool {
        let said = self.tail.iter().chain([&self.message]).map(|line| line.to_ascii_lowercase());
        self.transient || said.into_iter().any(|line| TRANSIENT.iter().any(|words| line.contains(words)))
    }

    /// The same error with the end of a program's output.
    pub fn with_tail(self, tail: Vec<String>) -> Self {
        Self { tail, ..self }
    }
}

/// What programs say when the network, a disk or a daemon is at fault, in lower case.
const TRANSIENT: [&str; 18] = [
    "cannot connect to socket",
    "connection refused",
    "connection reset",
    "connection timed out",
    "could not resolve host",
    "couldn't connect to server",
    "couldn't resolve host",
    "disk quota exceeded",
    "failed to connect to",
    "http error 5",
    "name or service not known",
    "network is unreachable",
    "no route to host",
    "no space left on device",
    "operation timed out",
    "temporary failure in name resolution",
    "timeout was reached",
    "unable to connect",
];

impl fmt::Display for Error {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.message)
    }
}

/// Says what was being done when another library's error came up.
pub trait Context<T> {
    /// `doing` completes "Failed to …", as in "read /etc/ekiben/config.json".
    fn context(self, doing: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: fmt::Display> Context<T> for std::result::Result<T, E> {
    fn context(self, doing: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|cause| Error::new(format!("Failed to {}: {cause}", doing())))
    }
}
