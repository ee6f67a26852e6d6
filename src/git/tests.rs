//! What holds for the whole room.

use super::*;
use crate::config::Author;
use crate::git::own::{create, take_as_it_is};
use crate::git::patience::patiently;
use crate::git::savepoint::cut_off::Changed;
use crate::testing::{Directory, git as shell, instance};
use std::os::unix::fs::PermissionsExt;
use std::time::SystemTime;

/// What a pull may change: before, and afterwards.
const CHANGES: [(&str, &str); 8] = [
    ("echo 1 > plain; chmod 755 plain", "echo 2 > plain; mkdir -p new/deep/er; echo 2 > new/deep/er/file; echo 2 > top"),
    ("echo 1 > plain", "rm plain; mkdir -p plain/a/b; echo 2 > plain/a/b/x; echo 2 > plain/c"),
    ("mkdir -m 700 -p d/e; echo 1 > d/x; echo 1 > d/e/y", "rm -r d; echo 2 > d"),
    ("echo 1 > plain; ln -s plain link", "rm link; mkdir -p link/y; echo 2 > link/y/z"),
    ("mkdir d; echo 1 > d/z; ln -s d link", "rm link; mkdir link; echo 2 > link/z; echo 2 > link/new"),
    ("mkdir -p d/e; echo 1 > d/e/x", "rm -r d; ln -s plain d"),
    ("mkdir -p a/b/c; echo 1 > a/b/c/only", "rm -r a; mkdir b; echo 2 > b/x"),
    (
        "printf 1 > \"$(printf 'odd\\377\\nname')\"; echo 1 > ' file'",
        "printf 2 > \"$(printf 'odd\\377\\nname')\"; mkdir \"$(printf '\\376')\"; echo 2 > \"$(printf '\\376')\"/x",
    ),
];

/// A repository that stands before a change, and the commit after it.
fn repository(directory: &Directory, before: &str, after: &str) -> (Repository, String) {
    let top = directory.path().to_owned();
    let commit = "git add -A -f; git commit -qm x";
    shell(&top, &format!("git init -qb feature/main; mkdir kept; echo 1 > kept/file; {before}; {commit}; {after}; {commit}"));
    let to = shell(&top, "git rev-parse HEAD");
    // empty directories are in no commit
    shell(&top, "git reset -q --hard HEAD^; test ! -e d/e || mkdir -m 700 -p d/empty/one");
    let head = shell(&top, "git rev-parse HEAD");
    let git_directory = top.join(".git");
    (Repository { top, prefix: String::new(), branch: "refs/heads/feature/main".into(), head, git_directory }, to)
}

type Found = Vec<(PathBuf, u32, SystemTime, Vec<u8>)>;

/// All that there is, but for objects.
fn snapshot(place: &Path) -> Found {
    let mut found = Vec::new();
    for entry in fs::read_dir(place).unwrap() {
        let path = entry.unwrap().path();
        let metadata = path.symlink_metadata().unwrap();
        let mut one = |time, contents| found.push((path.clone(), metadata.permissions().mode(), time, contents));
        if metadata.is_symlink() {
            one(SystemTime::UNIX_EPOCH, fs::read_link(&path).unwrap().into_os_string().into_encoded_bytes());
        } else if metadata.is_file() {
            one(metadata.modified().unwrap(), fs::read(&path).unwrap());
        } else if !path.ends_with(".git/objects") {
            one(SystemTime::UNIX_EPOCH, Vec::new());
            found.extend(snapshot(&path));
        }
    }
    found.sort();
    found
}

/// Does what a fast-forward does before git changes files.
fn begin(repository: &Repository, to: &str) -> (Savepoint, Vec<Changed>) {
    let savepoint = repository.savepoint("app");
    let files = repository.changed_files(to).unwrap();
    savepoint.note_locks(&repository.branch).unwrap();
    savepoint.make(&repository.head, to, &repository.branch, &files).unwrap();
    savepoint.lock_index().unwrap();
    savepoint.copy_index().unwrap();
    savepoint.begin().unwrap();
    repository.refresh(&savepoint.index());
    (savepoint, files)
}

fn read_tree(repository: &Repository, savepoint: &Savepoint, to: &str) {
    let read = repository.by(&savepoint.index()).args(["read-tree", "-m", "-u", &repository.head, to]);
    read.output(|| "read".into(), None).unwrap();
}

#[test]
fn a_repository_that_is_damaged_is_not_taken_for_a_new_one() {
    for (damage, said) in [
        ("true", ""),
        ("git checkout -q --detach", "HEAD is detached; check out a branch"),
        ("git switch -q --orphan new", "the branch has no commit yet; commit the flake"),
        (": > .git/refs/heads/feature/main", "what HEAD stands for cannot be read; see git fsck"),
        ("rm -r .git/objects/??", "what HEAD stands for cannot be read; see git fsck: git exited with 128: fatal: bad object HEAD"),
        ("rm -r .git/objects/??; echo /nowhere > .git/objects/info/alternates", "error: object directory /nowhere does not exist"),
    ] {
        let directory = Directory::new();
        repository(&directory, "true", "echo 1 > x");
        shell(directory.path(), damage);
        let opened = Repository::open(&instance(directory.path())).map(drop).map_err(|error| error.to_string());
        assert_eq!(opened.as_ref().err().is_some_and(|error| error.contains(said)), !said.is_empty(), "{damage}: {opened:?}");
    }
}

