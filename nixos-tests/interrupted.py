machine.start()
install(machine)
STAND_IN = is_host(machine)
COUNT = iter(range(2, 1000))
# for those of a boot, see boot
POINTS = [point for point in machine.succeed("ekiben fault-points").strip().split("\n") if not point.startswith("boot:")]
WAYS = ("kill", "kill-all", "stop", "crash") if STAND_IN else ("crash",)
# a virtual machine takes half a minute for a run: there, one place of each kind. On a host, a crash at each of them, and
# one more of the ways in turn; `interrupted-anywhere` has many more places in which these end a run
PLACES = [("crash", point) for point in POINTS] + list(zip(itertools.cycle(WAYS[:3]), POINTS)) if STAND_IN else [
    ("crash", point)
    for point in ("activate: switched", "activate: persisted", "back: profile restored")
]


def until_said(what):
    """Starts a run and waits until it says something."""
    follow(machine, "app")
    machine.succeed("systemctl start --no-block ekiben-app.service")
    wait_until_said(machine, "app", what)


def cut_off(way):
    """Cuts the run off, and waits until whatever follows by itself is over."""
    machine.succeed("rm -f /run/ekiben-fault")
    if way == "kill":
        machine.succeed("systemctl kill --kill-whom=main --signal=KILL ekiben-app.service")
    elif way == "kill-all":
        # what is left to conclude the run, too
        machine.succeed("systemctl kill --kill-whom=all --signal=KILL ekiben-app.service")
    elif way == "stop":
        # a switch that goes back restarts systemd, perhaps, and then nobody tells that it is over
        machine.succeed("systemctl stop --no-block ekiben-app.service")
    else:
        machine.crash()
        machine.start()
    machine.wait_until_succeeds("test ! -e /var/lib/ekiben/runs/app.json -a ! -e /var/lib/ekiben/queue/app")
    wait_until_idle(machine, "app")
    assert machine.succeed("ls -A /var/lib/ekiben/runs") == ""
    assert machine.execute("ls /nix/var/nix/gcroots/ekiben/* 2>/dev/null")[1] == ""
    deploy(machine, "git fsck --strict --no-dangling")


def settled(content, before):
    """Which of the two states it is; any other is an error."""
    if shows(machine, "app") == content:
        # systemd holds against a unit that a process of it was killed, however it went on
        machine.succeed("systemctl reset-failed ekiben-app.service")
        check_deployed(machine, "app")
        return "new"
    after = what_stays(machine)
    assert after == before, "\n".join(differences(before, after))
    ended = last_run(machine, "app")
    assert ended["result"] in ("failed", "rolledBack"), ended
    assert ended["error"], ended
    return "old"


for way, point in PLACES:
    with subtest(f"{way} at {point}"):
        goes_back = point.startswith("back:")
        content = "sick" if goes_back else str(next(COUNT))
        publish(machine, "app", content)
        before = what_stays(machine)
        hold(machine, point)
        until_said(f"Held at {point}.")
        cut_off(way)
        end = settled(content, before)
        print(f"{way} at {point}: {end}")
        # only after a power cut, or where nothing was left to conclude it, the run is made up for
        decided = point == "activate: persisted" or point.startswith(("accept:", "conclude:"))
        # what took the machine down, as far as anybody can know, is not tried again unasked
        # (containers that a driver may have as machines are all of one boot)
        took_down = STAND_IN and way == "crash" and point in ("activate: switching", "activate: switched", "activate: healthy")
        expected = "old" if goes_back or took_down else "new" if decided or way == "crash" else "old"
        if took_down:
            assert "known to be bad" in (seen := last_run(machine, "app"))["error"], seen
        assert end == expected or way == "kill-all" and not goes_back, (end, expected)
        if end == "old":
            publish(machine, "app", str(next(COUNT)))
            assert run(machine, "app")["result"] == "deployed", last_run(machine, "app")
            check_deployed(machine, "app")

