//! The listening socket: what a stranger may cost.
//!
//! Everything that comes from outside is bounded here and understood here, in one thread and one
//! loop: 64 connections at most, of which the oldest makes room for the newest; 5 seconds for one,
//! however its bytes drip; 8 KiB and 64 lines of head; one request. It is answered as soon as its head
//! is there; 32 MiB and 20 seconds of body are thrown away after that.
//! What passes is only ever a method, a target and two headers' values, of visible ASCII. So whatever
//! answers the request never meets a byte that was not expected.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signalfd::SignalFd;
use nix::sys::socket::{Shutdown, shutdown};

use crate::error::{Context, Result};
use crate::text::consists_of;
use crate::webhook::answer::Answer;

/// Connections at a time. With two descriptors more for an answer, far below `LimitNOFILE=`.
const CONNECTIONS: usize = 64;
/// From the first byte to the last of the answer.
const DEADLINE: Duration = Duration::from_secs(5);
/// For what else the client sends.
const BODY_DEADLINE: Duration = Duration::from_secs(20);
/// How long what is under way may still take when this program is asked to end.
const FAREWELL: Duration = Duration::from_millis(500);
/// Request line and headers.
const HEAD_BYTES: usize = 8 * 1024;
/// The same in lines.
const HEAD_LINES: usize = 64;
/// The body, which nobody reads: no forge has larger ones than GitHub, of 25 MiB.
const BODY_BYTES: usize = 32 * 1024 * 1024;
/// Of one client's body, at a time: then it is the others' turn.
const CHUNK_BYTES: usize = 16 * 1024;
/// A pause after the kernel could not give us a connection.
const BREATH: Duration = Duration::from_millis(50);
/// Refusals that are logged in a [`LOG_PERIOD`]; of the others, the number.
const LOGGED_REFUSALS: u32 = 5;
const LOG_PERIOD: Duration = Duration::from_secs(60);

/// The socket that systemd listens on.
pub enum Listener {
    /// For the world, or a proxy on this machine.
    Tcp(TcpListener),
    /// For a proxy on this machine.
    Unix(UnixListener),
}

/// All that is left of a request.
#[derive(Debug, PartialEq)]
pub struct Request {
    /// As in `POST`.
    pub method: String,
    /// Path and query; begins with `/`.
    pub target: String,
    /// The value of the header `Authorization`, if there is one.
    pub authorization: Option<String>,
    /// The value of the header `X-Gitlab-Token`, if there is one.
    pub gitlab_token: Option<String>,
}

/// Serves requests until a signal can be read from `end`. `answer` makes the whole answer to one;
/// `beat` is called at least every `pulse`.
pub fn serve(
    listener: &Listener,
    end: &SignalFd,
    pulse: Duration,
    mut answer: impl FnMut(&Request) -> Answer,
    mut beat: impl FnMut(),
) -> Result<()> {
    let waiting = match listener {
        Listener::Tcp(listener) => listener.as_fd(),
        Listener::Unix(listener) => listener.as_fd(),
    };
    set_nonblocking(waiting).context(|| "set up the listening socket".into())?;
    let mut gate = Gate { connections: VecDeque::new(), refusals: Refusals::new() };
    let mut breathing_until = Instant::now();
    let mut last_deadline = None;
    loop {
        beat();
        gate.refusals.sum_up();
        let now = Instant::now();
        gate.connections.retain(|connection| connection.deadline > now && connection.open);
        if last_deadline.is_some_and(|last| now >= last || gate.connections.is_empty()) {
            return Ok(());
        }
        let breathing = now < breathing_until;
        let accepting = last_deadline.is_none() && !breathing;
        let next = gate.connections.iter().map(|connection| connection.deadline).chain(last_deadline);
        let next = next.chain(breathing.then_some(breathing_until)).map(|moment| moment - now).fold(pulse, Duration::min);

        // the listener, the signal, then the connections in their order
        let mut ready: Vec<PollFd> = Vec::with_capacity(CONNECTIONS + 2);
        ready.push(PollFd::new(waiting, if accepting { PollFlags::POLLIN } else { PollFlags::empty() }));
        ready.push(PollFd::new(end.as_fd(), PollFlags::POLLIN));
        ready.extend(gate.connections.iter().map(|connection| PollFd::new(connection.socket.as_fd(), connection.waits_for())));
        let timeout = PollTimeout::try_from(next + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        match poll(&mut ready, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error).context(|| "wait for connections".into()),
        }
        let is_ready = |fd: &PollFd| fd.revents().is_some_and(|events| !events.is_empty());
        let (accept, ended) = (is_ready(&ready[0]), is_ready(&ready[1]));
        let ready: Vec<bool> = ready[2..].iter().map(is_ready).collect();

        for (connection, _) in gate.connections.iter_mut().zip(ready).filter(|(_, ready)| *ready) {
            connection.go_on(&mut answer, &mut gate.refusals);
        }
        if accept && gate.accept(listener).is_err() {
            breathing_until = Instant::now() + BREATH;
        }
        if ended && last_deadline.is_none() {
            last_deadline = Some(Instant::now() + FAREWELL);
        }
    }
}

