//! Nix's own files on a disk that is read-only, as the kernel makes one that has errors. A Nix daemon that cannot write them
//! takes itself for a client: it asks itself, in one process more each time, until none can be made any more.

use std::fs;
use std::path::Path;

use crate::error::{Context, Error, Result};

const STATE: &str = "/nix/var/nix";
const MOUNTS: &str = "/proc/self/mountinfo";

/// Fails if they are.
pub fn check() -> Result<()> {
    let mounts = fs::read_to_string(MOUNTS).doing("read", Path::new(MOUNTS))?;
    if !is_read_only(&mounts, Path::new(STATE)) {
        return Ok(());
    }
    Err(Error::new(format!("Failed to use Nix: the disk of {STATE} is read-only; remount it")).transient())
}

/// Whether all of the disk is on which a place lies; in a sandbox, what is mounted there is in any case.
fn is_read_only(mounts: &str, place: &Path) -> bool {
    let read = |line: &str| {
        // behind the dash: its type, its name, and the options of the disk
        let (mount, disk) = line.split_once(" - ")?;
        let at = mount.split(' ').nth(4).filter(|at| place.starts_with(at))?;
        Some((at.len(), disk.split(' ').nth(2)?.split(',').next() == Some("ro")))
    };
    mounts.lines().filter_map(read).max_by_key(|(length, _)| *length).is_some_and(|(_, is_read_only)| is_read_only)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_disk_that_counts_and_the_last_that_was_mounted() {
        let mounts = "\
            30 1 0:26 / / rw - ext4 /dev/sda ro\n\
            31 30 0:27 / /nix ro,nosuid shared:1 - btrfs /dev/sdb rw,subvol=/nix\n\
            32 31 0:27 / /nix/store ro - btrfs /dev/sdb rw\n\
            33 30 0:28 / /home rw - tmpfs tmpfs rw\n\
            34 33 0:29 / /home rw - tmpfs tmpfs ro,size=1k\n";
        let of = |place| is_read_only(mounts, Path::new(place));
        assert!(of("/etc") && of("/nixos") && of("/home/x") && !of("/nix/var/nix") && !of("/nix/store/x"));
        assert!(!is_read_only("", Path::new("/")));
    }
}
