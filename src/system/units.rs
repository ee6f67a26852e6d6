//! systemd's units, as far as a switch may have harmed them: which ran before and do not now.
//!
//! What counts is what a system's own configuration brings. What users start, transiently or in their own
//! sessions, may fail for reasons of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::{Error, OrLog, Result};
use crate::gather::gather;
use crate::program::Program;
use crate::system::properties::{Listed, Properties, listed, show};
use crate::system::switched::LOOK;
use crate::system::{now, omitted};
use crate::{config, text};

/// Where a system has its units.
const UNITS: &str = "etc/systemd/system";
/// Where systemd has those that it makes from a system's other configuration.
const GENERATED: &str = "/run/systemd/generator";
/// Of these kinds a unit comes and goes by itself.
const FLEETING: [&str; 3] = [".device", ".scope", ".slice"];
/// Of a user, who may do with them what he likes.
const OF_USERS: [&str; 2] = ["user@", "user-runtime-dir@"];
/// Of Ekiben's units, those that have failed where something is to be seen to; each instance has one more.
const REPORTS: [&str; 3] = ["deliver", "hub-collect", "webhook-tokens"];
/// What the state of a unit is told from.
const PROPERTIES: &str = "Id,LoadState,ActiveState,SubState,WantedBy,RequiredBy,UpheldBy,TriggeredBy,ConditionResult,ConditionTimestampMonotonic,Result,\
                          RemainAfterExit,ExecMainExitTimestampMonotonic,ActiveExitTimestampMonotonic,Job";

/// Before the switch: what has been restarted since then, in seconds, may well be again.
const LATELY: u64 = 600;
/// How systemd marks in the journal that a unit has ended, and how.
const ENDED_WELL: &str = "7ad2d189f7e94e70a38c781354912448";
const HAS_FAILED: &str = "d9b373ed55a64feb8242e02dbe79a49c";
/// How long a user's systemd may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// How the units were at some moment.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Units {
    /// Those that had failed, or that systemd started again and again.
    #[serde(rename = "failed_units")]
    pub failed: BTreeSet<String>,
    /// Those that had ended lately, and that systemd has started again.
    #[serde(default)]
    pub restless: BTreeSet<String>,
    /// How often it had started these again; nothing, if it was another version that looked.
    #[serde(default)]
    restarts: BTreeMap<String, u64>,
    /// Those that were active.
    #[serde(default, rename = "active_units")]
    active: BTreeSet<String>,
    /// Those that systemd could not make sense of.
    #[serde(default, rename = "broken_units")]
    broken: BTreeSet<String>,
    /// Those of [`omitted`], with what was not done; nothing, if it was another version that looked.
    #[serde(default, rename = "omitted_units")]
    omitted: Option<Worse>,
}

impl Units {
    /// How they are now, before a switch.
    pub fn before() -> Result<Self> {
        let lately = lately();
        let shown = services(&["*.service"])?;
        let is_restless = |service: &Properties| service.number("NRestarts") > 0 && service.number("ExecMainStartTimestamp") > lately;
        let restless = Properties::all(&shown).filter(is_restless);
        let restarts: BTreeMap<_, _> = gather(restless.map(|service| (service.of("Id").to_owned(), service.number("NRestarts"))));
        let list = listed("--all")?;
        Ok(Self { restless: gather(restarts.keys().cloned()), restarts, omitted: Some(omitted::among(&list)?), ..Self::of(list)? })
    }

    /// How they are now.
    pub fn now() -> Result<Self> {
        Self::of(listed("--all")?)
    }

    /// Of these, those that have failed now, or are started again and again; which is soon asked.
    pub fn failed_now() -> Result<BTreeSet<String>> {
        Ok(Self::of(listed("--state=failed,activating,deactivating")?)?.failed)
    }