#[test]
fn a_repository_of_our_own_is_made_whatever_is_there() {
    let directory = Directory::new();
    let place = directory.path().join("repository");
    let instance = instance(&place);
    for left in [
        "true",
        "mkdir -p repository/.git; touch repository/.git/config.lock repository/.git/HEAD",
        "git init -q repository; touch repository/.git/index.lock",
        "mkdir -p repository/.new/.git/x",
        "echo > repository",
        "git init -q x; mv x/.git x/y; mkdir repository; mv x/y repository/.git; mkdir -p repository/.git/HEAD.lock/x",
    ] {
        shell(directory.path(), &format!("rm -rf repository; {left}"));
        create(&instance).unwrap();
        assert_eq!(shell(&place, "git status --porcelain; git log --format=%s; ls -A"), "nothing yet\n.git");
        shell(&place, "touch .git/index.lock .git/config.lock .git/refs/heads/main.lock");
        create(&instance).unwrap();
        shell(&place, "git commit -q --allow-empty -m x; git config a.b c");
    }
    drop_reference(&instance, "refs/ekiben/app", "app").unwrap();
    shell(&place, "git update-ref refs/ekiben/app HEAD; touch .git/refs/ekiben/app.lock");
    drop_reference(&instance, "refs/ekiben/app", "app").unwrap();
    shell(&place, "git update-ref refs/ekiben/app HEAD; git pack-refs --all");
    drop_reference(&instance, "refs/ekiben/app", "app").unwrap();
    assert_eq!(shell(&place, "git for-each-ref refs/ekiben; ls -d .git/ekiben* .git/refs/ekiben 2> /dev/null || true"), "");
    // a ref of ours stands for no other
    for make in ["git symbolic-ref refs/ekiben/app refs/heads/main", "mkdir -p .git/refs/ekiben; ln -sf ../heads/main .git/refs/ekiben/app"]
    {
        shell(&place, make);
        let (branch, new) = (shell(&place, "git rev-parse main"), shell(&place, "git commit-tree -m new main^{tree}"));
        Repository::open(&instance).unwrap().keep("refs/ekiben/app", &new).unwrap();
        assert_eq!(shell(&place, "git rev-parse main refs/ekiben/app"), format!("{branch}\n{new}"));
    }
}

#[test]
fn whatever_upstream_changes_is_followed() {
    for (before, after) in CHANGES {
        let directory = Directory::new();
        let (repository, to) = repository(&directory, before, after);
        let untouched = snapshot(directory.path());
        let scratch = Directory::new();
        // a git that was killed has left it
        let lock = || fs::write(scratch.path().join("index.lock"), "").unwrap();
        lock();
        repository.check_forward(&to, "app", scratch.path()).unwrap();
        lock();
        repository.rehearse_forward(&to, scratch.path()).unwrap();
        assert_eq!(snapshot(directory.path()), untouched, "{after}");
        repository.forward(&to, "app").unwrap();
        assert_eq!(
            shell(directory.path(), "git status --porcelain; git rev-parse HEAD; ls -d .git/*.lock .git/ekiben* || true"),
            to,
            "{after}"
        );
    }
}

#[test]
fn a_fast_forward_that_is_cut_off_leaves_nothing() {
    for (number, (before, after)) in CHANGES.into_iter().enumerate() {
        for cut in if number == 0 { 0..7 } else { 1..4 } {
            let directory = Directory::new();
            let (repository, to) = repository(&directory, before, after);
            // the branch is among the packed refs, as after git gc
            shell(directory.path(), "git pack-refs --all");
            let untouched = snapshot(directory.path());
            let (savepoint, files) = begin(&repository, &to);
            if cut == 1 {
                for file in files.iter().filter(|file| file.before).take(1) {
                    fs::remove_file(directory.path().join(&file.path)).unwrap();
                }
            }
            if cut >= 2 {
                read_tree(&repository, &savepoint, &to);
            }
            let half = files.iter().find(|file| file.after && cut == 3).map(|file| directory.path().join(&file.path));
            if let Some(half) = half.filter(|half| half.is_file()) {
                fs::write(half, "").unwrap();
            }
            if cut >= 4 {
                shell(directory.path(), "mkdir -p .git/refs/heads/feature; touch -d @1 .git/HEAD.lock .git/refs/heads/feature/main.lock");
            }
            if cut >= 5 {
                let entry = format!("{} {to} a <a> 1 +0000\tekiben: fast-forward", repository.head);
                let entry = if cut == 5 { entry.split_at(50).0.to_owned() } else { entry + "\n" };
                shell(directory.path(), &format!("printf '{entry}' | tee -a .git/logs/HEAD >> .git/logs/refs/heads/feature/main"));
            }
            repository.recover("app").unwrap();
            let found = snapshot(directory.path());
            let difference = found.iter().find(|one| !untouched.contains(one)).or(untouched.iter().find(|one| !found.contains(one)));
            assert_eq!(difference, None, "{after}, {cut}");
        }
    }
}

