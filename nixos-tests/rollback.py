start_all()
install(server)
server.wait_until_succeeds("ping -c 1 -W 1 client", timeout=60)
server.succeed("touch /run/scenario-calm; systemctl reset-failed")
COUNT = iter(range(2, 1000))


def everything():
    """All that a failed run has to leave as it was."""
    units = "systemctl list-units --plain --no-legend --state=active --type=service,socket,path,timer | awk '{ print $1 }'"
    generations, active = server.succeed(f"ls /nix/var/nix/profiles; printf '\\0'; {units}").split("\0")
    # what comes and goes by itself
    passing = {"nix-daemon.service", "systemd-hostnamed.service", "scenario-once.timer"}
    return {**what_stays(server), "generations": generations, "units": "\n".join(sorted(set(active.split()) - passing))}


def check_unchanged(before):
    after = everything()
    assert before == after, "\n".join(differences(before, after))


def fails(result, stage, message, instance="app"):
    """Checks that a run fails like this and leaves everything as it was; returns how it ended."""
    before = everything()
    ended = run(server, instance)
    assert (ended["result"], ended["stage"]) == (result, stage), ended
    assert message in ended["error"], ended
    server.require_unit_state(f"ekiben-{instance}.service", "failed")
    server.succeed(f"journalctl -u ekiben-{instance} -o cat | grep -F {shlex.quote(message)}")
    check_unchanged(before)
    return ended


def rolls_back(trouble, message, instance="app"):
    """The same of a run that has activated a system with this trouble."""
    publish(server, "app", next(COUNT), trouble=trouble)
    return fails("rolledBack", "activate", message, instance)


def output(instance="app"):
    """What status says that the failing program said."""
    return status(server, instance)["output"]


def works(instance="app"):
    """Checks that the next run deploys."""
    content = str(next(COUNT))
    publish(server, "app", content)
    ended = run(server, instance)
    assert ended["result"] == "deployed", ended
    check_deployed(server, instance)
    assert shows(server, "app") == content
    return ended


def commit(change):
    deploy(server, f"{change}; git commit -qam change")


def uncommit():
    deploy(server, "git reset -q --hard HEAD^")


# on hosts alone
with subtest("an input vanished"):
    server.succeed("mv /srv/app /srv/away")
    fails("failed", "prepare", "Failed to update app: exited with 1")
    assert "/srv/app" in output()
    server.succeed("mv /srv/away /srv/app")
    works()

with subtest("the network is down: tried again, and reported as that"):
    commit("sed -i '/app = {/,/url/s#url = .*#url = \"http://client:9/app.tar.gz\";#' flake.nix")
    fails("failed", "prepare", "(3 attempts); this looks like a problem of the network")
    server.succeed("journalctl -u ekiben-app -o cat | grep -F 'trying again in 2 s'")
    uncommit()
    works()

with subtest("the lock file is none"):
    commit("echo '{' > flake.lock")
    fails("failed", "prepare", "Failed to")
    uncommit()

with subtest("the configuration cannot be evaluated"):
    publish(server, "app", next(COUNT), trouble="evaluation")
    fails("failed", "build", "Failed to build server")
    assert "trouble in evaluation" in output()

with subtest("the configuration cannot be built"):
    publish(server, "app", next(COUNT), trouble="build")
    fails("failed", "build", "Failed to build server")
    assert "trouble in build" in output()
    works()

with subtest("the build never ends"):
    publish(server, "app", next(COUNT), trouble="build-hangs")
    fails("failed", "build", "Failed to build server: timed out after", instance="hasty-build")

with subtest("nix is killed, or a builder: nobody's fault"):
    for victim in ("-u deploy -x nix", "-f '[s]leep 3600'"):
        publish(server, "app", next(COUNT), trouble="build-hangs")
        before = everything()
        follow(server, "app")
        server.succeed("systemctl start --no-block ekiben-app.service")
        wait_until_said(server, "app", "building '/nix")
        server.wait_until_succeeds(f"pkill -9 {victim}")
        wait_until_idle(server, "app")
        ended = last_run(server, "app")
        said = ended["error"] + output()
        assert ended["result"] == "failed" and ("signal 9" in said or "exit code 137" in said), (ended, said)
        check_unchanged(before)
        server.succeed("jq -e '.bad == null' /var/lib/ekiben/status/app.json")
    works()

with subtest("what was built is no NixOS"):
    publish(server, "app", next(COUNT), trouble="no-nixos")
    fails("failed", "activate", "/init is missing")
    works()

