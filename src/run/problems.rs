//! What systemd says of the units of instances, and what there is to see to.

use std::collections::BTreeMap;

use crate::error::OrLog;
use crate::paths::Paths;
use crate::program::Program;
use crate::run::Stage;
use crate::run::status::Status;
use crate::system::properties::Properties;
use crate::text::ago;

/// After how many seconds a request that no run takes, a run that nobody ends, or a unit that is off, is a fault.
const PATIENCE: u64 = 60;
/// The kinds of units that an instance has.
const KINDS: [&str; 3] = ["path", "service", "timer"];
/// The units of the webhook.
const WEBHOOK: [&str; 3] = ["ekiben-webhook.service", SOCKET, "ekiben-webhook-tokens.service"];
const SOCKET: &str = "ekiben-webhook.socket";
/// Those of a hub: services that their timers start.
const HUB: [&str; 2] = ["ekiben-hub-collect", "ekiben-hub-files"];
/// What is asked of systemd.
const PROPERTIES: &str = "--property=Id,LoadState,ActiveState,SubState,InactiveEnterTimestamp,StatusText,NextElapseUSecRealtime,ExecStart";

/// What systemd says of units, by their names.
pub(super) type Units<'a> = BTreeMap<&'a str, Properties<'a>>;

/// What it says of the instances' units and those around them; nothing if it does not answer.
pub(super) fn ask(instances: &[&str]) -> String {
    let units = instances.iter().flat_map(|name| KINDS.map(|kind| format!("ekiben-{name}.{kind}"))).chain(WEBHOOK.map(Into::into));
    let units = units.chain(HUB.into_iter().flat_map(|name| ["timer", "service"].map(|kind| format!("{name}.{kind}"))));
    let ask = Program::new("systemctl").args(["show", "--timestamp=unix", PROPERTIES, "--"]).args(units);
    ask.said(|| "ask systemd".into()).or_warn().unwrap_or_default()
}

/// Whether a service is in the second of the user's stages, which root does not announce.
pub(super) fn is_building(service: &Properties) -> bool {
    let runs = |line: &str| !line.contains(" pid=0 ") && line.contains("stop_time=[n/a]") && line.contains(" build ");
    service.each("ExecStart").any(runs)
}

/// What there is to see to of the webhook.
pub(super) fn webhook_problems(units: &Units, now: u64) -> impl Iterator<Item = String> {
    let failed = WEBHOOK.into_iter().filter_map(|name| failed(name, units.get(name)?));
    let off = units.get(SOCKET).and_then(|state| off("socket", SOCKET, state, now));
    failed.chain(off)
}

/// What there is to see to of the hub that this machine is.
pub(super) fn hub_problems(units: &Units, now: u64) -> Vec<String> {
    let all = HUB.into_iter().flat_map(|name| known(units, name, &["timer", "service"]));
    all.filter_map(|(kind, name, unit)| failed(name, unit).or_else(|| off(kind, name, unit, now))).collect()
}

/// Of a unit's kinds, those that systemd has told of, with their names.
fn known<'a>(units: &'a Units, name: &'a str, kinds: &'a [&str]) -> impl Iterator<Item = (&'a str, &'a str, &'a Properties<'a>)> {
    kinds.iter().filter_map(move |kind| units.get_key_value(&*format!("{name}.{kind}")).map(|(name, unit)| (*kind, *name, unit)))
}

/// That a unit has failed, and what to do.
fn failed(name: &str, unit: &Properties) -> Option<String> {
    (unit.of("ActiveState") == "failed").then(|| format!("{name} has failed; see systemctl status {name}"))
}

/// What there is to see to of an instance, besides how its last run ended.
pub(super) fn problems(paths: &Paths, units: &Units, status: &Status, requested: Option<u64>, now: u64) -> Vec<String> {
    let name = paths.name();
    let (unit, has_failed) = (format!("ekiben-{name}"), status.has_failed());
    let own: Vec<_> = known(units, &unit, &KINDS).collect();
    // the clock may have been ahead then
    let is_old = |since: &u64| now.abs_diff(*since) > PATIENCE;
    let is_idle = own.iter().any(|(kind, _, unit)| *kind == "service" && matches!(unit.of("ActiveState"), "inactive" | "failed"));
    // of a run that has failed, there is a report
    let failed = own.iter().filter(|(kind, ..)| *kind != "service" || !has_failed).filter_map(|(kind, name, unit)| {
        let said = failed(name, unit)?;
        Some(paths.why_not_written().filter(|_| *kind == "service").unwrap_or(said))
    });
    let off: Vec<String> = own.iter().filter_map(|(kind, name, unit)| off(kind, name, unit, now)).collect();
    let waits = requested.filter(|since| off.is_empty() && is_idle && is_old(since));
    let waits = waits.map(|since| format!("no run takes the request of {}; run systemctl restart ekiben-{name}.path", ago(since, now)));
    // a boot is judged by another unit
    let cut_off = status.running.as_ref().filter(|running| is_idle && running.stage != Stage::Boot && is_old(&running.started));
    let cut_off = cut_off.map(|_| format!("an interrupted run has not been ended; run systemctl start ekiben-{name}"));
    let stale = status.expires.filter(|expires| *expires < now);
    let stale = stale.map(|expires| {
        format!("stale: the release expired {}, and the hub has offered none since; see to the hub, or who publishes", ago(expires, now))
    });
    let unreadable =
        status.unreadable.iter().map(|why| format!("not all that was known of it can be read, which the next run keeps aside: {why}"));
    failed.chain(off).chain(waits).chain(cut_off).chain(stale).chain(unreadable).collect()
}

