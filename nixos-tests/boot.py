machine.start()
install(machine)
COUNT = iter(range(2, 1000))


def boot(system=None, crash=True):
    """Boots the machine again, by a power cut or in order: into what its boot loader boots, or what somebody chooses."""
    machine.crash() if crash else machine.shutdown()
    machine.start(choose=system)


def state():
    """Which systems run, and are in the profile; the branch."""
    return {"running": running(machine), "generation": generation(machine), "head": head(machine)}


def awaits(instance="app", content=None, **more):
    """Has a system wait for the next boot; returns it."""
    before = state()
    publish(machine, "other" if instance == "other" else "app", content or str(next(COUNT)), **more)
    ended = run(machine, instance)
    assert ended["result"] == "awaitingBoot" and ended["rebootNeeded"], ended
    assert (running(machine), head(machine)) == (before["running"], before["head"])
    system = generation(machine).split()[1]
    known = status(machine, instance)
    assert known["awaiting"] == {"commit": ended["commit"], "system": system}, known
    assert known["running"] is None and ended["commit"] != before["head"], known
    return system


def check_rolled_back(before, words, instance="app"):
    """Checks that the last boot has ended what waited for it as a failure, and that all is as before that."""
    ended = last_run(machine, instance)
    assert ended["result"] == "rolledBack" and ended["stage"] == "boot" and words in ended["error"], ended
    assert {**state(), "running": ""} == {**before, "running": ""}, (before, state())
    known = status(machine, instance)
    assert known["awaiting"] is None and known["bad"], known
    assert machine.succeed("ls -A /var/lib/ekiben/runs; ls /nix/var/nix/gcroots/ekiben || true") == ""
    return ended


# as systemd-bless-boot.service, where boots are counted
machine.succeed(
    "mkdir -p /usr/local/lib/systemd/system/basic.target.wants",
    "cd /usr/local/lib/systemd/system; ln -s ../scenario-bless.service basic.target.wants/; cat > scenario-bless.service << 'EOF'\n"
    "[Unit]\nDefaultDependencies=no\nRequires=boot-complete.target\nAfter=local-fs.target boot-complete.target\n"
    "Conflicts=shutdown.target\nBefore=shutdown.target\n[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=true\nEOF",
)

with subtest("a system that only a boot can bring is deployed when it has booted, and not before"):
    assert run(machine, "live")["result"] == "deployed"
    for kind, instance, trouble in (("operation", "app", "none"), ("init", "live", "reboot"), ("inhibitor", "app", "none")):
        system = awaits(instance, trouble=trouble)
        url = "http://127.0.0.1:8787/ekiben"
        if instance == "app":
            known = json.loads(machine.succeed(f"curl -fsS -H 'Authorization: Bearer token-app-0123456789' {url}"))
            assert known["last"]["result"] == "awaitingBoot" and not known["running"], known
        assert "awaiting  the next boot: " in machine.succeed(f"ekiben status {instance}")
        boot()
        ended = last_run(machine, instance)
        assert ended["result"] == "deployed" and not ended["rebootNeeded"], ended
        assert running(machine) == system
        machine.require_unit_state("scenario-bless.service", "active")
        check_deployed(machine, instance)
        assert machine.succeed("ls -A /var/lib/ekiben/runs; ls /nix/var/nix/gcroots/ekiben || true") == ""
        assert run(machine, instance)["result"] == "unchanged"