with subtest("the Nix daemon is down"):
    publish(server, "app", next(COUNT))
    server.succeed("systemctl stop nix-daemon.socket nix-daemon.service")
    before = everything()
    ended = run(server, "app")
    assert (ended["result"], ended["stage"]) == ("failed", "prepare"), ended
    assert ended["error"].endswith("this looks like a problem of this machine, not of the configuration"), ended
    check_unchanged(before)
    server.succeed("systemctl start nix-daemon.socket")
    works()

if is_host(server):
    with subtest("Ekiben's own program is gone: it is tried again now and then, and goes on when it is back"):
        waits = "pgrep -xf 'sleep 20' && systemctl is-failed ekiben-app.service"
        server.succeed("mv /usr/bin/ekiben /usr/bin/ekiben.away; touch /var/lib/ekiben/queue/app")
        server.wait_until_succeeds(waits, timeout=20)
        # its time is up
        server.succeed("pkill -xf 'sleep 20'")
        server.wait_until_succeeds(waits, timeout=20)
        server.succeed("mv /usr/bin/ekiben.away /usr/bin/ekiben; pkill -xf 'sleep 20'")
        wait_until_at_rest(server, "app")
        works()

with subtest("the disk of the repository is full"):
    # a disk of its own, with little room
    server.succeed(
        f"mv {REPOSITORY} {REPOSITORY}.away; install -d -o deploy {REPOSITORY}",
        f"mount -t tmpfs -o size=2M,uid=1000,mode=755 tmpfs {REPOSITORY}",
        f"cp -a {REPOSITORY}.away/. {REPOSITORY}/",
    )
    publish(server, "app", next(COUNT))
    for spare in (0, 4, 12, 20, 28, 36, 44):
        server.succeed(f"dd if=/dev/zero of={REPOSITORY}/.git/filler bs=4k count=10000 2>/dev/null || true")
        size = int(server.succeed(f"stat -c %s {REPOSITORY}/.git/filler"))
        server.succeed(f"truncate -s {max(size - spare * 1024, 0)} {REPOSITORY}/.git/filler")
        before = everything()
        ended = run(server, "app")
        assert ended["result"] in ("failed", "rolledBack", "deployed"), ended
        if ended["result"] == "deployed":
            break
        print(f"with {spare} KiB left: {ended['result']} in {ended['stage']}: {ended['error']}")
        check_unchanged(before)
    server.succeed(f"rm {REPOSITORY}/.git/filler")
    works()
    server.succeed(f"cp -a {REPOSITORY}/. {REPOSITORY}.away/; umount {REPOSITORY}; rmdir {REPOSITORY}; mv {REPOSITORY}.away {REPOSITORY}")

with subtest("the disk of the state directory is full"):
    publish(server, "app", next(COUNT))
    server.succeed(
        "systemctl stop 'ekiben-*.path'; cp -a /var/lib/ekiben /var/lib/ekiben.away",
        "mount -t tmpfs -o size=1M,mode=755 tmpfs /var/lib/ekiben; cp -a /var/lib/ekiben.away/. /var/lib/ekiben/",
    )
    for spare in (0, 4, 8, 12, 16, 20, 24, 28, 32):
        server.succeed("dd if=/dev/zero of=/var/lib/ekiben/filler bs=4k count=10000 2>/dev/null || true")
        size = int(server.succeed("stat -c %s /var/lib/ekiben/filler"))
        server.succeed(f"truncate -s {max(size - spare * 1024, 0)} /var/lib/ekiben/filler")
        before = everything()
        server.execute("systemctl start ekiben-app.service")
        # or it waits for room
        server.wait_until_succeeds("systemctl show --property ActiveState --value ekiben-app.service | grep -E '^(inactive|failed)$'")
        if server.execute("systemctl is-failed --quiet ekiben-app.service")[0] != 0:
            break
        assert spare > 0 or "app: the disk of /var/lib/ekiben has no room left; make some" in server.fail("ekiben status")
        server.succeed("systemctl stop ekiben-retry@app.service")
        check_unchanged(before)
    server.succeed("rm /var/lib/ekiben/filler; systemctl start --all 'ekiben-*.path'")
    works()
    server.succeed("cp -a /var/lib/ekiben/. /var/lib/ekiben.away/; umount -l /var/lib/ekiben; "
                   "cp -a /var/lib/ekiben.away/. /var/lib/ekiben/")

