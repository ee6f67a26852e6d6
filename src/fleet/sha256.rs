//! SHA-256, by coreutils, as 64 hexadecimal digits.

use std::path::Path;

use crate::error::{Error, Result};
use crate::program::Program;

/// Of a file.
pub fn of_file(file: &Path) -> Result<String> {
    compute(Program::new("sha256sum").arg("--").arg(file), None)
}

/// Of these bytes.
pub fn of(contents: &[u8]) -> Result<String> {
    compute(Program::new("sha256sum"), Some(contents))
}

/// Whether a text can be one.
pub fn is_one(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn compute(program: Program, input: Option<&[u8]>) -> Result<String> {
    let said = program.output(|| "compute a SHA-256".into(), input)?;
    let said = String::from_utf8_lossy(&said);
    let digits = said.split(' ').next().filter(|digits| is_one(digits));
    digits.map(str::to_owned).ok_or_else(|| Error::new("Failed to compute a SHA-256: sha256sum said none"))
}
