//! Who has signed a commit: what a repository that others write to is worth. The keys of those who may are told to
//! ssh-keygen here, also for what else they sign.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Context, Error, Result};
use crate::git::Repository;

/// Who signs, whichever of the keys it is.
pub const SIGNER: &str = "signer";

impl Repository {
    /// Fails unless one of `signers`, which are SSH public keys, has signed the commit as `git commit -S` does. The
    /// settings of the repository and of its user do not count. `scratch` is a directory to write to.
    pub fn check_signed(&self, commit: &str, signers: &[String], scratch: &Path) -> Result<()> {
        let allowed = allowed_signers(signers, scratch)?;
        let settings = [
            &format!("gpg.ssh.allowedSignersFile={}", allowed.display()),
            "gpg.ssh.program=ssh-keygen",
            "gpg.ssh.revocationFile=",
            // signatures of other kinds are those of other keys
            "gpg.program=false",
            "gpg.openpgp.program=false",
            "gpg.x509.program=false",
        ];
        let log = self.git().args(settings.iter().flat_map(|setting| ["-c", setting]));
        let log = log.args(["log", "-1", "--format=%G?", commit, "--"]);
        // as in the section PRETTY FORMATS of git-log(1)
        let what = match log.output(|| format!("verify the signature of {commit}"), None)?.trim_ascii() {
            b"G" => return Ok(()),
            b"N" => "it is not signed",
            _ => "it is signed by none of `signers`, or by one whose time is over",
        };
        Err(Error::new(format!("Failed to accept {commit}: {what}; sign it, or a later commit, by git commit -S with one of these keys")))
    }
}

/// A file in `scratch` with these SSH public keys, as in the section ALLOWED SIGNERS of ssh-keygen(1).
pub fn allowed_signers(keys: &[String], scratch: &Path) -> Result<PathBuf> {
    let file = scratch.join("signers");
    let lines: Vec<_> = keys.iter().map(|key| format!("{SIGNER} {key}\n")).collect();
    fs::write(&file, lines.concat()).doing("write", &file)?;
    Ok(file)
}