#[test]
fn a_fast_forward_that_was_cut_off_at_its_end_is_ended() {
    let directory = Directory::new();
    let (mut repository, to) = repository(&directory, CHANGES[0].0, CHANGES[0].1);
    let (savepoint, _) = begin(&repository, &to);
    read_tree(&repository, &savepoint, &to);
    shell(directory.path(), &format!("git update-ref HEAD {to}"));
    repository.head.clone_from(&to);
    repository.recover("app").unwrap();
    assert_eq!(shell(directory.path(), "git status --porcelain; ls -d .git/*.lock .git/ekiben* 2> /dev/null || true"), "");
}

#[test]
fn what_somebody_has_written_since_stays() {
    let directory = Directory::new();
    let (repository, to) =
        repository(&directory, "echo 1 > file; echo 1 > plain", "echo 2 > file; rm plain; mkdir plain; echo 2 > plain/x; echo 2 > new");
    let (savepoint, _) = begin(&repository, &to);
    read_tree(&repository, &savepoint, &to);
    shell(directory.path(), "echo mine > file; echo mine > plain/mine; echo mine > new");
    repository.recover("app").unwrap();
    assert_eq!(shell(directory.path(), "cat file plain plain.kept-1/mine new"), "mine\n1\nmine\nmine");
    assert_eq!(shell(directory.path(), "git status --porcelain"), " M file\n?? new\n?? plain.kept-1/");
    assert!(!savepoint.exists());
}

#[test]
fn locks_of_others_stay() {
    let directory = Directory::new();
    let (repository, to) = repository(&directory, "echo 1 > file", "echo 2 > file");
    shell(directory.path(), "touch .git/packed-refs.lock");
    begin(&repository, &to);
    // by hand, and then the user's git takes it
    shell(directory.path(), "rm .git/index.lock; touch -d @1 .git/index.lock .git/HEAD.lock");
    repository.recover("app").unwrap();
    assert_eq!(shell(directory.path(), "ls .git/*.lock"), ".git/index.lock\n.git/packed-refs.lock");
    let refused = repository.check_forward(&to, "app", directory.path()).unwrap_err();
    assert!(refused.to_string().contains("index.lock exists"));
}

#[test]
fn a_git_that_is_alive_keeps_its_locks() {
    let directory = Directory::new();
    let (repository, to) = repository(&directory, "echo 1 > file", "echo 2 > file");
    repository.savepoint("app").note_locks(&repository.branch).unwrap();
    // ours has been killed; the user's takes its time
    let update = format!("{{ printf 'start\\nupdate HEAD {to}\\nprepare\\n'; sleep 3; echo commit; }} | git update-ref --stdin");
    let top = repository.top.clone();
    let user = std::thread::spawn(move || shell(&top, &update));
    while !directory.path().join(".git/HEAD.lock").exists() && !user.is_finished() {
        std::thread::yield_now();
    }
    repository.recover("app").unwrap();
    user.join().unwrap();
    assert_eq!(shell(directory.path(), "git rev-parse HEAD; ls -d .git/*.lock .git/ekiben* || true"), to);
}

#[test]
fn a_git_that_is_at_work_is_waited_for() {
    let commit = "GIT_EDITOR='sleep 1; false #' git commit -qa --allow-empty 2> /dev/null || true";
    let update = "{ printf 'start\\nupdate HEAD HEAD\\nprepare\\n'; sleep 1; echo abort; } | git update-ref --stdin > /dev/null";
    for (lock, work, forward) in [
        ("index.lock", commit, false),
        ("index.lock", commit, true),
        ("HEAD.lock", update, false),
        ("refs/heads/feature/main.lock", update, true),
    ] {
        let directory = Directory::new();
        let (repository, to) = repository(&directory, "echo 1 > file", "echo 2 > file");
        let top = repository.top.clone();
        let user = std::thread::spawn(move || shell(&top, work));
        while !directory.path().join(".git").join(lock).exists() && !user.is_finished() {
            std::thread::yield_now();
        }
        assert!(!user.is_finished());
        if forward {
            repository.forward(&to, "app").unwrap();
        } else {
            repository.check_forward(&to, "app", Directory::new().path()).unwrap();
        }
        user.join().unwrap();
        let now =
            shell(directory.path(), "git rev-parse HEAD; git status --porcelain; ls -d .git/*.lock .git/ekiben* 2> /dev/null || true");
        assert_eq!(&now, if forward { &to } else { &repository.head });
    }
}