FULL = ("No space left on device", "Out of diskspace", "disk is full", "disk I/O error", "could not write why into")
for what, place in (("Nix's cache", "/var/cache/ekiben/app"), ("the instance's own state", "/var/lib/ekiben/instances/app")):
    with subtest(f"the disk of {what} is full: that is no candidate's fault, and nothing is called unchanged"):
        for spare in (0, 4, 64, 256):
            publish(server, "app", next(COUNT))
            server.succeed(
                f"cp -a {place} {place}.away; mount -t tmpfs -o size=$(($(du -sk {place} | "
                f"cut -f1) + 1024))k,uid=1000,mode=700 tmpfs {place}",
                f"cp -a {place}.away/. {place}/; dd if=/dev/zero of={place}/filler bs=1k 2>/dev/null || true",
                f"truncate -s $(($(stat -c %s {place}/filler) - {spare * 1024})) {place}/filler",
            )
            before = everything()
            ended = run(server, "app")
            print(f"with {spare} KiB left: {ended['result']} in {ended['stage']}: {ended['error']}")
            assert ended["result"] in ("failed", "deployed"), ended
            if ended["result"] == "failed":
                assert ended["stage"] in ("prepare", "build") and any(words in ended["error"] + output() for words in FULL), (ended, output())
                check_unchanged(before)
                server.succeed("jq -e '.bad == null' /var/lib/ekiben/status/app.json")
            server.succeed(f"umount -l {place}; rm -rf {place}.away")
            works()

with subtest("the disk of the store is full"):
    publish(server, "app", next(COUNT))
    server.succeed(
        "cp -a /nix/store /nix/store.away; mount -t tmpfs -o size=$(du -sk /nix/store | cut -f1)k,mode=1775 tmpfs /nix/store",
        "cp -a /nix/store.away/. /nix/store/; dd if=/dev/zero of=/nix/store/filler bs=1k 2>/dev/null || true",
    )
    before = everything()
    ended = run(server, "app")
    assert ended["result"] == "failed" and "No space left on device" in output(), (ended, output())
    check_unchanged(before)
    server.succeed("umount -l /nix/store; rm -rf /nix/store.away; systemctl restart nix-daemon.service")
    works()

with subtest("the disk of Nix's own files is read-only: no daemon asks itself again and again"):
    publish(server, "app", next(COUNT))
    place = "/nix/var/nix"
    server.succeed("systemctl stop nix-daemon.socket nix-daemon.service",
                   f"cp -a {place} /root/away; mount -t tmpfs -o mode=755 tmpfs {place}; cp -a /root/away/. {place}/",
                   f"systemctl start nix-daemon.socket; mount -o remount,ro {place}")
    ended = run(server, "app")
    assert ended["result"] == "failed" and f"Failed to use Nix: the disk of {place} is read-only; remount it" in ended["error"], ended
    server.succeed("systemctl stop nix-daemon.socket nix-daemon.service", f"umount -l {place}; rm -r /root/away", "systemctl start nix-daemon.socket")
    works()

# everywhere
with subtest("the system profile cannot be written"):
    publish(server, "app", next(COUNT))
    server.succeed("mount --bind -o ro /nix/var/nix/profiles /nix/var/nix/profiles")
    fails("rolledBack", "activate", "Failed to set the system profile")
    server.succeed("umount /nix/var/nix/profiles")
# on hosts alone
    works()
# everywhere

with subtest("somebody else is switching: waited for"):
    publish(server, "app", next(COUNT))
    occupy(server, SWITCH_LOCK)
    ended_before = runs(server, "app")
    server.succeed("systemctl start --no-block ekiben-app.service")
    server.wait_until_succeeds("journalctl -u ekiben-app -o cat -n 3 | grep -e 'waiting ...' -e 'test ...'")
# on hosts alone
    # NixOS' own program may be one that waits by itself
    server.wait_until_succeeds("(ekiben status || true) | grep -x 'app: waiting: something else is switching this machine'")
# everywhere
    server.succeed("systemctl stop holder")
    wait_until_idle(server, "app")
    assert (seen := last_run(server, "app"))["result"] == "deployed", seen
    check_deployed(server, "app")

# on hosts alone
with subtest("somebody else is switching, and breaks something for a moment: that was not broken before"):
    publish(server, "app", next(COUNT), trouble="network")
    before = everything()
    occupy(server, SWITCH_LOCK)
    server.succeed("ip link set eth1 down")
    follow(server, "app")
    server.succeed("systemctl start --no-block ekiben-app.service")
    wait_until_said(server, "app", "Something else is switching this machine; waiting ...")
    server.succeed("ip link set eth1 up")
    server.wait_until_succeeds("ping -c 1 -W 1 client")
    server.succeed("systemctl stop holder")
    wait_until_idle(server, "app")
    ended = last_run(server, "app")
    assert ended["result"] == "rolledBack" and "health check network" in ended["error"], ended
    check_unchanged(before)

