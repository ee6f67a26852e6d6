//! HTTP in, request out: `POST` with a token on the one path asks for a run of that token's
//! instance, `GET` tells how that instance is.
//!
//! Nothing of the request is looked at but method, path and token, so a request is a doorbell.
//! It is answered with 202 once it is on disk, and with 503 if it could not be written. The gate
//! stands in front: [`tiny_http`] only meets requests that it has rewritten.

use std::io::{self, Cursor, Read, Write};
use std::net::TcpListener;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::prctl::set_dumpable;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::SignalFd;
use nix::sys::socket::{AddressFamily, SockaddrLike, SockaddrStorage, getsockname};
use sd_notify::NotifyState;
use tiny_http::{Header, Method, Response, Server};

use crate::config::Webhook;
use crate::error::{Context, Error, Result};
use crate::gate::{self, Listener, Request};
use crate::layout::Layout;
use crate::queue;
use crate::status;
use crate::token::Tokens;

/// How long the exchange with `tiny_http`, in this very process, may take; only a full queue
/// directory on a very slow disk comes near it.
const EXCHANGE_LIMIT: Duration = Duration::from_secs(5);
/// How often the watchdog is told that all is well, where systemd does not say.
const PULSE: Duration = Duration::from_secs(10);

/// Listens until it is asked to end.
pub fn webhook(webhook: &Webhook) -> Result<()> {
    // no other process of this user, and no core dump, shall see the tokens
    set_dumpable(false).context(|| "make this process unreadable".into())?;
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block().context(|| "block signals".into())?;
    let end = SignalFd::new(&signals).context(|| "wait for signals".into())?;

    let tokens = Tokens::read(&directory("CREDENTIALS_DIRECTORY")?, &webhook.projects)?;
    let listener = inherited_listener()?;
    let mut engine = Engine::new(&directory("RUNTIME_DIRECTORY")?.join("http"), webhook, tokens)?;
    let pulse = sd_notify::watchdog_enabled().map_or(PULSE, |period| period / 3);
    notify(&[NotifyState::Ready]);
    log::info!("Listening for {} projects on {}.", webhook.projects.len(), webhook.path);

    let mut beaten = Instant::now();
    let answer = |request: &Request| engine.exchange(request);
    gate::serve(&listener, &end, pulse, answer, || {
        if beaten.elapsed() >= pulse / 2 {
            beaten = Instant::now();
            notify(&[NotifyState::Watchdog]);
        }
    })?;
    notify(&[NotifyState::Stopping]);
    // tiny_http's threads end with the process; dropping it would only make it talk to itself
    std::process::exit(0)
}

fn directory(variable: &str) -> Result<PathBuf> {
    let directory = std::env::var_os(variable).map(PathBuf::from);
    directory.ok_or_else(|| Error::new(format!("Failed to find ${variable}: run this as ekiben-webhook.service")))
}

fn notify(states: &[NotifyState]) {
    if let Err(error) = sd_notify::notify(states) {
        log::warn!("Failed to notify systemd: {error}.");
    }
}

/// The one socket that systemd hands over.
fn inherited_listener() -> Result<Listener> {
    let doing = || "take the socket over from systemd".into();
    let mut sockets = sd_notify::listen_fds().context(doing)?;
    let (Some(fd), None) = (sockets.next(), sockets.next()) else {
        return Err("expected exactly one: start ekiben-webhook.socket").context(doing);
    };
    let family = getsockname::<SockaddrStorage>(fd).context(doing)?.family();
    let socket = own(fd);
    Ok(match family {
        Some(AddressFamily::Unix) => Listener::Unix(UnixListener::from(socket)),
        _ => Listener::Tcp(TcpListener::from(socket)),
    })
}

#[allow(unsafe_code)]
fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: systemd opened it for this process alone, and this is called once
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// `tiny_http`, on a socket that only this process can open, one request at a time.
struct Engine {
    server: Server,
    socket: PathBuf,
    path: String,
    tokens: Tokens,
    /// The highest number that a request was given.
    last_number: u64,
}

type Answer = Response<Cursor<Vec<u8>>>;

