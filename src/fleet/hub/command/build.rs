//! Building hosts, publishing them, and trying one out.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

use nix::unistd::geteuid;
use serde_json::{Value, json};

use crate::error::{Context, OrLog, Result};
use crate::fleet::Provenance;
use crate::fleet::hub::command::{Fleet, exit};
use crate::fleet::hub::holds::Holds;
use crate::fleet::hub::jobs::parallel;
use crate::fleet::hub::memory::Memory;
use crate::fleet::hub::plan::Plan;
use crate::fleet::hub::publish::{self, Manner, Placed};
use crate::fleet::hub::repository::select;
use crate::fleet::hub::rollout::{self, Rollout};
use crate::fleet::hub::{collect, lost, push, signing};
use crate::fleet::temporary::Temporary;
use crate::gather::gather;
use crate::names::{HostName, ObjectId};
use crate::nix::profile::set_profile;
use crate::output::{print, print_json};
use crate::system;

/// How long an activation may take, in seconds.
const SWITCH: u64 = 1800;

impl Fleet<'_> {
    pub(super) fn build(&self, what: &str, wanted: &[&str]) -> Result<ExitCode> {
        let activates = what == "test" || what == "switch";
        let target = self.arguments.options.get("--target");
        match target {
            Some(target) if activates && wanted.len() == 1 => push::check(target)?,
            Some(_) => return Err("only valid with `build test HOST` and `build switch HOST`").context(|| "understand --target".into()),
            None if activates => check_own(what, wanted)?,
            None => {}
        }
        let repository = self.repository()?;
        let (hosts, found) = self.hosts(&repository, wanted)?;
        let built = self.each(&repository, &hosts, |host, say| {
            say("evaluating");
            let system = repository.evaluate(host)?;
            if what != "dry-build" {
                say("building");
                repository.build(host, &system)?;
            }
            Ok((system.toplevel.to_string(), system.toplevel))
        })?;
        if let (true, [Ok(toplevel)]) = (activates, &built[..]) {
            if let Some(target) = target {
                return push::push(toplevel.path(), what, target).map(|()| exit(found));
            }
            let _turn = system::Turn::take()?;
            return activate(toplevel.path(), what == "switch").map(|()| exit(found));
        }
        Ok(exit(found && built.iter().all(Result::is_ok)))
    }

    pub(super) fn deploy(&self, wanted: &[&str]) -> Result<ExitCode> {
        let _turn = self.hub.turn()?;
        // what is known to have arrived counts for the sequence numbers
        collect::take_in(&self.hub, wanted, None, true)?;
        let repository = self.repository()?;
        let (hosts, found) = self.hosts(&repository, wanted)?;
        let manner = self.manner(repository.commit())?;
        if manner.waves && !wanted.is_empty() && self.rollout().is_ok() {
            return Err("a roll-out is under way, also of others; name no hosts").context(|| "publish in waves".into());
        }
        let waves = manner.waves.then(|| self.waves(&hosts, !found || !wanted.is_empty())).transpose()?;
        let Provenance { commit, author, summary, dirty } = &manner.origin;
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        let what = commit.as_ref().map_or("from a directory without commits".into(), |commit| {
            let changes = if *dirty { "uncommitted changes to " } else { "" };
            format!("{changes}{commit} by {}: {}", text(author), text(summary))
        });
        let replaced = hosts.iter().filter(|host| manner.holds.of(Some(&host.name)).is_none());
        let lost = lost::lost(&self.hub, &repository, &manner.origin, replaced);
        let json = self.arguments.has("--json");
        // what it prints is JSON then
        let say = |line: String| {
            if !json {
                return print(&(line + "\n"));
            }
            log::info!("{line}");
            Ok(())
        };
        say(format!("Publishing {what}"))?;
        if let Some(said) = lost::said(&lost) {
            log::warn!("{said}.");
        }
        let done = self.each(&repository, &hosts, |host, say| {
            let mut placed = publish::deploy(&self.hub, &repository, host, &manner, say)?;
            let mut waits = None;
            if let (Some(member), Some((_, places))) = (&mut placed.member, &waves) {
                let place = hosts.iter().position(|other| other.name == host.name).unwrap_or_default();
                (member.wave, member.silent_after) = (places[place], self.settings.silence(&host.name).as_secs());
                waits = Some(member.wave).filter(|_| member.is_new());
            }
            let said = placed.said.clone();
            Ok((waits.map_or(said.clone(), |wave| format!("{said}, for wave {}", wave + 1)), (placed, waits.is_some())))
        })?;
        let well = found && done.iter().all(Result::is_ok);
        let lost = |host: &HostName| lost.iter().find(|lost| lost.host == *host).and_then(|lost| lost.origin.commit.as_ref());
        let results: BTreeMap<_, _> = gather(hosts.iter().zip(&done).map(|(host, done)| (&host.name, result(done, lost(&host.name)))));
        match waves {
            Some((waves, _)) => {
                let members = done.into_iter().flatten().filter_map(|(placed, _)| placed.member).collect();
                rollout::propose(&self.hub, manner.plan.as_ref(), &manner.origin, waves, members)?;
                let line = Rollout::read(&self.hub)?.map(|rollout| rollout.line(&self.hub)).transpose()?.flatten();
                line.map_or(Ok(()), say)?;
            }
            None if wanted.is_empty() => rollout::end(&self.hub, manner.plan.as_ref())?,
            None => {}
        }
        if json {
            print_json(&results)?;
        }
        Ok(exit(well))
    }

    /// Renews what is published, whatever is in the repository.
    pub(super) fn renew(&self, wanted: &[&str]) -> Result<ExitCode> {
        let _turn = self.hub.turn()?;
        collect::take_in(&self.hub, wanted, None, true)?;
        // without one, its settings would not count
        self.repository()?;
        let manner = self.manner(Provenance::default())?;
        let hosts = select(self.hub.hosts()?, |name| name, wanted)?;
        let done = parallel(&hosts, self.arguments.jobs()?, |host| {
            let Some(number) = publish::renew(&self.hub, host, &manner).or_error()? else { return Some(false) };
            print(&format!("{host}: release {number} published: renewed\n")).ok().map(|()| true)
        });
        if done.iter().all(|renewed| *renewed == Some(false)) {
            print("Nothing expires before long.\n")?;
        }
        Ok(exit(done.iter().all(Option::is_some)))
    }

    pub(super) fn manner(&self, origin: Provenance) -> Result<Manner<'_>> {
        let has = |option| self.arguments.has(option);
        let (key, lasting) = (self.settings.signing_key.as_deref(), self.settings.expires_after);
        key.map_or(Ok(()), signing::check)?;
        let (build, unsigned, memory) = (!has("--no-build"), has("--unsigned"), Memory::new(&self.directory));
        let no_key = "its release is signed, and fleet.json has no signingKey; set it, or pass --unsigned";
        let (holds, plan, waves, scratch) = (Holds::read(&self.hub)?, Plan::read(&self.hub), has("--waves"), Temporary::new()?);
        Ok(Manner { build, key, unsigned, no_key, lasting, origin, memory, holds, plan, waves, scratch })
    }
}

