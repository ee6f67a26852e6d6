import re

start_all()
install(machine)
machine.wait_for_open_port(8787)
WEBHOOK = "curl -fsS -H 'Authorization: Bearer token-app-0123456789' http://127.0.0.1:8787/ekiben"
MEMBER = "runuser -u member -- "


def answer():
    """What a client of the webhook is told."""
    return json.loads(machine.succeed(WEBHOOK))


def wait_until_deployed(content):
    machine.wait_until_succeeds(knows("app", '.running == null and .queued == false'))
    machine.wait_until_succeeds(f"grep -x {content} /etc/app")
    wait_until_at_rest(machine, "app")


with subtest("a hold keeps everything from being deployed, says until when, why and who, and keeps requests"):
    said = machine.succeed(f"{MEMBER} ekiben hold app 2h --reason 'the auditors are here'")
    assert said.startswith("app is held until ") and "ekiben resume app" in said, said
    publish(machine, "app", "2")
    before = what_stays(machine)
    number = json.loads(machine.succeed(f"{WEBHOOK} -X POST"))["request"]
    machine.wait_until_succeeds(knows("app", f".held == {number}"))
    machine.succeed("systemctl start ekiben-app.service")
    wait_until_at_rest(machine, "app")
    assert differences(before, what_stays(machine)) == []
    assert runs(machine, "app") == 0
    hold, asked = status(machine, "app")["hold"], answer()
    assert hold["by"] == "member" and hold["reason"] == "the auditors are here", hold
    assert 7000 < hold["until"] - int(machine.succeed("date +%s")) <= 7200, hold
    assert asked["hold"] == hold and asked["queued"] and asked["served"] < number, asked
    assert "until" in machine.succeed("ekiben status app") and "member: the auditors are here" in machine.succeed("ekiben status app")
    assert "member: the auditors are here" in machine.succeed("journalctl -q -o cat -u ekiben-app")
    # which goes on waiting
    said = machine.execute("timeout 3 ekiben trigger --wait app")[1]
    assert "held until" in said and "member: the auditors are here" in said, said
    wait_until_at_rest(machine, "app")
    # no unit is started again and again for what waits
    assert int(machine.succeed("journalctl -q -o cat -u ekiben-app | grep -c ^Starting")) <= 4

with subtest("a hold survives a reboot, and what was asked for runs when it is ended"):
    machine.crash()
    machine.start()
    machine.wait_for_unit("multi-user.target")
    wait_until_at_rest(machine, "app")
    assert status(machine, "app")["held"] >= number and shows(machine, "app") == "1" and runs(machine, "app") == 0
    machine.wait_for_unit("ekiben-holds.service")
    machine.succeed(f"{MEMBER} ekiben resume app")
    wait_until_deployed("2")
    assert answer()["hold"] is None and answer()["served"] > number
    assert status(machine, "app")["held"] is None and last_run(machine, "app")["trigger"] == "request"
    assert machine.succeed("ls -A /var/lib/ekiben/holds") == ""
    machine.wait_until_fails("systemctl is-active --quiet ekiben-holds.service", timeout=60)
    assert "not held" in machine.succeed("ekiben resume app")

with subtest("who waits for a request that somebody has removed is told, and does not wait for ever"):
    machine.succeed("systemctl stop ekiben-app.path")
    remove = "until rm /var/lib/ekiben/queue/app 2> /dev/null; do sleep 0.1; done"
    ended, said = machine.execute(f"({remove}) & timeout 60 ekiben trigger --wait app 2>&1")
    assert ended == 1 and "Failed to find the run of the request for app: nobody has served it" in said, (ended, said)
    machine.succeed("systemctl start ekiben-app.path")

with subtest("a hold ends by itself"):
    before = runs(machine, "app")
    publish(machine, "app", "3")
    machine.succeed("ekiben hold app 5s", "ekiben trigger app")
    machine.wait_until_succeeds(f"test $(date +%s) -ge {status(machine, 'app')['hold']['until']}")
    assert wait_for_run(machine, "app", before)["result"] == "deployed" and shows(machine, "app") == "3"

with subtest("a run that is under way when a hold begins does not switch"):
    publish(machine, "app", "4")
    machine.succeed("mkdir -p -m 700 /run/ekiben")
    occupy(machine, "/run/ekiben/turn")
    machine.succeed("systemctl start --no-block ekiben-app.service")
    machine.wait_until_succeeds(knows("app", '.running.stage == "activate"'))
    assert "under way" in machine.succeed("ekiben hold app --reason 'not now'")
    machine.succeed("systemctl stop holder")
    wait_until_at_rest(machine, "app")
    assert (last_run(machine, "app")["result"], shows(machine, "app")) == ("startedOver", "3")
    machine.succeed("ekiben resume app")
    wait_until_deployed("4")
    check_deployed(machine, "app")

