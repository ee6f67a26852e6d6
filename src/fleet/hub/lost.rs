//! What hosts lose by what is about to be published: releases of commits that are not part of it, as where somebody deploys
//! from a clone that is behind.

use crate::fleet::hub::repository::{FleetRepository, Host};
use crate::fleet::hub::served::ServedDirectory;
use crate::fleet::{Manifest, Provenance};
use crate::system::now;
use crate::text::ago;

/// What is published for these hosts, of another configuration, and of a commit that is not part of `origin`.
pub fn lost<'a>(
    hub: &ServedDirectory,
    repository: &FleetRepository,
    origin: &Provenance,
    hosts: impl Iterator<Item = &'a Host>,
) -> Vec<Manifest> {
    let replaced = |host: &Host| {
        // what cannot be read is said where it is replaced
        let (manifest, _) = hub.manifest(&host.name).ok()??.ok()?;
        let is_same = (&manifest.sha256, &manifest.attr) == (&host.source.sha256, &host.attr);
        Some(manifest).filter(|manifest| !is_same && origin.commit.is_some() && manifest.origin.commit != origin.commit)
    };
    let mut found: Vec<_> = hosts.filter_map(replaced).collect();
    let lacking = repository.lacks(found.iter().filter_map(|manifest| manifest.origin.commit.clone()).collect());
    found.retain(|manifest| manifest.origin.commit.as_ref().is_some_and(|commit| lacking.contains(commit)));
    found
}

/// What there is to say of that.
pub fn said(lost: &[Manifest]) -> Option<String> {
    let Manifest { origin, published, .. } = lost.iter().max_by_key(|manifest| manifest.published)?;
    let hosts = if lost.len() == 1 { "1 host loses".into() } else { format!("{} hosts lose", lost.len()) };
    let by = origin.author.as_ref().map(|author| format!(" by {author}")).unwrap_or_default();
    Some(format!(
        "{hosts} what has been published, last {} from commit {}{by}: it is not part of what is published now; \
         to have both, bring them together (git pull), and publish again",
        ago(*published, now()),
        origin.short()
    ))
}
