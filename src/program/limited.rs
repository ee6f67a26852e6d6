//! A program that has an end: by itself, or at a limit, with all that it leaves behind.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{Pid, pipe2};

use crate::error::{Context, Error, Result};
use crate::program::exited::Exited;
use crate::program::{Hearer, LINE_BYTES, Program, TAIL_LINES};
use crate::text;

/// How long a program may tidy up after it was asked to end, and how long its end may take.
const GRACE: Duration = Duration::from_secs(10);

/// How often a silent program is looked after.
const TICK: Duration = Duration::from_millis(200);

/// The same for one that is about to end.
const ENDING_TICK: Duration = Duration::from_millis(2);

/// How long what a program has left behind is listened to.
const ECHO: Duration = Duration::from_secs(1);

impl Program {
    /// Runs the program to its end, or until `limit` has passed, which is an error; `doing` completes
    /// "Failed to". What it leaves behind in its process group is ended, too. Its own failure is no error
    /// yet: see [`Exited::success`].
    pub fn run(self, limit: Duration, doing: impl Fn() -> String) -> Result<Exited> {
        self.run_within(limit, &doing)
    }

    fn run_within(mut self, limit: Duration, doing: &dyn Fn() -> String) -> Result<Exited> {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC).context(doing)?;
        let mut reader = File::from(reader);
        let errors = writer.try_clone().context(doing)?;
        let deadline = Instant::now() + limit;
        let child = self.command.stdout(writer).stderr(errors).process_group(0).spawn();
        // our ends of the pipe would keep it open
        self.command = Command::new("");
        let mut child = child.context(|| format!("run {}", self.name))?;
        let mut tail = Tail { watched: self.watched, quiet: self.quiet, heard: self.heard.take(), ..Tail::default() };
        let mut ended = None;
        loop {
            let heard = tail.follow(&mut reader).context(doing)?;
            if ended.is_none() {
                ended = child.try_wait().context(doing)?.map(|status| (status, Instant::now()));
            }
            match (heard, ended) {
                (Some(1..), Some((_, since))) if since.elapsed() < ECHO => {}
                (_, Some((status, _))) => {
                    end(&mut child);
                    let lines = tail.finish();
                    return Ok(Exited { status, tail: lines, seen: tail.seen, doing: doing(), reason: self.reason });
                }
                (Some(0), None) => std::thread::sleep(ENDING_TICK),
                _ => {}
            }
            if ended.is_none() && Instant::now() >= deadline {
                end(&mut child);
                let message = format!("Failed to {}: timed out after {} s", doing(), limit.as_secs());
                return Err(Error::new(message).with_tail(tail.finish()));
            }
        }
    }
}

/// Ends what there is of a program and its children, first politely.
fn end(child: &mut Child) {
    let Ok(group) = child.id().try_into().map(Pid::from_raw) else { return };
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        let deadline = Instant::now() + GRACE;
        let mut there = killpg(group, signal).is_ok();
        while there && Instant::now() < deadline {
            std::thread::sleep(ENDING_TICK);
            // one that nobody has waited for still counts
            let _ = child.try_wait();
            there = killpg(group, None).is_ok();
        }
    }
    let _ = child.wait();
}

/// The last lines of an output.
#[derive(Default)]
struct Tail {
    lines: VecDeque<String>,
    partial: Vec<u8>,
    watched: &'static [&'static str],
    quiet: bool,
    heard: Option<Hearer>,
    seen: Vec<String>,
}

impl Tail {
    /// Waits a moment for output and passes it on; returns how many bytes that were, 0 at its end, or nothing if none came.
    fn follow(&mut self, reader: &mut File) -> io::Result<Option<usize>> {
        let timeout = PollTimeout::try_from(TICK).unwrap_or(PollTimeout::ZERO);
        let mut ready = [PollFd::new(reader.as_fd(), PollFlags::POLLIN)];
        match poll(&mut ready, timeout) {
            Ok(0) | Err(nix::errno::Errno::EINTR) => return Ok(None),
            Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
        let mut buffer = [0; 8192];
        let count = reader.read(&mut buffer)?;
        for &byte in &buffer[..count] {
            if byte == b'\n' {
                self.end_line();
            } else if self.partial.len() < LINE_BYTES {
                self.partial.push(byte);
            }
        }
        Ok(Some(count))
    }

    fn end_line(&mut self) {
        if self.lines.len() == TAIL_LINES {
            self.lines.pop_front();
        }
        // ssh ends its lines as for a terminal
        let line = text::line(String::from_utf8_lossy(&self.partial).trim_end_matches('\r'));
        if let Some(heard) = &mut self.heard {
            heard(&line);
        }
        if !self.quiet {
            log::info!("{line}");
        }
        if self.seen.len() < TAIL_LINES && self.watched.iter().any(|words| line.contains(words)) {
            self.seen.push(line.clone());
        }
        self.lines.push_back(line);
        self.partial.clear();
    }

    fn finish(&mut self) -> Vec<String> {
        if !self.partial.is_empty() {
            self.end_line();
        }
        std::mem::take(&mut self.lines).into()
    }
}