for what, more, words in (
    ("a health check fails", {"content": "sick1"}, "health check app"),
    ("a unit fails", {"trouble": "unit"}, "Failed to start scenario-trouble.service"),
):
    with subtest(f"{what} after the boot: what only a boot has brought, only a boot takes away"):
        before = state()
        system = awaits(**more)
        boot()
        ended = check_rolled_back(before, words)
        assert running(machine) == system and ended["rebootNeeded"], ended
        assert f"this machine runs {system} until it is rebooted" in ended["warnings"], ended
        machine.require_unit_state("ekiben-boot.service", "failed")
        machine.require_unit_state("scenario-bless.service", "inactive")
        machine.fail("journalctl -b -o cat -u ekiben-boot | grep ': test ...'")
        said = machine.fail("ekiben status app")
        assert "needed to run the old system" in said, said
        # nobody tries it again unasked
        assert "known to be bad" in run(machine, "app")["error"], last_run(machine, "app")
        # nor is it the measure for what follows: the same is no better than before
        deploy(machine, "git commit -q --allow-empty -m 'the same'")
        before["head"] = head(machine)
        assert (again := run(machine, "live"))["result"] == "rolledBack" and words.split()[-1] in again["error"], again
        assert "known to be bad" in run(machine, "live")["error"], last_run(machine, "live")
        assert running(machine) == system and run(machine, "app")["result"] == "awaitingBoot", last_run(machine, "app")
        boot()
        check_rolled_back(before, words)
        boot()
        assert state() == before
        machine.require_unit_state("ekiben-boot.service", "active")
        assert len([run for run in status(machine, "app")["runs"] if run["id"] == ended["id"]]) == 1

with subtest("a pre-switch check refuses what is to be booted: all is as before, and it is not held against the candidate"):
    before = state()
    publish(machine, "app", str(next(COUNT)))
    machine.succeed("echo 'no room at all' > /run/scenario-refuses")
    ended = run(machine, "app")
    assert ended["result"] == "rolledBack" and "pre-switch check scenario failed: boot of /nix/store/" in ended["error"], ended
    assert state() == before and status(machine, "app")["bad"]["commit"] != ended["commit"], status(machine, "app")
    machine.succeed("rm /run/scenario-refuses")
    assert run(machine, "app")["result"] == "awaitingBoot", last_run(machine, "app")
    boot()
    check_deployed(machine, "app")

with subtest("another system boots: it is said which, and all is as before"):
    for _ in range(3):
        before = state()
        system = awaits()
        boot(before["running"])
        check_rolled_back(before, f"Failed to boot {system}: this machine runs {before['running']} instead")
        machine.require_unit_state("ekiben-boot.service", "active")
    # a third one
    third = machine.succeed(f"ls -d {PROFILE}-*-link | sort -V | head -n 1 | xargs readlink").strip()
    before = state()
    system = awaits()
    boot(third)
    check_rolled_back(before, f"this machine runs {third} instead")
    assert running(machine) == third
    boot()
    assert state() == before

with subtest("a machine that runs something else than what was deployed: said by whose hand, never fought, and no success"):
    assert run(machine, "live")["result"] == "deployed"
    boot()
    before = state()
    boot(third)
    said = machine.fail("ekiben status live")
    number = before["generation"].split("-")[1]
    assert f"runs generation 1, chosen at boot; generation {number} is deployed" in said, said
    ended = run(machine, "live")
    assert ended["result"] == "drifted", ended
    assert running(machine) == third and generation(machine) == before["generation"]
    assert "The run ended: drifted: this machine runs generation 1, chosen at boot" in machine.fail("ekiben trigger --wait live 2>&1")
    publish(machine, "app", str(next(COUNT)))
    assert run(machine, "live")["result"] == "deployed"
    check_deployed(machine, "live")
    boot()
    old = before["generation"].split()[1]
    machine.succeed(f"{old}/bin/switch-to-configuration test")
    assert "switched to by hand" in machine.fail("ekiben status live")
    assert run(machine, "live")["result"] == "drifted"
    boot()
    check_deployed(machine, "live")

