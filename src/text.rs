//! Text fit to show. Whatever reaches a terminal, the journal, a status or a report has passed here:
//! one place decides which characters may be shown, how long a line may be, and what is a secret in it.
//!
//! A program that speaks to us, a hub, a host, a forge: none of them can move a cursor, turn a line
//! around, forge a second line or flood a screen.

use serde_json::Value;

/// How many characters of one line are shown.
pub const LINE: usize = 1000;
/// How many seconds a moment that has passed may be ahead, without a word.
const SKEW: u64 = 60;
/// Takes the place of a character that is not shown.
const REPLACEMENT: char = '\u{fffd}';
/// Takes the place of a secret.
const MASK: &str = "***";
/// What the name of a parameter of a URL has in it if its value is a secret, in lower case.
const SECRET: [&str; 7] = ["token", "secret", "passw", "key", "auth", "sig", "credential"];

/// One line, as it may be shown: no control, format or separator characters (Unicode's categories Cc,
/// Cf, Cn, Co, Zl, Zp, and Zs but for the space), no credentials of URLs, at most [`LINE`] characters.
pub fn line(text: &str) -> String {
    let mut shown: String = text.chars().take(LINE + 1).map(|letter| if is_shown(letter) { letter } else { replaced(letter) }).collect();
    if text.chars().nth(LINE).is_some() {
        shown.truncate(shown.char_indices().nth(LINE - 1).map_or(0, |(at, _)| at));
        shown.push('…');
    }
    masked(&shown)
}

/// The same for a text of several lines.
pub fn lines(text: &str) -> String {
    let mut shown: String = text.lines().map(|text| line(text) + "\n").collect();
    if !text.ends_with('\n') {
        shown.pop();
    }
    shown
}

/// Makes all texts of a JSON value fit to show, each as one line.
pub fn make_fit(value: &mut Value) {
    match value {
        Value::String(text) => *text = line(text),
        Value::Array(values) => values.iter_mut().for_each(make_fit),
        Value::Object(values) => values.values_mut().for_each(make_fit),
        _ => {}
    }
}

/// Debug escapes what cannot be printed; behind a letter, marks that belong to it can be.
pub fn is_shown(letter: char) -> bool {
    if letter.is_ascii() {
        return matches!(letter, ' '..='~');
    }
    let mut text = [b'a', 0, 0, 0, 0];
    let length = letter.encode_utf8(&mut text[1..]).len();
    std::str::from_utf8(&text[..=length]).is_ok_and(|text| text.escape_debug().count() == 2)
}

fn replaced(letter: char) -> char {
    if letter == '\t' { ' ' } else { REPLACEMENT }
}

/// Masks the passwords of URLs, user names that are secrets (`https://token@host`), values of
/// parameters that sound like secrets, what follows `Bearer` and `Basic`, and access tokens of Nix.
fn masked(text: &str) -> String {
    let mut rest = text;
    let mut shown = String::with_capacity(text.len());
    while let Some(found) = next_secret(rest) {
        shown.push_str(&rest[..found.0]);
        shown.push_str(MASK);
        rest = &rest[found.1..];
    }
    shown + rest
}

/// Where the first secret begins and ends.
fn next_secret(text: &str) -> Option<(usize, usize)> {
    let ends_word = |letter: char| letter.is_whitespace() || matches!(letter, '"' | '\'' | '<' | '>' | '`');
    let until = |from: usize, end: &dyn Fn(char) -> bool| text[from..].find(end).map_or(text.len(), |at| from + at);
    let unless_masked = |from: usize, end: usize| (!matches!(&text[from..end], "" | MASK)).then_some((from, end));
    let of_url = text.match_indices("://").find_map(|(at, _)| {
        let from = at + 3;
        let end = until(from, &|letter| ends_word(letter) || matches!(letter, '/' | '?' | '#'));
        let user = &text[from..from + text[from..end].rfind('@')?];
        let web = text[..at].ends_with("http") || text[..at].ends_with("https");
        let secret = match user.split_once(':') {
            Some((name, _)) if !web => from + name.len() + 1,
            None if !web => return None,
            _ => from,
        };
        unless_masked(secret, from + user.len())
    });
    let of_parameter = text.match_indices('=').find_map(|(at, _)| {
        let name = text[..at].rfind(['?', '&']).map(|before| text[before + 1..at].to_ascii_lowercase())?;
        let is_secret = consists_of(&name, b"_-.") && SECRET.iter().any(|word| name.contains(word));
        unless_masked(at + 1, until(at + 1, &|letter| ends_word(letter) || matches!(letter, '&' | '#'))).filter(|_| is_secret)
    });
    let behind = |words: &str, end: &dyn Fn(char) -> bool| {
        text.match_indices(words).map(|(at, _)| at + words.len()).find_map(|from| unless_masked(from, until(from, end)))
    };
    let of_header = ["Bearer ", "Basic "].map(|scheme| behind(&format!("uthorization: {scheme}"), &ends_word));
    // of Nix, which shows the line of its configuration that it does not understand
    let of_setting = behind("access-tokens ", &|letter| letter == '\'');
    of_header.into_iter().chain([of_url, of_parameter, of_setting]).flatten().min()
}

