//! Counts the instructions that looking up a token takes, and fails unless they are the same number
//! for all wrong tokens, whichever right one they are like and however much of it; and for all right ones.
//!
//! usage: cargo run --release --manifest-path ci/constant-time/Cargo.toml
//!
//! The counts are those of valgrind, which runs this program again: exact, and no clock in them. The
//! code is that of `src/webhook/token.rs`, and of an optimised build.

#![allow(dead_code)]

#[path = "../../../src/error.rs"]
mod error;
#[path = "../../../src/text.rs"]
mod text;
#[path = "../../../src/webhook/token.rs"]
mod token;

mod config {
    /// As much of it as a token needs.
    pub struct Project {
        pub instance: String,
        pub token_file: std::path::PathBuf,
        pub extra_token_files: Vec<std::path::PathBuf>,
    }
}

use std::collections::BTreeMap;
use std::error::Error;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::{env, fs};

use crate::config::Project;
use crate::token::Tokens;

/// Of each project's token, which is as long as one may be: a comparison that ends early may still
/// look at many bytes at once.
const CHARACTERS: [&str; 3] = ["a", "A", "0"];
const LENGTH: usize = 256;

/// Something that a stranger might send.
struct Candidate {
    text: String,
    right: bool,
    description: String,
}

fn main() -> Result<ExitCode, Box<dyn Error>> {
    if let Some(directory) = env::args_os().nth(1) {
        look_all_up(Path::new(&directory))?;
        return Ok(ExitCode::SUCCESS);
    }
    let directory = env::temp_dir().join(format!("constant-time-{}", std::process::id()));
    fs::create_dir(&directory)?;
    let counts = count(&directory);
    fs::remove_dir_all(&directory)?;

    let mut by_count: BTreeMap<(bool, u64), Vec<Candidate>> = BTreeMap::new();
    for (candidate, count) in candidates().into_iter().zip(counts?) {
        by_count.entry((candidate.right, count)).or_default().push(candidate);
    }
    for ((right, count), candidates) in &by_count {
        let kind = if *right { "right" } else { "wrong" };
        println!("{count} instructions for {} {kind} tokens, as with {}", candidates.len(), candidates[0].description);
    }
    // one number for the wrong ones, one for the right ones
    Ok(if by_count.len() == 2 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Tokens of one length: each project's own, and those that begin or end like it.
fn candidates() -> Vec<Candidate> {
    let mut candidates = Vec::new();
    for (project, character) in CHARACTERS.iter().enumerate() {
        for same in (0..=LENGTH).step_by(8) {
            let (like, other) = (character.repeat(same), "x".repeat(LENGTH - same));
            for (text, end) in [(format!("{like}{other}"), "first"), (format!("{other}{like}"), "last")] {
                let description = format!("the {end} {same} characters of project {project}");
                candidates.push(Candidate { text, right: same == LENGTH, description });
            }
        }
    }
    candidates
}

/// Runs this program under valgrind, which writes a file for each look-up.
fn count(directory: &Path) -> Result<Vec<u64>, Box<dyn Error>> {
    for (project, character) in CHARACTERS.iter().enumerate() {
        fs::write(directory.join(format!("token-{project}")), character.repeat(LENGTH))?;
    }
    let counts = directory.join("counts");
    let valgrind = Command::new("valgrind")
        .args(["--tool=callgrind", "--quiet", "--toggle-collect=*look_up", "--dump-after=*look_up"])
        .arg(format!("--callgrind-out-file={}", counts.display()))
        .args([env::current_exe()?.as_path(), directory])
        .status()?;
    if !valgrind.success() {
        return Err(format!("valgrind: {valgrind}").into());
    }
    let read = |number| -> Result<u64, Box<dyn Error>> {
        let text = fs::read_to_string(format!("{}.{number}", counts.display()))?;
        let total = text.lines().find_map(|line| line.strip_prefix("totals: ")).ok_or("valgrind counted nothing")?;
        Ok(total.parse()?)
    };
    (1..=candidates().len()).map(read).collect()
}

/// What runs under valgrind.
fn look_all_up(directory: &Path) -> Result<(), Box<dyn Error>> {
    let project = |name: String| Project { instance: name, token_file: PathBuf::new(), extra_token_files: Vec::new() };
    let projects = (0..CHARACTERS.len()).map(|name| (name.to_string(), project(name.to_string()))).collect();
    let tokens = Tokens::read(directory, &projects);
    for candidate in candidates() {
        black_box(look_up(&tokens, black_box(candidate.text.as_bytes())));
    }
    Ok(())
}

/// What valgrind looks for by this name.
#[inline(never)]
fn look_up<'a>(tokens: &'a Tokens, candidate: &[u8]) -> Option<(&'a str, &'a str)> {
    tokens.project(candidate)
}
