//! The one error type: a sentence for the administrator, `Failed to <verb> <object>: <cause>`,
//! and the last lines of what a failing program said.

use std::fmt;
use std::path::Path;

use crate::text;

/// What fails here fails with an [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why something could not be done. A pointer: every result has room for it, and few have it.
#[derive(Debug)]
pub struct Error(Box<Told>);

#[derive(Debug)]
struct Told {
    message: String,
    tail: Vec<String>,
    transient: bool,
}

impl Error {
    /// An error that is said in one sentence, without a full stop. It will be shown, and stands in files
    /// that everybody may read: what others have written in it is made fit for that.
    pub fn new(message: impl AsRef<str>) -> Self {
        Self::of(message.as_ref())
    }

    #[inline(never)]
    fn of(message: &str) -> Self {
        Self(Box::new(Told { message: text::line(message), tail: Vec::new(), transient: false }))
    }

    /// The same error, as one that has to do with this moment rather than with what was asked for.
    pub fn transient(mut self) -> Self {
        self.0.transient = true;
        self
    }

    /// The end of the failing program's output; empty if no program was involved.
    pub fn tail(&self) -> &[String] {
        &self.0.tail
    }

    /// The last lines of that, at most so many.
    pub fn end(&self, lines: usize) -> &[String] {
        &self.0.tail[self.0.tail.len().saturating_sub(lines)..]
    }

    /// Whether the same may well succeed another time: said so, or by what the failing program said of this
    /// machine.
    pub fn is_transient(&self) -> bool {
        self.0.transient || self.says(&MACHINE)
    }

    /// Whether the network or the other side is to blame, by what the failing program said.
    pub fn is_of_network(&self) -> bool {
        // the Nix daemon of this machine is no other side
        !self.says(&["daemon-socket/", "remote store 'daemon'"])
            // without a reason, where the connection was closed
            && (self.says(&NETWORK) || self.0.tail.first().is_some_and(|line| line.contains("Could not read from remote repository")))
    }

    /// The same error of a program that was to reach others: transient if the network is to blame. Of what
    /// the candidate runs the same words say nothing.
    pub fn of_network(self) -> Self {
        if self.is_of_network() { self.transient() } else { self }
    }

    fn says(&self, words: &[&str]) -> bool {
        let said = self.0.tail.iter().chain([&self.0.message]).map(|line| line.to_ascii_lowercase());
        said.into_iter().any(|line| words.iter().any(|words| line.contains(words)))
    }

    /// The same error with the end of a program's output.
    pub fn with_tail(mut self, tail: Vec<String>) -> Self {
        self.0.tail = tail;
        self
    }
}

/// What programs say when this machine, a disk of it or its Nix daemon is at fault, in lower case.
const MACHINE: [&str; 27] = [
    // Nix, of one of its caches; what is damaged is said in other words
    ".sqlite': unable to open database file",
    // Nix could not open the file
    "acquiring/releasing lock",
    "attempt to write a readonly database",
    "cannot allocate memory",
    "cannot connect to socket",
    "cannot open connection to remote store",
    "database or disk is full",
    "disk i/o error",
    "disk quota exceeded",
    "due to signal 15",
    "due to signal 9",
    "exit code 137",
    "input/output error",
    "interrupted by the user",
    "nix daemon disconnected",
    "no space left on device",
    // git
    "out of diskspace",
    "out of memory",
    "read-only file system",
    "resource temporarily unavailable",
    "stale file handle",
    "structure needs cleaning",
    "too many open files",
    "transport endpoint is not connected",
    "unexpected end-of-file",
    // a program of ours, on whatever way its error has come
    "was ended by signal 15",
    "was ended by signal 9",
];

/// What programs say when the network or the other side is at fault, in lower case.
const NETWORK: [&str; 61] = [
    "broken pipe",
    "bytes missing",
    "closed by remote host",
    "connection aborted",
    "connection closed by",
    "connection refused",
    "connection reset",
    "connection timed out",
    "could not connect to server",
    "could not resolve",
    "couldn't connect to server",
    "couldn't resolve",
    "early eof",
    "empty reply from server",
    "error decoding the received tls packet",
    "error in the http2",
    "error in the pull function",
    "failed sending data",
    "failed to connect to",
    "failure when receiving data",
    "gnutls_handshake",
    "host is down",
    "http error 408",
    "http error 429",
    "http error 5",
    "kex_exchange_identification",
    "name or service not known",
    "network is down",
    "network is unreachable",
    "no address associated with hostname",
    "no route to host",
    "non-properly terminated",
    "not closed cleanly",
    "operation timed out",
    "operation too slow",
    "partial file",
    "rate limit exceeded",
    "recv failure",
    "remote end hung up unexpectedly",
    "resolving timed out",
    "returned error: 408",
    "returned error: 429",
    "returned error: 5",
    "rpc failed",
    "send failure",
    "server certificate verification failed",
    "server returned nothing",
    "server verification failed",
    "ssl certificate problem",
    "ssl connect error",
    "ssl connection timeout",
    "ssl peer certificate",
    "ssl_error_syscall",
    "temporary failure in name resolution",
    "timeout was reached",
    "timeout, server",
    "transfer closed with",
    "unable to connect",
    "unable to look up",
    "unexpected disconnect",
    "unexpected eof while reading",
];

