//! What `module.nix` asks for: the configuration file, typed and checked.
//!
//! Its keys are the module's option names. Nothing unknown is accepted, so a [`Config`] that was
//! read is one that the rest of the program can rely on: names are safe in file and unit names,
//! paths and inputs are safe as arguments and in flake references.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Result};
use crate::json;
use crate::names::{Account, FilePath, HostName, Mode};
use crate::text::consists_of;

/// Where the module puts the file.
pub const DEFAULT: &str = "/etc/ekiben/config.json";
/// What units of Ekiben's own are called, behind `ekiben-`. The module reads this list, too.
const RESERVED: &str = include_str!("reserved-names");

/// The whole file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Config {
    /// The webhook, if this machine has one.
    pub webhook: Option<Webhook>,
    /// The hub that this machine is, if it is one.
    pub hub: Option<Offers>,
    /// What boots this machine, where it may be able to boot a system once.
    pub boot_loader: Option<LoaderKind>,
    /// What this machine deploys, by name.
    #[serde(default)]
    pub instances: BTreeMap<String, Instance>,
}

/// The listener.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Webhook {
    /// The only path of a URL that is answered.
    pub path: String,
    /// Whose tokens start what, by the token's credential name.
    pub projects: BTreeMap<String, Project>,
}

/// One bearer of a token.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Project {
    /// The instance that its token starts.
    pub instance: String,
    /// Where systemd reads the token.
    pub token_file: PathBuf,
    /// Where it reads more of them.
    pub extra_token_files: Vec<PathBuf>,
}

/// What the hub has for single hosts.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Offers {
    /// The hub's directory.
    pub directory: PathBuf,
    /// The files of each host, by their paths there.
    pub files: BTreeMap<HostName, BTreeMap<FilePath, Offer>>,
}

/// One file of one host.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Offer {
    /// Where it is on the hub.
    pub source: PathBuf,
    /// Its permissions on the host.
    pub mode: Mode,
    /// Its owner there.
    pub owner: Account,
    /// Its group there.
    pub group: Account,
}

/// One thing this machine deploys.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Instance {
    /// Where releases come from; `None` if this machine's administrator commits to the repository.
    pub hub: Option<Hub>,
    /// Where what is in the repository goes to; `None` if it is this machine that runs it.
    pub publish: Option<Publish>,
    /// The repository.
    pub flake_path: PathBuf,
    /// The flake in it, and the name of the configuration.
    pub flake_ref: FlakeRef,
    /// Whose repository it is; evaluates and builds.
    pub user: String,
    /// The inputs to update; all if empty, none at all if `None`.
    pub inputs: Option<Vec<String>>,
    /// Activate at once, or with the next boot.
    #[serde(default)]
    pub operation: Operation,
    /// Build here, or wait until it has been built elsewhere.
    #[serde(default)]
    pub build: Build,
    /// More arguments for `nix build`.
    pub flags: Vec<String>,
    /// Start from the upstream of the branch.
    pub pull: bool,
    /// The SSH public keys of which one must have signed what is deployed; none if anybody's commits are.
    #[serde(default)]
    pub signers: Vec<String>,
    /// Send the lock commit to the upstream of the branch.
    pub push: bool,
    /// Author of the lock commit.
    pub author: Author,
    /// What tells whether a new system does its work.
    pub health_checks: BTreeMap<String, HealthCheck>,
    /// What a unit that fails in the switch, and had not failed before, leads to.
    #[serde(default)]
    pub on_unit_failure: OnUnitFailure,
    /// Whether to go back to the old system when the new one is not well.
    pub rollback: bool,
    /// For how many seconds after a switch it is looked whether it is.
    #[serde(default)]
    pub observe: u64,
    /// How often fetching is tried again when the network fails.
    pub network_retries: u32,
    /// What the stages may take.
    pub timeouts: Timeouts,
    /// Whether, and when, it may have the machine rebooted.
    #[serde(default)]
    pub reboot: Reboot,
}

/// A policy for reboots.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Reboot {
    /// Whether at all.
    #[serde(default)]
    pub when: When,
    /// The time of day for it; none if that does not matter.
    pub window: Option<Window>,
    /// Do without the firmware where that works.
    pub kexec: bool,
}

/// When to do what not everybody wants.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum When {
    /// Never.
    #[default]
    Never,
    /// When it is needed.
    Needed,
}

/// A time of day, between two times like `01:00`; midnight may lie between them.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Window {
    /// The beginning.
    pub lower: String,
    /// The end.
    pub upper: String,
}

