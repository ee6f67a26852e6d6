//! A candidate that is known to be bad: it is not tried again unasked, nor too often.

use serde::{Deserialize, Serialize};

use crate::config::Instance;
use crate::error::{Error, Result};
use crate::run::hold::moment;
use crate::run::notes::Proposal;
use crate::system::now;
use crate::text::times;

/// How long what is known to be bad is not tried again when it was tried once, in seconds; twice that for each more.
const FIRST_PAUSE: u64 = 60;
/// No pause is longer.
const LONGEST_PAUSE: u64 = 3600;

/// A candidate that failed by its own fault.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Bad {
    /// What it was made from.
    pub base: String,
    /// What was in it: unlike the commit, the same if it is made again.
    pub tree: String,
    /// How it was to be deployed.
    pub options: Instance,
    /// The commit that was tried last.
    #[serde(default)]
    pub commit: String,
    /// What came of it.
    #[serde(default)]
    pub error: String,
    /// How often it has been tried.
    #[serde(default)]
    pub tries: u32,
    /// When it was tried last, in seconds since 1970.
    #[serde(default)]
    pub tried: u64,
}

impl Bad {
    /// Whether a candidate is this one, made with the same options.
    pub fn is(&self, proposal: &Proposal, options: &Instance) -> bool {
        (&*self.base, &*self.tree, &self.options) == (&*proposal.base, &*proposal.tree, options)
    }

    /// How long it is not tried again after it was tried last, in seconds, whoever asks: each try disturbs what
    /// runs, and whoever may ask may not mean well. The first pause is no longer than it takes to mend something.
    fn pause(&self) -> u64 {
        (FIRST_PAUSE << self.tries.saturating_sub(1).min(16)).min(LONGEST_PAUSE)
    }

    /// Fails if the candidate is this one, and was not asked for, or too soon.
    pub fn check(&self, instance: &str, proposal: &Proposal, options: &Instance, is_asked: bool) -> Result<()> {
        // a clock that has been set back does not make that longer
        let is_too_early = now().abs_diff(self.tried) < self.pause();
        if !self.is(proposal, options) || is_asked && !is_too_early {
            return Ok(());
        }
        let ask = format!("run `ekiben trigger {instance}` to try it again");
        // what is read later, too; a moment has no seconds
        let wait = if is_too_early { format!(", not before {}", moment(self.retry_after() + 59)) } else { String::new() };
        let (commit, tries, when) = (&proposal.commit, times(self.tries), moment(self.tried));
        Err(Error::new(format!(
            "Failed to deploy {commit}: it is known to be bad (tried {tries}, last on {when}; {ask}{wait}): {}",
            self.error
        )))
    }

    /// From when on it may be tried again if somebody asks for it, in seconds since 1970.
    pub fn retry_after(&self) -> u64 {
        self.tried + self.pause()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    use crate::testing::instance;

    fn bad(tries: u32, tried: u64) -> Bad {
        let (hash, error) = ("0".repeat(40), "Failed to pass health check app".into());
        let options = instance(Path::new("/srv/x"));
        Bad { base: hash.clone(), tree: hash.clone(), options, commit: hash, error, tries, tried }
    }

    fn try_again(bad: &Bad, is_asked: bool) -> Result<()> {
        let proposal = serde_json::json!({
            "base": bad.base, "branch": "refs/heads/main", "head": bad.base, "commit": bad.commit, "tree": bad.tree,
            "summary": "", "unchanged": false,
        });
        let proposal = serde_json::from_value(proposal).unwrap();
        bad.check("app", &proposal, &bad.options, is_asked)
    }

    #[test]
    fn what_is_bad_is_tried_again_when_asked_for_and_less_and_less_often() {
        let now = now();
        assert!(try_again(&bad(1, now - 61), true).is_ok());
        let error = try_again(&bad(1, now - 61), false).unwrap_err().to_string();
        // as true later as now
        let last = format!("known to be bad (tried once, last on {}; run `ekiben trigger app` to try it again)", moment(now - 61));
        assert!(error.contains(&last), "{error}");
        assert!(error.ends_with("Failed to pass health check app"), "{error}");
        let error = try_again(&bad(3, now - 61), true).unwrap_err().to_string();
        let from = moment((now - 61 + 240).next_multiple_of(60));
        assert!(error.contains(&format!("to try it again, not before {from})")), "{error}");
        assert!(try_again(&bad(3, now - 241), true).is_ok());
        assert!(try_again(&bad(100, now - 3590), true).is_err());
        assert!(try_again(&bad(100, now - 3601), true).is_ok());
        // the clock has been set back by a day
        assert!(try_again(&bad(1, now + 86400), true).is_ok());
    }
}
