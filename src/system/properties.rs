//! What systemctl says of units.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::error::{Context, Result};
use crate::gather::gather;
use crate::json;
use crate::system::systemctl;

/// A unit as `systemctl list-units` shows it.
#[derive(Deserialize)]
pub struct Listed {
    #[serde(rename = "unit")]
    pub name: String,
    pub load: String,
    pub active: String,
    sub: String,
}

impl Listed {
    /// Whether systemd waits to start it again.
    pub fn is_restarting(&self) -> bool {
        self.sub.starts_with("auto-restart")
    }
}

/// The units that `systemctl list-units` lists with the option `which`.
pub fn listed(which: &str) -> Result<Vec<Listed>> {
    let list = systemctl(&["list-units", which, "--full", "--no-pager", "--output=json"])?;
    json::parse(list.as_bytes()).context(|| "read the list of units".into())
}

/// What `systemctl show` says of these properties of `units`: of each, if none is a pattern; moments as `--timestamp=unix`
/// has them. For that, systemd looks all of a unit's properties up, which costs it a millisecond or two for one at rest.
pub fn show(properties: &str, units: &[&str]) -> Result<String> {
    if units.is_empty() {
        // of systemd itself, else
        return Ok(String::new());
    }
    systemctl(&[&["show", "--timestamp=unix", "--property", properties, "--"], units].concat())
}

/// The properties of one unit, a line each.
pub struct Properties<'a>(&'a str);

impl<'a> Properties<'a> {
    /// Those of one unit.
    pub fn one(said: &'a str) -> Self {
        Self(said)
    }

    /// Those of all units that were asked about.
    pub fn all(said: &'a str) -> impl Iterator<Item = Self> {
        said.split("\n\n").map(Self)
    }

    /// The same, by their names.
    pub fn by_name(said: &'a str) -> BTreeMap<&'a str, Self> {
        gather(Self::all(said).map(|unit| (unit.of("Id"), unit)))
    }

    /// The values of a property: there may be several.
    pub fn each(&self, key: &'static str) -> impl Iterator<Item = &'a str> {
        self.0.lines().filter_map(move |line| line.strip_prefix(key)?.strip_prefix('='))
    }

    /// The value of a property; empty, if there is none.
    pub fn of(&self, key: &'static str) -> &'a str {
        self.each(key).next().unwrap_or_default()
    }

    /// The names of units that a property has.
    pub fn names(&self, key: &'static str) -> impl Iterator<Item = &'a str> + use<'a> {
        self.of(key).split_whitespace()
    }

    /// Whether a unit's configuration says not to start it now.
    pub fn is_skipped(&self) -> bool {
        self.of("Result") == "exec-condition" || self.of("ConditionResult") == "no" && self.number("ConditionTimestampMonotonic") > 0
    }

    /// Whether a unit is not up, and need not be: its configuration says so, it is to wait, or it has done its work. `is_up`
    /// are those that are.
    pub fn rests_rightly(&self, is_up: impl Fn(&str) -> bool) -> bool {
        // it is started when somebody connects, or looks
        let on_demand = |name: &str| [".socket", ".automount"].iter().any(|kind| name.ends_with(kind));
        let waits = || self.names("TriggeredBy").any(|name| on_demand(name) && is_up(name));
        self.is_skipped() || self.of("Result") == "success" && (waits() || self.has_ended_by_itself())
    }

    /// A process that ends makes its unit inactive; one that is ended for that ends after it.
    fn has_ended_by_itself(&self) -> bool {
        let ended = self.number("ExecMainExitTimestampMonotonic");
        self.of("RemainAfterExit") == "no" && 0 < ended && ended <= self.number("ActiveExitTimestampMonotonic")
    }

    /// A number, or a moment as `--timestamp=unix` has it; 0, if there is none.
    pub fn number(&self, key: &'static str) -> u64 {
        self.of(key).trim_start_matches('@').parse().unwrap_or(0)
    }
}
