//! A system for a machine that cannot, or cannot yet, fetch it by itself: copied there and activated over
//! SSH, as a user whom this one may log in as.

use std::path::Path;
use std::time::Duration;

use crate::error::{Context, Result};
use crate::nix::nix;
use crate::program::Program;
use crate::text::consists_of;

/// How long to copy, and to activate, may take.
const LIMIT: Duration = Duration::from_secs(3600);
/// By systemd, so that a connection that the switch cuts does not end the switch.
const SCRIPT: &str = "\
sudo=; [ $(id -u) = 0 ] || sudo=sudo
$sudo systemd-run --quiet --collect --wait --pipe --service-type=exec --setenv=PATH=\"$PATH\" $(command -v sh) -c";
/// What has been refused, or has broken off, is not what is booted; some unit may fail, and some systems wait for a boot.
/// For systemd `$$` is `$`.
const ACTIVATE: &str = "\
$$2/bin/switch-to-configuration test; status=$$?
case $$1:$$status in switch:0|switch:4|switch:100)
  nix-env --profile /nix/var/nix/profiles/system --set $$2 && $$2/bin/switch-to-configuration boot || exit;;
esac
exit $$status";

/// Fails unless `target` can be one, as in `root@web`.
pub fn check(target: &str) -> Result<()> {
    let well = consists_of(target, b"@._-:[]%") && !target.is_empty() && !target.starts_with('-');
    well.then_some(()).ok_or_else(|| format!("expected [user@]host, found {target:?}")).context(|| "understand --target".into())
}

/// Has `target` run a system of this store; `action` is `test` or `switch`.
pub fn push(system: &Path, action: &str, target: &str) -> Result<()> {
    let copy = nix().args(["copy", "--no-check-sigs", "--to", &format!("ssh://{target}")]).arg(system);
    copy.run(LIMIT, || format!("copy {} to {target}", system.display()))?.success()?;
    let line = format!("set -eu; {SCRIPT} '{ACTIVATE}' sh {action} {}", system.display());
    Program::new("ssh").args(["--", target, &line]).run(LIMIT, || format!("activate {} at {target}", system.display()))?.success()
}
