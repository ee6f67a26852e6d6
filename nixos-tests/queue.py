start_all()
install(server)
server.wait_for_open_port(8787)
POST = ("curl -s --max-time 10 -o /dev/null -w '%{http_code} %{exitcode} %{errormsg}\\n' "
        "-X POST -H 'Authorization: Bearer token-app-0123456789' http://server:8787/ekiben")


def post():
    """Sends a request; returns its number."""
    return json.loads(client.succeed(POST.replace("-o /dev/null -w '%{http_code} %{exitcode} %{errormsg}\\n'", "-f")))["request"]
BLOCKED = itertools.count()


def block():
    """Has the next run find something new, and wait before it changes anything, until `unblock`."""
    publish(server, "app", f"blocked-{next(BLOCKED)}")
    server.succeed("mkdir -p -m 700 /run/ekiben")
    occupy(server, "/run/ekiben/turn")


def unblock():
    server.succeed("systemctl stop holder")


def wait_for_stage(stage):
    server.wait_until_succeeds(knows("app", f'.running.stage == "{stage}"'))


with subtest("300 requests, most of them during a run: all accepted, few runs, one of them after the last request"):
    block()
    first = post()
    server.wait_until_succeeds(knows("app", ".running != null"))
    client.succeed(f"seq 300 | xargs -P 20 -I@ sh -c {shlex.quote(POST)} > /tmp/answers")
    assert (seen := client.succeed("sort /tmp/answers | uniq -c")).split() == ["300", "202", "0"], seen
    publish(server, "app", "2")
    last = post()
    assert last > first
    unblock()
    server.wait_until_succeeds(knows("app", f".served >= {last} and .running == null"))
    assert shows(server, "app") == "2"
    ended = status(server, "app")["runs"]
    assert len(ended) <= 5, ended
    for later, earlier in zip(ended, ended[1:]):
        assert later["started"] >= earlier["finished"], ended
    check_deployed(server, "app")

with subtest("a request during a run leads to one more run, which sees what came before the request"):
    before = runs(server, "app")
    block()
    post()
    wait_for_stage("activate")
    publish(server, "app", "3")
    number = post()
    assert post() == number
    unblock()
    wait_for_run(server, "app", before + 1)
    assert runs(server, "app") == before + 2
    assert shows(server, "app") == "3"

with subtest("the webhook may be gone when its request is served"):
    before = runs(server, "app")
    server.succeed("systemctl stop ekiben-app.path")
    publish(server, "app", "4")
    post()
    server.succeed("systemctl stop ekiben-webhook.socket ekiben-webhook.service")
    assert runs(server, "app") == before
    server.succeed("systemctl start ekiben-app.path")
    wait_for_run(server, "app", before)
    assert shows(server, "app") == "4"
    server.succeed("systemctl start ekiben-webhook.socket")

with subtest("a request survives a crash of the machine"):
    before = runs(server, "app")
    server.succeed("systemctl stop ekiben-app.path")
    publish(server, "app", "5")
    post()
    assert runs(server, "app") == before
    server.crash()
    server.start()
    wait_for_run(server, "app", before)
    check_deployed(server, "app")
    assert shows(server, "app") == "5"

# on hosts alone
with subtest("a webhook that is restarted 20 times refuses nobody"):
    server.wait_for_open_port(8787)
    client.succeed(
        "rm -f /tmp/enough /tmp/answers",
        f"systemd-run --unit=stream --setenv=PATH=$PATH sh -c {shlex.quote('until [ -e /tmp/enough ]; do ' + POST + ' >> /tmp/answers; done')}",
    )
    client.wait_until_succeeds("test $(wc -l < /tmp/answers) -gt 20")
    for _ in range(20):
        before = int(client.succeed("wc -l < /tmp/answers"))
        server.succeed("systemctl restart ekiben-webhook.service")
        client.wait_until_succeeds(f"test $(wc -l < /tmp/answers) -gt {before + 2}")
    client.succeed("touch /tmp/enough")
    client.wait_until_fails("systemctl is-active --quiet stream")
    answers = client.succeed("sort /tmp/answers | uniq -c").split()
    assert answers[1:] == ["202", "0"], client.succeed("sort /tmp/answers | uniq -c")
    print(f"{answers[0]} requests through 20 restarts")


def answer():
    return json.loads(client.succeed(POST.replace("-X POST ", "").replace("-o /dev/null -w '%{http_code} %{exitcode} %{errormsg}\\n'", "-f")))


def starts():
    """How often the service has been started."""
    return int(server.succeed("journalctl -q -o cat -u ekiben-app | grep -c ^Starting || true"))