with subtest("a deployment is undone by hand, and that is cut off"):
    def deploy_next():
        publish(machine, "app", str(next(COUNT)))
        assert run(machine, "app")["result"] == "deployed", last_run(machine, "app")
        return what_stays(machine)

    deploy_next()
    for way, point, expected in some(machine, (
        ("crash", "activate: switched", "old"),
        ("kill", "begin: journal opened", "restored"),
        ("stop", "activate: switching", "old"),
        ("crash", "activate: profile set", "old"),
        ("kill", "activate: boot loader set", "old"),
        ("kill-all", "activate: persisted", "restored"),
        ("crash", "activate: persisted", "restored"),
        ("crash", "conclude: reported", "restored"),
    ), 1):
        earlier, later = what_stays(machine), deploy_next()
        undone = head(machine)
        hold(machine, point)
        follow(machine, "app")
        machine.succeed("systemd-run --collect --unit=rollback ekiben rollback app")
        wait_until_said(machine, "app", f"Held at {point}.")
        cut_off(way)
        machine.succeed("systemctl stop rollback || true", "systemctl reset-failed ekiben-app.service || true")
        ended = next(run for run in status(machine, "app")["runs"] if run["trigger"] == "rollback")
        print(f"{way} at {point}: {ended['result']}")
        same = ("running", "shows", "repository", "generation")
        expectation = earlier | {"repository": later["repository"]} if expected == "restored" else later
        assert [what_stays(machine)[key] for key in same] == [expectation[key] for key in same], differences(expectation, what_stays(machine))
        assert (ended["result"] == "restored") == (expected == "restored"), ended
        known = status(machine, "app")
        assert (known["undone"] or {}).get("commit") == (undone if expected == "restored" else None), known
        assert run(machine, "app")["result"] == ("withheld" if expected == "restored" else "unchanged"), last_run(machine, "app")

for way in WAYS:
    for trouble, words in some(machine, (("hang", "activating the configuration"), ("build-hangs", "building '/nix")), 1):
        with subtest(f"{way} while it is {words}"):
            publish(machine, "app", str(next(COUNT)), trouble=trouble)
            before = what_stays(machine)
            until_said(words)
            # what hangs is gone when the run is made up for
            content = str(next(COUNT))
            if way in ("crash", "kill-all"):
                publish(machine, "app", content)
                before = what_stays(machine)
            cut_off(way)
            end = settled(content, before)
            assert end == ("new" if way == "crash" else "old") or way == "kill-all", end


def begin(*points, content=None):
    """Starts a run that is held at the first of some points."""
    content = content or str(next(COUNT))
    publish(machine, "app", content)
    hold(machine, *points)
    until_said(f"Held at {points[0]}.")
    return content


def end_of_run():
    """Waits for the end of the run; returns how it ended."""
    machine.wait_until_succeeds("test ! -e /var/lib/ekiben/runs/app.json -a ! -e /var/lib/ekiben/queue/app")
    wait_until_idle(machine, "app")
    machine.succeed("rm -f /run/ekiben-fault")
    return last_run(machine, "app")


def works():
    """Checks that the next run deploys."""
    publish(machine, "app", str(next(COUNT)))
    assert run(machine, "app")["result"] == "deployed", last_run(machine, "app")
    check_deployed(machine, "app")


# on hosts alone
with subtest("only what moves the branch is killed, when it has moved it"):
    content = begin("accept: branch moved")
    machine.succeed("rm /run/ekiben-fault; pkill -KILL -f '[c]andidate accept'")
    assert end_of_run()["result"] == "deployed", last_run(machine, "app")
    assert settled(content, None) == "new"

