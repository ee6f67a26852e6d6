//! What the configurations evaluate to, building that, and updating their inputs.
//!
//! What is evaluated and built is always an unpacked archive, so it is what the host will get. What a
//! flake evaluated to is remembered for as long as the archive and the arguments are the same.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Context, Result};
use crate::fleet::hub::repository::{FleetRepository, Host, Packed, label};
use crate::git::lockfile::LockFile;
use crate::names::{HostName, StorePath};
use crate::nix::cache::Cache;
use crate::nix::{Source, nix, updated_lock_file};
use crate::program::Program;
use crate::{files, json};

/// What asks for the names of a flake's hosts, and for a system: its derivation and its path.
const NAMES: &str = "builtins.attrNames";
const SYSTEM: &str = "system: { derivation = system.drvPath; toplevel = system.outPath; }";

/// What a configuration evaluates to.
#[derive(Deserialize)]
pub struct System {
    derivation: StorePath,
    /// The system's path, built or not.
    pub toplevel: StorePath,
}

/// What a question came to.
#[derive(Deserialize, Serialize)]
struct Remembered {
    question: Vec<String>,
    answer: Value,
}

impl FleetRepository {
    /// The hosts of a flake.
    pub(super) fn names_in(&self, source: &Packed) -> Result<Vec<HostName>> {
        let names = self.ask(source, &label(&source.place), "", NAMES, false, |directory, nix| {
            // what would change in the lock file says nothing of names
            nix.args(["--no-write-lock-file", &format!("path:{}#nixosConfigurations", directory.display())])
        })?;
        json::from_value(&names).context(|| format!("find the hosts of {}", source.place))
    }

    /// The same, as they were when they were looked at last.
    pub(super) fn names_known(&self, place: &str) -> Option<Vec<HostName>> {
        let known: Remembered = files::read_json(&self.answer(&label(place))).ok()??;
        json::from_value(&known.answer).ok()
    }

    /// Evaluates a host's configuration.
    pub fn evaluate(&self, host: &Host) -> Result<System> {
        let attr = host.attr.as_deref();
        let ask = |again| -> Result<System> {
            let give = |directory: &Path, nix| Source::of(directory, attr).give(nix);
            let answer = self.ask(&host.source, &host.name, attr.unwrap_or_default(), SYSTEM, again, give)?;
            json::from_value(&answer).context(|| format!("evaluate {}", host.name))
        };
        let system = ask(false)?;
        // collected as garbage: nothing could be built
        if system.derivation.path().exists() || system.toplevel.path().exists() { Ok(system) } else { ask(true) }
    }

    /// Builds what a host's configuration evaluated to.
    pub fn build(&self, host: &Host, system: &System) -> Result<()> {
        if !system.derivation.path().exists() {
            return Ok(());
        }
        let link = self.state.join("systems").join(&host.name);
        files::tidy(&link);
        let build = nix().args(["build", "--print-build-logs"]).args(&self.flags).arg("--out-link").arg(link);
        self.within(build.arg(format!("{}^out", system.derivation)))
            .logged(|| format!("build {}", host.name), &self.log(&host.name))
            .map(drop)
    }

    /// The lock file of a flake with these inputs updated, or all if none are named.
    pub fn updated(&self, flake: &Packed, cache: &Cache, inputs: &[String], limit: Duration) -> Result<Option<Vec<u8>>> {
        self.with_unpacked(flake, "update", |directory| {
            let (flake, path) = (format!("path:{}", directory.display()), directory.join("flake.lock"));
            let old = files::if_there(fs::read(&path)).doing("read", &path)?;
            let new = updated_lock_file(cache, &flake, inputs, &directory.with_extension("lock"), limit)?;
            // of a machine that publishes, no input's author decides; of one that follows, whoever does is root anyway
            LockFile::parse(old.as_deref())?.check_no_new_file(&LockFile::parse(new.as_deref())?)?;
            Ok(new)
        })
    }

    fn within(&self, program: Program) -> Program {
        if let Some(limit) = self.limit { program.within(limit) } else { program }
    }

    /// Where the answer is that was got last for this name.
    fn answer(&self, name: &str) -> PathBuf {
        self.state.join("evaluated").join(format!("{name}.json"))
    }

    /// Evaluates `function` of what `give` has nix evaluate, which is of `attr`, and keeps what nix says as the log `name`.
    fn ask(
        &self,
        source: &Packed,
        name: &str,
        attr: &str,
        function: &str,
        again: bool,
        give: impl Fn(&Path, Program) -> Program,
    ) -> Result<Value> {
        let file = self.answer(name);
        let question = [&[source.sha256.to_string(), attr.to_owned(), function.to_owned()], &self.flags[..]].concat();
        // of these arguments, the same may mean something else tomorrow
        let lasting = source.is_flake && !self.flags.iter().any(|flag| flag == "--impure" || flag.starts_with("--override-"));
        let known: Option<Remembered> = files::read_json(&file).ok().flatten().filter(|_| lasting && !again);
        if let Some(known) = known.filter(|known| known.question == question) {
            return Ok(known.answer);
        }
        let log = self.log(name);
        files::remove(&log).doing("remove", &log)?;
        let answer = self.with_unpacked(source, name, |directory| {
            let eval = nix().args(["eval", "--json", "--option", "eval-cache", "false"]).args(&self.flags).args(["--apply", function]);
            self.within(give(directory, eval)).logged(|| format!("evaluate {}", source.place), &log)
        })?;
        let answer = json::parse(&answer).context(|| format!("evaluate {}", source.place))?;
        let answer = Remembered { question, answer };
        if lasting {
            files::write_json(&file, &answer, 0o644)?;
        }
        Ok(answer.answer)
    }
}
