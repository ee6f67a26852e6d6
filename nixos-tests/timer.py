machine.start()
if is_host(machine):
    # systemd shows some moments in local time
    machine.succeed("ln -sfn /usr/share/zoneinfo/Asia/Tokyo /etc/localtime; sync")
# before there is anything to deploy
machine.succeed("systemctl stop ekiben-often.timer")
install(machine)

with subtest("what is new is deployed without being asked for"):
    publish(machine, "app", "2")
    publish(machine, "other", "2")
    machine.succeed("systemctl start ekiben-often.timer")
    machine.wait_until_succeeds(knows("often", ".deployed"))
    machine.succeed("systemctl stop ekiben-often.timer")
    wait_until_idle(machine, "often")
    assert [run for run in status(machine, "often")["runs"] if run["result"] == "deployed"][0]["by"] == ["timer"]
    assert (shows(machine, "app"), shows(machine, "other")) == ("2", "1")
    assert shows(machine, "revision") == head(machine)

with subtest("when nothing is new, nothing is done"):
    before = (digest(machine), generation(machine), machine.succeed("ls /nix/var/nix/profiles"))
    ended = runs(machine, "often")
    machine.succeed("systemctl start ekiben-often.timer")
    machine.wait_until_succeeds(knows("often", f".runs | length > {ended + 3}"))
    machine.succeed("systemctl stop ekiben-often.timer")
    wait_until_idle(machine, "often")
    assert (digest(machine), generation(machine), machine.succeed("ls /nix/var/nix/profiles")) == before
    assert {run["result"] for run in status(machine, "often")["runs"][:3]} == {"unchanged"}
    assert "Nothing is new" in machine.succeed("journalctl -u ekiben-often -o cat")

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