#[test]
fn a_commit_that_is_at_work_gets_the_branch() {
    let directory = Directory::new();
    let (repository, to) = repository(&directory, "echo 1 > file", "echo 2 > file");
    let top = repository.top.clone();
    let user = std::thread::spawn(move || shell(&top, "GIT_EDITOR='sleep 1; echo x >' git commit -qa --allow-empty; git rev-parse HEAD"));
    while !directory.path().join(".git/index.lock").exists() && !user.is_finished() {
        std::thread::yield_now();
    }
    assert!(repository.forward(&to, "app").is_err());
    let commit = user.join().unwrap();
    let now = "git rev-parse HEAD; git status --porcelain; cat file; ls -d .git/*.lock .git/ekiben* 2> /dev/null || true";
    assert_eq!(shell(directory.path(), now), format!("{commit}\n1"));
}

#[test]
fn somebody_who_does_one_thing_after_the_other_is_waited_for() {
    for (work, begun) in [
        ("echo 3 > flake.lock; sleep 1; git commit -qam x", "flake.lock"),
        (
            "git checkout -qb side; git commit -q --allow-empty -m x; GIT_SEQUENCE_EDITOR='sleep 1; true' git rebase -qi HEAD^",
            ".git/rebase-merge",
        ),
    ] {
        let directory = Directory::new();
        let (repository, _) = repository(&directory, "echo 1 > flake.lock", "true > file");
        let (instance, top) = (instance(directory.path()), repository.top.clone());
        let is_quiet = || Repository::open(&instance)?.check_lock_file_is_clean(Directory::new().path());
        // as if long ago
        let age = "touch -d @1 . flake.lock .git .git/objects/pack";
        shell(&top, age);
        let user = std::thread::spawn(move || shell(&top, work));
        while is_quiet().is_ok() && !user.is_finished() {}
        patiently(&instance, is_quiet).unwrap_or_else(|error| panic!("{begun}: {error}"));
        user.join().unwrap();
        shell(directory.path(), &format!("git bisect start; {age}"));
        assert!(patiently(&instance, is_quiet).is_err());
    }
}

#[test]
fn what_a_gc_takes_away_that_began_earlier_is_missed() {
    let directory = Directory::new();
    let (repository, to) = repository(&directory, "echo 1 > file", "echo 2 > file");
    let top = repository.top.clone();
    let hook = "-c gc.recentObjectsHook='touch begun; sleep 1'";
    let user = std::thread::spawn(move || shell(&top, &format!("git reflog expire --expire=now --all; git {hook} gc -q --prune=now")));
    while !directory.path().join("begun").exists() && !user.is_finished() {}
    repository.keep("refs/ekiben/app", &to).unwrap();
    assert!(repository.check_is_whole(&to).unwrap_err().to_string().contains(&to));
    user.join().unwrap();
    repository.check_is_whole(&repository.head).unwrap();
}

#[test]
fn what_a_user_has_removed_stays_removed_where_a_fast_forward_is_cut_off() {
    let directory = Directory::new();
    let before = "mkdir -p d/e gone; echo 1 > file; echo 1 > d/e/x; echo 1 > gone/x";
    let (repository, to) = repository(&directory, before, "echo 2 > file; echo 2 > d/e/x; rm -r gone");
    shell(directory.path(), "rm -r file d/e; mv gone away; ln -s away gone");
    let untouched = snapshot(directory.path());
    repository.check_forward(&to, "app", Directory::new().path()).unwrap();
    let (savepoint, _) = begin(&repository, &to);
    read_tree(&repository, &savepoint, &to);
    assert!(directory.path().join("file").exists());
    repository.recover("app").unwrap();
    assert_eq!(snapshot(directory.path()), untouched);
}

#[test]
fn an_object_is_what_its_name_says_whatever_git_is_to_take_it_for() {
    let directory = Directory::new();
    let (repository, to) = repository(&directory, "echo 1 > x", "echo 2 > x");
    let (scratch, head, author) = (Directory::new(), &repository.head, Author { name: "a".into(), mail: "a".into() });
    shell(directory.path(), &format!("git replace {head} {to}"));
    let lock = [("flake.lock", &b"{}"[..])];
    let commit = repository.commit_lock_files(head, lock, "lock", &author, &scratch.path().join("index")).unwrap();
    assert_eq!(shell(directory.path(), &format!("git --no-replace-objects diff --name-only {head} {commit}")), "flake.lock");
    let other = shell(directory.path(), "git replace -d HEAD > /dev/null; git commit-tree -m other HEAD^{tree}");
    for way in ["git replace --graft {other} HEAD", "git replace -d {other}; echo {other} $(git rev-parse HEAD) > .git/info/grafts"] {
        shell(directory.path(), &way.replace("{other}", &other));
        shell(directory.path(), &format!("git merge-base --is-ancestor HEAD {other}"));
        assert!(!repository.contains(&other, head).unwrap());
    }
}