with subtest("only who may ask for a run may hold and resume, and by words that make sense"):
    machine.fail("runuser -u nobody -- ekiben hold app", "runuser -u nobody -- ekiben resume app")
    assert "only root and members of the group ekiben" in machine.execute("runuser -u nobody -- ekiben hold app 2>&1")[1]
    for odd in ("soon", "0", "-1h", "infinity", "2h 3h", "2y --reason", "''"):
        machine.fail(f"ekiben hold app {odd}")
    machine.fail("ekiben hold other")
    assert status(machine, "app")["hold"] is None

with subtest("what lies in the place of a hold, and is none, holds nothing"):
    HOLDS = "/var/lib/ekiben/holds"
    for odd in ("mkdir app", "echo x > app", "ln -s /etc/passwd app", "mkfifo app", "echo x > .y"):
        machine.succeed(f"{MEMBER} sh -c {shlex.quote(f'cd {HOLDS}; {odd}')}")
        before = runs(machine, "app")
        machine.succeed("ekiben trigger app")
        wait_for_run(machine, "app", before)
        machine.wait_until_succeeds(f"test -z \"$(ls {HOLDS})\"")

SERVER = """
import http.server, json, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        record = {"method": self.command, "path": self.path, "headers": dict(self.headers.items()), "body": body}
        with open("/run/told", "a") as file:
            file.write(json.dumps(record) + chr(10))
        self.send_response(200)
        self.end_headers()
    do_PUT = do_POST
http.server.HTTPServer(("127.0.0.1", 8000), Handler).serve_forever()
"""


def told():
    """What the server was told since the last time."""
    lines = machine.succeed("cat /run/told; : > /run/told").splitlines()
    return [json.loads(line) for line in lines]


def notify_by(script):
    machine.succeed(f"printf %s {shlex.quote(script)} > /srv/notify")


def notified(result):
    """Runs the instance, and waits until whoever is told has been."""
    before = runs(machine, "app")
    machine.succeed("ekiben trigger app")
    ended = wait_for_run(machine, "app", before)
    assert ended["result"] == result, ended
    unit = f"ekiben-notify-app@{ended['id']}.service"
    machine.wait_until_fails(f"systemctl list-units --all --plain --no-legend '{unit}' | grep -q .")
    return ended


with subtest("what has failed, and the first success after it, is told, in the user's sandbox"):
    machine.succeed(
        f"printf %s {shlex.quote(SERVER)} > /run/server.py; : > /run/told",
        "systemd-run --unit=server --setenv=PATH=$PATH python3 /run/server.py",
    )
    machine.wait_for_open_port(8000)
    tell = "curl -fsS --data-binary @- http://127.0.0.1:8000/$EKIBEN_INSTANCE"
    notify_by(f"{tell}; env | grep ^EKIBEN | curl -fsS --data-binary @- http://127.0.0.1:8000/environment; "
              "id -un | curl -fsS -d @- http://127.0.0.1:8000/; "
              "touch /srv/app/x /home/deploy/x; true")
    publish(machine, "app", "5")
    quiet = notified("deployed")
    found = told()
    assert found == [], found
    publish(machine, "app", "6", trouble="activation")
    ended = notified("rolledBack")
    run_told, environment, user = told()
    run_told = json.loads(run_told["body"])
    assert (run_told["format"], run_told["instance"], run_told["host"], run_told["run"]["id"]) == (1, "app", "machine", ended["id"]), run_told
    assert run_told["run"] == ended and user["body"].strip() == "deploy", (run_told, ended, user)
    environment = dict(line.split("=", 1) for line in environment["body"].strip().splitlines())
    assert environment["EKIBEN_RESULT"] == "rolled back" and environment["EKIBEN_SUCCESS"] == "false", environment
    assert environment["EKIBEN_MESSAGE"] == f"app on machine: rolled back: {ended['error']}", environment
    assert machine.execute("ls /srv/app/x /home/deploy/x")[0] != 0
    # the same again, and nobody has asked
    run(machine, "app")
    machine.wait_until_fails("systemctl list-units --all --plain --no-legend 'ekiben-notify-app@*' | grep -q .")
    found = told()
    assert found == [], found
    publish(machine, "app", "7")
    notified("deployed")
    assert [record["path"] for record in told()] == ["/app", "/environment", "/"]

with subtest("a command that fails is tried again, is in the journal, and changes nothing"):
    notify_by(f"test -e /srv/other/ready || {{ echo nobody listens; exit 1; }}; {tell}")
    publish(machine, "app", "8", trouble="activation")
    before = runs(machine, "app")
    machine.succeed("ekiben trigger app")
    ended = wait_for_run(machine, "app", before)
    unit = f"ekiben-notify-app@{ended['id']}.service"
    machine.wait_until_succeeds(f"journalctl -q -o cat -u '{unit}' | grep -F ': exited with 1; trying again in 5 s.'")
    assert last_run(machine, "app") == ended and told() == []
    # no unit has failed for whoever switches meanwhile
    machine.succeed("/run/current-system/bin/switch-to-configuration test")
    machine.succeed("touch /srv/other/ready")
    machine.wait_until_succeeds("test -s /run/told")
    assert json.loads(told()[0]["body"])["run"]["id"] == ended["id"]
    machine.succeed("rm /srv/other/ready")

