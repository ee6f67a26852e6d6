import textwrap
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

with subtest("the state is that of the token's instance, and tells how it is, not why"):
    state = json.loads(client.succeed(f"curl -fsS {token('app')} {URL}"))
    assert sorted(state) == ["bad", "hold", "last", "queued", "running", "runs", "served"], state
    assert state["last"]["result"] == "deployed" and state["last"]["commit"] == head(server), state
    assert (state["queued"], state["running"]) == (False, None), state
    assert json.loads(client.succeed(f"curl -fsS {token('other')} {URL}"))["served"] < state["served"]
    assert post("-X GET") == post("-X GET -H 'Authorization: Bearer token-app-0123456780'") == "401"

with subtest("a token is changed without losing a request"):
    client.succeed(f"for i in $(seq 200); do curl -s -o /dev/null -w '%{{http_code}} %{{exitcode}}\n' -X POST {token('next')} {URL}; "
                   "done > /tmp/codes & echo $! > /tmp/stream")
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
        server.wait_until_succeeds("systemctl --failed --no-legend | grep -w ekiben-webhook-tokens.service", timeout=30)
        server.succeed(f"journalctl -u ekiben-webhook-tokens -o cat | grep -F {shlex.quote(message)}")
        assert "ekiben-webhook-tokens.service has failed" in server.fail("ekiben status")
        assert not token_text or token_text not in server.succeed("journalctl -o cat -u 'ekiben-webhook*'")
        assert post(token("app")) == "202" and post(token("ci")) == post(f"-H 'Authorization: Bearer {token_text or 'x'}'") == "503"
        assert post() == "401"
    server.succeed(f"umount {file}; systemctl restart ekiben-webhook.service")
    assert post(token("ci")) == post(token("other")) == "202"
    server.wait_until_succeeds("systemctl show --property ActiveState --value ekiben-webhook-tokens | grep -x inactive")
    assert "ci" not in server.get_unit_property("ekiben-webhook.service", "StatusText")

if is_host(server):
    with subtest("a token that is missing is said once, and counts a second after it has come"):
        began = server.succeed("date +%s.%N").strip()
        server.succeed(f"mv {file} /tmp/away; systemctl restart ekiben-webhook.service")
        server.wait_until_succeeds("systemctl is-failed ekiben-webhook-tokens.service", timeout=10)
        assert post(token("app")) == "202" and post(token("ci")) == "503"
        assert "project ci from /etc/scenario/token-ci: missing" in server.get_unit_property("ekiben-webhook.service", "StatusText")
        before = server.get_unit_property("ekiben-webhook.service", "NRestarts")
        time.sleep(5)
        assert server.get_unit_property("ekiben-webhook.service", "NRestarts") == before
        complaints = server.succeed(f"journalctl -q -o cat -u 'ekiben-webhook*' --since @{began} | "
                                    "grep 'Failed to read the token'").splitlines()
        # by hand, and by what watches the file
        assert len(complaints) <= 2, complaints
        server.succeed(f"mv /tmp/away {file}")
        client.wait_until_succeeds(f"curl -fsS -X POST {token('ci')} {URL}", timeout=3)
        server.wait_until_fails("systemctl is-failed ekiben-webhook-tokens.service", timeout=3)

with subtest("who may not trigger a run is told who may, and who says nothing how to"):
    for command in ("ekiben trigger app", "ekiben trigger --wait app", "JOURNAL_STREAM=8:1 ekiben trigger app"):
        said = server.fail(as_deploy(f"{command} 2>&1"))
        assert said == "error: Failed to trigger app: only root and members of the group ekiben may.\n", said
    # as cargo and others do it
    assert server.succeed("ekiben") == server.succeed("ekiben --help")
    assert server.succeed("ekiben fleet") == server.succeed("ekiben fleet --help")

