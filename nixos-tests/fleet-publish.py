start_all()
HOSTS = {"db": db, "plain": plain, "web": web}
DIRECTORY = "/var/lib/ekiben-hub"
POST = "curl -fsS -H 'Authorization: Bearer token-ci-0123456789' http://127.0.0.1:8787/ekiben"


def push(message, signed=True):
    """Commits what is in the developer's clone, and pushes it; returns the commit."""
    sign = "-c gpg.format=ssh -c user.signingkey=/home/deploy/committer" if signed else ""
    option = "-S" if signed else "--no-gpg-sign"
    return hub.succeed(as_deploy(f"cd /srv/work; git add --all; git {sign} commit -q {option} -m {shlex.quote(message)}; git push -q; "
                                 "git rev-parse HEAD")).strip()


def change(directory, trouble="none"):
    """Changes a host's configuration in the developer's clone; returns what its system says then."""
    content = str(next(COUNT_OF_CHANGES))
    for file, text in {"content": content, "trouble": trouble}.items():
        write(hub, f"/srv/work/hosts/{directory}/app/{file}", text)
    return content


def post():
    """Asks for a run as a forge does, and waits for its end; returns how it ended."""
    number = json.loads(hub.succeed(f"{POST} -X POST"))["request"]
    hub.wait_until_succeeds(knows("publish", f".served >= {number} and .running == null"))
    wait_until_idle(hub, "publish")
    return last_run(hub, "publish")


def numbers():
    """The number of the release that each host can fetch."""
    text = hub.succeed(f"for host in {' '.join(HOSTS)}; do jq -r .manifest {DIRECTORY}/hosts/$host/release/manifest.json; done")
    return {shown["host"]: shown["sequence"] for shown in map(json.loads, text.splitlines())}


def published():
    """All that must not change where nothing is published: the repository, and what hosts can fetch."""
    return hub.succeed(as_deploy(f"cd /srv/fleet; {DIGEST}")) + hub.succeed(f"cd {DIRECTORY}/hosts; find -path '*/release/*' -printf '%p %T@ %s\\n' | sort")


def fleet_head():
    return hub.succeed(as_deploy("git -C /srv/fleet rev-parse HEAD")).strip()


def check_shown(content):
    """Checks that each host, by its next poll, runs what its configuration says."""
    for name, machine in HOSTS.items():
        polled = poll(machine)
        assert polled["result"] in ("deployed", "unchanged"), polled
        becomes(hub, name, "up to date")
    assert {name: shows(machine, "app") for name, machine in HOSTS.items()} == content


with subtest("a fleet is set up, with an upstream"):
    settings = found_fleet(hub, {db: "db", plain: "plain", web: "web"})
    hub.succeed("install -m 600 /etc/scenario/signer /root/signer; rm /home/deploy/signer; "
                "install -m 600 -o deploy /etc/scenario/committer /home/deploy/committer")
    del settings["signingKey"]
    write(hub, "/srv/fleet/fleet.json", json.dumps(settings | {"groups": {"flakes": ["db", "web"]}}))
    hub.succeed("mkdir -p /srv/upstream.git /srv/work; chown deploy: /srv/upstream.git /srv/work")
    hub.succeed(as_deploy("git config --global user.name Deploy; git config --global user.email deploy@localhost"))
    for name in ("app", "other"):
        hub.succeed(as_deploy(f"git init -qb main /srv/{name}"))
        publish(hub, name, "1")
    write(hub, "/srv/fleet/hosts/db/flake.nix", f"{{ outputs = {{ self }}: {{ nixosConfigurations.db = {system('db')}; }}; }}")
    write(hub, "/srv/fleet/hosts/web/flake.nix", """{ inputs.elsewhere = { url = "git+file:///srv/app"; flake = false; };
        inputs.other = { url = "git+file:///srv/other"; flake = false; };
        outputs = { self, elsewhere, other }: {
            nixosConfigurations.web = import ./web/system.nix { name = "web"; app = ./app; inherit other; revision = "none"; };
        }; }""")
    write(hub, "/srv/fleet/hosts/plain/configuration.nix", f"({system('plain')}).module")
    hub.succeed(as_deploy("cd /srv/fleet/hosts/web; nix flake lock path:."))
    hub.succeed(as_deploy("""git init -q --bare --initial-branch=main /srv/upstream.git;
        cd /srv/fleet; git init -qb main; git add --all; git commit -qm initial;
        git remote add origin /srv/upstream.git; git push -qu origin main; git clone -q /srv/upstream.git /srv/work"""))
    content = {name: change(name) for name in HOSTS}

