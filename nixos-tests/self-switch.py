machine.start()
install(machine)
machine.wait_for_open_port(8787)
COUNT = iter(range(2, 1000))
PORTS = {"socket": 8788}
current = "default"


def post(project):
    """Asks for a run; returns the request's number."""
    url = f"http://127.0.0.1:{PORTS.get(current, 8787)}/ekiben"
    answer = machine.succeed(f"curl -fsS -X POST -H 'Authorization: Bearer token-{project}-0123456789' {url}")
    return json.loads(answer)["request"]


def known(instance):
    """What is known of an instance, also of one that is not configured any more."""
    return json.loads(machine.succeed(f"cat /var/lib/ekiben/status/{instance}.json"))


def switch(variant, asked_meanwhile=("app", "other")):
    """Deploys a variant of the machine, while more is asked for; returns the numbers of these requests."""
    global current
    content = str(next(COUNT))
    publish(machine, "app", content, variant=variant)
    hold(machine, "activate: switching")
    follow(machine, "app")
    post("app")
    wait_until_said(machine, "app", "Held at activate: switching.")
    run = json.loads(machine.succeed("cat /var/lib/ekiben/runs/app.json"))["id"]
    asked = {instance: post(instance) for instance in asked_meanwhile}
    go_on(machine, "activate: switching")
    machine.wait_until_succeeds(f"jq -e '.runs[] | select(.id == \"{run}\")' /var/lib/ekiben/status/app.json")
    current = variant
    # its end is a deployment, whatever became of the instance
    ended = next(ended for ended in known("app")["runs"] if ended["id"] == run)
    assert ended["result"] == "deployed", ended
    assert shows(machine, "app") == content
    assert known("app")["deployed"]["commit"] == head(machine) == shows(machine, "revision")
    assert generation(machine).endswith(f" {running(machine)}")
    return asked


def settle():
    """Waits until nothing runs any more, and checks that nothing was left behind."""
    for instance in ("app", "other", "renamed"):
        # in this order: a run that ends may leave a request, which begins the next one
        at_rest = [is_idle(instance)]
        if machine.execute(f"systemctl cat ekiben-{instance}.path")[0] == 0:
            at_rest.append(f"test ! -e /var/lib/ekiben/queue/{instance}")
        # without Ekiben, what is not the switch's own run stays as it is until Ekiben is there again
        if current != "disabled" or instance == "app":
            at_rest.append(f"test ! -e /var/lib/ekiben/runs/{instance}.json")
        machine.wait_until_succeeds(" && ".join(at_rest))
    failed = machine.succeed("systemctl list-units --failed --no-legend 'ekiben*'")
    assert failed == "", failed + machine.succeed("journalctl -q -o short-precise -n 40")
    assert current == "disabled" or machine.succeed("ls -A /var/lib/ekiben/runs") == ""
    assert deploy(machine, "git status --porcelain; git for-each-ref refs/ekiben") == ""


def by_hand():
    """Has the machine be as it was at first, as an administrator would."""
    global current
    publish(machine, "app", str(next(COUNT)))
    deploy(machine, "nix flake update app; git commit -qam 'as it was'")
    rebuild(machine)
    current = "default"
    machine.wait_for_open_port(8787)


for variant in ("options", "stages", "path", "timer", "socket", "binary", "default"):
    with subtest(f"a switch changes the instance's {variant}"):
        asked = switch(variant)
        settle()
        for instance, number in asked.items():
            assert known(instance)["served"] >= number, (instance, number)
        check_deployed(machine, "app")
        machine.succeed(f"nc -z 127.0.0.1 {PORTS.get(variant, 8787)}", f"! nc -z 127.0.0.1 {8787 if variant in PORTS else 8788}")

# on hosts alone
with subtest("a run is about to read the configuration when that goes, in a switch that leaves none"):
    hold(machine, "begin: request taken")
    follow(machine, "other")
    number = post("other")
    wait_until_said(machine, "other", "Held at begin: request taken.")
    machine.succeed("systemctl stop ekiben-other.path", "mv /etc/ekiben /etc/ekiben.gone")
    go_on(machine, "begin: request taken")
    wait_until_idle(machine, "other")
    machine.require_unit_state("ekiben-other.service", "inactive")
    assert known("other")["runs"][0]["result"] == "startedOver", known("other")["runs"][0]
    machine.succeed("test -e /var/lib/ekiben/queue/other", "mv /etc/ekiben.gone /etc/ekiben", "systemctl start ekiben-other.path")
    settle()
    assert known("other")["served"] >= number

with subtest("an instance whose run could not begin goes, and so does what tries that again"):
    publish(machine, "app", str(next(COUNT)), variant="renamed")
    deploy(machine, "nix flake update app; git commit -qam 'another name'")
    machine.succeed("mount --bind -o ro /var/lib/ekiben/runs /var/lib/ekiben/runs; ! systemctl start ekiben-app.service")
    machine.wait_until_succeeds("systemctl show --property ActiveState --value ekiben-retry@app.service | grep -x activating")
    rebuild(machine)
    machine.wait_until_succeeds("systemctl show --property ActiveState --value ekiben-retry@app.service | grep -x inactive")
    machine.succeed("umount /var/lib/ekiben/runs")
    by_hand()
    settle()

