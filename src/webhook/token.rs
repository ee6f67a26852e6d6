//! The tokens: read once from systemd's credentials, compared in constant time, never shown.

use std::collections::BTreeMap;
use std::fs;
use std::iter;
use std::path::Path;

use constant_time_eq::constant_time_eq_n;

use crate::config::Project;
use crate::error::{Context, Error, Result};
use crate::text::consists_of;

/// The longest token, in bytes; all are compared as if they were this long.
const LONGEST: usize = 256;
/// The shortest: a token is all that stands between a stranger and a run.
const SHORTEST: usize = 16;

/// One secret. It has no `Debug`, and cannot be compared but in constant time.
struct Token([u8; LONGEST + 2]);

/// The tokens of all projects.
pub struct Tokens {
    fit: Vec<(Token, String, String)>,
    unfit: Vec<Error>,
}

impl Token {
    /// Pads a token to the fixed width; `None` if it is too long.
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
    /// on. What is missing, not fit for use, or the same for two projects is left out.
    pub fn read(directory: &Path, projects: &BTreeMap<String, Project>) -> Self {
        let mut tokens: Vec<(Token, &String, &Project)> = Vec::new();
        let mut unfit = Vec::new();
        let files = projects.iter().flat_map(|(name, project)| {
            let first = (format!("token-{name}"), &project.token_file);
            let more = (1..).map(move |number| format!("token-{name}.{number}")).zip(&project.extra_token_files);
            iter::once(first).chain(more).map(move |(credential, file)| (name, project, credential, file))
        });
        for (name, project, credential, file) in files {
            let doing = || format!("read the token of project {name} from {}", file.display());
            // systemd hands over an empty one if there is none
            let text = fs::read(directory.join(credential)).unwrap_or_default();
            let text = text.strip_suffix(b"\n").map_or(&text[..], |text| text.strip_suffix(b"\r").unwrap_or(text));
            match check(text).and_then(|()| Token::new(text).ok_or("longer than 256 characters")).context(doing) {
                Ok(token) => tokens.push((token, name, project)),
                Err(error) => unfit.push(error),
            }
        }
        let same = |a: &Token, b: &Token| constant_time_eq_n(&a.0, &b.0);
        let mut fit = Vec::new();
        for (token, name, project) in &tokens {
            if let Some((_, other, _)) = tokens.iter().find(|(other, owner, _)| owner != name && same(other, token)) {
                if name < other {
                    unfit.push(Error::new(format!("Failed to tell projects {name} and {other} apart: they have the same token")));
                }
            } else {
                fit.push((Token(token.0), (*name).clone(), project.instance.clone()));
            }
        }
        Self { fit, unfit }
    }

    /// What is wrong with those that were left out.
    pub fn unfit(&self) -> &[Error] {
        &self.unfit
    }

