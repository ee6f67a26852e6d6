//! Archives: from a directory to the same bytes each time.
//!
//! Where a link leads to is what is packed, if that is in the repository: what is published is no secret any more.

use std::fs::{self, File, Metadata};
use std::io::{ErrorKind, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::{Context, Result};
use crate::fleet::{LARGE, sha256};
use crate::gather::sorted;
use crate::git::git;
use crate::names::Sha256;
use crate::program::Program;
use crate::system::now;

/// What a private key begins with, somewhere in its first line.
const PRIVATE: &[u8] = b"PRIVATE KEY-----";
/// How much of a file that is.
const FIRST_LINE: u64 = 64;
/// For how many seconds a file has to be as it is to be told from what it becomes.
const SETTLED: i64 = 2;

/// Where files are packed from.
pub struct Origin {
    /// The repository, without links in its path: nothing beyond is packed.
    repository: PathBuf,
    /// The key that releases are signed with, if it is a file: that is not packed either.
    key: Option<Vec<u8>>,
    /// Which one that is.
    which: String,
}

/// What tells a file from what it was before: nobody can choose when it was changed last.
pub fn identity(file: &Metadata) -> String {
    let times = (file.mtime(), file.mtime_nsec(), file.ctime(), file.ctime_nsec());
    format!("{}:{} {} {:o} {times:?}", file.dev(), file.ino(), file.size(), file.mode())
}

impl Origin {
    /// The repository in this directory, whose releases are signed with this key.
    pub fn new(repository: &Path, key: Option<&Path>) -> Result<Self> {
        let which = key.and_then(|key| key.metadata().ok()).map_or(String::new(), |metadata| identity(&metadata));
        Ok(Self { repository: repository.canonicalize().doing("read", repository)?, key: key.and_then(|key| fs::read(key).ok()), which })
    }

    /// Fails unless what a path leads to is in the repository, and not what git keeps there.
    fn check_inside(&self, path: &Path) -> Result<()> {
        let target = match path.canonicalize() {
            Err(error) if error.kind() == ErrorKind::NotFound && path.is_symlink() => {
                return Err(format!("dangling link to {}", fs::read_link(path).unwrap_or_default().display())).doing("pack", path);
            }
            other => other.doing("pack", path)?,
        };
        let inside = target.strip_prefix(&self.repository).is_ok_and(|below| below.iter().all(|part| !part.eq_ignore_ascii_case(".git")));
        let why = || format!("link to {}, outside of the repository {}", target.display(), self.repository.display());
        if inside { Ok(()) } else { Err(why()).doing("pack", path) }
    }

    /// Fails unless a file may be published, and can be read where it is unpacked. Returns whether there is nothing to say of it.
    fn check(&self, path: &Path) -> Result<bool> {
        let doing = || format!("pack {path:?}");
        if path.as_os_str().as_bytes().iter().any(|byte| byte.is_ascii_control() || *byte == b'\\') {
            return Err("line breaks, control characters and backslashes are not allowed in names").context(doing);
        }
        self.check_inside(path)?;
        let mut file = File::open(path).context(doing)?;
        let mut beginning = Vec::new();
        file.by_ref().take(FIRST_LINE).read_to_end(&mut beginning).context(doing)?;
        if beginning.windows(PRIVATE.len()).any(|part| part == PRIVATE) {
            if self.key.as_ref().is_some_and(|key| fs::read(path).is_ok_and(|contents| contents == *key)) {
                return Err("it is the key that signs releases, and others can read what is published").context(doing);
            }
            log::warn!("{} is a private key; others can read what is published, on the hub and on the host.", path.display());
            return Ok(false);
        }
        Ok(true)
    }
}

/// All files below a directory, but those of git, the links that `nix build` leaves and those that say
/// that somebody is editing a file.
pub fn files(directory: &Path, origin: &Origin) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    walk(directory, Path::new(""), origin, &mut Vec::new(), &mut files)?;
    Ok(sorted(files))
}