with subtest("what is pushed ends on all hosts"):
    commit = push("first")
    ended = post()
    assert (ended["result"], ended["commit"]) == ("deployed", commit), ended
    assert fleet_head() == commit and hub.succeed(as_deploy("git -C /srv/fleet status --porcelain; git -C /srv/fleet for-each-ref refs/ekiben")) == ""
    manifest = json.loads(json.loads(hub.succeed(f"cat {DIRECTORY}/hosts/web/release/manifest.json"))["manifest"])
    assert (manifest["commit"], manifest["summary"], manifest["dirty"]) == (commit, "first", False), manifest
    # where its inputs are
    for machine in HOSTS.values():
        pack = hub.succeed("tar -C /srv -cz app other | base64 -w0").strip()
        machine.succeed(f"base64 -d <<< {pack} | tar -C /srv -xz; chown -R ekiben-fleet /srv/app /srv/other")
    check_shown(content)

with subtest("nothing new: nothing is published, and no file changes"):
    before = published()
    ended = post()
    assert ended["result"] == "unchanged", ended
    assert published() == before

with subtest("a timer looks at all hosts, by a run: no look can tell that nothing is new"):
    for _ in range(2):
        known = last_run(hub, "publish")["id"]
        hub.execute("systemctl start ekiben-look@publish.service")
        hub.wait_until_succeeds(knows("publish", f'.runs[0].id != "{known}" and .running == null'), timeout=60)
        wait_until_idle(hub, "publish")
        ended = last_run(hub, "publish")
        assert (ended["result"], ended["by"]) == ("unchanged", ["timer"]), ended

with subtest("a host that does not build holds back itself only, and is named"):
    content |= {"db": change("db"), "plain": change("plain")}
    change("web", trouble="build")
    commit, before = push("web is broken"), numbers()
    ended = post()
    assert ended["result"] == "partly" and ended["stage"] == "publish" and "1 of 3 hosts" in ended["error"] and "web (" in ended["error"], ended
    after = numbers()
    assert after["web"] == before["web"] and after["db"] > before["db"] and after["plain"] > before["plain"], after
    assert fleet_head() == commit
    assert "partly" in hub.fail("ekiben status publish") and "partly" in hub.fail("ekiben trigger --wait publish 2>&1")
    assert json.loads(hub.succeed(POST))["last"]["result"] == "partly"
    # what goes well is not published again
    assert numbers() == after
    check_shown(content)

with subtest("a CI job waits for the hosts that it names, or for all, and fails when one of them does"):
    shown = json.loads(hub.succeed(f"systemctl start ekiben-hub-collect; {POST}"))["hosts"]
    assert {name: host["state"] for name, host in shown.items()} == {"db": "deployed", "plain": "deployed", "web": "failing"}, shown
    assert shown["db"]["release"] == numbers()["db"] and "trouble" not in json.dumps(shown), shown
    job = "env EKIBEN_TOKEN=token-ci-0123456789 EKIBEN_URL=http://127.0.0.1:8787/ekiben sh /etc/scenario/deploy.sh"
    content["db"] = change("db")
    push("for one host")
    for hosts in ("db", ""):
        hub.succeed(f"rm -f /tmp/ended; ({job} {hosts} > /tmp/said && echo 0 > /tmp/ended || echo $? > /tmp/ended) > /dev/null 2>&1 &")
        if hosts:
            hub.wait_until_succeeds("grep -x published /tmp/said")
            assert json.loads(hub.succeed(POST))["hosts"]["db"]["state"] == "published" and hub.execute("test -e /tmp/ended")[0] == 1
            assert poll(db)["result"] == "deployed"
            becomes(hub, "db", "up to date")
        hub.wait_until_succeeds("test -s /tmp/ended")
        assert hub.succeed("tail -n 1 /tmp/said; cat /tmp/ended").split() == (["deployed", "0"] if hosts else ["failing", "1"]), hub.succeed("cat /tmp/said")