with subtest("a machine that never comes up altogether deploys what mends that"):
    units = "/usr/local/lib/systemd/system"
    machine.succeed("grep JobTimeoutSec=72 /etc/systemd/system/ekiben-boot.service",
                    f"mkdir -p {units}/ekiben-boot.service.d; printf '[Unit]\\nJobTimeoutSec=2s\\n' > {units}/ekiben-boot.service.d/sooner.conf; "
                    f"printf '[Service]\\nType=oneshot\\nExecStart=sleep infinity\\n[Unit]\\nBefore=multi-user.target\\n' > {units}/endless.service",
                    "systemctl add-wants multi-user.target endless.service")
    machine.crash()
    machine.start(wait=False)
    system = awaits()
    assert machine.execute("systemctl is-system-running")[1].strip() == "starting"
    machine.succeed(f"rm -r {units}/ekiben-boot.service.d {units}/endless.service /etc/systemd/system/multi-user.target.wants/endless.service")
    boot()
    assert running(machine) == system
    check_deployed(machine, "app")

with subtest("one proposal waits at a time"):
    before = state()
    first = awaits()
    generations = machine.succeed("ls /nix/var/nix/profiles")
    # the same again: nothing is changed
    log = "journalctl -o cat -u ekiben-app | grep -c ': boot ...'"
    count = machine.succeed(log)
    ended = run(machine, "app")
    assert ended["result"] == "awaitingBoot", ended
    assert generation(machine).endswith(first), (generation(machine), first)
    assert (machine.succeed("ls /nix/var/nix/profiles"), machine.succeed(log)) == (generations, count)
    # one that fails before it changes anything leaves it alone, and what it is made of
    publish(machine, "app", str(next(COUNT)), trouble="build")
    assert run(machine, "app")["result"] == "failed"
    assert generation(machine).endswith(first)
    commit = status(machine, "app")["awaiting"]["commit"]
    assert commit in deploy(machine, "git for-each-ref refs/ekiben"), commit
    # another one takes its place
    second = awaits()
    assert second != first
    assert machine.succeed("ls /nix/var/nix/profiles") == generations and head(machine) == before["head"]
    # another instance's, too
    third = awaits("other")
    ended = last_run(machine, "app")
    assert ended["result"] == "failed" and "superseded before it had booted: other deploys another system" in ended["error"], ended
    assert status(machine, "app")["awaiting"] is None and status(machine, "app")["bad"]["commit"] != ended["commit"]
    assert machine.succeed("ls -A /var/lib/ekiben/runs") == "other.trial\n"
    boot()
    assert status(machine, "other")["deployed"]["commit"] == head(machine) and running(machine) == third, last_run(machine, "other")
    assert last_run(machine, "app")["result"] == "failed"
    # what is deployed at once takes its place as well; what git has kept of another's goes with that one's next run
    awaits()
    publish(machine, "app", str(next(COUNT)))
    assert run(machine, "live")["result"] == "deployed"
    before = state()
    assert run(machine, "app")["result"] == "unchanged"
    for _ in range(2):
        assert state() == before
        check_deployed(machine, "live")
        boot()

with subtest("what is not wanted any more is withdrawn"):
    before = what_stays(machine)
    awaits()
    machine.succeed(as_deploy("git -C /srv/app reset -q --hard HEAD~"))
    ended = run(machine, "app")
    assert ended["result"] == "unchanged" and "has been withdrawn" in " ".join(ended["warnings"]), ended
    assert what_stays(machine) == before and status(machine, "app")["awaiting"] is None
    boot()
    assert what_stays(machine) == before
    assert last_run(machine, "app")["id"] == ended["id"]

with subtest("the branch moves meanwhile: the run starts over from there"):
    system = awaits()
    deploy(machine, "echo more > note; git add note; git commit -qm note")
    boot()
    wait_until_at_rest(machine, "app")
    made, before = status(machine, "app")["runs"][:2]
    assert before["result"] == "startedOver" and before["commit"] != made["commit"], (before, made)
    assert made["result"] == "awaitingBoot" and running(machine) == system, made
    boot()
    check_deployed(machine, "app")
    assert shows(machine, "app") == machine.succeed("cat /srv/app/content").strip()

