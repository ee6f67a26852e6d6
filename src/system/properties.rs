//! What `systemctl show` says of units.

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

    /// The values of a property: there may be several.
    pub fn each(&self, key: &'static str) -> impl Iterator<Item = &'a str> {
        self.0.lines().filter_map(move |line| line.strip_prefix(key)?.strip_prefix('='))
    }

    /// The value of a property; empty, if there is none.
    pub fn of(&self, key: &'static str) -> &'a str {
        self.each(key).next().unwrap_or_default()
    }

    /// A number, or a moment as `--timestamp=unix` has it; 0, if there is none.
    pub fn number(&self, key: &'static str) -> u64 {
        self.of(key).trim_start_matches('@').parse().unwrap_or(0)
    }
}