if STAND_IN:
    with subtest("what moves the branch takes too long, when it has moved it"):
        content = begin("accept: branch moved")
        wait_until_said(machine, "app", "Failed to accept the candidate: timed out after 20 s; trying again.")
        assert end_of_run()["result"] == "deployed", last_run(machine, "app")
        assert settled(content, None) == "new"

    with subtest("the disk fails when the journal is to say that the new system is the one to boot"):
        before = what_stays(machine)
        begin("activate: boot loader set", "back: begun")
        machine.succeed("mount --bind -o ro /var/lib/ekiben/runs /var/lib/ekiben/runs")
        go_on(machine, "activate: boot loader set")
        wait_until_said(machine, "app", "Held at back: begun.")
        machine.succeed("umount /var/lib/ekiben/runs")
        go_on(machine, "back: begun")
        ended = end_of_run()
        assert ended["result"] == "rolledBack" and "Read-only file system" in ended["error"], ended
        assert {**what_stays(machine), "shows": ""} == {**before, "shows": ""}
        works()

    for point in ("activate: switched", "conclude: accepted", "back: begun"):
        with subtest(f"the disk becomes full at {point}: the run is reported"):
            before = what_stays(machine)
            content = begin(point, content="sick" if point.startswith("back:") else None)
            machine.succeed(
                "cp -a /var/lib/ekiben /var/lib/ekiben.away; mount -t tmpfs -o size=2M,mode=755 tmpfs /var/lib/ekiben",
                "cp -a /var/lib/ekiben.away/. /var/lib/ekiben/",
                "dd if=/dev/zero of=/var/lib/ekiben/filler bs=4k 2>/dev/null || true",
            )
            go_on(machine, point)
            end_of_run()
            assert status(machine, "app")["running"] is None
            assert settled(content, before) == ("new" if point.startswith("conclude:") else "old")
            machine.succeed("umount -l /var/lib/ekiben; rm -rf /var/lib/ekiben.away /var/lib/ekiben/runs/app.json")
            works()

    with subtest("there is no inode left in /run: that is no candidate's fault, and it is deployed without a hand when there is"):
        for point, stage, words in (("begin: journal opened", "prepare", "systemd could not set up the stage (status 2"),
                                    ("activate: begun", "conclude", "then Failed to roll back: Failed to activate the old system")):
            before = what_stays(machine)
            content = begin(point)
            machine.succeed("mount -o remount,nr_inodes=$(($(df --output=iused /run | tail -n 1))) /run")
            go_on(machine, point)
            ended = end_of_run()
            assert ended["stage"] == stage and words in ended["error"], ended
            machine.succeed("mount -o remount,nr_inodes=800k /run; systemctl reset-failed")
            assert ended["result"] == "stuck" or what_stays(machine) == before, ended
            machine.succeed("systemctl start ekiben-look@app.service")
            wait_until_at_rest(machine, "app")
            assert shows(machine, "app") == content, status(machine, "app")["runs"][:2]
            check_deployed(machine, "app")

    with subtest("the disk of Nix's own files becomes read-only when a system has just been built: nothing hangs"):
        place = "/nix/var/nix"
        machine.succeed("systemctl stop nix-daemon.socket nix-daemon.service",
                        f"cp -a {place} /root/away; mount -t tmpfs -o mode=755 tmpfs {place}; cp -a /root/away/. {place}/",
                        "systemctl start nix-daemon.socket")
        before = what_stays(machine)
        begin("build: noted")
        machine.succeed(f"mount -o remount,ro {place}")
        go_on(machine, "build: noted")
        ended = end_of_run()
        assert ended["result"] == "failed" and "Read-only file system" in ended["error"], ended
        assert what_stays(machine) == before
        machine.succeed("systemctl stop nix-daemon.socket nix-daemon.service", f"umount -l {place}; rm -r /root/away",
                        "systemctl start nix-daemon.socket")
        works()

    with subtest("a timer that elapses while a run is under way has another one follow, unless that was stopped"):
        timer = "/run/systemd/system/scenario-once.timer"
        def elapses(unit):
            return (
                f"printf '[Timer]\\nOnActiveSec=1ms\\nAccuracySec=1ms\\nUnit={unit}.service\\n' > {timer}; systemctl daemon-reload",
                "systemctl start scenario-once.timer",
                "until systemctl show --property SubState --value scenario-once.timer | grep -xE 'running|elapsed'; do sleep 0.1; done",
                # a look leaves it at that
                "until systemctl show --property ActiveState --value ekiben-look@app | grep -x inactive; do sleep 0.1; done",
            )
        elapse = elapses("ekiben-app")
        kill = "systemctl kill --kill-whom=main --signal=KILL ekiben-app.service"
        for steps, results in (
            (elapse, ["unchanged", "deployed"]),
            (elapses("ekiben-look@app"), ["unchanged", "deployed"]),
            ((kill, "until systemctl show --property SubState --value ekiben-app.service | grep -x stop-post; do sleep 0.1; done", *elapse),
             ["deployed", "rolledBack"]),
            ((*elapse, "systemctl stop --no-block ekiben-app.service"), ["rolledBack"]),
        ):
            begin("activate: switched", "back: begun")
            known = [run["id"] for run in status(machine, "app")["runs"]]
            machine.succeed(*steps)
            go_on(machine, "activate: switched")
            go_on(machine, "back: begun")
            machine.wait_until_succeeds("systemctl show --property SubState --value scenario-once.timer | grep -x elapsed")
            end_of_run()
            new = [run["result"] for run in status(machine, "app")["runs"] if run["id"] not in known]
            assert new == results, (steps, new)
            machine.succeed("systemctl stop scenario-once.timer")
        machine.succeed(f"rm {timer}; systemctl daemon-reload")
        works()

    with subtest("the report cannot be written: it is as soon as it can, and says what there was"):
        place = "/var/lib/ekiben/status"
        for point, content, result in (("activate: persisted", str(next(COUNT)), "deployed"), ("activate: switched", "sick", "rolledBack")):
            begin(point, content=content)
            follow(machine, "app")
            machine.succeed(f"mount --bind -o ro {place} {place}")
            go_on(machine, point)
            wait_until_said(machine, "app", f"Failed to write {place}/app.json: Read-only file system")
            name = json.loads(machine.wait_until_succeeds("jq -e 'select(.result) | .id' /var/lib/ekiben/runs/app.json"))
            assert (shows(machine, "app") == content) == (result == "deployed")
            machine.succeed(f"umount {place}")
            end_of_run()
            ended = [run for run in status(machine, "app")["runs"] if run["id"] == name]
            assert [run["result"] for run in ended] == [result], ended
            assert status(machine, "app")["running"] is None
        works()

    with subtest("what makes a generation is killed when it has made it: that goes, too"):
        before = what_stays(machine)
        begin("activate: persisting")
        old, number = running(machine), int(before["generation"].split("-")[1])
        machine.succeed(f"ln -s {old} {PROFILE}-{number + 1}-link")
        cut_off("kill")
        assert what_stays(machine) == before
        works()

    with subtest("what it would go back to is collected as garbage"):
        before = (digest(machine), generation(machine), running(machine))
        begin("activate: profile set")
        machine.succeed("nix-collect-garbage --delete-old", f"test -e {before[2]}/init", f"! test -e {PROFILE}-{before[1].split('-')[1]}-link")
        cut_off("kill")
        assert (digest(machine), generation(machine), running(machine)) == before
        works()

    with subtest("the machine boots an older system after a power cut: nothing is deployed"):
        old = running(machine)
        begin("activate: persisted")
        machine.succeed(f"{old}/bin/switch-to-configuration boot")
        machine.crash()
        machine.start()
        machine.wait_until_succeeds("test ! -e /var/lib/ekiben/runs/app.json -a ! -e /var/lib/ekiben/queue/app")
        wait_until_idle(machine, "app")
        # it is not the candidate's fault: the run after the boot tries it again
        made_up_for, ended = status(machine, "app")["runs"][:2]
        assert ended["result"] == "rolledBack" and f"booted another system, {old}" in ended["error"], ended
        assert made_up_for["result"] == "deployed", made_up_for
        check_deployed(machine, "app")