fn walk(top: &Path, below: &Path, origin: &Origin, above: &mut Vec<(u64, u64)>, files: &mut Vec<PathBuf>) -> Result<()> {
    let place = top.join(below);
    let doing = || format!("read {}", place.display());
    origin.check_inside(&place)?;
    let metadata = fs::metadata(&place).context(doing)?;
    let identity = (metadata.dev(), metadata.ino());
    if above.contains(&identity) {
        return Err("a link leads to a directory above it").context(doing);
    }
    above.push(identity);
    for entry in fs::read_dir(&place).context(doing)? {
        let entry = entry.context(doing)?;
        let (file_name, path) = (entry.file_name(), entry.path());
        let link = fs::read_link(&path).ok();
        let is_built = file_name.as_bytes().starts_with(b"result") && link.as_ref().is_some_and(|to| to.starts_with("/nix/store"));
        let is_lock = file_name.as_bytes().starts_with(b".#") && link.is_some() && !path.exists();
        if file_name.eq_ignore_ascii_case(".git") || is_built || is_lock {
            continue;
        }
        origin.check_inside(&path)?;
        let metadata = fs::metadata(&path).doing("read", &path)?;
        let name = below.join(file_name);
        if metadata.is_dir() {
            walk(top, &name, origin, above, files)?;
        } else if metadata.is_file() {
            files.push(name);
        } else {
            return Err("it is neither a file nor a directory").doing("read", &path);
        }
    }
    above.pop();
    Ok(())
}

/// The files of a directory that git tracks, as they are now.
pub fn tracked_files(directory: &Path) -> Result<Vec<PathBuf>> {
    let list = git(directory).args(["ls-files", "-z"]).output(|| format!("list what git tracks in {}", directory.display()), None)?;
    let names = list.split(|&byte| byte == 0).filter(|name| !name.is_empty());
    let names = names.map(|name| PathBuf::from(std::ffi::OsStr::from_bytes(name)));
    // neither what is removed but not yet committed, nor submodules
    Ok(sorted(names.filter(|name| directory.join(name).is_file())))
}

/// What tells these files of a directory from what they were before; `None` if one was changed a moment ago, and could be
/// changed again in the same.
pub fn stamp(directory: &Path, files: &[PathBuf], origin: &Origin) -> Option<String> {
    let settled = i64::try_from(now()).ok()? - SETTLED;
    let of = |file: &PathBuf| {
        let metadata = fs::metadata(directory.join(file)).ok().filter(|metadata| metadata.ctime() < settled)?;
        Some(format!("{file:?} {}", identity(&metadata)))
    };
    let lines = [Some(origin.which.clone())].into_iter().chain(files.iter().map(of)).collect::<Option<Vec<_>>>()?;
    Some(lines.join("\n"))
}

