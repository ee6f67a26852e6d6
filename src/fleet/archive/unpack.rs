//! A release's archive: from a file that is what its manifest says to a directory, with no way out
//! of it.
//!
//! gzip decompresses; what it writes is read here, header by header, and nothing is believed of it. Only
//! files and directories are unpacked, below a directory that is new, and not one of them before all of
//! the archive is known to keep within the limits. Nobody else reads it: what was checked is what is made.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::error::{Context, Result};
use crate::files;
use crate::fleet::LARGE;
use crate::program::Program;

/// How many bytes may be in one, headers and all, and how many names, those of directories that are not
/// mentioned counted.
const UNPACKED: u64 = 256 * 1024 * 1024;
const NAMES: usize = 20_000;
/// How many bytes may be in a name, how many in one part of it, and how many parts.
const NAME: u64 = 1024;
const PART: usize = 255;
const PARTS: usize = 64;
/// Everything in an archive is a multiple of this.
const BLOCK: usize = 512;

/// A file or directory.
struct Entry {
    path: PathBuf,
    is_directory: bool,
    is_executable: bool,
    size: u64,
}

/// Unpacks an archive into a directory, which is recreated. Fails, and leaves nothing, if there is
/// anything in the archive but files and directories with names that stay below it.
pub fn unpack(archive: &Path, directory: &Path) -> Result<()> {
    files::make_directory(directory).doing("create", directory)?;
    let unpacked = read(archive, |_, _| Ok(())).and_then(|_| read(archive, |entry, contents| write(directory, entry, contents)));
    let unpacked = unpacked.and_then(|names| {
        // last, since what is made in a directory changes its time
        let directories = names.0.iter().filter(|(_, is_directory)| **is_directory).map(|(name, _)| OsStr::from_bytes(name));
        let mut places = directories.map(|name| directory.join(name)).chain([directory.to_owned()]);
        places.try_for_each(|place| File::open(&place)?.set_modified(SystemTime::UNIX_EPOCH)).context(|| doing(archive))
    });
    if unpacked.is_err() {
        files::clear(directory).context(|| doing(archive))?;
    }
    unpacked
}

fn doing(archive: &Path) -> String {
    format!("unpack {}", archive.display())
}

/// Makes what an entry says, with the time 0.
fn write(directory: &Path, entry: &Entry, contents: &mut dyn Read) -> io::Result<()> {
    let path = directory.join(&entry.path);
    if entry.is_directory {
        return fs::create_dir_all(path);
    }
    fs::create_dir_all(path.parent().unwrap_or(directory))?;
    let mode = if entry.is_executable { 0o755 } else { 0o644 };
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    io::copy(contents, &mut file)?;
    file.set_modified(SystemTime::UNIX_EPOCH)
}

/// Reads an archive from its beginning to its end, and has `each` deal with what is in it; returns all
/// names. Fails as soon as something is not as it should be.
fn read(archive: &Path, mut each: impl FnMut(&Entry, &mut dyn Read) -> io::Result<()>) -> Result<Names> {
    let doing = || doing(archive);
    let file = File::open(archive).context(doing)?;
    let size = file.metadata().context(doing)?.len();
    if size > LARGE {
        return Err(format!("it has {size} bytes, more than {LARGE}")).context(doing);
    }
    Program::new("gzip").arg("-dc").filter(doing, file, |output| {
        let mut stream = output.take(UNPACKED);
        let mut names = Names::default();
        let ended = |stream: &io::Take<_>| {
            if stream.limit() == 0 { format!("it has more than {UNPACKED} bytes") } else { "unexpected end of the archive".into() }
        };
        while let Some(entry) = next(&mut stream, &mut names).map_err(|why| why.unwrap_or_else(|| ended(&stream)))? {
            let mut contents = (&mut stream).take(entry.size);
            each(&entry, &mut contents).map_err(|error| format!("{:?}: {error}", entry.path))?;
            let _ = io::copy(&mut contents, &mut io::sink());
            let padding = entry.size.next_multiple_of(BLOCK as u64) - entry.size + contents.limit();
            if io::copy(&mut (&mut stream).take(padding), &mut io::sink()).ok() != Some(padding) {
                return Err(ended(&stream));
            }
        }
        // padding
        io::copy(&mut stream, &mut io::sink()).map_err(|error| error.to_string())?;
        if stream.limit() == 0 { Err(ended(&stream)) } else { Ok(names) }
    })
}