impl fmt::Display for Error {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0.message)
    }
}

/// Says what was being done when another library's error came up.
pub trait Context<T> {
    /// `doing` completes "Failed to …", as in "read /etc/ekiben/config.json".
    fn context(self, doing: impl FnOnce() -> String) -> Result<T>;

    /// The same where that was one thing to one file.
    fn doing(self, verb: &str, path: &Path) -> Result<T>;
}

impl<T, E: fmt::Display> Context<T> for std::result::Result<T, E> {
    fn context(self, doing: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|cause| failed(&doing(), &cause))
    }

    fn doing(self, verb: &str, path: &Path) -> Result<T> {
        self.map_err(|cause| failed_to(verb, path, &cause))
    }
}

/// What may fail without anything else failing: what came of it; where nothing did, the reason is logged.
pub trait OrLog<T> {
    /// As a warning.
    fn or_warn(self) -> Option<T>;
    /// As an error.
    fn or_error(self) -> Option<T>;
}

impl<T> OrLog<T> for Result<T> {
    fn or_warn(self) -> Option<T> {
        self.map_err(|error| told(log::Level::Warn, &error)).ok()
    }

    fn or_error(self) -> Option<T> {
        self.map_err(|error| told(log::Level::Error, &error)).ok()
    }
}

#[inline(never)]
fn told(level: log::Level, error: &Error) {
    log::log!(level, "{error}.");
}

#[inline(never)]
fn failed_to(verb: &str, path: &Path, cause: &dyn fmt::Display) -> Error {
    failed(&format!("{verb} {}", path.display()), cause)
}

/// Compiled once, not for each type of cause.
#[inline(never)]
fn failed(doing: &str, cause: &dyn fmt::Display) -> Error {
    Error::new(format!("Failed to {doing}: {cause}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_to_blame_is_told_by_what_was_said() {
        for (line, transient, network) in [
            ("error: writing to file: No space left on device", true, false),
            ("error: executing SQLite statement 'insert': database or disk is full", true, false),
            ("fatal: sha1 file '/x/index.lock' write error. Out of diskspace", true, false),
            ("error: cannot open SQLite database '/x/eval-cache-v5/y.sqlite': unable to open database file", true, false),
            ("error: executing SQLite statement 'pragma': file is not a database, file is not a database (in '/x/y.sqlite')", false, false),
            ("error: cannot connect to socket at '/nix/var/nix/daemon-socket/socket': Connection refused", true, false),
            ("error: cannot open connection to remote store 'daemon': error: reading from file: Connection reset by peer", true, false),
            ("error: builder for '/nix/store/x.drv' failed due to signal 9 (Killed)", true, false),
            ("error: builder for '/nix/store/x.drv' failed due to signal 11 (Segmentation fault)", false, false),
            ("Failed to make /x: Failed to remove /x: rm was ended by signal 9", true, false),
            ("kex_exchange_identification: Connection closed by remote host", false, true),
            ("Connection closed by 192.0.2.1 port 22", false, true),
            ("Connection to forge closed by remote host.", false, true),
            ("Timeout, server forge not responding.", false, true),
            ("GnuTLS, handshake failed: The TLS connection was non-properly terminated.", false, true),
            ("GnuTLS, handshake failed: A TLS fatal alert has been received.", false, false),
            ("fatal: Could not read from remote repository.", false, true),
            ("fatal: unable to access 'http://h/': The requested URL returned error: 500", false, true),
            ("fatal: unable to access 'http://h/': The requested URL returned error: 404", false, false),
            ("error: unable to download 'http://h/': HTTP error 429", false, true),
            ("error: unable to download 'https://h/': SSL peer certificate or SSH remote key was not OK (60)", false, true),
            ("fatal: unable to access 'https://h/': server verification failed: certificate has expired.", false, true),
            ("Host key verification failed.", false, false),
            ("fatal: couldn't find remote ref refs/heads/main", false, false),
            ("error: syntax error, unexpected end of file", false, false),
        ] {
            let error = Error::new("Failed to update app").with_tail(vec![line.into()]);
            assert_eq!((error.is_transient(), error.is_of_network()), (transient, network), "{line}");
            assert_eq!(error.of_network().is_transient(), transient || network, "{line}");
        }
    }

    #[test]
    fn who_is_not_let_in_is_not_to_try_again() {
        let said = ["deploy@forge: Permission denied (publickey).", "fatal: Could not read from remote repository."];
        assert!(!Error::new("Failed to fetch").with_tail(said.map(String::from).to_vec()).is_of_network());
    }

    #[test]
    fn no_secret_of_a_url_is_kept() {
        let error = Error::new("Failed to update app: fatal: unable to access 'https://me:geheim@host/app'");
        assert_eq!(error.to_string(), "Failed to update app: fatal: unable to access 'https://***@host/app'");
        let error = Err::<(), _>("https://host/x?access_token=geheim").context(|| "reach https://me:geheim@host".into()).unwrap_err();
        assert!(!error.to_string().contains("geheim"), "{error}");
    }
}
