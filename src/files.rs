//! Files that survive a crash, and files that somebody else can write.
//!
//! A file written here is, after a power cut at any moment, either the old or the new one. A file
//! read here as somebody else's is never a link, a pipe, sparse or larger than asked for.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag, openat, readlinkat};
use nix::sys::stat::Mode;
use nix::unistd::{Uid, User, Whence, geteuid, lseek};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Context, Result};
use crate::json;
use crate::program::Program;

/// Replaces the file `path` by one with these contents and permissions, whatever the umask is. Whatever lies in the way of the
/// new file on its way there, put by whomever, is removed.
pub fn write(path: &Path, contents: &[u8], mode: u32) -> io::Result<()> {
    let mut name = path.file_name().ok_or(ErrorKind::InvalidInput)?.to_owned();
    // of two processes that write the same file, each writes its own
    name.push(format!(".{}.new", std::process::id()));
    let new = path.with_file_name(name);
    tidy(path);
    clear(&new)?;
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&new)?;
    let rename = || match fs::rename(&new, path) {
        Err(error) if error.kind() == ErrorKind::IsADirectory => clear(path).and_then(|()| fs::rename(&new, path)),
        other => other,
    };
    let permit = file.set_permissions(Permissions::from_mode(mode));
    let written = permit.and_then(|()| file.write_all(contents)).and_then(|()| file.sync_all()).and_then(|()| rename());
    if written.is_err() {
        // a full disk must not stay full because of this file
        let _ = fs::remove_file(&new);
    }
    written?;
    sync_parent(path)
}

/// The same, unless it is there with these contents. The error says which file.
pub fn put(path: &Path, contents: &[u8], mode: u32) -> Result<()> {
    let is_there = read_foreign(path, contents.len() as u64).is_ok_and(|there| there == contents);
    if is_there { Ok(()) } else { write(path, contents, mode).doing("write", path) }
}

/// The same for a value, as JSON.
pub fn put_json(path: &Path, value: &impl Serialize, mode: u32) -> Result<()> {
    put(path, &serde_json::to_vec_pretty(value).doing("write", path)?, mode)
}

/// Replaces a file by one with a value, as JSON. The error says which file.
pub fn write_json(path: &Path, value: &impl Serialize, mode: u32) -> Result<()> {
    write(path, &serde_json::to_vec_pretty(value).doing("write", path)?, mode).doing("write", path)
}

/// What was found of a file; `None` if that is not there.
pub fn if_there<T>(found: io::Result<T>) -> io::Result<Option<T>> {
    match found {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

/// Reads a JSON file that nobody else can have written; `None` if it is not there.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    if_there(fs::read(path)).doing("read", path)?.map(|text| json::parse(&text).doing("read", path)).transpose()
}

/// The same of one that anybody can have written, of at most `limit` bytes; its texts are made fit to show.
pub fn read_foreign_json<T: DeserializeOwned>(path: &Path, limit: u64) -> Result<Option<T>> {
    if_there(read_foreign(path, limit)).doing("read", path)?.map(|text| json::parse_foreign(&text).doing("read", path)).transpose()
}

/// How long ago a file or directory was changed, or, by a clock that was ahead, how far off that is.
pub fn age(path: &Path) -> io::Result<Duration> {
    Ok(path.metadata()?.modified()?.elapsed().unwrap_or_else(|error| error.duration()))
}

/// Keeps room on the disk, to be given up for something small when the disk is full.
pub fn reserve(path: &Path, size: u64) -> io::Result<()> {
    if path.try_exists()? {
        return Ok(());
    }
    let mut contents = Vec::new();
    // what a file system could compress would keep no room
    File::open("/dev/urandom")?.take(size).read_to_end(&mut contents)?;
    write(path, &contents, 0o600)
}

/// Takes away what those have left that were to write this file, and were killed, or a Nix that was to make this link: what it
/// leaves among the roots of the store would be one for ever.
pub fn tidy(path: &Path) {
    let (Some(directory), Some(name)) = (path.parent(), path.file_name().and_then(OsStr::to_str)) else { return };
    // numbers of processes come again
    let program = |process: &str| fs::read(Path::new("/proc").join(process).join("comm")).ok();
    let is_at_it = |writer: &str| program(writer).is_some_and(|name| name.starts_with(b"nix") || Some(name) == program("self"));
    for other in fs::read_dir(directory).into_iter().flatten().flatten() {
        let other = other.path();
        let rest = other.file_name().and_then(OsStr::to_str).and_then(|other| other.strip_prefix(name)).unwrap_or_default();
        let of_nix = || Some(rest.strip_prefix(".tmp-")?.split_once('-')?.0);
        let writer = rest.strip_prefix('.').and_then(|rest| rest.strip_suffix(".new")).or_else(of_nix);
        if writer.is_some_and(|writer| writer.parse::<u32>().is_ok() && !is_at_it(writer)) {
            let _ = fs::remove_file(&other);
        }
    }
}

/// Does what changes nothing more the second time; a disk may fail once.
pub fn insist<T>(work: impl Fn() -> io::Result<T>) -> io::Result<T> {
    work().or_else(|_| work())
}

/// A file that has no name, and goes when it is closed.
pub fn unnamed(directory: &Path, mode: u32) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(OFlag::O_TMPFILE.bits()).mode(mode).open(directory)
}

