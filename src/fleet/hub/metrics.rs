//! The state of all hosts as a text file for Prometheus, as the hub has collected it.

use crate::fleet::hub::status::{Row, Shown};
use crate::run::metrics::{Sample, family, label};

/// One family of metrics: its name, what it tells, and its sample of a host.
type Family = (&'static str, &'static str, fn(&Row) -> Option<Sample>);

const FAMILIES: [Family; 6] = [
    ("host_well", "Whether there is nothing to see to of the host.", |row| plain(Some(u64::from(row.well)))),
    ("host_state", "The state of the host.", |row| Some((label("state", &row.state_alone.to_string()), 1))),
    ("host_heard_timestamp_seconds", "When the host has been heard of last.", |row| plain(row.heard)),
    ("host_last_run_timestamp_seconds", "When the last run of the host has ended.", |row| plain(row.last_run())),
    ("host_release_timestamp_seconds", "When the release of the host has been published.", |row| plain(row.published_at())),
    ("host_release_expiry_timestamp_seconds", "When the release of the host expires.", |row| plain(row.published.as_ref()?.expires)),
];

fn plain(value: Option<u64>) -> Option<Sample> {
    value.map(|value| (String::new(), value))
}

/// The file.
pub fn text(shown: &Shown, _: u64) -> String {
    let mut lines = Vec::new();
    for (name, help, sample) in FAMILIES {
        let of_all =
            shown.hosts.iter().filter_map(|(host, row)| sample(row).map(|(labels, value)| (format!("host=\"{host}\"{labels}"), value)));
        family(&mut lines, name, help, of_all.collect());
    }
    let stopped = vec![(String::new(), u64::from(shown.stopped))];
    family(&mut lines, "rollout_stopped", "Whether a roll-out has been stopped.", stopped);
    lines.join("\n") + "\n"
}