with subtest("inputs are updated in one commit, those alone that may be, in whichever flake has them"):
    content["web"] = change("web")
    base = push("web is mended")
    for name in ("app", "other"):
        publish(hub, name, "2")
    pack = hub.succeed("tar -C /srv -cz app other | base64 -w0").strip()
    web.succeed(f"base64 -d <<< {pack} | tar -C /srv -xz; chown -R ekiben-fleet /srv/app /srv/other")
    ended = post()
    assert (ended["result"], ended["base"]) == ("deployed", base), ended
    changed = hub.succeed(as_deploy("cd /srv/fleet; git diff --stat=200 HEAD~ HEAD; git log -1 --format=%s%n%P; "
                                    "git diff HEAD~ HEAD | grep '^[+-] .*rev\"'")).strip()
    assert "hosts/web/flake.lock" in changed and "1 file changed" in changed and f"update other\n{base}" in changed, changed
    assert changed.count('"rev"') == 2, changed
    check_shown(content)
    assert shows(web, "other") == "2"

with subtest("a host that is left out is tried again, on top of inputs that were updated then, too"):
    def follow_inputs():
        """Goes on in the developer's clone from what was made here."""
        hub.succeed(as_deploy("cd /srv/work; git reset -q --hard; git fetch -q /srv/fleet main; git merge -q --ff-only FETCH_HEAD"))

    follow_inputs()
    publish(hub, "other", "3")
    pack = hub.succeed("tar -C /srv -cz app other | base64 -w0").strip()
    web.succeed(f"base64 -d <<< {pack} | tar -C /srv -xz; chown -R ekiben-fleet /srv/app /srv/other")
    change("db", trouble="build")
    base = push("db is broken")
    for _ in range(2):
        ended = post()
        assert ended["result"] == "partly" and "db (" in ended["error"], ended
        # nobody has signed that
        assert hub.succeed(as_deploy("git -C /srv/fleet log -1 --format='%P %G?'")).split() == [base, "N"]
    follow_inputs()
    content["db"] = change("db")
    commit = push("db is mended")
    assert (post()["result"], fleet_head()) == ("deployed", commit), last_run(hub, "publish")
    check_shown(content)

with subtest("a host whose build or evaluation does not come to its end holds back itself only"):
    hub.succeed("cp /etc/ekiben/config.json /tmp/config.json",
                "jq '.instances.publish.timeouts.build = 6' /tmp/config.json > /tmp/x; install -m 644 /tmp/x /etc/ekiben/config.json")
    content["web"] = change("web")
    change("db", trouble="build-hangs")
    endless = "builtins.foldl' (a: b: a + b) 0 (builtins.genList (_: builtins.length (builtins.genList (x: x) 1000000)) 1000000)"
    write(hub, "/srv/work/hosts/plain/configuration.nix", f"builtins.seq ({endless}) ({system('plain')}).module")
    push("db and plain hang")
    ended = post()
    assert ended["result"] == "partly" and "2 of 3 hosts" in ended["error"], ended
    for what in ("build db", "evaluate hosts/plain"):
        assert f"Failed to {what}: timed out after 6 s" in ended["error"], ended
    hub.succeed("install -m 444 /tmp/config.json /etc/ekiben/config.json")
    content |= {name: change(name) for name in ("db", "plain")}
    write(hub, "/srv/work/hosts/plain/configuration.nix", f"({system('plain')}).module")
    push("nothing hangs")
    assert post()["result"] == "deployed", last_run(hub, "publish")
    check_shown(content)

