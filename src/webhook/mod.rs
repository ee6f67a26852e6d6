//! HTTP in, request out: `POST` with a token on the one path asks for a run of that token's
//! instance, `GET` tells how that instance is.
//!
//! Nothing of the request is looked at but method, path and token, so a request is a doorbell.
//! It is answered with 202 once it is on disk, and with 503 if it could not be written. The gate
//! stands in front.

mod answer;
mod gate;
mod token;

use std::net::TcpListener;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::sys::prctl::set_dumpable;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::SignalFd;
use nix::sys::socket::{AddressFamily, SockaddrLike, SockaddrStorage, getsockname};
use sd_notify::NotifyState;

use self::gate::{Listener, Request};
use crate::config::Webhook;
use crate::error::{Context, Error, OrLog, Result};
use crate::paths::Paths;
use crate::run::{client, queue};
use crate::webhook::answer::Answer;
use crate::webhook::token::Tokens;

/// How often the watchdog is told that all is well, where systemd does not say.
const PULSE: Duration = Duration::from_secs(10);

/// Listens until it is asked to end.
pub fn webhook(webhook: &Webhook) -> Result<()> {
    // no other process of this user, and no core dump, shall see the tokens
    set_dumpable(false).context(|| "protect the memory of this process".into())?;
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    signals.thread_block().context(|| "block signals".into())?;
    let end = SignalFd::new(&signals).context(|| "wait for signals".into())?;

    let tokens = Tokens::read(&credentials()?, &webhook.projects);
    let listener = inherited_listener()?;
    let pulse = sd_notify::watchdog_enabled().map_or(PULSE, |period| period / 3);
    let mut state = format!("Listening for {} projects on {}.", webhook.projects.len(), webhook.path);
    log::info!("{state}");
    // their own unit says it in the journal
    for error in tokens.unfit() {
        state = format!("{state} {error}.");
    }
    notify(&[NotifyState::Ready, NotifyState::Status(&state)]);

    let mut beaten = Instant::now();
    let mut last_number = 0;
    let answer = |request: &Request| answer(request, &webhook.path, &tokens, &mut last_number);
    gate::serve(&listener, &end, pulse, answer, || {
        if beaten.elapsed() >= pulse / 2 {
            beaten = Instant::now();
            notify(&[NotifyState::Watchdog]);
        }
    })?;
    notify(&[NotifyState::Stopping]);
    Ok(())
}

/// Fails if a token is not fit for use: the webhook goes on for the others, and its unit cannot have failed then.
pub fn check_tokens(webhook: &Webhook) -> Result<()> {
    let tokens = Tokens::read(&credentials()?, &webhook.projects);
    let said: Vec<String> = tokens.unfit().iter().map(ToString::to_string).collect();
    if said.is_empty() { Ok(()) } else { Err(Error::new(format!("{}; clients with it are answered 503", said.join("; ")))) }
}

/// Where systemd has put the tokens.
fn credentials() -> Result<PathBuf> {
    let directory = std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from);
    directory.ok_or_else(|| Error::new("Failed to find $CREDENTIALS_DIRECTORY: run this as ekiben-webhook.service"))
}

fn notify(states: &[NotifyState]) {
    sd_notify::notify(states).context(|| "notify systemd".into()).or_warn();
}

/// The one socket that systemd hands over.
fn inherited_listener() -> Result<Listener> {
    let doing = || "take the socket over from systemd".into();
    let mut sockets = sd_notify::listen_fds().context(doing)?;
    let (Some(fd), None) = (sockets.next(), sockets.next()) else {
        return Err("expected exactly one: start ekiben-webhook.socket").context(doing);
    };
    let family = getsockname::<SockaddrStorage>(fd).context(doing)?.family();
    #[allow(unsafe_code)]
    // SAFETY: systemd opened it for this process alone, and this is called once
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    Ok(match family {
        Some(AddressFamily::Unix) => Listener::Unix(UnixListener::from(socket)),
        _ => Listener::Tcp(TcpListener::from(socket)),
    })
}

/// Answers a request: a request for a run, the state of an instance, or a refusal.
fn answer(request: &Request, path: &str, tokens: &Tokens, last_number: &mut u64) -> Answer {
    if request.target.split('?').next() != Some(path) {
        return Answer::refusal(404, "not found");
    }
    if !matches!(request.method.as_str(), "GET" | "POST") {
        return Answer::refusal(405, "only GET and POST are answered").with_header("Allow", "GET, POST");
    }
    let token = request.authorization.as_deref().and_then(bearer).or(request.gitlab_token.as_deref());
    let Some((project, instance)) = token.and_then(|token| tokens.project(token.as_bytes())) else {
        // it may well be the one that could not be read
        return if token.is_some() && !tokens.unfit().is_empty() {
            Answer::refusal(503, "a project's token could not be read, perhaps this one's; see the state of ekiben-webhook.service")
        } else {
            Answer::refusal(401, "unauthorized").with_header("WWW-Authenticate", "Bearer")
        };
    };
    let paths = Paths::new(instance);
    let answered = if request.method == "GET" {
        client::for_clients(&paths).map(|state| Answer::new(200, state))
    } else {
        queue::request(&paths, *last_number, project).map(|number| {
            *last_number = number.max(*last_number);
            log::info!("Request {number} for {instance} by project {project}.");
            Answer::new(202, format!("{{\"request\":{number}}}\n"))
        })
    };
    answered.or_error().unwrap_or_else(|| {
        Answer::refusal(503, if request.method == "GET" { "the state could not be read" } else { "the request could not be written" })
    })
}

/// The token of a bearer: the scheme in any case, one space or more, the token.
fn bearer(authorization: &str) -> Option<&str> {
    let (scheme, token) = authorization.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim_start_matches(' '))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_bearers_have_tokens() {
        for authorization in ["Bearer abc", "bearer abc", "BEARER   abc"] {
            assert_eq!(bearer(authorization), Some("abc"));
        }
        for authorization in ["Basic abc", "Bearer", "abc", "", "Bearerabc"] {
            assert_eq!(bearer(authorization), None);
        }
    }
}