/// Removes the file `path`, if it is there.
pub fn remove(path: &Path) -> io::Result<()> {
    tidy(path);
    if_there(fs::remove_file(path))?.map_or(Ok(()), |()| sync_parent(path))
}

/// Removes whatever is at `path`, if something is; rm knows its way out of any depth.
pub fn clear(path: &Path) -> io::Result<()> {
    if if_there(fs::remove_file(path)).is_ok() {
        return Ok(());
    }
    let remove = Program::new("rm").args(["--recursive", "--force", "--"]).arg(path);
    remove.output(|| format!("remove {}", path.display()), None).map(drop).map_err(|error| io::Error::other(error.to_string()))
}

/// Removes what is in a directory, but for what is to be kept.
pub fn clean(directory: &Path, is_kept: impl Fn(&Path) -> bool) -> Result<()> {
    let found = fs::read_dir(directory).doing("read", directory)?.flatten().map(|entry| entry.path());
    for path in found.filter(|path| !is_kept(path)) {
        clear(&path).and_then(|()| sync(directory)).doing("remove", &path)?;
    }
    Ok(())
}

/// Keeps what makes no sense beside its place, before something else is put there. Returns where.
pub fn keep_aside(path: &Path) -> io::Result<PathBuf> {
    let aside = aside(path);
    clear(&aside)?;
    // a directory has no second name
    fs::hard_link(path, &aside).or_else(|_| fs::rename(path, &aside))?;
    sync_parent(path).map(|()| aside)
}

/// Where that is.
pub fn aside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".unreadable");
    name.into()
}

/// Makes an empty directory in the place of what is there.
pub fn make_directory(path: &Path) -> io::Result<()> {
    clear(path).and_then(|()| fs::create_dir_all(path))
}

/// Makes the creation, renaming or removal of `path` durable.
pub fn sync_parent(path: &Path) -> io::Result<()> {
    sync(path.parent().ok_or(ErrorKind::InvalidInput)?)
}

/// Makes the contents of a file, or the names in a directory, durable.
pub fn sync(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Reads a file of which only the directory above it is trusted: no link, no pipe, no device is
/// opened, and a file of more than `limit` bytes is an error.
pub fn read_foreign(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let name = path.file_name().ok_or(ErrorKind::InvalidInput)?;
    read_foreign_below(path.parent().ok_or(ErrorKind::InvalidInput)?, name, limit)
}

/// The same, with whose file it is.
pub fn read_owned(path: &Path, limit: u64) -> io::Result<(Vec<u8>, u32)> {
    let file = open_foreign(path)?;
    let owner = file.metadata()?.uid();
    read_regular(file, limit).map(|contents| (contents, owner))
}

/// Opens such a file, whatever it is: no link is followed, and nothing is waited for.
pub fn open_foreign(path: &Path) -> io::Result<File> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    OpenOptions::new().read(true).custom_flags(flags.bits()).open(path)
}

