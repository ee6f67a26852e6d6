import time

start_all()
install(server)
server.wait_for_open_port(8787)
URL = "http://server:8787/ekiben"


def post(arguments="", url=URL):
    """Sends a request from the client; returns the status of the answer."""
    return client.succeed(f"curl -s -o /tmp/answer -D /tmp/head -w '%{{http_code}}' -X POST {arguments} {url}").strip()


def token(name, scheme="Bearer"):
    return f"-H 'Authorization: {scheme} token-{name}-0123456789'"


def header(name):
    return client.succeed(f"grep -i '^{name}:' /tmp/head").split(":", 1)[1].strip()


with subtest("a token starts its own instance and no other"):
    publish(server, "app", "2")
    publish(server, "other", "2")
    before = head(server)
    assert post(token("app")) == "202"
    assert json.loads(client.succeed("cat /tmp/answer"))["request"] > 0
    wait_for_run(server, "app", 0)
    check_deployed(server, "app")
    assert (shows(server, "app"), shows(server, "other")) == ("2", "1")
    assert runs(server, "other") == 0
    assert deploy(server, "git rev-parse HEAD^") == before

with subtest("the commit says what was updated"):
    revision = server.succeed(as_deploy("git -C /srv/app rev-parse HEAD")).strip()
    old = server.succeed(as_deploy("git -C /srv/app rev-parse HEAD^")).strip()
    assert deploy(server, "git log -1 --format=%B") == f"flake.lock: update app\n\napp: {old} -> {revision}"
    assert deploy(server, "git log -1 --format='%an <%ae>, %cn'") == "ekiben <ekiben@server>, ekiben"
    assert deploy(server, "git diff --name-only HEAD^") == "flake.lock"

with subtest("another project's token may start the same instance, another's another"):
    publish(server, "app", "3")
    assert post(token("ci")) == "202"
    wait_for_run(server, "app", 1)
    check_deployed(server, "app")
    assert (shows(server, "app"), shows(server, "other")) == ("3", "1")
    assert post(token("other")) == "202"
    wait_for_run(server, "other", 0)
    check_deployed(server, "other")
    assert (shows(server, "app"), shows(server, "other")) == ("3", "2")

with subtest("nothing new: nothing done"):
    before = (digest(server), generation(server))
    assert post(token("app")) == "202"
    assert wait_for_run(server, "app", 2)["result"] == "unchanged"
    assert (digest(server), generation(server)) == before

with subtest("the scheme is matched without regard to case"):
    assert post(token("app", "bearer")) == "202"
    wait_for_run(server, "app", 3)

with subtest("a request says nothing but that it is one"):
    assert post(token("app") + """ -d '{"instance": "other", "ref": "refs/heads/other"}'""", f"'{URL}?instance=other'") == "202"
    wait_for_run(server, "app", 4)
    # a forge's payload, with or without waiting for leave to send it; what a proxy adds; GitLab's own header
    client.succeed("head -c 33554432 /dev/zero > /tmp/most; echo | cat /tmp/most - > /tmp/more")
    for arguments in (f"-H Expect: --data-binary @/tmp/most {token('app')}", f"--data-binary @/tmp/most {token('app')}",
                      f"-H $'X-City: K\\xc3\\xb6ln\\tS\\xfcd' {token('app')}", "-H 'X-Gitlab-Token: token-app-0123456789'",
                      "-u proxy:word -H 'X-Gitlab-Token: token-app-0123456789'"):
        assert post(arguments) == "202", arguments
    wait_for_run(server, "app", 5)
    assert runs(server, "other") == 1