/// The next entry; `None` at the end. An error says what is wrong; `None` if the bytes have come to an end.
fn next(stream: &mut impl Read, names: &mut Names) -> Result<Option<Entry>, Option<String>> {
    let mut block = || {
        let mut block = [0; BLOCK];
        stream.read_exact(&mut block).map(|()| block).map_err(|_| None)
    };
    let mut header = block()?;
    let mut long = None;
    if header[TYPE] == b'L' {
        check_header(&header)?;
        let size = octal(&header[124..136]).filter(|size| *size <= NAME + 1);
        let size = size.ok_or_else(|| format!("expected names of at most {NAME} bytes"))?;
        let mut name = Vec::new();
        while (name.len() as u64) < size {
            name.extend(block()?);
        }
        name.truncate(usize::try_from(size).unwrap_or(0));
        long = Some(name);
        header = block()?;
    }
    if long.is_none() && header == [0; BLOCK] {
        return Ok(None);
    }
    check_header(&header)?;
    let mut name = until_nul(long.as_deref().unwrap_or(&header[..100])).to_vec();
    // POSIX has the beginning of a long name there, GNU something else
    let prefix = until_nul(&header[345..500]);
    if header[257..263] == *b"ustar\0" && !prefix.is_empty() && long.is_none() {
        name = [prefix, b"/", &name].concat();
    }
    let found = || format!("found {:?}", String::from_utf8_lossy(&name));
    let is_directory = match header[TYPE] {
        b'0' | 0 => false,
        b'5' => true,
        other => return Err(Some(format!("expected files and directories only, {} of type {:?}", found(), char::from(other)))),
    };
    let size = octal(&header[124..136]).filter(|size| !is_directory || *size == 0);
    let size = size.ok_or_else(|| format!("expected a size, {}", found()))?;
    let path =
        path(&name, is_directory).ok_or_else(|| format!("expected a name of at most {PARTS} parts below the directory, {}", found()))?;
    names.add(&path, is_directory).map_err(|why| format!("expected {why}, {}", found()))?;
    let is_executable = octal(&header[100..108]).is_some_and(|mode| mode & 0o100 != 0);
    Ok(Some(Entry { path: OsStr::from_bytes(&path).into(), is_directory, is_executable, size }))
}

/// Where a header says what it is of.
const TYPE: usize = 156;

/// Fails unless this is a header, by its sum.
fn check_header(header: &[u8; BLOCK]) -> Result<(), String> {
    const SUM: std::ops::Range<usize> = 148..156;
    let rest = header[..SUM.start].iter().chain(&header[SUM.end..]);
    let sum = rest.map(|&byte| u64::from(byte)).sum::<u64>() + u64::from(b' ') * SUM.len() as u64;
    let is_right = header[257..262] == *b"ustar" && octal(&header[SUM]) == Some(sum);
    is_right.then_some(()).ok_or_else(|| "it is not a tar archive of the format gnu or ustar".into())
}

/// A number in a header.
fn octal(field: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(until_nul(field)).ok()?.trim_matches(' ');
    // from_str_radix takes a sign
    let is_one = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    u64::from_str_radix(text, 8).ok().filter(|_| is_one)
}

fn until_nul(field: &[u8]) -> &[u8] {
    field.split(|&byte| byte == 0).next().unwrap_or_default()
}

/// A name as a path below the directory, without `.` and `/` that say nothing; empty for the directory itself.
fn path(name: &[u8], is_directory: bool) -> Option<Vec<u8>> {
    let parts: Vec<_> = name.split(|&byte| byte == b'/').filter(|part| !part.is_empty() && *part != b".").collect();
    let is_fit = |part: &&[u8]| *part != b".." && !part.eq_ignore_ascii_case(b".git") && part.len() <= PART;
    let is_below = !name.starts_with(b"/") && parts.iter().all(is_fit) && parts.len() <= PARTS && name.len() as u64 <= NAME;
    let is_name = is_directory || !parts.is_empty() && !name.ends_with(b"/");
    // a line is one for git, and on a screen
    let is_text = !name.iter().any(u8::is_ascii_control);
    (is_below && is_name && is_text).then(|| parts.join(&b'/'))
}

