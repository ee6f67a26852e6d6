//! The connection that a session with a hub goes over: OpenSSH's ssh, and what passes through it.
//!
//! To a host, the hub is whom its configuration says, by its pinned key, or there is no connection; to
//! people, whom their own ssh knows. A hub that is silent or slow, or says more than it may, ends
//! the connection, never the patience of the caller.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::config::{Hub, Server};
use crate::error::{Context, Error, Result};
use crate::fleet::sftp::packet::{self, Code, Packet, Reply};
use crate::program::Program;
use crate::program::conversation::Conversation;
use crate::text;

/// The largest answer, as OpenSSH has it.
const PACKET: u32 = 256 * 1024;
/// How much ssh may complain about.
const COMPLAINT: u64 = 64 * 1024;
/// What ssh says where one does not know the other, and where a host is to look.
const REFUSED: [(&str, &str); 2] = [
    ("Host key verification failed", "hub.hostKey here is not the key of the hub"),
    ("Permission denied", "hub.hosts there does not have the key of this host"),
];

/// A connection.
pub struct Transport {
    ssh: Conversation,
    errors: PathBuf,
    /// Whether a host's configuration says who the hub is, and not people's own ssh.
    is_pinned: bool,
    /// What the hub is called in messages.
    pub server: String,
    /// How many requests have been sent.
    sent: u32,
    is_greeted: bool,
    /// Requests that are sent with the next ones, before these, since nobody waits for their answers.
    later: Vec<Packet>,
}

impl Transport {
    /// Connects to one of the hub's servers, as [`super::Session::open`] says.
    pub fn to(hub: &Hub, server: &Server, identity: &Path, directory: &Path, limit: Duration) -> Result<Self> {
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
        let options = pinned.iter().chain(&hub.ssh_options).map(String::as_str).chain(["ConnectTimeout=20"]);
        let destination = format!("{}@{}", server.user, server.host.trim_matches(['[', ']']));
        let port = server.port.to_string();
        let arguments = ["-F", "none"].into_iter().chain(options.flat_map(|option| ["-o", option]));
        let started = Self::start(name, arguments.chain(["-p", &port]), &destination, directory, limit);
        started.map(|transport| Self { is_pinned: true, ..transport })
    }

    /// Connects to `server`, an `sftp://` without a path, as this user's own configuration of ssh says, without asking
    /// anybody anything.
    pub fn as_configured(server: &str, directory: &Path, limit: Duration) -> Result<Self> {
        let destination = server.replacen("sftp", "ssh", 1);
        Self::start(server.to_owned(), ["-o", "BatchMode=yes"].into_iter(), &destination, directory, limit)
    }

    fn start<'a>(
        server: String,
        arguments: impl Iterator<Item = &'a str>,
        destination: &str,
        directory: &Path,
        limit: Duration,
    ) -> Result<Self> {
        let errors = directory.join("ssh.log");
        let file = File::create(&errors).context(|| format!("reach the hub at {server}"))?;
        let defaults = ["ServerAliveInterval=5", "ServerAliveCountMax=2", "LogLevel=ERROR"];
        // as sftp(1) has them
        let only = ["ForwardX11=no", "ForwardAgent=no", "PermitLocalCommand=no", "ClearAllForwardings=yes"];
        let ssh = Program::new("ssh")
            .args(only.into_iter().flat_map(|option| ["-o", option]))
            .args(arguments)
            .args(defaults.into_iter().flat_map(|option| ["-o", option]))
            .args(["-s", "--", destination, "sftp"])
            .within(limit)
            .talk(file)?;
        Ok(Self { ssh, errors, is_pinned: false, server, sent: 0, is_greeted: false, later: Vec::new() })
    }

    /// Ends it.
    pub fn close(self) -> Result<()> {
        self.ssh.end().context(|| format!("close the session with the hub at {}", self.server))
    }

    /// Sends a request with the next ones; nobody waits for its answer.
    pub fn later(&mut self, request: Packet) {
        self.later.push(request);
    }

    /// Sends a request, and waits for its answer.
    pub fn ask(&mut self, request: Packet) -> Result<Reply> {
        // as many answers as requests
        self.ask_all(vec![request]).map(|mut answers| answers.swap_remove(0))
    }

    /// Sends requests, and waits for the answers to all of them, which are as many, in their order. For the first
    /// time, this greets the server, too.
    pub fn ask_all(&mut self, requests: Vec<Packet>) -> Result<Vec<Reply>> {
        let later = std::mem::take(&mut self.later);
        let (first, count) = (self.sent, later.len());
        let mut packets = if self.is_greeted { Vec::new() } else { packet::hello() };
        for request in later.into_iter().chain(requests) {
            packets.extend(request.bytes(self.sent));
            self.sent = self.sent.wrapping_add(1);
        }
        // who has closed the connection may have said why
        let sent = self.ssh.write(&packets);
        let heard = (|| {
            if !self.is_greeted {
                self.is_greeted = packet::is_hello(&self.hear()?);
            }
            let mut answers = Vec::new();
            let mut expected = first;
            while expected != self.sent {
                let packet = self.hear()?;
                let answer = Reply::parse(&packet).filter(|(number, _)| *number == expected && self.is_greeted);
                answers.push(answer.ok_or_else(|| io::Error::other(Code::UNEXPECTED))?.1);
                expected = expected.wrapping_add(1);
            }
            Ok(answers.split_off(count))
        })();
        heard.and_then(|answers| sent.map(|()| answers)).map_err(|error: io::Error| self.lost(&error))
    }

    /// The next packet, without its length.
    fn hear(&mut self) -> io::Result<Vec<u8>> {
        let mut length = [0; 4];
        self.ssh.read(&mut length)?;
        let length = u32::from_be_bytes(length);
        if length > PACKET {
            return Err(io::Error::other(Code::UNEXPECTED));
        }
        let mut packet = vec![0; length as usize];
        self.ssh.read(&mut packet).map(|()| packet)
    }

    /// Why a session is over, as ssh says it.
    fn lost(&self, error: &io::Error) -> Error {
        let mut complaint = Vec::new();
        let read = File::open(&self.errors).and_then(|file| file.take(COMPLAINT).read_to_end(&mut complaint));
        let said: Vec<String> = String::from_utf8_lossy(&complaint).lines().map(text::line).collect();
        let why = match (error.kind(), read, said.last()) {
            (ErrorKind::UnexpectedEof | ErrorKind::BrokenPipe, Ok(_), Some(line)) => line.trim().trim_end_matches('.').to_owned(),
            (ErrorKind::UnexpectedEof | ErrorKind::BrokenPipe, ..) => {
                "connection closed by what answers there, which may be no sshd".into()
            }
            _ => error.to_string(),
        };
        let refused = REFUSED.iter().find(|(words, _)| said.iter().any(|line| line.contains(words)));
        let see = refused.filter(|_| self.is_pinned).map_or(String::new(), |(_, see)| format!("; {see}"));
        let error = Error::new(format!("Failed to talk to the hub at {}: {why}{see}", self.server)).with_tail(said);
        // anything else may be gone another time
        if refused.is_some() { error } else { error.transient() }
    }
}