with subtest("everything else gets its answer, and nothing runs"):
    publish(server, "app", "4")
    publish(server, "other", "4")
    before = (digest(server), generation(server), runs(server, "app"), runs(server, "other"))
    for arguments in ("", "-H 'Authorization: Bearer token-app-0123456780'", "-H 'Authorization: Bearer '",
                      "-H 'Authorization: Basic dG9rZW4tYXBwLTAxMjM0NTY3ODk6'", token("app", "Basic"),
                      "-H 'Authorization: token-app-0123456789'", "-H 'X-Token: token-app-0123456789'",
                      "-H 'X-Gitlab-Token: token-app-0123456780'", "-H 'X-Gitlab-Token: Bearer token-app-0123456789'"):
        assert post(arguments) == "401", arguments
        assert header("WWW-Authenticate") == "Bearer"
        client.fail(f"curl -fsS -X POST {arguments} {URL}")
    for path in ("/", "/ekiben/", "/Ekiben", "/ekiben/app", "/status", "/ekiben%2f"):
        assert post(token("app"), f"http://server:8787{path}") == "404", path
    for method in ("PUT", "DELETE", "OPTIONS"):
        assert post(f"-X {method} {token('app')}") == "405", method
        assert header("Allow") == "GET, POST"
    assert post(token("app") + " -H Expect: --data-binary @/tmp/more") == "413"
    assert post(f"{token('app')} -H \"X-Long: $(head -c 9000 /dev/zero | tr '\\0' x)\"") == "431"
    assert post("-H $'Authorization: Bearer token-app-0123456789\\xc3\\xb6'") == "400"
    assert post(token("app") + " -H 'Transfer-Encoding: chunked' -d x") == "411"
    assert (digest(server), generation(server), runs(server, "app"), runs(server, "other")) == before
    assert server.succeed("ls -A /var/lib/ekiben/queue") == ""

with subtest("a request that cannot be written is refused"):
    server.succeed("mount --bind -o ro /var/lib/ekiben/queue /var/lib/ekiben/queue; systemctl restart ekiben-webhook")
    assert post(token("app")) == "503"
    server.succeed("umount /var/lib/ekiben/queue; systemctl restart ekiben-webhook")
    client.succeed(f"curl -fsS -X POST {token('app')} {URL}")
    wait_for_run(server, "app", 6)
    check_deployed(server, "app")
    assert (shows(server, "app"), shows(server, "other")) == ("4", "2")

with subtest("a client can wait for the outcome, and fail if the deployment did"):
    # as in the README
    job = r"""
        ask() { printf 'header = "Authorization: Bearer %s"' "$TOKEN" | curl -fsS -K - "$@" "$URL"; }
        number=$(ask -X POST | jq .request)
        until state=$(ask) && echo "$state" | jq -e ".served >= $number" > /dev/null; do sleep 1; done
        echo "$state" | jq -e '.last.result == "deployed" or .last.result == "unchanged"'
    """
    job = f"URL={URL} TOKEN=token-ci-0123456789; {job}"
    publish(server, "app", "5")
    client.succeed(job)
    check_deployed(server, "app")
    client.succeed(job)
    publish(server, "app", "6", trouble="build")
    client.fail(job)
    publish(server, "app", "7")
    client.succeed(job)
    wait_until_idle(server, "app")

with subtest("the state is that of the token's instance, and tells how it is, not why"):
    state = json.loads(client.succeed(f"curl -fsS {token('app')} {URL}"))
    assert sorted(state) == ["bad", "last", "queued", "running", "served"], state
    assert state["last"]["result"] == "deployed" and state["last"]["commit"] == head(server), state
    assert (state["queued"], state["running"]) == (False, None), state
    assert json.loads(client.succeed(f"curl -fsS {token('other')} {URL}"))["served"] < state["served"]
    assert post("-X GET") == post("-X GET -H 'Authorization: Bearer token-app-0123456780'") == "401"