with subtest("a command that goes on failing is a problem, until it succeeds"):
    known = "  problem   notify.command failed "
    machine.succeed(f"systemctl start --no-block {unit}")
    machine.wait_until_succeeds(f"[ $(journalctl -q -o cat -u '{unit}' | grep -cF ': exited with 1; trying again in 5 s.') = 2 ]")
    assert known not in machine.execute("ekiben status app")[1]
    machine.succeed(f"systemctl stop {unit}")
    assert known in machine.execute("ekiben status app")[1]
    # a run that is not told says nothing of the command
    machine.succeed(f"systemctl start ekiben-notify-app@{quiet['id']}.service")
    assert known in machine.execute("ekiben status app")[1]
    machine.succeed("touch /srv/other/ready", f"systemctl start {unit}", "rm /srv/other/ready")
    assert known not in machine.execute("ekiben status app")[1] and len(told()) == 1

MANUAL = machine.succeed("cat /etc/scenario/manual")


def block(language, title=""):
    """A block of the manual, by its language and what its first line begins with."""
    blocks = [part.split("\n```", 1)[0] for part in MANUAL.split(f"```{language}\n")[1:]]
    return next(block for block in blocks if block.startswith(title))


MAIL = """
import aiosmtpd.controller, aiosmtpd.handlers, signal
with open("/run/mail", "w", 1) as file:
    handler = aiosmtpd.handlers.Debugging(file)
    server = aiosmtpd.controller.Controller(handler, hostname="127.0.0.1", port=8025)
    server.start()
    signal.sigwait({signal.SIGTERM})
"""

with subtest("each recipe of the manual tells what it is to"):
    machine.succeed(
        f"printf %s {shlex.quote(MAIL)} > /run/mail.py",
        "systemd-run --unit=mail --setenv=PATH=$PATH --setenv=PYTHONUNBUFFERED=1 python3 /run/mail.py",
        "systemd-run --unit=ntfy-server $(command -v ntfy) serve --listen-http 127.0.0.1:8001",
    )
    machine.wait_for_open_port(8001)
    machine.wait_for_open_port(8025)
    for name in ("matrix", "forgejo", "github"):
        machine.succeed(f"install -m 600 -o deploy /dev/null /home/deploy/{name}-header; "
                        f"echo 'Authorization: Bearer {name}-token' > /home/deploy/{name}-header")
    machine.succeed("echo 'url = \"http://127.0.0.1:8000/services/secret\"' > /home/deploy/chat-url")
    ended = last_run(machine, "app")
    message = f"app on machine: rolled back: {ended['error']}"
    base = deploy(machine, "git rev-parse HEAD")

    def recipe(title):
        """What a recipe sends."""
        script = block("sh", f"# {title}")
        for host in ("ntfy.example.org", "matrix.example.org", "git.example.org", "api.github.com"):
            script = script.replace(f"https://{host}", f"http://127.0.0.1:{8001 if host.startswith('ntfy') else 8000}")
        notify_by("set -e\n" + script.replace("smtp://mail.example.org", "smtp://127.0.0.1:8025"))
        unit = f"ekiben-notify-app@{ended['id']}.service"
        machine.wait_until_fails(f"systemctl list-units --all --plain --no-legend '{unit}' | grep -q .")
        machine.succeed(f"systemctl start {unit}")
        return told()

    assert recipe("mail") == []
    machine.wait_until_succeeds("grep -x 'Subject: app on machine: rolled back' /run/mail && grep -x 'To: admin@example.org' /run/mail")
    assert message in machine.succeed("cat /run/mail")
    assert recipe("ntfy") == []
    ntfy = json.loads(machine.succeed("curl -fsS 'http://127.0.0.1:8001/my-machines/json?poll=1'"))
    assert (ntfy["title"], ntfy["message"]) == ("app on machine: rolled back", message), ntfy
    [matrix] = recipe("Matrix")
    assert matrix["method"] == "PUT" and matrix["path"].endswith(f"/send/m.room.message/{ended['id']}"), matrix
    assert matrix["headers"]["Authorization"] == "Bearer matrix-token" and json.loads(matrix["body"])["body"] == message, matrix
    [chat] = recipe("an incoming webhook")
    assert chat["path"] == "/services/secret" and json.loads(chat["body"]) == {"text": message}, chat
    for name, path in (("Forgejo or Gitea", "/api/v1/repos/me/my-config/statuses/"), ("GitHub", "/repos/me/my-config/statuses/")):
        [state] = recipe(name)
        assert state["path"] == path + base and json.loads(state["body"])["state"] == "failure", state
        assert state["headers"]["Authorization"] == f"Bearer {name.split()[0].lower()}-token", state

