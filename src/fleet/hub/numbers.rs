//! The numbers of releases: each is higher than all that are known of its host, and none is far ahead of the clock, or a
//! wrong one could leave no room for later ones.

use crate::fleet::DAY;
use crate::names::{HostName, Sequence};
use crate::run::Release;

/// How far apart the clocks of those who publish may be, in seconds.
const APART: u64 = 600;

/// Those of a host that are known to have been published, by the clock of now.
pub struct Numbers {
    known: Vec<Sequence>,
    now: u64,
}

impl Numbers {
    /// Those of these that later ones can exceed, and that of a release that `others` have published, who may have a key of
    /// their own. It may also be the hub that pretends to be one: far from the clock, it does not count.
    pub fn known(host: &HostName, heard: [Option<Sequence>; 3], others: Option<&Release>, now: u64) -> Result<Self, String> {
        let highest = Sequence::try_from(now + DAY)?;
        let (mut known, far): (Vec<_>, Vec<_>) = heard.into_iter().flatten().partition(|number| *number < highest);
        if let Some(number) = far.iter().max() {
            log::warn!(
                "{host} may have seen release {number}, which no later one can exceed: run `ekiben forget-releases` there, as root."
            );
        }
        known.extend(others.map(|release| release.sequence).filter(|number| u64::from(*number) < now + APART));
        Ok(Self { known, now })
    }

    /// Whether a later release than this one is known.
    pub fn exceed(&self, release: &Release) -> bool {
        self.known.iter().any(|number| *number > release.sequence)
    }

    /// The number for a new release: no lower than the seconds since 1970, and higher than that of the release
    /// before and than those that are known. It never jumps: none is more than a day ahead of the clock.
    pub fn next(&self, before: Option<Sequence>) -> Result<Sequence, String> {
        let highest = Sequence::try_from(self.now + DAY)?;
        let before = before.iter().chain(&self.known).max().map(|last| last.next()).transpose()?;
        let next = before.max(Some(self.now.try_into()?)).filter(|next| *next <= highest);
        next.ok_or_else(|| {
            "the number of the last release is more than a day ahead of this machine's clock; set that, or, if it is right, remove the \
             host's `release/manifest.json` from the hub"
                .into()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_follow_the_clock_and_never_jump() {
        const NOW: u64 = 1_800_000_000;
        let number = |number: u64| Sequence::try_from(number).unwrap();
        let next = |before: Option<u64>, known: &[u64]| {
            let known = known.iter().map(|known| number(*known)).collect();
            Numbers { known, now: NOW }.next(before.map(number)).map(u64::from)
        };
        for (before, known, expected) in [
            (None, &[][..], NOW),
            (Some(1), &[2], NOW),
            // twice in one second, or by a clock that is ahead
            (Some(NOW), &[], NOW + 1),
            (Some(5), &[NOW + 100], NOW + 101),
            (Some(NOW + DAY - 1), &[], NOW + DAY),
            (Some(NOW + 3), &[NOW + 1], NOW + 4),
        ] {
            assert_eq!(next(before, known), Ok(expected), "{before:?} {known:?}");
        }
        assert!(next(Some(NOW + DAY), &[]).unwrap_err().contains("clock"));
        assert!(next(Some(1 << 40), &[]).is_err());
    }
}