# everywhere
with subtest("somebody switches back at the last moment: nothing is deployed"):
    before, old = what_stays(machine), running(machine)
    begin("activate: persisted")
    machine.succeed(f"{old}/bin/switch-to-configuration test")
    go_on(machine, "activate: persisted")
    ended = end_of_run()
    assert ended["result"] == "rolledBack" and f"switched to another system, {old}" in ended["error"], ended
    assert what_stays(machine) == before
    assert run(machine, "app")["result"] == "deployed", last_run(machine, "app")
    check_deployed(machine, "app")

# on hosts alone
with subtest("a run at work is not ended by another's hand"):
    content = begin("build: begun")
    machine.fail("ekiben conclude app")
    assert "it is under way" in machine.execute("ekiben conclude app 2>&1")[1]
    machine.succeed("test -e /var/lib/ekiben/runs/app.json", "systemctl start ekiben.service")
    go_on(machine, "build: begun")
    assert end_of_run()["result"] == "deployed", last_run(machine, "app")
    assert settled(content, None) == "new"

if STAND_IN:
    with subtest("killed at a random moment, again and again"):
        import random
        import time

        random.seed(2)
        ends = {"new": 0, "old": 0}
        for _ in range(20):
            content = str(next(COUNT))
            publish(machine, "app", content)
            before = what_stays(machine)
            machine.succeed("systemctl start --no-block ekiben-app.service")
            # before that, there is no run yet
            machine.wait_until_succeeds("test -e /var/lib/ekiben/runs/app.json")
            # anywhere within a run, which takes about a second
            time.sleep(random.random() * 1.2)
            machine.succeed("systemctl kill --kill-whom=all --signal=KILL ekiben-app.service || true")
            machine.wait_until_succeeds("test ! -e /var/lib/ekiben/runs/app.json")
            wait_until_idle(machine, "app")
            ends[settled(content, before)] += 1
        print(f"killed 20 times: {ends['new']} times the new system, {ends['old']} times the old one")
        assert run(machine, "app")["result"] in ("deployed", "unchanged")

