//! What a switch has left undone though no unit has failed: units that are to be up and were never started, since what they
//! need is missing, such as another unit, or a file system's device, or were stopped, since that has ended; and those that
//! still run as they did, since they could not be restarted for that, or not be reloaded, such as a file system that could not
//! be mounted anew. Of most of that `switch-to-configuration` says nothing; and a boot may end in an emergency for it.

use std::collections::{BTreeMap, BTreeSet};

use crate::error::Result;
use crate::gather::gather;
use crate::system::properties::{Listed, Properties, show};

/// What that is told from, of units that are up: what a target wants, and whether the unit could be reloaded, or a file
/// system mounted anew or unmounted.
const OF_ACTIVE: &str = "Id,RefuseManualStart,Requires,Wants,ReloadResult,ExecRemount,ExecUnmount";
/// And of those that are not.
const OF_INACTIVE: &str = "Id,ActiveState,InactiveExitTimestampMonotonic,ConditionResult,ConditionTimestampMonotonic,AssertResult,AssertTimestampMonotonic,Job,\
     Conflicts,ConflictedBy,TriggeredBy,Result,RemainAfterExit,ExecMainExitTimestampMonotonic,ActiveExitTimestampMonotonic";
const NOT_STARTED: &str = "not started";

/// Whether that can be no other's doing than the last switch's: systemd forgets how mounting has ended when it is reloaded.
pub fn is_of_last_switch(name: &str, state: &str) -> bool {
    is_of(name, &[".mount"]) && state != NOT_STARTED
}

/// The units of which that is so now, of those that there are, with what was not done. systemd is asked only about those that
/// matter, see [`show`].
pub fn among(list: &[Listed]) -> Result<BTreeMap<String, String>> {
    let names = |active| list.iter().filter(move |unit| unit.load == "loaded" && unit.active == active).map(|unit| &*unit.name);
    let up: Vec<_> = gather(names("active"));
    let active: Vec<_> = gather(names("active").filter(|name| is_of(name, &[".target", ".service", ".mount", ".timer"])));
    let active = show(OF_ACTIVE, &active)?;
    let wanted = wanted(&active);
    let suspects: Vec<_> = gather(names("inactive").filter(|name| wanted.contains(name)));
    let suspects = show(OF_INACTIVE, &suspects)?;
    let unstarted = Properties::all(&suspects).filter_map(|unit| unit.why_down(&up).map(|state| (unit, state)));
    let missing: Vec<_> = gather(list.iter().filter(|unit| unit.load == "not-found").map(|unit| &*unit.name));
    let not_changed = Properties::all(&active).filter_map(|unit| unit.as_before(&missing).map(|state| (unit, state)));
    Ok(gather(unstarted.chain(not_changed).map(|(unit, state)| (unit.of("Id").to_owned(), state.to_owned()))))
}

/// What the active targets want to be up. A switch starts all of these, and what they have come to want; others want it
/// when they start.
fn wanted(active: &str) -> BTreeSet<&str> {
    let targets = Properties::all(active).filter(|unit| is_of(unit.of("Id"), &[".target"]) && unit.of("RefuseManualStart") == "no");
    // a file system that is only wanted may be missing: that is what `nofail` means
    let is_optional = |name: &&str| is_of(name, &[".mount", ".swap"]);
    gather(targets.flat_map(|unit| unit.names("Requires").chain(unit.names("Wants").filter(|name| !is_optional(name)))))
}

fn is_of(name: &str, kinds: &[&str]) -> bool {
    kinds.iter().any(|kind| name.ends_with(kind))
}