with subtest("somebody else is switching without end: nothing has changed, and nobody else is to blame"):
    publish(server, "app", next(COUNT))
    occupy(server, SWITCH_LOCK)
    fails("failed", "activate", "something else has been switching this machine all the time", instance="hasty-activation")
    server.succeed("systemctl stop holder")
    assert (seen := run(server, "hasty-activation"))["result"] == "deployed", seen
    check_deployed(server, "hasty-activation")

with subtest("an administrator is switching, and what the run would switch to is bad: the administrator's system stays"):
    publish(server, "app", "manual", trouble="wait")
    server.succeed(as_deploy(f"git clone -q {REPOSITORY} /tmp/admin; cd /tmp/admin; nix flake update app"))
    own = deploy(server, "nix build --no-link --print-out-paths /tmp/admin#nixosConfigurations.server.config.system.build.toplevel")
    for unit, set_before in (("early", True), ("late", False)):
        publish(server, "app", next(COUNT), trouble="unit")
        follow(server, "app")
        steps = [f"systemd-run --unit={unit} {own}/bin/switch-to-configuration switch", f"nix-env --profile {PROFILE} --set {own}"]
        server.succeed("rm -f /run/scenario-go", *(steps[::-1] if set_before else steps[:1]))
        server.wait_until_succeeds(f"journalctl -u {unit} -o cat | grep -F 'activating the configuration...'")
        server.succeed("systemctl start --no-block ekiben-app.service")
        wait_until_said(server, "app", "Something else is switching this machine; waiting ...")
        server.succeed(*([] if set_before else steps[1:]), "touch /run/scenario-go")
        wait_until_at_rest(server, "app")
        assert [ended["result"] for ended in status(server, "app")["runs"][:2]] == ["rolledBack", "startedOver"], status(server, "app")
        assert (running(server), generation(server).split()[1]) == (own, own)
        assert "switched to by hand" in server.fail("ekiben status app")
        works()

# everywhere
with subtest("the boot loader cannot be installed"):
    rolls_back("boot-loader", "Failed to install the boot loader: exited with 1")
# on hosts alone
    works()
# everywhere

with subtest("an activation script fails"):
    rolls_back("activation", "Failed to activate the new system: exited with 2")
    # the same behind the exit status of a unit that is broken anyway
    server.succeed("rm /run/scenario-calm; ! systemctl start scenario-flaky")
    rolls_back("activation", "Failed to activate the new system: an activation script failed")
    works()

with subtest("an activation ends half-way, and says that all is well"):
    rolls_back("activation-ends", "its activation ended half-way")
# on hosts alone
    works()
# everywhere

with subtest("the activation never ends"):
    rolls_back("hang", "Failed to activate the new system: timed out after", instance="hasty-activation")
    works()

with subtest("a unit fails that had not failed before"):
    ended = rolls_back("unit", "Failed to start scenario-trouble.service")
    server.fail("systemctl list-units --all --plain | grep scenario-trouble")

with subtest("the same, where that is to be kept"):
    ended = run(server, "lenient")
    assert ended["result"] == "deployed", ended
    assert "scenario-trouble.service" in " ".join(ended["warnings"]), ended
    check_deployed(server, "lenient")
    works()

with subtest("a unit that has run fails to start, and is just being started again"):
    rolls_back("unit-again", "Failed to start scenario-daemon.service")
# on hosts alone
    works()
# everywhere

with subtest("a unit fails that had failed before: a warning"):
    assert "failed again: scenario-flaky.service" in " ".join(works()["warnings"]), last_run(server, "app")

with subtest("a unit fails that has always failed, though it did not show: not the candidate's doing"):
    server.succeed("systemctl reset-failed")
    publish(server, "app", next(COUNT))
    ended = run(server, "app")
    assert ended["result"] == "rolledBack", ended
    assert "the old system fails, too: Failed to start scenario-flaky.service" in ended["error"], ended
    # so it is tried again unasked, now that it shows
    ended = run(server, "app")
    assert ended["result"] == "deployed" and "failed again" in " ".join(ended["warnings"]), ended
    check_deployed(server, "app")
    server.succeed("touch /run/scenario-calm; systemctl reset-failed")

