//! What makes a release one of this fleet's: it is named by its contents, and signed with the fleet's key if that has one.

use std::fs;
use std::path::Path;

use nix::unistd::{AccessFlags, access};

use crate::error::{Context, Result};
use crate::fleet::{Manifest, NAMESPACE, Signed, sha256};
use crate::names::{HostName, Sha256, StorePath};
use crate::program::Program;

/// What a release is called that consists of these.
pub fn id(archive: &Sha256, attr: Option<&HostName>, toplevel: Option<&StorePath>) -> Result<Sha256> {
    let content = format!("{archive} {} {}\n", attr.map_or("-", |attr| attr), toplevel.map_or("-", |toplevel| toplevel));
    sha256::of(content.as_bytes())
}

/// A manifest as it is published.
pub fn signed(manifest: &Manifest, key: Option<&Path>) -> Result<Signed> {
    let text = serde_json::to_string(manifest).context(|| format!("write the manifest of {}", manifest.host))?;
    let signature = key.map(|key| sign(&text, key)).transpose()?;
    Ok(Signed { manifest: text, signature })
}

/// Whether a release is one of the fleet with this key, or of one without; `scratch` is a directory to write to.
pub fn is_ours(manifest: &Manifest, signed: &Signed, key: Option<&Path>, scratch: &Path) -> Result<bool> {
    let is_named_so = id(&manifest.sha256, manifest.attr.as_ref(), manifest.toplevel.as_ref())? == manifest.release.id;
    Ok(is_named_so && is_signed_by(signed, key, &scratch.join(&manifest.host))?)
}

fn is_signed_by(signed: &Signed, key: Option<&Path>, scratch: &Path) -> Result<bool> {
    let (Some(key), Some(signature)) = (key, &signed.signature) else { return Ok(key.is_none() == signed.signature.is_none()) };
    let doing = || format!("read {}", key.display());
    // "256 SHA256:... comment (ED25519)"
    let known = Program::new("ssh-keygen").args(["-l", "-f"]).arg(key).said(doing)?;
    let print = known.split(' ').nth(1).filter(|print| print.starts_with("SHA256:"));
    let print = print.ok_or("unexpected output of ssh-keygen").context(doing)?;
    fs::write(scratch, signature).doing("write", scratch)?;
    let check = Program::new("ssh-keygen").args(["-Y", "check-novalidate", "-n", NAMESPACE, "-s"]).arg(scratch);
    let said = check.output(|| "check a signature".into(), Some(signed.manifest.as_bytes()));
    Ok(said.is_ok_and(|said| String::from_utf8_lossy(&said).trim_end().ends_with(&format!(" {print}"))))
}

/// Fails if nothing can be signed with a key, before anything is changed for what has to be signed; an agent may have one that
/// cannot be read.
pub fn check(key: &Path) -> Result<()> {
    if access(key, AccessFlags::R_OK).is_ok() { Ok(()) } else { sign("", key).map(drop) }
}

fn sign(text: &str, key: &Path) -> Result<String> {
    let doing = || format!("sign with {}", key.display());
    let sign = Program::new("ssh-keygen").args(["-Y", "sign", "-n", NAMESPACE, "-f"]).arg(key);
    sign.output(doing, Some(text.as_bytes())).map(|signature| String::from_utf8_lossy(&signature).into_owned())
}