with subtest("Prometheus can read the metrics, and its alerts find what is wrong"):
    METRICS = "/var/lib/node-exporter/ekiben.prom"
    said = machine.succeed(f"promtool check metrics < {METRICS} 2>&1")
    assert said == "", said
    unknown = [name for name in re.findall("# TYPE (\\S+)", machine.succeed(f"cat {METRICS}")) if f"`{name}`" not in MANUAL]
    assert unknown == [], unknown

    def metric(name, labels=""):
        """A value of the file, or none."""
        series = f'ekiben_{name}{{name="app"{labels}}}'
        return machine.execute(f"grep -F {shlex.quote(series)} {METRICS}")[1].rpartition(" ")[2].strip()

    assert (metric("last_run_success"), metric("last_run_result", ',result="rolled back"')) == ("0", "1")
    assert metric("last_run_timestamp_seconds") == str(last_run(machine, "app")["finished"])
    assert metric("deployed_info", f',revision="{head(machine)}"') == "1" and int(metric("runs_total", ',result="deployed"')) > 1
    assert metric("last_run_stage_seconds", ',stage="build"') != "" and metric("hold_end_timestamp_seconds") == ""
    machine.succeed("ekiben hold app")
    machine.wait_until_succeeds(f"grep ^ekiben_hold_end {METRICS}")
    assert metric("hold_end_timestamp_seconds") == str(status(machine, "app")["hold"]["until"])
    machine.succeed("ekiben resume app")
    machine.wait_until_fails(f"grep ^ekiben_hold_end {METRICS}")
    notify_by("true")
    publish(machine, "app", "9")
    notified("deployed")
    machine.wait_until_succeeds(f"grep '^ekiben_last_run_success.* 1' {METRICS}")
    assert machine.succeed("ls /var/lib/node-exporter").split() == ["ekiben.prom"]

    def summary(alert):
        """What an alert of the manual says."""
        text = block("yaml", "groups:").partition(f"alert: Ekiben{alert}\n")[2].partition('summary: "')[2].partition('"')[0]
        return text.replace("{{ $labels.name }}", "app").replace("{{ $labels.instance }}", "web:9100")

    def fires(alert):
        return [{"exp_labels": {"instance": "web:9100", "name": "app"}, "exp_annotations": {"summary": summary(alert)}}]

    check_alerts(machine, block("yaml", "groups:"), [
        ({f'ekiben_{series}{{instance="web:9100", name="app"}}': values for series, values in given.items()},
         [(at, f"Ekiben{alert}", fires(alert) if is_due else []) for at, alert, is_due in expected])
        for given, expected in (
            ({"last_run_success": "1+0x40 0+0x11000"}, (("30m", "Failing", False), ("2h", "Failing", True))),
            ({"last_success_timestamp_seconds": "0+0x11000"}, (("71h", "Stale", False), ("74h", "Stale", True))),
            ({"last_success_timestamp_seconds": "0+0x11000", "hold_end_timestamp_seconds": "540000+0x11000"},
             (("74h", "Stale", False), ("151h", "Stale", True))),
            ({"request_waiting": "1+0x11000"}, (("5h", "Waiting", False), ("7h", "Waiting", True))),
            ({"request_waiting": "1+0x11000", "hold_end_timestamp_seconds": "540000+0x11000"}, (("7h", "Waiting", False),)),
            ({"reboot_awaited": "1+0x11000", "drifted": "1+0x11000"},
             (("1h", "RebootAwaited", False), ("170h", "RebootAwaited", True), ("2h", "Drifted", True))),
        )
    ])


def at(text):
    """A transcript without what is another at each run."""
    for what, instead in (
        (r"\b[0-9a-f]{40}\b", "<commit>"), (r"\b[0-9a-f]{32}\b", "<run>"), (r"\b[0-9a-f]{8}\b", "<commit>"), (r"/nix/store/\S+", "<system>"),
        (r"\w{3} \d{4}-\d\d-\d\d \d\d:\d\d \w+", "<moment>"), (r"\b\d+ (s|min|h|d)\b", "<span>"), (r" {2,}", "  "),
    ):
        text = re.sub(what, instead, text)
    return text


def shows_in(state, expected, healthy):
    """Checks what is shown of the machine in a state, and the exit status."""
    code, said = machine.execute("ekiben status app")
    said = at(said)
    assert said.splitlines()[: len(expected)] == expected, f"{state}:\n{said}"
    short = machine.execute("ekiben status")
    assert (code == 0, short[0] == 0) == (healthy, healthy), (state, said, short)
    assert all(len(line) <= 80 for line in short[1].splitlines()[:2]), short
    return short[1]