FAULT = "/var/lib/ekiben/root/ekiben-fault"
POINTS = machine.succeed("ekiben fault-points").strip().split("\n")


def held(point, unit):
    """Waits until a unit is held at a point, and lets what comes after that go on."""
    machine.wait_until_succeeds(f"journalctl -b -q -o cat -u {unit} | grep -F {shlex.quote(f'Held at {point}.')}", timeout=60)
    machine.succeed(f"rm -f {FAULT} /run/ekiben-fault")


with subtest("what waits for a boot is superseded while its own instance has a run under way: that run comes to its end"):
    awaits()
    publish(machine, "app", str(next(COUNT)))
    hold(machine, "prepare: committed")
    machine.succeed("systemctl start --no-block ekiben-app.service")
    held("prepare: committed", "ekiben-app")
    awaits("other")
    under_way = status(machine, "app")
    assert under_way["running"]["stage"] == "prepare" and "superseded" in under_way["runs"][0]["error"], under_way
    go_on(machine, "prepare: committed")
    wait_until_at_rest(machine, "app")
    assert last_run(machine, "app")["result"] == "awaitingBoot", last_run(machine, "app")
    boot()
    assert status(machine, "app")["deployed"]["commit"] == head(machine), last_run(machine, "app")
    assert run(machine, "other")["result"] == "awaitingBoot", last_run(machine, "other")
    boot()
    check_deployed(machine, "other")

with subtest("what was set for the next boot by hand is superseded by what is to wait for that: it is said how to have it back"):
    publish(machine, "other", str(next(COUNT)))
    deploy(machine, "nix flake update other; git commit -qam 'by hand'")
    build_into_profile(machine)
    deploy(machine, "git reset -q --hard HEAD~1")
    wanted = generation(machine)
    awaits()
    ended = last_run(machine, "app")
    said = [warning for warning in ended["warnings"] if warning.startswith(f"generation {wanted.split('-')[1]}, which was set for the next boot")]
    assert len(said) == 1, ended
    assert "superseded" not in machine.succeed("ekiben status"), machine.succeed("ekiben status")
    machine.succeed(said[0].split("to have it back: ")[1])
    assert generation(machine) == wanted
    boot()
    assert generation(machine) == wanted and running(machine) == wanted.split()[1], status(machine, "app")
    ended = last_run(machine, "app")
    assert ended["result"] == "rolledBack" and not [warning for warning in ended["warnings"] if "until it is rebooted" in warning], ended


for way, point in itertools.product(("kill", "stop", "crash"), [point for point in POINTS if point.startswith(("activate: p", "activate: b", "conclude: r"))]):
    if point == "activate: begun":
        continue
    with subtest(f"{way} at {point}, in a run whose system is to wait for a boot"):
        before = what_stays(machine)
        content = str(next(COUNT))
        publish(machine, "app", content)
        hold(machine, point)
        machine.succeed("systemctl start --no-block ekiben-app.service")
        held(point, "ekiben-app")
        if way == "kill":
            machine.succeed("systemctl kill --kill-whom=main --signal=KILL ekiben-app.service")
        elif way == "stop":
            machine.succeed("systemctl stop --no-block ekiben-app.service")
        else:
            boot()
        wait_until_at_rest(machine, "app")
        machine.succeed("systemctl reset-failed ekiben-app.service")
        ended = last_run(machine, "app")
        if ended["result"] == "rolledBack":
            assert way != "crash" and what_stays(machine) == before and not status(machine, "app")["bad"], ended
            ended = run(machine, "app")
        if ended["result"] == "awaitingBoot":
            assert running(machine) == before["running"].strip() and status(machine, "app")["awaiting"], ended
            boot()
            ended = last_run(machine, "app")
        assert ended["result"] in ("deployed", "unchanged"), ended
        check_deployed(machine, "app")
        assert shows(machine, "app") == content and machine.succeed("ls -A /var/lib/ekiben/runs") == ""