#[test]
fn who_may_sign_now_decides_whatever_a_commit_says_of_its_time() {
    let directory = Directory::new();
    let (repository, _) = repository(&directory, "echo 1 > x", "echo 2 > x");
    let keys = Directory::new();
    let key = keys.path().join("key");
    shell(keys.path(), "ssh-keygen -q -t ed25519 -N '' -f key");
    let public = fs::read_to_string(key.with_extension("pub")).unwrap();
    let sign = format!("git -c gpg.format=ssh -c user.signingKey={} commit -qS --allow-empty -m", key.display());
    for (how, valid, accepted) in [
        (format!("{sign} now"), "", true),
        (format!("{sign} then"), "valid-before=\"20200101\" ", false),
        (format!("GIT_COMMITTER_DATE='1 Jun 2019 12:00' {sign} backdated"), "valid-before=\"20200101\" ", false),
        (format!("GIT_COMMITTER_DATE='1 Jun 2019 12:00' {sign} old"), "", true),
        (format!("git config i18n.commitEncoding latin1; {sign} $'encoded \\xe4\\n\\ngpgsig no\\n signature'"), "", true),
        (format!("git tag -am tag tag; git checkout -q HEAD^; {sign} x; git merge -q -m merge tag; {sign} amended --amend"), "", true),
        ("git commit -q --allow-empty -m unsigned".into(), "", false),
    ] {
        shell(directory.path(), &how);
        let commit = shell(directory.path(), "git rev-parse HEAD");
        let checked = repository.check_signed(&commit, &[format!("{valid}{public}")], Directory::new().path());
        assert_eq!(checked.is_ok(), accepted, "{how}: {checked:?}");
    }
    // by a certificate
    shell(keys.path(), "ssh-keygen -q -t ed25519 -N '' -f ca; ssh-keygen -q -t ed25519 -N '' -f other");
    let authority = fs::read_to_string(keys.path().join("ca.pub")).unwrap();
    let sign = sign.replace("/key ", "/key-cert.pub ");
    for (issued, how, accepted) in [
        ("ca -n me@example.org,us", format!("{sign} now"), true),
        ("ca -n me -V 20190101:20200101", format!("{sign} then"), false),
        ("ca -n me -V 20190101:20200101", format!("GIT_COMMITTER_DATE='1 Jun 2019 12:00' {sign} backdated"), false),
        ("other -n me", format!("{sign} other"), false),
        ("ca -h -n me", format!("{sign} host"), false),
        ("ca", format!("{sign} nobody"), false),
    ] {
        shell(keys.path(), &format!("ssh-keygen -q -I id -s {issued} key.pub"));
        shell(directory.path(), &how);
        let commit = shell(directory.path(), "git rev-parse HEAD");
        let signers = [format!("cert-authority {authority}")];
        let checked = repository.check_signed(&commit, &signers, Directory::new().path());
        assert_eq!(checked.is_ok(), accepted, "{issued}, {how}: {checked:?}");
    }
}

#[test]
fn what_is_in_the_way_is_named() {
    for (before, after, edit, named) in [
        ("echo .ig > .gitignore", "echo 2 > .ig", "echo mine > .ig", ".ig would be overwritten"),
        (
            "mkdir d; echo 1 > d/x; echo .ig > .gitignore",
            "rm -r d; echo 2 > d",
            "mkdir d/e; echo mine > d/e/.ig",
            "d/e/.ig would be overwritten",
        ),
        ("true > x", "mkdir d; echo 2 > d/x", "echo mine > d", "d would be overwritten"),
        ("true > x", "mkdir d; echo 2 > d/x", "mkdir away; ln -s away d", "d would be overwritten"),
        ("mkdir d; echo 1 > d/x", "echo 2 > d/x", "mv d away; ln -s away d", "d would be overwritten"),
        ("mkdir d; echo 1 > d/x", "echo 2 > d/x", "rm -r d; ln -s away d", "d would be overwritten"),
        ("echo 1 > x", "echo 2 > x", "echo mine > x", "without changing your edits"),
        // what git has to look into, since it is as young as the index, by a filter that is not there
        (
            "echo 1 > x; echo 1 > y; echo 'y filter=large' > .gitattributes",
            "echo 2 > x",
            "touch -d @9 y; git update-index --refresh; touch -d @9 .git/index; \
             git config filter.large.clean /nowhere; git config filter.large.required true",
            "cannot exec '/nowhere'",
        ),
    ] {
        let directory = Directory::new();
        let (repository, to) = repository(&directory, before, after);
        shell(directory.path(), edit);
        let (untouched, scratch) = (snapshot(directory.path()), Directory::new());
        let refused = repository.check_forward(&to, "app", scratch.path()).unwrap_err();
        assert!(refused.to_string().contains(named), "{refused}");
        assert_eq!(snapshot(directory.path()), untouched);
    }
}

