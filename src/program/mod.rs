//! Other programs: run with an environment of ours, and with an end.
//!
//! What a program prints goes on to the journal at once, and its last lines are kept for the
//! report of a failure.

pub mod conversation;
pub mod exited;

mod limited;

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use nix::unistd::User;

use crate::error::{Context, Error, Result};
use crate::program::exited::{Reason, describe, failed, reason};
use crate::{output, text};

/// How many lines of a program's output a report holds.
pub const TAIL_LINES: usize = 50;
/// What is kept of one line: more than is shown of it.
const LINE_BYTES: usize = 4 * text::LINE;
/// What is kept of a program's errors.
const TAIL_BYTES: usize = TAIL_LINES * LINE_BYTES;
/// The most that a program may write for us to work on.
const OUTPUT_BYTES: u64 = 64 * 1024 * 1024;
/// A program about to be run.
pub struct Program {
    command: Command,
    /// Without the environment of this process.
    bare: bool,
    name: String,
    watched: &'static [&'static str],
    quiet: bool,
    heard: Option<Hearer>,
    reason: Reason,
    limit: Option<(Duration, Instant)>,
}

/// By what users' programs reach the network, as in their own stages: `networking.proxy` of NixOS.
const PROXIES: [&str; 4] = ["all_proxy", "http_proxy", "https_proxy", "no_proxy"];

/// What git runs in the place of ssh: the user's own command, which makes no socket to share its connection by, since the
/// sandbox forbids that.
const SSH: &str = r#"ssh=$(git config core.sshCommand || echo ssh)
case $ssh in ssh | "ssh "* | */ssh | */"ssh "*) ssh="$ssh -o ControlMaster=no" ;; esac
eval "$ssh \"\$@\"" #"#;

/// Hears each line that a program says.
type Hearer = Box<dyn FnMut(&str)>;

impl Program {
    /// A program found by PATH, in the environment of this process.
    pub fn new(path: impl AsRef<OsStr>) -> Self {
        let mut command = Command::new(&path);
        command.stdin(Stdio::null());
        // which repository a hook of git's is of that has this process run says nothing of another
        for name in ["GIT_DIR", "GIT_COMMON_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_PREFIX"] {
            command.env_remove(name);
        }
        let name = path.as_ref().to_string_lossy().into_owned();
        Self { command, bare: false, name, watched: &[], quiet: false, heard: None, reason, limit: None }
    }

    /// A program for root, by path or found by PATH. systemd sets HOME and the like to the
    /// instance's user even for the lines that run as root; nothing of that home may count here.
    pub fn as_root(path: impl AsRef<OsStr>) -> Self {
        let mut program = Self { bare: true, ..Self::new(path) };
        program.command.env_clear().env("HOME", "/root").env("USER", "root");
        program.keep_env("PATH").keep_env("LOCALE_ARCHIVE")
    }

    /// This very program with other arguments, as `user`.
    pub fn ourselves_as(user: &str) -> Result<Self> {
        let ourselves = std::env::current_exe().context(|| "find this program's own file".into())?;
        Self::as_user(user, ourselves)
    }

    /// A program as `user`, who can never be root again: no group, no capability and no way to gain any.
    pub fn as_user(user: &str, program: impl AsRef<OsStr>) -> Result<Self> {
        let doing = || format!("find user {user:?}");
        let user = User::from_name(user).context(doing)?.ok_or("there is no such user").context(doing)?;
        let mut program = Self::as_root("setpriv")
            .args([format!("--reuid={}", user.uid), format!("--regid={}", user.gid)])
            .args(["--init-groups", "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all", "--"])
            .arg(program);
        program.command.env("HOME", &user.dir).env("USER", &user.name).env("LOGNAME", &user.name);
        program.command.current_dir("/");
        Ok(PROXIES.into_iter().fold(program, Self::keep_env))
    }

    /// Hands one variable of this process' environment on.
    pub fn keep_env(mut self, name: &str) -> Self {
        if let Some(value) = std::env::var_os(name) {
            self.command.env(name, value);
        }
        self
    }

    /// Has git reach others by the user's own ssh.
    pub fn by_ssh(self) -> Self {
        let theirs = ["GIT_SSH_COMMAND", "GIT_SSH"].into_iter().find_map(std::env::var_os);
        if theirs.is_some() { self } else { self.env("GIT_SSH_COMMAND", SSH) }
    }