/// The hub of a fleet that this machine belongs to.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Hub {
    /// This machine's name in the fleet.
    pub name: HostName,
    /// Where the hub is: the next one is asked where one does not answer.
    pub servers: Vec<Server>,
    /// Where releases are fetched from instead, by HTTPS.
    pub url: Option<String>,
    /// Where reports are sent to, if there are no servers.
    pub reports_url: Option<String>,
    /// Public keys, as in `authorized_keys`: a release must be signed by one of them, if there are any.
    pub signers: Vec<String>,
    /// More options for ssh, as in `ssh_config`.
    pub ssh_options: Vec<String>,
    /// Whether to update inputs also where the hub has nothing new.
    pub self_update: bool,
    /// Below these directories, and nowhere else, the hub may put files.
    #[serde(default)]
    pub file_directories: Vec<PathBuf>,
}

/// A fleet's repository, of which the hub on this machine publishes all hosts.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Publish {
    /// What the hub serves.
    pub directory: PathBuf,
    /// How many hosts are built at once.
    pub parallel: NonZeroUsize,
    /// Which hosts get a release first, and which later.
    #[serde(default)]
    pub waves: Vec<Wave>,
}

/// Hosts of a fleet that get their releases at the same time.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Wave {
    /// Their names, those of groups behind an `@`, and `*` for all that are in no earlier wave.
    pub hosts: Vec<String>,
    /// For how many seconds they have to be healthy before the next wave begins.
    pub soak: u64,
    /// How many of them may fail.
    pub may_fail: usize,
    /// Whether those hold it up that are silent.
    pub wait_for_silent: bool,
}

/// One address of a hub.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Server {
    /// Name or address.
    pub host: String,
    /// Of its sshd.
    pub port: u16,
    /// Whom to log in as.
    pub user: String,
    /// Its public key, as in `known_hosts` without the names.
    pub host_key: String,
}

/// A command that has to succeed, or units that have to be active, or both.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct HealthCheck {
    /// For the shell, as root.
    pub command: Option<String>,
    /// By their full names.
    pub units: Vec<String>,
    /// Seconds for one attempt.
    pub timeout: u64,
    /// Attempts after the first.
    pub retries: u32,
    /// Whether it asks something of another machine, which may fail by itself.
    #[serde(default)]
    pub remote: bool,
}

/// What to do about a unit that fails.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum OnUnitFailure {
    /// Go back to the old system.
    #[default]
    Rollback,
    /// Keep the new one, with a warning.
    Keep,
}

/// Limits in seconds.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Timeouts {
    /// For fetching all inputs.
    pub prepare: u64,
    /// For evaluating and building.
    pub build: u64,
    /// For one activation, of the new system or of the old one.
    pub activate: u64,
}

/// What to do with a new generation, in `nixos-rebuild`'s words.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Operation {
    /// Activate it and make it the default of the boot loader.
    #[default]
    Switch,
    /// Only make it the default of the boot loader.
    Boot,
}

/// Where systems are built.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Build {
    /// On this machine, or on those that its Nix knows.
    #[default]
    Local,
    /// Elsewhere: they are fetched from substituters.
    Substitute,
}

/// A flake in a repository on this machine and one of its NixOS configurations, as in
/// `/etc/nixos?dir=hosts#web`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct FlakeRef {
    /// The directory before the first `?` or `#`.
    pub directory: PathBuf,
    /// Parameters for Nix, like `submodules=1`, each as written; never `dir`, `rev` or `ref`.
    pub parameters: Vec<String>,
    /// The attribute of `nixosConfigurations`.
    pub configuration: String,
    text: String,
}

/// A name and a mail address.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Author {
    /// The part before ` <`.
    pub name: String,
    /// The part between `<` and `>`.
    pub mail: String,
}

/// A boot loader that may be able to boot a system once.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LoaderKind {
    /// By an EFI variable.
    SystemdBoot,
    /// By its environment block.
    Grub,
}

impl Config {
    /// Reads and checks the file; an error names it, and the key that is wrong.
    pub fn read(path: &Path) -> Result<Self> {
        let text = match fs::read_to_string(path) {
            Err(error) if error.kind() == ErrorKind::NotFound && path == Path::new(DEFAULT) => {
                return Err("it is not there; enable services.ekiben on this machine").doing("read", path);
            }
            found => found.doing("read", path)?,
        };
        Self::parse(&text).doing("read", path)
    }

