//! The boot loader: has it boot a system once, which leaves alone what it boots by default.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::sys::stat::{major, minor};
use nix::sys::statfs::{BTRFS_SUPER_MAGIC, FsType, statfs};
use serde_json::Value;

use crate::config::LoaderKind;
use crate::error::{Context, Result};
use crate::program::Program;

/// What systemd-boot says of itself: four bytes of attributes, then the features, lowest byte first.
const FEATURES: &str = "/sys/firmware/efi/efivars/LoaderFeatures-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f";
/// The feature of booting an entry once.
const ONE_SHOT: u8 = 1 << 3;
/// Where NixOS has GRUB's files.
const GRUB: &str = "/boot/grub";
const CONFIG: &str = "/boot/grub/grub.cfg";
const ENVIRONMENT: &str = "/boot/grub/grubenv";
/// The only defaults in a configuration that boots an entry once: that one, and NixOS' own.
const DEFAULTS: [&str; 2] = ["set default=\"${next_entry}\"", "set default="];
const ZFS_SUPER_MAGIC: FsType = FsType(0x2fc1_2fc1);

/// A boot loader that can.
pub struct BootLoader(LoaderKind);

impl BootLoader {
    /// The boot loader of this machine; none if it cannot boot a system once, or what booted this machine cannot.
    pub fn of(kind: Option<LoaderKind>) -> Option<Self> {
        let kind = kind?;
        let can = match kind {
            LoaderKind::SystemdBoot => {
                fs::read(FEATURES).is_ok_and(|variable| variable.get(4).is_some_and(|features| features & ONE_SHOT != 0))
            }
            LoaderKind::Grub => is_writable_to_grub(Path::new(GRUB)) && fs::read_to_string(CONFIG).is_ok_and(|config| boots_once(&config)),
        };
        can.then_some(Self(kind))
    }

    /// Has the next boot, and no other, be that of this system. Fails if the boot loader has no entry for it, or boots
    /// it anyway.
    pub fn boot_once(&self, system: &Path) -> Result<()> {
        self.forget()?;
        let doing = || format!("have {} booted once", system.display());
        match self.0 {
            LoaderKind::SystemdBoot => {
                let list = bootctl(&["list", "--json=short"])?;
                let list = serde_json::from_slice(&list).context(doing)?;
                bootctl(&["set-oneshot", &entry_of_systemd(&list, system).context(doing)?]).map(drop)
            }
            LoaderKind::Grub => {
                let config = fs::read_to_string(CONFIG).context(|| format!("read {CONFIG}"))?;
                let entry = entry_of_grub(&config, system).context(doing)?;
                grub_editenv(&["set", &format!("next_entry={entry}")])
            }
        }
    }

    /// Has the next boot be an ordinary one.
    pub fn forget(&self) -> Result<()> {
        match self.0 {
            LoaderKind::SystemdBoot => bootctl(&["set-oneshot", ""]).map(drop),
            LoaderKind::Grub => grub_editenv(&["unset", "next_entry"]),
        }
    }
}

fn bootctl(arguments: &[&str]) -> Result<Vec<u8>> {
    let program = Program::as_root("bootctl").keep_env("SYSTEMD_ESP_PATH").keep_env("SYSTEMD_XBOOTLDR_PATH").args(arguments);
    program.output(|| format!("have bootctl {}", arguments[0]), None)
}

fn grub_editenv(arguments: &[&str]) -> Result<()> {
    let program = Program::as_root("grub-editenv").arg(ENVIRONMENT).args(arguments);
    program.output(|| format!("change {ENVIRONMENT}"), None).map(drop)
}

/// The entry, in the list of `bootctl`, that boots a system.
fn entry_of_systemd(list: &Value, system: &Path) -> Result<String, &'static str> {
    let entries = list.as_array().map(Vec::as_slice).unwrap_or_default();
    let entry = entries.iter().find(|entry| entry["options"].as_str().is_some_and(|options| boots(options, system)));
    match entry.map(|entry| (entry["isDefault"].as_bool(), entry["id"].as_str())) {
        Some((Some(true), _)) => Err("it is what is booted by default"),
        Some((_, Some(id))) => Ok(id.into()),
        _ => Err("the boot loader has no entry for it"),
    }
}

/// The entry of a `grub.cfg` that boots a system: the titles of the submenus that lead to it, and its own.
fn entry_of_grub(config: &str, system: &Path) -> Result<String, &'static str> {
    if !boots_once(config) {
        return Err("grub.cfg boots no entry once");
    }
    let mut open: Vec<String> = Vec::new();
    for line in config.lines().map(str::trim) {
        if line.ends_with('{') {
            let title = line.split('"').nth(1).filter(|_| line.starts_with("submenu ") || line.starts_with("menuentry "));
            // one that separates no titles
            open.push(title.unwrap_or_default().replace('>', ">>"));
        } else if line == "}" {
            open.pop();
        } else if boots(line, system) {
            return if open.len() > 1 { Ok(open.join(">")) } else { Err("it is what is booted by default") };
        }
    }
    Err("the boot loader has no entry for it")
}

/// Whether a kernel's command line is that of a system.
fn boots(line: &str, system: &Path) -> bool {
    let mut words = line.split_ascii_whitespace().filter_map(|word| word.strip_prefix("init="));
    words.any(|init| Path::new(init) == system.join("init"))
}

/// Whether a `grub.cfg` takes note of the entry to boot once, lets nothing else override it, and lets everybody boot it.
fn boots_once(config: &str) -> bool {
    let [once, any] = DEFAULTS;
    config.contains(once) && config.matches(any).count() == DEFAULTS.len() && !config.contains("set superusers=")
}

/// Whether GRUB itself can write there: else what is to be booted once would be booted for ever.
fn is_writable_to_grub(directory: &Path) -> bool {
    let keeps_sums = |kind| kind == BTRFS_SUPER_MAGIC || kind == ZFS_SUPER_MAGIC;
    if !statfs(directory).is_ok_and(|status| !keeps_sums(status.filesystem_type())) {
        return false;
    }
    let Ok(device) = fs::metadata(directory).map(|metadata| metadata.dev()) else { return false };
    // what the kernel makes of others: LVM, RAID, encryption
    let device = fs::canonicalize(format!("/sys/dev/block/{}:{}", major(device), minor(device)));
    !device.is_ok_and(|device| device.starts_with("/sys/devices/virtual/block"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_found_by_what_it_boots() {
        let list = serde_json::json!([
            { "id": "nixos-generation-2.conf", "options": "init=/nix/store/b/init quiet", "isDefault": false },
            { "id": "nixos-generation-1.conf", "options": "init=/nix/store/a/init quiet", "isDefault": true },
            { "id": "auto-reboot-to-firmware-setup" },
        ]);
        let entry = |system: &str| entry_of_systemd(&list, Path::new(system));
        assert_eq!(entry("/nix/store/b").unwrap(), "nixos-generation-2.conf");
        assert!(entry("/nix/store/a").is_err() && entry("/nix/store/c").is_err());
    }
}