with subtest("status shows in each state what was, what is and what to do"):
    wait_until_at_rest(machine, "app")
    new = "  new  app: <commit> -> <commit>"
    ran = ["  took  prepare <span>, build <span>, activate <span>"]
    shows_in("deployed", [
        "app: idle", "  deployed  <commit>", "  system  <system>", "  last run  deployed, <span> ago, asked for by user root", "  proposed  <commit>",
        "  summary  update app", new, *ran, "  log  ekiben log app <run>", "  journal  journalctl _SYSTEMD_INVOCATION_ID=<run>",
    ], True)
    machine.succeed("ekiben hold app --reason 'not now'", "ekiben trigger app")
    wait_until_at_rest(machine, "app")
    said = shows_in("held", ["app: held, queued", "  held  until <moment> by root: not now; run ekiben resume app to end that", "  deployed  <commit>"], True)
    assert "to end that: ekiben resume app" in said, said
    machine.succeed("ekiben resume app")
    machine.wait_until_succeeds(knows("app", ".held == null and .running == null and .queued == false"))
    wait_until_at_rest(machine, "app")
    publish(machine, "app", "10", trouble="build")
    notified("failed")
    said = shows_in("failed", [
        "app: idle", "  deployed  <commit>", "  system  <system>", "  last run  failed, <span> ago, asked for by user root", "  proposed  <commit>",
        "  summary  update app", new, "  took  prepare <span>, build <span>", "  stage  build",
    ], False)
    assert "app: failed in stage build; see ekiben status app" in said, said
    publish(machine, "app", "11", trouble="activation")
    notified("rolledBack")
    assert "app: rolled back in stage activate; see ekiben status app" in machine.fail("ekiben status")

with subtest("status is coloured on a terminal, and on no other, and not where NO_COLOR says so"):
    on_terminal = "script --quiet --return --command 'ekiben status' /dev/null"
    assert "\x1b[31mrolled back\x1b[0m" in machine.execute(on_terminal)[1]
    assert "\x1b" not in machine.execute(f"NO_COLOR=1 {on_terminal}")[1] + machine.execute("ekiben status")[1]
    # wrapped there, too, and nothing is lost; only what has no spaces runs over
    said = (machine.execute(f"NO_COLOR=1 {words}")[1] for words in ("script -qec 'ekiben status app' /dev/null", "ekiben status app"))
    # some time passes in between
    wrapped, whole = (re.sub(r"\d+ \w+ ago", "0 s ago", text) for text in said)
    assert wrapped.split() == whole.split() and max(map(len, whole.splitlines())) > 100, whole
    too_long = [line for line in wrapped.splitlines() if len(line) > 80 and line[12:].count(" ") and line[2] != "|"]
    assert too_long == [], too_long

with subtest("who asks for help gets it, and who errs is told what was expected"):
    usage = machine.succeed("ekiben --help")
    for words in ("status", "trigger", "hold app", "check"):
        assert machine.succeed(f"ekiben {words} --help") == usage, words
    for words, expected in (
        ("trigger", "expected ekiben trigger [--wait] INSTANCE"),
        ("log app zzz", "for those of app, see ekiben status app"),
        ("log app --folow", "expected ekiben log INSTANCE [RUN] [--follow]"),
        ("check /nowhere", "/nowhere: No such file"),
        ("statsu", 'understand "statsu": see ekiben --help'),
    ):
        said = machine.fail(f"ekiben {words} 2>&1")
        assert expected in said, said

with subtest("the manual has all keys of the state as JSON"):
    known = status(machine, "app")
    keys = {*known, *known["deployed"], *known["bad"], *(key for run in known["runs"] for key in run)} - {"options"}
    assert (unknown := [key for key in keys if f"`{key}`" not in MANUAL]) == [], unknown

with subtest("the log of a run is one command away"):
    first, second = status(machine, "app")["runs"][:2]
    last, earlier = machine.succeed("ekiben log app"), machine.succeed(f"ekiben log app {second['id']}")
    assert "Run ended: rolled back" in last and "Run ended: failed" in earlier and "Run ended: failed" not in last, (last, earlier)
    assert first["error"] in last
    # as in the lines of earlier runs, which have 80 columns
    assert machine.succeed(f"ekiben log app {second['id'][:8]}") == earlier
    too_long = [line for line in machine.execute("ekiben status app")[1].splitlines() if line.startswith("  earlier ") and len(line) > 80]
    assert too_long == [], too_long
    for odd in ("x", "../x", "--boot", "app app app"):
        machine.fail(f"ekiben log app {odd}")
    # who may not read the journal learns who may
    assert "systemd-journal" in machine.fail(f"{MEMBER} ekiben log app 2>&1")

