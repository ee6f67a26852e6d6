//! One session with a hub: OpenSSH's own sftp, asked line by line.
//!
//! To a host, the hub is whom its configuration says, by its pinned key, or there is no session; to
//! people, whom their own ssh knows. A hub that is silent or slow, or sends more than it may, ends
//! the session, never the patience of the caller.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::config::{Hub, Server};
use crate::error::{Context, Error, Result};
use crate::files;
use crate::fleet::LARGE;
use crate::fleet::place::Place;
use crate::program::Program;
use crate::program::conversation::Conversation;
use crate::system;
use crate::text;

/// What sftp puts before a line that it repeats.
const PROMPT: &str = "sftp> ";
/// The longest line: sftp takes what is beyond 2047 bytes for another one.
const LINE: usize = 2000;
/// How much sftp may print, and how much it may complain, about one line.
const PRINTED: usize = 1024 * 1024;
const COMPLAINT: u64 = 64 * 1024;

/// What sftp said of one thing.
struct Said {
    printed: Vec<String>,
    complaint: String,
}

/// A session under way.
pub struct Session {
    sftp: Conversation,
    errors: PathBuf,
    /// How much of that has been read.
    heard: u64,
    server: String,
    /// A comment that nobody else can know: sftp repeats it when it has done what it was asked before.
    mark: String,
}

impl Session {
    /// Connects to the first of the hub's servers that answers. `identity` is the private key,
    /// `directory` one for scratch files; the whole session may take `limit`.
    pub fn open(hub: &Hub, identity: &Path, directory: &Path, limit: Duration) -> Result<Self> {
        let mut failed = None;
        for server in &hub.servers {
            match Self::open_to(hub, server, identity, directory, limit) {
                Ok(session) => return Ok(session),
                Err(error) => {
                    if let Some(earlier) = failed.replace(error) {
                        log::warn!("{earlier}.");
                    }
                }
            }
        }
        Err(failed.unwrap_or_else(|| Error::new("Failed to reach a hub: there is none")))
    }

    fn open_to(hub: &Hub, server: &Server, identity: &Path, directory: &Path, limit: Duration) -> Result<Self> {
        let name = format!("{}:{}", server.host, server.port);
        let doing = || format!("reach the hub at {name}");
        let known_hosts = directory.join("known_hosts");
        fs::write(&known_hosts, format!("hub {}\n", server.host_key)).context(doing)?;
        // of what is said twice, ssh takes the first
        let pinned = [
            "BatchMode=yes".to_owned(),
            "StrictHostKeyChecking=yes".into(),
            "HostKeyAlias=hub".into(),
            format!("UserKnownHostsFile={}", known_hosts.display()),
            "GlobalKnownHostsFile=/dev/null".into(),
            "UpdateHostKeys=no".into(),
            format!("IdentityFile={}", identity.display()),
            "IdentitiesOnly=yes".into(),
            "PreferredAuthentications=publickey".into(),
        ];
        let defaults = ["ConnectTimeout=20", "ServerAliveInterval=5", "ServerAliveCountMax=2", "LogLevel=ERROR"];
        let options = pinned.iter().chain(&hub.ssh_options).map(String::as_str).chain(defaults);
        let destination = format!("{}@{}", server.user, server.host);
        let port = server.port.to_string();
        let arguments = ["-F", "none"].into_iter().chain(options.flat_map(|option| ["-o", option]));
        Self::start(name, arguments.chain(["-P", &port, &destination]), directory, limit)
    }

    /// Connects to `server`, an `sftp://` without a path, as this user's own configuration of ssh
    /// says, without asking anybody anything.
    pub fn open_as_configured(server: &str, directory: &Path, limit: Duration) -> Result<Self> {
        let options = ["-o", "BatchMode=yes", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=2", "-o", "LogLevel=ERROR"];
        Self::start(server.to_owned(), options.into_iter().chain([server]), directory, limit)
    }

    fn start<'a>(server: String, arguments: impl Iterator<Item = &'a str>, directory: &Path, limit: Duration) -> Result<Self> {
        let errors = directory.join("sftp.log");
        let file = File::create(&errors).context(|| format!("reach the hub at {server}"))?;
        let sftp = Program::new("timeout")
            .args(["--kill-after=5", &limit.as_secs().to_string(), "prlimit", &format!("--fsize={LARGE}"), "--"])
            // what is larger is cut off, and the session goes on
            .args(["env", "--ignore-signal=XFSZ", "--", "sftp", "-b", "-"])
            .args(arguments)
            .env("LC_ALL", "C");
        let mark = format!("# {}", system::uuid()?);
        let mut session = Self { sftp: sftp.talk(Some(file))?, errors, heard: 0, server, mark };
        session.ask("-pwd", &[])?;
        Ok(session)
    }