DOWN = (
    ("cannot be loaded any more", "unit-broken", "scenario-daemon.service (bad-setting)"),
    ("requires one that is missing", "unit-requires", "scenario-daemon.service (inactive)"),
    ("is a timer that never elapses", "timer", "scenario-clock.timer (bad-setting)"),
)
for what, trouble, unit in DOWN:
    with subtest(f"a unit that has run {what}: it is not active, which is as bad as failed"):
        rolls_back(trouble, f"Failed to start {unit}")
        server.require_unit_state("scenario-daemon.service", "active")
        server.require_unit_state("scenario-clock.timer", "active")
works()

with subtest("a unit is not started, restarted or reloaded, and has not failed: that is as bad"):
    rolls_back("unit-late", "Failed to start scenario-trouble.service (not started)")
    ended = run(server, "lenient")
    assert ended["result"] == "deployed" and "scenario-trouble.service (not started)" in " ".join(ended["warnings"]), ended
    # from then on, that is no later one's doing
    publish(server, "app", next(COUNT), trouble="unit-late")
    ended = run(server, "app")
    assert ended["result"] == "deployed" and "scenario-trouble" not in " ".join(ended["warnings"]), ended
    works()
    rolls_back("restart", "Failed to start scenario-daemon.service (not restarted)")
    rolls_back("reload", "Failed to start scenario-daemon.service (not reloaded)")
# on hosts alone
    # a boot would end without it, as an emergency
    rolls_back("mount", "Failed to start scenario-trouble.mount (not started)")
    works()

with subtest("a unit is refused that had done its work when it was started before"):
    publish(server, "app", next(COUNT), trouble="once")
    assert (seen := run(server, "app"))["result"] == "deployed", seen
    rolls_back("refused", "Failed to start scenario-trouble.service (not started)")
    works()

with subtest("a new unit has started, and was stopped since: that is as bad as one that has been there before"):
    rolls_back("bound", "Failed to start scenario-trouble.service (stopped)")
    works()

with subtest("a unit has failed, which does not show when the switch ends: its last command runs yet, or another has it start anew"):
    for trouble in ("lingers", "upheld"):
        rolls_back(trouble, "Failed to start scenario-trouble.service")
    works()

with subtest("a unit fails while health checks take their time"):
    publish(server, "app", "patient", trouble="checked")
    fails("rolledBack", "activate", "Failed to start scenario-trouble.service")
    works()

with subtest("a unit's own condition is against it: that is no failure"):
    publish(server, "app", next(COUNT), trouble="unit-condition")
    ended = run(server, "app")
    assert ended["result"] == "deployed" and "scenario-daemon" not in " ".join(ended["warnings"]), ended
    works()
    server.require_unit_state("scenario-daemon.service", "active")

with subtest("a unit that somebody has started, and the new system does not have, is started again with the old one"):
    publish(server, "app", next(COUNT), trouble="by-hand")
    assert (seen := run(server, "app"))["result"] == "deployed", seen
    server.succeed("systemctl start scenario-by-hand")
    rolls_back("unit", "Failed to start scenario-trouble.service")
    works()

with subtest("a file system cannot be mounted anew, as is asked for, so that a boot would end without it: that is as bad"):
    publish(server, "app", next(COUNT), trouble="mounted")
    assert (seen := run(server, "app"))["result"] == "deployed", seen
    # in use, but by nothing that systemd would stop for it
    server.succeed("systemd-run --unit=user-of-data sh -c 'cd /scenario/data; exec sleep infinity'")
    for trouble, state in (("remount", "not reloaded"), ("mount-another", "not restarted")) * 2:
        rolls_back(trouble, f"Failed to start scenario-data.mount ({state})")
    server.succeed("systemctl stop user-of-data")
    publish(server, "app", next(COUNT), trouble="mount-another")
    ended = run(server, "app")
    assert ended["result"] == "deployed" and "ramfs" in server.succeed("findmnt /scenario/data"), ended
    works()


# everywhere
with subtest("a switch by hand was cut off: a run that finds its system running completes it"):
    publish(server, "app", next(COUNT))
    deploy(server, "nix flake update app; git commit -qam 'by hand'")
    rebuild(server)
    # where it was killed before it came to that
    server.succeed("systemctl stop scenario-daemon; echo scenario-daemon.service > /run/nixos/start-list")
    assert (seen := run(server, "app"))["result"] == "deployed", seen
    check_deployed(server, "app")
    server.require_unit_state("scenario-daemon.service", "active")
    server.succeed("test ! -e /run/nixos/start-list")


