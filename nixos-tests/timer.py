machine.start()
if is_host(machine):
    # systemd shows some moments in local time
    machine.succeed("ln -sfn /usr/share/zoneinfo/Asia/Tokyo /etc/localtime; sync")


def wait_until_looked():
    """Waits until no timer of `often` is at work any more: a look may have a run begin."""
    machine.wait_until_succeeds("systemctl show --property ActiveState --value ekiben-look@often.service | grep -x inactive")
    wait_until_at_rest(machine, "often")


# before there is anything to deploy
machine.succeed("systemctl stop ekiben-often.timer ekiben-look@often.service")
wait_until_at_rest(machine, "often")
install(machine)

with subtest("what is new is deployed without being asked for"):
    publish(machine, "app", "2")
    publish(machine, "other", "2")
    machine.succeed("systemctl start ekiben-often.timer")
    machine.wait_until_succeeds(knows("often", ".deployed"))
    machine.succeed("systemctl stop ekiben-often.timer")
    wait_until_looked()
    assert [run for run in status(machine, "often")["runs"] if run["result"] == "deployed"][0]["by"] == ["timer"]
    assert (shows(machine, "app"), shows(machine, "other")) == ("2", "1")
    assert shows(machine, "revision") == head(machine)

LOOKED = "/var/lib/ekiben/looks"


with subtest("when nothing is new, one process of the user's finds that out, and nothing is done"):
    before = (digest(machine), generation(machine), machine.succeed("ls /nix/var/nix/profiles"))
    # a process of root's, or a run, would make another one
    invocation = "systemctl show --property InvocationID --value ekiben-often.service; ls -i /var/lib/ekiben/status/often.json"
    invoked, ended = machine.succeed(invocation), runs(machine, "often")
    for _ in range(3):
        looked = machine.succeed(f"stat -c %.9Y {LOOKED}/often").strip()
        machine.succeed("systemctl start ekiben-often.timer")
        machine.wait_until_succeeds(f"test $(stat -c %.9Y {LOOKED}/often) != {looked}")
    machine.succeed("systemctl stop ekiben-often.timer")
    wait_until_looked()
    assert (digest(machine), generation(machine), machine.succeed("ls /nix/var/nix/profiles")) == before
    assert (machine.succeed(invocation), runs(machine, "often")) == (invoked, ended)
    lines = machine.succeed("systemctl show --property ExecStart --property User ekiben-look@often.service").splitlines()
    assert len(lines) == 2 and "User=deploy" in lines, lines
    shown = machine.succeed("ekiben status often; ekiben status")
    assert len([line for line in shown.splitlines() if "looked" in line and line.endswith("ago: nothing new")]) == 2, shown
    assert status(machine, "often")["looked"] >= last_run(machine, "often")["finished"]
    # somebody who asks gets a run
    assert run(machine, "often")["result"] == "unchanged"
    assert "Nothing is new" in machine.succeed("journalctl -u ekiben-often -o cat")

with subtest("what waits since its path unit is dead is served after a look that finds nothing new"):
    before = runs(machine, "often")
    machine.succeed("systemctl stop ekiben-often.path; ekiben trigger often; systemctl start ekiben-look@often.service")
    wait_for_run(machine, "often", before)
    assert (last_run(machine, "often")["by"], last_run(machine, "often")["result"]) == (["user root"], "unchanged")
    wait_until_at_rest(machine, "often")
    machine.succeed("systemctl start ekiben-often.path")

with subtest("a run that was due while the machine was off is made up for"):
    assert runs(machine, "seldom") == 0
    machine.succeed("touch -d '2 years ago' /var/lib/systemd/timers/stamp-ekiben-seldom.timer; sync")
    machine.crash()
    machine.start()
    wait_for_run(machine, "seldom", 0)
    assert last_run(machine, "seldom")["trigger"] == "timer" and last_run(machine, "seldom")["by"] == ["timer"]
    assert shows(machine, "other") == "2"
    # that timer has done so once
    wait_until_at_rest(machine, "seldom")
    assert runs(machine, "seldom") == 1, status(machine, "seldom")["runs"]