if STAND_IN:
    with subtest("what a power cut has left empty in the store is made anew, also if the clock was ahead"):
        for ahead in (0, 366 * 86400):
            content = str(next(COUNT))
            publish(machine, "app", content)
            hold(machine, "build: noted")
            until_said("Held at build: noted.")
            candidate = machine.succeed("readlink -f /var/lib/ekiben/instances/app/candidate").strip()
            recipe = machine.succeed(f"nix-store --query --deriver {candidate}").strip()
            source = machine.succeed(f"nix-store --query --references {recipe} | xargs -I+ sh -c 'test ! -e +/content || "
                                     f"test $(cat +/content) != {content} || echo +'").strip()
            machine.succeed(f"chmod u+w {recipe}; for file in {recipe} {candidate}/etc/app {source}/content; do truncate -s 0 $file; done")
            machine.succeed(f"cd /var/lib/ekiben; jq '.started += {ahead}' runs/app.json > x; mv x runs/app.json")
            # more than fit on a command line
            machine.succeed("cd /nix/store; seq -f %032.0f-$(printf 'x%.0s' {1..150}) 15000 | xargs mkdir")
            cut_off("crash")
            machine.succeed("find /nix/store -maxdepth 1 -name '0*-xxx*' -delete")
            assert shows(machine, "app") == content, last_run(machine, "app")
            check_deployed(machine, "app")
            machine.succeed("nix-store --verify --check-contents 2>&1 | tee /dev/stderr | { ! grep modified; }")