with subtest("what a run says last is in its log, however late journald comes to it"):
    for content, trouble, end in (("13", "build", "failed in stage build"), ("14", "none", "deployed")):
        publish(machine, "app", content, trouble=trouble)
        machine.succeed("pkill -STOP -x systemd-journal", "systemctl start --no-block ekiben-app.service")
        machine.wait_until_succeeds(f"pgrep -x journalctl || {is_idle('app')}")
        machine.succeed("pkill -CONT -x systemd-journal")
        wait_until_idle(machine, "app")
        assert f"Run ended: {end}" in (said := machine.succeed("ekiben log app")), said

with subtest("a run says who has asked for it, all of them; nobody can pretend to be another"):
    def asked(*commands, by):
        """Has a run follow several requests, or what looks like one; checks who has asked for it."""
        def at_once(verb):
            # who joins in just when a run takes a request is not named
            machine.succeed("systemctl stop ekiben-app.path", f"ekiben {verb} app", *commands)
            machine.succeed("systemctl reset-failed ekiben-app.path", "systemctl start ekiben-app.path")

        before = runs(machine, "app")
        at_once("hold")
        machine.wait_until_succeeds(knows("app", ".held != null"))
        wait_until_at_rest(machine, "app")
        at_once("resume")
        ended = wait_for_run(machine, "app", before)
        assert (ended["trigger"], ended["by"]) == ("request", by), ended

    asked(f"{WEBHOOK} -X POST", f"{MEMBER} ekiben trigger app", "SUDO_USER=alice ekiben trigger app", by=["project app", "user member", "user alice"])
    assert "asked for by project app, user member, user alice" in machine.execute("ekiben status app")[1]
    lie = "cd /var/lib/ekiben/queue; rm -f app .app*; printf '%s app {}' $(date +%s%3N) > app; cp app .app.1"
    for pretends in ("root", "-", "project"):
        asked(f"{MEMBER} sh -c {shlex.quote(lie.format(pretends))}", by=["user member"])



def state():
    """What runs, what is booted, and the branch."""
    return {"running": running(machine), "generation": generation(machine), "head": head(machine)}


with subtest("the last deployment is undone, as somebody has asked; it is not deployed again, but something else is"):
    machine.succeed("ekiben resume app")
    wait_until_at_rest(machine, "app")
    for content in ("20", "21"):
        publish(machine, "app", content)
        before, last = state(), status(machine, "app")["deployed"]
        ended = run(machine, "app")
        assert ended["result"] == "deployed", ended
    assert (seen := last_run(machine, "app"))["by"] == ["systemctl"], seen
    after = state()
    machine.succeed("ekiben hold app --reason 'it is the night'", f"{WEBHOOK} -X POST")
    machine.wait_until_succeeds(knows("app", ".held != null"))
    machine.fail("runuser -u nobody -- ekiben rollback app")
    assert "only root and members of the group" in machine.execute("runuser -u nobody -- ekiben rollback app 2>&1")[1]
    # a hold is about what is deployed
    said = machine.succeed(f"{MEMBER} ekiben rollback app 2>&1")
    assert said.endswith("The run ended: restored.\n"), said
    assert state() == {**before, "head": after["head"]}, (before, state())
    known = status(machine, "app")
    ended = known["runs"][0]
    assert (ended["result"], ended["trigger"], ended["by"], ended["undid"]) == ("restored", "rollback", ["user member"], after["head"]), ended
    assert (ended["commit"], known["deployed"]["commit"], known["held"] is None) == (last["commit"], last["commit"], False), known
    assert known["undone"]["by"] == "user member" and known["well"], known
    left = machine.succeed("ls /var/lib/ekiben/rollbacks; ls /nix/var/nix/gcroots/ekiben")
    assert left == "", left
    said = machine.succeed("ekiben status app")
    assert f"ahead     the branch is ahead on purpose: user member had {after['head'][:8]} undone" in said, said
    assert "ekiben trigger app to deploy" in said and "rollback by user member" in said, said
    # what was asked for before has waited for the end of the hold
    machine.succeed("ekiben resume app")
    wait_until_at_rest(machine, "app")
    ended = last_run(machine, "app")
    assert ended["result"] == "withheld" and "project app" in ended["by"], ended
    for words in ("systemctl start ekiben-app", f"{WEBHOOK} -X POST", "ekiben trigger app"):
        machine.succeed(words)
        wait_until_at_rest(machine, "app")
        ended = last_run(machine, "app")
        assert ended["result"] == "withheld" and state() == {**before, "head": after["head"]}, ended
    assert ended["by"] == ["user root"] and answer()["last"]["result"] == "withheld", ended
    assert (seen := machine.succeed("ekiben status app")).count("ahead on purpose") == 1, seen
    said = machine.fail("ekiben trigger --wait app 2>&1")
    assert "The run ended: withheld: the branch is ahead on purpose" in said and "or, at least a minute later, run ekiben trigger app" in said, said
    said = machine.fail("ekiben rollback app 2>&1")
    assert "was undone" in said, said
    publish(machine, "app", "22")
    ended = run(machine, "app")
    assert ended["result"] == "deployed" and shows(machine, "app") == "22", ended
    check_deployed(machine, "app")
    assert status(machine, "app")["undone"] is None