/// Why a unit will not do what it is there for, and what to do.
fn off(kind: &str, name: &str, unit: &Properties, now: u64) -> Option<String> {
    // since 1970, if it never was active
    let off_for = now.abs_diff(unit.number("InactiveEnterTimestamp"));
    Some(match unit.of("LoadState") {
        "masked" => format!("{name} is masked; enable it in the configuration"),
        // whoever wants no timer has none
        "not-found" if kind != "timer" => format!("{name} is missing; run systemctl daemon-reload, or nixos-rebuild"),
        "loaded" if unit.of("SubState") == "elapsed" => format!("{name} will not elapse again; correct the instance's dates"),
        // a switch may have stopped it, to start it again
        "loaded" if kind != "service" && unit.of("ActiveState") == "inactive" && off_for > PATIENCE => {
            format!("{name} is not active; run systemctl start {name}")
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::Trigger;
    use crate::run::status::Running;

    #[test]
    fn what_stands_still_and_what_has_failed_is_a_problem() {
        let (now, old, new) = (10_000, 10_000 - 300, 10_000 - 3);
        let running = |started| {
            let mut status = Status::default();
            status.running = Some(Running { stage: Stage::Activate, trigger: Trigger::Timer, by: Vec::new(), started, stages: Vec::new() });
            status
        };
        let found = |service: &str, path: &str, status: &Status, requested| {
            let units = [("service", service), ("path", path), ("timer", "active")];
            let unit =
                |(kind, state)| format!("Id=ekiben-app.{kind}\nActiveState={state}\nLoadState=loaded\nInactiveEnterTimestamp=@{new}\n");
            problems(&Paths::new("app"), &Properties::by_name(&units.map(unit).join("\n")), status, requested, now).join("; ")
        };
        let (idle, none) = (Status::default(), "");
        assert_eq!(found("inactive", "active", &idle, None), none);
        assert_eq!(found("inactive", "active", &idle, Some(new)), none);
        assert_eq!(found("activating", "active", &running(old), Some(old)), none);
        assert_eq!(found("deactivating", "active", &running(old), Some(old)), none);
        assert_eq!(found("inactive", "active", &running(new), None), none);
        assert!(found("inactive", "inactive", &idle, Some(old)).starts_with("no run takes the request of 5 min ago"));
        assert!(
            found("failed", "active", &running(old), None)
                .ends_with("an interrupted run has not been ended; run systemctl start ekiben-app")
        );
        assert_eq!(found("inactive", "failed", &idle, None), "ekiben-app.path has failed; see systemctl status ekiben-app.path");
        let off = |kind: &str, load: &str, off_since: u64, is_over: bool| {
            let state = if is_over { "elapsed" } else { "dead" };
            let unit = format!("ActiveState=inactive\nLoadState={load}\nSubState={state}\nInactiveEnterTimestamp=@{off_since}\n");
            off(kind, &format!("x.{kind}"), &Properties::one(&unit), now).unwrap_or_default()
        };
        assert_eq!(off("path", "loaded", new, false) + &off("service", "loaded", old, false) + &off("timer", "not-found", 0, false), none);
        for since in [0, old] {
            assert_eq!(off("timer", "loaded", since, false), "x.timer is not active; run systemctl start x.timer");
        }
        assert!(off("timer", "loaded", old, true).starts_with("x.timer will not elapse again"));
        assert!(off("path", "masked", new, false).starts_with("x.path is masked; enable it"));
        assert!(off("path", "not-found", 0, false).starts_with("x.path is missing; run systemctl daemon-reload"));
        // systemd has not answered
        assert_eq!(problems(&Paths::new("app"), &BTreeMap::new(), &running(old), Some(old), now), Vec::<String>::new());
    }
}
