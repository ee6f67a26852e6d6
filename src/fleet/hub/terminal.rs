//! `ekiben fleet status`: the hosts and their states in a table, again whenever something changes, or as JSON.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use crate::error::{Context, Result};
use crate::fleet::hub::collect;
use crate::fleet::hub::host_state::HostState;
use crate::fleet::hub::served::ServedDirectory;
use crate::fleet::hub::status::{Known, Shown, exit, gravest_first, rows, totals};
use crate::system::now;
use crate::text::{self, span};
use crate::{output, table};

/// Shows hosts, all if none are named; as JSON, once, or again whenever something changes.
pub fn show(hub: &ServedDirectory, fleet: &Known, wanted: &[&str], json: bool, once: bool, wide: bool) -> Result<ExitCode> {
    let live = !json && !once && std::io::stdout().is_terminal();
    let mut before = String::new();
    loop {
        let late = collect::take_in(hub, wanted, None, false)?;
        let shown = rows(hub, fleet, wanted, late)?;
        if !live {
            if let (true, Some(late)) = (json, &shown.late) {
                log::warn!("{late}.");
            }
            if json { output::print_json(&shown.hosts) } else { output::print(&table(&shown, wide, false, now())) }?;
            return Ok(exit(&shown));
        }
        let text = text::lines(&table(&shown, wide, true, now()));
        if text != before {
            let mut output = std::io::stdout().lock();
            let done = write!(output, "\x1b[H\x1b[2J{text}").and_then(|()| output.flush());
            done.context(|| "write to standard output".into())?;
            before = text;
        }
        // before that, another look is not worth the while
        std::thread::sleep(Duration::from_secs(if hub.elsewhere().is_some() { 10 } else { 1 }));
    }
}