struct Gate {
    connections: VecDeque<Connection>,
    refusals: Refusals,
}

impl Gate {
    /// Lets all in who wait, each at the expense of the oldest if there is no room.
    fn accept(&mut self, listener: &Listener) -> io::Result<()> {
        for _ in 0..CONNECTIONS {
            let accepted = match listener {
                Listener::Tcp(listener) => listener.accept().map(|(socket, peer)| (OwnedFd::from(socket), peer.to_string())),
                Listener::Unix(listener) => listener.accept().map(|(socket, _)| (OwnedFd::from(socket), "a local client".into())),
            };
            let (socket, peer) = match accepted {
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                // gone before it was let in
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => continue,
                other => other?,
            };
            set_nonblocking(socket.as_fd())?;
            if self.connections.len() >= CONNECTIONS {
                self.connections.pop_front();
            }
            let deadline = Instant::now() + DEADLINE;
            self.connections.push_back(Connection {
                socket: File::from(socket),
                peer,
                deadline,
                open: true,
                state: State::Head(Vec::new()),
            });
        }
        Ok(())
    }
}

fn set_nonblocking(socket: BorrowedFd) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    fcntl(socket, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map(drop).map_err(io::Error::from)
}

/// One client.
struct Connection {
    socket: File,
    peer: String,
    deadline: Instant,
    open: bool,
    state: State,
}

/// How far a client has come.
enum State {
    /// Its head is read.
    Head(Vec<u8>),
    /// Its answer is written; the number says how much of it.
    Answer(Vec<u8>, usize),
    /// What else it sends is thrown away, lest the kernel throw the answer away; the number says how
    /// much still.
    Leftover(usize),
}

impl Connection {
    fn waits_for(&self) -> PollFlags {
        match self.state {
            State::Answer(..) => PollFlags::POLLOUT,
            State::Head(_) | State::Leftover(_) => PollFlags::POLLIN,
        }
    }

    /// Does what can be done without waiting.
    fn go_on(&mut self, answer: &mut impl FnMut(&Request) -> Answer, refusals: &mut Refusals) {
        match self.step(answer, refusals) {
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => self.open = false,
            Ok(()) => {}
        }
    }

    fn step(&mut self, answer: &mut impl FnMut(&Request) -> Answer, refusals: &mut Refusals) -> io::Result<()> {
        if let State::Head(head) = &mut self.state {
            let mut buffer = [0; HEAD_BYTES];
            let count = self.socket.read(&mut buffer[..HEAD_BYTES - head.len()])?;
            if count == 0 {
                self.open = false;
                return Ok(());
            }
            head.extend_from_slice(&buffer[..count]);
            let answered = match parse(head) {
                Ok(None) => return Ok(()),
                Ok(Some(request)) => answer(&request),
                Err(refusal) => refusal,
            };
            refusals.note(&self.peer, answered.status);
            self.state = State::Answer(answered.bytes(), 0);
        }
        if let State::Answer(answer, written) = &mut self.state {
            while *written < answer.len() {
                *written += self.socket.write(&answer[*written..])?;
            }
            let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Write);
            self.deadline = Instant::now() + BODY_DEADLINE;
            self.state = State::Leftover(BODY_BYTES);
        }
        if let State::Leftover(left) = &mut self.state {
            let count = self.socket.read(&mut [0; CHUNK_BYTES])?;
            *left = left.saturating_sub(count);
            self.open = count > 0 && *left > 0;
        }
        Ok(())
    }
}