impl Engine {
    fn new(socket: &Path, webhook: &Webhook, tokens: Tokens) -> Result<Self> {
        let doing = || format!("listen on {}", socket.display());
        crate::files::remove(socket).context(doing)?;
        let listener = UnixListener::bind(socket).context(doing)?;
        let server = Server::from_listener(listener, None).context(doing)?;
        Ok(Self { server, socket: socket.to_owned(), path: webhook.path.clone(), tokens, last_number: 0 })
    }

    /// Has `tiny_http` take the request, and returns the bytes of the answer.
    fn exchange(&mut self, request: &Request) -> Vec<u8> {
        let answer = self.try_exchange(request).unwrap_or_else(|error| {
            // half a server is worse than none: systemd starts a new one behind the same socket
            log::error!("Failed to answer: {error}.");
            std::process::exit(1)
        });
        // tiny_http keeps the word to itself
        match answer.windows(2).position(|window| window == b"\r\n") {
            Some(at) => [&answer[..at], b"\r\nConnection: close", &answer[at..]].concat(),
            None => answer,
        }
    }

    fn try_exchange(&mut self, request: &Request) -> io::Result<Vec<u8>> {
        let mut client = UnixStream::connect(&self.socket)?;
        client.set_read_timeout(Some(EXCHANGE_LIMIT))?;
        let authorization = request.authorization.as_ref().map(|value| format!("Authorization: {value}\r\n")).unwrap_or_default();
        let head = format!("{} {} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{authorization}\r\n", request.method, request.target);
        client.write_all(head.as_bytes())?;
        let received = self.server.recv_timeout(EXCHANGE_LIMIT)?.ok_or(io::ErrorKind::TimedOut)?;
        let answer = self.answer(&received);
        received.respond(answer)?;
        let mut bytes = Vec::new();
        client.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// What the program is for.
    fn answer(&mut self, request: &tiny_http::Request) -> Answer {
        let path = request.url().split('?').next().unwrap_or_default();
        if path != self.path {
            return refusal(404, "not found");
        }
        if !matches!(request.method(), Method::Get | Method::Post) {
            return with_header(refusal(405, "only GET and POST are answered"), "Allow", "GET, POST");
        }
        let authorization = request.headers().iter().find(|header| header.field.equiv("Authorization"));
        let Some(instance) = authorization.and_then(|header| bearer(header.value.as_str())).and_then(|token| self.tokens.instance(token))
        else {
            return with_header(refusal(401, "unauthorized"), "WWW-Authenticate", "Bearer");
        };
        let layout = Layout::new(instance);
        if *request.method() == Method::Get {
            return status::for_clients(&layout).map_or_else(
                |error| {
                    log::error!("{error}.");
                    refusal(503, "the state could not be read")
                },
                |state| answer(200, &state),
            );
        }
        match queue::request(&layout, self.last_number) {
            Ok(number) => {
                self.last_number = self.last_number.max(number);
                log::info!("Request {number} for {instance}.");
                answer(202, &format!("{{\"request\":{number}}}\n"))
            }
            Err(error) => {
                log::error!("{error}.");
                refusal(503, "the request could not be written")
            }
        }
    }
}

/// The token of a bearer: the scheme in any case, one space or more, the token.
fn bearer(authorization: &str) -> Option<&[u8]> {
    let (scheme, token) = authorization.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim_start_matches(' ').as_bytes())
}

fn refusal(status: u16, why: &str) -> Answer {
    answer(status, &format!("{{\"error\":\"{why}\"}}\n"))
}

fn answer(status: u16, body: &str) -> Answer {
    with_header(Response::from_string(body).with_status_code(status), "Content-Type", "application/json")
}

fn with_header(answer: Answer, name: &str, value: &str) -> Answer {
    match Header::from_bytes(name, value) {
        Ok(header) => answer.with_header(header),
        Err(()) => answer,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_bearers_have_tokens() {
        for authorization in ["Bearer abc", "bearer abc", "BEARER   abc"] {
            assert_eq!(bearer(authorization), Some(&b"abc"[..]));
        }
        for authorization in ["Basic abc", "Bearer", "abc", "", "Bearerabc"] {
            assert_eq!(bearer(authorization), None);
        }
    }
}