#[test]
fn a_file_that_git_was_told_not_to_look_at_can_be_merged_ever_after() {
    for (bit, tag) in [("--assume-unchanged", "h"), ("--skip-worktree", "S")] {
        for cut in [false, true] {
            let directory = Directory::new();
            let (mut repository, to) = repository(&directory, "echo 1 > file", "echo 2 > file");
            shell(directory.path(), &format!("git update-index {bit} file"));
            let scratch = Directory::new();
            repository.check_forward(&to, "app", scratch.path()).unwrap();
            if cut {
                let (savepoint, _) = begin(&repository, &to);
                read_tree(&repository, &savepoint, &to);
                repository.recover("app").unwrap();
                assert_eq!(shell(directory.path(), "git ls-files -v file"), format!("{tag} file"));
            } else {
                repository.forward(&to, "app").unwrap();
                shell(directory.path(), "git update-index --no-skip-worktree --really-refresh; git reset -q --hard HEAD^");
                shell(directory.path(), &format!("git update-index {bit} file"));
                repository.head = shell(directory.path(), "git rev-parse HEAD");
                // refused in the very moment: git has not changed anything
                repository
                    .savepoint("app")
                    .make(&repository.head, &to, &repository.branch, &repository.changed_files(&to).unwrap())
                    .unwrap();
                repository.recover("app").unwrap();
            }
            shell(directory.path(), &format!("git merge -q --ff-only {to}; test $(cat file) = 2"));
        }
    }
}

#[test]
fn the_lock_file_is_clean_if_git_says_so() {
    let scratch = Directory::new();
    for (set_up, edit) in [
        ("true", ""),
        (
            "git config core.autocrlf true; printf '{\\r\\n}\\r\\n' > flake.lock; git -c core.autocrlf=false commit -qam crlf; touch flake.lock",
            "",
        ),
        ("echo >> flake.lock", "has uncommitted changes"),
        ("git update-index --assume-unchanged flake.lock; echo >> flake.lock", "has uncommitted changes"),
        ("git update-index --skip-worktree flake.lock", ""),
        ("git update-index --skip-worktree flake.lock; echo >> flake.lock", "has uncommitted changes"),
        ("echo >> flake.lock; git add .", "has staged changes"),
        ("rm flake.lock", "has uncommitted changes"),
        ("rm flake.lock; ln -s kept flake.lock", "is not a regular file"),
    ] {
        let directory = Directory::new();
        let (repository, _) = repository(&directory, "echo '{}' > flake.lock", "true > x");
        shell(directory.path(), set_up);
        let untouched = snapshot(directory.path());
        match repository.check_lock_file_is_clean(scratch.path()) {
            Ok(()) => assert_eq!(edit, "", "{set_up}"),
            Err(error) => assert!(!edit.is_empty() && error.to_string().contains(edit), "{set_up}: {error}"),
        }
        assert_eq!(snapshot(directory.path()), untouched);
    }
}

#[test]
fn the_reason_is_what_git_said_up_to_its_death() {
    let said = |text: &str| reason(&text.lines().map(String::from).collect::<Vec<_>>()).unwrap_or_default();
    assert_eq!(
        said(
            "Host key verification failed.\r\nfatal: Could not read from remote repository.\n\nPlease make sure you have the correct access rights"
        ),
        "Host key verification failed; fatal: Could not read from remote repository"
    );
    assert_eq!(said("error: insufficient permission for x\nhint: y\nerror: z"), "error: insufficient permission for x; error: z");
    assert_eq!(said("fatal: unknown repository extension found:\n\tnew"), "fatal: unknown repository extension found:; new");
    assert_eq!(said("no"), "");
}

#[test]
fn what_is_committed_comes_out_as_it_went_in_whatever_it_says_of_itself() {
    let place = Directory::new();
    let (top, source, out) = (place.path().join("repository"), place.path().join("source"), place.path().join("out"));
    let script = "git init -qb main repository; cd repository; git commit -qm nothing --allow-empty; git rev-parse HEAD";
    let head = shell(place.path(), script);
    shell(
        place.path(),
        r"mkdir -p source/sub/deep out; cd source
        printf '* text eol=crlf ident export-subst\nsub export-ignore\nwide working-tree-encoding=UTF-16\n* filter=no\n' > .gitattributes
        printf 'export-ignore' > sub/.gitattributes; echo '*' > .gitignore; printf 'a\r\nb\n' > sub/deep/mixed
        echo '$Id: x$ $Format:%H$' > says; echo wide > wide; touch run; chmod +x run; echo x > 'a b'",
    );
    let (git_directory, branch) = (top.join(".git"), "refs/heads/main".into());
    let repository = Repository { git_directory, prefix: String::new(), branch, head: head.clone(), top };
    let author = Author { name: "a".into(), mail: "a".into() };
    let commit = repository.commit_directory(&head, &source, "release", &author, 0, &place.path().join("index")).unwrap();
    fs::write(place.path().join("out.index.lock"), "").unwrap();
    repository.export(&commit, &out).unwrap();
    let found = shell(place.path(), "diff -r source out; find out -newermt @1; find out -executable -type f; ls");
    assert_eq!(found, "out/run\nindex\nout\nrepository\nsource");
    // nor does it look edited when it is checked out
    take_as_it_is(&repository.git_directory).unwrap();
    repository.forward(&commit, "app").unwrap();
    assert_eq!(shell(place.path(), "diff -r -x .git source repository; git -C repository status --porcelain"), "");
}

