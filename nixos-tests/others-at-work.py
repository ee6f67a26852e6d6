import itertools

machine.start()
install(machine)
COUNT = iter(range(2, 1000))
INSTANCES = ("app", "other", "second")


def settle():
    """Waits until nothing is left to do, and checks that nothing was left behind."""
    for instance in INSTANCES:
        wait_until_at_rest(machine, instance)
    assert machine.succeed("ls -A /var/lib/ekiben/runs") == ""
    assert deploy(machine, "git status --porcelain; git for-each-ref refs/ekiben; "
                           "ls -d .git/*.lock .git/ekiben-* 2>/dev/null || true") == ""


def last_id(instance):
    """The identifier of the instance's last run."""
    return next((run["id"] for run in status(machine, instance)["runs"]), None)


def results(instance, since):
    """How the runs after the one with the identifier `since` have ended, the first one first."""
    ended = [(run["id"], run["result"]) for run in status(machine, instance)["runs"]]
    new = list(itertools.takewhile(lambda run: run[0] != since, ended))
    return [result for _, result in new[::-1]]


# on hosts alone
with subtest("two instances on one repository at once"):
    content = str(next(COUNT))
    for name in ("app", "other"):
        publish(machine, name, content)
        follow(machine, name)
    # both have a candidate from the same commit
    hold(machine, "build: noted")
    for name in ("app", "other"):
        machine.succeed(f"ekiben trigger {name}")
    for name in ("app", "other"):
        wait_until_said(machine, name, "Held at build: noted.")
    go_on(machine, "build: noted")
    settle()
    assert (shows(machine, "app"), shows(machine, "other")) == (content, content)
    ends = sorted((results("app", None), results("other", None)))
    assert ends == [["deployed"], ["startedOver", "deployed"]], ends
    assert deploy(machine, "git rev-list --count --merges HEAD") == "0"
    assert shows(machine, "revision") == head(machine)

with subtest("two repositories on one machine at once"):
    deploy(machine, "git clone -q . ~/second")
    content = str(next(COUNT))
    publish(machine, "app", content)
    machine.succeed("ekiben trigger app; ekiben trigger second")
    settle()
    for instance in ("app", "second"):
        assert (seen := last_run(machine, instance))["result"] == "deployed", seen
    heads = {head(machine), machine.succeed(as_deploy("git -C ~/second rev-parse HEAD")).strip()}
    assert heads == {status(machine, instance)["deployed"]["commit"] for instance in ("app", "second")}
    assert shows(machine, "app") == content and shows(machine, "revision") in heads
    assert generation(machine).endswith(f" {running(machine)}")

with subtest("what a run of another instance is just switching to is nobody's hand"):
    publish(machine, "app", str(next(COUNT)))
    hold(machine, "activate: switched")
    follow(machine, "second")
    machine.succeed("ekiben trigger second")
    wait_until_said(machine, "second", "Held at activate: switched.")
    assert run(machine, "other")["result"] == "unchanged", last_run(machine, "other")
    said = machine.succeed("ekiben status other; ekiben status second")
    assert "by hand" not in said, said
    go_on(machine, "activate: switched")
    settle()
    assert last_run(machine, "second")["result"] == "deployed"

with subtest("what runs after a rollback is told by its own commit, whoever has deployed it"):
    for name in ("app", "other", "app"):
        publish(machine, name, str(next(COUNT)))
        assert run(machine, name)["result"] == "deployed", last_run(machine, name)
    machine.succeed("ekiben rollback app")
    known, commit = status(machine, "app"), shows(machine, "revision")
    assert known["runs"][0]["result"] == "restored" and commit == status(machine, "other")["deployed"]["commit"], known
    assert (known["runs"][0]["commit"], known["undone"]["before"]) == (commit, commit), known
    # what another hand had switched to is no deployment
    publish(machine, "app", str(next(COUNT)))
    assert run(machine, "app")["result"] == "deployed", last_run(machine, "app")
    deploy(machine, "git commit -q --allow-empty -m 'by hand'")
    rebuild(machine)
    publish(machine, "app", str(next(COUNT)))
    assert run(machine, "app")["result"] == "deployed", last_run(machine, "app")
    machine.succeed("ekiben rollback app")
    known = status(machine, "app")
    assert (known["runs"][0]["commit"], known["undone"]["before"]) == (None, None), known
    publish(machine, "app", str(next(COUNT)))
    assert run(machine, "app")["result"] == "deployed", last_run(machine, "app")
    check_deployed(machine, "app")


