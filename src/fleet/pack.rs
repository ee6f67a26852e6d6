//! Archives: from a directory to the same bytes each time.
//!
//! An archive holds files, each with its contents and whether it can be executed, and nothing else:
//! no links, owners, times or empty directories. Where a link leads to is what is packed.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::{Context, Result};
use crate::fleet::{LARGE, sha256};
use crate::names::Sha256;
use crate::program::Program;

/// All files below a directory, but those of git and the links that `nix build` leaves.
pub fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    walk(directory, Path::new(""), &mut Vec::new(), &mut files)?;
    Ok(files)
}

fn walk(top: &Path, below: &Path, above: &mut Vec<(u64, u64)>, files: &mut Vec<PathBuf>) -> Result<()> {
    let place = top.join(below);
    let doing = || format!("read {}", place.display());
    let metadata = fs::metadata(&place).context(doing)?;
    let identity = (metadata.dev(), metadata.ino());
    if above.contains(&identity) {
        return Err("a link leads back to where it is").context(doing);
    }
    above.push(identity);
    for entry in fs::read_dir(&place).context(doing)? {
        let entry = entry.context(doing)?;
        let (name, path) = (below.join(entry.file_name()), entry.path());
        let built =
            entry.file_name().as_bytes().starts_with(b"result") && fs::read_link(&path).is_ok_and(|to| to.starts_with("/nix/store"));
        if entry.file_name().eq_ignore_ascii_case(".git") || built {
            continue;
        }
        let metadata = fs::metadata(&path).context(|| format!("read {}", path.display()))?;
        if metadata.is_dir() {
            walk(top, &name, above, files)?;
        } else if metadata.is_file() {
            files.push(name);
        } else {
            return Err("it is neither a file nor a directory").context(|| format!("read {}", path.display()));
        }
    }
    above.pop();
    Ok(())
}

/// The files of a directory that git tracks, as they are now.
pub fn tracked_files(directory: &Path) -> Result<Vec<PathBuf>> {
    let list = Program::new("git").arg("-C").arg(directory).args(["ls-files", "-z"]);
    let list = list.output(|| format!("list what git tracks in {}", directory.display()), None)?;
    let names = list.split(|&byte| byte == 0).filter(|name| !name.is_empty());
    let names = names.map(|name| PathBuf::from(std::ffi::OsStr::from_bytes(name)));
    // neither what is removed but not yet committed, nor submodules
    Ok(names.filter(|name| directory.join(name).is_file()).collect())
}

/// Packs files of a directory into a new archive; returns its hash and its size.
pub fn pack(directory: &Path, mut files: Vec<PathBuf>, file: &Path) -> Result<(Sha256, u64)> {
    let doing = || format!("pack {}", directory.display());
    files.sort();
    let list: Vec<u8> = files.iter().flat_map(|file| [file.as_os_str().as_bytes(), b"\0"].concat()).collect();
    let tar = Program::new("tar").args(["--create", "--format=gnu", "--use-compress-program=gzip -n", "--file"]).arg(file);
    let tar = tar.args(["--dereference", "--hard-dereference", "--mtime=@0", "--owner=0", "--group=0", "--numeric-owner"]);
    let tar = tar.args(["--mode=u=rwX,go=rX", "--directory"]).arg(directory).args(["--no-recursion", "--null", "--files-from=-"]);
    tar.env("LC_ALL", "C").output(doing, Some(&list))?;
    let size = fs::metadata(file).context(doing)?.len();
    if size > LARGE {
        return Err(format!("it has {size} bytes, more than {LARGE}")).context(doing);
    }
    Ok((sha256::of_file(file)?, size))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::archive;
    use crate::testing::Directory;
    use std::os::unix::fs::symlink;

    fn packed(directory: &Path, archive: &Path) -> (Sha256, u64) {
        pack(directory, files(directory).unwrap(), archive).unwrap()
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
        symlink("../../one/-a", two.join("sub/file")).unwrap();
        symlink("/nix/store/x", two.join("result-1")).unwrap();
        fs::create_dir(two.join(".git")).unwrap();
        fs::write(two.join(".git/config"), "").unwrap();
        let archive = place.path().join("a.tar.gz");
        fs::File::open(one.join("b c")).unwrap().set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        let mut otherwise = files(&two).unwrap();
        otherwise.sort();
        otherwise.reverse();
        assert_eq!(packed(&one, &archive), pack(&two, otherwise, &place.path().join("b.tar.gz")).unwrap());
        let unpacked = place.path().join("unpacked");
        archive::unpack(&archive, &unpacked).unwrap();
        let mut found = files(&unpacked).unwrap();
        found.sort();
        assert_eq!(found, ["-a", "b c", "sub/file"].map(PathBuf::from));
        assert!(!unpacked.join("sub/file").is_symlink());
    }

    #[test]
    fn what_cannot_be_packed_is_named() {
        for (target, why) in [("..", "leads back"), ("nowhere", "No such file"), ("/dev/null", "neither a file nor a directory")] {
            let place = Directory::new();
            fs::create_dir(place.path().join("sub")).unwrap();
            symlink(target, place.path().join("sub/link")).unwrap();
            let error = files(place.path()).unwrap_err().to_string();
            assert!(error.contains("sub/link") && error.contains(why), "{error}");
        }
    }
}
