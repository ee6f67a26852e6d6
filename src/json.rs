//! JSON: from a text to a value, from a value to a type; an error names the key.
//!
//! What reads a type is compiled anew for each type, so it is small here: a value is there as a whole, and only an
//! object becomes a structure.

use std::fmt;
use std::slice;

use serde::de::value::StrDeserializer;
use serde::de::{DeserializeOwned, DeserializeSeed, Error as _, Expected, IntoDeserializer, MapAccess, SeqAccess, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, forward_to_deserialize_any};
use serde_json::Value;

use crate::text;

/// How many values a text may have: some take a hundred times the memory of their letters.
const MOST: usize = 500_000;

/// Why a text or a value is not what was expected: at which key, what was found and what was expected.
#[derive(Debug)]
pub struct Invalid(Box<What>);

#[derive(Debug)]
struct What {
    what: String,
    /// The keys and indexes that lead to it, the innermost first.
    path: Vec<String>,
}

/// Parses a text.
pub fn parse<T: DeserializeOwned>(text: &[u8]) -> Result<T, Invalid> {
    from_value(&value(text)?)
}

/// Parses what somebody else has written; all texts in it are made fit to show.
pub fn parse_foreign<T: DeserializeOwned>(text: &[u8]) -> Result<T, Invalid> {
    let mut value = value(text)?;
    text::make_fit(&mut value);
    from_value(&value)
}

/// Parses what Ekiben itself has written, perhaps a newer version: keys that are unknown are ignored, and those that have an
/// unknown one of several values.
pub fn parse_own<T: DeserializeOwned>(text: &[u8]) -> Result<T, Invalid> {
    parse_without(text, Invalid::is_newer).map(|(own, _)| own)
}

/// The same of what is the better the more of it can be read: whatever makes no sense is ignored. Returns what that was, the
/// first of it.
pub fn parse_most<T: DeserializeOwned>(text: &[u8]) -> Result<(T, Option<Invalid>), Invalid> {
    parse_without(text, |_| true)
}

/// Parses a text without what is to be ignored. Returns the first that a newer version does not explain, too.
fn parse_without<T: DeserializeOwned>(text: &[u8], is_ignored: fn(&Invalid) -> bool) -> Result<(T, Option<Invalid>), Invalid> {
    let (mut value, mut first) = (value(text)?, None);
    loop {
        match from_value(&value) {
            Ok(parsed) => return Ok((parsed, first)),
            Err(error) if !is_ignored(&error) || !has_removed(&mut value, &error) => return Err(error),
            Err(error) => first = first.or(Some(error).filter(|error| !error.is_newer())),
        }
    }
}

/// Removes what an error is about, unless that is the whole.
#[inline(never)]
fn has_removed(value: &mut Value, error: &Invalid) -> bool {
    let Some((key, above)) = error.0.path.split_first() else { return false };
    let place = above.iter().rev().try_fold(value, |value, key| match value {
        Value::Array(items) => items.get_mut(key.parse::<usize>().ok()?),
        other => other.get_mut(key),
    });
    match place {
        Some(Value::Array(items)) => key.parse().ok().filter(|index| *index < items.len()).map(|index| items.remove(index)).is_some(),
        Some(Value::Object(object)) => object.remove(key).is_some(),
        _ => false,
    }
}

/// Takes a value for one of this type.
pub fn from_value<T: DeserializeOwned>(value: &Value) -> Result<T, Invalid> {
    T::deserialize(Node(value))
}

/// What `#[serde(flatten)]` reads of an object: other types, too, are read from values alone.
pub fn flat<'de, D: Deserializer<'de>, T: DeserializeOwned>(object: D) -> Result<T, D::Error> {
    from_value(&Value::deserialize(object)?).map_err(D::Error::custom)
}

fn value(text: &[u8]) -> Result<Value, Invalid> {
    if values(text) > MOST {
        return Err(Invalid::custom(format!("more than {MOST} values")));
    }
    serde_json::from_slice(text).map_err(Invalid::custom)
}

/// How many values there are in a text, about.
fn values(text: &[u8]) -> usize {
    let (mut is_string, mut is_escaped, mut count) = (false, false, 0);
    for byte in text {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' => is_escaped = is_string,
            b'"' => is_string = !is_string,
            b'{' | b'[' | b',' if !is_string => count += 1,
            _ => {}
        }
    }
    count
}