after = [point for point in POINTS if point.startswith(("boot:", "accept:", "conclude:"))]
back = [point for point in POINTS if point.startswith(("boot: begun", "back:", "conclude: r"))]
for way, (point, content) in itertools.product(("kill", "crash"), [(point, "") for point in after] + [(point, "sick") for point in back]):
    with subtest(f"{way} at {point}, where a system is judged that is {content or 'well'}"):
        before = state()
        content = f"{content}{next(COUNT)}"
        system = awaits(content=content)
        machine.succeed(f"echo {shlex.quote(point)} > {FAULT}")
        machine.crash()
        machine.start(wait=False)
        held(point, "ekiben-boot")
        assert (seen := head(machine)) == before["head"] or point in ("accept: branch moved", "conclude: accepted", "conclude: reported"), seen
        if way == "kill":
            machine.succeed("systemctl kill --kill-whom=main --signal=KILL ekiben-boot.service")
            machine.wait_until_succeeds("test ! -e /var/lib/ekiben/runs/app.trial", timeout=60)
            machine.wait_until_succeeds("systemctl show --property ActiveState --value ekiben-boot | grep -E '^(active|failed)$'")
        else:
            boot()
        if content.startswith("sick"):
            # what had been put back when the power failed has booted
            check_rolled_back(before, "health check app")
            boot()
            assert state() == before
        else:
            assert (seen := last_run(machine, "app"))["result"] == "deployed", seen
            check_deployed(machine, "app")
            assert running(machine) == system and machine.succeed("ls -A /var/lib/ekiben/runs; ls /nix/var/nix/gcroots/ekiben || true") == ""
            assert run(machine, "app")["result"] == "unchanged"

with subtest("what another hand's switch has stopped for a moment, as a system is judged, is not that system's fault"):
    system = awaits()
    machine.succeed(f"echo 'boot: begun' > {FAULT}")
    machine.crash()
    machine.start(wait=False)
    held("boot: begun", "ekiben-boot")
    machine.succeed("mkdir -p /run/nixos")
    occupy(machine, SWITCH_LOCK)
    machine.succeed("echo sick > /tmp/sick; mount --bind /tmp/sick /etc/app")
    go_on(machine, "boot: begun")
    machine.wait_until_succeeds("journalctl -b -o cat -u ekiben-boot | grep -E 'Something else is switching|Failed to pass'")
    machine.succeed("umount /etc/app; systemctl stop holder")
    machine.wait_until_succeeds("systemctl show --property ActiveState --value ekiben-boot | grep -E '^(active|failed)$'")
    assert (seen := last_run(machine, "app"))["result"] == "deployed", seen
    check_deployed(machine, "app")
    assert running(machine) == system
    machine.succeed("rm /run/ekiben-fault")

with subtest("what awaits a boot is withdrawn by a rollback, and not proposed again; cut off, too"):
    for point in (None, "activate: begun", "back: profile restored"):
        before = state()
        system = awaits()
        if point:
            hold(machine, point)
            machine.succeed("systemd-run --collect --unit=rollback ekiben rollback app")
            held(point, "ekiben-app")
            machine.succeed("systemctl kill --kill-whom=main --signal=KILL ekiben-app.service")
            machine.wait_until_succeeds("test ! -e /var/lib/ekiben/runs/app.json")
            wait_until_at_rest(machine, "app")
            machine.succeed("systemctl stop rollback || true", "systemctl reset-failed ekiben-app.service || true")
        if point == "activate: begun":
            assert last_run(machine, "app")["result"] == "failed" and generation(machine).endswith(system)
            machine.succeed("ekiben rollback app")
        elif not point:
            machine.succeed("ekiben rollback app")
        known = status(machine, "app")
        assert known["runs"][0]["result"] == "restored" and known["awaiting"] is None, known
        assert run(machine, "app")["result"] == "withheld"
        assert state() == before and machine.succeed("ls -A /var/lib/ekiben/runs; ls /nix/var/nix/gcroots/ekiben") == ""
        boot()
        assert state() == before and system not in machine.boots