    /// The project of this token, and the instance that its bearer may start. Takes the same time whichever token it
    /// is, or is like.
    pub fn project(&self, candidate: &[u8]) -> Option<(&str, &str)> {
        let candidate = Token::new(candidate)?;
        let mut found = None;
        for (token, project, instance) in &self.fit {
            if constant_time_eq_n(&token.0, &candidate.0) {
                found = Some((project.as_str(), instance.as_str()));
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
        return Err(if token.is_empty() { "missing or empty" } else { "shorter than 16 characters" });
    }
    if body.is_empty() || !consists_of(body, b"-._~+/") {
        return Err("contains characters other than letters, digits and - . _ ~ + / with = at the end (RFC 6750)");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Directory;

    const GOOD: &str = "abcdefghijklmnop";

    fn project(name: &str, extra: &[&str]) -> Project {
        Project {
            instance: format!("{name}-instance"),
            token_file: format!("/etc/{name}").into(),
            extra_token_files: extra.iter().map(Into::into).collect(),
        }
    }

    fn read(tokens: &[(&str, &str)]) -> Tokens {
        let directory = Directory::new();
        let mut projects = BTreeMap::new();
        for (name, token) in tokens {
            fs::write(directory.path().join(format!("token-{name}")), token).unwrap();
            projects.insert((*name).to_owned(), project(name, &[]));
        }
        Tokens::read(directory.path(), &projects)
    }

    fn said(tokens: &Tokens) -> Vec<String> {
        tokens.unfit().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_token_finds_its_own_instance_only() {
        let long = "x".repeat(LONGEST);
        let tokens = read(&[("a", GOOD), ("b", "ABCDEFGHIJKLMNOP=="), ("c", &long)]);
        assert_eq!(tokens.project(GOOD.as_bytes()).map(|(_, instance)| instance), Some("a-instance"));
        assert_eq!(tokens.project(b"ABCDEFGHIJKLMNOP==").map(|(_, instance)| instance), Some("b-instance"));
        assert_eq!(tokens.project(long.as_bytes()).map(|(_, instance)| instance), Some("c-instance"));
        let longer = "x".repeat(LONGEST + 1);
        for wrong in ["", "abcdefghijklmno", "abcdefghijklmnopq", "abcdefghijklmnop\0", "ABCDEFGHIJKLMNOP", &longer] {
            assert_eq!(tokens.project(wrong.as_bytes()).map(|(_, instance)| instance), None);
        }
    }

    #[test]
    fn a_project_may_have_more_than_one() {
        let directory = Directory::new();
        for (name, token) in
            [("token-a", GOOD), ("token-a.1", "another-token-0123"), ("token-a.2", GOOD), ("token-a.4", "unread-token-0123")]
        {
            fs::write(directory.path().join(name), token).unwrap();
        }
        let projects = BTreeMap::from([("a".to_owned(), project("a", &["/etc/1", "/etc/2", "/etc/3"]))]);
        let tokens = Tokens::read(directory.path(), &projects);
        assert_eq!(tokens.project(GOOD.as_bytes()).map(|(_, instance)| instance), Some("a-instance"));
        assert_eq!(tokens.project(b"another-token-0123").map(|(_, instance)| instance), Some("a-instance"));
        assert_eq!(tokens.project(b"unread-token-0123").map(|(_, instance)| instance), None);
        assert_eq!(said(&tokens), ["Failed to read the token of project a from /etc/3: missing or empty"]);
    }

    #[test]
    fn one_line_end_is_not_part_of_the_token() {
        for text in [format!("{GOOD}\n"), format!("{GOOD}\r\n")] {
            assert!(read(&[("a", &text)]).project(GOOD.as_bytes()).is_some());
        }
        assert_eq!(said(&read(&[("a", &format!("{GOOD}\n\n"))])).len(), 1);
    }

    #[test]
    fn what_is_unfit_is_named_by_project_and_file_never_shown_and_harms_no_other() {
        let long = "x".repeat(LONGEST + 1);
        for bad in ["", "\n", "short", "abcdefgh ijklmnop", "abcdefgh=ijklmnop", "================", "äbcdefghijklmnop", &long] {
            let tokens = read(&[("app", GOOD), ("web", bad)]);
            let said = said(&tokens);
            assert!(said.len() == 1 && said[0].starts_with("Failed to read the token of project web from /etc/web: "), "{said:?}");
            assert!(bad.len() < 6 || !said[0].contains(bad), "{said:?}");
            assert_eq!(tokens.project(bad.as_bytes()).map(|(_, instance)| instance), None);
            assert_eq!(tokens.project(GOOD.as_bytes()), Some(("app", "app-instance")));
        }
    }

    #[test]
    fn the_same_token_for_two_projects_is_nobodys() {
        let tokens = read(&[("a", GOOD), ("b", "0123456789abcdef"), ("c", GOOD)]);
        assert_eq!(said(&tokens), ["Failed to tell projects a and c apart: they have the same token"]);
        assert_eq!(tokens.project(GOOD.as_bytes()).map(|(_, instance)| instance), None);
        assert_eq!(tokens.project(b"0123456789abcdef").map(|(_, instance)| instance), Some("b-instance"));
    }
}