    fn of(list: Vec<Listed>) -> Result<Self> {
        let changing: Vec<&str> = list.iter().filter(|unit| is_changing(unit)).map(|unit| &*unit.name).collect();
        let changing = services(&changing)?;
        let changing = Properties::by_name(&changing);
        let mut units = Self::default();
        for unit in list {
            let Listed { name, load, active, .. } = &unit;
            if is_broken(load) {
                units.broken.insert(name.clone());
            }
            if active == "failed" || changing.get(&**name).is_some_and(|service| is_failing(service, || ended_well(name, 1))) {
                units.failed.insert(name.clone());
            } else if is_up(active) && active != "activating" {
                units.active.insert(name.clone());
            }
        }
        Ok(units)
    }

    /// How often a service may die before it is worse off: one that had died lately, as often as it had since it was started.
    fn may_die(&self, name: &str) -> u64 {
        match self.restarts.get(name) {
            _ if self.failed.contains(name) => u64::MAX,
            None if self.restless.contains(name) => u64::MAX,
            times => times.copied().unwrap_or(0),
        }
    }

    /// Those that are worse off under the system `new` than they were under `old`, with their states: they have
    /// failed; or were active and should be, and are not; or make no sense any more.
    pub fn worse_under(&self, old: &Path, new: &Path) -> Result<Worse> {
        let now = Self::now()?;
        let mut worse = newly_failed(&now.failed, &self.failed, &[old, new]);
        let down = self.active.difference(&now.active).chain(now.broken.difference(&self.broken));
        let down = down.filter(|name| !worse.contains_key(*name)).map(String::as_str).collect();
        worse.append(&mut self.down(&now, down, new, |name| is_changed(old, new, name) && !is_given_up(old, new, name))?);
        Ok(worse)
    }

    /// Those of a system that were active and have been stopped since, also if nothing that is up wants them: somebody had
    /// started them.
    pub fn stopped_under(&self, system: &Path) -> Result<Vec<String>> {
        let now = Self::now()?;
        let down = self.down(&now, self.active.difference(&now.active).map(String::as_str).collect(), system, |_| true)?;
        Ok(gather(down.into_iter().filter(|(_, state)| state == "inactive").map(|(name, _)| name)))
    }

    /// Of these units of a system, those that are down, with their states; `should_be_up` tells it of what nothing wants.
    fn down(&self, now: &Self, mut names: Vec<&str>, system: &Path, should_be_up: impl Fn(&str) -> bool) -> Result<Worse> {
        names.retain(|name| brings(system, name));
        let mut down = Worse::new();
        for (name, unit) in names.iter().zip(Properties::all(&show(PROPERTIES, &names)?)) {
            if unit.is_down(&now.active, self.active.contains(*name), should_be_up(name)) {
                let state = if unit.of("LoadState") == "loaded" { unit.of("ActiveState") } else { unit.of("LoadState") };
                down.insert((*name).to_owned(), state.to_owned());
            }
        }
        Ok(down)
    }

    /// Those of the system `new` that have not failed, but that were not started or reloaded as they are to be; which was
    /// not so before.
    pub fn omitted_under(&self, new: &Path) -> Result<Worse> {
        let Some(before) = &self.omitted else { return Ok(Worse::new()) };
        let is_new = |name: &String, state: &String| before.get(name) != Some(state) || omitted::is_of_last_switch(name, state);
        let is_worse = |name: &String, state: &String| is_new(name, state) && brings(new, name);
        Ok(omitted::among(&listed("--all")?)?.into_iter().filter(|(name, state)| is_worse(name, state)).collect())
    }
}

/// Those of systems that have failed, and were well before.
pub fn newly_failed(failed: &BTreeSet<String>, before: &BTreeSet<String>, systems: &[&Path]) -> Worse {
    let is_theirs = |name: &&String| !is_report(name) && systems.iter().any(|system| brings(system, name));
    gather(failed.difference(before).filter(is_theirs).map(|name| (name.clone(), "failed".to_owned())))
}

