//! What a run proposes, in words: the message of its commit, its summary, and what the log says of it.

use crate::run::Release;
use crate::run::notes::Proposal;

/// Inputs, each with its old and its new revision.
type Changes = [(String, String, String)];

/// The commit message: which inputs in the first line, their old and new revisions below.
pub fn message(changes: &Changes) -> String {
    let lines: Vec<_> = changes.iter().map(revisions).collect();
    format!("flake.lock: update {}\n\n{}\n", names(changes), lines.join("\n"))
}

/// One of these, in a line.
pub fn revisions((name, old, new): &(String, String, String)) -> String {
    format!("{name}: {old} -> {new}")
}

fn names(changes: &Changes) -> String {
    changes.iter().map(|(name, ..)| name.as_str()).collect::<Vec<_>>().join(", ")
}

/// What is new, in a line; empty if nothing is.
pub fn summary(head: &str, base: &str, changes: &Changes, release: Option<&Release>) -> String {
    let pull = release.map_or("pull".into(), |release| format!("release {}", release.sequence));
    match (head == base, changes.is_empty()) {
        (true, true) => String::new(),
        (true, false) => format!("update {}", names(changes)),
        (false, true) => pull,
        (false, false) => format!("{pull}, update {}", names(changes)),
    }
}

/// What there is to say of a proposal in the log.
pub fn describe(proposal: &Proposal) -> String {
    if let Some(why) = &proposal.withheld {
        format!("Not deploying {}: {why}", proposal.commit)
    } else if proposal.unchanged {
        format!("Nothing is new: {} has been deployed", proposal.commit)
    } else if proposal.summary.is_empty() {
        format!("Found {}, which has not been deployed yet", proposal.commit)
    } else {
        format!("Proposed {}: {}", proposal.commit, proposal.summary)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_names_inputs_and_revisions() {
        let changes = [("app".into(), "1a".into(), "2b".into()), ("lib".into(), "none".into(), "3c".into())];
        assert_eq!(message(&changes), "flake.lock: update app, lib\n\napp: 1a -> 2b\nlib: none -> 3c\n");
        assert_eq!(summary("a", "a", &changes, None), "update app, lib");
        assert_eq!(summary("a", "b", &[], None), "pull");
    }
}