/// The same with more than a name, below a directory that is trusted: what leads from there to the file is
/// somebody else's, too, and no link.
pub fn read_foreign_below(directory: &Path, path: impl AsRef<Path>, limit: u64) -> io::Result<Vec<u8>> {
    let is_directory = OFlag::O_PATH | OFlag::O_DIRECTORY;
    let mut at: OwnedFd = OpenOptions::new().read(true).custom_flags(is_directory.bits()).open(directory)?.into();
    let mut parts = path.as_ref().components().peekable();
    loop {
        let Some(Component::Normal(name)) = parts.next() else { return Err(ErrorKind::InvalidInput.into()) };
        if parts.peek().is_none() {
            return read_regular(open_at(&at, name, OFlag::O_NONBLOCK | OFlag::O_NOCTTY)?.into(), limit);
        }
        at = open_at(&at, name, is_directory)?;
    }
}

/// Reads a file for others, who may not be able to. Follows links, but goes through none and through no
/// directory that somebody could change but root and this user: or they would choose what is read.
pub fn read_for_others(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let parts = |path: &Path| path.iter().rev().filter(|part| *part != "/").map(OsStr::to_owned).collect::<Vec<_>>();
    // the directories that lead to where this is, and what is left to do from there
    let mut way: Vec<(PathBuf, OwnedFd)> = vec![("/".into(), File::open("/")?.into())];
    let (mut left, mut links) = (parts(path), 0);
    while let (Some(part), Some((above, directory))) = (left.pop(), way.last()) {
        if part == ".." {
            way.truncate(usize::max(way.len() - 1, 1));
            continue;
        }
        let place = above.join(&part);
        let refuse = |why: String| Err(io::Error::new(ErrorKind::PermissionDenied, format!("{} {why}", place.display())));
        let entry = open_at(directory, &part, OFlag::O_PATH)?;
        let (above, metadata) = (File::from(directory.try_clone()?).metadata()?, File::from(entry.try_clone()?).metadata()?);
        let is_file = !metadata.is_dir() && !metadata.is_symlink();
        if !is_file && ![0, geteuid().as_raw()].contains(&metadata.uid()) {
            return refuse(format!("is owned by {}, who could redirect it", user_name(metadata.uid())));
        }
        if metadata.is_dir() && metadata.mode() & 0o022 != 0 && metadata.mode() & 0o1000 == 0 {
            return refuse("is writable by others, who could redirect it".into());
        }
        if metadata.is_symlink() {
            let target = PathBuf::from(readlinkat(&entry, "")?);
            links += 1;
            if links > 40 {
                return refuse("has too many levels of links".into());
            }
            if target.is_absolute() {
                way.truncate(1);
            }
            left.extend(parts(&target));
        } else if metadata.is_dir() {
            way.push((place, entry));
        } else if above.mode() & 0o002 != 0 {
            return refuse("is world-writable".into());
        } else if left.is_empty() {
            return read_regular(open_at(directory, &part, OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY)?.into(), limit);
        } else {
            return Err(ErrorKind::NotADirectory.into());
        }
    }
    Err(ErrorKind::IsADirectory.into())
}

/// Opens a name in a directory, no link. openat2 goes a whole way so, but not in a unit that `RestrictSUIDSGID=` protects.
fn open_at(directory: &OwnedFd, name: &OsStr, flags: OFlag) -> nix::Result<OwnedFd> {
    openat(directory, name, flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())
}

/// A user's name, or number where there is none.
pub fn user_name(user: u32) -> String {
    User::from_uid(Uid::from_raw(user)).ok().flatten().map_or_else(|| user.to_string(), |user| user.name)
}

