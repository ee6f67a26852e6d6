//! Where a host's releases come from, and its reports go: a session with the hub, or a store.

use std::path::Path;

use crate::error::Result;

/// One such place. Paths are those of the directory that the hub serves for this host.
pub trait Place {
    /// Fetches a file, or the rest of one that is there in part. Returns whether there is one; one that the
    /// other side does not hand out, or of more than `limit` bytes, is an error.
    fn get(&mut self, remote: &str, local: &Path, limit: u64) -> Result<bool>;

    /// Sends a file, which is there in one step.
    fn put(&mut self, local: &Path, remote: &str) -> Result<()>;

    /// Whether a report that it has taken is the hub's, so that nobody has to ask for that.
    fn keeps_reports(&self) -> bool {
        false
    }
}