with subtest("who publishes by hand, and takes his time, is waited for: status says where to look"):
    content |= {"plain": change("plain")}
    push("waits for another")
    occupy(hub, f"{DIRECTORY}/received")
    hub.succeed(f"{POST} -X POST")
    unit = hub.wait_until_succeeds("{ ekiben status publish || true; } | grep -oP '^ +waiting +for \\K.*'").strip()
    hub.wait_until_succeeds(f"journalctl -o cat --unit {unit} | grep 'Another user is publishing; waiting'")
    hub.succeed("systemctl stop holder")
    wait_until_idle(hub, "publish")
    assert last_run(hub, "publish")["result"] == "deployed", last_run(hub, "publish")
    assert "waiting" not in hub.succeed("ekiben status publish")
    check_shown(content)

with subtest("what is cut off has published hosts wholly or not at all, and is completed by the next run"):
    for unit in ("ekiben-release-publish@*.service", "ekiben-publish.service"):
        content = {name: change(name) for name in HOSTS}
        commit, before, was = push("all change"), numbers(), fleet_head()
        # the second is published, and cannot be noted
        hub.succeed(f"flock {DIRECTORY}/received/plain sleep 1000 > /dev/null 2>&1 & echo $! > /tmp/holder")
        hub.succeed(f"{POST} -X POST")
        hub.wait_until_succeeds(f"jq -r .manifest {DIRECTORY}/hosts/plain/release/manifest.json | jq -e '.sequence > {before['plain']}'")
        hub.succeed(f"systemctl kill --kill-whom main --signal KILL '{unit}'")
        wait_until_idle(hub, "publish")
        ended = last_run(hub, "publish")
        assert ended["result"] == "failed" and ended["stage"] == "publish" and fleet_head() == was, ended
        assert hub.succeed("systemctl list-units --all --plain --no-legend 'ekiben-release-publish@*'").strip() == ""
        hub.succeed("pkill -P $(cat /tmp/holder); kill $(cat /tmp/holder) || true")
        after = numbers()
        assert after["web"] == before["web"] and after["db"] > before["db"], after
        ended = post()
        assert ended["result"] == "deployed" and fleet_head() == commit, ended
        assert (found := numbers()) | {"web": 0} == after | {"web": 0} and found["web"] > before["web"], found
    check_shown(content)

with subtest("what nobody has signed who may, changes nothing"):
    change("db")
    push("not signed", signed=False)
    before = published()
    ended = post()
    assert ended["result"] == "failed" and ended["stage"] == "prepare" and "not signed" in ended["error"], ended
    assert published() == before
    # another's later signature is for all
    write(hub, "/srv/work/note", "reviewed")
    commit = push("signed")
    content["db"] = hub.succeed("cat /srv/work/hosts/db/app/content").strip()
    assert post()["commit"] == commit

with subtest("what no host can be found in fails, and changes nothing"):
    write(hub, "/srv/work/fleet.json", "no JSON")
    push("no settings")
    before = published()
    ended = post()
    assert ended["result"] == "failed" and "fleet.json" in ended["error"], ended
    assert published() == before
    # nor does the repository say how nix is called here, or where releases go
    write(hub, "/srv/work/fleet.json", json.dumps(settings | {"flags": ["--no-such-flag"], "signingKey": "/root/signer", "directory": "/srv/elsewhere"}))
    content["web"] = change("web")
    commit = push("settings of its own")
    ended = post()
    assert (ended["result"], ended["commit"]) == ("deployed", commit), ended
    assert "flags of fleet.json do not count" in hub.succeed("ekiben log publish")
    # for those who look at the fleet by hand
    write(hub, "/srv/work/fleet.json", json.dumps(settings))
    push("settings as before")
    assert post()["result"] == "deployed"

with subtest("a hold holds, and what was asked for is published when it ends"):
    hub.succeed("ekiben hold publish 1h --reason maintenance")
    content["db"] = change("db")
    commit, before = push("held"), published()
    hub.succeed(f"{POST} -X POST")
    wait_until_idle(hub, "publish")
    assert published() == before
    hub.succeed("ekiben resume publish")
    hub.wait_until_succeeds(knows("publish", f'.deployed.commit == "{commit}" and .running == null'))

