machine.start()
install(machine)
deploy(machine, "echo one > notes; echo one > list; git add .; git commit -qm files")


def refused(message):
    """Checks that a run is refused with this message and changes nothing."""
    before = (digest(machine), generation(machine), running(machine))
    ended = run(machine, "app")
    assert ended["result"] == "failed" and ended["stage"] == "prepare", ended
    assert message in ended["error"], ended
    assert (digest(machine), generation(machine), running(machine)) == before
    machine.require_unit_state("ekiben-app.service", "failed")
    machine.succeed(f"journalctl -u ekiben-app -o cat | grep -F {shlex.quote(message)}")


with subtest("edited, staged and untracked files survive a deployment, and are not in it"):
    publish(machine, "app", "2")
    deploy(machine, "echo two >> notes; echo two > list; git add list; echo three > list; echo new > untracked; mkdir d; echo x > d/y")
    # evaluation would fail if it saw this
    deploy(machine, "echo '}{' >> flake.nix")
    find = "find . -path ./.git -prune -o -name flake.lock -o -type f -printf '%T@ %m %p ' -exec sha256sum {} + | sort"
    files, staged = deploy(machine, find), deploy(machine, "git diff --cached")
    ended = run(machine, "app")
    assert ended["result"] == "deployed", ended
    assert (deploy(machine, find), deploy(machine, "git diff --cached")) == (files, staged)
    assert deploy(machine, "git status --porcelain").split("\n") == ["M flake.nix", "MM list", " M notes", "?? d/", "?? untracked"]
    assert (shows(machine, "app"), shows(machine, "revision")) == ("2", head(machine))
    deploy(machine, "git diff --quiet HEAD -- flake.lock")
    deploy(machine, "git checkout -q flake.nix notes; git reset -q; git checkout -q list; rm -r untracked d")

# on hosts alone
with subtest("an edited lock file stops the run before it starts"):
    publish(machine, "app", "3")
    deploy(machine, "echo >> flake.lock")
    refused("flake.lock: it has uncommitted changes; commit or restore it")
    deploy(machine, "git add flake.lock")
    refused("flake.lock: it has staged changes; commit or restore it")
    deploy(machine, "git reset -q; git checkout -q flake.lock; mv flake.lock away")
    refused("flake.lock: it has uncommitted changes; commit or restore it")
    deploy(machine, "ln -s away flake.lock")
    refused("flake.lock: it is not a regular file; commit or restore it")
    deploy(machine, "rm flake.lock; mv away flake.lock")

with subtest("so does whatever git is in the middle of"):
    deploy(machine, "git checkout -qb side; echo side > list; git commit -qam side; git checkout -q main; echo main > list; "
                    "git commit -qam main")
    deploy(machine, "! git merge side")
    refused("a merge is in progress; finish or abort it")
    deploy(machine, "git merge --abort; ! git rebase side")
    refused("a rebase is in progress; finish or abort it")
    deploy(machine, "git rebase --abort; ! git cherry-pick side")
    refused("a cherry-pick is in progress; finish or abort it")
    deploy(machine, "git cherry-pick --abort; git bisect start")
    refused("a bisect is in progress; finish or abort it")
    deploy(machine, "git bisect reset; git checkout -q --detach")
    refused("HEAD is detached; check out a branch")
    deploy(machine, "git checkout -q main")
    for name in some(machine, ("HEAD", "refs/heads/main", "index"), 1):
        deploy(machine, f"touch -d @1 .git/{name}.lock")
        refused(f".git/{name}.lock exists")
        deploy(machine, f"rm .git/{name}.lock")

with subtest("so does a repository that is none, has no commit, or is not the whole of one"):
    machine.succeed(f"mv {REPOSITORY} {REPOSITORY}.away")
    assert f"Failed to open {REPOSITORY}: No such file" in run(machine, "app")["error"]
    machine.succeed(f"install -d -o deploy {REPOSITORY}")
    refused_empty = run(machine, "app")
    assert "not a git repository" in refused_empty["error"], refused_empty
    deploy(machine, "git init -qb main")
    assert "the branch has no commit yet; commit the flake" in run(machine, "app")["error"]
    machine.succeed(f"rm -r {REPOSITORY}; mv {REPOSITORY}.away {REPOSITORY}")

with subtest("and afterwards it works"):
    assert run(machine, "app")["result"] == "deployed"
    check_deployed(machine, "app")
    assert shows(machine, "app") == "3"

