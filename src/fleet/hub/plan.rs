//! What is to be rolled out in waves: which host gets what, and when. Whoever publishes writes it; it is read as a stranger's.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::config::Wave;
use crate::error::{Context, OrLog, Result};
use crate::files;
use crate::fleet::hub::publication::PLAN;
use crate::fleet::hub::served::ServedDirectory;
use crate::fleet::{FORMAT, LARGE, Provenance};
use crate::names::{HostName, Sequence};
use crate::run::Release;

/// A plan; one without waves is none.
#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Plan {
    /// [`FORMAT`].
    pub format: u32,
    /// What tells it from all others.
    pub id: String,
    /// What all is made from.
    pub origin: Provenance,
    pub waves: Vec<Wave>,
    pub hosts: Vec<Member>,
}

/// A host in it.
#[derive(Clone, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Member {
    pub host: HostName,
    /// In which wave, from 0 on.
    pub wave: usize,
    /// What it is to get.
    pub release: Release,
    /// In the place of what; of the same, if it has that already.
    pub before: Option<Release>,
    /// What it ran well when that was planned.
    pub good: Option<Sequence>,
    /// After how many seconds it is silent.
    pub silent_after: u64,
}

impl Member {
    /// Whether it is to get something else than it had when that was planned.
    pub fn is_new(&self) -> bool {
        self.before.as_ref() != Some(&self.release)
    }
}

impl Plan {
    /// Where it is.
    pub fn file(hub: &ServedDirectory) -> PathBuf {
        hub.rollout().join(PLAN)
    }

    /// The one that there is; what is no plan is none.
    pub fn read(hub: &ServedDirectory) -> Option<Self> {
        let file = Self::file(hub);
        let plan: Self = files::read_foreign_json(&file, LARGE).or_warn().flatten()?;
        if plan.format > FORMAT {
            let (file, format) = (file.display(), plan.format);
            log::warn!(
                "Failed to read {file}: unsupported format {format}, expected {FORMAT}: its waves go on once Ekiben is updated here"
            );
        }
        let is_plan = plan.format == FORMAT && !plan.waves.is_empty() && plan.hosts.iter().all(|member| member.wave < plan.waves.len());
        is_plan.then_some(plan)
    }

    /// Puts it in the place of the one that there was when the hub was looked at.
    pub fn replace(&self, hub: &ServedDirectory) -> Result<()> {
        let file = Self::file(hub);
        let Some(elsewhere) = hub.elsewhere() else { return files::write_json(&file, self, 0o644) };
        let new = file.with_extension("new");
        files::write_json(&new, self, 0o644)?;
        elsewhere.plan(&new)?;
        fs::rename(new, &file).doing("write", &file)
    }

    /// What a host is to get.
    pub fn get(&self, host: &HostName) -> Option<&Member> {
        self.hosts.iter().find(|member| member.host == *host)
    }

    /// The number of the wave, from 1 on, that a host waits for, which sees this release.
    pub fn waits(&self, host: &HostName, sees: Option<&Release>) -> Option<usize> {
        let member = self.get(host)?;
        (sees == member.before.as_ref() && sees != Some(&member.release)).then_some(member.wave + 1)
    }
}

/// In which waves hosts are, in the order of `known`, which are those that there are: who is in none comes last. Of others
/// nothing is known only if `some` could not be looked at.
pub fn assign(
    waves: &[Wave],
    groups: &BTreeMap<HostName, Vec<HostName>>,
    known: &[&HostName],
    some: bool,
) -> Result<(Vec<Wave>, Vec<usize>)> {
    let (mut kept, mut places) = (Vec::new(), vec![usize::MAX; known.len()]);
    let last = Wave { hosts: vec!["*".into()], ..Wave::default() };
    for wave in waves.iter().chain([&last]) {
        let (number, mut is_one) = (kept.len(), false);
        for word in &wave.hosts {
            let group = word.strip_prefix('@').and_then(|name| groups.iter().find(|(group, _)| ***group == *name));
            let is_meant = |host: &HostName| word == "*" || **host == **word || group.is_some_and(|(_, hosts)| hosts.contains(host));
            let mut is_known = word == "*" || group.is_some_and(|(_, hosts)| hosts.is_empty());
            for (_, place) in known.iter().zip(&mut places).filter(|(host, _)| is_meant(host)) {
                is_known = true;
                is_one |= *place == usize::MAX;
                *place = number.min(*place);
            }
            if !is_known && !some {
                let what = if group.is_some() { "host of group" } else { "host or group" };
                return Err(format!("there is no {what} {word:?}")).context(|| "understand the waves".into());
            }
            is_one |= !is_known;
        }
        if is_one {
            kept.push(wave.clone());
        }
    }
    Ok((kept, places))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(name: &str) -> HostName {
        name.try_into().unwrap()
    }

    #[test]
    fn hosts_are_in_the_first_wave_that_names_them() {
        let known = ["a", "b", "c", "d"].map(name);
        let groups = [("laptops", &["b", "x", "a"][..]), ("none", &[]), ("gone", &["x", "y"])];
        let groups = groups.map(|(group, hosts)| (name(group), hosts.iter().map(|host| name(host)).collect())).into();
        let places = |waves: &[&[&str]], some| {
            let waves: Vec<_> =
                waves.iter().map(|hosts| Wave { hosts: hosts.iter().map(ToString::to_string).collect(), ..Wave::default() }).collect();
            let known: Vec<_> = known.iter().collect();
            let assigned = assign(&waves, &groups, &known, some).map_err(|error| error.to_string())?;
            let text: Vec<_> = known.iter().zip(&assigned.1).map(|(host, wave)| format!("{host}{wave}")).collect();
            Ok::<_, String>((assigned.0.len(), text.join(" ")))
        };
        let of = |count: usize, text: &str| Ok((count, text.to_owned()));
        assert_eq!(places(&[], false), of(1, "a0 b0 c0 d0"));
        assert_eq!(places(&[&["c"], &["@laptops", "c"], &["*"]], false), of(3, "a1 b1 c0 d2"));
        assert_eq!(places(&[&["*"], &["c"]], false), of(1, "a0 b0 c0 d0"));
        // those that are in none come last, and a wave of nobody is none
        assert_eq!(places(&[&["@none"], &["c"]], false), of(2, "a1 b1 c0 d1"));
        // what is misspelt, or removed, must not have all the others get it at once
        assert!(places(&[&["canary"], &["*"]], false).unwrap_err().contains("no host or group \"canary\""));
        assert!(places(&[&["@canaries"], &["*"]], false).is_err());
        assert!(places(&[&["@gone"], &["*"]], false).unwrap_err().contains("no host of group \"@gone\""));
        // nor must what could not be looked at
        for word in ["canary", "@gone"] {
            assert_eq!(places(&[&[word], &["*"]], true), of(2, "a1 b1 c1 d1"), "{word}");
        }
    }
}
