import time

machine.start()
install(machine)
STAND_IN = is_host(machine)
COUNT = iter(range(2, 1000))
POINTS = machine.succeed("ekiben fault-points").strip().split("\n")
# a virtual machine takes half a minute for a run: there, one place of each kind
PLACES = POINTS if STAND_IN else [
    "prepare: committed", "activate: switched", "activate: persisted", "accept: tree updated", "back: profile restored",
]
WAYS = ("kill", "kill-all", "stop", "crash") if STAND_IN else ("crash",)


def state():
    """All that a run that did not succeed has to leave as it was."""
    return {
        "repository": digest(machine),
        "generation": generation(machine),
        "generations": machine.succeed("ls /nix/var/nix/profiles"),
        "running": running(machine),
        "shows": machine.succeed("cat /etc/app /etc/other /etc/revision"),
    }


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
    after = state()
    assert after == before, "\n".join(f"{key}:\n{before[key]}\n{after[key]}" for key in before if before[key] != after[key])
    ended = last_run(machine, "app")
    assert ended["result"] in ("failed", "rolledBack"), ended
    assert ended["error"], ended
    return "old"


for way in WAYS:
    for point in PLACES:
        with subtest(f"{way} at {point}"):
            goes_back = point.startswith("back:")
            content = "sick" if goes_back else str(next(COUNT))
            publish(machine, "app", content)
            before = state()
            hold(machine, point)
            until_said(f"Held at {point}.")
            cut_off(way)
            end = settled(content, before)
            print(f"{way} at {point}: {end}")
            # only after a power cut, or where nothing was left to conclude it, the run is made up for
            decided = point in ("activate: persisted", *(point for point in POINTS if point.startswith(("accept:", "conclude:"))))
            expected = "old" if goes_back else "new" if decided or way == "crash" else "old"
            assert end == expected or way == "kill-all" and not goes_back, (end, expected)
            if goes_back or end == "old":
                publish(machine, "app", str(next(COUNT)))
                assert run(machine, "app")["result"] == "deployed", last_run(machine, "app")
                check_deployed(machine, "app")

for way in WAYS:
    for trouble, words in (("build-hangs", "building '/nix"), ("hang", "activating the configuration")):
        with subtest(f"{way} while it is {words}"):
            publish(machine, "app", str(next(COUNT)), trouble=trouble)
            before = state()
            until_said(words)
            # what hangs is gone when the run is made up for
            content = str(next(COUNT))
            if way in ("crash", "kill-all"):
                publish(machine, "app", content)
                before = state()
            cut_off(way)
            end = settled(content, before)
            assert end == ("new" if way == "crash" else "old") or way == "kill-all", end

if STAND_IN:
    with subtest("killed at a random moment, again and again"):
        import random

        random.seed(2)
        ends = {"new": 0, "old": 0}
        for _ in range(40):
            content = str(next(COUNT))
            publish(machine, "app", content)
            before = state()
            machine.succeed("systemctl start --no-block ekiben-app.service")
            machine.wait_until_succeeds("systemctl show --property ActiveState --value ekiben-app | grep -x activating")
            # anywhere within a run, which takes about a second
            time.sleep(random.random() * 1.2)
            machine.succeed("systemctl kill --kill-whom=all --signal=KILL ekiben-app.service || true")
            machine.wait_until_succeeds("test ! -e /var/lib/ekiben/runs/app.json")
            wait_until_idle(machine, "app")
            ends[settled(content, before)] += 1
        print(f"killed 40 times: {ends['new']} times the new system, {ends['old']} times the old one")
        assert run(machine, "app")["result"] in ("deployed", "unchanged")

with subtest("a journal or status that makes no sense is set aside"):
    for text in ("", "{", '{"format": 99}', '{"format": 1, "id": 5}', "\\0\\0\\0"):
        machine.succeed(
            f"printf '{text}' > /var/lib/ekiben/runs/app.json",
            f"printf '{text}' > /var/lib/ekiben/status/app.json",
        )
        machine.wait_until_succeeds("test ! -e /var/lib/ekiben/runs/app.json")
        wait_until_idle(machine, "app")
        assert last_run(machine, "app")["result"] in ("deployed", "unchanged"), last_run(machine, "app")
        machine.succeed("test -e /var/lib/ekiben/runs/app.json.unreadable; rm /var/lib/ekiben/runs/app.json.unreadable")
    machine.succeed("journalctl -u ekiben-app -o cat | grep -F 'Set the journal'")
    publish(machine, "app", str(next(COUNT)))
    assert run(machine, "app")["result"] == "deployed"
    check_deployed(machine, "app")