/// Understands the head of a request, once it is complete; none until then.
pub fn parse(bytes: &[u8]) -> Result<Option<Request>, Answer> {
    let bad = |why| Err(Answer::refusal(400, why));
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n");
    let head = &bytes[..end.unwrap_or(bytes.len())];
    let first_line = head.iter().position(|&byte| byte == b'\n').unwrap_or(head.len());
    // what can only be wrong is refused at once, without waiting for the rest
    for (at, &byte) in head.iter().enumerate() {
        match byte {
            // the last one may be half a line end, of a head that is not complete
            b'\r' if head.get(at + 1).map_or(end.is_none(), |&next| next == b'\n') => {}
            b'\n' if at > 0 && head[at - 1] == b'\r' => {}
            b' '..=b'~' => {}
            // in a header's value, where proxies put what they like (RFC 9110, section 5.5)
            b'\t' | 0x80.. if at > first_line => {}
            _ => return bad("unexpected control character, line end or non-ASCII byte"),
        }
    }
    // the last one that has arrived may be the beginning of the empty line
    if head.split(|&byte| byte == b'\n').filter(|line| !matches!(line, [] | [b'\r'])).count() > HEAD_LINES {
        return Err(Answer::refusal(431, "too many header lines"));
    }
    if end.is_none() {
        return if bytes.len() < HEAD_BYTES { Ok(None) } else { Err(Answer::refusal(431, "the head is too long")) };
    }
    let mut lines = head.split(|&byte| byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    let request: Vec<_> = std::str::from_utf8(lines.next().unwrap_or_default()).unwrap_or_default().split(' ').collect();
    let [method, target, version] = request[..] else { return bad("invalid request line") };
    if method.is_empty() || method.len() > 16 || !method.bytes().all(|byte| byte.is_ascii_uppercase()) {
        return bad("invalid method");
    }
    if !target.starts_with('/') {
        return bad("the target is not a path");
    }
    match version {
        "HTTP/1.0" | "HTTP/1.1" => {}
        _ if version.starts_with("HTTP/") => return Err(Answer::refusal(505, "unsupported HTTP version")),
        _ => return bad("invalid HTTP version"),
    }
    // of all headers, only these are looked at
    let (mut authorization, mut gitlab_token, mut length, mut encoding) = (None, None, None, None);
    for line in lines {
        let mut parts = line.splitn(2, |&byte| byte == b':');
        let (Some(name), Some(value)) = (parts.next(), parts.next()) else { return bad("a header without a colon") };
        if name.is_empty() || !consists_of(name, b"!#$%&'*+-.^_`|~") {
            return bad("invalid header name");
        }
        let used = [
            (&b"authorization"[..], &mut authorization),
            (b"x-gitlab-token", &mut gitlab_token),
            (b"content-length", &mut length),
            (b"transfer-encoding", &mut encoding),
        ];
        let Some((_, used)) = used.into_iter().find(|(used, _)| name.eq_ignore_ascii_case(used)) else { continue };
        let Some(value) = visible(value) else { return bad("a header that matters is not visible ASCII") };
        if used.replace(value).is_some() {
            return bad("a header that matters is given twice");
        }
    }
    if encoding.is_some() {
        return Err(Answer::refusal(411, "the length of a body has to be given"));
    }
    if let Some(length) = length {
        if length.is_empty() || !length.bytes().all(|byte| byte.is_ascii_digit()) {
            return bad("the length is not a number");
        }
        // a number that is too large to be one is too large
        if length.parse::<usize>().map_or(true, |length| length > BODY_BYTES) {
            return Err(Answer::refusal(413, "the body is too long"));
        }
    }
    let owned = |value: Option<&str>| value.map(String::from);
    Ok(Some(Request {
        method: method.into(),
        target: target.into(),
        authorization: owned(authorization),
        gitlab_token: owned(gitlab_token),
    }))
}

/// A header's value without the white space around it, if the rest is visible ASCII.
fn visible(value: &[u8]) -> Option<&str> {
    let value = std::str::from_utf8(value).ok()?.trim_matches([' ', '\t']);
    value.bytes().all(|byte| (b' '..=b'~').contains(&byte)).then_some(value)
}

/// Refusals in the journal: a few, and how many more there were.
struct Refusals {
    since: Instant,
    count: u32,
}

impl Refusals {
    fn new() -> Self {
        Self { since: Instant::now(), count: 0 }
    }

    /// Notes an answer, if it is a refusal.
    fn note(&mut self, peer: &str, status: u16) {
        if (200..300).contains(&status) {
            return;
        }
        self.count += 1;
        if self.count <= LOGGED_REFUSALS {
            log::info!("Refused {peer}: {status}.");
        }
    }

    /// Says what was left out, when its time has come.
    fn sum_up(&mut self) {
        if self.since.elapsed() < LOG_PERIOD {
            return;
        }
        if self.count > LOGGED_REFUSALS {
            log::info!("Refused {} more in the last minute.", self.count - LOGGED_REFUSALS);
        }
        *self = Self::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(head: &str) -> u16 {
        parse(head.as_bytes()).map_or_else(|answer| answer.status, |request| if request.is_some() { 200 } else { 0 })
    }

    #[test]
    fn a_request_comes_through_as_four_words() {
        let head = "POST /ekiben?a=b HTTP/1.1\r\nHost: x\r\naUTHORIZATION: \t Bearer abc \r\nX-Gitlab-Token:abc\r\nContent-Length: 33554432\r\n\r\nbody";
        let request = Request {
            method: "POST".into(),
            target: "/ekiben?a=b".into(),
            authorization: Some("Bearer abc".into()),
            gitlab_token: Some("abc".into()),
        };
        assert_eq!(parse(head.as_bytes()), Ok(Some(request)));
        assert_eq!(status("GET / HTTP/1.0\r\n\r\n"), 200);
    }

    #[test]
    fn what_proxies_put_into_other_headers_is_no_matter() {
        for value in ["K\u{f6}ln", "a\tb", "\ta", "\u{1f600}", ""] {
            assert_eq!(status(&format!("POST / HTTP/1.1\r\nCf-City: {value}\r\n\r\n")), 200, "{value:?}");
        }
        assert!(matches!(parse(b"POST / HTTP/1.1\r\nA: \xe4\xff\r\n\r\n"), Ok(Some(_))));
    }

    #[test]
    fn an_unfinished_head_is_waited_for() {
        let head = "POST / HTTP/1.1\r\nA: b\r\n\r\n";
        for length in 0..head.len() {
            assert_eq!(status(&head[..length]), 0, "{length}");
        }
        assert_eq!(status(&format!("GET / HTTP/1.1\r\nA: {}", "b".repeat(HEAD_BYTES - 20))), 0);
    }

    #[test]
    fn what_is_not_strictly_http_is_refused() {
        for (expected, head) in [
            (400, "POST / HTTP/1.1\n\n"),
            (400, "POST / HTTP/1.1\r\nA: b\n\r\n"),
            (400, "POST / HTTP/1.1\r\nA: b\rc\r\n\r\n"),
            (400, "POST / HTTP/1.1\r\nA: b\r\r\n\r\n"),
            (400, "POST / HTTP/1.1\r\nA: \0\r\n\r\n"),
            (400, "POST /\t HTTP/1.1\r\n\r\n"),
            (400, "POST /\u{e4} HTTP/1.1\r\n\r\n"),
            (400, "POST /\x1b[31m HTTP/1.1\r\n\r\n"),
            (400, "GET /a\nERROR forged HTTP/1.1\r\n\r\n"),
            (400, "POST  / HTTP/1.1\r\n\r\n"),
            (400, "POST / HTTP/1.1 \r\n\r\n"),
            (400, "POST /\r\n\r\n"),
            (400, "\r\n\r\n"),
            (400, " POST / HTTP/1.1\r\n\r\n"),
            (400, "post / HTTP/1.1\r\n\r\n"),
            (400, "POST http://x/ HTTP/1.1\r\n\r\n"),
            (400, "OPTIONS * HTTP/1.1\r\n\r\n"),
            (400, "POST / FTP/1.1\r\n\r\n"),
            (505, "POST / HTTP/2.0\r\n\r\n"),
            (505, "POST / HTTP/1.11\r\n\r\n"),
            (400, "POST / HTTP/1.1\r\nno colon\r\n\r\n"),
            (400, "POST / HTTP/1.1\r\nA : b\r\n\r\n"),
            (400, "POST / HTTP/1.1\r\n: b\r\n\r\n"),
            (400, "POST / HTTP/1.1\r\nA: b\r\n folded\r\n\r\n"),
            (411, "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"),
            (411, "POST / HTTP/1.1\r\nContent-Length: 3\r\ntransfer-encoding: identity\r\n\r\n"),
            (400, "POST / HTTP/1.1\r\nContent-Length: 0\r\nContent-Length: 0\r\n\r\n"),
            (400, "POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n"),
            (400, "POST / HTTP/1.1\r\nContent-Length: +5\r\n\r\n"),
            (400, "POST / HTTP/1.1\r\nContent-Length: 1, 1\r\n\r\n"),
            (400, "POST / HTTP/1.1\r\nContent-Length:\r\n\r\n"),
            (413, "POST / HTTP/1.1\r\nContent-Length: 33554433\r\n\r\n"),
            (413, "POST / HTTP/1.1\r\nContent-Length: 1000000000000000\r\n\r\n"),
            (413, "POST / HTTP/1.1\r\nContent-Length: 18446744073709551616\r\n\r\n"),
            (400, "POST / HTTP/1.1\r\nAuthorization: a\r\nAuthorization: a\r\n\r\n"),
            (400, "POST / HTTP/1.1\r\nX-Gitlab-Token: a\r\nX-Gitlab-Token: a\r\n\r\n"),
            (400, "POST / HTTP/1.1\r\nAuthorization: \u{e4}\r\n\r\n"),
            (400, "POST / HTTP/1.1\r\nAuthorization: Bearer\ta\r\n\r\n"),
            (400, "POST / HTTP/1.1\r\nContent-Length: 1\t1\r\n\r\n"),
            (400, "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\u{a0}\r\n\r\n"),
            (400, "POST / HTTP/1.1\r\nA: \x7f\r\n\r\n"),
            (400, "POST / HTTP/1.1\r\nA: \x1b[31m\r\n\r\n"),
            (400, "POST / HTTP/1.1\r\n\u{e4}: b\r\n\r\n"),
            (400, "POST / HTTP/1.1\r\nA: b\r\n\tfolded\r\n\r\n"),
        ] {
            assert_eq!(status(head), expected, "{head:?}");
        }
    }

    #[test]
    fn a_head_has_limits() {
        let lines = |count: usize| format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(count));
        assert_eq!(status(&lines(HEAD_LINES - 1)), 200);
        assert_eq!(status(&lines(HEAD_LINES)), 431);
        // none of them too many, wherever the last part begins
        let most = lines(HEAD_LINES - 1);
        for missing in 1..8 {
            assert_eq!(status(&most[..most.len() - missing]), 0, "{missing}");
        }
        assert_eq!(status(&"A".repeat(HEAD_BYTES)), 431);
    }
}