/// All that an archive makes, and whether it is a directory.
#[derive(Default)]
struct Names(BTreeMap<Vec<u8>, bool>);

impl Names {
    /// Adds a name, and those of the directories above. The error says what was expected.
    fn add(&mut self, path: &[u8], is_directory: bool) -> Result<(), String> {
        let above = path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| &path[..at]);
        for directory in above {
            if !*self.0.entry(directory.to_vec()).or_insert(true) {
                return Err("a directory where there is a file".into());
            }
        }
        let is_new = path.is_empty() || self.0.insert(path.to_vec(), is_directory).is_none_or(|before| before && is_directory);
        if !is_new {
            return Err("each name once".into());
        }
        if self.0.len() > NAMES {
            return Err(format!("at most {NAMES} names"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Directory;

    use std::os::unix::fs::PermissionsExt;
    use std::time::{Duration, Instant};

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
        let (place, unpacked) =
            attempt("mkdir d; echo 'a b' > 'd/a b'; touch x ä; chmod +x x; touch $(seq -s '' 90); tar czf ../a.tar.gz .");
        unpacked.unwrap();
        let target = place.path().join("target");
        assert_eq!(fs::read_to_string(target.join("d/a b")).unwrap(), "a b\n");
        assert!(target.join((1..=90).map(|number| number.to_string()).collect::<String>()).exists());
        let mode = |name| target.join(name).metadata().unwrap().permissions().mode() & 0o111;
        assert!(mode("x") != 0 && mode("ä") == 0 && mode("d") != 0);
        // what is made of a release depends on nothing but the release
        for name in ["", "d", "d/a b", "x"] {
            assert_eq!(target.join(name).metadata().unwrap().modified().unwrap(), SystemTime::UNIX_EPOCH, "{name}");
        }
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
            "truncate -s 70000000 ../a.tar.gz",
            "echo nonsense > ../a.tar.gz",
            "echo nonsense | gzip > ../a.tar.gz",
        ] {
            let (place, unpacked) = attempt(script);
            assert!(unpacked.is_err(), "{script}");
            assert!(!place.path().join("target").exists() && !place.path().join("target.tar").exists(), "{script}");
        }
    }

    /// A header, and what follows it.
    fn entry(name: &[u8], kind: u8, contents: &[u8]) -> Vec<u8> {
        sized_entry(name, kind, &format!("{:011o}", contents.len()), contents)
    }

    fn sized_entry(name: &[u8], kind: u8, size: &str, contents: &[u8]) -> Vec<u8> {
        let mut header = [0; BLOCK];
        header[..name.len()].copy_from_slice(name);
        header[100..107].copy_from_slice(b"0000644");
        header[124..124 + size.len()].copy_from_slice(size.as_bytes());
        header[148..156].fill(b' ');
        header[TYPE] = kind;
        header[257..265].copy_from_slice(b"ustar  \0");
        let sum: u64 = header.iter().map(|&byte| u64::from(byte)).sum();
        header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        let mut entry = [&header, contents].concat();
        entry.resize(entry.len().next_multiple_of(BLOCK), 0);
        entry
    }

    fn long(name: &[u8]) -> Vec<u8> {
        entry(b"././@LongLink", b'L', name)
    }

    /// Unpacks an archive that is made of these entries; returns the error.
    fn refusal(entries: &[Vec<u8>]) -> String {
        let place = Directory::new();
        let archive = place.path().join("a.tar.gz");
        let tar = [&entries.concat()[..], &[0; 2 * BLOCK]].concat();
        fs::write(place.path().join("tar"), tar).unwrap();
        shell("gzip < tar > a.tar.gz", place.path());
        let target = place.path().join("target");
        let unpacked = unpack(&archive, &target);
        assert_eq!(unpacked.is_ok(), target.exists());
        unpacked.err().map(|error| error.to_string()).unwrap_or_default()
    }

    #[test]
    fn no_archive_costs_more_than_it_may() {
        let before = Instant::now();
        let deep = b"d/".repeat(500);
        let many: Vec<_> = (0..20_001).map(|number| entry(format!("{number}").as_bytes(), b'0', b"")).collect();
        // 16 names each, of which an archive says one
        let implied: Vec<_> = (0..2000).map(|number| entry(format!("{number}/1/2/3/4/5/6/7/8/9/x").as_bytes(), b'0', b"")).collect();
        for (what, entries, expected) in [
            ("a long name", vec![long(&[b'a'; 2000]), entry(b"a", b'0', b"")], "expected names of at most 1024 bytes"),
            ("a name that is said to be long", vec![sized_entry(b"././@LongLink", b'L', "77777777777", b"")], "expected names of at most"),
            ("a name after a name", vec![long(b"a"), long(b"b"), entry(b"a", b'0', b"")], "of type 'L'"),
            ("a long part", vec![long(&[b'a'; 300]), entry(b"a", b'0', b"")], "expected a name of"),
            ("depth", vec![long(&deep), entry(b"a", b'5', b"")], "expected a name of"),
            ("many names", many, "expected at most 20000 names"),
            ("many directories that are not mentioned", implied, "expected at most 20000 names"),
            ("a size of its own", vec![entry(b"pax", b'x', b"20 size=99999999999\n"), entry(b"a", b'0', b"")], "of type 'x'"),
            ("a global header", vec![entry(b"pax", b'g', b"")], "of type 'g'"),
            ("holes", vec![entry(b"a", b'S', b"")], "of type 'S'"),
            ("8 GiB that are not there", vec![sized_entry(b"a", b'0', "77777777777", b"")], "unexpected end of the archive"),
            ("a size that is not a number", vec![sized_entry(b"a", b'0', "+1", b"x")], "expected a size"),
            ("a size in another notation", vec![sized_entry(b"a", b'0', "\u{7f}\0\0\0\0\0\0\0\0\0\0", b"")], "expected a size"),
        ] {
            let found = refusal(&entries);
            assert!(found.contains(expected), "{what}: {found}");
        }
        assert!(before.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn a_bomb_is_not_read_to_its_end() {
        let place = Directory::new();
        // 6 GiB, were it not for the limit
        shell("head -c 67108864 /dev/zero | gzip -1 > one; for n in $(seq 100); do cat one; done > a.tar.gz", place.path());
        fs::write(place.path().join("tar"), sized_entry(b"a", b'0', "77777777777", b"")).unwrap();
        shell("gzip < tar > b; cat a.tar.gz >> b; mv b a.tar.gz", place.path());
        let error = unpack(&place.path().join("a.tar.gz"), &place.path().join("target")).unwrap_err().to_string();
        assert!(error.ends_with("it has more than 268435456 bytes"), "{error}");
        assert!(!place.path().join("target").exists());
    }

    #[test]
    fn a_name_is_one_file_below_the_directory() {
        for (what, entries, expected) in [
            ("twice", vec![entry(b"a", b'0', b"1"), entry(b"./a", b'0', b"2")], "expected each name once"),
            ("a file and a directory", vec![entry(b"a", b'0', b""), entry(b"a/", b'5', b"")], "expected each name once"),
            ("a directory and a file", vec![entry(b"a/b", b'0', b""), entry(b"a", b'0', b"")], "expected each name once"),
            ("below a file", vec![entry(b"a", b'0', b""), entry(b"a//b", b'0', b"")], "expected a directory where there is a file"),
            ("no name", vec![entry(b"", b'0', b"")], "expected a name of"),
            ("the directory as a file", vec![entry(b"./.", b'0', b"")], "expected a name of"),
            ("a directory as a file", vec![entry(b"a/", b'0', b"")], "expected a name of"),
            ("above", vec![entry(b"a/../../b", b'0', b"")], "expected a name of"),
            ("root", vec![entry(b"/a", b'0', b"")], "expected a name of"),
            ("git", vec![entry(b"a/.Git/config", b'0', b"")], "expected a name of"),
            ("a line break", vec![entry(b"a\nb", b'0', b"")], "expected a name of"),
            ("a link", vec![entry(b"a", b'2', b"")], "of type '2'"),
            ("a directory with contents", vec![entry(b"a", b'5', b"x")], "expected a size"),
            ("no header", vec![vec![b'x'; BLOCK]], "not a tar archive"),
            (
                "nothing odd",
                vec![entry(b"./", b'5', b""), entry(b"A", b'0', b""), entry(b"a", b'0', b""), entry(b"d\\x2d/e", b'0', b"")],
                "",
            ),
        ] {
            let found = refusal(&entries);
            assert!(found.contains(expected) && found.is_empty() == expected.is_empty(), "{what}: {found}");
        }
    }
}