/// How many hosts there are of which state; then a line for each, and what there is to see to.
fn table(shown: &Shown, wide: bool, terminal: bool, now: u64) -> String {
    let wrapped = |text: &str, indent: &str| {
        let line = format!("{indent}{text}");
        if terminal { output::wrapped(&line, indent.len()) } else { line + "\n" }
    };
    let hosts = gravest_first(shown);
    if hosts.is_empty() {
        return "no hosts: see ekiben fleet bootstrap\n".into();
    }
    let totals: Vec<_> = totals(&hosts).into_iter().map(|(count, row)| format!("{count} {}", row.state)).collect();
    let mut text: String = shown.late.iter().chain(&shown.rollout).map(|line| wrapped(line, "")).collect();
    text += &wrapped(&format!("{} host{}: {}", hosts.len(), if hosts.len() == 1 { "" } else { "s" }, totals.join("; ")), "");
    let wide_heads = ["LOCAL", "REMOTE", "RELEASE", "COMMIT", "AUTHOR", "KERNEL", "NIXOS", "NIXPKGS"];
    let mut rows =
        vec![["HOST", "STATE", "HEARD", "RUN", "PUBLISHED"].iter().chain(&wide_heads).map(ToString::to_string).collect::<Vec<_>>()];
    let age = |then: Option<u64>| then.map_or(String::new(), |then| span(now.saturating_sub(then)));
    for (name, shown) in &hosts {
        let (beat, manifest) = (shown.heartbeat.as_ref(), shown.published.as_ref());
        let mark = match (beat.and_then(|beat| beat.system.as_ref()), manifest.and_then(|manifest| manifest.toplevel.as_ref())) {
            (Some(runs), Some(toplevel)) if runs == toplevel => " =",
            (Some(_), Some(_)) if shown.state_alone == HostState::AutoUpdated => " +",
            (Some(_), Some(_)) => " ≠",
            _ => "",
        };
        let said = |value: Option<&Option<String>>| value.cloned().flatten().unwrap_or_default();
        let mut row = vec![name.to_string(), shown.state.clone()];
        row.extend(shown.moments().map(|(_, moment)| age(moment)));
        row.extend([
            shown.local_version.clone(),
            format!("{}{mark}", shown.remote_version),
            manifest.map_or(String::new(), |manifest| manifest.release.sequence.to_string()),
            manifest.map_or(String::new(), |manifest| manifest.origin.short()),
            said(manifest.map(|manifest| &manifest.origin.author)),
            said(beat.map(|beat| &beat.kernel)),
            said(beat.map(|beat| &beat.nixos)),
            said(beat.map(|beat| &beat.nixpkgs)),
        ]);
        rows.push(row);
    }
    if !wide {
        for row in &mut rows {
            row.truncate(row.len() - wide_heads.len());
        }
    }
    for (shown, line) in [None].into_iter().chain(hosts.iter().map(|(_, shown)| Some(shown))).zip(table::lines(&rows)) {
        text.extend([&line, "\n"]);
        text.extend(shown.iter().flat_map(|shown| &shown.trouble).map(|line| wrapped(line, "  ")));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::Heartbeat;
    use crate::fleet::hub::host_state::tests::{heartbeat, last, manifest};
    use crate::fleet::hub::status::{Row, hash};
    use crate::run::Outcome;
    use serde_json::Value;

    fn assert_documented(value: &Value) {
        for (key, value) in value.as_object().into_iter().flatten() {
            assert!(include_str!("../README.md").contains(&format!("`{key}`")), "{key}");
            assert_documented(value);
        }
    }

    #[test]
    fn the_table_begins_with_the_gravest_and_fits() {
        let shown = |heartbeat: Heartbeat, state: HostState, trouble: &str| Row {
            state: state.to_string(),
            well: state.trouble() == 0,
            wave: None,
            trouble: trouble.lines().map(String::from).collect(),
            local_version: hash(manifest().toplevel.as_ref().unwrap()),
            remote_version: hash(heartbeat.system.as_ref().unwrap()),
            heard: Some(1080),
            published: Some(manifest()),
            heartbeat: Some(heartbeat),
            state_alone: state,
            exit: state.trouble(),
        };
        let failing = Heartbeat { last: Some(last(None, Outcome::Failed)), ..heartbeat(1) };
        let same = Heartbeat { system: manifest().toplevel, ..heartbeat(2) };
        let hosts = [
            ("a", shown(same.clone(), HostState::UpToDate, "")),
            ("b", shown(heartbeat(2), HostState::Unlisted, "")),
            ("c", shown(failing, HostState::Failing, "no luck ".repeat(12).trim_end())),
            ("d", shown(heartbeat(2), HostState::AutoUpdated, "")),
            ("e", shown(same, HostState::UpToDate, "")),
        ];
        let hosts = hosts.into_iter().map(|(name, shown)| (name.try_into().unwrap(), shown)).collect();
        let rollout = "roll-out of 3f2a91c04b7d: stopped in wave 1: canary is rolled back; ekiben fleet resume, or abort";
        let late = Some("the hub has collected nothing for 3 h".into());
        let hosts = Shown { late, rollout: Some(rollout.into()), stopped: true, hosts };
        hosts.hosts.values().for_each(|row| assert_documented(&serde_json::to_value(row).unwrap()));
        let expected = "\
the hub has collected nothing for 3 h
roll-out of 3f2a91c04b7d: stopped in wave 1: canary is rolled back; ekiben fleet
resume, or abort
5 hosts: 1 failing; 1 not in repository; 1 auto updated; 2 up to date
HOST  STATE              HEARD  RUN    PUBLISHED
c     failing            20 s   1 min  1 min
  no luck no luck no luck no luck no luck no luck no luck no luck no luck no
  luck no luck no luck
b     not in repository  20 s          1 min
d     auto updated       20 s          1 min
a     up to date         20 s          1 min
e     up to date         20 s          1 min
";
        assert_eq!(table(&hosts, false, true, 1100), expected);
        let wide = table(&hosts, true, false, 1100);
        let line = wide.lines().find(|line| line.starts_with('e')).unwrap();
        assert!(line.contains("01234567  01234567 =  2 ") && line.ends_with("6.12    25.05.20250101.0123456"), "{wide}");
        assert!(wide.contains("abcdfghi ≠") && wide.contains("abcdfghi +"), "{wide}");
    }
}
