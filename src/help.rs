//! What `ekiben --help` says, and what whoever writes a command line is told that makes no sense.

use crate::error::Error;

/// The commands of people.
pub const HELP: &str = "\
Keeps a NixOS machine up to date from the inside.

Usage: ekiben [--config FILE] COMMAND

  trigger [--wait] INSTANCE   ask for a run; with --wait, show it, and fail if
                              it fails (75: what is new awaits the next boot)
  status [--json] [INSTANCE]  show the state of all instances, or of one in
                              detail; without --json, fail if one is not well
  log INSTANCE [RUN] [--follow]
                              show the log of the last run, or of that one
  hold INSTANCE [DURATION] [--reason TEXT]
                              deploy nothing for so long (default: 1d);
                              requests are kept
  resume INSTANCE             end that before its time
  rollback INSTANCE           have what ran before the last deployment run again
  check FILE                  check a configuration file
  forget-releases [INSTANCE]  accept the next release of the fleet's hub,
                              whatever its number is
  fleet COMMAND               publish to a fleet: see ekiben fleet --help

Options:
  --config FILE   the configuration (default: /etc/ekiben/config.json)
  --help          this text
  --version       the version

The units run the other commands: see man ekiben.
";

/// That the words of a command line make no sense, and which would: as `help` has their first one, or else where to look.
pub fn misunderstood(program: &str, help: &str, words: &[&str]) -> Error {
    let is_meant = |line: &&str| words.first().is_some_and(|word| !word.is_empty() && line.split(' ').next() == Some(word));
    let usages: Vec<_> = help.lines().filter_map(|line| line.strip_prefix("  ")).filter(is_meant).collect();
    let usages: Vec<_> = usages.iter().map(|line| format!("{program} {}", line.split("  ").next().unwrap_or_default())).collect();
    let expected = if usages.is_empty() { String::new() } else { format!("expected {}; ", usages.join(", or ")) };
    Error::new(format!("Failed to understand {:?}: {expected}see {program} --help", words.join(" ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_command_takes_is_said_if_there_is_one() {
        let help = "Usage: ekiben\n\n  log HOST [RUN] [--follow]   show\n                  more\n  logs\n";
        let said = |words: &[&str]| misunderstood("ekiben", help, words).to_string();
        assert_eq!(said(&["log"]), r#"Failed to understand "log": expected ekiben log HOST [RUN] [--follow]; see ekiben --help"#);
        assert_eq!(said(&["lo", "x"]), r#"Failed to understand "lo x": see ekiben --help"#);
        assert_eq!(said(&[""]), r#"Failed to understand "": see ekiben --help"#);
    }
}