if is_host(machine):
    with subtest("what a repository has nix print commands no terminal and no journal"):
        machine.succeed("systemctl stop ekiben-often.timer")
        wait_until_at_rest(machine, "often")
        trace = r"builtins.trace \"$(printf '\302\233')31mred$(printf '\342\200\256')\" name"
        deploy(machine, f'sed -i "s/inherit app other name;/inherit app other; name = {trace};/" flake.nix; git commit -qam odd')
        for said in (machine.succeed("ekiben trigger --wait often"), machine.succeed("journalctl --sync; journalctl -u ekiben-often -o cat")):
            assert "31mred" in said and "\x9b" not in said and "\u202e" not in said, said

    with subtest("a reader that has gone is no fault"):
        gone = "import os, subprocess, sys; r, w = os.pipe(); os.close(r); sys.exit(subprocess.call(sys.argv[1:], stdout=w))"
        for command in ("ekiben status --json", "ekiben status", "ekiben --help", "ekiben fleet --help"):
            machine.succeed(f"python3 -c {shlex.quote(gone)} {command}")

    with subtest("a look that is not sure of it has a run begin, which says what there is"):
        # a switch starts the other instance's timer, and its runs deploy the same, and make anew what is missing
        machine.succeed("systemctl stop ekiben-often.timer; mkdir /run/systemd/system/ekiben-often.timer.d; printf '[Timer]\\nOnCalendar=\\n"
                        "OnCalendar=*-01-01\\n' > /run/systemd/system/ekiben-often.timer.d/x.conf; systemctl daemon-reload")
        wait_until_looked()
        override = "/run/systemd/system/ekiben-look@seldom.service.d"

        def with_(*lines):
            text = "\\n".join(("[Service]", *lines))
            return f"mkdir -p {override}; printf '{text}\\n' > {override}/x.conf; systemctl daemon-reload", f"rm {override}/x.conf; systemctl daemon-reload"

        def edited(change):
            """The status with another past."""
            file = "/var/lib/ekiben/status/seldom.json"
            return f"cp -p {file} /root/kept; jq {shlex.quote(change)} /root/kept > {file}", "true"

        def by_user(command, back):
            return as_deploy(f"cd {REPOSITORY}; {command}"), as_deploy(f"cd {REPOSITORY}; {back}")

        other = "$(ls -d /nix/var/nix/profiles/system-*-link | head -n 1)"
        # what the look then comes to, and the next one when that has been undone
        cases = {
            "another commit": (*by_user("git commit -q --allow-empty -m empty", "true"), ["deployed"], []),
            "another branch": (*by_user("git checkout -qb side; git commit -q --allow-empty -m side", "git checkout -q main"), ["deployed"], ["deployed"]),
            "the lock file edited": (*by_user("echo >> flake.lock", "git checkout -q flake.lock"), ["failed"], ["unchanged"]),
            "a merge under way": (*by_user("git rev-parse HEAD > .git/MERGE_HEAD", "rm .git/MERGE_HEAD"), ["failed"], ["unchanged"]),
            "an input that is not there": ("mv /srv/other /srv/away", "mv /srv/away /srv/other", ["failed"], ["unchanged"]),
            "no repository": (f"mv {REPOSITORY} /var/away", f"mv /var/away {REPOSITORY}", ["failed"], ["unchanged"]),
            "the machine runs another system": (f"ln -sfn $(readlink -f {other}) /run/current-system",
                                                f"{PROFILE}/bin/switch-to-configuration switch", ["drifted"], ["unchanged"]),
            "no time of a look": (f"mv {LOOKED} /root/looks", f"rmdir {LOOKED} || rm -r {LOOKED}; mv /root/looks {LOOKED}", ["unchanged"], []),
            "a look that is killed": (*with_("ExecStart=", "ExecStart=/bin/sh -c \"kill -9 \\$\\$\""), ["unchanged"], []),
            "a look that takes too long": (*with_("ExecStart=", "ExecStart=sleep infinity", "TimeoutStartSec=1"), ["unchanged"], []),
            "a sandbox that cannot be made": (*with_("BindPaths=/nowhere"), ["unchanged"], []),
            "no run yet": (*edited(".runs = []"), ["unchanged"], []),
            "a warning": (*edited('.runs[0].warnings = ["x"]'), ["unchanged"], []),
            "a reboot is awaited": (*edited(".runs[0].rebootNeeded = true"), ["unchanged"], []),
            "a run that was cut off": (*edited('.running = {stage: "prepare", trigger: "timer", started: 1}'), ["unchanged"], []),
            "a run long ago": (*edited(".runs[0].finished -= 8 * 86400"), ["unchanged"], []),
            "a clock that was set back": (*edited(".runs[0].finished += 8 * 86400"), ["unchanged"], []),
            # whether the other instance has deployed the same
            "a status that says nothing": ("echo > /var/lib/ekiben/status/seldom.json", "true", None, []),
        }
        machine.succeed("mkdir -p /run/systemd/system/ekiben-look@seldom.service.d; "
                        "printf '[Service]\\nLogLevelMax=debug\\n' > /run/systemd/system/ekiben-look@seldom.service.d/log.conf; "
                        "systemctl daemon-reload")
        look(machine, "seldom")
        for case, (make, unmake, results, then) in cases.items():
            assert look(machine, "seldom") == [], case
            machine.succeed(make)
            began = look(machine, "seldom")
            machine.succeed(unmake)
            assert len(began) == 1 and began[0]["by"] == ["timer"] and results in (None, [began[0]["result"]]), (case, began)
            began = look(machine, "seldom")
            assert [run["result"] for run in began] == then, (case, status(machine, "seldom")["runs"][:3])
        # and why that began
        run(machine, "seldom")
        said = machine.succeed("ekiben log seldom")
        assert "The timer's look found" not in said, said
        machine.succeed(as_deploy(f"cd {REPOSITORY}; git commit -q --allow-empty -m another"))
        # a switch of somebody else's is not to fail since a timer has found something meanwhile
        machine.succeed("systemctl start ekiben-look@seldom.service")
        wait_until_at_rest(machine, "seldom")
        assert last_run(machine, "seldom")["result"] == "deployed" and "The timer's look found: there is another commit." in machine.succeed("ekiben log seldom")

        machine.succeed("ekiben hold seldom")
        follow(machine, "seldom")
        assert look(machine, "seldom") == []
        wait_until_said(machine, "seldom", "Held until")
        machine.succeed("ekiben resume seldom")

    with subtest("a start that was a timer's and is cancelled makes no later one the timer's"):
        service = "/run/systemd/system/ekiben-seldom.service.d/wait.conf"
        slow = "/run/systemd/system/scenario-slow.service"
        machine.succeed(
            f"printf '[Service]\nType=oneshot\nExecStart=sleep infinity\n' > {slow}; mkdir -p $(dirname {service})",
            f"printf '[Unit]\nAfter=scenario-slow.service\n[Service]\nExecStartPre=sh -c \"while test -e /var/wait; do sleep 0.1; done\"\n' > {service}",
            "printf '[Timer]\nOnActiveSec=1ms\nAccuracySec=1ms\nUnit=ekiben-seldom.service\n' > /run/systemd/system/scenario-once.timer; "
            "systemctl daemon-reload",
        )
        waits = "systemctl list-jobs | grep -E 'ekiben-seldom.service +(re)?start +waiting'"

        def looks():
            machine.succeed(as_deploy(f"cd {REPOSITORY}; echo >> flake.lock"), "systemctl start --no-block scenario-slow")
            machine.execute("systemctl start ekiben-look@seldom.service")

        def elapses():
            # in the second in which the run began, if this machine is quick enough
            machine.succeed(
                "touch /var/wait; now=$(date +%s); while test $(date +%s) = $now; do sleep 0.01; done; systemctl start --no-block ekiben-seldom; "
                "until systemctl show --property SubState --value ekiben-seldom.service | grep -qx start-pre; do sleep 0.01; done; "
                "systemctl start --no-block scenario-slow; systemctl start scenario-once.timer"
            )
            machine.wait_until_succeeds("systemctl show --property SubState --value scenario-once.timer | grep -xE 'running|elapsed'")
            machine.succeed("rm /var/wait")

        for begin in (looks, elapses):
            for is_cancelled in (True, False):
                begin()
                machine.wait_until_succeeds(waits, timeout=60)
                if is_cancelled:
                    machine.succeed("systemctl stop ekiben-seldom")
                machine.succeed("systemctl kill scenario-slow; systemctl reset-failed scenario-slow || true", as_deploy(f"git -C {REPOSITORY} checkout -q ."))
                if is_cancelled:
                    wait_until_at_rest(machine, "seldom")
                    machine.succeed("systemctl start ekiben-seldom")
                wait_until_at_rest(machine, "seldom")
                machine.succeed("systemctl stop scenario-once.timer")
                ended = last_run(machine, "seldom")
                assert ended["by"] == ["systemctl" if is_cancelled else "timer"], (begin, is_cancelled, ended)
                failed = machine.succeed("systemctl list-units --failed --plain --no-legend 'ekiben-*seldom*'")
                assert failed == "", failed
        machine.succeed(f"rm {service} {slow} /run/systemd/system/scenario-once.timer; systemctl daemon-reload")

    with subtest("a rollback that another instance's deployment is in the way of says what helps, also where that is no longer configured"):
        machine.succeed("systemctl stop ekiben-often.timer")
        wait_until_looked()
        machine.succeed(as_deploy(f"cd {REPOSITORY}; git commit -q --allow-empty -m seldom"))
        assert run(machine, "seldom")["result"] == "deployed"
        assert "seldom has deployed since, which would be undone, too; run ekiben rollback seldom before" in machine.fail("ekiben rollback often 2>&1")
        machine.succeed("mv /etc/systemd/system/ekiben-seldom.service /root/")
        said = machine.fail("ekiben rollback often 2>&1")
        assert "seldom is no longer configured: revert the commit and run ekiben trigger often instead" in said, said