with subtest("somebody at this machine has it back, though not at once; the hand of another is not undone"):
    machine.succeed("ekiben rollback app")
    assert shows(machine, "app") == "20"
    undone = status(machine, "app")["undone"]
    # as if a minute had passed
    machine.succeed("cd /var/lib/ekiben/status; jq '.undone.since -= 61' app.json > x; mv x app.json")
    assert run(machine, "app")["result"] == "withheld"
    machine.succeed("ekiben trigger --wait app")
    assert shows(machine, "app") == "22" and undone["commit"] == head(machine)
    check_deployed(machine, "app")
    first = running(machine)
    publish(machine, "app", "23")
    assert run(machine, "app")["result"] == "deployed"
    rebuild_of = running(machine)
    # chosen at the boot, or switched to by hand: what ran before
    machine.succeed(f"{first}/bin/switch-to-configuration test || [ $? = 4 ]")
    machine.succeed("ekiben rollback app")
    assert running(machine) == first and generation(machine).endswith(first)
    assert status(machine, "app")["problems"] == []
    publish(machine, "app", "24")
    assert run(machine, "app")["result"] == "deployed"
    by_hand = before["running"]
    machine.succeed(f"{by_hand}/bin/switch-to-configuration test || [ $? = 4 ]")
    kept = state()
    assert "by hand; use nixos-rebuild" in machine.fail("ekiben rollback app 2>&1")
    assert state() == kept and last_run(machine, "app")["result"] == "failed"
    machine.succeed(f"{PROFILE}/bin/switch-to-configuration test || [ $? = 4 ]")

with subtest("who asks twice has it undone once; what is published for others since is in nobody's way"):
    publish(machine, "app", "25")
    assert run(machine, "app")["result"] == "deployed"
    before = state()
    publish(machine, "app", "26")
    assert run(machine, "app")["result"] == "deployed"
    # as an instance that publishes has it
    machine.succeed("cd /var/lib/ekiben/status; jq '.deployed.number += 1 | .deployed.system = \"\"' app.json > publish.json")
    occupy(machine, "/run/ekiben/turn")
    machine.succeed("systemd-run --unit=first --property=RemainAfterExit=yes ekiben rollback app")
    machine.wait_until_succeeds(knows("app", '.running.trigger == "rollback"'))
    machine.succeed("systemd-run --unit=second --property=RemainAfterExit=yes ekiben rollback app")
    machine.wait_until_succeeds("test -e /var/lib/ekiben/rollbacks/app")
    machine.succeed("systemctl stop holder")
    machine.wait_until_succeeds("test ! -e /var/lib/ekiben/rollbacks/app")
    wait_until_at_rest(machine, "app")
    known = status(machine, "app")
    assert [run["result"] for run in known["runs"][:2]] == ["withheld", "restored"] and known["well"], known
    assert {**before, "head": ""} == {**state(), "head": ""}, (before, state())
    # who asked second may look when the second run, which has nothing left to undo, has ended, too
    for unit, results in (("first", "restored"), ("second", "restored|withheld")):
        machine.succeed(f"journalctl -q -o cat -u {unit} | grep -xE 'The run ended: ({results})\\.'", f"systemctl stop {unit}")
    machine.succeed("rm /var/lib/ekiben/status/publish.json")
    publish(machine, "app", "27")
    assert run(machine, "app")["result"] == "deployed"

with subtest("where there is nothing to go back to, nothing is done, and why is said"):
    machine.succeed("rm -f /tmp/x; cp /var/lib/ekiben/status/app.json /tmp/x")
    kept = state()
    gone = "/nix/store/" + "a" * 32 + "-nixos-system-gone"
    machine.succeed(f"cd /var/lib/ekiben/status; jq '.deployed.before.system = \"{gone}\" | "
                    f".deployed.before.generation.system = \"{gone}\"' /tmp/x > x; mv x app.json")
    said = machine.fail("ekiben rollback app 2>&1")
    assert "collected as garbage, revert the commit" in said and state() == kept, said
    machine.succeed("cd /var/lib/ekiben/status; jq '.deployed.before = null' /tmp/x > x; mv x app.json")
    said = machine.fail("ekiben rollback app 2>&1")
    assert "what ran before its last deployment is not known" in said and state() == kept, said
    machine.succeed("mv /tmp/x /var/lib/ekiben/status/app.json; touch /var/lib/ekiben/rollbacks/app")
    machine.wait_until_succeeds("test ! -e /var/lib/ekiben/rollbacks/app")
    wait_until_at_rest(machine, "app")
    assert state() == kept
    # its generation was removed, but not the system
    before = status(machine, "app")["deployed"]["before"]
    machine.succeed(f"rm {PROFILE}-{before['generation']['number']}-link", "ekiben rollback app")
    assert running(machine) == before["system"] and generation(machine).endswith(before["system"])

