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
    server.succeed("mkdir -p -m 700 /run/ekiben; systemd-run --unit=holder flock /run/ekiben/turn $(command -v sleep) infinity")
    server.wait_until_fails("flock --nonblock /run/ekiben/turn true")


def unblock():
    server.succeed("systemctl stop holder")


def wait_for_stage(stage):
    server.wait_until_succeeds(f"ekiben status --json app | jq -e '.app.running.stage == \"{stage}\"'")


with subtest("300 requests, most of them during a run: all accepted, few runs, one of them after the last request"):
    block()
    first = post()
    wait_for_stage("prepare")
    client.succeed(f"seq 300 | xargs -P 20 -I@ sh -c {shlex.quote(POST)} > /tmp/answers")
    assert client.succeed("sort /tmp/answers | uniq -c").split() == ["300", "202", "0"], client.succeed("sort /tmp/answers | uniq -c")
    publish(server, "app", "2")
    last = post()
    assert last > first
    unblock()
    server.wait_until_succeeds(f"ekiben status --json app | jq -e '.app.served >= {last} and .app.running == null'")
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
        "mkdir app; chmod 0 app",
        "mkfifo app",
        "ln -s /etc/passwd app",
        "echo 1 > app; chmod 0 app",
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
        server.wait_until_succeeds(f"ekiben status --json app | jq -e '.app.served == {number}'")
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
        server.wait_until_succeeds(f"ekiben status --json app | jq -e '.app.served >= {number}'")
        wait_until_at_rest(server, "app")