    /// Checks the file's text; an error names the key that is wrong.
    pub fn parse(text: &str) -> Result<Self, String> {
        let config: Self = json::parse(text.as_bytes()).map_err(|error| error.to_string())?;
        config.check()?;
        Ok(config)
    }

    /// The instance of that name.
    pub fn instance(&self, name: &str) -> Result<&Instance> {
        self.instances.get(name).ok_or_else(|| {
            let known: Vec<_> = self.instances.keys().map(String::as_str).collect();
            let known = if known.is_empty() { "no instances".into() } else { known.join(", ") };
            Error::new(format!("Failed to find instance {name:?}: this machine has {known}"))
        })
    }

    fn check(&self) -> Result<(), String> {
        for (name, instance) in &self.instances {
            instance_name(name).map_err(|what| format!("instances: {what}"))?;
            instance.check().map_err(|what| format!("instances.{name}.{what}"))?;
        }
        if let Some(webhook) = &self.webhook {
            if !is_url_path(&webhook.path) {
                return Err(format!("webhook.path: expected a path like /ekiben, found {:?}", webhook.path));
            }
            for (name, project) in &webhook.projects {
                file_name(name).map_err(|what| format!("webhook.projects: {what}"))?;
                if !self.instances.contains_key(&project.instance) {
                    return Err(format!("webhook.projects.{name}.instance: no instance {:?}", project.instance));
                }
            }
        }
        Ok(())
    }
}

impl Instance {
    fn check(&self) -> Result<(), String> {
        absolute(&self.flake_path).map_err(|what| format!("flakePath: {what}"))?;
        if !self.flake_ref.directory.starts_with(&self.flake_path) {
            return Err(format!("flakeRef: expected a flake in flakePath {}", self.flake_path.display()));
        }
        if let Some(hub) = &self.hub {
            hub.check().map_err(|what| format!("hub.{what}"))?;
        }
        if let Some(publish) = &self.publish {
            absolute(&publish.directory).map_err(|what| format!("publish.directory: {what}"))?;
            if self.hub.is_some() {
                return Err("publish: expected no hub beside it".into());
            }
        }
        if let Some(Window { lower, upper }) = &self.reboot.window {
            let is_time = |text: &str| matches!(text.as_bytes(), [b'0'..=b'2', b'0'..=b'9', b':', b'0'..=b'5', b'0'..=b'9']);
            if !is_time(lower) || !is_time(upper) {
                return Err(format!("reboot.window: expected times like 01:00, found {lower:?} and {upper:?}"));
            }
        }
        if self.user.is_empty() || self.user == "root" {
            return Err(format!("user: expected a user other than root, found {:?}", self.user));
        }
        if let Some(text) = self.signers.iter().find(|text| !is_line(text)) {
            return Err(format!("signers: expected SSH public keys of one line each, found {text:?}"));
        }
        match self.inputs.iter().flatten().find(|input| !is_input(input)) {
            Some(input) => Err(format!("inputs: expected names of flake inputs, found {input:?}")),
            None => Ok(()),
        }
    }
}

impl Hub {
    fn check(&self) -> Result<(), String> {
        if self.servers.is_empty() && self.url.is_none() {
            return Err("servers: expected at least one".into());
        }
        if self.url.is_some() && self.signers.is_empty() {
            return Err("signers: expected at least one with url".into());
        }
        let lines = self.signers.iter().chain(&self.ssh_options).chain(self.servers.iter().map(|server| &server.host_key));
        if let Some(text) = lines.into_iter().find(|text| !is_line(text)) {
            return Err(format!("signers, sshOptions, servers: expected one line each, found {text:?}"));
        }
        let plain = |text: &str| !text.is_empty() && !text.starts_with('-') && text.bytes().all(|byte| byte.is_ascii_graphic());
        let is_https = |url: &str| url.strip_prefix("https://").is_some_and(|rest| plain(rest) && !rest.contains(['@', '?', '#']));
        if let Some(url) = self.url.iter().chain(&self.reports_url).find(|url| !is_https(url)) {
            return Err(format!("url, reportsUrl: expected https://HOST[:PORT][/PATH], found {url:?}"));
        }
        match self.servers.iter().flat_map(|server| [&server.host, &server.user]).find(|text| !plain(text)) {
            Some(text) => Err(format!("servers: expected names of a host and a user, found {text:?}")),
            None => Ok(()),
        }
    }
}

fn is_line(text: &str) -> bool {
    !text.trim().is_empty() && !text.contains(['\n', '\0'])
}