with subtest("a run says how the new system differs from the one that ran; where that cannot be said, it is deployed all the same"):
    for version in ("1.0", "2.0"):
        machine.succeed(as_deploy(f"echo {version} > /srv/app/version"))
        publish(machine, "app", f"30-{version}")
        ended = run(machine, "app")
        assert ended["result"] == "deployed", ended
    assert ended["changes"] == ["app: 1.0 → 2.0"], ended
    assert "  changed   app: 1.0 → 2.0" in machine.succeed("ekiben status app")
    path = re.search(r"\bPATH=(\S+)", machine.succeed("systemctl show --property Environment ekiben-app.service"))[1]
    drop_in = "/run/systemd/system/ekiben-app.service.d"
    script = f"#!/bin/sh\ncase \"$*\" in *diff-closures*) echo 'error: no' >&2; exit 1;; esac\nexec {machine.succeed('command -v nix').strip()} \"$@\"\n"
    machine.succeed(
        f"mkdir -p /opt/fails {drop_in}; printf %s {shlex.quote(script)} > /opt/fails/nix; chmod 755 /opt/fails/nix",
        f"printf '[Service]\\nEnvironment=PATH=/opt/fails:{path}\\n' > {drop_in}/test.conf; systemctl daemon-reload",
    )
    publish(machine, "app", "31")
    ended = run(machine, "app")
    assert (ended["result"], ended["changes"]) == ("deployed", []), ended
    machine.succeed(f"rm -r {drop_in} /opt/fails; systemctl daemon-reload")

with subtest("who waits sees how far the run is, what it waits for, and may stop waiting"):
    publish(machine, "app", "40")
    said = machine.succeed("ekiben trigger --wait app")
    assert said.index("app: prepare\n") < said.index("The run ended: deployed."), said
    assert "The run ended: unchanged." in machine.succeed("ekiben trigger app --wait")
    # another's turn
    publish(machine, "app", "41")
    occupy(machine, "/run/ekiben/turn")
    ended, said = machine.execute("timeout --preserve-status --signal=INT 15 ekiben trigger --wait app")
    assert ended == 130 and "app: waiting: another run is switching this machine\n" in said, (ended, said)
    assert "No longer waiting; the run of app goes on: see ekiben status app." in said, said
    assert "waiting   another run is switching this machine" in machine.execute("ekiben status app")[1]
    machine.succeed("systemctl stop holder")
    wait_until_at_rest(machine, "app")
    assert shows(machine, "app") == "41" and machine.execute("pgrep -f '[j]ournalctl.*--follow'")[0] == 1
    # one that builds
    publish(machine, "app", "42", trouble="build-hangs")
    machine.succeed("systemd-run --unit=waiter script --quiet --flush --command 'ekiben trigger --wait app' /run/terminal")
    machine.wait_until_succeeds("grep -aF 'app: build: building 1 of 1 (' /run/terminal", timeout=60)
    assert (seen := status(machine, "app"))["progress"] == "building 1 of 1", seen
    assert "  progress  building 1 of 1" in machine.execute("ekiben status app")[1]
    machine.succeed("systemctl stop ekiben-app.service")
    machine.wait_until_succeeds("grep -aF 'The run ended: failed' /run/terminal")

with subtest("a rollback behind a build says how to have it at once"):
    machine.succeed("ekiben trigger app")
    machine.wait_until_succeeds("(ekiben status || true) | grep -F 'running (build)'", timeout=60)
    machine.succeed("systemd-run --unit=waiter-2 --property=RemainAfterExit=yes ekiben rollback app")
    said = "app: build: building 1 of 1; the rollback follows, at once after systemctl stop ekiben-app"
    machine.wait_until_succeeds(f"journalctl -q -o cat -u waiter-2 | grep -x {shlex.quote(said)}", timeout=60)
    machine.succeed("systemctl stop ekiben-app")
    machine.wait_until_succeeds("journalctl -q -o cat -u waiter-2 | grep -x 'The run ended: restored.'", timeout=60)
    machine.succeed("systemctl stop waiter-2")
    wait_until_at_rest(machine, "app")

with subtest("while it builds, status says so"):
    publish(machine, "app", "12", trouble="build-hangs")
    machine.succeed("ekiben trigger app")
    machine.wait_until_succeeds("(ekiben status || true) | grep -F 'running (build)'", timeout=60)
    assert "  running   since" in machine.execute("ekiben status app")[1]
    machine.succeed("systemctl stop ekiben-app.service")