with subtest("what a boot has brought, a boot takes away by a rollback, if the old system is well then"):
    before = state()
    awaits()
    boot()
    after = state()
    assert machine.execute("ekiben rollback app")[0] == 75
    known = status(machine, "app")
    assert (known["deployed"]["commit"], known["awaiting"]["system"]) == (after["head"], before["running"]), known
    assert run(machine, "app")["result"] == "withheld" and generation(machine) == before["generation"]
    assert "the next boot undoes" in machine.fail("ekiben rollback app 2>&1")
    boot()
    ended = last_run(machine, "app")
    assert ended["result"] == "restored" and ended["undid"] == after["head"], ended
    assert state() == {**before, "head": after["head"]}
    assert run(machine, "app")["result"] == "withheld"
    awaits()
    boot()
    assert status(machine, "app")["undone"] is None
    after = state()
    assert machine.execute("ekiben rollback app")[0] == 75
    # another one is chosen
    boot(after["running"])
    assert (seen := last_run(machine, "app"))["result"] == "rolledBack" and state() == after, seen
    assert status(machine, "app")["undone"] is None
    assert run(machine, "app")["result"] == "unchanged"
    # it is had back before the boot
    assert machine.execute("ekiben rollback app")[0] == 75
    machine.succeed("cd /var/lib/ekiben/status; jq '.undone.since -= 61' app.json > x; mv x app.json", "ekiben trigger --wait app")
    known = status(machine, "app")
    assert (known["runs"][0]["result"], known["awaiting"], known["undone"]) == ("unchanged", None, None) and state() == after, known

with subtest("what was undone is deployed by no other instance with the same repository, but for somebody at this machine"):
    publish(machine, "app", str(next(COUNT)))
    assert run(machine, "live")["result"] == "deployed"
    machine.succeed("ekiben rollback live")
    before = state()
    ended = run(machine, "app")
    assert ended["result"] == "withheld" and "run ekiben trigger app to deploy" in ended["warnings"][0] and state() == before, ended
    machine.succeed("cd /var/lib/ekiben/status; jq '.undone.since -= 61' live.json > x; mv x live.json")
    assert machine.execute("ekiben trigger --wait app")[0] == 75
    boot()
    check_deployed(machine, "app")
    assert run(machine, "live")["result"] == "unchanged" and status(machine, "live")["undone"] is None

with subtest("what was switched to and does not boot is said, and nothing is put back"):
    publish(machine, "app", str(next(COUNT)))
    old = running(machine)
    assert run(machine, "live")["result"] == "deployed"
    before = state()
    number = int(before["generation"].split("-")[1])
    boot(old)
    said = f"runs generation {number - 1}; generation {number} is deployed, but did not boot"
    assert said in machine.fail("ekiben status live")
    machine.succeed(f"journalctl -b -o cat -u ekiben-boot | grep -F {shlex.quote(said)}")
    assert {**state(), "running": ""} == {**before, "running": ""}
    assert run(machine, "live")["result"] == "drifted"
    boot()
    check_deployed(machine, "live")
    # it has booted now
    boot(old)
    assert f"runs generation {number - 1}, chosen at boot; generation {number} is deployed; reboot to that, or deploy another one\n" in machine.fail("ekiben status live")
    boot()