/// Packs files of a directory into a new archive; returns its hash and its size, and whether there is nothing to say of it.
pub fn pack(directory: &Path, files: &[PathBuf], origin: &Origin, file: &Path) -> Result<(Sha256, u64, bool)> {
    let doing = || format!("pack {}", directory.display());
    let is_plain = files.iter().try_fold(true, |is_plain, file| origin.check(&directory.join(file)).map(|is| is_plain && is))?;
    let list: Vec<u8> = files.iter().flat_map(|file| [file.as_os_str().as_bytes(), b"\0"].concat()).collect();
    let tar = Program::new("tar").args(["--create", "--format=gnu", "--use-compress-program=gzip -n", "--file"]).arg(file);
    let tar = tar.args(["--dereference", "--hard-dereference", "--mtime=@0", "--owner=0", "--group=0", "--numeric-owner"]);
    let tar = tar.args(["--mode=u=rwX,go=rX", "--directory"]).arg(directory).args(["--no-recursion", "--null", "--files-from=-"]);
    tar.env("LC_ALL", "C").output(doing, Some(&list))?;
    let size = fs::metadata(file).context(doing)?.len();
    if size > LARGE {
        return Err(format!("it has {size} bytes, more than {LARGE}")).context(doing);
    }
    Ok((sha256::of_file(file)?, size, is_plain))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::archive::unpack::unpack;
    use crate::testing::Directory;
    use std::os::unix::fs::symlink;

    fn packed(directory: &Path, archive: &Path) -> Result<(Sha256, u64, bool)> {
        let origin = Origin::new(directory, None)?;
        pack(directory, &files(directory, &origin)?, &origin, archive)
    }

    #[test]
    fn the_same_files_make_the_same_archive() {
        let place = Directory::new();
        let (one, two) = (place.path().join("one"), place.path().join("two"));
        for (directory, order) in [(&one, ["-a", "b c"]), (&two, ["b c", "-a"])] {
            fs::create_dir_all(directory.join("sub/empty")).unwrap();
            for name in order {
                fs::write(directory.join(name), "x").unwrap();
            }
        }
        fs::hard_link(one.join("-a"), one.join("sub/file")).unwrap();
        symlink("../-a", two.join("sub/file")).unwrap();
        symlink("/nix/store/x", two.join("result-1")).unwrap();
        symlink("user@host.1:2", two.join("sub/.#file")).unwrap();
        fs::create_dir(two.join(".git")).unwrap();
        fs::write(two.join(".git/config"), "").unwrap();
        let archive = place.path().join("a.tar.gz");
        fs::File::open(one.join("b c")).unwrap().set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        let origin = Origin::new(&two, None).unwrap();
        let otherwise = files(&two, &origin).unwrap();
        // in whichever order the directory has them
        assert!(otherwise.is_sorted());
        assert_eq!(packed(&one, &archive).unwrap(), pack(&two, &otherwise, &origin, &place.path().join("b.tar.gz")).unwrap());
        let unpacked = place.path().join("unpacked");
        unpack(&archive, &unpacked).unwrap();
        let mut found = files(&unpacked, &Origin::new(&unpacked, None).unwrap()).unwrap();
        found.sort();
        assert_eq!(found, ["-a", "b c", "sub/file"].map(PathBuf::from));
        assert!(!unpacked.join("sub/file").is_symlink());
    }

    #[test]
    fn what_cannot_be_packed_is_named() {
        let (place, secret) = (Directory::new(), Directory::new());
        let (outside, secret) = (secret.path().to_owned(), secret.path().join("secret"));
        fs::write(&secret, "").unwrap();
        for (target, why) in [
            ("..", "leads to a directory above it"),
            ("nowhere", "dangling link to nowhere"),
            ("/dev/null", "outside of the repository"),
            (secret.to_str().unwrap(), "outside of the repository"),
            (outside.to_str().unwrap(), "outside of the repository"),
            ("../.git/config", "outside of the repository"),
            ("../.git", "outside of the repository"),
        ] {
            let _ = fs::remove_dir_all(place.path());
            fs::create_dir_all(place.path().join("sub")).unwrap();
            fs::create_dir(place.path().join(".git")).unwrap();
            fs::write(place.path().join(".git/config"), "").unwrap();
            symlink(target, place.path().join("sub/link")).unwrap();
            let error = packed(place.path(), &outside.join("a")).unwrap_err().to_string();
            assert!(error.contains("sub/link") && error.contains(why), "{error}");
            // what git tracks, the same way
            let origin = Origin::new(place.path(), None).unwrap();
            if place.path().join("sub/link").is_file() {
                assert!(pack(place.path(), &["sub/link".into()], &origin, &outside.join("a")).is_err());
            }
        }
        fs::remove_file(place.path().join("sub/link")).unwrap();
        for (name, why) in [("a\nb", "line break"), ("a\\b", "backslash"), ("a\u{1b}", "control character")] {
            fs::write(place.path().join(name), "").unwrap();
            let error = packed(place.path(), &outside.join("a")).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
            fs::remove_file(place.path().join(name)).unwrap();
        }
    }

    #[test]
    fn the_signing_key_is_not_published() {
        let place = Directory::new();
        let key = place.path().join("key");
        fs::write(&key, "-----BEGIN OPENSSH PRIVATE KEY-----\nx\n").unwrap();
        fs::create_dir(place.path().join("host")).unwrap();
        symlink("../key", place.path().join("host/note")).unwrap();
        let origin = Origin::new(place.path(), Some(&key)).unwrap();
        let archive = place.path().join("a.tar.gz");
        let error = pack(place.path(), &["host/note".into()], &origin, &archive).unwrap_err().to_string();
        assert!(error.contains("host/note") && error.contains("the key that signs releases"), "{error}");
        // somebody else's is a matter of theirs
        fs::write(place.path().join("other"), "-----BEGIN PRIVATE KEY-----\ny\n").unwrap();
        assert!(!pack(place.path(), &["other".into()], &origin, &archive).unwrap().2);
    }

    #[test]
    fn files_are_told_from_what_they_were() {
        let place = Directory::new();
        let (one, other) = (place.path().join("one"), place.path().join("other"));
        let stamp = |key: Option<&Path>| {
            let origin = Origin::new(place.path(), key).unwrap();
            stamp(place.path(), &files(place.path(), &origin).unwrap(), &origin)
        };
        fs::write(&one, "1").unwrap();
        // it may be changed once more in the same moment
        assert_eq!(stamp(None), None);
        let settle = || std::thread::sleep(std::time::Duration::from_secs(SETTLED.unsigned_abs() + 1));
        settle();
        let first = stamp(None).unwrap();
        assert_eq!(stamp(None).unwrap(), first);
        assert_ne!(stamp(Some(&one)).unwrap(), first);
        // as long, and as old
        let time = fs::metadata(&one).unwrap().modified().unwrap();
        fs::write(&one, "2").unwrap();
        File::options().append(true).open(&one).unwrap().set_modified(time).unwrap();
        symlink("one", &other).unwrap();
        settle();
        let second = stamp(None).unwrap();
        fs::remove_file(&other).unwrap();
        let third = stamp(None).unwrap();
        assert!(first != second && second != third && third != first);
    }
}
