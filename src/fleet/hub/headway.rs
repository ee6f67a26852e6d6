//! How far the hub has come with a roll-out. It alone writes that down, where nobody else can.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::files;
use crate::fleet::LARGE;
use crate::fleet::hub::health::Seen;
use crate::fleet::hub::plan::Plan;
use crate::fleet::hub::served::ServedDirectory;
use crate::names::{HostName, Sequence};

/// Where a roll-out stands.
#[derive(Default, Deserialize, Serialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Headway {
    /// Of which plan.
    pub id: String,
    /// The last wave that has begun.
    pub wave: usize,
    /// On which number hosts have been healthy, and since when.
    pub healthy: BTreeMap<HostName, (Sequence, u64)>,
    /// Since when the hub hears them without a gap, in seconds since 1970.
    pub hears_since: u64,
    /// How often it has been stopped, and why it is.
    pub stops: usize,
    pub stopped: Option<String>,
    /// Whose failures count no more, and how many waves need no host that is well.
    pub forgiven: Vec<HostName>,
    pub waived: usize,
    /// Whether all waves have been, and are well.
    pub done: bool,
}

impl Headway {
    pub fn file(hub: &ServedDirectory) -> PathBuf {
        hub.collected().join("rollout.json")
    }

    pub fn read(hub: &ServedDirectory) -> Result<Self> {
        let found = files::read_foreign_json(&Self::file(hub), LARGE);
        let way_out = |error| Error::new(format!("{error}; remove it to have the hosts looked at again from the first wave on"));
        found.map(Option::unwrap_or_default).map_err(way_out)
    }

    /// The same with this plan: where it is not of that, it begins anew.
    pub fn with(self, plan: &Plan) -> Self {
        // whoever wrote the plan may have put another one in its place by the same name
        if self.id == plan.id && self.wave < plan.waves.len() {
            return self;
        }
        // who is healthy stays so
        Self { id: plan.id.clone(), healthy: self.healthy, hears_since: self.hears_since, ..Self::default() }
    }

    /// Notes since when the hub hears hosts, and of all what has arrived last. Who had not soaked before has to from then on:
    /// nobody knows what was meanwhile, nor, where it was the clock that went on, whether any time has passed.
    pub fn hear_since(&mut self, hears_since: u64, plan: &Plan, seen: &[Seen]) {
        if std::mem::replace(&mut self.hears_since, hears_since) == hears_since {
            return;
        }
        for (member, _, arrived, _) in seen {
            let soak = plan.waves[member.wave].soak;
            if let Some((_, since)) = self.healthy.get_mut(&member.host)
                && (*arrived >= hears_since || *arrived < since.saturating_add(soak))
            {
                *since = hears_since.max(*since);
            }
        }
    }

    /// Since when a host has been healthy on this number, by what has arrived by then: a clock that was ahead has noted what is
    /// yet to come.
    pub fn since(&self, host: &HostName, offered: Option<Sequence>, arrived: u64) -> Option<u64> {
        let by = arrived.max(self.hears_since);
        self.healthy.get(host).filter(|(number, since)| Some(*number) == offered && *since <= by).map(|(_, since)| *since)
    }

    /// What tells its last stop from others, or, if it is not stopped, where it stands.
    pub fn stop(&self) -> String {
        let stop = format!("{} {}", self.id, self.stops);
        if self.stopped.is_some() { stop } else { format!("{stop} {}", self.wave) }
    }
}
