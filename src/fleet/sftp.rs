//! One session with a hub: OpenSSH's own sftp, asked line by line.
//!
//! The hub is whom the configuration says, by its pinned key, or there is no session; a hub that is
//! silent or slow, or sends more than it may, ends the session, never the run's patience.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::config::{Hub, Server};
use crate::error::{Context, Error, Result};
use crate::fleet::LARGE;
use crate::program::{Conversation, Program};

/// What sftp says when it has done what it was asked before: a question that it answers by itself.
const QUESTION: &str = "lpwd";
const ANSWER: &str = "Local working directory: ";

/// A session under way.
pub struct Session {
    sftp: Conversation,
    errors: PathBuf,
    server: String,
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
        let errors = directory.join("sftp.log");
        let file = File::create(&errors).context(doing)?;
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
        let sftp = Program::new("timeout")
            .args(["--kill-after=5", &limit.as_secs().to_string(), "prlimit", &format!("--fsize={LARGE}"), "--"])
            .args(["sftp", "-b", "-", "-F", "none"])
            .args(options.flat_map(|option| ["-o", option]))
            .args(["-P", &server.port.to_string(), &format!("{}@{}", server.user, server.host)])
            .env("LC_ALL", "C")
            .errors_to(file);
        let mut session = Self { sftp: sftp.talk()?, errors, server: name };
        session.ask("-pwd")?;
        Ok(session)
    }

    /// Fetches a file, or the rest of one that is there in part. Returns whether it is there now.
    pub fn get(&mut self, remote: &str, local: &Path) -> Result<bool> {
        self.ask(&format!("-reget {remote} {}", local.display()))?;
        Ok(local.exists())
    }

    /// Sends a file, under another name until it is whole.
    pub fn put(&mut self, local: &Path, remote: &str) -> Result<()> {
        self.ask(&format!("-put {} {remote}.new", local.display()))?;
        self.ask(&format!("-rename {remote}.new {remote}"))
    }

    /// Ends the session.
    pub fn close(self) -> Result<()> {
        self.sftp.end().context(|| format!("take leave of the hub at {}", self.server))
    }

    /// Has sftp do something, and waits until it has.
    fn ask(&mut self, command: &str) -> Result<()> {
        let asked = self.sftp.say(command).and_then(|()| self.sftp.say(QUESTION));
        while asked.is_ok() {
            match self.sftp.hear() {
                Ok(Some(line)) if line.starts_with(ANSWER) => return Ok(()),
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => break,
            }
        }
        let said = fs::read_to_string(&self.errors).unwrap_or_default();
        let said: Vec<String> = said.lines().map(String::from).collect();
        let why = said.iter().rev().find(|line| !line.starts_with("Connection closed")).map_or("it hung up", String::as_str);
        let error = Error::new(format!("Failed to talk to the hub at {}: {}", self.server, why.trim())).with_tail(said.clone());
        // anything else may be gone another time
        let refused = ["Host key verification failed", "Permission denied"];
        Err(if said.iter().any(|line| refused.iter().any(|words| line.contains(words))) { error } else { error.transient() })
    }
}
