//! SHA-256, by coreutils, as 64 hexadecimal digits.

use std::path::Path;

use crate::error::{Context, Result};
use crate::names::Sha256;
use crate::program::Program;

/// Of a file.
pub fn of_file(file: &Path) -> Result<Sha256> {
    compute(Program::new("sha256sum").arg("--").arg(file), None)
}

/// Of these bytes.
pub fn of(contents: &[u8]) -> Result<Sha256> {
    compute(Program::new("sha256sum"), Some(contents))
}

fn compute(program: Program, input: Option<&[u8]>) -> Result<Sha256> {
    let said = program.output(|| "compute a SHA-256".into(), input)?;
    let said = String::from_utf8_lossy(&said);
    // a backslash before it: the file's name has been escaped
    let digits = said.trim_start_matches('\\').split(' ').next().unwrap_or_default();
    Sha256::try_from(digits).context(|| "compute a SHA-256".into())
}
