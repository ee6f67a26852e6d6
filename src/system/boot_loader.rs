//! The boot loader: has it boot a system once, which leaves alone what it boots by default.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::sys::stat::{major, minor};
use nix::sys::statfs::{BTRFS_SUPER_MAGIC, FsType, statfs};
use serde_json::Value;

use crate::config::LoaderKind;
use crate::error::{Context, Result};
use crate::json;
use crate::program::Program;

/// What systemd-boot says of itself: four bytes of attributes, then the features, lowest byte first.
const FEATURES: &str = "/sys/firmware/efi/efivars/LoaderFeatures-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f";
/// What systemd-boot is to boot once.
const ENTRY: &str = "/sys/firmware/efi/efivars/LoaderEntryOneShot-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f";
/// The feature of booting an entry once.
const ONE_SHOT: u8 = 1 << 3;
/// Where NixOS has GRUB's files.
const GRUB: &str = "/boot/grub";
const CONFIG: &str = "/boot/grub/grub.cfg";
const ENVIRONMENT: &str = "/boot/grub/grubenv";
/// The only defaults in a configuration that boots an entry once: that one, and NixOS' own.
const DEFAULTS: [&str; 2] = ["set default=\"${next_entry}\"", "set default="];
/// Why a system cannot be booted once.
const NO_ENTRY: &str = "the boot loader has no entry for it";
const DEFAULT: &str = "the boot loader boots it by default";
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
        let doing = || format!("boot {} once", system.display());
        match self.0 {
            LoaderKind::SystemdBoot => {
                let list = bootctl(&["list", "--json=short"], "list the entries of the boot loader")?;
                let list = json::parse(&list).context(doing)?;
                set_one_shot(&entry_of_systemd(&list, system).context(doing)?)
            }
            LoaderKind::Grub => {
                let config = fs::read_to_string(CONFIG).doing("read", Path::new(CONFIG))?;
                let entry = entry_of_grub(&config, system).context(doing)?;
                grub_editenv(&["set", &format!("next_entry={entry}")])
            }
        }
    }

    /// Whether a system is still to be booted once: the boot loader forgets it before it does so.
    pub fn is_armed(&self) -> bool {
        match self.0 {
            LoaderKind::SystemdBoot => fs::exists(ENTRY).unwrap_or_default(),
            LoaderKind::Grub => fs::read_to_string(ENVIRONMENT)
                .is_ok_and(|block| block.lines().any(|line| line.strip_prefix("next_entry=").is_some_and(|entry| !entry.is_empty()))),
        }
    }

    /// Has the next boot be an ordinary one.
    pub fn forget(&self) -> Result<()> {
        match self.0 {
            LoaderKind::SystemdBoot => set_one_shot(""),
            LoaderKind::Grub => grub_editenv(&["unset", "next_entry"]),
        }
    }
}

fn bootctl(arguments: &[&str], doing: &str) -> Result<Vec<u8>> {
    let program = Program::as_root("bootctl").keep_env("SYSTEMD_ESP_PATH").keep_env("SYSTEMD_XBOOTLDR_PATH").args(arguments);
    program.output(|| doing.into(), None)
}

/// None, if it is empty.
fn set_one_shot(entry: &str) -> Result<()> {
    bootctl(&["set-oneshot", entry], "set the boot loader's entry for one boot").map(drop)
}

fn grub_editenv(arguments: &[&str]) -> Result<()> {
    let program = Program::as_root("grub-editenv").arg(ENVIRONMENT).args(arguments);
    program.output(|| format!("change {ENVIRONMENT}"), None).map(drop)
}

/// The entry, in the list of `bootctl`, that boots a system; by default, another one must be booted.
fn entry_of_systemd(list: &Value, system: &Path) -> Result<String, &'static str> {
    let entries = list.as_array().map(Vec::as_slice).unwrap_or_default();
    let (its, others): (Vec<_>, Vec<_>) =
        entries.iter().partition(|entry| entry["options"].as_str().is_some_and(|options| boots(options, system)));
    let id = its.first().and_then(|entry| entry["id"].as_str()).ok_or(NO_ENTRY)?;
    // one may be left out since there are too many
    if others.iter().any(|entry| entry["isDefault"] == true) { Ok(id.into()) } else { Err(DEFAULT) }
}

/// The entry of a `grub.cfg` that boots a system: the titles of the submenus that lead to it, and its own.
fn entry_of_grub(config: &str, system: &Path) -> Result<String, &'static str> {
    if !boots_once(config) {
        return Err("grub.cfg cannot boot an entry once");
    }
    let mut path: Vec<String> = Vec::new();
    // how many entries each open menu has had
    let mut counts = vec![0];
    for line in config.lines().map(str::trim) {
        if line.ends_with('{') {
            let title = line.split('"').nth(1).filter(|_| line.starts_with("submenu ") || line.starts_with("menuentry "));
            path.push(match (title, counts.last_mut()) {
                (Some(title), Some(count)) => {
                    *count += 1;
                    // GRUB takes the first two of > and an escaped one for the escaped one
                    if title.starts_with('>') { (*count - 1).to_string() } else { title.replace('>', ">>") }
                }
                _ => String::new(),
            });
            counts.push(0);
        } else if line == "}" {
            path.pop();
            counts.truncate(path.len() + 1);
        } else if boots(line, system) {
            return if path.len() > 1 { Ok(path.join(">")) } else { Err(DEFAULT) };
        }
    }
    Err(NO_ENTRY)
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

    /// What NixOS' install-grub.pl writes where generation 42 is the default, as far as it matters.
    const GRUB_CFG: &str = r#"
    if [ "${next_entry}" ]; then
      set default="${next_entry}"
      set next_entry=
      save_env next_entry
      set boot_once=true
    else
      set default=0
    fi

    function savedefault {
        if [ -z "${boot_once}"]; then
        saved_entry="${chosen}"
        save_env saved_entry
        fi
    }