def while_it_waits(command, content, trouble="wait"):
    """Does something in the middle of an activation; returns how the run ended."""
    server.succeed("rm -f /run/scenario-go")
    publish(server, "app", content, trouble=trouble)
    follow(server, "app")
    server.succeed("systemctl start --no-block ekiben-app.service")
    wait_until_said(server, "app", "activating the configuration...")
    server.succeed(command, "touch /run/scenario-go")
    wait_until_idle(server, "app")
    return last_run(server, "app")


with subtest("a unit that is nobody's but a user's fails meanwhile: that is no one's fault"):
    failing = "systemd-run --unit={} --property=Restart=always --property=RestartSec=50ms --property=StartLimitIntervalSec=0 sh -c 'exit 1'"
    # so that the status of the switch tells of a unit that has failed
    server.succeed("rm /run/scenario-calm; ! systemctl start scenario-flaky")
    ended = while_it_waits(failing.format("mine"), str(next(COUNT)))
    assert ended["result"] == "deployed", ended
    check_deployed(server, "app")
    server.succeed("systemctl stop mine; systemctl reset-failed mine || true")
    before = everything()
    ended = while_it_waits(failing.format("yours"), "sick")
    assert ended["result"] == "rolledBack" and "health check app" in ended["error"], ended
    server.succeed("systemctl stop yours; systemctl reset-failed yours || true")
    check_unchanged(before)
    server.succeed("touch /run/scenario-calm; systemctl reset-failed")
    works()

# on hosts alone
with subtest("a switch ends half-way by itself: it is completed, there and back"):
    publish(server, "app", next(COUNT), trouble="daemon")
    server.succeed("echo 1 > /run/scenario-breaks-off")
    assert (seen := run(server, "app"))["result"] == "deployed", seen
    check_deployed(server, "app")
    server.require_unit_state("scenario-daemon.service", "active")
    publish(server, "app", next(COUNT))
    server.succeed("echo 3 > /run/scenario-breaks-off")
    fails("rolledBack", "activate", "Failed to activate the new system: exited with 1: Error: Failed to get GID for alice")
    assert server.succeed("cat /run/scenario-breaks-off") == "0"
    works()

with subtest("a unit is just being started again when the old system comes back"):
    old = running(server)
    server.succeed(
        "systemctl stop scenario-daemon; mkdir -p /run/systemd/system/scenario-daemon.service.d",
        "printf '%s\n' [Service] Restart=always RestartSec=1s ExecStart= "
        "\"ExecStart=/bin/sh -c 'test ! -e /run/scenario-nervous || exit 1; "
        "exec sleep infinity'\" > /run/systemd/system/scenario-daemon.service.d/nervous.conf",
        "systemctl daemon-reload; systemctl start scenario-daemon",
    )
    # nervous for a while as soon as it goes back
    follow(server, "app")
    server.succeed("systemd-run --setenv=PATH=$PATH --unit=calm-down sh -c 'until journalctl -u ekiben-app -o cat "
                   "--after-cursor=$(cat /tmp/ekiben-app) | grep \"Rolling back to\"; do sleep 0.2; done; "
                   "touch /run/scenario-nervous; systemctl kill scenario-daemon; sleep 3; rm /run/scenario-nervous'")
    publish(server, "app", "sick")
    ended = run(server, "app")
    assert ended["result"] == "rolledBack", ended
    assert running(server) == old
    server.succeed("rm -r /run/systemd/system/scenario-daemon.service.d; systemctl daemon-reload; systemctl restart scenario-daemon")
    works()

# everywhere
with subtest("a health check fails that had passed before"):
    works()
    publish(server, "app", "sick")
    fails("rolledBack", "activate", "Failed to pass health check app: exited with 1")
    assert "health check never: exited with 1; it already failed before the switch" in " ".join(last_run(server, "app")["warnings"])