/// Fails unless the one host that is named is this very machine, and this process may switch it.
fn check_own(what: &str, wanted: &[&str]) -> Result<()> {
    let own = system::host_name();
    let refuse = |why: String| Err(why).context(|| format!("{what} the configuration"));
    match wanted {
        [host] if **host != *own => refuse(format!("{host:?} is not this machine, which is {own:?}; use ekiben fleet deploy, or --target")),
        [_] if !geteuid().is_root() => refuse("must be run as root".into()),
        [_] => Ok(()),
        _ => refuse(format!("expected one host, this machine's own {own:?}")),
    }
}

/// Has this machine run a system, and, if that is to last, boot it; not what has been refused, or has broken off.
fn activate(system: &Path, to_last: bool) -> Result<()> {
    let activated = system::switch_to(system, "test", SWITCH, &format!("activate {}", system.display()), &[])?;
    // some unit may have failed, and some systems wait for a boot
    if to_last && matches!(activated.status.code(), Some(0 | 4 | 100)) {
        set_profile(system)?;
        system::switch_unchecked(system, "boot", SWITCH, "install the boot loader", &[])?.switched()?;
    }
    activated.success()
}

/// What came of a host, as `--json` shows it.
fn result(released: &Result<(Placed, bool)>, lost: Option<&ObjectId>) -> Value {
    match released {
        Ok((placed, waits)) => {
            let state = match (waits, placed.new) {
                (true, _) => "waiting",
                (_, true) => "published",
                _ => "unchanged",
            };
            let mut result = json!({ "state": state, "release": placed.member.as_ref().map(|member| member.release.sequence) });
            if let Some(lost) = lost {
                result["lost"] = json!(lost);
            }
            result
        }
        Err(error) => json!({ "state": "failed", "error": error.to_string() }),
    }
}
