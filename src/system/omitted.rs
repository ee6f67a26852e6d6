//! What a switch has left undone though no unit has failed: units that are to be up and were never started, since what they
//! need is missing, such as another unit, or a file system's device; and those that still run as they did, since they could
//! not be reloaded. Of most of that `switch-to-configuration` says nothing; and a boot may end in an emergency for it.

use std::collections::{BTreeMap, BTreeSet};

use crate::error::Result;
use crate::gather::gather;
use crate::system;
use crate::system::properties::Properties;

/// What that is told from.
const PROPERTIES: &str = "--property=Id,LoadState,ActiveState,InactiveExitTimestampMonotonic,ConditionResult,ConditionTimestampMonotonic,Job,\
                          RefuseManualStart,WantedBy,RequiredBy,Conflicts,ConflictedBy,ReloadResult";
/// Units of other kinds come and go by themselves.
const KINDS: [&str; 8] = ["*.service", "*.socket", "*.timer", "*.path", "*.mount", "*.automount", "*.swap", "*.target"];

/// The units of which that is so now, with what was not done.
pub fn now() -> Result<BTreeMap<String, String>> {
    Ok(of(&system::systemctl(&[&["show", "--all", PROPERTIES, "--"], &KINDS[..]].concat())?))
}

fn of(shown: &str) -> BTreeMap<String, String> {
    let active = || Properties::all(shown).filter(|unit| unit.of("ActiveState") == "active");
    let all: BTreeSet<&str> = gather(active().map(|unit| unit.of("Id")));
    // a switch starts all targets that are active, and what these have come to want; others want it when they start
    let targets = active().filter(|unit| unit.of("RefuseManualStart") == "no").map(|unit| unit.of("Id"));
    let targets = gather(targets.filter(|name| name.ends_with(".target")));
    let state = |unit: &Properties| match unit.of("ReloadResult") {
        _ if unit.is_unstarted(&all, &targets) => Some("not started"),
        "" | "success" => None,
        _ => Some("not reloaded").filter(|_| all.contains(unit.of("Id"))),
    };
    gather(Properties::all(shown).filter_map(|unit| Some((unit.of("Id").to_owned(), state(&unit)?.to_owned()))))
}

impl Properties<'_> {
    fn is_unstarted(&self, active: &BTreeSet<&str>, targets: &BTreeSet<&str>) -> bool {
        let are_in = |key, others: &BTreeSet<&str>| self.of(key).split_whitespace().any(|name| others.contains(name));
        // a file system that is only wanted may be missing: that is what `nofail` means
        let is_optional = [".mount", ".swap"].iter().any(|kind| self.of("Id").ends_with(kind));
        let is_wanted = are_in("RequiredBy", targets) || !is_optional && are_in("WantedBy", targets);
        let is_skipped = self.of("ConditionResult") == "no" && self.number("ConditionTimestampMonotonic") > 0;
        let gives_way = are_in("Conflicts", active) || are_in("ConflictedBy", active);
        let is_at_rest = self.of("LoadState") == "loaded" && self.of("ActiveState") == "inactive" && self.number("Job") == 0;
        is_at_rest && self.number("InactiveExitTimestampMonotonic") == 0 && is_wanted && !is_skipped && !gives_way
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OTHERS: &str = "Id=multi-user.target\nActiveState=active\nRefuseManualStart=no\n\n\
                          Id=network-pre.target\nActiveState=active\nRefuseManualStart=yes\n\n\
                          Id=idle.target\nActiveState=inactive\nRefuseManualStart=no\n\n\
                          Id=app.service\nActiveState=active\nRefuseManualStart=no\nReloadResult=success\n\n";
    const UNIT: &str = "Id=new.service\nLoadState=loaded\nActiveState=inactive\nInactiveExitTimestampMonotonic=0\nConditionResult=no\n\
                        ConditionTimestampMonotonic=0\nRefuseManualStart=no\nConflicts=shutdown.target\nReloadResult=success\n";

    fn found(shown: &str) -> String {
        of(shown).into_iter().map(|(name, state)| name + " " + &state).collect()
    }

    #[test]
    fn what_is_to_be_up_and_was_never_started_is_found() {
        for (more, expected) in [
            ("WantedBy=idle.target multi-user.target", "new.service not started"),
            ("RequiredBy=multi-user.target", "new.service not started"),
            // when that starts, which a switch does not see to
            ("WantedBy=idle.target network-pre.target app.service", ""),
            ("", ""),
            // yet
            ("WantedBy=multi-user.target\nJob=7", ""),
            ("WantedBy=multi-user.target\nConflictedBy=app.service", ""),
        ] {
            assert_eq!(found(&format!("{OTHERS}{UNIT}{more}\n")), expected, "{more}");
        }
        let wanted = format!("{OTHERS}{UNIT}WantedBy=multi-user.target\n");
        for (old, new) in [
            ("ConditionTimestampMonotonic=0", "ConditionTimestampMonotonic=5"),
            ("InactiveExitTimestampMonotonic=0", "InactiveExitTimestampMonotonic=5"),
            ("loaded", "masked"),
            ("inactive\nInactive", "activating\nInactive"),
            ("new.service", "new.mount"),
            ("Conflicts=", "Conflicts=app.service "),
        ] {
            assert_eq!(found(&wanted.replace(old, new)), "", "{new}");
        }
        let required = wanted.replace("new.service", "new.mount").replace("WantedBy", "RequiredBy");
        assert_eq!(found(&required), "new.mount not started");
    }

    #[test]
    fn what_runs_and_could_not_be_reloaded_is_found() {
        let shown = OTHERS.replace("=success", "=exit-code");
        assert_eq!(found(&shown), "app.service not reloaded");
        assert_eq!(found(&shown.replace("app.service\nActiveState=active", "app.service\nActiveState=inactive")), "");
        assert_eq!(found(OTHERS), "");
    }
}
