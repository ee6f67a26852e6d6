import re

machine.start()
install(machine)
COUNT = iter(range(2, 1000))


def awaits(instance, content=None):
    """Has a system wait for the next boot; returns it."""
    publish(machine, "other" if instance == "other" else "app", content or str(next(COUNT)))
    ended = run(machine, instance)
    assert ended["result"] == "awaitingBoot", ended
    return generation(machine).split()[1]


def check_stays(command="systemctl start ekiben-reboot.service"):
    """Checks that the machine is not rebooted."""
    machine.succeed(command, "systemctl is-system-running --wait || true")
    jobs = machine.succeed("systemctl list-jobs")
    assert jobs == "No jobs running.\n", jobs


def reboots(*systems):
    """Waits until the machine has been rebooted, and checks what its loader has booted."""
    before = len(machine.boots)
    machine.succeed("systemctl start --no-block ekiben-reboot.service")
    machine.wait_for_shutdown()
    machine.start()
    assert machine.boots[before:] == [*systems], machine.boots[before:]
    assert running(machine) == systems[-1]


def shows_boot(options=""):
    """What status says of all, without how long it has been so."""
    return re.sub(r"\d+ \w+ so far", "0 s so far", machine.execute(f"ekiben {options} status")[1])


with subtest("nothing waits: the machine is not rebooted"):
    check_stays()
    awaits("app")
    machine.crash()
    machine.start()
    assert (seen := last_run(machine, "app"))["result"] == "deployed", seen
    check_stays()

with subtest("what waits for a boot is rebooted into, once, in its window, if its own instance may"):
    awaits("other")
    assert "other: awaits the next boot, for 0 s so far; reboot to have it deployed\n" in shows_boot(), shows_boot()
    check_stays()
    system = awaits("app")
    assert "app: awaits the next boot, for 0 s so far; this machine reboots within minutes\n" in shows_boot(), shows_boot()
    machine.succeed("ekiben hold other 1h")
    assert "; this machine reboots within minutes, once nothing is held\n" in shows_boot(), shows_boot()
    check_stays()
    machine.succeed("ekiben resume other")
    wait_until_at_rest(machine, "other")
    now, later = machine.succeed("date +%H:%M").strip(), machine.succeed("date +%H:%M -d '+2 hours'").strip()
    window = f'.instances.app.reboot.window = {{"lower": "{later}", "upper": "{now}"}}'
    machine.succeed(f"jq {shlex.quote(window)} /etc/ekiben/config.json > /root/config.json")
    assert f"; this machine reboots between {later} and {now}\n" in shows_boot("--config /root/config.json"), shows_boot()
    check_stays("ekiben --config /root/config.json reboot")
    reboots(system)
    assert (seen := last_run(machine, "app"))["result"] == "deployed", seen
    check_stays()

with subtest("a reboot that is cut off, at whichever operation, is made up for"):
    system = awaits("app")
    for number in range(1, 9):
        machine.fault("ekiben", number, "kill", "reboot")
        machine.fail("ekiben reboot")
    machine.no_fault()
    assert "app: awaits the next boot, for 0 s so far; this machine reboots within minutes\n" in shows_boot(), shows_boot()
    reboots(system)
    check_stays()

with subtest("another hand boots an older system, again and again: that is never fought"):
    before, new = running(machine), awaits("app")
    reboots(new)
    for _ in range(3):
        machine.crash()
        machine.start(choose=before)
        assert running(machine) == before
        check_stays()
    machine.crash()
    machine.start()
    assert running(machine) == new

with subtest("a system that does not come up is tried once"):
    before, system = running(machine), awaits("app")
    machine.broken = {system}
    reboots(system, before)
    machine.broken = set()
    ended = last_run(machine, "app")
    assert ended["result"] == "rolledBack" and ended["stage"] == "boot", ended
    check_stays()

with subtest("a system that is not well when it has booted is left by a reboot, once"):
    before, system = running(machine), awaits("app", "sick")
    reboots(system)
    ended = last_run(machine, "app")
    assert ended["result"] == "rolledBack" and ended["rebootNeeded"], ended
    # more runs than are remembered
    for _ in range(21):
        assert "known to be bad" in run(machine, "app")["error"], last_run(machine, "app")
    reboots(before)
    check_stays()
    publish(machine, "app", "well")

with subtest("what the machine was rebooted for before it forgets nothing of"):
    system = awaits("app")
    machine.succeed(f"printf '\\n%s' {system} >> /var/lib/ekiben/rebooted")
    check_stays()
    assert "not rebooting again" in machine.succeed("journalctl -b -o cat -u ekiben-reboot")

with subtest("kexec: where it does not work, the machine is rebooted all the same; and the loader boots the old system after it"):
    before, system = running(machine), awaits("quick")
    machine.succeed("mkdir -p /var/log/journal; journalctl --flush")
    reboots(system)
    assert "falling back to a full reboot" in machine.succeed("journalctl -o cat -u ekiben-reboot")
    assert (seen := last_run(machine, "quick"))["result"] == "deployed", seen
    # as with a kernel that is loaded, and then hangs
    before, system = system, awaits("quick")
    machine.succeed(
        "printf '[Service]\\nType=oneshot\\nExecStart=true\\n' > /run/systemd/system/prepare-kexec.service; systemctl daemon-reload",
        "mount -t tmpfs tmpfs /sys/kernel; echo 1 > /sys/kernel/kexec_loaded",
    )
    reboots(before)
    ended = last_run(machine, "quick")
    assert ended["result"] == "rolledBack" and ended["stage"] == "boot", ended
