//! What people begin with: a new repository, and a new host.

use std::fs;
use std::path::Path;

use crate::error::{Context, Result};
use crate::fleet::hub::settings::Settings;
use crate::names::host_name;

const README: &str = "\
Each directory of `hosts` is a NixOS configuration: a `flake.nix` with one or more `nixosConfigurations`, or a
`configuration.nix`. `ekiben fleet deploy` publishes what has changed; `ekiben fleet status` shows the state of the hosts.
";

/// Makes a repository, or what one lacks; returns what was made. Nothing that is there is changed.
pub fn init(directory: &Path) -> Result<Vec<String>> {
    let hosts = directory.join("hosts");
    fs::create_dir_all(&hosts).context(|| format!("create {}", hosts.display()))?;
    let settings = serde_json::to_string_pretty(&Settings::default()).context(|| "write fleet.json".into())? + "\n";
    let mut made = Vec::new();
    for (name, text) in [("hosts/.gitkeep", ""), ("README.md", README), ("fleet.json", &settings)] {
        let path = directory.join(name);
        let made_it = fs::File::create_new(&path).and_then(|mut file| std::io::Write::write_all(&mut file, text.as_bytes()));
        match made_it {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => continue,
            other => other.context(|| format!("write {}", path.display()))?,
        }
        made.push(path.display().to_string());
    }
    Ok(made)
}

/// What to do on a new host, and on the hub, which may be this machine.
pub fn bootstrap(settings: &Settings, hub_is_elsewhere: bool, host: &str) -> Result<String> {
    host_name(host).context(|| "accept the host name".into())?;
    let key = |path: &Path| {
        let text = fs::read_to_string(path).ok()?;
        // without its comment
        Some(text.split_whitespace().take(2).collect::<Vec<_>>().join(" "))
    };
    let host_key = (!hub_is_elsewhere).then(|| key(Path::new("/etc/ssh/ssh_host_ed25519_key.pub"))).flatten();
    let host_key = host_key.unwrap_or_else(|| "ssh-ed25519 ... (the hub's /etc/ssh/ssh_host_ed25519_key.pub)".into());
    let signer = settings.signing_key.as_ref().map(|private| {
        let public = format!("{}.pub", private.display());
        key(Path::new(&public)).unwrap_or_else(|| format!("... ({public})"))
    });
    let signers = signer.map_or(String::new(), |signer| format!("\n    signers = [ \"{signer}\" ];"));
    Ok(format!(
        r#"1. On {host}, as root, make the key by which the hub knows it:

  ssh-keygen -t ed25519 -N "" -C {host} -f /root/ekiben-identity

2. On the hub, add the contents of /root/ekiben-identity.pub to the NixOS configuration, and switch to that:

  services.ekiben.hub.hosts.{host}.publicKey = "ssh-ed25519 ...";

3. In the fleet's repository, put the configuration of {host} into hosts/{host}/, with Ekiben's module and with

  services.ekiben.fleet = {{
    enable = true;
    name = "{host}";
    identityFile = "/root/ekiben-identity";
    hub = {{
      host = "...";  # the hub's name or address
      hostKey = "{host_key}";
    }};{signers}
  }};

   and publish it:

  ekiben fleet deploy {host}

4. On {host}, switch to the same configuration, the last time by hand; then it fetches what is published:

  nixos-rebuild switch --flake .#{host}
  systemctl start ekiben-fleet
"#
    ))
}