/// How often systemd has started services again, because they had ended.
pub struct Restarts(BTreeMap<String, u64>);

impl Restarts {
    /// Up to now.
    pub fn now() -> Result<Self> {
        let shown = services(&["*.service"])?;
        Ok(Self(gather(Properties::all(&shown).map(|service| (service.of("Id").to_owned(), service.number("NRestarts"))))))
    }

    /// The services of the systems `old` and `new` that have died since then, and had not been dying before.
    pub fn since(&self, before: &Units, old: &Path, new: &Path) -> Result<Worse> {
        let mut died = BTreeMap::new();
        for (name, service) in Properties::by_name(&services(&["*.service"])?) {
            let times = service.number("NRestarts").saturating_sub(self.0.get(name).copied().unwrap_or(0));
            if times > before.may_die(name) && (brings(old, name) || brings(new, name)) && ended_well(name, times) != Some(true) {
                died.insert(name.to_owned(), "died and was restarted".to_owned());
            }
        }
        Ok(died)
    }
}

/// Has journald take in what was said so far, if it can within a while.
pub fn sync_journal() {
    let sync = Program::as_root("journalctl").arg("--sync").within(Duration::from_secs(20));
    sync.output(|| "flush the journal".into(), None).or_warn();
}

/// Whether a service has ended the last so many times, of this boot, as one that is to be started again whenever it has done
/// its work: what systemd knows of that is only in its journal, whose moments go by a clock that may have been set meanwhile.
fn ended_well(name: &str, times: u64) -> Option<bool> {
    sync_journal();
    let lines = format!("--lines={times}");
    let ask = Program::as_root("journalctl").args(["--quiet", "--boot", "--output=json", "--output-fields=MESSAGE_ID", &lines, "_PID=1"]);
    let ask = ask.arg(format!("UNIT={name}")).args([ENDED_WELL, HAS_FAILED].map(|id| format!("MESSAGE_ID={id}")));
    let said = ask.said(|| "read the journal".into()).unwrap_or_default();
    let has_failed = said.contains(HAS_FAILED);
    (has_failed || said.contains(ENDED_WELL)).then_some(!has_failed)
}

/// What systemd knows of the services that are loaded of these names, or patterns: how often it has started each again by
/// itself, when last, and how it has ended. It takes its time for many.
fn services(names: &[&str]) -> Result<String> {
    show("Id,ActiveState,NRestarts,ExecMainStartTimestamp,InactiveEnterTimestamp,Result", names)
}

/// Units that are worse off than before, with their states.
pub type Worse = BTreeMap<String, String>;

/// The error that says so: that they failed to `start`, or, where they had been started, to `keep up`.
pub fn failed_to(do_what: &str, units: &Worse) -> Error {
    let shown: Vec<_> =
        units.iter().map(|(name, state)| if state == "failed" { name.clone() } else { format!("{name} ({state})") }).collect();
    Error::new(format!("Failed to {do_what} {}", shown.join(", ")))
}

/// Says of which users units have failed, and which, as far as their own systemd tells.
pub fn of_users_failed(users: &BTreeSet<String>) -> String {
    let shown: Vec<_> =
        users.iter().map(|user| format!("{user} ({})", failed_of(user).unwrap_or_else(|error| error.to_string()))).collect();
    format!("units of users have failed: {}", shown.join(", "))
}

/// A user's units that have failed. He answers himself, as what he is.
fn failed_of(user: &str) -> Result<String> {
    const ASK: &str = "XDG_RUNTIME_DIR=/run/user/$(id -u) exec systemctl --user list-units --failed --plain --no-legend --full --no-pager";
    let ended = Program::as_user(user, "sh")?.args(["-c", ASK]).run(PATIENCE, || format!("ask the systemd of {user}"))?;
    if !ended.status.success() {
        return Err(Error::new("their systemd does not answer"));
    }
    let names: Vec<_> = ended.tail.iter().filter_map(|line| line.split_whitespace().next()).collect();
    Ok(if names.is_empty() { "none of them now".into() } else { text::line(&names.join(", ")) })
}