# on hosts alone
with subtest("what is known to be bad is not tried again by the timer, but when asked for"):
    server.succeed(
        "printf '[Timer]\\nOnActiveSec=0\\nAccuracySec=1ms\\nUnit=ekiben-app.service\\n' > /run/systemd/system/scenario-once.timer",
        "systemctl daemon-reload",
    )

    def by_timer():
        server.succeed("systemctl restart scenario-once.timer")
        server.wait_until_succeeds("journalctl -u ekiben-app -o cat -n 20 | grep -F 'known to be bad' || "
                                   "systemctl is-active ekiben-app | grep activating", timeout=60)
        wait_until_idle(server, "app")
        return last_run(server, "app")

    def by_request():
        server.succeed("ekiben trigger app")
        server.wait_until_succeeds(knows("app", ".queued == false and .running == null"))
        wait_until_idle(server, "app")
        return last_run(server, "app")

    def pass_time():
        server.succeed("cd /var/lib/ekiben/status; jq '.bad.tried -= 4000' app.json > app.new; mv app.new app.json")

    rolls_back("activation", "Failed to activate the new system")
    said = output()
    assert "trouble" in said
    before = everything()
    for _ in range(2):
        ended = by_timer()
        assert (ended["result"], ended["stage"]) == ("failed", "prepare") and "known to be bad (tried once" in ended["error"], ended
        # and why it is stays
        assert "Failed to activate the new system: exited with 2" in ended["error"] and output() == said, ended
    # nor too often, whoever asks
    activations = "journalctl -u ekiben-app -o cat | grep -c ' test ...$'"
    count = server.succeed(activations)
    for _ in range(3):
        ended = by_request()
        assert (ended["result"], ended["stage"]) == ("failed", "prepare") and "not before" in ended["error"], ended
        assert ended["commit"] and output() == said, ended
    known = status(server, "app")
    assert known["served"] > 0 and known["bad"]["tries"] == 1, known
    assert server.succeed(activations) == count
    pass_time()
    ended = by_request()
    assert (ended["result"], ended["trigger"]) == ("rolledBack", "request"), ended
    assert status(server, "app")["bad"]["tries"] == 2
    assert "not before" in by_request()["error"]
    check_unchanged(before)
    works()

# everywhere
with subtest("the new system has no network"):
    rolls_back("network", "Failed to pass health check network")
    server.succeed("ping -c 1 -W 5 client")
    works()

# on hosts alone
with subtest("the rollback fails, too: reported, tried again by the next runs, and nothing is deployed by that"):
    old = (running(server), generation(server))
    publish(server, "app", "sick")
    program = f"$(readlink -f {old[0]}/bin/switch-to-configuration)"
    server.succeed(f"mount --bind $(readlink -f $(type -P false)) {program}")
    ended = run(server, "app")
    assert ended["result"] == "stuck" and "manual intervention is required" in ended["error"], ended
    assert "health check app" in ended["error"], ended
    assert "rollback failed" in server.fail("ekiben status")
    assert "whose rollback failed; generation" in server.fail("ekiben status")
    server.require_unit_state("ekiben-app.service", "failed")
    assert shows(server, "app") == "sick"
    ended = by_timer()
    assert ended["result"] == "failed" and "known to be bad" in ended["error"], ended
    assert "whose rollback failed; generation" in server.fail("ekiben status")
    assert "the rollback of an earlier run failed again" in " ".join(ended["warnings"]), ended
    if is_host(server):
        pass_time()
        ended = by_request()
        assert ended["result"] == "stuck" and "health check app" in ended["error"], ended
    assert shows(server, "app") == "sick" and generation(server) == old[1]
    server.succeed("test ! -e /var/lib/ekiben/runs/app.json", f"umount {program}")
    ended = by_timer()
    assert "is complete" in " ".join(ended["warnings"]), ended
    assert (running(server), generation(server)) == old
    server.succeed("test ! -e /var/lib/ekiben/runs/app.stuck")
    works()

with subtest("what goes back is killed"):
    publish(server, "app", "sick")
    program = running(server) + "/bin/switch-to-configuration"
    server.succeed(
        # the first two times
        f"cp --dereference {program} /tmp/really; "
        "printf '%s\n' '#!/bin/sh' 'echo >> /tmp/times' '[ $(wc -l < /tmp/times) -gt 2 ] || kill -KILL $$' > /tmp/killed",
        f"echo 'exec -a {program} /tmp/really \"$@\"' >> /tmp/killed; sed -i 1s/sh/bash/ /tmp/killed; chmod +x /tmp/killed; "
        "rm -f /tmp/times",
    )
    if is_host(server):
        # what it is told by its own path
        server.succeed(f"sed -i 's#os.path.realpath(sys.argv\\[0\\])#\"{program}\"#' /tmp/really")
        server.succeed(f"mount --bind /tmp/killed $(readlink -f {program})")
        before = everything()
        ended = run(server, "app")
        assert ended["result"] == "rolledBack" and "health check app" in ended["error"], ended
        assert int(server.succeed("wc -l < /tmp/times")) > 2
        check_unchanged(before)
        server.succeed(f"umount $(readlink -f {program})")
    works()

with subtest("going back is switched off"):
    before = (digest(server), generation(server))
    publish(server, "app", "sick")
    ended = run(server, "onward")
    assert ended["result"] == "failed", ended
    assert "rollback is disabled" in " ".join(ended["warnings"]), ended
    assert shows(server, "app") == "sick"
    assert (digest(server), generation(server)) == before
    works("onward")