QUEUE = "/var/lib/ekiben/queue"
MEMBER = "runuser -u nobody -g ekiben -- sh -c"
DEEP = """
import os
os.mkdir("deep"); os.chdir("deep")
for _ in range(6000):
    os.mkdir("d"); os.chdir("d")
"""

with subtest("whoever writes the queue can ask for runs, and neither lie about them nor block one"):
    wait_until_at_rest(server, "app")
    server.succeed(f"printf %s {shlex.quote(DEEP)} > /tmp/deep.py; chmod 644 /tmp/deep.py")
    python = server.succeed("readlink -f $(command -v python3)").strip()
    for odd in some(server, (
        "printf 18446744073709551615 > .x; mv .x app",
        f"{python} /tmp/deep.py && mv deep app",
        "mkdir .y; chmod 0 .y; mv .y app",
        "mkfifo app",
        "ln -s /etc/passwd app",
        "echo 1 > .y; chmod 0 .y; mv .y app",
        "for i in $(seq 3000); do echo > x$i; done; mkdir .app-$$; touch app",
    ), 2):
        started, last = starts(), answer()["served"]
        server.succeed(f"{MEMBER} {shlex.quote(f'cd {QUEUE}; {odd}')}")
        server.wait_until_succeeds(f"test $(journalctl -q -o cat -u ekiben-app | grep -c ^Starting) -gt {started}")
        wait_until_at_rest(server, "app")
        assert starts() == started + 1, odd
        assert server.succeed(f"ls {QUEUE} | grep -v '^x' || true") == "" == server.succeed("ls -A /var/lib/ekiben/runs"), odd
        number = post()
        assert last < number < last + 86400000, (odd, number, last)
        server.wait_until_succeeds(knows("app", f".served == {number}"))
        wait_until_at_rest(server, "app")
    # during a run, where it stays until that ends
    for odd, expected in (("printf 18446744073709551615 > app", "202"), ("ln -s /nowhere app", "202"), ("mkdir app", "503")):
        block()
        first = post()
        wait_for_stage("activate")
        server.succeed(f"{MEMBER} {shlex.quote(f'cd {QUEUE}; {odd}')}")
        assert client.succeed(POST).split()[0] == expected, odd
        number = post() if expected == "202" else first
        assert answer()["served"] < first and first <= number < first + 86400000, (odd, first, number)
        unblock()
        server.wait_until_succeeds(knows("app", f".served >= {number}"))
        wait_until_at_rest(server, "app")


def drop_in(unit, *lines):
    """Changes a unit until `undo`."""
    server.succeed(
        f"mkdir -p /run/systemd/system/{unit}.d; printf '%s\\n' {shlex.join(lines)} > /run/systemd/system/{unit}.d/test.conf; "
        "systemctl daemon-reload"
    )


def undo(unit):
    server.succeed(f"rm -r /run/systemd/system/{unit}.d; systemctl daemon-reload")


def wait_until_served(number):
    server.wait_until_succeeds(f"ekiben status --json app | jq -e '.app.served >= {number}'")
    wait_until_at_rest(server, "app")


def wait_in_stage(command):
    """Has the run of the changed service wait in that command."""
    server.succeed("systemctl start --no-block ekiben-app.service")
    server.wait_until_succeeds("systemctl show --property ExecStart --value ekiben-app.service | "
                               f"grep -F {shlex.quote(command)} | grep -v 'pid=0'")


HAS_FAILED = "systemctl --failed --no-legend | grep -w ekiben-app.service"


def times_of(word):
    """When, in seconds since 1970, the service's journal had lines with that word."""
    lines = server.succeed(f"journalctl -q -o short-unix -u ekiben-app | grep -F {shlex.quote(f': {word}')} || true").splitlines()
    return [float(line.split()[0]) for line in lines]


for place in ("runs", "queue", "status"):
    with subtest(f"a run that cannot begin, since {place} cannot be written, has failed, says so once, and begins when it can"):
        started = starts()
        content = f"6-{place}"
        publish(server, "app", content)
        server.succeed("systemctl stop ekiben-app.path")
        follow(server, "app")
        number = post()
        server.succeed(f"mount --bind -o ro /var/lib/ekiben/{place} /var/lib/ekiben/{place}", "systemctl start ekiben-app.path")
        server.wait_until_succeeds(HAS_FAILED, timeout=20)
        assert answer()["served"] < number and server.succeed(f"cat {QUEUE}/app").split()[0] == str(number)
        # for as long as several attempts take
        client.wait_until_succeeds(f"test $(($(date +%s) - {int(client.succeed('date +%s'))})) -gt 3")
        server.succeed(HAS_FAILED)
        said = server.succeed("journalctl -q -o cat -u ekiben-app --after-cursor=$(cat /tmp/ekiben-app)").splitlines()
        # what systemd says of every start that fails is the rest
        assert sum(f"/var/lib/ekiben/{place}/app" in line for line in said) == 1 and len(said) <= 8 and starts() == started + 1, said
        mended = float(server.wait_until_succeeds(f"umount /var/lib/ekiben/{place} && date +%s.%N"))
        wait_until_served(number)
        assert (last_run(server, "app")["result"], shows(server, "app"), starts()) == ("deployed", content, started + 2)
        print(f"begins after {times_of('Starting')[-1] - mended:.1f} s")
        assert times_of("Starting")[-1] - mended < 5

