//! Names that come from another machine or another user, as types that cannot be made unchecked: what
//! has one of these types can be a file's name and a word of a command line, whoever chose it.

use std::fmt;
use std::ops::Deref;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::text::consists_of;

/// Defines a type of text that `is_one` has accepted as what was expected.
macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $expected:expr, $is_one:expr) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
        #[serde(try_from = "String")]
        pub struct $name(String);

        impl TryFrom<String> for $name {
            type Error = String;

            fn try_from(text: String) -> Result<Self, String> {
                let is_one: fn(&str) -> bool = $is_one;
                if is_one(&text) { Ok(Self(text)) } else { Err(format!("expected {}, found {text:?}", $expected)) }
            }
        }

        impl TryFrom<&str> for $name {
            type Error = String;

            fn try_from(text: &str) -> Result<Self, String> {
                text.to_owned().try_into()
            }
        }

        impl Deref for $name {
            type Target = str;

            fn deref(&self) -> &str {
                &self.0
            }
        }

        impl AsRef<Path> for $name {
            fn as_ref(&self) -> &Path {
                Path::new(&self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str(self)
            }
        }
    };
}

name!(
    /// A run's: the identifier that systemd gave it, 32 hexadecimal digits.
    RunId,
    "the identifier of a run, 32 hexadecimal digits",
    |text| digits(text, 32)
);

name!(
    /// A SHA-256 in 64 hexadecimal digits: that of a file, or the name of a release.
    Sha256,
    "a SHA-256, 64 hexadecimal digits",
    |text| digits(text, 64)
);

name!(
    /// A commit's or a tree's of git: its hash, by SHA-1 or SHA-256.
    ObjectId,
    "the name of a git object",
    |text| digits(text, 40) || digits(text, 64)
);

name!(
    /// A branch's of git, in full.
    Branch,
    "a branch, refs/heads/<name>",
    |text| {
        let plain = |letter: char| !(letter.is_control() || " ~^:?*[\\".contains(letter));
        let is_one = text.strip_prefix("refs/heads/").is_some_and(|name| !name.is_empty() && name.chars().all(plain) && !name.contains(".."));
        is_one && text.len() <= 1024
    }
);

name!(
    /// A fleet host's: it becomes the name of files and, behind `fleet-`, of a user.
    HostName,
    "a host name of at most 25 lowercase letters, digits, _ and -",
    |text| {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_' || byte == b'-';
        (1..=25).contains(&text.len()) && !text.starts_with('-') && text.bytes().all(plain)
    }
);

name!(
    /// A whole path of the Nix store.
    StorePath,
    "a path of the Nix store",
    |text| text.len() <= 255 && is_store_path(Path::new(text))
);

name!(
    /// A user's or a group's.
    Account,
    "the name of a user or a group",
    |text| (1..=64).contains(&text.len()) && consists_of(text, b"_-.$")
);

name!(
    /// An absolute path of a file, each part of which is a name.
    FilePath,
    "the absolute path of a file",
    |text| {
        let is_name = |part: &str| !matches!(part, "" | "." | "..") && part.len() <= 255 && !part.contains(char::is_control);
        text.len() <= 1024 && text.strip_prefix('/').is_some_and(|below| below.split('/').all(is_name))
    }
);

/// Permissions for owner, group and others, in octal digits.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mode(u32);

impl TryFrom<String> for Mode {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let mode =
            Some(&text).filter(|text| text.bytes().all(|byte| byte.is_ascii_digit())).and_then(|text| u32::from_str_radix(text, 8).ok());
        mode.filter(|mode| *mode <= 0o777).map(Self).ok_or_else(|| format!("expected permissions such as \"0400\", found {text:?}"))
    }
}

impl From<Mode> for String {
    fn from(mode: Mode) -> Self {
        format!("{:04o}", mode.0)
    }
}

impl From<Mode> for u32 {
    fn from(mode: Mode) -> Self {
        mode.0
    }
}

impl StorePath {
    /// The same as a path of the file system.
    pub fn path(&self) -> &Path {
        self.as_ref()
    }
}

impl TryFrom<&Path> for StorePath {
    type Error = String;

    fn try_from(path: &Path) -> Result<Self, String> {
        path.to_string_lossy().into_owned().try_into()
    }
}

/// The number of a release: no more than what numbers of this kind can come to be, so that there is always a next one.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(try_from = "u64")]
pub struct Sequence(u64);

impl Sequence {
    /// Seconds since 1970 that will not come to pass in this geological age.
    const HIGHEST: u64 = 1 << 40;