/// Whether there is nothing in a text but ASCII letters, digits and these characters.
pub fn consists_of(text: impl AsRef<[u8]>, more: &[u8]) -> bool {
    text.as_ref().iter().all(|byte| byte.is_ascii_alphanumeric() || more.contains(byte))
}

/// How often something was done.
pub fn times(count: u32) -> String {
    if count == 1 { "once".into() } else { format!("{count} times") }
}

/// How long ago a moment is, or, by a clock that was ahead, how far off.
pub fn ago(then: u64, now: u64) -> String {
    if then > now.saturating_add(SKEW) {
        format!("{} from now", span(then - now))
    } else {
        format!("{} ago", span(now.saturating_sub(then)))
    }
}

/// A time span in its largest unit.
pub fn span(seconds: u64) -> String {
    let (count, unit) = match seconds {
        0..60 => (seconds, "s"),
        60..3600 => (seconds / 60, "min"),
        3600..86400 => (seconds / 3600, "h"),
        _ => (seconds / 86400, "d"),
    };
    format!("{count} {unit}")
}

/// As much of a commit or a hash as tells it from others.
pub fn short(text: &str) -> String {
    text.chars().take(8).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_long_ago_a_moment_is_is_said_also_by_a_clock_that_was_ahead() {
        assert_eq!((ago(40, 100), ago(130, 100), ago(100 + 2 * 86400, 100)), ("1 min ago".into(), "0 s ago".into(), "2 d from now".into()));
    }

    #[test]
    fn what_could_deceive_is_not_shown() {
        for odd in
            ['\u{0}', '\u{7}', '\n', '\r', '\u{1b}', '\u{7f}', '\u{85}', '\u{9b}', '\u{ad}', '\u{a0}', '\u{200b}', '\u{200e}', '\u{202e}']
        {
            assert_eq!(line(&format!("a{odd}b")), "a\u{fffd}b", "{odd:?}");
        }
        for odd in
            ['\u{2028}', '\u{2029}', '\u{2066}', '\u{2069}', '\u{feff}', '\u{fff9}', '\u{e0041}', '\u{e000}', '\u{10ffff}', '\u{61c}']
        {
            assert_eq!(line(&odd.to_string()), "\u{fffd}", "{odd:?}");
        }
        for plain in ["a 'b' \"c\" \\d", "äöü €", "日本語", "ж", "हिन्दी", "🙂", "~≠→│"] {
            assert_eq!(line(plain), plain);
        }
        assert_eq!(line("a\tb"), "a b");
        assert_eq!(lines("a\u{1b}\nb\n"), "a\u{fffd}\nb\n");
        assert_eq!(lines("a\nb"), "a\nb");
    }

    #[test]
    fn a_line_has_an_end() {
        let shown = line(&"ä".repeat(20_000));
        assert_eq!(shown.chars().count(), LINE);
        assert!(shown.ends_with('…'));
        assert_eq!(line(&"a".repeat(LINE)), "a".repeat(LINE));
    }

    #[test]
    fn secrets_are_masked() {
        for (text, shown) in [
            ("https://user:pa:ss@host/x", "https://***@host/x"),
            ("'https://ghp_abc@github.com/a'", "'https://***@github.com/a'"),
            ("ssh://git@host/a and git+ssh://u:p@h", "ssh://git@host/a and git+ssh://u:***@h"),
            ("https://host/a?rev=1&access_token=abc&x=1", "https://host/a?rev=1&access_token=***&x=1"),
            ("https://h?private-TOKEN=abc 'https://h/?X-Amz-Signature=1'", "https://h?private-TOKEN=*** 'https://h/?X-Amz-Signature=***'"),
            ("git+file:///x?rev=abc&dir=y", "git+file:///x?rev=abc&dir=y"),
            ("https://host/@scope/x", "https://host/@scope/x"),
            ("Authorization: Bearer abc.def", "Authorization: Bearer ***"),
            ("https://***@host", "https://***@host"),
            // each of several, in whatever order
            ("Authorization: Basic abc Authorization: Bearer def", "Authorization: Basic *** Authorization: Bearer ***"),
            ("Authorization: Bearer *** Authorization: Bearer def", "Authorization: Bearer *** Authorization: Bearer ***"),
            ("https://@host https://abc@host", "https://@host https://***@host"),
            ("a=b token=c", "a=b token=c"),
            (
                "syntax error in line 'access-tokens github.com=ghp_a' in 'nix.conf'",
                "syntax error in line 'access-tokens ***' in 'nix.conf'",
            ),
            ("access-tokens = github.com=ghp_a", "access-tokens ***"),
        ] {
            assert_eq!(line(text), shown);
        }
    }

    #[test]
    fn texts_of_a_value_are_made_fit() {
        let mut value = serde_json::json!({"a": ["\u{1b}[31m", 1], "b": {"c": "x\ny"}});
        make_fit(&mut value);
        assert_eq!(value, serde_json::json!({"a": ["\u{fffd}[31m", 1], "b": {"c": "x\u{fffd}y"}}));
    }
}
