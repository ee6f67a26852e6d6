//! Whether a fast-forward would have a way back, before anything is built for it.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::{AccessFlags, access, geteuid};

use crate::error::{Context, Result};
use crate::git::savepoint::Savepoint;
use crate::git::savepoint::cut_off::Changed;

impl Savepoint {
    /// Fails if this user may not move the branch, or if there would be no way back.
    pub fn check(&self, branch: &str, files: &[Changed]) -> Result<()> {
        let refuse = |path: &Path, why: &str| Err(format!("{}: {why}", path.display())).doing("save files to", &self.directory);
        let explain = |path: &Path, error| match error {
            Errno::EPERM => refuse(path, "it is immutable; remove that by chattr -i"),
            error => refuse(path, error.desc()),
        };
        let may = |path: &Path, needed| access(path, needed).or_else(|error| explain(path, error));
        let enter = AccessFlags::W_OK | AccessFlags::X_OK;
        let reflog = Path::new("logs").join(branch);
        for path in ["HEAD".as_ref(), branch.as_ref(), "logs/HEAD".as_ref(), reflog.as_path()].map(|path| self.git_directory.join(path)) {
            may(path.ancestors().skip(1).find(|place| place.is_dir()).unwrap_or(&self.git_directory), enter)?;
            if (path.ends_with("logs/HEAD") || path.ends_with(&reflog)) && path.exists() {
                may(&path, AccessFlags::W_OK)?;
            }
        }
        let mounted = mount(&self.git_directory);
        for file in files {
            let path = self.top.join(&file.path);
            let place = path.ancestors().skip(1).find(|place| place.is_dir()).unwrap_or(&self.top);
            may(place, enter)?;
            let Some(there) = fs::symlink_metadata(&path).ok().filter(|_| file.before) else { continue };
            // those that the kernel lets us make links of
            let writable = if there.is_file() { access(&path, AccessFlags::R_OK | AccessFlags::W_OK) } else { Err(Errno::EACCES) };
            match writable {
                Err(error) if error == Errno::EPERM || there.uid() != geteuid().as_raw() => explain(&path, error)?,
                _ => {}
            }
            let there = mount(&path).zip(mount(place)).map(|((_, mount), (device, _))| (device, mount));
            if there.is_some() && there != mounted {
                refuse(&path, &format!("it is on another file system or mount than {}; have both on one", self.git_directory.display()))?;
            }
        }
        Ok(())
    }
}

/// The device and the mount that a path is on: there are no links from one to another. That of a file on an overlay says nothing.
fn mount(path: &Path) -> Option<(u64, String)> {
    let file = File::options().read(true).custom_flags((OFlag::O_PATH | OFlag::O_NOFOLLOW).bits()).open(path).ok()?;
    // "pos: ...", "flags: ...", "mnt_id: ..."
    let about = fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd())).ok()?;
    Some((file.metadata().ok()?.dev(), about.lines().nth(2)?.into()))
}
