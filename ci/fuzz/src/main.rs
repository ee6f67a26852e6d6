//! Throws random requests at the gate's parser, random configurations at the configuration's, and random answers of a
//! hub at SFTP's.
//!
//! usage: cargo run --release --manifest-path ci/fuzz/Cargo.toml -- SECONDS
//!
//! What must hold of each, whatever it is, is in `check_head` and `check_configuration`. The inputs
//! are made of the pieces that such a text consists of, right and wrong ones, and mutated. Nothing is
//! kept: a failure is printed, shrunk, and belongs into a unit test.

#![allow(dead_code)]

#[path = "../../../src/webhook/answer.rs"]
mod answer;
#[path = "../../../src/config.rs"]
mod config;
#[path = "../../../src/error.rs"]
mod error;
#[path = "../../../src/webhook/gate.rs"]
mod gate;
#[path = "../../../src/json.rs"]
mod json;
#[path = "../../../src/names.rs"]
mod names;
#[path = "../../../src/fleet/sftp/packet.rs"]
mod packet;
#[cfg(test)]
#[path = "../../../src/testing.rs"]
mod testing;
#[path = "../../../src/text.rs"]
mod text;
mod webhook {
    pub(crate) use super::answer;
}

use std::time::{Duration, Instant};

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

/// Between two looks at the clock.
const CASES: u32 = 20_000;

fn main() {
    let seconds = std::env::args().nth(1).and_then(|seconds| seconds.parse().ok()).unwrap_or(600);
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut cases = 0_u64;
    while Instant::now() < end {
        let heads = runner().run(&head(), |head| check_head(&head));
        let configurations = runner().run(&configuration(), |text| check_configuration(&text));
        let packets = runner().run(&packet(), |packet| check_packet(&packet));
        for result in [
            heads.map_err(|error| error.to_string()),
            configurations.map_err(|error| error.to_string()),
            packets.map_err(|error| error.to_string()),
        ] {
            if let Err(error) = result {
                eprintln!("fuzz: {error}");
                std::process::exit(1);
            }
        }
        cases += 3 * u64::from(CASES);
    }
    println!("fuzz: {cases} cases, nothing found");
}

/// One that begins at random.
fn runner() -> TestRunner {
    TestRunner::new(Config { cases: CASES, failure_persistence: None, ..Config::default() })
}

/// Something like what a hub answers.
fn packet() -> impl Strategy<Value = Vec<u8>> {
    let number = prop_oneof![0_u32..8, Just(u32::MAX), any::<u32>()].prop_map(|number| number.to_be_bytes().to_vec());
    let text = vec(any::<u8>(), 0..8).prop_map(|text| [&(text.len() as u32).to_be_bytes()[..], &text].concat());
    let pieces = vec(prop_oneof![number, text], 0..12).prop_map(|pieces| pieces.concat());
    (prop_oneof![100_u8..106, any::<u8>()], pieces).prop_map(|(kind, pieces)| [&[kind][..], &pieces].concat())
}

/// Nothing is made of a packet that is not in it.
fn check_packet(bytes: &[u8]) -> Result<(), TestCaseError> {
    let size = match packet::Reply::parse(bytes) {
        Some((_, packet::Reply::Handle(data) | packet::Reply::Data(data))) => data.len(),
        Some((_, packet::Reply::Names(names))) => names.iter().map(String::len).sum(),
        _ => 0,
    };
    prop_assert!(size <= bytes.len());
    Ok(())
}

/// Something like the head of a request, and perhaps what follows.
fn head() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        4 => prop::sample::select(vec![
            "POST", "GET", "get", " ", "  ", "/", "/ekiben", "?a=b", "http://x/", "*", "HTTP/1.1", "HTTP/1.0", "HTTP/2.0", "HTTP/", "\r\n", "\r\n",
            "\r\n\r\n", "\n", "\r", "\t", ":", ": ", "Host: x", "Authorization: Bearer abc", "authorization:", "Content-Length: 5",
            "Content-Length: 33554433", "content-length: 18446744073709551616", "X-Gitlab-Token: abc", "x-gitlab-token:\t", "Cf-City: K\u{f6}ln", "Content-Length: -1", "Transfer-Encoding: chunked", "A : b", " folded",
            "POST /ekiben HTTP/1.1\r\n", "Content-Length: 0\r\n", "Authorization: Basic x\r\n",
        ]).prop_map(|text| text.as_bytes().to_vec()),
        1 => vec(any::<u8>(), 0..8),
        1 => (any::<u8>(), 0_usize..10_000).prop_map(|(byte, count)| std::vec![byte; count]),
        1 => (0_usize..80).prop_map(|count| b"A: b\r\n".repeat(count)),
    ];
    let pieces = vec(piece, 0..24).prop_map(|pieces| pieces.concat());
    let name = prop_oneof!["[A-Za-z-]{1,12}", "(Authorization|X-Gitlab-Token|Content-Length)"];
    let good = ("[A-Z]{1,16}", "/[!-~]{0,40}", vec((name, "[ -~\t\u{a0}-\u{ff}]{0,30}"), 0..6)).prop_map(|(method, target, headers)| {
        let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        format!("{method} {target} HTTP/1.1\r\n{headers}\r\n").into_bytes()
    });
    let mutated = (good.clone(), any::<prop::sample::Index>(), any::<u8>()).prop_map(|(mut head, at, byte)| {
        let at = at.index(head.len());
        head[at] = byte;
        head
    });
    prop_oneof![2 => pieces, 1 => good, 1 => mutated]
}