# everywhere
def begin(point):
    """Starts a run that has something to deploy, and waits until it is held at a point."""
    publish(machine, "app", str(next(COUNT)))
    hold(machine, point)
    follow(machine, "app")
    machine.succeed("ekiben trigger app")
    wait_until_said(machine, "app", f"Held at {point}.")


def end(point):
    """Lets the run go on from that point; returns how it ended."""
    go_on(machine, point)
    machine.wait_until_succeeds("test ! -e /var/lib/ekiben/runs/app.json")
    wait_until_idle(machine, "app")
    return last_run(machine, "app")


def files(top):
    """What must not change: every file below `top`, also of a link, with its time and permissions."""
    return machine.succeed(f"find {top} {top}/ ! -type d -printf '%p %T@ %m\\n' 2>/dev/null | sort || true")


def interrupt(point, command, by_hand=False):
    """Does something by hand while a run is held at a point; returns how the runs ended that followed."""
    before = last_id("app")
    publish(machine, "other", str(next(COUNT)))
    begin(point)
    deploy(machine, command)
    wanted = head(machine)
    if by_hand:
        rebuild(machine)
    go_on(machine, point)
    settle()
    deploy(machine, f"git merge-base --is-ancestor {wanted} HEAD")
    return results("app", before)


UPDATE = "nix flake update other; git commit -qam 'by hand'"
# on hosts alone
POINTS = ("activate: switched", "activate: persisted", "accept: saved", "prepare: committed", "build: built", "activate: begun",
          "candidate: opened")
for point in POINTS:
    with subtest(f"a commit by hand at {point}: the run starts over from it"):
        # before there is a candidate, within the same run
        expected = ["deployed"] if point.startswith("prepare") else ["startedOver", "deployed"]
        # the last one takes longer than somebody who is at work is waited for
        assert interrupt(point, UPDATE, by_hand=point == "candidate: opened") == expected, status(machine, "app")
        check_deployed(machine, "app")
        assert shows(machine, "other") == machine.succeed("cat /srv/other/content").strip()

MOVES = (
    ("activate: persisted", "git reset -q --hard HEAD~1"),
    ("build: begun", "git reset -q --hard HEAD~1"),
    ("activate: begun", "git commit -q --amend -m amended"),
    ("activate: switched", "git switch -qC elsewhere"),
)
for point, command in MOVES:
    with subtest(f"{command} at {point}: the run starts over from there"):
        assert interrupt(point, command) == ["startedOver", "deployed"], status(machine, "app")
        check_deployed(machine, "app")

with subtest("nixos-rebuild by hand as the run is to switch, of a NixOS whose program waits by itself: what it switches to stays"):
    before = last_id("app")
    machine.succeed("touch /run/scenario-patience")
    begin("activate: switching")
    publish(machine, "app", str(next(COUNT)), trouble="wait")
    deploy(machine, "nix flake update app; git commit -qam 'by hand'")
    machine.succeed(f"systemd-run --unit=by-hand {build_into_profile(machine)}/bin/switch-to-configuration switch")
    machine.wait_until_succeeds("journalctl -u by-hand -o cat | grep -F 'activating the configuration...'")
    go_on(machine, "activate: switching")
    wait_until_said(machine, "app", "Something else is switching this machine; waiting ...")
    machine.succeed("touch /run/scenario-go")
    settle()
    assert results("app", before) == ["startedOver", "deployed"], status(machine, "app")
    check_deployed(machine, "app")
    machine.succeed("rm /run/scenario-patience")

# everywhere
with subtest("nixos-rebuild by hand before the switch: the run starts over from it"):
    assert interrupt("activate: begun", UPDATE, by_hand=True) == ["startedOver", "deployed"], status(machine, "app")
    check_deployed(machine, "app")

