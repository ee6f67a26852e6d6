//! What a client of the webhook is answered: a status and a line of JSON, as bytes of HTTP by [`tiny_http`].

use tiny_http::{HTTPVersion, Header, Response};

/// A whole answer.
#[derive(Debug, PartialEq)]
pub struct Answer {
    /// As in 202.
    pub status: u16,
    body: String,
    header: Option<(&'static str, &'static str)>,
}

impl Answer {
    /// An answer with JSON in its body.
    pub fn new(status: u16, body: String) -> Self {
        Self { status, body, header: None }
    }

    /// A refusal, which says why.
    pub fn refusal(status: u16, why: &str) -> Self {
        Self::new(status, format!("{{\"error\":\"{why}\"}}\n"))
    }

    /// The same with one more header.
    pub fn with_header(self, name: &'static str, value: &'static str) -> Self {
        Self { header: Some((name, value)), ..self }
    }

    /// What is sent. Nothing comes after it: a connection is good for one request.
    pub fn bytes(self) -> Vec<u8> {
        let headers = [Some(("Content-Type", "application/json")), self.header].into_iter().flatten();
        let headers = headers.filter_map(|(name, value)| Header::from_bytes(name, value).ok()).collect();
        let response = Response::new(self.status.into(), headers, self.body.as_bytes(), Some(self.body.len()), None);
        let mut bytes = Vec::new();
        // to memory, it cannot fail
        let _ = response.raw_print(&mut bytes, HTTPVersion(1, 1), &[], false, None);
        // tiny_http keeps this header to itself
        if let Some(at) = bytes.windows(2).position(|window| window == b"\r\n") {
            bytes.splice(at..at, *b"\r\nConnection: close");
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_one_of_http() {
        let answer = Answer::refusal(405, "no").with_header("Allow", "GET, POST");
        let bytes = String::from_utf8(answer.bytes()).unwrap();
        let (head, body) = bytes.split_once("\r\n\r\n").unwrap();
        assert_eq!(body, "{\"error\":\"no\"}\n");
        let mut lines = head.split("\r\n");
        assert_eq!(lines.next(), Some("HTTP/1.1 405 Method Not Allowed"));
        let headers: Vec<_> = lines.collect();
        for header in ["Connection: close", "Content-Type: application/json", "Allow: GET, POST", "Content-Length: 15"] {
            assert!(headers.contains(&header), "{head}");
        }
    }
}