# everywhere
with subtest("the new system needs a reboot: it is set for the next boot"):
    old = running(server)
    publish(server, "app", next(COUNT), trouble="reboot")
    before = head(server)
    ended = run(server, "app")
    assert ended["result"] == "awaitingBoot" and ended["rebootNeeded"], ended
    said = server.succeed("ekiben status app")
    assert "needed to run the new system" in said and "its init is incompatible with the running one" in said, said
    assert (running(server), head(server)) == (old, before)
    assert status(server, "app")["awaiting"]["system"] == generation(server).split()[1]

if is_host(server):
    with subtest("a pre-switch check refuses: nothing is changed, nothing is put back, and it is not held against the candidate"):
        works()
        content = str(next(COUNT))
        publish(server, "app", content)
        server.succeed("echo 'no room at all' > /run/scenario-refuses")
        ended = fails("failed", "activate", "Failed to activate the new system: pre-switch check scenario failed: test of /nix/store/")
        assert ended["error"].endswith("no room at all") and "Pre-switch checks failed" in output(), (ended, output())
        server.fail(f"journalctl _SYSTEMD_INVOCATION_ID={ended['id']} -o cat | grep -e 'Rolling back' -e 'activating the configuration'")
        server.succeed("rm /run/scenario-refuses; systemctl reset-failed ekiben-app; jq -e '.bad == null' /var/lib/ekiben/status/app.json")
        assert run(server, "app")["result"] == "deployed" and shows(server, "app") == content, last_run(server, "app")

    with subtest("a check that has come to refuse in the middle of a switch stands neither in its way nor in the way back"):
        ended = while_it_waits("echo 'never again' > /run/scenario-refuses", str(next(COUNT)))
        assert ended["result"] == "deployed", ended
        check_deployed(server, "app")
        server.succeed("rm /run/scenario-refuses")
        old = (running(server), generation(server))
        ended = while_it_waits("echo 'never again' > /run/scenario-refuses", "sick")
        assert ended["result"] == "rolledBack" and "health check app" in ended["error"], ended
        assert (running(server), generation(server)) == old
        server.succeed("rm /run/scenario-refuses")
        works()

    with subtest("units of a user fail: it is said whose, and which"):
        server.succeed(
            "install -d -o deploy /home/deploy/.config /home/deploy/.config/systemd /home/deploy/.config/systemd/user",
            "printf '[Service]\nType=oneshot\nExecStart=false\n' > /home/deploy/.config/systemd/user/nixos-activation.service",
            "systemctl start user@1000.service",
        )
        assert "units of users have failed: deploy (nixos-activation.service)" in works()["warnings"], last_run(server, "app")
        server.succeed("systemctl stop user@1000.service; rm -r /home/deploy/.config/systemd")

    with subtest("a unit fails with either system: no reason to be stuck, nor to excuse a candidate that fails for another"):
        server.succeed("rm /run/scenario-calm; systemctl reset-failed")
        publish(server, "app", next(COUNT), trouble="activation")
        old = (running(server), generation(server))
        ended = run(server, "app")
        assert ended["result"] == "rolledBack" and "an activation script failed" in ended["error"], ended
        assert "Failed to start scenario-flaky.service with the old system, too" in ended["warnings"], ended
        assert (running(server), generation(server)) == old
        server.succeed("jq -e '.bad != null' /var/lib/ekiben/status/app.json", "touch /run/scenario-calm; systemctl reset-failed")
        works()

    with subtest("what must not change while a system runs does: set for the next boot, and said what and why"):
        old = running(server)
        # it does so at boot, too: no doing of the new system's
        server.fail("rm /run/scenario-calm; systemctl start scenario-flaky.service")
        publish(server, "app", next(COUNT), trouble="inhibitor")
        ended = run(server, "app")
        assert ended["result"] == "awaitingBoot" and ended["rebootNeeded"], ended
        assert 'switch inhibitor dbus-implementation changes from "dbus" to "broker"' in server.succeed("ekiben status app")
        assert running(server) == old and status(server, "app")["awaiting"]["system"] == generation(server).split()[1]
        server.shutdown()
        server.start()
        assert (seen := last_run(server, "app"))["result"] == "deployed", seen
        check_deployed(server, "app")
        # and back again
        server.succeed("touch /run/scenario-calm; systemctl reset-failed")
        publish(server, "app", next(COUNT))
        assert 'from "broker" to "dbus"' in " ".join(run(server, "app")["warnings"]), last_run(server, "app")