with subtest("nixos-rebuild by hand after the switch: it stays, and the run says so"):
    ended = interrupt("activate: switched", UPDATE, by_hand=True)
    assert ended == ["failed"], status(machine, "app")
    assert "something else has switched this machine" in last_run(machine, "app")["error"]
    assert shows(machine, "revision") == head(machine)
    assert generation(machine).endswith(f" {running(machine)}")
    machine.succeed("ekiben trigger app")
    settle()
    check_deployed(machine, "app")

with subtest("another system is set for the next boot by hand after the switch: it stays, and what ran before runs again"):
    before = running(machine)
    begin("activate: switched")
    machine.succeed(f"nix-env --profile {PROFILE} --rollback")
    wanted = generation(machine)
    ended = end("activate: switched")
    assert ended["result"] == "rolledBack" and "set another system for the next boot" in ended["error"], ended
    assert (running(machine), generation(machine)) == (before, wanted)
    machine.succeed("ekiben trigger app")
    settle()
    check_deployed(machine, "app")

with subtest("another system is set for the next boot by hand before a run: that is said, and how to have it back"):
    publish(machine, "other", str(next(COUNT)))
    deploy(machine, UPDATE)
    build_into_profile(machine)
    deploy(machine, "git reset -q --hard HEAD~1")
    wanted = generation(machine)
    number = wanted.split("-")[1]
    assert f"generation {number} is set for the next boot by hand" in machine.fail("ekiben status")
    publish(machine, "app", str(next(COUNT)))
    ended = run(machine, "app")
    said = [warning for warning in ended["warnings"] if warning.startswith(f"generation {number}, ")]
    assert ended["result"] == "deployed" and len(said) == 1, ended
    check_deployed(machine, "app")
    machine.succeed("ekiben status")
    machine.succeed(said[0].split("to have it back: ")[1])
    assert generation(machine) == wanted
    # what it is superseded by is what was deployed
    rebuild(machine)
    machine.succeed("ekiben status")

# on hosts alone
if is_host(machine):
    with subtest("a user stops what checks the candidate: nobody else waits for that"):
        since = last_id("app")
        for name in ("app", "other"):
            publish(machine, name, str(next(COUNT)))
        machine.succeed("""systemd-run --unit=stopper --uid=deploy bash -c "until pkill -STOP -f '[c]andidate check app'; do :; done" """)
        machine.succeed("systemctl start --no-block ekiben-app.service")
        machine.wait_until_succeeds(is_idle("stopper").replace("ekiben-", ""))
        machine.succeed("timeout 120 systemctl start ekiben-other.service")
        assert (seen := last_run(machine, "other"))["result"] == "deployed", seen
        machine.succeed("pkill -CONT -f '[c]andidate check app'")
        settle()
        assert results("app", since) == ["startedOver", "deployed"], status(machine, "app")
        check_deployed(machine, "app")

    with subtest("a user stops what moves the branch: others wait for seconds, and what is right comes of it"):
        since = last_id("app")
        publish(machine, "other", str(next(COUNT)))
        begin("accept: saved")
        machine.succeed("pkill -STOP -f '[c]andidate accept app'")
        go_on(machine, "accept: saved")
        machine.succeed("timeout 120 systemctl start ekiben-other.service")
        assert (seen := last_run(machine, "other"))["result"] == "deployed", seen
        machine.succeed("pkill -CONT -f '[c]andidate accept app'")
        settle()
        assert results("app", since) == ["startedOver", "deployed"], status(machine, "app")
        check_deployed(machine, "app")

with subtest("an edit by hand of what the run changes: the edit stays, and the old system comes back"):
    before = (running(machine), generation(machine), head(machine))
    begin("activate: persisted")
    deploy(machine, "echo >> flake.lock")
    edited = deploy(machine, "sha256sum flake.lock")
    ended = end("activate: persisted")
    assert ended["result"] == "rolledBack" and "uncommitted changes" in ended["error"], ended
    assert (running(machine), generation(machine), head(machine)) == before
    assert deploy(machine, "sha256sum flake.lock") == edited
    deploy(machine, "git restore flake.lock")
    # it was not the candidate's fault: nobody has to ask for it again
    assert run(machine, "app")["result"] == "deployed", last_run(machine, "app")
    check_deployed(machine, "app")