with subtest("what is published is not rolled back here"):
    before = published()
    assert "revert the commit" in hub.fail("ekiben rollback publish 2>&1")
    assert published() == before

with subtest("what somebody has published by hand, and not pushed, is lost, and the run says so"):
    change("db")
    hub.succeed(as_deploy("cd /srv/work; git add --all; git commit -q --no-gpg-sign -m 'by hand'; ekiben fleet deploy --unsigned db; "
                          "git reset -q --hard HEAD^"))
    content["db"] = change("db")
    push("without what was done by hand")
    ended = post()
    assert ended["result"] == "deployed" and len(ended["warnings"]) == 1, ended
    assert ended["warnings"][0].startswith("1 host loses what has been published, last "), ended
    content["web"] = change("web")
    push("the next")
    assert (ended := post())["result"] == "deployed" and ended["warnings"] == [], ended

with subtest("your edits stay yours, and are not published"):
    write(hub, "/srv/fleet/hosts/db/app/content", "an edit")
    content["web"] = change("web")
    push("beside an edit")
    assert post()["result"] == "deployed"
    check_shown(content)
    assert hub.succeed("cat /srv/fleet/hosts/db/app/content") == "an edit"
    change("db")
    push("where the edit is")
    before = published()
    ended = post()
    assert ended["result"] == "failed" and published() == before, ended
    hub.succeed(as_deploy("git -C /srv/fleet checkout -q ."))

with subtest("the key is there for the unit that publishes, and for nothing that evaluates or builds"):
    # what is evaluated tells what it sees of the machine
    write(hub, "/srv/work/hosts/plain/configuration.nix",
          f"builtins.trace \"seen: ${{toString (builtins.attrNames (builtins.readDir /run))}}\" ({system('plain')}).module")
    content = {name: change(name) for name in HOSTS}
    push("a spy")
    hub.succeed(f"flock {DIRECTORY}/received/plain sleep 1000 > /dev/null 2>&1 & echo $! > /tmp/holder")
    hub.succeed(f"{POST} -X POST")
    key = "/run/credentials/ekiben-release-publish@*.service/signing-key"
    hub.wait_until_succeeds(f"cat {key} | cmp - /root/signer")
    # a program of the repository's, in the place of those that evaluate and build, while the key is there
    hub.succeed(
        "sed '/^ExecStart=/d; /^ExecStopPost=/d; /^StateDirectory=/d; "
        "/^CacheDirectory=/d' /etc/systemd/system/ekiben-publish.service > /run/systemd/system/ekiben-spy.service",
        "mkdir /run/systemd/system/ekiben-spy.service.d; "
        "echo \"[Service]\nExecStart=/bin/sh -c 'cat /run/credentials/*/*; cat /root/signer; "
        "cat /proc/*/root/run/credentials/*/*; ls -d /run/*; id -un; true'\" > /run/systemd/system/ekiben-spy.service.d/spy.conf",
        "systemctl daemon-reload; systemctl start ekiben-spy.service; journalctl --sync",
    )
    said = hub.succeed("journalctl -q -u ekiben-spy -o cat")
    assert "/run/systemd" in said and "deploy" in said and "PRIVATE KEY" not in said and "\n/run/credentials\n" not in said, said
    hub.succeed("pkill -P $(cat /tmp/holder); kill $(cat /tmp/holder) || true")
    wait_until_at_rest(hub, "publish")
    assert (found := last_run(hub, "publish"))["result"] == "deployed", found
    seen = hub.succeed("cat /var/lib/ekiben/instances/publish/ekiben/logs/plain.log")
    assert "seen: " in seen and "credentials" not in seen, seen
    # nor does the unit that has it run anything of the repository's, or reach anybody
    unit = hub.succeed("systemctl cat ekiben-release-publish@x.service")
    assert "PrivateNetwork=true" in unit and "User=deploy" in unit, unit