fn read_regular(file: File, limit: u64) -> io::Result<Vec<u8>> {
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::new(ErrorKind::InvalidData, "not a regular file"));
    }
    // what is no byte on the other's disk must not become one on ours
    let data = if metadata.len() == 0 { 0 } else { lseek(&file, 0, Whence::SeekHole)? };
    if u64::try_from(data).is_ok_and(|data| data < metadata.len()) {
        return Err(io::Error::new(ErrorKind::FileTooLarge, "it is sparse"));
    }
    let mut contents = Vec::new();
    (&file).seek(SeekFrom::Start(0))?;
    file.take(limit + 1).read_to_end(&mut contents)?;
    if contents.len() as u64 > limit {
        return Err(io::Error::new(ErrorKind::FileTooLarge, format!("more than {limit} bytes")));
    }
    Ok(contents)
}

/// Locks a directory, which needs no right to write there; `None` if another has it.
pub fn lock(directory: &Path, how: FlockArg) -> Result<Option<Flock<File>>> {
    match Flock::lock(File::open(directory).doing("lock", directory)?, how) {
        Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        other => other.map(Some).map_err(|(_, error)| error).doing("lock", directory),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Directory;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn what_a_killed_writer_has_left_is_taken_away() {
        let directory = Directory::new();
        let path = directory.path().join("x.json");
        let mut dead = std::process::Command::new("true").spawn().unwrap();
        dead.wait().unwrap();
        let left = [dead.id(), 1].map(|writer| [format!("x.json.{writer}.new"), format!("x.json.tmp-{writer}-5")]).concat();
        let left: Vec<_> = left.iter().map(|name| directory.path().join(name)).collect();
        let alive = directory.path().join(format!("x.json.{}.new", std::process::id()));
        for change in [|path: &Path| write(path, b"y", 0o600), remove] {
            for file in left.iter().chain([&alive]) {
                fs::write(file, "half").unwrap();
            }
            change(&path).unwrap();
            assert!(left.iter().all(|file| !file.exists()));
        }
        assert!(alive.exists(), "of one that is at it");
    }

    #[test]
    fn whatever_is_in_the_way_of_a_file_is_removed() {
        let place = Directory::new();
        let (there, outside) = (place.path().join("there"), place.path().join("outside"));
        fs::write(&outside, "").unwrap();
        for place in [&there, &place.path().join(format!("there.{}.new", std::process::id()))] {
            let make: [&dyn Fn(); 3] = [&|| fs::write(place, "old").unwrap(), &|| symlink(&outside, place).unwrap(), &|| {
                fs::create_dir_all(place.join("a/b")).unwrap();
            }];
            for make in make {
                clear(place).unwrap();
                make();
                write(&there, b"new", 0o600).unwrap();
                assert_eq!(fs::read(&there).unwrap(), b"new");
                clear(place).unwrap();
                make();
                make_directory(place).unwrap();
                assert_eq!(fs::read_dir(place).unwrap().count(), 0);
            }
            clear(place).unwrap();
        }
        assert_eq!(fs::read(&outside).unwrap(), b"");
    }

    #[test]
    fn what_somebody_else_has_put_there_leads_nowhere() {
        let place = Directory::new();
        let (trusted, other) = (place.path().join("trusted"), place.path().join("other"));
        for directory in [&trusted.join("theirs"), &other] {
            fs::create_dir_all(directory).unwrap();
            fs::write(directory.join("file"), "x").unwrap();
        }
        symlink(&other, trusted.join("absolute")).unwrap();
        symlink("theirs", trusted.join("within")).unwrap();
        symlink("file", trusted.join("theirs/link")).unwrap();
        nix::unistd::mkfifo(&trusted.join("theirs/fifo"), Mode::S_IRWXU).unwrap();
        let read = |path: &str, limit| read_foreign_below(&trusted, path, limit).map(|contents| contents.len()).ok();
        assert_eq!(read("theirs/file", 1), Some(1));
        assert_eq!(read("theirs/file", 0), None);
        for odd in ["absolute/file", "within/file", "theirs/link", "theirs/fifo", "theirs", "", "../other/file", "theirs/../../other/file"]
        {
            assert_eq!(read(odd, 1), None, "{odd}");
        }
        assert!(read_foreign(&trusted.join("theirs/link"), 1).is_err());
        // nor does it hold anybody up
        assert!(open_foreign(&trusted.join("theirs/link")).is_err() && open_foreign(&trusted.join("theirs/fifo")).is_ok());
        // a trusted directory may be named by a link
        assert_eq!(read_foreign(&trusted.join("within/file"), 1).unwrap(), b"x");
    }

    #[test]
    fn nothing_is_too_deep_to_be_removed() {
        let place = Directory::new();
        let top = place.path().join("deep");
        fs::create_dir(&top).unwrap();
        let (flags, mode) = (OFlag::O_PATH | OFlag::O_DIRECTORY, Mode::S_IRWXU);
        let mut directory = nix::fcntl::open(&top, flags, mode).unwrap();
        for _ in 0..2_000 {
            nix::sys::stat::mkdirat(&directory, "d", mode).unwrap();
            directory = openat(&directory, "d", flags, mode).unwrap();
        }
        clear(&top).unwrap();
        assert!(!top.exists());
        clear(&top).unwrap();
        symlink("/etc", &top).unwrap();
        clear(&top).unwrap();
        assert!(!top.is_symlink() && Path::new("/etc").exists());
    }

    #[test]
    fn what_is_read_for_others_is_nobody_elses_to_choose() {
        let place = Directory::new();
        let at = |name: &str| place.path().join(name);
        fs::create_dir_all(at("generation/1")).unwrap();
        fs::write(at("generation/1/secret"), "secret").unwrap();
        // as agenix and sops-nix do it
        symlink(at("generation/1"), at("current")).unwrap();
        symlink("../current/../1/./secret", at("generation/link")).unwrap();
        symlink("loop", at("loop")).unwrap();
        let read = |name: &str| read_for_others(&at(name), 10);
        for name in ["generation/1/secret", "current/secret", "generation/link", "current/../link"] {
            assert_eq!(read(name).unwrap(), b"secret", "{name}");
        }
        for name in ["loop", "current", "current/none", "generation/1/secret/x"] {
            read(name).unwrap_err();
        }
        assert!(read_for_others(&at("current/secret"), 5).is_err());
        let mode = |name: &str, mode| fs::set_permissions(at(name), PermissionsExt::from_mode(mode)).unwrap();
        for (bits, is_read) in [(0o777, false), (0o775, false), (0o1775, true), (0o1777, false), (0o700, true)] {
            mode("generation/1", bits);
            assert_eq!(read("current/secret").is_ok(), is_read, "{bits:o}");
        }
        if geteuid().is_root() {
            // its contents may be somebody's, where it leads may not
            std::os::unix::fs::chown(at("generation/1/secret"), Some(1), None).unwrap();
            read("current/secret").unwrap();
            for name in ["current", "generation"] {
                std::os::unix::fs::lchown(at(name), Some(1), None).unwrap();
                let error = read("current/secret").unwrap_err().to_string();
                assert!(error.contains(&format!("{} is owned by", at(name).display())), "{error}");
                std::os::unix::fs::lchown(at(name), Some(0), None).unwrap();
            }
            read("current/secret").unwrap();
        }
    }

    #[test]
    fn what_is_foreign_is_read_within_limits() {
        let place = Directory::new();
        let path = place.path().join("file");
        for (contents, is_read) in [("", true), ("12345", true), ("123456", false)] {
            fs::write(&path, contents).unwrap();
            assert_eq!(read_foreign(&path, 5).is_ok_and(|read| read == contents.as_bytes()), is_read);
        }
        // a byte, and a terabyte of nothing
        File::options().append(true).open(&path).unwrap().set_len(1 << 40).unwrap();
        assert!(read_foreign(&path, u64::MAX - 1).unwrap_err().to_string().contains("sparse"));
        let link = place.path().join("link");
        symlink(&path, &link).unwrap();
        assert!(read_foreign(&link, 5).is_err());
    }
}