with subtest("a token is changed without losing a request"):
    client.succeed(f"for i in $(seq 200); do curl -s -o /dev/null -w '%{{http_code}} %{{exitcode}}\n' -X POST {token('next')} {URL}; done > /tmp/codes & echo $! > /tmp/stream")
    server.succeed("echo token-new-0123456789 > /tmp/new; mount --bind /tmp/new $(readlink -f /etc/scenario/token-app)")
    assert post(token("app")) == post(token("next")) == "202"
    server.succeed("systemctl restart ekiben-webhook.service")
    assert post(token("new")) == post(token("next")) == "202"
    assert post(token("app")) == "401"
    client.wait_until_succeeds("test $(wc -l < /tmp/codes) = 200")
    assert client.succeed("sort /tmp/codes | uniq -c | tr -s ' '").strip() == "200 202 0"
    server.succeed("umount /tmp/new || umount $(readlink -f /etc/scenario/token-app); systemctl restart ekiben-webhook.service")
    server.wait_until_succeeds("test ! -e /var/lib/ekiben/queue/app")
    wait_until_idle(server, "app")
    assert post(token("app")) == "202"

with subtest("a token that is not fit for use harms no other project, and its own is answered at once"):
    file = server.succeed("readlink -f /etc/scenario/token-ci").strip()
    server.succeed(f"touch /tmp/token; mount --bind /tmp/token {file}")
    for token_text, message in (
        ("", "the token of project ci from /etc/scenario/token-ci: missing or empty"),
        ("0123456789abcde", "the token of project ci from /etc/scenario/token-ci: shorter than 16 characters"),
        ("0123456789 abcdef", "the token of project ci from /etc/scenario/token-ci: contains characters other than letters"),
        ("token-other-0123456789", "tell projects ci and other apart: they have the same token"),
    ):
        server.succeed(f"echo '{token_text}' > /tmp/token; systemctl restart ekiben-webhook.service")
        assert message in server.get_unit_property("ekiben-webhook.service", "StatusText")
        server.succeed(f"journalctl -u ekiben-webhook -o cat | grep -F {shlex.quote(message)}")
        assert not token_text or token_text not in server.succeed("journalctl -o cat -u ekiben-webhook")
        assert post(token("app")) == "202" and post(token("ci")) == post(f"-H 'Authorization: Bearer {token_text or 'x'}'") == "503"
        assert post() == "401"
    server.succeed(f"umount {file}; systemctl restart ekiben-webhook.service")
    assert post(token("ci")) == post(token("other")) == "202"
    assert "ci" not in server.get_unit_property("ekiben-webhook.service", "StatusText")

if is_host(server):
    with subtest("a token that is missing is said once, and counts a second after it has come"):
        server.succeed(f"mv {file} /tmp/away; systemctl restart ekiben-webhook.service")
        assert post(token("app")) == "202" and post(token("ci")) == "503"
        assert "project ci from /etc/scenario/token-ci: missing" in server.get_unit_property("ekiben-webhook.service", "StatusText")
        began = server.succeed("date +%s.%N").strip()
        before = server.get_unit_property("ekiben-webhook.service", "NRestarts")
        time.sleep(5)
        assert server.get_unit_property("ekiben-webhook.service", "NRestarts") == before
        assert "token" not in server.succeed(f"journalctl -q -o cat -u ekiben-webhook --since @{began}")
        server.succeed(f"mv /tmp/away {file}")
        client.wait_until_succeeds(f"curl -fsS -X POST {token('ci')} {URL}", timeout=3)

wait_until_at_rest(server, "app")
server.fail("journalctl -o cat -u ekiben-webhook -u ekiben-app | grep -F token-app-0123456789")

if is_host(server):
    with subtest("an address that another program has is said, and served as soon as that is gone"):
        server.succeed(
            "systemctl stop ekiben-webhook.socket ekiben-webhook.service",
            "systemd-run --quiet --unit=scenario-busy python3 -m http.server 8787",
        )
        server.wait_for_open_port(8787)
        server.fail("systemctl start ekiben-webhook.socket")
        server.succeed("journalctl --sync; journalctl -u ekiben-webhook.socket -n 5 -o cat | grep -F 'Address already in use'")
        server.wait_until_succeeds("systemctl is-failed ekiben-webhook.socket")
        server.succeed("systemctl stop scenario-busy")
        server.wait_until_succeeds("systemctl is-active ekiben-webhook.socket")
        assert post(token("app")) == "202"
        wait_until_at_rest(server, "app")