with subtest("a run whose unit fails before it can begin has failed, and is tried again, with growing pauses"):
    started, failed = starts(), status(server, "app")["counts"].get("failed", 0)
    drop_in("ekiben-app.service", "[Service]", "LoadCredential=x:/nowhere")
    number = post()
    server.wait_until_succeeds(HAS_FAILED, timeout=20)
    server.wait_until_succeeds(f"test $(journalctl -q -o cat -u ekiben-app | grep -c ^Starting) -ge {started + 4}", timeout=60)
    server.wait_until_succeeds(HAS_FAILED, timeout=20)
    times = times_of("Starting")[started:]
    pauses = [later - earlier for earlier, later in zip(times, times[1:])]
    assert status(server, "app")["counts"]["failed"] == failed + 1
    # as long as it has been going on, at least; a machine at work takes longer
    assert pauses[0] > 0.9 and pauses[2] > 1.9, pauses
    undo("ekiben-app.service")
    wait_until_served(number)

with subtest("a run that has to be started over is, although the queue cannot be written at first"):
    publish(server, "app", "7")
    block()
    follow(server, "app")
    post()
    # until then, it looks at the branch
    wait_until_said(server, "app", "Another run is switching this machine")
    deploy(server, "git commit --allow-empty -qm meanwhile")
    server.succeed(f"mount --bind -o ro {QUEUE} {QUEUE}")
    unblock()
    server.wait_until_succeeds(f"journalctl -q -o cat -u ekiben-app | grep -F 'write {QUEUE}/app: Read-only file system'")
    server.wait_until_succeeds(f"umount {QUEUE}")
    server.wait_until_succeeds("grep -x blocked-[0-9]* /etc/app")
    wait_until_at_rest(server, "app")
    check_deployed(server, "app")

with subtest("a path unit that has failed is armed again"):
    drop_in("ekiben-app.path", "[Path]", "TriggerLimitIntervalSec=3s", "TriggerLimitBurst=1")
    # a service that leaves the request there is triggered again at once
    drop_in("ekiben-app.service", "[Service]", "ExecStart=", f"ExecStart={server.succeed('readlink -f $(command -v true)').strip()}", "ExecStopPost=")
    server.succeed("systemctl reset-failed ekiben-app.path; systemctl restart ekiben-app.path")
    number = post()
    server.wait_until_succeeds("journalctl -q -o cat -u ekiben-app.path | grep -F trigger-limit-hit")
    undo("ekiben-app.service")
    wait_until_served(number)
    server.wait_until_succeeds("systemctl is-active ekiben-app.path")
    undo("ekiben-app.path")
    server.succeed("systemctl reset-failed ekiben-app.path; systemctl restart ekiben-app.path")
    wait_until_at_rest(server, "app")

with subtest("what a stage leaves behind, and ignores every signal, holds a run up for half a minute at most; its end has its time"):
    shell, ekiben = server.succeed("readlink -f $(command -v bash) $(command -v ekiben)").split()
    hangs = f"{shell} -c '(trap \"\" TERM; exec sleep infinity) & sleep infinity'"
    drop_in("ekiben-app.service", "[Service]", "ExecStart=", f"ExecStart=+{ekiben} begin app", f"ExecStart={hangs}", "TimeoutStopSec=3s")
    wait_in_stage("sleep infinity")
    server.succeed("systemctl stop ekiben-app.service", timeout=60)
    ended = last_run(server, "app")
    assert "signal TERM" in ended["error"] and server.execute("pgrep -x sleep")[0] == 1, ended
    # longer than that limit, the end waits for its turn
    wait_in_stage("sleep infinity")
    block()
    server.succeed("systemctl stop --no-block ekiben-app.service")
    server.wait_until_succeeds("systemctl show --property SubState --value ekiben-app.service | grep -x stop-post")
    client.wait_until_succeeds(f"test $(($(date +%s) - {int(client.succeed('date +%s'))})) -gt 5")
    assert server.get_unit_property("ekiben-app.service", "SubState") == "stop-post"
    unblock()
    wait_until_idle(server, "app")
    again = last_run(server, "app")
    assert "signal TERM" in again["error"] and again["id"] != ended["id"], again
    undo("ekiben-app.service")