impl Invalid {
    /// Whether it is about what a newer version may have written.
    fn is_newer(&self) -> bool {
        ["unknown field ", "unknown variant "].iter().any(|what| self.0.what.starts_with(what))
    }

    #[inline(never)]
    fn at(mut self, key: &dyn fmt::Display) -> Self {
        self.0.path.push(key.to_string());
        self
    }
}

impl fmt::Display for Invalid {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut path: Vec<_> = self.0.path.iter().map(String::as_str).collect();
        path.reverse();
        let colon = if path.is_empty() { "" } else { ": " };
        write!(formatter, "{}{colon}{}", path.join("."), self.0.what)
    }
}

impl std::error::Error for Invalid {}

impl serde::de::Error for Invalid {
    fn custom<T: fmt::Display>(what: T) -> Self {
        Self(Box::new(What { what: what.to_string(), path: Vec::new() }))
    }

    fn invalid_type(found: Unexpected<'_>, expected: &dyn Expected) -> Self {
        not_expected("type", found, expected)
    }

    fn invalid_value(found: Unexpected<'_>, expected: &dyn Expected) -> Self {
        not_expected("value", found, expected)
    }
}

/// As serde says it, which would bring all that it takes to write a fraction.
#[inline(never)]
fn not_expected(what: &str, found: Unexpected<'_>, expected: &dyn Expected) -> Invalid {
    let found = match found {
        Unexpected::Bool(value) => format!("boolean `{value}`"),
        Unexpected::Unsigned(number) => format!("integer `{number}`"),
        Unexpected::Signed(number) => format!("integer `{number}`"),
        Unexpected::Str(text) => format!("string {text:?}"),
        Unexpected::Seq => "sequence".into(),
        Unexpected::Map => "map".into(),
        Unexpected::Unit => "null".into(),
        Unexpected::Other(other) => other.into(),
        _ => "another value".into(),
    };
    Invalid::custom(format!("invalid {what}: {found}, expected {expected}"))
}

struct Node<'a>(&'a Value);

impl Node<'_> {
    #[inline(never)]
    fn is_not(&self, expected: &dyn Expected) -> Invalid {
        let found = match self.0 {
            Value::Null => Unexpected::Unit,
            Value::Bool(value) => Unexpected::Bool(*value),
            Value::Number(number) => match (number.as_u64(), number.as_i64()) {
                (Some(number), _) => Unexpected::Unsigned(number),
                (None, Some(number)) => Unexpected::Signed(number),
                _ => Unexpected::Other("fraction"),
            },
            Value::String(text) => Unexpected::Str(text),
            Value::Array(_) => Unexpected::Seq,
            Value::Object(_) => Unexpected::Map,
        };
        Invalid::invalid_type(found, expected)
    }
}