impl TryFrom<String> for FlakeRef {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let expected = || format!("expected a reference like /etc/nixos#host, found {text:?}");
        let (reference, configuration) = text.split_once('#').ok_or_else(expected)?;
        let (path, query) = reference.split_once('?').unwrap_or((reference, ""));
        let path = path.strip_prefix("git+file://").or_else(|| path.strip_prefix("path:")).unwrap_or(path);
        let mut directory = PathBuf::from(path);
        let mut parameters = Vec::new();
        for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
            match parameter.split_once('=') {
                Some(("dir", below)) => directory.push(below),
                Some(("rev" | "ref" | "narHash", _)) | None => {
                    return Err(format!("expected no fixed revision, found {parameter:?}"));
                }
                Some(_) if consists_of(parameter, b"=_-./") => parameters.push(parameter.to_owned()),
                Some(_) => return Err(expected()),
            }
        }
        absolute(&directory)?;
        let configuration = configuration.trim_matches('"');
        if configuration.is_empty() || !consists_of(configuration, b"_-.") {
            return Err(expected());
        }
        Ok(Self { directory, parameters, configuration: configuration.to_owned(), text })
    }
}

impl From<FlakeRef> for String {
    fn from(reference: FlakeRef) -> Self {
        reference.text
    }
}

impl TryFrom<String> for Author {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let parts = text.strip_suffix('>').and_then(|rest| rest.split_once(" <"));
        match parts {
            Some((name, mail)) if !text.contains(['\n', '\0']) && !format!("{name}{mail}").contains(['<', '>']) => {
                Ok(Self { name: name.into(), mail: mail.into() })
            }
            _ => Err(format!("expected a name like \"ekiben <ekiben@host>\", found {text:?}")),
        }
    }
}

impl From<Author> for String {
    fn from(author: Author) -> Self {
        format!("{} <{}>", author.name, author.mail)
    }
}

/// Whether `name` can be an instance's: it becomes the name of files, of a git ref and, behind
/// `ekiben-`, of units. An accepted name has none of `/`, `.`, `%`, `@` and spaces, and no leading `-`.
pub fn instance_name(name: &str) -> Result<(), String> {
    file_name(name)?;
    if RESERVED.lines().any(|reserved| reserved == name) {
        Err(format!("the name {name} is taken by a unit of Ekiben's own"))
    } else {
        Ok(())
    }
}

fn file_name(name: &str) -> Result<(), String> {
    if name.is_empty() || name.len() > 64 || name.starts_with('-') || !consists_of(name, b"_-") {
        return Err(format!("expected a name of letters, digits, _ and -, found {name:?}"));
    }
    Ok(())
}

/// Whether `path` means the same in a flake reference, a unit file and an argument.
fn absolute(path: &Path) -> Result<(), String> {
    let text = path.to_str().unwrap_or_default();
    let tidy = !text.split('/').skip(1).any(|part| part.is_empty() || part == "." || part == "..");
    if text.starts_with('/') && consists_of(text, b"/._+-@") && tidy {
        return Ok(());
    }
    Err(format!("expected an absolute path of letters, digits and . _ + - @, found {text:?}"))
}

fn is_url_path(path: &str) -> bool {
    path.starts_with('/') && path.bytes().all(|byte| byte.is_ascii_graphic() && !b"?#\"\\%".contains(&byte))
}

/// Whether `input` can be the name of a flake's input, or of an input's input (`a/b`).
pub fn is_input(input: &str) -> bool {
    input.split('/').all(|part| part.starts_with(|first: char| first.is_ascii_alphabetic()) && consists_of(part, b"_-"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_instance_has_the_name_of_a_unit_of_our_own() {
        for name in ["files", "deliver", "webhook"] {
            assert!(instance_name(name).is_err(), "{name}");
        }
        assert_eq!(instance_name("web"), Ok(()));
    }

    #[test]
    fn what_the_hub_has_for_a_host_is_checked() {
        let config = |host: &str, path: &str| {
            let file = r#"{"source": "/a", "mode": "0400", "owner": "root", "group": "root"}"#;
            Config::parse(&format!(r#"{{"hub": {{"directory": "/srv", "files": {{"{host}": {{"{path}": {file}}}}}}}}}"#))
        };
        assert!(config("web", "/x").is_ok());
        assert!(config("..", "/x").is_err() && config("web", "/../x").unwrap_err().contains("hub.files"));
    }
}
