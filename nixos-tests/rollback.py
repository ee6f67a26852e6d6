start_all()
install(server)
server.wait_until_succeeds("ping -c 1 -W 1 client", timeout=60)
server.succeed("touch /run/scenario-calm; systemctl reset-failed")
COUNT = iter(range(2, 1000))


def everything():
    """All that a failed run has to leave as it was."""
    units = "systemctl list-units --plain --no-legend --state=active --type=service,socket,path,timer | awk '{ print $1 }'"
    return {
        "repository": digest(server),
        "generation": generation(server),
        "generations": server.succeed("ls /nix/var/nix/profiles"),
        "running": running(server),
        "shows": server.succeed("cat /etc/app /etc/other /etc/revision"),
        # what comes and goes by itself
        "units": sorted(set(server.succeed(units).split()) - {"nix-daemon.service", "systemd-hostnamed.service", "scenario-once.timer"}),
    }


def check_unchanged(before):
    after = everything()
    assert before == after, "\n".join(f"{key}:\n{before[key]}\n{after[key]}" for key in before if before[key] != after[key])


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


with subtest("an input vanished"):
    server.succeed("mv /srv/app /srv/away")
    fails("failed", "prepare", "Failed to update app: exited with 1")
    assert "/srv/app" in output()
    server.succeed("mv /srv/away /srv/app")
    works()

with subtest("the network is down: tried again, and reported as that"):
    commit("sed -i '/app = {/,/url/s#url = .*#url = \"http://client:9/app.tar.gz\";#' flake.nix")
    fails("failed", "prepare", "3 times: this looks like the network")
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

with subtest("what was built is no NixOS"):
    publish(server, "app", next(COUNT), trouble="no-nixos")
    fails("failed", "activate", "it is no NixOS system, it has no init")
    works()

with subtest("the Nix daemon is down"):
    publish(server, "app", next(COUNT))
    server.succeed("systemctl stop nix-daemon.socket nix-daemon.service")
    before = everything()
    ended = run(server, "app")
    assert (ended["result"], ended["stage"]) == ("failed", "prepare"), ended
    check_unchanged(before)
    server.succeed("systemctl start nix-daemon.socket")
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
        wait_until_idle(server, "app")
        if server.execute("systemctl is-failed --quiet ekiben-app.service")[0] != 0:
            break
        check_unchanged(before)
    server.succeed("rm /var/lib/ekiben/filler; systemctl start --all 'ekiben-*.path'")
    works()
    server.succeed("cp -a /var/lib/ekiben/. /var/lib/ekiben.away/; umount -l /var/lib/ekiben; cp -a /var/lib/ekiben.away/. /var/lib/ekiben/")

with subtest("the disk of the store is full"):
    if is_host(server):
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
    else:
        print("shown on a host, whose store is small enough to be moved")

with subtest("the system profile cannot be written"):
    publish(server, "app", next(COUNT))
    server.succeed("mount --bind -o ro /nix/var/nix/profiles /nix/var/nix/profiles")
    fails("rolledBack", "activate", "Failed to set the system profile")
    server.succeed("umount /nix/var/nix/profiles")
    works()

with subtest("somebody else is switching: waited for"):
    publish(server, "app", next(COUNT))
    server.succeed("systemd-run --unit=holder flock /run/nixos/switch-to-configuration.lock $(command -v sleep) infinity")
    server.wait_until_fails("flock --nonblock /run/nixos/switch-to-configuration.lock true")
    ended_before = runs(server, "app")
    server.succeed("systemctl start --no-block ekiben-app.service")
    server.wait_until_succeeds("journalctl -u ekiben-app -o cat -n 3 | grep -e 'waiting ...' -e 'test ...'")
    server.succeed("systemctl stop holder")
    wait_until_idle(server, "app")
    assert last_run(server, "app")["result"] == "deployed", last_run(server, "app")
    check_deployed(server, "app")

with subtest("the boot loader cannot be installed"):
    publish(server, "app", next(COUNT), trouble="boot-loader")
    fails("rolledBack", "activate", "Failed to install the boot loader: exited with 1")
    works()

with subtest("an activation script fails"):
    publish(server, "app", next(COUNT), trouble="activation")
    fails("rolledBack", "activate", "Failed to activate the new system: exited with 2")
    # the same behind the exit status of a unit that is broken anyway
    server.succeed("rm /run/scenario-calm; ! systemctl start scenario-flaky")
    publish(server, "app", next(COUNT), trouble="activation")
    fails("rolledBack", "activate", "Failed to activate the new system: an activation script failed")
    works()

