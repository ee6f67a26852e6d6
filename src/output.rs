//! Standard output: what is printed there has passed [`crate::text`], and a reader may stop reading at any point.

use std::io::{BufRead, BufReader, ErrorKind, IsTerminal, Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use serde::Serialize;

use crate::error::{Context, Result};
use crate::text::{is_shown, lines};

/// Whether the line on the terminal is for now.
static IS_FOR_NOW: AtomicBool = AtomicBool::new(false);
/// How many columns a terminal is taken to have.
const COLUMNS: usize = 80;
/// How much of what is read may be shown at once, in bytes.
const PIECE: u64 = 64 * 1024;

/// Shows lines on standard output; a reader that has gone is no error.
pub fn print(text: &str) -> Result<()> {
    write_out(&lines(text))
}

/// The same for all that is read, as it comes, piece by piece.
pub fn print_all(from: impl Read) -> Result<()> {
    let (mut from, mut piece) = (BufReader::new(from), Vec::new());
    while (&mut from).take(PIECE).read_until(b'\n', &mut piece).context(|| "read what is to be shown".into())? > 0 {
        print(&String::from_utf8_lossy(&piece))?;
        piece.clear();
    }
    Ok(())
}

/// The same; on a terminal wrapped, with so many columns in front of what is continued, and, unless `NO_COLOR` is set, the
/// first of these words that a line has is of its colour.
pub fn print_marked(text: &str, indent: usize, marks: &[(&str, u8)]) -> Result<()> {
    if !std::io::stdout().is_terminal() {
        return print(text);
    }
    let marks = if std::env::var_os("NO_COLOR").is_some_and(|set| !set.is_empty()) { &[] } else { marks };
    let marked = |line: &str| {
        let (mark, line) = (marks.iter().find(|(word, _)| line.contains(word)), wrapped(line, indent));
        mark.map_or_else(|| line.clone(), |(word, colour)| line.replacen(word, &format!("\x1b[{colour}m{word}\x1b[0m"), 1))
    };
    write_out(&lines(text).lines().map(marked).collect::<String>())
}

/// A line as lines that fit on a terminal, unless a word does not.
pub fn wrapped(text: &str, indent: usize) -> String {
    let (mut lines, mut line) = (String::new(), String::new());
    for word in text.split_inclusive(' ') {
        let columns = line.chars().count() + word.trim_end().chars().count();
        if columns > COLUMNS && line.chars().count() > indent {
            lines.extend([line.trim_end(), "\n"]);
            line = " ".repeat(indent);
        }
        line.push_str(word);
    }
    lines + &line + "\n"
}

/// Shows a value as JSON. What may not be shown is escaped, so that nothing is lost.
pub fn print_json(value: &impl Serialize) -> Result<()> {
    let mut text = String::new();
    for letter in serde_json::to_string_pretty(value).context(|| "write JSON".into())?.chars() {
        if letter == '\n' || is_shown(letter) {
            text.push(letter);
        } else {
            text.extend(letter.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")));
        }
    }
    text.push('\n');
    write_out(&text)
}

/// Shows a line on a terminal that is gone with the next that is shown; `None` clears it. Nothing elsewhere.
pub fn print_for_now(text: Option<&str>) {
    let is_shown = IS_FOR_NOW.load(Ordering::Relaxed);
    if std::io::stdout().is_terminal() && (is_shown || text.is_some()) {
        // one that is longer would not be cleared
        let line: String = lines(text.unwrap_or_default()).chars().take(COLUMNS - 1).collect();
        let _ = write_out(&line);
        IS_FOR_NOW.store(text.is_some(), Ordering::Relaxed);
    }
}

fn write_out(text: &str) -> Result<()> {
    let mut output = std::io::stdout().lock();
    let clear = if IS_FOR_NOW.swap(false, Ordering::Relaxed) { "\r\x1b[K" } else { "" };
    match output.write_all(clear.as_bytes()).and_then(|()| output.write_all(text.as_bytes())).and_then(|()| output.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        other => other.context(|| "write to standard output".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_wrapped_between_words_and_nothing_of_it_is_lost() {
        assert_eq!(wrapped("", 2), "\n");
        let row = format!("a  {}  b", "x".repeat(74));
        assert_eq!(wrapped(&row, 2), format!("{row}\n"));
        assert_eq!(wrapped(&format!("{row} c"), 2), format!("{row}\n  c\n"));
        let path = "/".repeat(90);
        assert_eq!(wrapped(&format!("  log       {path} b"), 12), format!("  log       {path}\n            b\n"));
    }
}