menuentry "NixOS" --class nixos --unrestricted {
search --set=drive1 --fs-uuid 58990438-98d9-42f9-8520-939c70b59428
  linux ($drive1)//kernels/b-linux-6.6-bzImage init=/nix/store/b-nixos-system/init loglevel=4
  initrd ($drive1)//kernels/b-linux-6.6-initrd
}

submenu "NixOS - All configurations" --class submenu {
menuentry "NixOS - Configuration 44 (2026-11-27 - 24.05.x)" --class nixos {
  linux ($drive1)//kernels/d-linux-6.6-bzImage init=/nix/store/d-nixos-system/init loglevel=4
}

submenu "> NixOS - Configuration 43 (2026-11-27 - 24.05.x)" --class submenu {
menuentry "NixOS - Configuration 43 - Default (2026-11-27 - 24.05.x)" --class nixos {
  linux ($drive1)//kernels/c-linux-6.6-bzImage init=/nix/store/c-nixos-system/init loglevel=4
}

menuentry "NixOS - Configuration 43 - a > b"  {
  linux ($drive1)//kernels/C-linux-6.6-bzImage init=/nix/store/C-nixos-system/init loglevel=4
}

}
menuentry "NixOS - Configuration 42 (2026-11-27 - 24.05.x)" --class nixos {
  linux ($drive1)//kernels/b-linux-6.6-bzImage init=/nix/store/b-nixos-system/init loglevel=4
}

}
submenu "NixOS - Profile 'other'" --class submenu {
menuentry "NixOS - Configuration 1 (2026-11-27 - 24.05.x)" --class nixos {
  multiboot ($drive1)//kernels/xen.gz
  module ($drive1)//kernels/o-linux-6.6-bzImage init=/nix/store/o-nixos-system/init loglevel=4
}

}
"#;

    fn in_grub(config: &str, system: &str) -> Result<String, &'static str> {
        entry_of_grub(config, &Path::new("/nix/store").join(system))
    }

    #[test]
    fn grub_finds_an_entry_by_the_menus_that_lead_there() {
        let all = "NixOS - All configurations";
        for (system, entry) in [
            ("d-nixos-system", format!("{all}>NixOS - Configuration 44 (2026-11-27 - 24.05.x)")),
            ("c-nixos-system", format!("{all}>1>NixOS - Configuration 43 - Default (2026-11-27 - 24.05.x)")),
            ("C-nixos-system", format!("{all}>1>NixOS - Configuration 43 - a >> b")),
            ("o-nixos-system", "NixOS - Profile 'other'>NixOS - Configuration 1 (2026-11-27 - 24.05.x)".into()),
        ] {
            assert_eq!(in_grub(GRUB_CFG, system), Ok(entry), "{system}");
        }
        assert_eq!(in_grub(GRUB_CFG, "b-nixos-system"), Err(DEFAULT));
        for other in ["e-nixos-system", "nixos-system", "d-nixos-system-2"] {
            assert_eq!(in_grub(GRUB_CFG, other), Err(NO_ENTRY), "{other}");
        }
    }

    #[test]
    fn grub_boots_once_only_what_nothing_overrides_and_nobody_is_asked_about() {
        assert!(boots_once(GRUB_CFG) && boots_once(&GRUB_CFG.replace("default=0", "default=\"${saved_entry}\"")));
        for (old, new) in [
            ("set default=\"${next_entry}\"", ""),
            ("\nmenuentry \"NixOS\"", "\nset default=2\nmenuentry \"NixOS\""),
            ("\nmenuentry \"NixOS\"", "\nset superusers=\"root\"\nmenuentry \"NixOS\""),
        ] {
            let config = GRUB_CFG.replacen(old, new, 1);
            assert!(config != GRUB_CFG && !boots_once(&config) && in_grub(&config, "d-nixos-system").is_err(), "{new}");
        }
    }

    #[test]
    fn systemd_boot_finds_an_entry_by_what_it_boots() {
        let list = |default: &str| {
            let entry = |id: &str, system: &str| {
                serde_json::json!({
                    "type": "type1", "id": id, "path": format!("/boot/loader/entries/{}", id.replace(".conf", "+2-1.conf")),
                    "options": format!("init=/nix/store/{system}-nixos-system/init loglevel=4"), "isDefault": id == default,
                })
            };
            serde_json::json!([
                entry("nixos-generation-43.conf", "c"),
                entry("nixos-generation-43-specialisation-big.conf", "C"),
                entry("nixos-5f1c.conf", "b"),
                { "type": "auto", "id": "auto-reboot-to-firmware-setup", "isDefault": false },
            ])
        };
        let find = |default: &str, system: &str| entry_of_systemd(&list(default), Path::new(system));
        assert_eq!(find("nixos-5f1c.conf", "/nix/store/c-nixos-system"), Ok("nixos-generation-43.conf".into()));
        assert_eq!(find("nixos-generation-43.conf", "/nix/store/b-nixos-system"), Ok("nixos-5f1c.conf".into()));
        assert_eq!(find("nixos-5f1c.conf", "/nix/store/b-nixos-system"), Err(DEFAULT));
        assert_eq!(find("nixos-5f1c.conf", "/nix/store/a-nixos-system"), Err(NO_ENTRY));
        // the entry that was the default is gone
        assert_eq!(find("nixos-generation-42.conf", "/nix/store/c-nixos-system"), Err(DEFAULT));
    }
}
