//! One session with a hub, by SFTP.
//!
//! Requests that need nothing of each other's answers are sent together: a hub far away costs few round trips.

mod packet;
mod transport;

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use crate::config::Hub;
use crate::error::{Context, Error, Result};
use crate::files;
use crate::fleet::LARGE;
use crate::fleet::place::Place;
use crate::fleet::sftp::packet::{CHUNK, Code, Packet, Reply};
use crate::fleet::sftp::transport::Transport;

/// How many chunks are under way at once, at most.
const AT_ONCE: u64 = 64;
/// How many names a directory may have.
const NAMES: usize = 100_000;

/// A session under way.
pub struct Session {
    transport: Transport,
    /// The directory that paths begin at, if it is not the server's; ends with `/`.
    directory: String,
    /// What was asked for ahead of its use; `None` is not there.
    ahead: Vec<(String, Option<Vec<u8>>)>,
}

impl Session {
    /// Connects to the first of the hub's servers that answers. `identity` is the private key,
    /// `directory` one for scratch files; the whole session may take `limit`. Small files that will be asked for are
    /// named in `ahead`, and cost no round trips of their own.
    pub fn open(hub: &Hub, identity: &Path, directory: &Path, limit: Duration, ahead: &[&str]) -> Result<Self> {
        let mut failed = None;
        for server in &hub.servers {
            let opened = Transport::to(hub, server, identity, directory, limit);
            let opened = opened.map(|transport| Self { transport, directory: String::new(), ahead: Vec::new() });
            match opened.and_then(|mut session| session.look_ahead(ahead).map(|()| session)) {
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

    /// Connects to `server`, an `sftp://` without a path, as this user's own configuration of ssh says. Paths begin at
    /// `path` there, if it is not empty.
    pub fn open_as_configured(server: &str, path: &str, directory: &Path, limit: Duration) -> Result<Self> {
        let transport = Transport::as_configured(server, directory, limit)?;
        Ok(Self { transport, directory: if path.is_empty() { String::new() } else { format!("{path}/") }, ahead: Vec::new() })
    }

    /// Greets the server, and asks for small files.
    fn look_ahead(&mut self, names: &[&str]) -> Result<()> {
        let opened = self.transport.ask_all(names.iter().map(|name| Packet::open(&self.path(name))).collect())?;
        let (mut reads, mut closes, mut open) = (Vec::new(), Vec::new(), Vec::new());
        for (name, opened) in names.iter().zip(opened) {
            match opened {
                Reply::Handle(handle) => {
                    reads.extend([Packet::read(&handle, 0), Packet::read(&handle, CHUNK.into())]);
                    closes.push(Packet::close(&handle));
                    open.push(*name);
                }
                Reply::Code(Code::NOT_FOUND) => self.ahead.push(((*name).into(), None)),
                // who needs it will see why
                _ => {}
            }
        }
        if open.is_empty() {
            return Ok(());
        }
        let mut answers = self.transport.ask_all(reads)?.into_iter();
        for close in closes {
            self.transport.later(close);
        }
        for name in open {
            if let (Some(Reply::Data(data)), Some(Reply::Code(Code::END))) = (answers.next(), answers.next()) {
                self.ahead.push((name.into(), Some(data)));
            }
        }
        Ok(())
    }

    /// Fetches all of a file, with its time. Returns whether there is one, as [`Place::get`] does.
    pub fn fetch(&mut self, remote: &str, local: &Path) -> Result<bool> {
        files::clear(local).doing("remove", local)?;
        // of one that is too large, the beginning says as much
        let Some(handle) = self.receive(remote, local, LARGE)? else { return Ok(false) };
        let modified = match self.transport.ask_all(vec![Packet::attributes(&handle), Packet::close(&handle)])?.swap_remove(0) {
            Reply::Modified(modified) => SystemTime::UNIX_EPOCH + Duration::from_secs(modified.into()),
            other => return Err(self.refused("look at", remote, &other)),
        };
        let file = File::options().append(true).open(local);
        file.and_then(|file| file.set_modified(modified)).doing("write", local)?;
        Ok(true)
    }

    /// Appends what a file has beyond the length of the local one, until that has `limit` bytes. Returns the open file
    /// there, if there is one.
    fn receive(&mut self, remote: &str, local: &Path, limit: u64) -> Result<Option<Vec<u8>>> {
        let handle = match self.transport.ask(Packet::open(&self.path(remote)))? {
            Reply::Handle(handle) => handle,
            Reply::Code(Code::NOT_FOUND) => return Ok(None),
            other => return Err(self.refused("open", remote, &other)),
        };
        let mut file = File::options().append(true).create(true).open(local).doing("write", local)?;
        let mut size = file.metadata().doing("write", local)?.len();
        // most files are small
        let mut count = 2;
        loop {
            let (from, mut is_whole, mut is_end) = (size, true, false);
            let reads = (0..count).map(|number| Packet::read(&handle, from + number * u64::from(CHUNK)));
            for answer in self.transport.ask_all(reads.collect())? {
                match answer {
                    // what follows one that is short is asked for again
                    Reply::Data(data) if is_whole => {
                        let written = io::copy(&mut data.take(limit.saturating_sub(size)), &mut file).or_else(|error| {
                            // a disk that is full of it would not hold what is to be said of that
                            files::clear(local).and(Err(error)).doing("write", local)
                        })?;
                        size += written;
                        is_whole = written == u64::from(CHUNK);
                    }
                    Reply::Data(_) => {}
                    Reply::Code(Code::END) => is_end = true,
                    other => return Err(self.refused("read", remote, &other)),
                }
            }
            if is_end || size == from || size >= limit {
                return Ok(Some(handle));
            }
            count = AT_ONCE.min(2 * count);
        }
    }

    /// Sends a file, onto the hub's disk.
    pub fn send(&mut self, local: &Path, remote: &str) -> Result<()> {
        self.write(local, remote, true)
    }

    fn write(&mut self, local: &Path, remote: &str, sync: bool) -> Result<()> {
        let mut file = File::open(local).doing("read", local)?;
        let mode = file.metadata().doing("read", local)?.permissions().mode() & 0o777;
        let handle = self.opened("create", remote, Packet::create(&self.path(remote), mode))?;
        let (mut offset, mut is_end) = (0, false);
        while !is_end {
            let mut requests = Vec::new();
            for _ in 0..AT_ONCE {
                let mut chunk = Vec::new();
                (&mut file).take(CHUNK.into()).read_to_end(&mut chunk).doing("read", local)?;
                is_end = chunk.len() < usize::from(CHUNK);
                requests.push(Packet::write(&handle, offset, &chunk));
                offset += chunk.len() as u64;
                if is_end {
                    break;
                }
            }
            if is_end {
                requests.extend(sync.then(|| Packet::sync(&handle)));
                requests.push(Packet::close(&handle));
            }
            for answer in self.transport.ask_all(requests)? {
                self.succeeded("write", remote, &answer)?;
            }
        }
        Ok(())
    }

    /// The names in a directory, in their order, but for those that begin with a dot.
    pub fn list(&mut self, remote: &str) -> Result<Vec<String>> {
        let handle = self.opened("list", remote, Packet::open_directory(&self.path(remote)))?;
        let mut names = Vec::new();
        loop {
            match self.transport.ask(Packet::read_directory(&handle))? {
                Reply::Names(more) => names.extend(more.into_iter().filter(|name| !name.starts_with('.'))),
                Reply::Code(Code::END) => break,
                other => return Err(self.refused("list", remote, &other)),
            }
            if names.len() > NAMES {
                return Err(self.error("list", remote, &format!("it has more than {NAMES} files")));
            }
        }
        self.transport.later(Packet::close(&handle));
        names.sort();
        Ok(names)
    }

    /// Gives a file a second name. Returns whether nothing had that.
    pub fn link(&mut self, remote: &str, name: &str) -> Result<bool> {
        match self.transport.ask(Packet::link(&self.path(remote), &self.path(name)))? {
            Reply::Code(Code::FAILURE) => Ok(false),
            answer => self.succeeded("create", name, &answer).map(|()| true),
        }
    }

    /// Gives a file another name, which it takes from what had that before.
    pub fn rename(&mut self, remote: &str, name: &str) -> Result<()> {
        let answer = self.transport.ask(Packet::rename(&self.path(remote), &self.path(name)))?;
        self.succeeded("rename", remote, &answer)
    }

    /// Removes a file.
    pub fn remove(&mut self, remote: &str) -> Result<()> {
        let answer = self.transport.ask(Packet::remove(&self.path(remote)))?;
        self.succeeded("remove", remote, &answer)
    }

    /// Ends the session.
    pub fn close(self) -> Result<()> {
        self.transport.close()
    }

    fn path(&self, remote: &str) -> String {
        format!("{}{remote}", self.directory)
    }

    fn opened(&mut self, verb: &str, remote: &str, request: Packet) -> Result<Vec<u8>> {
        match self.transport.ask(request)? {
            Reply::Handle(handle) => Ok(handle),
            other => Err(self.refused(verb, remote, &other)),
        }
    }

    fn succeeded(&self, verb: &str, remote: &str, answer: &Reply) -> Result<()> {
        if *answer == Reply::Code(Code::OK) { Ok(()) } else { Err(self.refused(verb, remote, answer)) }
    }

    fn refused(&self, verb: &str, remote: &str, answer: &Reply) -> Error {
        let why = if let Reply::Code(status) = answer { status.text() } else { Code::UNEXPECTED };
        self.error(verb, remote, why)
    }

    fn error(&self, verb: &str, remote: &str, why: &str) -> Error {
        Error::new(format!("Failed to {verb} {remote} at the hub {}: {why}", self.transport.server))
    }
}

impl Place for Session {
    fn get(&mut self, remote: &str, local: &Path, limit: u64) -> Result<bool> {
        if let Some(known) = self.ahead.iter().position(|(name, _)| name == remote) {
            let (_, data) = self.ahead.swap_remove(known);
            let written = data.as_ref().map_or(Ok(()), |data| fs::write(local, data));
            return written.doing("write", local).map(|()| data.is_some());
        }
        let handle = self.receive(remote, local, limit + 1)?;
        let found = handle.map(|handle| self.transport.later(Packet::close(&handle))).is_some();
        if found && local.metadata().is_ok_and(|metadata| metadata.len() > limit) {
            files::clear(local).doing("remove", local)?;
            return Err(self.error("read", remote, &format!("it has more than {limit} bytes")));
        }
        Ok(found)
    }

    fn put(&mut self, local: &Path, remote: &str) -> Result<()> {
        let new = format!("{remote}.new");
        self.write(local, &new, false)?;
        self.rename(&new, remote)
    }
}
