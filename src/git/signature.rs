//! Who has signed something: a commit, which is what a repository is worth that others write to, or a release.

use std::fs;
use std::path::Path;

use crate::error::{Context, Error, Result};
use crate::git::{Repository, line};
use crate::program::Program;

/// Why a signature is not accepted; ssh-keygen says no more than that.
pub const BY_NONE: &str = "signed by none of `signers`, or by one whose time is over";
/// What git has commits signed for, as in the section of `gpg.format` of git-config(1).
const COMMIT: &str = "git";

impl Repository {
    /// Fails unless one of `signers`, which are SSH public keys, has signed the commit as `git commit -S` does. Not by
    /// git, which takes the commit's own word for when that was. `scratch` is a directory to write to.
    pub fn check_signed(&self, commit: &str, signers: &[String], scratch: &Path) -> Result<()> {
        let commit_object = self.git().args(["cat-file", "commit", commit]);
        let (content, signature) = split(&commit_object.output(|| format!("verify the signature of {commit}"), None)?);
        let what = if signature.is_empty() {
            "not signed"
        } else if is_signed(&content, &signature, COMMIT, signers, scratch)? {
            return Ok(());
        } else {
            BY_NONE
        };
        Err(Error::new(format!(
            "Failed to accept {commit}: it is {what}; sign it, or a later commit, by git commit -S with one of these keys"
        )))
    }
}

/// Whether one of `signers`, each as in the section ALLOWED SIGNERS of ssh-keygen(1) but without principals, has signed this
/// for `namespace`, and may do so now. `scratch` is a directory to write to.
pub fn is_signed(content: &[u8], signature: &[u8], namespace: &str, signers: &[String], scratch: &Path) -> Result<bool> {
    let [allowed, file] = ["signers", "signature"].map(|name| scratch.join(name));
    let lines: Vec<_> = signers.iter().map(|key| format!("* {key}\n")).collect();
    fs::write(&allowed, lines.concat()).doing("write", &allowed)?;
    fs::write(&file, signature).doing("write", &file)?;
    let ask = |question: &[&str], input| {
        let program = Program::new("ssh-keygen").arg("-Y").args(question).arg("-f").arg(&allowed).arg("-s").arg(&file);
        match program.output(|| "verify a signature".into(), input) {
            Err(error) if !error.to_string().contains("exited") => Err(error),
            answer => Ok(answer.ok().map(|answer| line(&answer))),
        }
    };
    // a key may be anybody's, a certificate is for those only whom it names
    let Some(names) = ask(&["find-principals"], None)? else { return Ok(false) };
    let name = names.lines().next().unwrap_or_default();
    Ok(ask(&["verify", "-n", namespace, "-I", name], Some(content))?.is_some())
}

/// What was signed of a commit, which is all else, and the signature, which is a header.
fn split(commit: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let (mut content, mut signature) = (Vec::new(), Vec::new());
    let (mut is_header, mut is_signature) = (true, false);
    for line in commit.split_inclusive(|byte| *byte == b'\n') {
        is_header &= line != b"\n";
        let part = line.strip_prefix(if is_signature { &b" "[..] } else { b"gpgsig " }).filter(|_| is_header);
        is_signature = part.is_some();
        if is_signature { &mut signature } else { &mut content }.extend(part.unwrap_or(line));
    }
    (content, signature)
}