with subtest("a hundred runs with nothing new in a row change nothing"):
    before = (digest(machine), generation(machine), machine.succeed("ls /nix/var/nix/profiles"))
    machine.succeed("for i in $(seq 100); do systemctl start ekiben-app.service; done")
    assert (digest(machine), generation(machine), machine.succeed("ls /nix/var/nix/profiles")) == before
    assert last_run(machine, "app")["result"] == "unchanged"
    cpu = int(machine.get_unit_property("ekiben-app.service", "CPUUsageNSec"))
    print(f"the last of them took {cpu / 1e9:.2f} s of processor time")


def deploys(set_up, undo="true"):
    """Checks that a new revision is deployed in a repository that is like this."""
    content = str(next(COUNT))
    publish(machine, "app", content)
    deploy(machine, set_up)
    ended = run(machine, "app")
    assert ended["result"] == "deployed", ended
    assert shows(machine, "app") == content
    assert deploy(machine, "git rev-parse HEAD") == shows(machine, "revision")
    deploy(machine, undo)
    assert deploy(machine, "git status --porcelain; ls -d .git/*.lock .git/ekiben* 2> /dev/null || true") == ""


COUNT = itertools.count(10)
OWN = "/var/lib/ekiben/instances/app"
# chattr +i with 16, chattr -i with 0
FLAGS = "python3 -c " + shlex.quote("""import fcntl, os, struct, sys
place = os.open(sys.argv[2], os.O_RDONLY)
was, = struct.unpack("l", fcntl.ioctl(place, 0x80086601, bytes(8)))
fcntl.ioctl(place, 0x40086602, struct.pack("l", was & ~16 | int(sys.argv[1])))""")
if is_host(machine):
    with subtest("whatever a killed git has left in Ekiben's own directories is removed"):
        deploys("true")
        everything = ("index.lock", "scratch/index.lock", "notes.json.new/x", "candidate/x", "flake.lock/x", "scratch/flake.lock/" + "d/" * 500)
        for left in ((*everything,), ("scratch",)):
            machine.succeed(as_deploy(f"rm -rf {OWN}/scratch {OWN}/candidate; cd {OWN}; for left in {' '.join(left)}; "
                                      "do mkdir -p $(dirname $left); touch $left 2> /dev/null || mkdir -p $left; done"))
            deploys("true")
        machine.succeed(as_deploy(f"rm -rf {OWN}/scratch; mkdir /tmp/elsewhere; touch /tmp/elsewhere/file; "
                                  f"ln -s /tmp/elsewhere {OWN}/scratch"))
        deploys("test -e /tmp/elsewhere/file")
        # whatever was there
        deploys("ls /tmp/elsewhere/file")

    for kind, set_up, undo in (
        ("a lock file that git was told is never changed", "git update-index --assume-unchanged flake.lock",
         "git update-index --no-assume-unchanged flake.lock"),
        ("a lock file that git was told to skip", "git update-index --skip-worktree flake.lock", "git update-index --no-skip-worktree flake.lock"),
        ("a lock file with other line ends", "git config core.autocrlf true; sed -i 's/$/\\r/' flake.lock; "
                                             "git -c core.autocrlf=false commit -qam crlf; touch flake.lock",
                                             "git config --unset core.autocrlf; git diff --quiet || git checkout -q ."),
        ("a repository that a group shares", "git config core.sharedRepository group; find . -type d -exec chmod g+ws {} +",
         "git config --unset core.sharedRepository; test -z \"$(find .git/objects -type d ! -perm -2070)\""),
        ("a repository that a group is to share from now on", "find . -type d -exec chmod g-s {} +; git config core.sharedRepository group",
         "git config --unset core.sharedRepository"),
        ("a split index", "git config core.splitIndex true; git update-index --split-index",
         "git config --unset core.splitIndex; git update-index --no-split-index"),
        ("an untracked cache and a file system monitor",
            "git config core.untrackedCache true; git config core.fsmonitor /no/such/program; "
            "git update-index --untracked-cache 2> /dev/null", "git config --unset core.fsmonitor; git config --unset core.untrackedCache"),
        ("a sparse checkout", "git sparse-checkout set --no-cone '/*' '!/notes'", "git sparse-checkout disable"),
        ("commits that have to be signed", "git config commit.gpgSign true; git config gpg.program false",
         "git config --unset commit.gpgSign; git config --unset gpg.program"),
        ("hooks that refuse everything",
         "mkdir -p .git/refuse; cd .git/refuse; printf '#!/bin/sh\\nexit 1\\n' | tee pre-commit reference-transaction post-index-change > /dev/null; cd ../..; "
         "chmod +x .git/refuse/*; git config core.hooksPath .git/refuse",
         "git config --unset core.hooksPath; rm -r .git/refuse"),
        ("packed refs and a branch with slashes", "git switch -qc feature/x/y; git pack-refs --all", "git switch -qC main; git branch -qD feature/x/y"),
        ("a file mode that does not count", "git config core.fileMode false; chmod +x flake.lock notes",
         "git config core.fileMode true; chmod -x flake.lock notes"),
        ("settings of its own for a worktree", "git config extensions.worktreeConfig true", "git config --unset extensions.worktreeConfig"),
        ("no reflog", "git config core.logAllRefUpdates false; rm -r .git/logs", "git config --unset core.logAllRefUpdates; test ! -e .git/logs/HEAD"),
    ):
        with subtest(f"{kind} is no obstacle"):
            deploys(set_up, undo)
            # and the user's own git goes on from there
            deploy(machine, "git commit -q --allow-empty -m later; git branch -q later; git reset -q --hard HEAD^; "
                            "git merge -q --ff-only later; git branch -qd later")

    with subtest("a lock file with a bit stays as it is where a run is refused"):
        publish(machine, "app", str(next(COUNT)))
        deploy(machine, "git update-index --assume-unchanged flake.lock; echo >> flake.lock")
        refused("flake.lock: it has uncommitted changes; commit or restore it")
        deploy(machine, "git update-index --no-assume-unchanged flake.lock; git checkout -q flake.lock")

    with subtest("what could not be put back is found before anything is built for it; other files are no obstacle"):
        publish(machine, "app", str(next(COUNT)))
        for path, make, undo, message in (
            *((path, f"{FLAGS} 16", f"{FLAGS} 0", "it is immutable; remove that by chattr -i") for path in ("flake.lock", ".", ".git/logs/HEAD")),
            ("flake.lock", "mount --bind flake.lock", "umount", f"it is on another file system or mount than {REPOSITORY}/.git; have both on one"),
            ("flake.lock", "mount --bind --options ro flake.lock", "umount", "it is on another file system or mount than"),
        ):
            machine.succeed(f"cd {REPOSITORY}; {make} {path}")
            refused(f"{REPOSITORY}/{path}".removesuffix("/.") + f": {message}")
            machine.succeed(f"cd /; {undo} {REPOSITORY}/{path}")
        machine.succeed(f"cd {REPOSITORY}; {FLAGS} 16 list; mount --bind notes notes")
        deploys("true")
        machine.succeed(f"cd {REPOSITORY}; {FLAGS} 0 list; umount notes")

    with subtest("root's git status does not matter, and root's files are named with what mends it"):
        machine.succeed(f"git -c safe.directory='*' -C {REPOSITORY} update-index --force-write-index; "
                        f"test $(stat -c %U {REPOSITORY}/.git/index) = root")
        deploys("true")
        for path, make in (
            (".git/objects", "find .git/objects -type d -exec chown root: {} +"),
            ("flake.lock", "chown root: flake.lock"),
            (".git/refs/heads", "chown root: .git/refs/heads"),
            (".git/logs/HEAD", "chown root: .git/logs/HEAD"),
            ("", "chown root: . .git"),
            ("", "chown -R root: .; chmod 700 ."),
        ):
            publish(machine, "app", str(next(COUNT)))
            machine.succeed(f"cd {REPOSITORY}; {make}")
            before = (machine.succeed(f"find {REPOSITORY} -type f ! -path '*/objects/*' | sort | xargs sha256sum"), running(machine), generation(machine))
            ended = run(machine, "app")
            assert (ended["result"], ended["stage"]) == ("failed", "prepare"), (path, ended)
            place = f"{REPOSITORY}/{path}".rstrip("/")
            assert f"{place} belongs to root, not to deploy: run chown -R deploy: {REPOSITORY}" in ended["error"], ended
            assert (machine.succeed(f"find {REPOSITORY} -type f ! -path '*/objects/*' | sort | xargs sha256sum"), running(machine),
                    generation(machine)) == before
            machine.succeed(f"chown -R deploy: {REPOSITORY}")
        deploys("true")

    with subtest("a repository that Nix cannot read is refused by its format"):
        machine.succeed(f"mv {REPOSITORY} {REPOSITORY}.away")
        for options, message in (
            ("--object-format=sha256", "it has objects of format sha256, Nix reads sha1 only"),
            ("--ref-format=reftable", "it has refs of format reftable, Nix reads files only"),
        ):
            machine.succeed(f"rm -rf {REPOSITORY}; install -d -o deploy {REPOSITORY}")
            deploy(machine, f"git init -q {options} -b main; cp ../nixos-config.away/flake.* .; git add .; git commit -qm initial")
            ended = run(machine, "app")
            assert (ended["result"], ended["stage"]) == ("failed", "prepare") and message in ended["error"], ended
        machine.succeed(f"rm -r {REPOSITORY}; mv {REPOSITORY}.away {REPOSITORY}")
        deploys("true")