impl<'de> Deserializer<'de> for Node<'_> {
    type Error = Invalid;

    // what is not expected, the visitor refuses
    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Invalid> {
        match self.0 {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(*value),
            Value::Number(number) => match (number.as_u64(), number.as_i64()) {
                (Some(number), _) => visitor.visit_u64(number),
                (None, Some(number)) => visitor.visit_i64(number),
                _ => Err(self.is_not(&visitor)),
            },
            Value::String(text) => visitor.visit_str(text),
            Value::Array(items) => visitor.visit_seq(Items(items.iter(), 0)),
            Value::Object(object) => visitor.visit_map(Entries(object.iter(), None)),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(self, _: &'static str, _: &'static [&'static str], visitor: V) -> Result<V::Value, Invalid> {
        if let Value::Object(object) = self.0 { visitor.visit_map(Entries(object.iter(), None)) } else { Err(self.is_not(&visitor)) }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Invalid> {
        if self.0.is_null() { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Invalid> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Invalid> {
        // none of ours holds anything
        let Value::String(text) = self.0 else { return Err(self.is_not(&visitor)) };
        StrDeserializer::new(text).deserialize_enum(name, variants, visitor)
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Invalid> {
        visitor.visit_unit()
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf
        unit unit_struct seq tuple tuple_struct map identifier
    }
}

/// What is left of an array, and the index of the next one.
struct Items<'a>(slice::Iter<'a, Value>, usize);

impl<'de> SeqAccess<'de> for Items<'_> {
    type Error = Invalid;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Invalid> {
        let Some(item) = self.0.next() else { return Ok(None) };
        self.1 += 1;
        seed.deserialize(Node(item)).map(Some).map_err(|error| error.at(&(self.1 - 1)))
    }
}

/// What is left of an object, and the entry whose value comes next.
struct Entries<'a>(serde_json::map::Iter<'a>, Option<(&'a String, &'a Value)>);

impl<'de> MapAccess<'de> for Entries<'_> {
    type Error = Invalid;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Invalid> {
        self.1 = self.0.next();
        let Some((key, _)) = self.1 else { return Ok(None) };
        let name: StrDeserializer<Invalid> = key.as_str().into_deserializer();
        seed.deserialize(name).map(Some).map_err(|error| error.at(key))
    }

    fn next_value_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, Invalid> {
        let Some((key, value)) = self.1 else { return Err(Invalid::custom("there is no value")) };
        seed.deserialize(Node(value)).map_err(|error| error.at(key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use std::collections::BTreeMap;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Sample {
        map: BTreeMap<String, Entry>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Entry {
        list: Vec<u32>,
        #[allow(dead_code)]
        name: String,
    }

    fn error(text: &str) -> String {
        parse::<Sample>(text.as_bytes()).unwrap_err().to_string()
    }

    #[test]
    fn a_text_has_no_more_values_than_fit_into_memory() {
        let of = |one: &str, count: usize| parse::<Value>(format!("[{}0]", one.repeat(count)).as_bytes()).map(drop);
        for (one, count) in [(r#"{"":0},"#, MOST / 2), ("[],", MOST / 2), ("0,", MOST), (r#""\\",{"a":"\"{","b":0},"#, MOST / 4)] {
            of(one, count - 1).unwrap();
            assert_eq!(of(one, count).unwrap_err().to_string(), "more than 500000 values", "{one}");
        }
        of(&format!("{:?},", r#"[{,\,""#.repeat(MOST)), 1).unwrap();
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
            (r#"{"map": {"a,\"}": {"list": 5, "name": "{"}}}"#, r#"map.a,"}.list: invalid type"#),
            ("5", "invalid type: integer"),
        ] {
            assert!(error(text).starts_with(path), "{text}: {}", error(text));
        }
    }

    #[test]
    fn what_a_newer_version_has_written_is_ignored() {
        let text = r#"{"new": [], "map": {"a": {"list": [1], "new": {"x": 1}, "name": "", "newer": 2}}}"#;
        assert_eq!(parse_own::<Sample>(text.as_bytes()).unwrap().map["a"].list, [1]);
        let wrong = parse_own::<Sample>(br#"{"new": 1, "map": {"a": {"list": ["x"], "name": ""}}}"#).unwrap_err();
        assert!(wrong.to_string().starts_with("map.a.list.0: invalid type"), "{wrong}");
        assert!(parse_own::<Vec<Entry>>(br#"[{"list": [], "name": "", "new": 1}]"#).is_ok());
    }

    #[test]
    fn most_is_what_makes_sense() {
        let text =
            r#"{"new": 1, "map": {"a": {"list": [1, "x", 2], "name": ""}, "b": {"list": [1]}, "c": 5, "d": {"list": {}, "name": ""}}}"#;
        let (most, why) = parse_most::<Sample>(text.as_bytes()).unwrap();
        assert_eq!(most.map.into_iter().map(|(key, entry)| (key, entry.list)).collect::<Vec<_>>(), [("a".to_owned(), vec![1, 2])]);
        assert!(why.unwrap().to_string().starts_with("map.a.list.1: invalid type"));
        assert!(parse_most::<Sample>(br#"{"new": 1, "map": {}}"#).unwrap().1.is_none());
        for text in ["", "{", "[]", r#"{"map": 5}"#, "\0\0"] {
            assert!(parse_most::<Sample>(text.as_bytes()).is_err(), "{text}");
        }
    }

    #[test]
    fn no_text_is_too_odd() {
        for text in ["", "{", "\"", "{\"a", "}]", ",", "{\"\\", "[[[", "\u{e9}\n\u{e9}", "{\"map\": \u{e9}"] {
            assert!(parse::<Sample>(text.as_bytes()).is_err());
        }
    }
}