impl Properties<'_> {
    /// Whether it should be up and is not. `active` are the units that are.
    fn is_down(&self, active: &BTreeSet<String>, was_active: bool, changed: bool) -> bool {
        let is_active = |name: &str| active.contains(name);
        let wanted = ["WantedBy", "RequiredBy", "UpheldBy"].iter().any(|key| self.names(key).any(is_active));
        if is_broken(self.of("LoadState")) {
            // what nothing wants may be left of a unit that was taken away but for some setting
            return wanted;
        }
        let state = self.of("ActiveState");
        // it may have failed, and wait to be started again, since it was listed
        let is_up = is_up(state) && (state != "activating" || self.of("Result") == "success");
        if !was_active || is_up || self.of("LoadState") == "masked" || !(wanted || changed) {
            return false;
        }
        // systemd is to start it yet
        if self.number("Job") > 0 {
            return false;
        }
        !self.rests_rightly(is_active)
    }
}

/// Whether systemd starts a service, or waits to start it, which may be for another time; or stops it, or does what is to be
/// done after its end.
fn is_changing(unit: &Listed) -> bool {
    unit.is_restarting()
        || ["activating", "deactivating"].contains(&&*unit.active) && unit.name.ends_with(".service") && !is_report(&unit.name)
}

/// Whether it has failed, then: it may well have done its work. When it is being started once more, its result is that of the
/// new start, which may have begun since it was listed, and at the wish of others, such as a target that upholds it.
fn is_failing(service: &Properties, ended_well: impl FnOnce() -> Option<bool>) -> bool {
    let is_restarted = service.number("NRestarts") > 0;
    let is_anew = service.of("ActiveState") != "deactivating" && (is_restarted || service.number("InactiveEnterTimestamp") > lately());
    service.of("Result") != "success" || is_anew && !ended_well().unwrap_or(!is_restarted)
}

/// When what has been since then has been lately, in seconds since 1970.
fn lately() -> u64 {
    now().saturating_sub(LATELY)
}

fn is_broken(load: &str) -> bool {
    ["bad-setting", "error"].contains(&load)
}

fn is_up(active: &str) -> bool {
    ["active", "activating", "reloading", "refreshing"].contains(&active)
}

/// Whether a unit that fails says how something of Ekiben's has ended, such as another instance's run: that is no
/// switch's doing.
pub fn is_report(name: &str) -> bool {
    let ours = name.strip_prefix("ekiben-").and_then(|name| name.strip_suffix(".service"));
    let ours = ours.map(|name| name.trim_start_matches("retry@").trim_start_matches("watch@"));
    name.starts_with(LOOK) || ours.is_some_and(|name| REPORTS.contains(&name) || config::instance_name(name).is_ok())
}

/// Whether a unit is one of a system's own.
fn brings(system: &Path, name: &str) -> bool {
    // what tells of runs may fail for reasons of its own, too
    if name == "ekiben-boot.service" || name.starts_with("ekiben-notify-") && name.contains('@') {
        return false;
    }
    if FLEETING.iter().any(|kind| name.ends_with(kind)) || OF_USERS.iter().any(|prefix| name.starts_with(prefix)) {
        return false;
    }
    files(name).iter().any(|file| fs::symlink_metadata(system.join(UNITS).join(file)).is_ok())
        || fs::symlink_metadata(Path::new(GENERATED).join(name)).is_ok()
}

/// The files that can be a unit's: its own, and that of what it is an instance of.
pub fn files(name: &str) -> Vec<String> {
    let template = name.split_once('@').zip(name.rsplit_once('.')).map(|((stem, _), (_, kind))| format!("{stem}@.{kind}"));
    std::iter::once(name.to_owned()).chain(template).collect()
}