    /// Sets a variable.
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Adds an argument.
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.command.arg(argument);
        self
    }

    /// Adds arguments.
    pub fn args<A: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.command.args(arguments);
        self
    }

    /// Notes whether the program says one of these anywhere in its output.
    pub fn watch_for(mut self, words: &'static [&'static str]) -> Self {
        self.watched = words;
        self
    }

    /// Keeps its output out of the journal.
    pub fn quietly(mut self) -> Self {
        self.quiet = true;
        self
    }

    /// Has each line of its output heard as it is said.
    pub fn heard_by(mut self, heard: impl FnMut(&str) + 'static) -> Self {
        self.heard = Some(Box::new(heard));
        self
    }

    /// Has failures explained in another way.
    pub fn reason(mut self, reason: Reason) -> Self {
        self.reason = reason;
        self
    }

    /// Has it end, with its children, when that has passed; what is set already is handed on.
    pub fn within(mut self, limit: Duration) -> Self {
        let mut command = Command::new("timeout");
        if self.bare {
            command.env_clear();
        }
        if let Some(directory) = self.command.get_current_dir() {
            command.current_dir(directory);
        }
        command.stdin(Stdio::null()).args(["--kill-after=5", &limit.as_secs().to_string()]);
        command.arg(self.command.get_program()).args(self.command.get_args());
        for (name, value) in self.command.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        (self.command, self.limit) = (command, Some((limit, Instant::now())));
        self
    }

    /// What it reads as its input.
    pub fn input(mut self, input: File) -> Self {
        self.command.stdin(input);
        self
    }

    /// The directory to run in.
    pub fn directory(mut self, path: &Path) -> Self {
        self.command.current_dir(path);
        self
    }

    /// Runs the program, gives it `input`, returns its output; for programs that end soon by
    /// themselves. Fails if it cannot be started or does not succeed.
    pub fn output(self, doing: impl Fn() -> String, input: Option<&[u8]>) -> Result<Vec<u8>> {
        self.output_of(&doing, input)
    }

    /// The same as text, of a program without input.
    pub fn said(self, doing: impl Fn() -> String) -> Result<String> {
        Ok(String::from_utf8_lossy(&self.output_of(&doing, None)?).into_owned())
    }

    // compiled once, not for each caller; so are those below
    fn output_of(mut self, doing: &dyn Fn() -> String, input: Option<&[u8]>) -> Result<Vec<u8>> {
        let mut run = || -> io::Result<_> {
            self.command.stdout(Stdio::piped()).stderr(Stdio::piped());
            if input.is_some() {
                self.command.stdin(Stdio::piped());
            }
            let mut child = self.command.spawn()?;
            if let (Some(mut stdin), Some(input)) = (child.stdin.take(), input) {
                // a program that wants no more of it has its reasons: its status tells
                let _ = stdin.write_all(input);
            }
            collect(child)
        };
        let output = run().context(|| match self.command.get_current_dir() {
            // which is what is missing then
            Some(directory) if !directory.exists() => format!("run {} in {}", self.name, directory.display()),
            _ => format!("run {}", self.name),
        })?;
        self.succeeded(doing, output.status, output.stdout, &output.stderr)
    }

    fn succeeded(&self, doing: &dyn Fn() -> String, status: ExitStatus, output: Vec<u8>, said: &[u8]) -> Result<Vec<u8>> {
        if status.success() {
            return Ok(output);
        }
        let tail: Vec<String> = String::from_utf8_lossy(said).lines().map(text::line).collect();
        let tail = tail[tail.len().saturating_sub(TAIL_LINES)..].to_vec();
        if let Some((limit, _)) = self.limit.filter(|(limit, since)| since.elapsed() >= *limit) {
            return Err(Error::new(format!("Failed to {}: timed out after {} s", doing(), limit.as_secs())).with_tail(tail));
        }
        let said = (self.reason)(&tail).or_else(|| tail.last().cloned()).map(|line| format!(": {line}")).unwrap_or_default();
        Err(failed(format!("Failed to {}: {} {}{said}", doing(), self.name, describe(status)), status, tail))
    }

    /// The same for programs that take long: what they say besides goes to the end of the file `log`
    /// as it is said.
    pub fn logged(self, doing: impl Fn() -> String, log: &Path) -> Result<Vec<u8>> {
        self.logged_to(&doing, log)
    }

    fn logged_to(mut self, doing: &dyn Fn() -> String, log: &Path) -> Result<Vec<u8>> {
        let file = File::options().append(true).create(true).open(log).doing("write", log)?;
        let before = file.metadata().map_or(0, |metadata| metadata.len());
        let child = self.command.stdout(Stdio::piped()).stderr(file).spawn();
        let output = child.and_then(collect).context(|| format!("run {}", self.name))?;
        let mut said = Vec::new();
        if !output.status.success() {
            let mut file = File::open(log).doing("read", log)?;
            file.seek(SeekFrom::Start(before)).doing("read", log)?;
            said = end_of(file);
        }
        self.succeeded(doing, output.status, output.stdout, &said)
    }

    /// Runs the program with `input` as its input, and has `take` read what it writes. The program is ended
    /// where that has failed.
    pub fn filter<T>(mut self, doing: impl Fn() -> String, input: File, take: impl FnOnce(ChildStdout) -> Result<T, String>) -> Result<T> {
        let started = || format!("run {}", self.name);
        let mut child = self.command.stdin(input).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().context(started)?;
        let output = child.stdout.take().ok_or("it has no output").context(started)?;
        let taken = take(output);
        // nobody reads it any more: that ends it
        let ended = collect(child).context(started)?;
        match taken {
            Err(why) if ended.status.code().is_none_or(|code| code == 0) => Err(why).context(doing),
            // its own reason is the better one
            other => self.succeeded(&doing, ended.status, Vec::new(), &ended.stderr).and_then(|_| other.context(doing)),
        }
    }

    /// Has the program take the place of this one; returns why it could not.
    pub fn replace(mut self) -> Error {
        let error = self.command.exec();
        Error::new(format!("Failed to run {}: {error}", self.name))
    }

    /// Starts the program beside this one, and shows its output line by line.
    pub fn show(mut self) -> Result<Child> {
        let mut child = self.command.stdout(Stdio::piped()).spawn().context(|| format!("run {}", self.name))?;
        if let Some(output) = child.stdout.take() {
            std::thread::spawn(move || output::print_all(output));
        }
        Ok(child)
    }
}