    /// Fetches a file, or the rest of one that is there in part. Returns whether there is one; one that the
    /// hub does not hand out, or of more than `limit` bytes, is an error.
    pub fn get(&mut self, remote: &str, local: &Path, limit: u64) -> Result<bool> {
        let found = self.receive("-reget", remote, local)?;
        if found && local.metadata().is_ok_and(|metadata| metadata.len() > limit) {
            files::clear(local).context(|| format!("remove {}", local.display()))?;
            return Err(self.refused(&format!("{remote} has more than {limit} bytes")));
        }
        Ok(found)
    }

    /// Fetches all of a file, with its time. Returns whether there is one, as [`Self::get`] does.
    pub fn fetch(&mut self, remote: &str, local: &Path) -> Result<bool> {
        files::clear(local).context(|| format!("remove {}", local.display()))?;
        self.receive("-get -p", remote, local)
    }

    fn receive(&mut self, command: &str, remote: &str, local: &Path) -> Result<bool> {
        let complaint = self.ask(command, &[remote, &path(local)])?.complaint;
        let ends = |complaint: &str, words: &str| complaint.trim_end().trim_end_matches('.').ends_with(words);
        // a file that is too large is of no use, as its reader will find
        if complaint.is_empty() || ends(&complaint, "File too large") {
            return Ok(local.exists());
        }
        if ends(&complaint, "not found") {
            // sftp says so, too, if it may not look for it; of what is to be a directory it says why it is none
            let why = self.ask("-cd", &[remote])?.complaint;
            // the latter of a directory above it
            let is_gone = ends(&why, "No such file or directory") || ends(&why, "No such file");
            return if is_gone { Ok(false) } else { Err(self.refused(&format!("{complaint}{why}"))) };
        }
        // it goes just now
        if ends(&complaint, "No such file or directory") { Ok(false) } else { Err(self.refused(&complaint)) }
    }

    /// Sends a file, under another name until it is whole.
    pub fn put(&mut self, local: &Path, remote: &str) -> Result<()> {
        let new = format!("{remote}.new");
        self.succeed("-put", &[&path(local), &new])?;
        self.rename(&new, remote)
    }

    /// Makes a directory the one that paths begin at.
    pub fn enter(&mut self, remote: &str) -> Result<()> {
        self.succeed("-cd", &[remote]).map(drop)
    }

    /// The names in a directory.
    pub fn list(&mut self, remote: &str) -> Result<Vec<String>> {
        let printed = self.succeed("-ls -1", &[remote])?;
        Ok(printed.iter().filter_map(|line| line.trim_end().rsplit('/').next()).map(String::from).collect())
    }

    /// Sends a file, onto the hub's disk.
    pub fn send(&mut self, local: &Path, remote: &str) -> Result<()> {
        self.succeed("-put -f", &[&path(local), remote]).map(drop)
    }

    /// Gives a file a second name. Returns whether nothing had that.
    pub fn link(&mut self, remote: &str, name: &str) -> Result<bool> {
        let complaint = self.ask("-ln", &[remote, name])?.complaint;
        match complaint.trim_end() {
            "" => Ok(true),
            // all that SFTP says of a name that is taken
            said if said.ends_with(": Failure") => Ok(false),
            _ => Err(self.refused(&complaint)),
        }
    }

    /// Gives a file another name, which it takes from what had that before.
    pub fn rename(&mut self, remote: &str, name: &str) -> Result<()> {
        self.succeed("-rename", &[remote, name]).map(drop)
    }

    /// Removes a file.
    pub fn remove(&mut self, remote: &str) -> Result<()> {
        self.succeed("-rm", &[remote]).map(drop)
    }

    /// Ends the session.
    pub fn close(self) -> Result<()> {
        self.sftp.end().context(|| format!("close the session with the hub at {}", self.server))
    }

