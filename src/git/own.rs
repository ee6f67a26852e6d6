//! Repositories of Ekiben's own: for the releases of a fleet, and for what one is published from.

use std::fs;
use std::path::Path;

use crate::config::Instance;
use crate::error::{Context, Result};
use crate::files;
use crate::git::objects::by;
use crate::git::{Repository, ask, git, look_for};

/// Makes a repository of our own where there is none yet, with a first commit that holds nothing. It
/// gets its name when it is whole; what is there without a commit is what an attempt has left.
pub fn create(instance: &Instance) -> Result<()> {
    let place = &instance.flake_path;
    let doing = || format!("create the repository {}", place.display());
    let (new, git_directory) = (place.join(".new"), place.join(".git"));
    if !place.is_dir() {
        files::clear(place).context(doing)?;
    }
    files::clear(&new).context(doing)?;
    if place.is_dir() && look_for(place, ["rev-parse", "--verify", "--quiet", "HEAD"], doing)?.is_some() {
        // nobody else's git is at work there
        remove_leftovers(&git_directory)?;
        return take_as_it_is(&git_directory).context(doing);
    }
    fs::create_dir_all(&new).context(doing)?;
    ask(&new, ["init", "--quiet", "--initial-branch=main", "--template=", "."], doing)?;
    take_as_it_is(&new.join(".git")).context(doing)?;
    let commit = git(&new).args(["commit", "--quiet", "--no-gpg-sign", "--allow-empty", "--message=nothing yet"]);
    by(&instance.author, commit).output(doing, None)?;
    let moved = files::clear(&git_directory).and_then(|()| fs::rename(new.join(".git"), &git_directory));
    moved.and_then(|()| files::sync(place)).and_then(|()| files::clear(&new)).context(doing)
}

/// The commit that HEAD of such a repository stands for.
pub fn head(instance: &Instance) -> Result<String> {
    ask(&instance.flake_path, ["rev-parse", "HEAD"], || format!("open the repository {}", instance.flake_path.display()))
}

impl Repository {
    /// Makes a repository in `directory`, which shares this one's objects, and has nothing but a commit and its files, as
    /// they are.
    pub fn check_out(&self, commit: &str, directory: &Path) -> Result<()> {
        let doing = || format!("check {commit} out into {}", directory.display());
        files::make_directory(directory).context(doing)?;
        let theirs = |arguments: &[&str]| git(directory).args(arguments).output(doing, None);
        theirs(&["init", "--quiet", "--template=", "."])?;
        let (ours, git_directory) = (self.git_directory.as_path(), directory.join(".git"));
        take_as_it_is(&git_directory).context(doing)?;
        let objects = format!("{}\n", ours.join("objects").display());
        fs::create_dir_all(git_directory.join("objects/info")).context(doing)?;
        fs::write(git_directory.join("objects/info/alternates"), objects).context(doing)?;
        if ours.join("shallow").exists() {
            fs::copy(ours.join("shallow"), git_directory.join("shallow")).context(doing)?;
        }
        theirs(&["checkout", "--quiet", "--detach", commit]).map(drop)
    }
}

/// Removes what a git that was killed has locked or not completed, in a repository in which no other is at work.
pub fn remove_leftovers(repository: &Path) -> Result<()> {
    let mut todo = vec![repository.to_owned()];
    while let Some(directory) = todo.pop() {
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
            // 256 directories of many objects, and no locks
            let of_objects = name.len() == 2 && directory.ends_with("objects");
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                todo.extend(Some(path).filter(|_| !of_objects));
            } else if path.extension().is_some_and(|extension| extension == "lock")
                || directory.ends_with("pack") && ["tmp_", ".tmp-"].iter().any(|begin| name.starts_with(begin))
            {
                files::remove(&path).doing("remove", &path)?;
            }
        }
    }
    Ok(())
}

/// Has a repository take all files as they are, whatever attributes are committed beside them: what is
/// checked out is what was published, and never looks edited.
pub(super) fn take_as_it_is(git_directory: &Path) -> std::io::Result<()> {
    const ATTRIBUTES: &[u8] = b"* -text !eol !ident !filter !working-tree-encoding\n";
    let path = git_directory.join("info/attributes");
    if fs::read(&path).is_ok_and(|there| there == ATTRIBUTES) {
        return Ok(());
    }
    fs::create_dir_all(git_directory.join("info")).and_then(|()| files::write(&path, ATTRIBUTES, 0o644))
}