#[test]
fn what_is_checked_out_is_a_commit_and_no_edit_filter_or_hook_of_the_users() {
    let directory = Directory::new();
    let before = "printf 'a\\r\\n' > text; echo '* text eol=lf filter=upper' > .gitattributes; git config filter.upper.smudge 'tr a-z A-Z'";
    let (repository, commit) = repository(&directory, before, "mkdir -p hosts/a; echo 1 > hosts/a/flake.lock");
    shell(&repository.top, "echo edited > kept/file; touch untracked");
    let place = Directory::new();
    let checked_out = place.path().join("source");
    for (commit, has_host) in [(&commit, true), (&repository.head, false), (&commit, true)] {
        repository.check_out(commit, &checked_out).unwrap();
        assert_eq!(shell(&checked_out, "git rev-parse HEAD; git status --porcelain"), **commit);
        assert_eq!(fs::read_to_string(checked_out.join("kept/file")).unwrap(), "1\n");
        assert!(!checked_out.join("untracked").exists() && checked_out.join("hosts").exists() == has_host);
    }
    // several lock files, one commit
    let mode = "export GIT_INDEX_FILE=$(mktemp -u); git read-tree {}; \
                git update-index --cacheinfo 100755,$(git rev-parse {}:hosts/a/flake.lock),hosts/a/flake.lock; git commit-tree -p {} -m mode $(git write-tree)";
    let commit = shell(&repository.top, &mode.replace("{}", &commit));
    let locks = [("hosts/a/flake.lock", &b"2\n"[..]), ("flake.lock", b"3\n")];
    let author = Author { name: "a".into(), mail: "a".into() };
    let new = repository.commit_lock_files(&commit, locks, "new", &author, &place.path().join("index")).unwrap();
    assert_eq!(shell(&repository.top, &format!("git diff --name-only {commit} {new}")), "flake.lock\nhosts/a/flake.lock");
    assert_eq!(repository.read_file(&new, "hosts/a/flake.lock").unwrap().unwrap(), b"2\n");
    assert!(shell(&repository.top, &format!("git ls-tree {new} hosts/a/flake.lock")).starts_with("100755 "));
}

#[test]
fn a_commit_says_what_it_said_and_goes_where_it_shall() {
    let (place, scratch) = (Directory::new(), Directory::new());
    let (mut repository, to) = repository(&place, "echo 1 > plain", "echo 2 > plain");
    let author = Author { name: "bücher".into(), mail: "b@example.org".into() };
    let lock = [("flake.lock", &b"{}"[..])];
    let commit = repository.commit_lock_files(&to, lock, "flake.lock: grün\n", &author, &scratch.path().join("index")).unwrap();
    assert_eq!(repository.subject(&commit).unwrap(), "flake.lock: grün");
    assert_eq!(repository.message(&commit, "^flake.lock: (grün|x)$").unwrap().as_deref(), Some("flake.lock: grün"));
    assert_eq!(repository.subjects(&repository.head, &commit, 9).unwrap(), ["flake.lock: grün", "x"]);
    let raw = shell(place.path(), &format!("git cat-file commit {commit}"));
    assert!(raw.contains("author bücher <b@example.org> ") && !raw.contains("encoding"), "{raw}");

    // with a submodule that nobody has, and a tag that nobody has asked for
    let key = scratch.path().join("key");
    let sign = format!("git -c gpg.format=ssh -c user.signingKey={} commit -qS -m signed", key.display());
    shell(place.path(), &format!("ssh-keygen -qt ed25519 -N '' -f {}", key.display()));
    let module = format!(
        "git update-index --add --cacheinfo 160000,{commit},module; printf '[submodule \"m\"]\npath = module\nurl = /nowhere\n' > .gitmodules"
    );
    repository.head = shell(place.path(), &format!("{module}; git add .gitmodules; {sign}; git tag -am t tag; git rev-parse HEAD"));
    let public = fs::read_to_string(key.with_extension("pub")).unwrap().trim().to_owned();
    repository.check_signed(&repository.head, &[public], scratch.path()).unwrap();
    assert!(repository.check_signed(&repository.head, &[], scratch.path()).unwrap_err().to_string().contains("`signers`"));
    let upstream = scratch.path().join("up=stream.git");
    let remote =
        format!("git init -q --bare {0}; git remote add origin {0}; git config branch.feature/main.remote origin", upstream.display());
    shell(place.path(), &format!("{remote}; git config branch.feature/main.merge refs/heads/main"));
    repository.push(&repository.head, &scratch.path().join("memory"), "app").unwrap();
    assert_eq!(shell(&upstream, "git for-each-ref --format='%(objectname) %(refname)'"), format!("{} refs/heads/main", repository.head));
    assert!(repository.knows_upstream(&scratch.path().join("memory")).unwrap());
    // another ref that ends in the same
    shell(&upstream, "git update-ref refs/a/refs/heads/main main");
    assert!(repository.knows_upstream(&scratch.path().join("memory")).unwrap());
    shell(&upstream, "git symbolic-ref HEAD refs/heads/main");
    assert_eq!(repository.fetch_upstream("refs/ekiben/app", &scratch.path().join("memory"), "app").unwrap(), repository.head);
    assert_eq!(shell(place.path(), "git for-each-ref --format='%(refname)' refs/remotes"), "refs/remotes/origin/main");
    shell(&upstream, "git -c user.name=a -c user.email=a tag -am stable stable main");
    shell(place.path(), "git config branch.feature/main.merge refs/tags/stable");
    assert_eq!(repository.fetch_upstream("refs/ekiben/app", &scratch.path().join("memory"), "app").unwrap(), repository.head);
    shell(place.path(), "git config branch.feature/main.merge refs/heads/main");
    // of a clone that fetches what it needs, whatever its remote is called
    shell(&upstream, "git config uploadpack.allowFilter true; git config uploadpack.allowAnySHA1InWant true");
    shell(scratch.path(), &format!("git clone -qn --filter=tree:0 -o remote -b main 'file://{}' partial", upstream.display()));
    let partial = Repository::open(&instance(&scratch.path().join("partial"))).unwrap();
    partial.complete(&partial.head).unwrap();
    assert_eq!(shell(&partial.top, "git rev-list --objects --no-walk --missing=print HEAD | grep '^?' || true"), "");
    // a remote may be a path or an address, too
    for remote in [upstream.display().to_string(), format!("file://{}", upstream.display())] {
        shell(place.path(), &format!("git config branch.feature/main.remote '{remote}'"));
        assert_eq!(repository.fetch_upstream("refs/ekiben/app", &scratch.path().join("memory"), "app").unwrap(), repository.head);
    }
}

