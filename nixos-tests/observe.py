ALL = (early, late, restarted, again, sick)
start_all()
for machine in ALL:
    # by the name of its configuration
    machine.name = "server"
    install(machine)


def begin(machine, content, trouble="none"):
    """Begins a run, and goes on as soon as the new system is observed."""
    publish(machine, "app", content, trouble=trouble)
    machine.succeed("systemctl start --no-block ekiben-app.service")
    machine.wait_until_succeeds("jq -e '.running.stage == \"observe\"' /var/lib/ekiben/status/app.json")


def check_end(ended, result, *words):
    """Checks that a run has ended like this, and says so."""
    assert ended["result"] == result, ended
    said = " ".join([ended["error"] or "", *ended["warnings"]])
    assert all(word in said for word in words), ended
    assert ended["stage"] == ("observe" if result == "rolledBack" else None), ended


def end(machine, result, *words):
    """The same, when the machine's run has ended; returns for how many seconds the new system was observed."""
    wait_until_idle(machine, "app")
    check_end(last_run(machine, "app"), result, *words)

    def when(what):
        said = "journalctl -u ekiben-app -o json --output-fields=MESSAGE | jq -rs"
        return int(machine.succeed(f"{said} 'map(select(.MESSAGE | tostring | test(\"{what}\"))) | last.__REALTIME_TIMESTAMP'")) / 1e6

    return when("^Rolling back|^Run ended: deployed") - when("^Observing")


def wait_for_old_system(machine):
    """Waits until a machine that has booted has put back what was before; then it tries that again, which is too early."""
    machine.wait_until_succeeds("jq -e '.runs[0].error | test(\"known to be bad\")' /var/lib/ekiben/status/app.json")
    wait_until_idle(machine, "app")
    check_end(status(machine, "app")["runs"][1], "rolledBack", "the machine went down while the new system was being observed")
    assert (running(machine), generation(machine)) == before[machine]


before = {machine: (running(machine), generation(machine)) for machine in ALL}
with subtest("a system that dies on its feet is put back, whatever it dies of and whenever; "
             "one that lives is deployed at the end of the time"):
    # a unit's life in seconds, how it ends, and when it is restarted
    begin(early, "dead", trouble="mortal 5 1 no")
    begin(late, "dead", trouble="mortal 20 1 no")
    begin(restarted, "dead", trouble="mortal 5 1 always")
    begin(again, "alive", trouble="mortal 2 0 always")
    begin(sick, "sick")
    # until then, it is not what is booted, and a client sees what is going on
    assert all(generation(machine) == before[machine][1] for machine in ALL)
    url = "http://127.0.0.1:8787/ekiben"
    state = json.loads(late.succeed(f"curl -fsS -H 'Authorization: Bearer token-app-0123456789' {url}"))
    assert state["running"]["stage"] == "observe", state
    assert "running (observe)" in late.succeed("ekiben status")
    sick.succeed("touch /run/scenario-late")

    # what fails of Ekiben's own is no new system's doing
    again.succeed("mv /etc/scenario/token-app /etc/scenario/token-away; systemctl restart ekiben-webhook-tokens.service || true")
    again.wait_until_succeeds("systemctl is-failed ekiben-webhook-tokens.service")

    assert 3 < end(early, "rolledBack", "Failed to keep up scenario-trouble.service") < 12
    assert 18 < end(late, "rolledBack", "Failed to keep up scenario-trouble.service") < 25
    assert 3 < end(restarted, "rolledBack", "Failed to keep up scenario-trouble.service (died and was restarted)") < 15
    assert 0 < end(sick, "rolledBack", "Failed to pass health check app") < 12
    # it ends well all the time
    assert 24 < end(again, "deployed") < 40
    for machine in (early, late, restarted, sick):
        assert (running(machine), generation(machine)) == before[machine]
        assert (seen := status(machine, "app"))["bad"], seen
    check_deployed(again, "app")
    assert again.fail("ekiben status app").count("ekiben-webhook-tokens.service has failed") == 1
    again.succeed("mv /etc/scenario/token-away /etc/scenario/token-app; systemctl restart ekiben-webhook-tokens.service")

with subtest("one that lives is deployed, though the clock is set back meanwhile"):
    library = restarted.succeed("ls /usr/lib/*/faketime/libfaketime.so.1").strip()
    drop_in = "/run/systemd/system/systemd-journald.service.d"
    begin(restarted, "alive", trouble="mortal 2 0 always")
    restarted.succeed(f"mkdir {drop_in}; printf '[Service]\\nEnvironment=LD_PRELOAD={library} FAKETIME=-1d DONT_FAKE_MONOTONIC=1\\n' "
                      f"> {drop_in}/clock.conf; systemctl daemon-reload; systemctl restart systemd-journald")
    wait_until_idle(restarted, "app")
    check_end(last_run(restarted, "app"), "deployed")
    restarted.succeed("test $(journalctl --lines=1 --output=json | jq -r .__REALTIME_TIMESTAMP) -lt $(($(date +%s) - 3600))000000",
                      f"rm -r {drop_in}; systemctl daemon-reload; systemctl restart systemd-journald")

with subtest("one that has died before, and dies more often now, is put back"):
    begin(restarted, "alive", trouble="mortal 100000 1 always")
    end(restarted, "deployed")
    before[restarted] = running(restarted), generation(restarted)
    restarted.succeed("systemctl kill --signal KILL scenario-trouble")
    restarted.wait_until_succeeds("systemctl show scenario-trouble | grep -x NRestarts=1 && systemctl is-active scenario-trouble")
    begin(restarted, "dying", trouble="mortal 1 1 always")
    end(restarted, "rolledBack", "Failed to keep up scenario-trouble.service")
    assert (running(restarted), generation(restarted)) == before[restarted]

with subtest("what fails while another hand switches, and is well when that is over, lives"):
    follow(late, "app")
    begin(late, "alive", trouble="mortal 100000 1 no")
    occupy(late, SWITCH_LOCK)
    late.succeed("systemctl kill --signal KILL scenario-trouble")
    wait_until_said(late, "app", "Failed to keep up scenario-trouble.service, while something else is switching this machine")
    late.succeed("systemctl start scenario-trouble; systemctl stop holder")
    wait_until_idle(late, "app")
    check_end(last_run(late, "app"), "deployed")
    before[late] = running(late), generation(late)

with subtest("no time is added where nothing is switched"):
    assert run(again, "app")["result"] == "unchanged"
    publish(again, "app", "later", trouble="reboot")
    ended = run(again, "app")
    assert ended["result"] == "awaitingBoot" and ended["rebootNeeded"] and ended["finished"] - ended["started"] < 20, ended

with subtest("a machine that dies while its new system is observed boots the old one"):
    begin(early, "crashed")
    early.crash()
    early.start()
    wait_for_old_system(early)

with subtest("a machine that is shut down meanwhile puts nothing back on its way"):
    begin(sick, "shutdown")
    sick.shutdown()
    sick.start()
    wait_for_old_system(sick)
    sick.fail(f"journalctl _SYSTEMD_INVOCATION_ID={status(sick, 'app')['runs'][1]['id']} -o cat | grep 'Rolling back'")

with subtest("a run that is stopped meanwhile puts the old system back, and the command that stops it returns then"):
    begin(late, "stopped")
    # or says that it was canceled: a switch cannot wait for it
    late.succeed("timeout 60 systemctl stop ekiben-app.service || test $? != 124")
    end(late, "rolledBack", "the run was terminated by signal")
    assert (running(late), generation(late)) == before[late]
