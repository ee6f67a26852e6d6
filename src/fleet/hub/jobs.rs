//! Work on several hosts at once, and how it goes: on a terminal a line for each that is under way,
//! and for each that is done a line that stays.

use std::io::{IsTerminal, Write};
use std::sync::{Mutex, PoisonError};

use crate::text;

/// How many lines of a failing build's log are repeated.
pub const LINES: usize = 10;

/// Does `work` on all items, at most `jobs` at a time; returns what came of each, in their order.
pub fn parallel<T: Sync, R: Send>(items: &[T], jobs: usize, work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let next = Mutex::new(items.iter().enumerate());
    let done = Mutex::new(items.iter().map(|_| None).collect::<Vec<_>>());
    let take = || next.lock().unwrap_or_else(PoisonError::into_inner).next();
    std::thread::scope(|scope| {
        for _ in 0..jobs.min(items.len()) {
            scope.spawn(|| {
                while let Some((number, item)) = take() {
                    let result = work(item);
                    done.lock().unwrap_or_else(PoisonError::into_inner)[number] = Some(result);
                }
            });
        }
    });
    done.into_inner().unwrap_or_else(PoisonError::into_inner).into_iter().flatten().collect()
}

/// What is under way.
pub struct Board {
    terminal: bool,
    /// Whether standard output is for something else.
    aside: bool,
    /// Names, and what is being done.
    lines: Mutex<Vec<(String, String)>>,
}

impl Board {
    /// An empty one.
    pub fn new(aside: bool) -> Self {
        Self { terminal: !aside && std::io::stdout().is_terminal(), aside, lines: Mutex::default() }
    }

    /// Says what is being done to a host.
    pub fn begin(&self, name: &str, what: &str) {
        let line = if self.terminal { String::new() } else { format!("{name}: {what} ...\n") };
        self.change(name, Some(what), &line);
    }

    /// Says what came of it: lines that stay.
    pub fn end(&self, name: &str, what: &str) {
        self.change(name, None, &text::lines(&format!("{name}: {what}\n")));
    }

    fn change(&self, name: &str, what: Option<&str>, lasting: &str) {
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        let mut text = lasting.to_owned();
        if self.terminal {
            // up to where the lines begin, and away with them
            let up = if lines.is_empty() { String::new() } else { format!("\x1b[{}A\x1b[J", lines.len()) };
            text.insert_str(0, &up);
        }
        lines.retain(|(other, _)| other != name);
        lines.extend(what.map(|what| (name.to_owned(), what.to_owned())));
        if self.terminal {
            text.extend(lines.iter().map(|(name, what)| format!("{name}: {what} ...\n")));
        }
        // the reader may be gone
        if self.aside {
            let _ = std::io::stderr().write_all(text.as_bytes());
        } else {
            let mut output = std::io::stdout().lock();
            let _ = output.write_all(text.as_bytes()).and_then(|()| output.flush());
        }
    }
}