/// Waits for a program's end with what it writes: all of its output, which must not be endless, and the end
/// of its errors.
fn collect(mut child: Child) -> io::Result<Output> {
    let errors = child.stderr.take().map(|errors| std::thread::spawn(move || end_of(errors)));
    let mut stdout = Vec::new();
    if let Some(output) = child.stdout.take() {
        output.take(OUTPUT_BYTES + 1).read_to_end(&mut stdout)?;
    }
    let too_much = stdout.len() as u64 > OUTPUT_BYTES;
    if too_much {
        child.kill()?;
    }
    let status = child.wait()?;
    if too_much {
        return Err(io::Error::other(format!("its output has more than {OUTPUT_BYTES} bytes")));
    }
    let stderr = errors.and_then(|errors| errors.join().ok()).unwrap_or_default();
    Ok(Output { status, stdout, stderr })
}

/// The last bytes of a stream.
fn end_of(mut stream: impl Read) -> Vec<u8> {
    let (mut kept, mut buffer) = (Vec::new(), [0; 8192]);
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        kept.extend_from_slice(&buffer[..count]);
        let surplus = kept.len().saturating_sub(TAIL_BYTES);
        kept.drain(..surplus);
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::program::exited::Exited;

    fn shell(script: &str) -> Program {
        Program::new("sh").args(["-c", script])
    }

    fn run(script: &str, limit: Duration) -> Result<Exited> {
        shell(script).run(limit, || "count".into())
    }

    #[test]
    fn the_reason_is_found_whatever_a_program_is_written_in() {
        for (said, reason) in [
            ("Traceback:\nOSError: [Errno 30] Read-only file system: '/boot/x'", ": OSError: [Errno 30] Read-only file system: '/boot/x'"),
            (
                "cannot copy a to b: No space left on device at i.pl line 5.\nbye",
                ": cannot copy a to b: No space left on device at i.pl line 5",
            ),
            ("SomeError: x\nerror: no\nbye", ": error: no"),
            ("bye", ""),
        ] {
            let ended = run(&format!("echo \"{said}\" >&2; exit 1"), Duration::from_secs(10)).unwrap();
            assert_eq!(ended.success().unwrap_err().to_string(), format!("Failed to count: exited with 1{reason}"));
        }
    }

    #[test]
    fn the_end_of_the_output_is_kept() {
        let ended = run("seq 1 100; echo problem >&2; exit 3", Duration::from_secs(10)).unwrap();
        assert_eq!(ended.status.code(), Some(3));
        assert_eq!(ended.tail.len(), TAIL_LINES);
        assert_eq!(ended.tail.last().unwrap(), "problem");
        let error = ended.success().unwrap_err();
        assert_eq!(error.to_string(), "Failed to count: exited with 3");
        assert!(!error.is_transient());
    }

    #[test]
    fn a_program_that_hangs_is_ended_with_its_children() {
        let before = Instant::now();
        let error = run("echo on my way; sleep 1000 & sleep 1000", Duration::from_millis(300)).err().unwrap();
        assert_eq!(error.to_string(), "Failed to count: timed out after 0 s");
        assert_eq!(error.tail(), ["on my way"]);
        assert!(before.elapsed() < Duration::from_secs(5));
    }

    /// Whether the process of this number, which the program has said last, is there.
    fn is_there(ended: &Exited) -> bool {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(ended.tail.last().unwrap().parse().unwrap()), None).is_ok()
    }

    #[test]
    fn what_is_logged_has_an_end_if_it_is_to() {
        let log = crate::testing::Directory::new();
        let log = log.path().join("log");
        let run =
            |script: &str, limit| shell(script).env("WORD", "on my way").within(Duration::from_secs(limit)).logged(|| "count".into(), &log);
        let before = Instant::now();
        let error = run("echo $WORD >&2; sleep 1000 & sleep 1000", 1).unwrap_err();
        assert_eq!((error.to_string().as_str(), error.tail()), ("Failed to count: timed out after 1 s", &["on my way".to_owned()][..]));
        assert!(before.elapsed() < Duration::from_secs(60));
        assert_eq!(run("echo $WORD", 60).unwrap(), b"on my way\n");
        assert_eq!(run("exit 3", 60).unwrap_err().to_string(), "Failed to count: sh exited with 3");
        let root = Program::as_root("/bin/sh").args(["-c", "echo $PWD ${CARGO_MANIFEST_DIR-nothing}"]).directory(Path::new("/"));
        assert_eq!(root.within(Duration::from_secs(60)).logged(|| "look".into(), &log).unwrap(), b"/ nothing\n");
    }

    #[test]
    fn a_child_left_behind_is_ended() {
        let before = Instant::now();
        let ended = run("sleep 1000 > /dev/null 2>&1 & echo $!", Duration::from_secs(60)).unwrap();
        assert!(ended.status.success() && !is_there(&ended));
        assert!(run("sleep 1000 &", Duration::from_secs(60)).unwrap().status.success());
        assert!(before.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn a_child_that_ignores_every_request_is_ended() {
        let script = "sh -c 'trap : TERM HUP INT; echo $$; while :; do sleep 1; done' & sleep 0.2";
        let ended = run(script, Duration::from_secs(60)).unwrap();
        assert!(ended.status.success() && !is_there(&ended));
    }

    #[test]
    fn a_child_that_goes_on_talking_makes_no_failure_of_a_success() {
        let before = Instant::now();
        let ended = run("while :; do echo talk; done & exit 0", Duration::from_secs(20)).unwrap();
        assert!(ended.status.success());
        assert!(before.elapsed() < Duration::from_secs(10));
        let ended = run("(sleep 0.1; echo late) & exit 0", Duration::from_secs(20)).unwrap();
        assert_eq!(ended.tail, ["late"]);
    }

    #[test]
    fn who_is_ended_by_another_is_not_to_blame() {
        for (signal, transient) in [("KILL", true), ("TERM", true), ("XFSZ", true), ("SEGV", false), ("ABRT", false)] {
            let script = format!("ulimit -c 0; kill -{signal} $$");
            assert_eq!(run(&script, Duration::from_secs(10)).unwrap().success().unwrap_err().is_transient(), transient, "{signal}");
            assert_eq!(shell(&script).output(|| "count".into(), None).unwrap_err().is_transient(), transient, "{signal}");
        }
    }

    #[test]
    fn output_takes_input_and_reports_errors() {
        assert_eq!(Program::new("cat").output(|| "copy".into(), Some(b"abc")).unwrap(), b"abc");
        let error = shell("echo 'error: no' >&2; exit 1").output(|| "try".into(), None).unwrap_err();
        assert_eq!(error.to_string(), "Failed to try: sh exited with 1: error: no");
        let endless = Program::new("cat").arg("/dev/zero").output(|| "try".into(), None).unwrap_err();
        assert_eq!(endless.to_string(), "Failed to run cat: its output has more than 67108864 bytes");
        let chatty = shell("yes no | head -c 10000000 >&2; echo 'error: at last' >&2; exit 1").output(|| "try".into(), None).unwrap_err();
        assert!(chatty.to_string().ends_with("error: at last") && chatty.tail().len() == TAIL_LINES);
        let missing = Program::new("/no/such/program").output(|| "try".into(), None).unwrap_err();
        assert!(missing.to_string().starts_with("Failed to run /no/such/program: No such file"));
    }
}
