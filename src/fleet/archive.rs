//! A release's archive: from a file that is what its manifest says to a directory, with no way out
//! of it.
//!
//! Only files and directories are unpacked, below a directory that is new, within limits that hold
//! while it is unpacked. tar and gzip do the work; what may be in an archive is decided here, by
//! its list of contents, before anything is unpacked.

use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::error::{Context, Result};
use crate::fleet::LARGE;
use crate::program::Program;

/// How many bytes and how many names may be in one.
const UNPACKED: u64 = 256 * 1024 * 1024;
const NAMES: usize = 20_000;
/// How long unpacking may take.
const LIMIT: Duration = Duration::from_secs(300);

/// Unpacks an archive into a directory, which is made anew. Fails, and leaves nothing, if there is
/// anything in the archive but files and directories with names that stay below it.
pub fn unpack(archive: &Path, directory: &Path) -> Result<()> {
    let tar = directory.with_extension("tar");
    make_anew(directory)?;
    let unpacked = unpack_by(archive, &tar, directory);
    let _ = fs::remove_file(tar);
    if unpacked.is_err() {
        clear(directory)?;
    }
    unpacked
}

/// Makes an empty directory, in the place of what is there.
pub fn make_anew(directory: &Path) -> Result<()> {
    clear(directory)?;
    fs::create_dir_all(directory).context(|| format!("make {}", directory.display()))
}

/// Removes what [`unpack`] has made.
pub fn clear(directory: &Path) -> Result<()> {
    if directory.symlink_metadata().is_err() {
        return Ok(());
    }
    fs::remove_dir_all(directory).context(|| format!("remove {}", directory.display()))
}

fn unpack_by(archive: &Path, tar: &Path, directory: &Path) -> Result<()> {
    let doing = || format!("unpack {}", archive.display());
    let size = fs::metadata(archive).context(doing)?.len();
    if size > LARGE {
        return Err(format!("it has {size} bytes, more than {LARGE}")).context(doing);
    }
    // the limit ends it, whatever it unpacks to
    let limit = format!("--fsize={UNPACKED}");
    let unzip = Program::new("prlimit").args([&limit, "--", "/bin/sh", "-euc", r#"gzip -dc < "$1" > "$2""#, "sh"]).arg(archive).arg(tar);
    unzip.run(LIMIT, doing)?.success()?;

    let list = tar_program().args(["--list", "--verbose", "--quoting-style=escape", "--file"]).arg(tar);
    let list = list.output(doing, None)?;
    check(&String::from_utf8_lossy(&list)).context(doing)?;
    let extract = tar_program().args(["--extract", "--no-same-owner", "--no-same-permissions", "--file"]).arg(tar);
    extract.arg("--directory").arg(directory).run(LIMIT, doing)?.success()
}

fn tar_program() -> Program {
    Program::new("tar").env("LC_ALL", "C").env("TZ", "UTC").args(["--numeric-owner"])
}

/// Checks what `tar --list --verbose` says of an archive.
fn check(list: &str) -> Result<(), String> {
    let (mut names, mut total) = (0, 0_u64);
    for line in list.lines() {
        // -rw-r--r-- 0/0      12 1970-01-01 00:00 name
        let (kind, rest) = line.split_at_checked(1).unwrap_or_default();
        let mut fields = rest.split_ascii_whitespace();
        let size = fields.nth(2).and_then(|size| size.parse::<u64>().ok());
        let name = fields.nth(1).and_then(|time| line.split_once(&format!(" {time} ")));
        let (Some(size), Some((_, name))) = (size, name) else {
            return Err(format!("expected a file or a directory, found {line:?}"));
        };
        if kind != "-" && kind != "d" {
            return Err(format!("expected a file or a directory, found {line:?}"));
        }
        let is_git = |part: &str| part.eq_ignore_ascii_case(".git");
        // tar writes letters beyond ASCII as \303, and what may not be in a line as \n or \033
        let odd = name.split('\\').skip(1).any(|rest| !rest.starts_with(['2', '3']));
        if name.starts_with('/') || odd || name.split('/').any(|part| part == ".." || is_git(part)) {
            return Err(format!("expected a name below the directory, found {name:?}"));
        }
        names += 1;
        total = total.saturating_add(size);
        if names > NAMES || total > UNPACKED {
            return Err(format!("expected at most {NAMES} names and {UNPACKED} bytes, found more"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Directory;

    fn shell(script: &str, directory: &Path) {
        Program::new("sh").args(["-euc", script]).directory(directory).output(|| "prepare".into(), None).unwrap();
    }

    /// Has a script make `../a.tar.gz`, and unpacks it into `target`.
    fn attempt(script: &str) -> (Directory, Result<()>) {
        let place = Directory::new();
        shell(&format!("mkdir source; cd source; {script}"), place.path());
        let unpacked = unpack(&place.path().join("a.tar.gz"), &place.path().join("target"));
        (place, unpacked)
    }

    #[test]
    fn files_and_directories_are_unpacked() {
        let (place, unpacked) = attempt("mkdir d; echo 'a b' > 'd/a b'; touch x ä; chmod +x x; tar czf ../a.tar.gz .");
        unpacked.unwrap();
        let target = place.path().join("target");
        assert_eq!(fs::read_to_string(target.join("d/a b")).unwrap(), "a b\n");
        assert!(target.join("x").exists() && target.join("ä").exists());
        assert!(!place.path().join("target.tar").exists());
    }

    #[test]
    fn what_is_refused_leaves_nothing() {
        for script in [
            "ln -s /etc/passwd l; tar czf ../a.tar.gz .",
            "ln -s .. l; tar czf ../a.tar.gz .",
            "touch a; ln a b; tar czf ../a.tar.gz .",
            "mkfifo f; tar czf ../a.tar.gz .",
            "mknod n c 1 3 || mkfifo n; tar czf ../a.tar.gz .",
            "touch ../out; tar czPf ../a.tar.gz ../out",
            "touch a; tar czPf ../a.tar.gz $PWD/a",
            "touch a; tar czf ../a.tar.gz --transform 's,a,x/../../out,' -P a",
            "mkdir .git; tar czf ../a.tar.gz .",
            "mkdir -p d/.GIT; tar czf ../a.tar.gz .",
            "touch \"$(printf 'a\\nb')\"; tar czf ../a.tar.gz .",
            "truncate -s 300M big; tar cSzf ../a.tar.gz .",
            "truncate -s 300M big; tar czf ../a.tar.gz .",
            "head -c 70000000 /dev/urandom > big; tar czf ../a.tar.gz .",
            "seq 20001 | xargs touch; tar czf ../a.tar.gz .",
            "echo nonsense > ../a.tar.gz",
            "echo nonsense | gzip > ../a.tar.gz",
        ] {
            let (place, unpacked) = attempt(script);
            assert!(unpacked.is_err(), "{script}");
            assert!(!place.path().join("target").exists() && !place.path().join("target.tar").exists(), "{script}");
        }
    }
}
