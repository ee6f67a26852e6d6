//! JSON: errors that name the key (`serde_json` only knows line and column), and texts of others.
//!
//! All values are read from bytes: each other way of reading would be compiled again for each type.

use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::text;

/// Parses `text`; an error says which key it is about, what was found and what was expected.
pub fn parse<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_slice(text.as_bytes()).map_err(|error| {
        let path = path_at(text, error.line(), error.column());
        if path.is_empty() { error.to_string() } else { format!("{path}: {error}") }
    })
}

/// Parses what somebody else has written; all texts in it are made fit to show.
pub fn parse_foreign<T: DeserializeOwned>(bytes: &[u8]) -> serde_json::Result<T> {
    let mut value = serde_json::from_slice(bytes)?;
    text::make_fit(&mut value);
    from_value(&value)
}

/// Takes a value for one of this type.
pub fn from_value<T: DeserializeOwned>(value: &Value) -> serde_json::Result<T> {
    serde_json::from_slice(&serde_json::to_vec(value)?)
}

/// What `#[serde(flatten)]` reads of an object: other types, too, are read from bytes alone.
pub fn flat<'de, D: Deserializer<'de>, T: DeserializeOwned>(object: D) -> Result<T, D::Error> {
    from_value(&Value::deserialize(object)?).map_err(D::Error::custom)
}

/// The keys and indexes that lead to the value at this place of a JSON text.
fn path_at(text: &str, line: usize, column: usize) -> String {
    let start: usize = text.split_inclusive('\n').take(line.saturating_sub(1)).map(str::len).sum();
    let before = &text.as_bytes()[..(start + column).min(text.len())];
    // one entry per open object or array; of an object, the key whose value comes
    let mut open: Vec<(String, bool)> = Vec::new();
    let (mut string, mut is_key) = (String::new(), false);
    let mut bytes = before.iter();
    while let Some(&byte) = bytes.next() {
        match byte {
            b'{' => {
                open.push((String::new(), false));
                is_key = true;
            }
            b'[' => {
                open.push(("0".into(), true));
                is_key = false;
            }
            // what is wrong with the object or array as a whole is found at its end
            b'}' | b']' if bytes.len() > 0 => {
                open.pop();
                is_key = false;
            }
            b'}' | b']' => {
                open.pop();
            }
            b',' => {
                is_key = open.last().is_some_and(|(_, array)| !array);
                if let Some((index, true)) = open.last_mut() {
                    *index = index.parse().map_or(String::new(), |number: usize| (number + 1).to_string());
                }
            }
            b':' => is_key = false,
            b'"' => {
                string.clear();
                while let Some(&byte) = bytes.next() {
                    match byte {
                        b'"' => break,
                        b'\\' => {
                            bytes.next();
                            string.push('?');
                        }
                        _ => string.push(char::from(byte)),
                    }
                }
                if let (true, Some((key, false))) = (is_key, open.last_mut()) {
                    key.clone_from(&string);
                }
            }
            _ => {}
        }
    }
    open.into_iter().map(|(key, _)| key).filter(|key| !key.is_empty()).collect::<Vec<_>>().join(".")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use std::collections::BTreeMap;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Sample {
        #[allow(dead_code)]
        map: BTreeMap<String, Entry>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Entry {
        #[allow(dead_code)]
        list: Vec<u32>,
        #[allow(dead_code)]
        name: String,
    }

    fn error(text: &str) -> String {
        parse::<Sample>(text).unwrap_err()
    }

    #[test]
    fn an_error_names_the_key() {
        for (text, path) in [
            (r#"{"map": {"a": {"list": [], "name": 1}}}"#, "map.a.name: invalid type: integer `1`"),
            (r#"{"map": {"b": {"list": [1, "x"], "name": ""}}}"#, "map.b.list.1: invalid type: string"),
            (r#"{"map": {"b": {"list": [1]}}}"#, "map.b: missing field `name`"),
            (r#"{"map": {"b": {"list": [1], "name": "", "extra": 0}}}"#, "map.b.extra: unknown field `extra`"),
            (r#"{"map": []}"#, "map: invalid type: sequence"),
            ("{\"map\":\n {\"a\": {\"list\":\n [], \"name\": null}}}", "map.a.name: invalid type: null"),
            (r#"{"map": {"a,\"}": {"list": 5, "name": "{"}}}"#, "map.a,?}.list: invalid type"),
            ("5", "invalid type: integer"),
        ] {
            assert!(error(text).starts_with(path), "{text}: {}", error(text));
        }
    }

    #[test]
    fn no_text_is_too_odd() {
        for text in ["", "{", "\"", "{\"a", "}]", ",", "{\"\\", "[[[", "\u{e9}\n\u{e9}", "{\"map\": \u{e9}"] {
            assert!(parse::<Sample>(text).is_err());
        }
    }
}