/// Whether a unit's files are others in the new system.
fn is_changed(old: &Path, new: &Path, name: &str) -> bool {
    let text = |system: &Path| {
        let mut texts = Vec::new();
        for file in files(name) {
            let path = system.join(UNITS).join(&file);
            let more = fs::read_dir(path.with_file_name(file + ".d")).into_iter().flatten().flatten();
            let more: BTreeSet<_> = gather(more.map(|entry| entry.path()));
            texts.extend(std::iter::once(path).chain(more).filter_map(|path| fs::read(path).ok()));
        }
        texts
    };
    text(old) != text(new)
}

/// Whether an instance of a template was the old system's own by what that adds to it, and the new one adds nothing: it is stopped.
fn is_given_up(old: &Path, new: &Path, name: &str) -> bool {
    // to what is disabled, nothing but /dev/null is added
    let adds = |system: &Path| {
        let added = fs::read_dir(system.join(UNITS).join(format!("{name}.d"))).into_iter().flatten().flatten();
        added.into_iter().any(|entry| fs::metadata(entry.path()).is_ok_and(|file| file.is_file()))
    };
    let has_own = |system: &Path| fs::symlink_metadata(system.join(UNITS).join(name)).is_ok();
    name.contains('@') && adds(old) && !adds(new) && !has_own(old) && !has_own(new)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_down(text: &str, changed: bool) -> bool {
        let active = ["multi-user.target", "app.socket", "app.timer"].map(String::from).into();
        Properties::one(text).is_down(&active, true, changed)
    }

    #[test]
    fn what_was_active_and_should_be_and_is_not_is_down() {
        const STOPPED: &str = "LoadState=loaded\nActiveState=inactive\nResult=success\nRemainAfterExit=no\nConditionResult=yes\nConditionTimestampMonotonic=50\n\
                               ExecMainExitTimestampMonotonic=200\nActiveExitTimestampMonotonic=100\n";
        let with = |more: &str| format!("{STOPPED}{more}");
        let wanted = with("WantedBy=multi-user.target\n");
        assert!(is_down(&wanted, false) && is_down(STOPPED, true));
        assert!(is_down(&wanted.replace("=inactive", "=failed"), false));
        assert!(is_down(&wanted.replace("=inactive", "=activating").replace("=success", "=exit-code"), false));
        assert!(is_down(&with("RequiredBy=x.service multi-user.target\nTriggeredBy=app.timer\n"), false));
        assert!(is_down(&wanted.replace("=loaded", "=bad-setting"), false));
        assert!(!is_down(&STOPPED.replace("=loaded", "=bad-setting"), true));
        // up again, not wanted, not to be started now, waiting for connections, or done
        assert!(!is_down(&wanted.replace("=inactive", "=activating"), false));
        assert!(!is_down(STOPPED, false) && !is_down(&with("WantedBy=other.target\n"), false));
        assert!(!is_down(&wanted.replace("=loaded", "=masked"), false));
        assert!(!is_down(&wanted.replace("ConditionResult=yes", "ConditionResult=no"), false));
        assert!(!is_down(&wanted.replace("Result=success", "Result=exec-condition"), true));
        assert!(!is_down(&with("TriggeredBy=app.socket\nWantedBy=multi-user.target\n"), true));
        let done = wanted.replace("=200", "=100");
        assert!(!is_down(&done, true));
        assert!(is_down(&done.replace("Result=success", "Result=exit-code"), true));
        assert!(is_down(&done.replace("RemainAfterExit=no", "RemainAfterExit=yes"), true));
        assert!(is_down(&wanted.replace("=200", "=0"), true));
    }

    #[test]
    fn a_service_that_is_started_once_more_has_failed_unless_it_had_done_its_work() {
        let is_failing = |shown: &str, ended_well| super::is_failing(&Properties::one(shown), || ended_well);
        assert!(!is_failing("NRestarts=0\nResult=success\n", Some(false)));
        for restarts in 0..2 {
            assert!(is_failing(&format!("NRestarts={restarts}\nResult=exit-code\n"), Some(true)));
        }
        // it was waiting to be when it was listed, and is being started now
        assert!(is_failing("NRestarts=1\nResult=success\n", Some(false)) && is_failing("NRestarts=1\nResult=success\n", None));
        assert!(!is_failing("NRestarts=1\nResult=success\n", Some(true)));
        // for systemd, that is not a restart where another unit has it start
        let upheld = format!("ActiveState=activating\nNRestarts=0\nResult=success\nInactiveEnterTimestamp=@{}\n", now());
        assert!(is_failing(&upheld, Some(false)) && !is_failing(&upheld, Some(true)) && !is_failing(&upheld, None));
        // what is to be done after its end takes its time
        let ending = upheld.replace("activating", "deactivating");
        assert!(!is_failing(&ending, Some(false)) && is_failing(&ending.replace("success", "signal"), Some(true)));
    }

    #[test]
    fn what_had_died_before_may_die_again_but_no_more_often() {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let restarts = [("flaky".to_owned(), 2), ("failed".to_owned(), 2)].into();
        let units = Units { failed: names(&["failed"]), restless: names(&["flaky", "known"]), restarts, ..Units::default() };
        assert_eq!(["flaky", "failed", "known", "well"].map(|name| units.may_die(name)), [2, u64::MAX, u64::MAX, 0]);
    }

    #[test]
    fn a_units_files_are_its_own_and_its_templates() {
        let directory = crate::testing::Directory::new();
        let (old, new) = (directory.path().join("old"), directory.path().join("new"));
        for system in [&old, &new] {
            fs::create_dir_all(system.join(UNITS).join("app.service.d")).unwrap();
            for file in ["app.service", "app.service.d/more.conf", "many@.service", "user@.service"] {
                fs::write(system.join(UNITS).join(file), "").unwrap();
            }
        }
        assert!(brings(&old, "app.service") && brings(&old, "many@one.service"));
        for (name, expected) in [
            ("ekiben-web.service", true),
            ("ekiben-look@web.service", true),
            ("ekiben-retry@web.service", true),
            ("ekiben-watch@fleet.service", true),
            ("ekiben-webhook-tokens.service", true),
            ("ekiben-webhook.service", false),
            ("ekiben-web.path", false),
            ("web.service", false),
        ] {
            assert_eq!(is_report(name), expected, "{name}");
        }
        for foreign in ["mine.service", "user@1000.service", "session-1.scope", "many@one.timer"] {
            assert!(!brings(&old, foreign), "{foreign}");
        }
        assert!(!is_changed(&old, &new, "app.service") && !is_changed(&old, &new, "many@one.service"));
        fs::write(new.join(UNITS).join("app.service.d/more.conf"), "[Service]\n").unwrap();
        fs::write(new.join(UNITS).join("many@.service"), "[Service]\n").unwrap();
        assert!(is_changed(&old, &new, "app.service") && is_changed(&old, &new, "many@one.service"));
        // what is added is taken away, or comes
        let added = old.join(UNITS).join("many@one.service.d");
        fs::create_dir(&added).unwrap();
        assert!(!is_given_up(&old, &new, "many@one.service"));
        fs::write(added.join("overrides.conf"), "[Service]\n").unwrap();
        let off = new.join(UNITS).join("many@one.service.d");
        fs::create_dir(&off).unwrap();
        std::os::unix::fs::symlink("/dev/null", off.join("overrides.conf")).unwrap();
        assert!(is_given_up(&old, &new, "many@one.service") && !is_given_up(&new, &old, "many@one.service"));
        assert!(!is_given_up(&old, &new, "app.service"));
        fs::write(new.join(UNITS).join("many@one.service"), "").unwrap();
        assert!(!is_given_up(&old, &new, "many@one.service"));
    }
}