with subtest("the activation never ends"):
    publish(server, "app", next(COUNT), trouble="hang")
    fails("rolledBack", "activate", "Failed to activate the new system: timed out after", instance="hasty-activation")
    works()

with subtest("a unit fails that had not failed before"):
    publish(server, "app", next(COUNT), trouble="unit")
    ended = fails("rolledBack", "activate", "Failed to start scenario-trouble.service")
    server.fail("systemctl list-units --all --plain | grep scenario-trouble")

with subtest("the same, where that is to be kept"):
    ended = run(server, "lenient")
    assert ended["result"] == "deployed", ended
    assert "scenario-trouble.service" in " ".join(ended["warnings"]), ended
    check_deployed(server, "lenient")
    works()

with subtest("a unit fails that had failed before: a warning"):
    assert "failed again" in " ".join(works()["warnings"]), last_run(server, "app")
    server.succeed("touch /run/scenario-calm; systemctl reset-failed")

with subtest("a health check fails that had passed before"):
    works()
    publish(server, "app", "sick")
    fails("rolledBack", "activate", "Failed to pass health check app: exited with 1")
    server.succeed("journalctl -u ekiben-app -o cat | grep -F 'Health check never does not count'")

with subtest("what is known to be bad is not tried again by the timer, but when asked for"):
    server.succeed(
        "printf '[Timer]\\nOnActiveSec=0\\nAccuracySec=1ms\\nUnit=ekiben-app.service\\n' > /run/systemd/system/scenario-once.timer",
        "systemctl daemon-reload",
    )

    def by_timer():
        server.succeed("systemctl restart scenario-once.timer")
        server.wait_until_succeeds("journalctl -u ekiben-app -o cat -n 20 | grep -F 'known to be bad' || systemctl is-active ekiben-app | grep activating", timeout=60)
        wait_until_idle(server, "app")
        return last_run(server, "app")

    before = everything()
    ended = by_timer()
    assert (ended["result"], ended["stage"]) == ("failed", "prepare") and "known to be bad" in ended["error"], ended
    server.succeed("ekiben trigger app")
    server.wait_until_succeeds("ekiben status --json app | jq -e '.app.queued == false and .app.running == null'")
    wait_until_idle(server, "app")
    ended = last_run(server, "app")
    assert (ended["result"], ended["trigger"]) == ("rolledBack", "request"), ended
    check_unchanged(before)
    works()

with subtest("the new system has no network"):
    publish(server, "app", next(COUNT), trouble="network")
    fails("rolledBack", "activate", "Failed to pass health check network")
    server.succeed("ping -c 1 -W 5 client")
    works()

with subtest("going back fails, too: said loudly, and not tried for ever"):
    old = running(server)
    publish(server, "app", "sick")
    server.succeed(f"mount --bind $(readlink -f $(type -P false)) $(readlink -f {old}/bin/switch-to-configuration)")
    ended = run(server, "app")
    server.succeed(f"umount $(readlink -f {old}/bin/switch-to-configuration)")
    assert ended["result"] == "stuck" and "this machine needs a hand" in ended["error"], ended
    assert "health check app" in ended["error"], ended
    assert "STUCK, needs a hand" in server.succeed("ekiben status")
    server.require_unit_state("ekiben-app.service", "failed")
    server.succeed("test ! -e /var/lib/ekiben/runs/app.json", f"{old}/bin/switch-to-configuration test")
    works()

with subtest("going back is switched off"):
    before = (digest(server), generation(server))
    publish(server, "app", "sick")
    ended = run(server, "onward")
    assert ended["result"] == "failed", ended
    assert "rollback is off" in " ".join(ended["warnings"]), ended
    assert shows(server, "app") == "sick"
    assert (digest(server), generation(server)) == before
    works("onward")

with subtest("the new system needs a reboot: it is set for the next boot"):
    old = running(server)
    publish(server, "app", next(COUNT), trouble="reboot")
    ended = run(server, "app")
    assert ended["result"] == "deployed" and ended["rebootNeeded"], ended
    assert "needed: the new system runs after it" in server.succeed("ekiben status app")
    assert running(server) == old
    assert status(server, "app")["deployed"]["system"] == generation(server).split()[1]
    assert status(server, "app")["deployed"]["commit"] == head(server)