with subtest("what a newer version has begun, and written down, is ended by this one"):
    before, earlier = what_stays(machine), status(machine, "app")
    publish(machine, "app", str(next(COUNT)))
    hold(machine, "activate: healthy")
    until_said("Held at activate: healthy.")
    machine.succeed(
        "cd /var/lib/ekiben; jq '.newer = [1] | .instance.newer = {} | .before.newer = 1 | .phase = \"quarantined\" | .instance.operation = \"newer\"' "
        "runs/app.json > x; mv x runs/app.json",
        "cd /var/lib/ekiben; jq '.newer = [1] | .deployed.newer = {} | .runs[].newer = 1 | .runs[0].result = \"quarantined\" | .runs[1].started = \"x\"' "
        "status/app.json > x; mv x status/app.json; cp status/app.json /tmp/newer.json",
        "systemctl kill --kill-whom=main --signal=KILL ekiben-app.service; rm /run/ekiben-fault",
    )
    wait_until_at_rest(machine, "app")
    assert what_stays(machine) == before and machine.succeed("ls -A /var/lib/ekiben/runs") == "", "\n".join(differences(before, what_stays(machine)))
    ended = last_run(machine, "app")
    assert ended["result"] == "rolledBack" and status(machine, "app")["deployed"] == earlier["deployed"], ended
    # no run is forgotten, and what could not be read is kept
    known = [[(run["id"], run["result"]) for run in state["runs"]] for state in (status(machine, "app"), earlier)]
    assert known[0][1] == (known[1][0][0], "unknown") and known[0][2:] == known[1][1:len(known[0]) - 1], known
    machine.succeed("cmp /tmp/newer.json /var/lib/ekiben/status/app.json.unreadable", "systemctl reset-failed ekiben-app.service")

with subtest("a journal or status that makes no sense is set aside"):
    for text in ("", "{", '{"format": 99}', '{"format": 1, "id": 5}', "\\0\\0\\0", None):
        def put(file):
            path = f"/var/lib/ekiben/{file}"
            machine.succeed(f"rm -rf {path}; mkdir -p {path}/deep" if text is None else f"printf '{text}' > {path}")

        put("status/app.json")
        said = machine.execute("ekiben status app")[1]
        assert ("which the next run keeps aside" in said) == (text != '{"format": 1, "id": 5}'), said
        put("runs/app.json")
        machine.succeed("systemctl start --no-block ekiben-app.service")
        machine.wait_until_succeeds("test ! -e /var/lib/ekiben/runs/app.json")
        wait_until_idle(machine, "app")
        ended = last_run(machine, "app")
        assert ended["result"] in ("deployed", "unchanged") and ended["by"] == ["recovery"], ended
        assert ended["warnings"][0].endswith("see to that, and remove /var/lib/ekiben/runs/app.json.unreadable"), ended
        machine.succeed("rm -r /var/lib/ekiben/*/app.json.unreadable")
        assert run(machine, "app")["warnings"] == [] and "keeps aside" not in machine.succeed("ekiben status app")
    machine.succeed("journalctl -u ekiben-app -o cat | grep -F 'Ignoring unreadable journal'")
    # with what it was to put back
    publish(machine, "app", str(next(COUNT)))
    hold(machine, "activate: healthy")
    until_said("Held at activate: healthy.")
    machine.succeed(
        "truncate -s 100 /var/lib/ekiben/runs/app.json",
        "systemctl kill --kill-whom=main --signal=KILL ekiben-app.service; rm /run/ekiben-fault",
    )
    wait_until_at_rest(machine, "app")
    said = machine.fail("ekiben status app")
    assert "its journal is unreadable; see to that, and remove" in last_run(machine, "app")["error"] and "is deployed; switch to that" in said, said
    machine.succeed("rm /var/lib/ekiben/runs/app.json.unreadable", "systemctl reset-failed ekiben-app.service")
    assert run(machine, "app")["result"] == "deployed"
    check_deployed(machine, "app")
