//! Who has asked for a run, in a word or two: `user alice`, `project web`, `timer`. Of a file that others may write it is
//! whose file it is that counts; only root speaks for other users, and only the webhook for its projects.

use std::ops::RangeInclusive;

use nix::unistd::geteuid;

use crate::config::instance_name;
use crate::files;
use crate::names::Account;

/// The users that systemd makes for services: of those that may write a request, the webhook is the only one.
const DYNAMIC: RangeInclusive<u32> = 61184..=65519;
/// How many are remembered.
const MOST: usize = 8;
/// What a program of ours says that asks on behalf of nobody.
pub const NOBODY: &str = "-";

/// The user of this process, or whom root speaks for by sudo.
pub fn this_user() -> String {
    std::env::var("SUDO_USER").unwrap_or_else(|_| files::user_name(geteuid().as_raw()))
}

/// Who has written a file of this owner that says this of it; none if that was on behalf of nobody.
pub fn of_file(owner: u32, says: Option<&str>) -> Option<String> {
    match (owner, says) {
        (0, Some(NOBODY)) => None,
        (0, Some(user)) => Some(format!("user {}", Account::try_from(user).map_or_else(|_| files::user_name(0), |user| user.to_string()))),
        (owner, says) if DYNAMIC.contains(&owner) => {
            Some(says.filter(|name| instance_name(name).is_ok()).map_or("webhook".into(), |project| format!("project {project}")))
        }
        (owner, _) => Some(format!("user {}", files::user_name(owner))),
    }
}

/// Of all who ask for a run, the first few, each once.
pub fn all(by: impl Iterator<Item = String>) -> Vec<String> {
    let mut all = Vec::new();
    for by in by {
        if !all.contains(&by) && all.len() < MOST {
            all.push(by);
        }
    }
    all
}

/// What has started a run that nobody has asked for, by what systemd says of that, by whether it has found one that was
/// cut off, and by whether it is due: see [`crate::system::service::is_due`].
pub fn unasked(goes_on: bool, is_due: bool) -> &'static str {
    match std::env::var("TRIGGER_UNIT").unwrap_or_default().rsplit_once('.') {
        Some((_, "timer")) => "timer",
        _ if is_due => "timer",
        _ if goes_on => "recovery",
        _ => "systemctl",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_can_pretend_to_be_another() {
        let of = |owner, says| of_file(owner, says).unwrap_or_default();
        assert_eq!(
            (of(0, None), of(0, Some("alice")), of(0, Some("a\nb")), of(0, Some("-"))),
            ("user root".into(), "user alice".into(), "user root".into(), String::new())
        );
        let user = of(1000, None);
        assert!(user.starts_with("user ") && user != "user root");
        for says in ["root", "-", "project web"] {
            assert_eq!(of(1000, Some(says)), user);
        }
        assert_eq!(
            (of(62000, Some("web")), of(62000, Some("user root")), of(62000, Some("-"))),
            ("project web".into(), "webhook".into(), "webhook".into())
        );
    }
}
