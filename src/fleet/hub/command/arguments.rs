//! The words and options of `ekiben fleet`, and what is said of them.

use std::collections::BTreeMap;

use crate::error::{Context, Error, Result};

/// What `ekiben fleet --help` says.
pub const HELP: &str = "\
Publishes NixOS configurations to a fleet of hosts, and shows their state.

Usage: ekiben fleet [--repository DIR] [--directory DIR] COMMAND

  init               create a fleet repository
  bootstrap HOST     print how to add a host
  build [dry-build|build|test|switch] [--jobs N] [--target [USER@]ADDRESS]
        [HOST...]    evaluate, or build; test and switch activate the system of
                     one host, on this machine or over SSH
  deploy [--waves] [--no-build] [--unsigned] [--json] [--jobs N] [HOST...]
                     build what has changed, and publish it; with --waves, in
                     those of fleet.json; with --unsigned, have releases without
                     a signature follow those that have one
  deploy --again NUMBER [HOST...]
                     publish that release again, as it was
  renew [--jobs N] [HOST...]
                     publish again, as it is, what expires before long
  status [--json|--html FILE] [--wide] [--once] [HOST...]
                     show the state of the hosts, trouble first; exit with 2 if
                     one is failing, 3 if one is silent or stale, 4 if hub and
                     repository do not agree
  history [--json] [HOST...]
                     show what has been published, and from which commits
  log HOST [RUN]     list the runs of a host, or show the log of one of them,
                     or of the last one, where RUN is last
  diff [HOST...]     show how running systems and repository differ
  hold [--for DURATION] [--reason TEXT] [HOST...]
                     have nothing new be published for hosts; without hosts,
                     have no further wave begin
  resume [HOST...]   end that; without hosts, have a stopped roll-out go on
  abort [--unsigned]
                     end the roll-out, and publish again what ran before it
  flake-update [INPUT...] [HOST...]
                     update the inputs of the flakes
  collect [--html FILE] [--metrics FILE]
                     collect the reports of the hosts; write a page, and metrics

@GROUP in the place of HOST means the hosts of one of the groups in fleet.json.

Options:
  --repository DIR   the fleet's repository (default: $EKIBEN_FLEET, or that of
                     the working directory)
  --directory DIR    what the hub serves (default: as fleet.json says, or
                     /var/lib/ekiben-hub); sftp://[user@]host[:port][/path] for
                     a hub elsewhere, with the ssh configuration of this user
";

/// The options that commands take besides those that all take.
const OPTIONS: [(&str, &[&str]); 8] = [
    ("build", &["--jobs", "--target"]),
    ("deploy", &["--again", "--jobs", "--json", "--no-build", "--unsigned", "--waves"]),
    ("hold", &["--for", "--reason"]),
    ("abort", &["--unsigned"]),
    ("renew", &["--jobs"]),
    ("status", &["--html", "--json", "--once", "--wide"]),
    ("history", &["--json"]),
    ("collect", &["--html", "--metrics"]),
];

/// A command line, in parts.
pub struct Arguments<'a> {
    /// What is no option, nor the value of one.
    pub words: Vec<&'a str>,
    /// The options, with their values; those that have none are empty.
    pub options: BTreeMap<&'a str, &'a str>,
}

impl<'a> Arguments<'a> {
    /// Takes them apart; fails where an option is none of the command's.
    pub fn parse(arguments: &[&'a str]) -> Result<Self> {
        let (mut words, mut options) = (Vec::new(), BTreeMap::new());
        let mut rest = arguments.iter();
        while let Some(&word) = rest.next() {
            let value = match word {
                "--repository" | "--directory" | "--jobs" | "--target" | "--html" | "--metrics" | "--again" | "--for" | "--reason" => {
                    rest.next().ok_or("value missing").context(|| format!("understand {word}"))?
                }
                _ => "",
            };
            if word.starts_with('-') {
                options.insert(word, value);
            } else {
                words.push(word);
            }
        }
        let command = words.first().copied().unwrap_or_default();
        let taken = OPTIONS.iter().find(|(name, _)| *name == command).map_or(&[][..], |(_, taken)| taken);
        let all = ["--repository", "--directory", "--help", "-h"];
        match options.keys().find(|option| !all.contains(option) && !taken.contains(option)) {
            Some(option) => Err(Error::new(format!("Failed to understand {option:?}: see ekiben fleet --help"))),
            None => Ok(Self { words, options }),
        }
    }

    /// Whether there is this option.
    pub fn has(&self, option: &str) -> bool {
        self.options.contains_key(option)
    }

    /// How many hosts are to be worked on at once.
    pub fn jobs(&self) -> Result<usize> {
        let number = |text: &&str| text.parse().ok().filter(|number| *number > 0);
        match self.options.get("--jobs") {
            Some(text) => number(text).ok_or(format!("expected a number, found {text:?}")).context(|| "understand --jobs".into()),
            None => Ok(std::thread::available_parallelism().map_or(2, usize::from)),
        }
    }
}