with subtest("a specialisation that runs is kept over a switch, or it is said that it was left"):
    publish(machine, "app", str(next(COUNT)), trouble="specialised")
    assert run(machine, "live")["result"] == "deployed"
    check_deployed(machine, "live")
    machine.succeed("/run/current-system/specialisation/night/bin/switch-to-configuration test", "test -e /etc/static/night")
    assert run(machine, "live")["result"] == "unchanged"
    machine.succeed("ekiben status live")
    content = str(next(COUNT))
    publish(machine, "app", content, trouble="specialised")
    ended = run(machine, "live")
    assert ended["result"] == "deployed" and not ended["warnings"] and not ended["rebootNeeded"], ended
    system = generation(machine).split()[1]
    assert running(machine) == machine.succeed(f"readlink -f {system}/specialisation/night").strip() and shows(machine, "app") == content
    assert status(machine, "live")["deployed"]["system"] == system
    # one that fails goes back to it
    before = what_stays(machine)
    publish(machine, "app", f"sick{next(COUNT)}", trouble="specialised")
    assert run(machine, "live")["result"] == "rolledBack" and what_stays(machine) == before, last_run(machine, "live")
    publish(machine, "app", str(next(COUNT)))
    ended = run(machine, "live")
    assert ended["result"] == "deployed" and "the specialisation night was left: the new system does not have it" in ended["warnings"], ended
    check_deployed(machine, "live")

# from here on, with a boot loader that boots a system once
machine.crash()
machine = server
machine.start()
install(machine)
assert run(machine, "live")["result"] == "deployed"


def booted():
    """The system that the boot loader has booted last."""
    return machine.boots[-1]


with subtest("what has come into the profile, but not into the boot loader, is deployed when it is what is booted"):
    for instance in ("live", "app"):
        publish(machine, "app", str(next(COUNT)))
        deploy(machine, "nix flake update app; git commit -qam 'by hand'")
        # by nixos-rebuild, which was interrupted then
        system = build_into_profile(machine)
        assert run(machine, instance)["result"] == ("deployed" if instance == "live" else "awaitingBoot"), last_run(machine, instance)
        boot()
        assert booted() == running(machine) == system
        check_deployed(machine, instance)

with subtest("what somebody switches to, or sets for the next boot, by hand is booted, and not what has waited"):
    for action, crash in (("switch", True), ("boot", False)):
        waits = awaits()
        deploy(machine, f"echo {action} > by-hand; git add .; git commit -qm 'by hand'")
        system = build_into_profile(machine)
        machine.succeed(f"{system}/bin/switch-to-configuration {action}")
        if crash:
            machine.wait_until_succeeds("! grep next_entry=N /boot/grub/grubenv")
        boot(crash=crash)
        assert booted() == running(machine) == system != waits
        known = status(machine, "app")
        assert known["runs"][0]["result"] == "rolledBack" and not known["bad"] and not known["awaiting"], known
        waits = awaits()
        boot()
        assert booted() == waits
        check_deployed(machine, "app")

with subtest("what waits is booted once: until it is well, what was before is booted by default"):
    for crash in (True, False):
        # where the old system is made the default, none of its checks is asked
        machine.succeed("echo 'no room at all' > /run/scenario-refuses")
        old, system = running(machine), awaits()
        assert not (seen := last_run(machine, "app"))["warnings"], seen
        boot(crash=crash)
        check_deployed(machine, "app")
        assert running(machine) == system
        boot()
        assert booted() == system

with subtest("one that does not come up is gone with the next power cycle, and is booted no more"):
    before = state()
    system = awaits()
    machine.broken.add(system)
    boot()
    check_rolled_back(before, f"Failed to boot {system}: this machine runs {before['running']} instead")
    assert machine.boots.count(system) == 1 and booted() == before["running"]
    boot()
    assert state() == before and machine.boots.count(system) == 1

with subtest("a boot past the boot loader says nothing of the system that waits"):
    before = state()
    awaits()
    machine.crash()
    machine.start(kexec=before["running"])
    ended = last_run(machine, "app")
    assert ended["result"] == "rolledBack" and "the boot loader has not tried to boot it" in ended["error"], ended
    # what was found bad before that is another one
    assert state() == before and status(machine, "app")["bad"]["commit"] != ended["commit"]
    assert run(machine, "app")["result"] == "awaitingBoot"
    boot()
    check_deployed(machine, "app")