impl Properties<'_> {
    /// What has become of it instead, if it is to be up. `up` are those that are.
    fn why_down(&self, up: &[&str]) -> Option<&'static str> {
        let gives_way = ["Conflicts", "ConflictedBy"].iter().any(|key| self.names(key).any(|name| up.contains(&name)));
        let is_at_rest = self.of("ActiveState") == "inactive" && self.number("Job") == 0;
        if !is_at_rest || gives_way || self.is_skipped() {
            return None;
        }
        let started = self.number("InactiveExitTimestampMonotonic");
        // it may have done its work before, as it was to be then
        if started == 0 || self.of("AssertResult") == "no" && self.number("AssertTimestampMonotonic") > started {
            return Some(NOT_STARTED);
        }
        let was_up = is_of(self.of("Id"), &[".service"]) && self.number("ActiveExitTimestampMonotonic") > started;
        (was_up && !self.rests_rightly(|name| up.contains(&name))).then_some("stopped")
    }

    /// What it would have taken to have it be as it is to be, where that has failed: what requires a unit that is `missing` is not
    /// started again, but goes on as it was.
    fn as_before(&self, missing: &[&str]) -> Option<&'static str> {
        // nothing is known of a program that had done its work before it ended
        let has_failed = |key| {
            let ended = self.of(key);
            !ended.is_empty() && !ended.ends_with(" status=0 }") && !ended.contains(" code=(null) ")
        };
        match self.of("ReloadResult") {
            "" | "success" if !has_failed("ExecRemount") => {
                (has_failed("ExecUnmount") || self.names("Requires").any(|name| missing.contains(&name))).then_some("not restarted")
            }
            _ => Some("not reloaded"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ACTIVE: &str = "Id=multi-user.target\nRefuseManualStart=no\nWants=new.service data.mount app.service\nRequires=must.mount\n\n\
                          Id=network-pre.target\nRefuseManualStart=yes\nWants=other.service\n\n\
                          Id=app.service\nRefuseManualStart=no\nWants=another.service\nReloadResult=success\n\n";
    const UNIT: &str = "Id=new.service\nActiveState=inactive\nInactiveExitTimestampMonotonic=0\nConditionResult=no\n\
                        ConditionTimestampMonotonic=0\nConflicts=shutdown.target\nJob=0\n";

    #[test]
    fn what_a_switch_starts_is_what_active_targets_want_and_what_they_must_have() {
        assert_eq!(wanted(ACTIVE), ["app.service", "must.mount", "new.service"].into());
    }

    #[test]
    fn what_was_never_started_or_was_stopped_and_need_not_wait_is_found() {
        let why_down = |old: &str, new: &str| Properties::one(&UNIT.replace(old, new)).why_down(&["multi-user.target", "app.service"]);
        assert_eq!(why_down("", ""), Some(NOT_STARTED));
        let never = "InactiveExitTimestampMonotonic=0";
        let started = |more: &str| why_down(never, &format!("InactiveExitTimestampMonotonic=5\n{more}"));
        assert_eq!(started("AssertResult=no\nAssertTimestampMonotonic=6"), Some(NOT_STARTED));
        assert_eq!(started("AssertResult=no\nAssertTimestampMonotonic=4"), None);
        for (old, new) in [
            ("ConditionTimestampMonotonic=0", "ConditionTimestampMonotonic=5"),
            (never, "InactiveExitTimestampMonotonic=5"),
            ("inactive", "activating"),
            ("Job=0", "Job=7"),
            ("Conflicts=", "Conflicts=app.service "),
            ("Conflicts=shutdown.target", "ConflictedBy=app.service"),
        ] {
            assert_eq!(why_down(old, new), None, "{new}");
        }
        // as it was before it was started last; done; ended for what it is bound to
        let ended = |main, active| {
            started(&format!(
                "Result=success\nRemainAfterExit=no\nExecMainExitTimestampMonotonic={main}\nActiveExitTimestampMonotonic={active}"
            ))
        };
        assert_eq!((ended(6, 4), ended(6, 6), ended(7, 6)), (None, None, Some("stopped")));
    }

    #[test]
    fn what_runs_and_could_not_be_reloaded_or_mounted_anew_is_found() {
        let ended = |how: &str, status: &str| {
            format!("{how}={{ path=/bin/mount ; argv[]=/bin/mount -o status=1 ; pid=9 ; code=exited ; status={status} }}\n")
        };
        let remounted = |status| ended("ExecRemount", status);
        for (shown, state) in [
            ("", None),
            ("ReloadResult=success\n", None),
            ("ReloadResult=exit-code\n", Some("not reloaded")),
            (&(remounted("0") + &ended("ExecUnmount", "0")), None),
            (&ended("ExecUnmount", "0/0").replace("exited", "(null)"), None),
            (&remounted("32"), Some("not reloaded")),
            (&remounted("15/TERM"), Some("not reloaded")),
            (&ended("ExecUnmount", "32"), Some("not restarted")),
            ("Requires=some.service missing.service\n", Some("not restarted")),
            ("Requires=some.service\n", None),
        ] {
            assert_eq!(Properties::one(shown).as_before(&["missing.service"]), state, "{shown}");
        }
        assert!(is_of_last_switch("data.mount", "not reloaded") && !is_of_last_switch("data.mount", NOT_STARTED));
        assert!(!is_of_last_switch("app.service", "not reloaded"));
    }
}