if is_host(server):
    drop_in = "/run/systemd/system/ekiben-app.service.d"

    def fails_with(problem, instance="app"):
        """Checks that status fails for this reason, and not for an instance that is well."""
        shown = json.loads(server.succeed(f"ekiben status --json {instance}"))[instance]
        assert not shown["well"] and [problem in what for what in shown["problems"]] == [True], shown
        assert problem in server.fail(f"ekiben status {instance}") and f"{instance}: {problem}" in server.fail("ekiben status")
        server.succeed("ekiben status other")

    with subtest("status fails if an instance is not well, and says why"):
        wait_until_at_rest(server, "app")
        assert "app: idle" in server.succeed("ekiben status app") and "app" in server.succeed("ekiben status", as_deploy("ekiben status"))
        assert json.loads(server.succeed("ekiben status --json"))["app"]["well"]
        deploy(server, "echo '# edited' >> flake.lock")
        assert run(server, "app")["result"] == "failed"
        for command in ("ekiben status", "ekiben status app", as_deploy("ekiben status")):
            server.fail(command)
        assert json.loads(server.succeed("ekiben status --json"))["app"]["well"] is False
        server.succeed("ekiben status other")
        deploy(server, "git checkout -q flake.lock")
        assert run(server, "app")["result"] in ("deployed", "unchanged")
        server.succeed("ekiben status")
        # a run that cannot even say that it has failed
        server.succeed(f"mkdir -p {drop_in}; printf '%s\\n' [Service] ExecStart= ExecStart=false ExecStopPost= > {drop_in}/odd.conf; "
                       "systemctl daemon-reload")
        server.fail("systemctl start ekiben-app")
        fails_with("ekiben-app.service has failed; see systemctl status ekiben-app.service")
        server.succeed(f"rm -r {drop_in}; systemctl daemon-reload; systemctl reset-failed ekiben-app; ekiben status")
        # a request that nobody serves
        server.succeed("systemctl stop ekiben-app.path; ekiben trigger app; ekiben status")
        server.succeed("touch -d '5 minutes ago' /var/lib/ekiben/queue/app")
        fails_with("no run takes the request of 5 min ago; run systemctl restart ekiben-app.path")
        server.succeed("systemctl restart ekiben-app.path")
        wait_until_at_rest(server, "app")
        server.succeed("ekiben status")
        # a timer that starts nothing
        timer = "/run/systemd/system/ekiben-app.timer"
        server.succeed(f"printf '[Timer]\\nOnCalendar=2020-01-01\\n' > {timer}; systemctl daemon-reload")
        fails_with("ekiben-app.timer is not active; run systemctl start ekiben-app.timer")
        server.succeed("systemctl start ekiben-app.timer")
        fails_with("ekiben-app.timer will not elapse again")
        server.succeed(f"systemctl stop ekiben-app.timer; rm {timer}; systemctl daemon-reload; ekiben status")

    with subtest("what the unit needs is gone: said, tried again, not over and over, and served when it is there again"):
        for what, removed, restored in (
            ("user, or a group of that, does not exist", "cp /etc/passwd /tmp/passwd; sed -i /^deploy:/d /etc/passwd", "cat /tmp/passwd > /etc/passwd"),
            (
                "the run could not begin; for the reason, see ekiben log app",
                f"mkdir -p {drop_in}; printf '[Service]\nBindReadOnlyPaths=/nowhere\n' > {drop_in}/x.conf; systemctl daemon-reload",
                f"rm -r {drop_in}; systemctl daemon-reload",
            ),
        ):
            content = f"gone-{len(what)}"
            publish(server, "app", content)
            server.succeed(removed)
            began = server.succeed("date +%s.%N").strip()
            server.succeed("ekiben trigger app")
            server.wait_until_succeeds(knows("app", f'.runs[0].error // "" | contains("{what}")'), timeout=30)
            server.fail("ekiben status")
            assert int(server.succeed(f"journalctl -q -o cat -u ekiben-app --since @{began} | grep -c ^Starting")) <= 3
            server.succeed(restored)
            server.wait_until_succeeds(f"grep -x {content} /etc/app", timeout=60)
            wait_until_at_rest(server, "app")
            check_deployed(server, "app")

    def typed(start, page="README.md"):
        """What a page has one type, from `start` to the end of the block."""
        text = (globals()["PROJECT"] / page).read_text()
        return textwrap.dedent(start + text.split(start)[1].split("```")[0])

    CI = {
        "GitHub and Forgejo": typed("    printf 'Authorization: Bearer %s' \"$TOKEN\" |"),
        "GitLab": typed("      printf 'Authorization: Bearer %s' \"$EKIBEN_TOKEN\" |", "src/webhook/README.md"),
        "cron": typed("tr -d '\\r\\n' < /etc/ekiben-header |", "src/webhook/README.md"),
        "a job that waits": typed("ask() {", "src/webhook/README.md"),
    }

    def ci(name, secret_ends, url=URL, limits="--max-time 30 --retry 5"):
        """Prepares what the pages have CI do; returns the command that does it."""
        script = CI[name].replace("https://deploy.example.org/ekiben", url).replace("--max-time 30 --retry 5", limits).replace("sleep 5", "sleep 1")
        secret = f"token-app-0123456789{secret_ends}"
        variables = f"export URL={url} TOKEN=$'{secret}' EKIBEN_TOKEN=$'{secret}'"
        client.succeed(f"printf 'Authorization: Bearer {secret}' > /etc/ekiben-header; "
                       f"echo {shlex.quote(variables)} > /tmp/variables; printf %s {shlex.quote(script)} > /tmp/script")
        return "(. /tmp/variables; sh -e /tmp/script)"

    with subtest("the pages' lines for CI work with a secret that ends in a line break"):
        for name in CI:
            for secret_ends in ("", "\\n", "\\r\\n"):
                said = client.succeed(ci(name, secret_ends)).strip()
                assert said == "true" if name == "a job that waits" else json.loads(said)["request"] > 0, (name, secret_ends, said)

    with subtest("a job of CI that waits for the outcome fails if the deployment did"):
        for content, trouble, ends in (("by CI", "none", client.succeed), ("by CI", "none", client.succeed),
                                       ("not built", "build", client.fail), ("mended", "none", client.succeed)):
            if shows(server, "app") != content:
                publish(server, "app", shlex.quote(content), trouble=trouble)
            ends(ci("a job that waits", "\\n"))
            assert trouble != "none" or shows(server, "app") == content
        # whatever another run has come to before it looks
        publish(server, "app", "theirs")
        command = ci("a job that waits", "")
        client.succeed("sed -i 's/^while /touch \\/tmp\\/asked; until [ -e \\/tmp\\/look ]; do sleep 1; done; &/' /tmp/script; rm -f /tmp/asked /tmp/look",
                       f"systemd-run --unit=job --remain-after-exit bash -c {shlex.quote(command)}")
        client.wait_for_file("/tmp/asked")
        wait_until_at_rest(server, "app")
        publish(server, "app", "of-others", trouble="build")
        assert run(server, "app")["result"] == "failed"
        client.succeed("touch /tmp/look")
        client.wait_until_succeeds("systemctl show --property SubState --value job | grep -x exited", timeout=60)
        publish(server, "app", "ours")
        assert run(server, "app")["result"] == "deployed", last_run(server, "app")

    with subtest("the pages' lines for CI do not wait for ever, and show the token to nobody"):
        # accepts connections, and says nothing
        client.succeed("systemd-run -q python3 -c 'import socket, time; s = socket.create_server((\"\", 8788)); time.sleep(3600)'")
        client.wait_for_open_port(8788)
        for name in CI:
            command = ci(name, "\\n", "http://localhost:8788/ekiben", "--max-time 3 --retry 0")
            client.succeed(f"{command} 2> /tmp/said & until pgrep -x curl; do :; done; ! grep -l token-app /proc/[0-9]*/cmdline; "
                           "! wait $!; grep 'timed out' /tmp/said")

    with subtest("a machine is set up, and its configuration changed, by the README's commands in their order"):
        wait_until_at_rest(server, "app")
        REMOTE = "/srv/my-config.git"
        # the machine as it was before: its configuration is root's, and there is no user
        server.succeed(
            f"install -d -o deploy {REMOTE}", as_deploy(
                f"git clone -q --bare {REPOSITORY} {REMOTE}; for input in app other; "
                "do cat ~/.gitconfig >> /srv/$input/.git/config; done; rm ~/.gitconfig"),
            f"mv {REPOSITORY} /root/my-config; chown -R root: /root/my-config; userdel deploy; rm -rf /var/lib/ekiben/status/*",
            # the inputs happen to be on this machine, too
            "for input in app other; do git config --global --add safe.directory /srv/$input; done",
        )
        # as those of NixOS: it makes the users, too
        program = f"""#!/bin/sh -e
            test "$*" = "switch --flake ."; test "$(id -u)" = 0
            systemd-sysusers
            system=$(nix build --no-link --print-out-paths .#nixosConfigurations.server.config.system.build.toplevel)
            nix-env --profile {PROFILE} --set $system
            exec $system/bin/switch-to-configuration switch
        """
        server.succeed(f"printf %s {shlex.quote(program)} > /usr/local/bin/nixos-rebuild; chmod +x /usr/local/bin/nixos-rebuild")
        sudo = 'sudo() { if [ "$1" = -u ]; then runuser -u "$2" -- env HOME="/home/$2" "${@:3}"; else "$@"; fi; }; '

        def type_in(commands, directory="/root/my-config"):
            commands = commands.replace("https://git.example.org/my-config", REMOTE).replace("--wait web", "--wait app")
            return server.succeed(f"{sudo} cd {directory}; {commands}")

        said = type_in(typed("head -c 32 /dev/urandom"))
        assert "The run ended: deployed." in said, said
        check_deployed(server, "app")
        # the token is one
        server.succeed(f"mv {server.succeed('readlink -f /etc/scenario/token-app').strip()} /tmp/away; "
                       "ln -s /root/token /etc/scenario/token-app")
        NEW = server.succeed("cat /root/token").strip()
        client.wait_until_succeeds(f"curl -fsS -X POST -H 'Authorization: Bearer {NEW}' {URL}", timeout=10)
        wait_until_at_rest(server, "app")
        # beside a commit of Ekiben's own
        publish(server, "app", "newer")
        assert run(server, "app")["result"] == "deployed"
        clone = "cd /tmp; git -c safe.directory='*' clone -q /srv/my-config.git mine; cd mine"
        server.succeed(as_deploy(f"{clone}; echo hello > greeting; git add .; "
                                 "git -c user.name=me -c user.email=me@localhost commit -qm greeting; git push -q"))
        said = type_in(typed("sudo -u deploy git -C /var/nixos-config pull"), "/")
        assert "The run ended: deployed." in said, said
        check_deployed(server, "app")
        assert deploy(server, "cat greeting") == "hello" and shows(server, "app") == "newer"

    with subtest("what Ekiben remembers is lost: no harm, whoever asks then"):
        server.succeed("rm -f /etc/scenario/token-app; mv /tmp/away /etc/scenario/token-app")
        for number, ask in enumerate(("ekiben trigger --wait app", "systemctl start ekiben-app", "reboot", "during")):
            wait_until_at_rest(server, "app")
            publish(server, "app", f"lost-{number}")
            before = what_stays(server)
            if ask == "during":
                occupy(server, "/run/ekiben/turn")
                server.succeed("systemctl start --no-block ekiben-app")
                server.wait_until_succeeds(knows("app", '.running.stage == "activate"'))
            # the webhook may just be starting
            server.wait_until_succeeds("rm -rf /var/lib/ekiben /var/cache/ekiben")
            if ask == "during":
                server.succeed("systemctl stop holder")
                wait_until_idle(server, "app")
                server.require_unit_state("ekiben-app.service", "failed")
                assert "ekiben-app.service has failed" in server.fail("ekiben status app")
                ask = "ekiben trigger --wait app"
            else:
                assert "app: idle" in server.succeed("ekiben status app")
                server.succeed("ekiben status --json")
            assert not differences(before, what_stays(server)), (ask, differences(before, what_stays(server)))
            if ask == "reboot":
                server.crash()
                server.start()
                server.wait_for_open_port(8787)
                server.wait_for_unit("multi-user.target")
            else:
                server.succeed(ask)
            # the webhook, too, is as it was
            client.wait_until_succeeds(f"curl -fsS -X POST {token('app')} {URL}", timeout=10)
            wait_until_at_rest(server, "app")
            check_deployed(server, "app")
            assert shows(server, "app") == f"lost-{number}"

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
        # said by a process of systemd's that lives too briefly for the journal to know its unit
        refused = "ekiben-webhook.socket: Failed to create listening socket .*: Address already in use"
        server.succeed(f"journalctl --sync; journalctl -b -o cat | grep '{refused}'")
        server.wait_until_succeeds("systemctl is-failed ekiben-webhook.socket")
        server.succeed("systemctl stop scenario-busy")
        server.wait_until_succeeds("systemctl is-active ekiben-webhook.socket")
        assert post(token("app")) == "202"
        wait_until_at_rest(server, "app")