    /// The lowest number above this one.
    pub fn next(self) -> Result<Self, String> {
        (self.0 + 1).try_into()
    }
}

impl TryFrom<u64> for Sequence {
    type Error = String;

    fn try_from(number: u64) -> Result<Self, String> {
        (number <= Self::HIGHEST)
            .then_some(Self(number))
            .ok_or_else(|| format!("expected a sequence number of at most {}, found {number}", Self::HIGHEST))
    }
}

impl From<Sequence> for u64 {
    fn from(number: Sequence) -> Self {
        number.0
    }
}

impl fmt::Display for Sequence {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

/// Whether a text has just that many hexadecimal digits, none of them a capital letter.
fn digits(text: &str, count: usize) -> bool {
    text.len() == count && text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

/// Whether this is a whole path of the store, by its form: `/nix/store/<hash>-<name>`.
pub fn is_store_path(path: &Path) -> bool {
    let name = path.to_str().and_then(|text| text.strip_prefix("/nix/store/")).unwrap_or_default();
    name.len() > 33 && name.as_bytes()[32] == b'-' && consists_of(name, b"+-._?=") && !name.starts_with('.')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_but_a_name_is_a_name() {
        assert_eq!(RunId::try_from("0123456789abcdef0123456789abcdef").unwrap().to_string(), "0123456789abcdef0123456789abcdef");
        for odd in [
            "",
            "0123456789abcdef0123456789abcde",
            "0123456789ABCDEF0123456789abcdef",
            "../3456789abcdef0123456789abcdef",
            "x\n!touch /tmp/x",
        ] {
            assert!(RunId::try_from(odd).is_err(), "{odd:?}");
            assert!(serde_json::from_value::<RunId>(odd.into()).is_err(), "{odd:?}");
        }
        assert!(ObjectId::try_from("0".repeat(40)).is_ok() && ObjectId::try_from("0".repeat(64)).is_ok());
        for odd in ["", "HEAD", "--help", "0123456789abcdef", "0123456789abcdef0123456789abcdef0123456g"] {
            assert!(ObjectId::try_from(odd).is_err(), "{odd:?}");
        }
        assert!(Branch::try_from("refs/heads/näher/dran").is_ok() && Branch::try_from("refs/heads/x".repeat(100)).is_err());
        for odd in ["", "main", "refs/heads/", "refs/heads/a b", "refs/heads/a\nb", "refs/heads/a..b", "refs/tags/x", "--force"] {
            assert!(Branch::try_from(odd).is_err(), "{odd:?}");
        }
        assert!(Sha256::try_from("0".repeat(64)).is_ok() && Sha256::try_from("0".repeat(65)).is_err());
        let store = |name: &str| StorePath::try_from(format!("/nix/store/{}-{name}", "a".repeat(32)));
        assert!(store("nixos-system-web-25.11").is_ok());
        for odd in ["", "x/y", "x y", "x\ny", &"x".repeat(250)] {
            assert!(store(odd).is_err(), "{odd:?}");
        }
        let whole = store("x").unwrap().to_string();
        for (part, other) in
            [("-x", ""), ("store/", "store//"), ("store/", "store/../../tmp/"), ("/nix/store", "/tmp"), ("/nix", "nix"), (&whole, "")]
        {
            assert!(StorePath::try_from(whole.replacen(part, other, 1)).is_err(), "{part} {other}");
        }
        assert!(serde_json::from_str::<Sequence>("1").unwrap().next().unwrap() == Sequence(2));
        assert!(serde_json::from_str::<Sequence>(&u64::MAX.to_string()).is_err() && Sequence(Sequence::HIGHEST).next().is_err());
        assert!(FilePath::try_from("/a/b c.d").is_ok() && Account::try_from("ekiben-fleet").is_ok());
        for odd in ["", "/", "a", "/a/", "//a", "/a/../b", "/./a", "/a\nb", "/a\0", &format!("/{}", "x".repeat(256)), &"/a".repeat(513)] {
            assert!(FilePath::try_from(odd).is_err() && Account::try_from(odd).is_err() || odd == "a", "{odd:?}");
        }
        assert_eq!(Mode::try_from("0640".to_owned()).map(String::from).as_deref(), Ok("0640"));
        for odd in ["", "4755", "01000", "+400", "-1", "rwx", "8", "99999999999"] {
            assert!(Mode::try_from(odd.to_owned()).is_err(), "{odd:?}");
        }
        assert!(HostName::try_from("web-1").is_ok() && HostName::try_from("../web").is_err());
    }
}
