//! A program that is asked and answers.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};

use crate::error::{Context, Error, Result};
use crate::program::exited::describe;
use crate::program::{LINE_BYTES, Program};

/// A program that is asked and answers.
pub struct Conversation {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Program {
    /// Starts the program for a conversation; its errors go to a file.
    pub fn talk(mut self, errors: File) -> Result<Conversation> {
        let child = self.command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(errors).spawn();
        let mut child = child.context(|| format!("run {}", self.name))?;
        match (child.stdin.take(), child.stdout.take()) {
            (Some(input), Some(output)) => Ok(Conversation { child, input, output: BufReader::new(output) }),
            _ => Err(Error::new(format!("Failed to talk to {}", self.name))),
        }
    }
}

impl Conversation {
    /// Says some bytes.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.input.write_all(bytes)
    }

    /// Waits for as many bytes as there is room for.
    pub fn read(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        self.output.read_exact(bytes)
    }

    /// Says a line.
    pub fn say(&mut self, line: &str) -> io::Result<()> {
        writeln!(self.input, "{line}")
    }

    /// Says a line and waits for the answer; another one is an error.
    pub fn ask(&mut self, line: &str, expected: &str) -> io::Result<()> {
        self.say(line)?;
        let mut answer = String::new();
        (&mut self.output).take(LINE_BYTES as u64).read_line(&mut answer)?;
        if answer.trim_end() == expected { Ok(()) } else { Err(io::Error::other(format!("expected {expected:?}, found {answer:?}"))) }
    }

    /// Ends the conversation; an exit status other than 0 is an error.
    pub fn end(self) -> io::Result<()> {
        let Self { mut child, input, .. } = self;
        drop(input);
        let status = child.wait()?;
        if status.success() { Ok(()) } else { Err(io::Error::other(describe(status))) }
    }
}
