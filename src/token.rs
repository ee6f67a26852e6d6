//! The tokens: read once from systemd's credentials, compared in constant time, never shown.

use std::collections::BTreeMap;
use std::fs;
use std::iter;
use std::path::Path;

use constant_time_eq::constant_time_eq_n;

use crate::config::Project;
use crate::error::{Context, Error, Result};

/// The longest token, in bytes; all are compared as if they were this long.
const LONGEST: usize = 256;
/// The shortest: a token is all that stands between a stranger and a run.
const SHORTEST: usize = 16;

/// One secret. It has no `Debug`, and cannot be compared but in constant time.
struct Token([u8; LONGEST + 2]);

/// The tokens of all projects.
pub struct Tokens(Vec<(Token, String)>);

impl Token {
    /// Pads a token to the fixed width; none if it is too long.
    fn new(text: &[u8]) -> Option<Self> {
        let mut padded = [0; LONGEST + 2];
        padded.get_mut(..text.len()).filter(|_| text.len() <= LONGEST)?.copy_from_slice(text);
        // no token holds a NUL, so the padding alone would do; the length makes it plain
        let length = u16::try_from(text.len()).ok()?;
        padded[LONGEST..].copy_from_slice(&length.to_be_bytes());
        Some(Self(padded))
    }
}

impl Tokens {
    /// Reads each project's tokens from the credentials `token-<project>`, `token-<project>.1` and so
    /// on. Fails, naming the project, if the first is missing or one is not fit for use, or if two
    /// projects have the same.
    pub fn read(directory: &Path, projects: &BTreeMap<String, Project>) -> Result<Self> {
        let mut tokens: Vec<(Token, String)> = Vec::new();
        let mut owners: Vec<&String> = Vec::new();
        let files = projects.iter().flat_map(|(name, project)| {
            let first = directory.join(format!("token-{name}"));
            let more = (1..).map(move |number| directory.join(format!("token-{name}.{number}"))).take_while(|path| path.exists());
            iter::once(first).chain(more).map(move |path| (name, project, path))
        });
        for (name, project, path) in files {
            let doing = || format!("read the token of project {name}");
            let text = fs::read(path).context(doing)?;
            let text = text.strip_suffix(b"\n").map_or(&text[..], |text| text.strip_suffix(b"\r").unwrap_or(text));
            let token = check(text).and_then(|()| Token::new(text).ok_or("it is too long")).context(doing)?;
            if let Some(other) = tokens.iter().position(|(other, _)| constant_time_eq_n(&other.0, &token.0)) {
                if owners[other] == name {
                    continue;
                }
                let message = format!("Failed to tell projects {} and {name} apart: they have the same token", owners[other]);
                return Err(Error::new(message));
            }
            tokens.push((token, project.instance.clone()));
            owners.push(name);
        }
        Ok(Self(tokens))
    }

    /// The instance that the bearer of this token may start. Takes the same time whichever token it
    /// is, or is like.
    pub fn instance(&self, candidate: &[u8]) -> Option<&str> {
        let candidate = Token::new(candidate)?;
        let mut found = None;
        for (token, instance) in &self.0 {
            if constant_time_eq_n(&token.0, &candidate.0) {
                found = Some(instance.as_str());
            }
        }
        found
    }
}

/// Whether this is a token as in RFC 6750, section 2.1 (`b64token`), and long enough.
fn check(token: &[u8]) -> Result<(), &'static str> {
    let end = token.iter().rposition(|&byte| byte != b'=').map_or(0, |last| last + 1);
    let body = &token[..end];
    if token.len() < SHORTEST {
        return Err("it has less than 16 characters");
    }
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~+/".contains(byte);
    if body.is_empty() || !body.iter().all(plain) {
        return Err("it has other characters than letters, digits and - . _ ~ + / with = at the end (RFC 6750)");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Directory;

    const GOOD: &str = "abcdefghijklmnop";

    fn read(tokens: &[(&str, &str)]) -> Result<Tokens> {
        let directory = Directory::new();
        let mut projects = BTreeMap::new();
        for (name, token) in tokens {
            fs::write(directory.path().join(format!("token-{name}")), token).unwrap();
            projects.insert((*name).to_owned(), Project { instance: format!("{name}-instance") });
        }
        Tokens::read(directory.path(), &projects)
    }

    #[test]
    fn a_token_finds_its_own_instance_only() {
        let long = "x".repeat(LONGEST);
        let tokens = read(&[("a", GOOD), ("b", "ABCDEFGHIJKLMNOP=="), ("c", &long)]).unwrap();
        assert_eq!(tokens.instance(GOOD.as_bytes()), Some("a-instance"));
        assert_eq!(tokens.instance(b"ABCDEFGHIJKLMNOP=="), Some("b-instance"));
        assert_eq!(tokens.instance(long.as_bytes()), Some("c-instance"));
        let longer = "x".repeat(LONGEST + 1);
        for wrong in ["", "abcdefghijklmno", "abcdefghijklmnopq", "abcdefghijklmnop\0", "ABCDEFGHIJKLMNOP", &longer] {
            assert_eq!(tokens.instance(wrong.as_bytes()), None);
        }
    }

    #[test]
    fn a_project_may_have_more_than_one() {
        let directory = Directory::new();
        for (name, token) in [("token-a", GOOD), ("token-a.1", "another-token-0123"), ("token-a.2", GOOD), ("token-a.4", "unread")] {
            fs::write(directory.path().join(name), token).unwrap();
        }
        let projects = BTreeMap::from([("a".to_owned(), Project { instance: "app".into() })]);
        let tokens = Tokens::read(directory.path(), &projects).unwrap();
        assert_eq!(tokens.instance(GOOD.as_bytes()), Some("app"));
        assert_eq!(tokens.instance(b"another-token-0123"), Some("app"));
    }

    #[test]
    fn one_line_end_is_not_part_of_the_token() {
        for text in [format!("{GOOD}\n"), format!("{GOOD}\r\n")] {
            assert!(read(&[("a", &text)]).unwrap().instance(GOOD.as_bytes()).is_some());
        }
        assert!(read(&[("a", &format!("{GOOD}\n\n"))]).is_err());
    }

    #[test]
    fn unfit_tokens_are_refused_by_project_and_never_shown() {
        let long = "x".repeat(LONGEST + 1);
        for bad in ["", "\n", "short", "abcdefgh ijklmnop", "abcdefgh=ijklmnop", "================", "äbcdefghijklmnop", &long] {
            let error = read(&[("web", bad)]).err().unwrap().to_string();
            assert!(error.starts_with("Failed to read the token of project web: it "), "{error}");
            assert!(bad.len() < 3 || !error.contains(bad), "{error}");
        }
    }

    #[test]
    fn the_same_token_for_two_projects_is_refused() {
        let error = read(&[("a", GOOD), ("b", "0123456789abcdef"), ("c", GOOD)]).err().unwrap().to_string();
        assert_eq!(error, "Failed to tell projects a and c apart: they have the same token");
    }

    #[test]
    fn a_missing_token_is_an_error() {
        let directory = Directory::new();
        let projects = [("web".to_owned(), Project { instance: "i".into() })].into();
        assert!(Tokens::read(directory.path(), &projects).err().unwrap().to_string().contains("project web"));
    }
}