with subtest("an edit in the very moment of the fast-forward: it stays, whatever it is, and the old system comes back"):
    for point, edit, look in (
        ("accept: branch locked", "echo >> flake.lock", "sha256sum flake.lock"),
        ("accept: branch locked", "cp flake.lock .new; echo >> .new; mv .new flake.lock", "sha256sum flake.lock"),
        ("accept: saved", "echo staged > staged; git add staged; touch -d @1 .git/index.lock", "git ls-files --stage; ls .git/index.lock"),
    ):
        before = (running(machine), generation(machine), head(machine))
        begin(point)
        deploy(machine, edit)
        edited = deploy(machine, look)
        ended = end(point)
        assert ended["result"] == "rolledBack", ended
        assert (running(machine), generation(machine), head(machine)) == before
        assert deploy(machine, look) == edited
        deploy(machine, "rm -f .git/index.lock; git reset -q --hard; git clean -fdq")
    assert run(machine, "app")["result"] == "deployed", last_run(machine, "app")
    check_deployed(machine, "app")

with subtest("a reflog that cannot be written: the branch has moved, and that counts"):
    publish(machine, "app", str(next(COUNT)))
    deploy(machine, "mv .git/logs/HEAD .git/logs/away; ln -s /dev/full .git/logs/HEAD")
    assert run(machine, "app")["result"] == "deployed", last_run(machine, "app")
    deploy(machine, "mv .git/logs/away .git/logs/HEAD")
    check_deployed(machine, "app")

with subtest("a file of root's in the working tree: refused before anything happens"):
    publish(machine, "app", str(next(COUNT)))
    machine.succeed(f"chown root: {REPOSITORY}/flake.lock")
    before = (digest(machine), running(machine), generation(machine))
    ended = run(machine, "app")
    assert (ended["result"], ended["stage"]) == ("failed", "prepare") and "Failed to save files" in ended["error"], ended
    assert (digest(machine), running(machine), generation(machine)) == before
    machine.succeed(f"chown deploy: {REPOSITORY}/flake.lock")
    assert run(machine, "app")["result"] == "deployed", last_run(machine, "app")
    check_deployed(machine, "app")

with subtest("git is at work in the repository, or has left its lock behind: refused before anything happens"):
    publish(machine, "app", str(next(COUNT)))
    deploy(machine, "touch -d @1 .git/index.lock")
    before = (digest(machine), running(machine), generation(machine))
    ended = run(machine, "app")
    assert (ended["result"], ended["stage"]) == ("failed", "prepare") and "index.lock exists" in ended["error"], ended
    assert (digest(machine), running(machine), generation(machine)) == before
    deploy(machine, "rm .git/index.lock")
    assert run(machine, "app")["result"] == "deployed", last_run(machine, "app")
    check_deployed(machine, "app")

for kind, make, words in (
    ("no directory", "true", "No such file or directory"),
    ("no repository", "mkdir /srv/odd", "not a git repository"),
    ("a repository without a commit", "git init -q /srv/odd", "the branch has no commit yet; commit the flake"),
    ("a bare repository", f"git clone -q --bare {REPOSITORY} /srv/odd", "must be run in a work tree"),
    ("a worktree", f"git -C {REPOSITORY} worktree add -q -b odd /srv/odd", "it is a worktree or submodule"),
    ("a submodule", "git init -q /srv/super; cd /srv/super; "
                    f"git -c protocol.file.allow=always submodule --quiet add {REPOSITORY} odd; ln -s super/odd /srv/odd", "worktree or submodule"),
    ("a directory of a repository", f"git clone -q {REPOSITORY} /srv/whole; mkdir /srv/whole/odd; ln -s whole/odd /srv/odd", "its top is /srv/whole"),
    ("a repository of somebody else", f"cp -r {REPOSITORY} /srv/odd; chown -R root: /srv/odd", "dubious ownership"),
):
    with subtest(f"{kind} is refused"):
        machine.succeed("rm -rf /srv/odd")
        if "chown" in make:
            machine.succeed(make)
        else:
            machine.succeed("chmod 1777 /srv; " + as_deploy(make))
        before = (files("/srv/odd"), running(machine), generation(machine))
        ended = run(machine, "odd")
        assert ended["result"] == "failed" and ended["stage"] == "prepare" and words in ended["error"], ended
        assert (files("/srv/odd"), running(machine), generation(machine)) == before