/// What people like of git, and what would have it print, write or send something else.
const HOSTILE: &str = "
[alias]\n log = !false\n status = !false
[color]\n ui = always\n status = always\n branch = always
[column]\n ui = always
[commit]\n gpgSign = true\n template = /nowhere\n verbose = true\n cleanup = verbatim
[core]\n pager = false\n editor = false\n quotePath = false\n abbrev = 4\n autocrlf = input\n safecrlf = true\n fileMode = false
 hooksPath = /nowhere\n untrackedCache = true\n splitIndex = true\n fsmonitor = true\n preloadIndex = true\n checkStat = minimal
[diff]\n external = false\n noprefix = true\n mnemonicPrefix = true\n renames = copies\n relative = true\n ignoreSubmodules = all
[feature]\n manyFiles = true
[fetch]\n prune = true\n pruneTags = true\n writeCommitGraph = true
[format]\n pretty = fuller
[gpg]\n format = ssh
[gpg \"ssh\"]\n revocationFile = /nowhere\n allowedSignersFile = /nowhere
[grep]\n patternType = fixed
[hook \"any\"]\n command = \"sh -c 'case $PWD in *stream.git) ;; *) exit 1 ;; esac'\"
 event = reference-transaction\n event = post-index-change\n event = post-checkout\n event = pre-push
 event = pre-commit\n event = prepare-commit-msg\n event = commit-msg
[i18n]\n commitEncoding = ISO-8859-1\n logOutputEncoding = ISO-8859-1
[index]\n version = 4
[init]\n defaultBranch = trunk\n defaultObjectFormat = sha256\n defaultRefFormat = reftable\n templateDir = /nowhere
[log]\n showSignature = true\n date = relative\n decorate = full\n follow = true\n diffMerges = on
[pager]\n log = true\n status = true
[push]\n followTags = true\n gpgSign = if-asked\n default = nothing\n recurseSubmodules = only
[safe]\n bareRepository = explicit
[status]\n showUntrackedFiles = no\n short = true\n branch = true\n relativePaths = false\n showStash = true
[submodule]\n recurse = true
[user]\n useConfigOnly = true
";

#[test]
fn nothing_that_a_user_has_configured_for_git_changes_what_is_read_and_written() {
    let place = Directory::new();
    let configuration = place.path().join("gitconfig");
    fs::write(&configuration, HOSTILE).unwrap();
    let again = std::env::current_exe().unwrap();
    let said = std::process::Command::new(again)
        .args(["git::", "whatever_the_publisher_likes", "--skip", "that_a_user_has_configured"])
        .env("GIT_CONFIG_GLOBAL", &configuration)
        .envs([("GIT_DIR", "/nowhere"), ("GIT_INDEX_FILE", "/nowhere"), ("GIT_WORK_TREE", "/nowhere")])
        .output()
        .unwrap();
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stdout));
}
