//! How far a build of nix has come, by the lines that it prints: for systemd, which shows it to whoever asks.

use crate::system::show;

/// What the text begins with that systemd has.
pub const BEGIN: &str = "progress: ";

/// What is to be built and fetched, and has been begun.
#[derive(Debug, Default)]
pub struct Progress {
    /// How many derivations, and how many of them have been begun.
    built: (u32, u32),
    /// The same of paths that are fetched.
    fetched: (u32, u32),
}

impl Progress {
    /// Takes a line in; whether that has changed anything.
    fn hear(&mut self, line: &str) -> bool {
        let announced = |one: &str, many: &str| {
            let count = line.strip_prefix("these ").and_then(|line| line.split_once(' ')).filter(|(_, rest)| rest.starts_with(many));
            count.and_then(|(count, _)| count.parse::<u32>().ok()).or_else(|| line.starts_with(one).then_some(1))
        };
        if let Some(count) = announced("this derivation will be built", "derivations will be built") {
            self.built.0 += count;
        } else if let Some(count) = announced("this path will be fetched", "paths will be fetched") {
            self.fetched.0 += count;
        } else if line.starts_with("building '/nix/store/") {
            self.built.1 += 1;
        } else if line.starts_with("copying path '/nix/store/") {
            self.fetched.1 += 1;
        } else {
            return false;
        }
        true
    }

    /// In words.
    fn text(&self) -> String {
        let part = |what: &str, (all, begun): (u32, u32)| (all > 0).then(|| format!("{what} {} of {all}", begun.min(all)));
        [part("fetching", self.fetched), part("building", self.built)].into_iter().flatten().collect::<Vec<_>>().join(", ")
    }

    /// What hears a build, and tells systemd.
    pub fn teller() -> impl FnMut(&str) {
        let mut progress = Self::default();
        move |line| {
            if progress.hear(line) {
                show(&format!("{BEGIN}{}", progress.text()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_nix_are_counted() {
        let mut progress = Progress::default();
        let store = "/nix/store/0123456789abcdfghijklmnpqrsvwxyz-x";
        for (line, text) in [
            ("evaluating", ""),
            ("these 12 derivations will be built:", "building 0 of 12"),
            (&format!("  {store}.drv"), "building 0 of 12"),
            ("this path will be fetched (0.1 MiB download, 0.5 MiB unpacked):", "fetching 0 of 1, building 0 of 12"),
            (&format!("copying path '{store}' from 'https://cache.example.org'..."), "fetching 1 of 1, building 0 of 12"),
            (&format!("copying path '{store}' to 'local'..."), "fetching 1 of 1, building 0 of 12"),
            (&format!("building '{store}.drv'..."), "fetching 1 of 1, building 1 of 12"),
            ("x> building things", "fetching 1 of 1, building 1 of 12"),
        ] {
            progress.hear(line);
            assert_eq!(progress.text(), text, "{line}");
        }
    }
}