    /// Has sftp do something; returns what it printed.
    fn succeed(&mut self, command: &str, words: &[&str]) -> Result<Vec<String>> {
        let said = self.ask(command, words)?;
        if said.complaint.is_empty() { Ok(said.printed) } else { Err(self.refused(&said.complaint)) }
    }

    fn refused(&self, complaint: &str) -> Error {
        // it ends lines as terminals have it
        let complaint: Vec<_> = complaint.lines().map(|line| line.trim().trim_end_matches('.')).collect();
        Error::new(format!("Failed to talk to the hub at {}: {}", self.server, complaint.join("; ")))
    }

    /// What sftp has written into its errors since this was asked last.
    fn complaint(&mut self) -> Result<String> {
        let (mut complaint, from) = (Vec::new(), self.heard);
        let read = File::open(&self.errors).and_then(|mut file| {
            self.heard = file.metadata()?.len();
            file.seek(SeekFrom::Start(from))?;
            file.take(COMPLAINT).read_to_end(&mut complaint)
        });
        read.context(|| format!("read {}", self.errors.display()))?;
        Ok(String::from_utf8_lossy(&complaint).into_owned())
    }

    /// Has sftp do something, and waits until it has.
    fn ask(&mut self, command: &str, words: &[&str]) -> Result<Said> {
        let line = line(command, words).context(|| format!("talk to the hub at {}", self.server))?;
        let (mut printed, mut size) = (Vec::new(), 0);
        let asked = self.sftp.say(&line).and_then(|()| self.sftp.say(&self.mark));
        while asked.is_ok() {
            match self.sftp.hear() {
                // what it was asked it says again
                Ok(Some(line)) if line.starts_with(PROMPT) => {
                    if line[PROMPT.len()..].trim_end() == self.mark {
                        return Ok(Said { printed, complaint: self.complaint()? });
                    }
                }
                Ok(Some(line)) => {
                    size += line.len();
                    if size > PRINTED {
                        return Err(Error::new(format!(
                            "Failed to talk to the hub at {}: its output has more than {PRINTED} bytes",
                            self.server
                        )));
                    }
                    printed.push(line);
                }
                Ok(None) | Err(_) => break,
            }
        }
        let said: Vec<String> = self.complaint()?.lines().map(text::line).collect();
        let why = said.iter().rev().find(|line| !line.starts_with("Connection closed")).map_or("connection closed", String::as_str);
        let error = Error::new(format!("Failed to talk to the hub at {}: {}", self.server, why.trim().trim_end_matches('.')))
            .with_tail(said.clone());
        // anything else may be gone another time
        let refused = ["Host key verification failed", "Permission denied"];
        Err(if said.iter().any(|line| refused.iter().any(|words| line.contains(words))) { error } else { error.transient() })
    }
}

impl Place for Session {
    fn get(&mut self, remote: &str, local: &Path, limit: u64) -> Result<bool> {
        Self::get(self, remote, local, limit)
    }

    fn put(&mut self, local: &Path, remote: &str) -> Result<()> {
        Self::put(self, local, remote)
    }
}

fn path(path: &Path) -> String {
    path.display().to_string()
}

/// A line that sftp reads as this command with these words, whoever chose them; `None` if there is none.
fn line(command: &str, words: &[&str]) -> Result<String, String> {
    let quoted = |word: &&str| format!(" \"{}\"", word.replace('\\', "\\\\").replace('"', "\\\""));
    let line = command.to_owned() + &words.iter().map(quoted).collect::<String>();
    match words.iter().find(|word| word.is_empty() || word.chars().any(char::is_control)) {
        Some(word) => Err(format!("{word:?} is not a valid name")),
        None if line.len() > LINE => Err(format!("{:?} is too long", words[0])),
        None => Ok(line),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_one_command_whatever_the_words_are() {
        assert_eq!(line("-get -p", &["a b", "*/\"c\"\\"]).unwrap(), r#"-get -p "a b" "*/\"c\"\\""#);
        for odd in ["", "x\n!touch /tmp/x", "x\ry", "x\u{1b}y", "x\u{85}y", &"x".repeat(LINE)] {
            assert!(line("-rm", &[odd]).is_err(), "{odd:?}");
        }
    }
}