with subtest("one that is not well has been booted by default never"):
    before = state()
    system = awaits(content=f"sick{next(COUNT)}")
    boot()
    check_rolled_back(before, "health check app")
    assert running(machine) == system
    boot()
    assert state() == before

with subtest("a power cut while it is judged"):
    for point in ("boot: begun", "boot: well", "boot: boot loader set"):
        before = state()
        system = awaits()
        machine.succeed(f"echo {shlex.quote(point)} > {FAULT}")
        machine.crash()
        machine.start(wait=False)
        held(point, "ekiben-boot")
        boot()
        if point == "boot: boot loader set":
            assert running(machine) == system
            check_deployed(machine, "app")
        else:
            check_rolled_back(before, f"Failed to boot {system}")
            assert state() == before

with subtest("one that is withdrawn, or superseded, is not booted any more"):
    before = state()
    for supersede in (False, True):
        system = awaits()
        if supersede:
            # by a run that changes something else at once
            publish(machine, "app", str(next(COUNT)))
            assert run(machine, "live")["result"] == "deployed"
            before = state()
        else:
            machine.succeed(as_deploy("git -C /srv/app reset -q --hard HEAD~"))
            assert run(machine, "app")["result"] == "unchanged"
        boot()
        assert state() == before and system not in machine.boots

# the boot loader knows of it no more, the profile does; nothing of it is left but what is known of its instance
FORGOTTEN, REPORT = ("nix-env", "--switch-generation", ""), ("ekiben", "activate other", "status/app.json")
for way, what, (program, *where) in (("crash", "withdrawn by hand", FORGOTTEN), ("crash", "superseded", FORGOTTEN),
                                     ("crash", "superseded", REPORT), ("kill", "superseded", REPORT)):
    with subtest(f"{way} of {program} while one is {what}: that is completed, and it was not bad"):
        before = state()
        awaits()
        supersede = what == "superseded"
        if supersede:
            publish(machine, "other", str(next(COUNT)))
        machine.fault(program, 1, "hold" if way == "crash" else way, *where)
        machine.succeed(f"systemd-run --quiet {'systemctl start ekiben-other.service' if supersede else 'ekiben rollback app'}")
        retry(f"{program} to be at it", machine.fault_met, 60)
        if way == "crash":
            boot()
        for instance in ("app", "other"):
            wait_until_at_rest(machine, instance)
        known = status(machine, "app")
        assert (running(machine), head(machine)) == (before["running"], before["head"]) and not known["bad"] and not known["awaiting"], known
        results = [run["result"] for run in known["runs"][:3]]
        assert "superseded" in known["runs"][0]["error"] if supersede else results == ["withheld", "restored", "rolledBack"], known
        if supersede and way == "crash":
            assert last_run(machine, "other")["result"] == "awaitingBoot", last_run(machine, "other")
            boot()
            check_deployed(machine, "other")
        else:
            assert state() == before

for way, point in itertools.product(("kill", "crash"), [point for point in POINTS if point.startswith(("activate: pe", "activate: pr", "activate: bo"))]):
    with subtest(f"{way} at {point}, in a run whose system is to be booted once"):
        before = state()
        publish(machine, "app", str(next(COUNT)))
        hold(machine, point)
        machine.succeed("systemctl start --no-block ekiben-app.service")
        held(point, "ekiben-app")
        if way == "kill":
            machine.succeed("systemctl kill --kill-whom=main --signal=KILL ekiben-app.service")
        else:
            boot()
        wait_until_at_rest(machine, "app")
        machine.succeed("systemctl reset-failed ekiben-app.service")
        if last_run(machine, "app")["result"] == "rolledBack":
            assert state() == before and not status(machine, "app")["bad"], last_run(machine, "app")
            assert run(machine, "app")["result"] == "awaitingBoot"
        if last_run(machine, "app")["result"] == "awaitingBoot":
            boot()
        assert (seen := last_run(machine, "app"))["result"] in ("deployed", "unchanged"), seen
        check_deployed(machine, "app")