fn check_head(bytes: &[u8]) -> Result<(), TestCaseError> {
    let bytes = &bytes[..bytes.len().min(8192)];
    let visible = |text: &str| text.bytes().all(|byte| (b' '..=b'~').contains(&byte));
    let result = gate::parse(bytes);
    if let Ok(Some(request)) = &result {
        prop_assert!(request.method.bytes().all(|byte| byte.is_ascii_uppercase()) && !request.method.is_empty());
        prop_assert!(request.target.starts_with('/') && visible(&request.target) && !request.target.contains(' '));
        prop_assert!(request.authorization.as_deref().is_none_or(visible) && request.gitlab_token.as_deref().is_none_or(visible));
        // another parser understands the same
        let mut headers = [httparse::EMPTY_HEADER; 64];
        let mut other = httparse::Request::new(&mut headers);
        let status = other.parse(bytes);
        prop_assert!(matches!(status, Ok(httparse::Status::Complete(_))), "{status:?}");
        prop_assert_eq!(other.method, Some(request.method.as_str()));
        prop_assert_eq!(other.path, Some(request.target.as_str()));
        let named = |name: &str| other.headers.iter().filter(|header| header.name.eq_ignore_ascii_case(name)).collect::<Vec<_>>();
        prop_assert!(named("transfer-encoding").is_empty() && named("content-length").len() <= 1);
        for (name, understood) in [("authorization", &request.authorization), ("x-gitlab-token", &request.gitlab_token)] {
            let headers = named(name);
            prop_assert!(headers.len() <= 1);
            let value = headers.first().map(|header| String::from_utf8_lossy(header.value).trim_matches([' ', '\t']).to_owned());
            prop_assert_eq!(&value, understood);
        }
    }
    // however it arrives, the outcome is the same: as soon as one is known, nothing more is waited for
    let mut known = None;
    for length in (0..=bytes.len()).step_by(1 + bytes.len() / 64) {
        let part = gate::parse(&bytes[..length]);
        match (&known, part) {
            (None, Ok(None)) => {}
            (None, part) => known = Some(part),
            (Some(Ok(first)), part) => prop_assert_eq!(Ok(first), part.as_ref()),
            (Some(Err(_)), part) => prop_assert!(part.is_err()),
        }
    }
    Ok(())
}

const GOOD: &str = include_str!("../../rendered/webhook-trigger/server/etc/ekiben/config.json");

/// A configuration with something wrong in it, perhaps.
fn configuration() -> impl Strategy<Value = String> {
    let value = prop::sample::select(vec![
        "null",
        "true",
        "0",
        "-1",
        "1e999",
        "\"\"",
        "\"root\"",
        "\"../..\"",
        "\"/\"",
        "\"/a#b\"",
        "\"/a?dir=../..#b\"",
        "\"a/b\"",
        "[]",
        "[\"--help\"]",
        "[\"a\", 1]",
        "{}",
        "{\"a\": {}}",
        "\"\\u0000\"",
        "\"switch\"",
        "\"a <b>\"",
        "\"\\ud800\"",
        "99999999999999999999",
    ]);
    let place = (any::<prop::sample::Index>(), value, any::<bool>()).prop_map(|(at, value, key)| {
        let places: Vec<usize> = GOOD.match_indices(if key { "\"" } else { ": " }).map(|(at, _)| at).collect();
        let at = places[at.index(places.len())];
        let end = GOOD[at + 1..].find([',', '\n', '"']).map_or(GOOD.len(), |length| at + 1 + length);
        format!("{}{}{value}{}", &GOOD[..at], if key { "" } else { ": " }, &GOOD[end..])
    });
    let cut = any::<prop::sample::Index>().prop_map(|at| GOOD[..at.index(GOOD.len())].to_owned());
    let byte = (any::<prop::sample::Index>(), any::<char>()).prop_map(|(at, byte)| {
        let at = at.index(GOOD.len());
        format!("{}{byte}{}", &GOOD[..at], &GOOD[at + 1..])
    });
    prop_oneof![place, cut, byte, any::<String>()]
}

fn check_configuration(text: &str) -> Result<(), TestCaseError> {
    match config::Config::parse(text) {
        Err(error) => prop_assert!(!error.is_empty()),
        Ok(config) => {
            for (name, instance) in &config.instances {
                prop_assert!(!name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte)));
                prop_assert!(!name.starts_with('-') && instance.user != "root" && !instance.user.is_empty());
                prop_assert!(instance.flake_path.is_absolute() && instance.flake_ref.directory.starts_with(&instance.flake_path));
                let plain = |path: &std::path::Path| path.components().all(|part| !matches!(part, std::path::Component::ParentDir));
                prop_assert!(plain(&instance.flake_path) && plain(&instance.flake_ref.directory));
                prop_assert!(instance.inputs.iter().flatten().all(|input| !input.starts_with('-')));
            }
            for project in config.webhook.iter().flat_map(|webhook| webhook.projects.values()) {
                prop_assert!(config.instances.contains_key(&project.instance));
            }
        }
    }
    Ok(())
}
