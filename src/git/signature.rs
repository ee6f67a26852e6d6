//! Who has signed a commit: what a repository that others write to is worth.

use std::fs;
use std::path::Path;

use crate::error::{Context, Error, Result};
use crate::git::Repository;

impl Repository {
    /// Fails unless one of `signers`, which are SSH public keys, has signed the commit as `git commit -S` does. The
    /// settings of the repository and of its user do not count. `scratch` is a directory to write to.
    pub fn check_signed(&self, commit: &str, signers: &[String], scratch: &Path) -> Result<()> {
        let allowed = scratch.join("signers");
        let lines: Vec<_> = signers.iter().map(|key| format!("signer {key}\n")).collect();
        fs::write(&allowed, lines.concat()).context(|| format!("write {}", allowed.display()))?;
        let settings = [
            &format!("gpg.ssh.allowedSignersFile={}", allowed.display()),
            "gpg.ssh.program=ssh-keygen",
            // signatures of other kinds are those of other keys
            "gpg.program=false",
            "gpg.openpgp.program=false",
            "gpg.x509.program=false",
        ];
        let log = self.git().args(settings.iter().flat_map(|setting| ["-c", setting])).env("GIT_NO_REPLACE_OBJECTS", "1");
        let log = log.args(["log", "-1", "--format=%G?", commit, "--"]);
        // as in the section PRETTY FORMATS of git-log(1)
        let what = match log.output(|| format!("verify the signature of {commit}"), None)?.trim_ascii() {
            b"G" => return Ok(()),
            b"N" => "it is not signed",
            _ => "it is signed by none of `signers`",
        };
        Err(Error::new(format!("Failed to accept {commit}: {what}; sign it, or a later commit, by git commit -S with one of these keys")))
    }
}
