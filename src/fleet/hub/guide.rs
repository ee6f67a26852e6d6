//! What people begin with: a new repository, and a new host.

use std::fs;
use std::path::Path;

use crate::error::{Context, Result};
use crate::files;
use crate::fleet::hub::served::ServedDirectory;
use crate::fleet::hub::settings::Settings;
use crate::names::HostName;
use crate::program::Program;
use crate::system::host_name;

const README: &str = r#"# The fleet

Each directory of `hosts` is a NixOS configuration: a `flake.nix` with one or more `nixosConfigurations`, or a
`configuration.nix`. From here to the first host:

1. Make the key that releases are signed with, for whoever publishes; keep a copy of it in a safe place:

       ssh-keygen -t ed25519 -N "" -C signer -f ~/.ssh/ekiben-signer

   and name it in `fleet.json`: `"signingKey": "~/.ssh/ekiben-signer"`.

2. Have a machine be the hub, by its NixOS configuration, with Ekiben's module. If it is this machine:

       services.ekiben.hub = { enable = true; user = "alice"; };

   If it is another one, give it the public key that you log in with, and `fleet.json` its address:
   `"directory": "sftp://ekiben-publisher@hub.example.org"`; then log in once with `sftp`, and check its host key.

       services.ekiben.hub = { enable = true; publishers = [ "ssh-ed25519 ..." ]; };

3. For each host, `ekiben fleet bootstrap NAME` says what to do there, on the hub, and here.

From then on, `ekiben fleet deploy` publishes what has changed, and `ekiben fleet status` shows how the hosts are.
"#;

/// Makes a repository, or what one lacks; returns what there is to say of that. Nothing that is there is changed.
pub fn init(directory: &Path) -> Result<String> {
    let hosts = directory.join("hosts");
    fs::create_dir_all(&hosts).doing("create", &hosts)?;
    let settings = serde_json::to_string_pretty(&Settings::default()).context(|| "write fleet.json".into())? + "\n";
    let mut made = String::new();
    let mut next = "";
    for (name, text) in [("hosts/.gitkeep", ""), ("README.md", README), ("fleet.json", &settings)] {
        let path = directory.join(name);
        if path.symlink_metadata().is_ok() {
            continue;
        }
        // a part of it would never become the whole
        files::write(&path, text.as_bytes(), 0o644).doing("write", &path)?;
        made.extend(["Created ", &path.to_string_lossy(), ".\n"]);
        if name == "README.md" {
            next = "README.md says how to go on to the first host.\n";
        }
    }
    Ok(made + next)
}

/// What to do on a new host, on the hub, which may be this machine, and in the repository, which is at `place`.
pub fn bootstrap(settings: &Settings, hub: &ServedDirectory, place: Option<&Path>, host: &str) -> Result<String> {
    let host = HostName::try_from(host).context(|| "accept the host name".into())?;
    let signer = settings.signing_key.as_ref().map(|private| {
        let public = format!("{}.pub", private.display());
        fs::read_to_string(&public).map_or(format!("... (the contents of {public})"), |text| bare(&text))
    });
    let signers = signer.map_or(String::new(), |signer| format!("\n      signers = [ \"{signer}\" ];"));
    let (address, port, key) = hub.elsewhere().map_or_else(
        || {
            let key = fs::read_to_string("/etc/ssh/ssh_host_ed25519_key.pub").ok().map(|text| bare(&text));
            (host_name(), "22".into(), key)
        },
        |elsewhere| known_server(elsewhere.server()),
    );
    let key = key.unwrap_or_else(|| "ssh-ed25519 ... (the hub's /etc/ssh/ssh_host_ed25519_key.pub)".into());
    let port = if port == "22" { String::new() } else { format!("\n        port = {port};") };
    let is_plain = place
        .map(|place| place.join("hosts").join(&host))
        .is_some_and(|place| place.join("configuration.nix").exists() && !place.join("flake.nix").exists());
    let (import, update, by_hand) = if is_plain {
        let import = "configuration.nix imports:\n\n  imports = [ ./fleet.nix ];";
        (import.to_owned(), String::new(), "-I nixos-config=$PWD/configuration.nix".to_owned())
    } else {
        let modules = "modules = [ ./configuration.nix ./fleet.nix ekiben.nixosModules.default ];";
        let import = format!("flake.nix has for nixosConfigurations.{host}:\n\n  {modules}");
        (import, format!("  ekiben fleet flake-update {host}\n"), format!("--flake .#{host}"))
    };
    Ok(format!(
        r#"1. On {host}, as root, make the key by which the hub knows it:

  ssh-keygen -t ed25519 -N "" -C {host} -f /root/ekiben-identity
  cat /root/ekiben-identity.pub

2. On the hub, add that line to the NixOS configuration, and switch to it:

  services.ekiben.hub.hosts.{host}.publicKey = "ssh-ed25519 ...";

3. In the fleet's repository, put into hosts/{host}/ the configuration of
   {host}: what it has in /etc/nixos, Ekiben's module, and this as fleet.nix:

  {{
    services.ekiben.fleet = {{
      enable = true;
      name = "{host}";
      identityFile = "/root/ekiben-identity";
      hub = {{
        host = "{address}";  # as {host} reaches it{port}
        hostKey = "{key}";
      }};{signers}
    }};
  }}

   which {import}

4. Publish it, and have {host} run it, over SSH, the last time by hand:

{update}  ekiben fleet deploy {host}
  ekiben fleet build switch {host} --target root@{host}

   or, in a copy of hosts/{host} there:

  nixos-rebuild switch {by_hand}

5. From then on it fetches what is published. To see it do so, as root on
   {host}:

  ekiben trigger --wait fleet
"#
    ))
}

/// A public key without its comment.
fn bare(key: &str) -> String {
    key.split_whitespace().take(2).collect::<Vec<_>>().join(" ")
}

/// Address and port of a server, and its host key, as this user's own ssh knows them.
fn known_server(server: &str) -> (String, String, Option<String>) {
    let ask =
        |program: &str, arguments: &[&str]| Program::new(program).args(arguments).said(|| format!("ask {program}")).unwrap_or_default();
    let said = ask("ssh", &["-G", &server.replacen("sftp:", "ssh:", 1)]);
    let setting = |name: &str| said.lines().find_map(|line| Some(line.split_once(' ').filter(|(key, _)| *key == name)?.1.to_owned()));
    let (address, port) = (setting("hostname").unwrap_or_else(|| "...".into()), setting("port").unwrap_or_else(|| "22".into()));
    let known = ask("ssh-keygen", &["-F", &if port == "22" { address.clone() } else { format!("[{address}]:{port}") }]);
    let key = known.lines().find_map(|line| line.split_once(' ').map(|(_, key)| key).filter(|key| key.starts_with("ssh-ed25519 ")));
    (address, port, key.map(bare))
}