with subtest("a switch changes the instance's user"):
    asked = switch("user", asked_meanwhile=("other",))
    settle()
    assert known("other")["served"] >= asked["other"]
    # the repository is still another's
    assert "dubious ownership" in run(machine, "app")["error"], last_run(machine, "app")
    machine.succeed("systemctl reset-failed ekiben-app.service")
    by_hand()
    settle()

with subtest("the power fails when the new system has just become the one that is booted, without the instance"):
    content = str(next(COUNT))
    publish(machine, "app", content, variant="removed")
    hold(machine, "activate: persisted")
    follow(machine, "app")
    post("app")
    wait_until_said(machine, "app", "Held at activate: persisted.")
    machine.crash()
    machine.start()
    current = "removed"
    settle()
    assert known("app")["runs"][0]["result"] == "deployed", known("app")["runs"][0]
    assert shows(machine, "app") == content and shows(machine, "revision") == head(machine)
    by_hand()
    settle()

with subtest("a switch changes the lines of an instance whose run is under way: that run starts over"):
    content = str(next(COUNT))
    before = len(known("other")["runs"])
    hold(machine, "build: begun", "activate: switching")
    publish(machine, "other", content)
    follow(machine, "other")
    post("other")
    wait_until_said(machine, "other", "Held at build: begun.")
    hold(machine, "activate: switching")
    publish(machine, "app", content, variant="binary")
    follow(machine, "app")
    post("app")
    wait_until_said(machine, "app", "Held at activate: switching.")
    go_on(machine, "activate: switching")
    machine.wait_until_succeeds("test ! -e /var/lib/ekiben/runs/app.json")
    go_on(machine, "build: begun")
    settle()
    assert (shows(machine, "app"), shows(machine, "other")) == (content, content)
    ended = known("other")["runs"]
    assert [run["result"] for run in ended[: len(ended) - before]] == ["deployed", "startedOver"], ended
    by_hand()
    settle()

with subtest("an administrator's switch removes an instance whose run is under way: it is not ended before its end"):
    hold(machine, "build: begun")
    publish(machine, "app", str(next(COUNT)))
    follow(machine, "app")
    number = post("app")
    wait_until_said(machine, "app", "Held at build: begun.")
    publish(machine, "app", str(next(COUNT)), variant="removed")
    deploy(machine, "nix flake update app; git commit -qam 'without it'")
    rebuild(machine)
    current = "removed"
    machine.wait_until_succeeds("systemctl show --property ActiveState --value ekiben.service | grep -x active")
    machine.succeed("test -e /var/lib/ekiben/runs/app.json")
    go_on(machine, "build: begun")
    machine.wait_until_succeeds("test ! -e /var/lib/ekiben/runs/app.json -a -e /var/lib/ekiben/queue/app")
    settle()
    assert known("app")["runs"][0]["result"] == "startedOver", known("app")["runs"][0]
    by_hand()
    settle()
    assert known("app")["served"] >= number

# everywhere
with subtest("a run is stopped when it has switched, and its timer has changed: that does not wait for its end"):
    old = (running(machine), generation(machine), shows(machine, "app"))
    publish(machine, "app", str(next(COUNT)), variant="timer")
    hold(machine, "activate: switched")
    follow(machine, "app")
    post("app")
    wait_until_said(machine, "app", "Held at activate: switched.")
    machine.succeed("systemctl stop --no-block ekiben-app.service")
    machine.wait_until_succeeds("test ! -e /var/lib/ekiben/runs/app.json", timeout=60)
    assert known("app")["runs"][0]["result"] == "rolledBack", known("app")["runs"][0]
    assert (running(machine), generation(machine), shows(machine, "app")) == old
    machine.succeed("systemctl is-active ekiben-app.path", "systemctl reset-failed ekiben-app.service")
    go_on(machine, "activate: switched")
    by_hand()
    settle()

with subtest("a switch that would end its own run is refused, and nothing is changed"):
    shown = shows(machine, "app")
    publish(machine, "app", str(next(COUNT)), variant="odd")
    ended = run(machine, "app")
    assert ended["result"] == "failed" and "leave `systemd.services.ekiben-app` out" in ended["error"], ended
    assert shows(machine, "app") == shown
    machine.succeed("systemctl reset-failed ekiben-app.service")
    by_hand()
    settle()

LEAVES = (
    ("removed", "does not have the instance app"),
    ("disabled", "this machine will no longer update itself"),
    ("renamed", "does not have the instance app"),
)
for variant, words in some(machine, LEAVES):
    with subtest(f"a switch leaves the instance {variant}"):
        asked = switch(variant)
        settle()
        ended = next(ended for ended in known("app")["runs"] if ended["result"] == "deployed")
        assert words in " ".join(ended["warnings"]), ended
        # what cannot be served any more stays, and is served when the instance is there again
        machine.succeed("test -e /var/lib/ekiben/queue/app")
        if variant == "disabled":
            machine.succeed("! systemctl cat ekiben-webhook.socket")
        else:
            assert known("other")["served"] >= asked["other"]
        by_hand()
        settle()
        for instance, number in asked.items():
            assert known(instance)["served"] >= number, (instance, number)
