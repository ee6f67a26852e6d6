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

with subtest("an edited lock file stops the run before it starts"):
    publish(machine, "app", "3")
    deploy(machine, "echo >> flake.lock")
    refused("flake.lock: it has uncommitted changes; commit or restore it")
    deploy(machine, "git add flake.lock")
    refused("flake.lock: it has staged changes; commit or restore it")
    deploy(machine, "git reset -q; git checkout -q flake.lock; mv flake.lock away")
    refused("flake.lock: it has uncommitted changes; commit or restore it")
    deploy(machine, "ln -s away flake.lock")
    refused("flake.lock: it is no regular file; commit or restore it")
    deploy(machine, "rm flake.lock; mv away flake.lock")

with subtest("so does whatever git is in the middle of"):
    deploy(machine, "git checkout -qb side; echo side > list; git commit -qam side; git checkout -q main; echo main > list; git commit -qam main")
    deploy(machine, "! git merge side")
    refused("a merge is in progress; finish or abort it")
    deploy(machine, "git merge --abort; ! git rebase side")
    refused("HEAD is detached; check a branch out")
    deploy(machine, "git rebase --abort; ! git cherry-pick side")
    refused("a cherry-pick is in progress; finish or abort it")
    deploy(machine, "git cherry-pick --abort; git bisect start")
    refused("a bisect is in progress; finish or abort it")
    deploy(machine, "git bisect reset; git checkout -q --detach")
    refused("HEAD is detached; check a branch out")
    deploy(machine, "git checkout -q main")

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
