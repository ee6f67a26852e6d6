start_all()
HOSTS = {"db": db, "plain": plain, "web": web}

with subtest("a fleet is set up"):
    settings = found_fleet(hub, {web: "web", db: "pair", plain: "plain"})
    write(hub, "/srv/fleet/hosts/web/flake.nix", f"{{ outputs = {{ self }}: {{ nixosConfigurations.web = {system('web')}; }}; }}")
    write(hub, "/srv/fleet/hosts/pair/flake.nix", f"{{ outputs = {{ self }}: {{ nixosConfigurations = {{ db = {system('db')}; db2 = {system('db')}; }}; }}; }}")
    write(hub, "/srv/fleet/hosts/plain/configuration.nix", f"({system('plain')}).module")
    assert (seen := states(hub)) == {"db": "not deployed", "db2": "no key on the hub", "plain": "not deployed", "web": "not deployed"}, seen
    code, said = hub.execute(fleet("status --once"))
    assert code == 4 and said.startswith("4 hosts: 1 no key on the hub; 3 not deployed\n"), said

with subtest("what is published for nobody is said, the others are published"):
    said = hub.fail(fleet("deploy"))
    assert "services.ekiben.hub.hosts" in said, said
    # why it has failed is the last that is said, and on standard error
    said = hub.fail(as_deploy(f"cd /srv/fleet; NIX_PATH=nixpkgs={NIXPKGS} ekiben fleet deploy 2>&1 > /dev/null"))
    assert said.startswith("error: Failed to publish db2: the hub has no key") and said.count("\n") == 1, said
    # who may not look is told that, and not that there is nothing
    said = hub.fail("cd /; runuser -u nobody -- ekiben fleet resume 2>&1")
    assert said.startswith("error: Failed to look into /var/lib/ekiben-hub") and said.count("\n") == 1, said
    assert (seen := states(hub)) == {"db": "new machine", "db2": "no key on the hub", "plain": "new machine", "web": "new machine"}, seen

with subtest("a new host fetches what the hub has built"):
    # what a git that was killed in a first poll may leave
    own = "/var/lib/ekiben/instances/fleet"
    web.succeed(f"mkdir -p {own}/repository/.git/refs {own}/repository.new; cd {own}; "
                f"touch repository/.git/HEAD repository/.git/{{index,config,HEAD}}.lock fetched")
    for name, machine in HOSTS.items():
        ended = poll(machine)
        assert ended["result"] == "deployed", ended
        becomes(hub, name, "up to date")
        # the same system that the hub has built
        shown = json.loads(hub.execute(fleet(f"status --json {name}"))[1])[name]
        assert running(machine) in json.dumps(shown), shown
        assert shown["heartbeat"]["kernel"] == machine.succeed("uname -r").strip(), shown
        version = machine.execute("cat /run/current-system/nixos-version")[1].strip() or None
        assert shown["heartbeat"]["nixos"] == version and (version or is_host(machine)), shown
    assert [shows(machine, "app") for machine in HOSTS.values()] == ["2", "3", "1"]

with subtest("nothing new: nothing is published, nothing is done"):
    before = hub.succeed("find /var/lib/ekiben-hub/hosts/*/release -name manifest.json -printf '%p %T@\\n' | sort")
    hub.execute(fleet("deploy web db plain"))
    assert hub.succeed("find /var/lib/ekiben-hub/hosts/*/release -name manifest.json -printf '%p %T@\\n' | sort") == before
    for name in HOSTS:
        assert poll(HOSTS[name])["result"] == "unchanged", last_run(HOSTS[name], "fleet")

with subtest("a timer that finds nothing new leaves a heartbeat, and no run begins; one that cannot tell has a run say why"):
    beat = "/var/lib/ekiben-hub/hosts/web/reports/heartbeat.json"

    def looks():
        """What came of the runs that a timer's look had begin, and who asked for them."""
        return [(run["result"], run["by"]) for run in look(web)]

    # what is taken by the hub is not there any more
    hub.succeed("systemctl stop ekiben-hub-collect.timer; systemctl start ekiben-hub-collect.service")
    invocation = web.succeed("systemctl show --property InvocationID --value ekiben-fleet.service")
    for _ in range(2):
        hub.succeed(f"rm -f {beat}")
        assert looks() == [] and status(web, "fleet")["looked"]
        hub.succeed(f"test -s {beat}; systemctl start ekiben-hub-collect.service")
    hub.succeed("systemctl start ekiben-hub-collect.timer")
    assert web.succeed("systemctl show --property InvocationID --value ekiben-fleet.service") == invocation
    becomes(hub, "web", "up to date")

    state, manifest = "/var/lib/ekiben/instances/fleet", "/var/lib/ekiben-hub/hosts/web/release/manifest.json"
    of_hub = f"cp -p {manifest} /root/manifest", f"cp -p /root/manifest {manifest}"
    cases = {
        "the hub has another key": (hub,
                                    "cp /etc/ssh/ssh_host_ed25519_key /root/key; ssh-keygen -qt ed25519 -N '' -f /root/other; "
                                    "install -m 600 /root/other /etc/ssh/ssh_host_ed25519_key; systemctl restart sshd",
                                    "install -m 600 /root/key /etc/ssh/ssh_host_ed25519_key; systemctl restart sshd", "failed"),
        "the hub has nothing": (hub, f"{of_hub[0]}; rm {manifest}", of_hub[1], "failed"),
        "the hub has something else": (hub, f"{of_hub[0]}; sed -i 's/published/Published/' {manifest}", of_hub[1], "failed"),
        "other settings": (web, f"echo >> {state}/accepted", "true", "unchanged"),
        "nothing is known of it": (web, f"rm {state}/accepted", "true", "unchanged"),
        "what was seen was forgotten": (web, "ekiben forget-releases fleet", "true", "unchanged"),
        "no key": (web, "mv /root/identity /root/away", "mv /root/away /root/identity", "failed"),
        "the repository is elsewhere": (web,
                                        f"runuser -u ekiben-fleet -- git -C {state}/repository -c user.name=a -c user.email=a commit -q --allow-empty -m odd",
                                        f"runuser -u ekiben-fleet -- git -C {state}/repository reset -q --hard HEAD^", "deployed"),
    }
    for case, (machine, make, unmake, result) in cases.items() if is_host(web) else ():
        machine.succeed(make)
        assert looks() == [(result, ["timer"])], (case, last_run(web, "fleet"))
        if case == "the hub has nothing":
            assert "The timer's look found: Failed to fetch a release: the hub has none for web yet." in web.succeed("ekiben log fleet")
        machine.succeed(unmake)
        look(web)
        assert looks() == [], (case, last_run(web, "fleet"))
    if is_host(web):
        # the run is what tries that again
        hub.succeed("systemctl stop sshd")
        web.execute("systemctl start ekiben-look@fleet.service")
        web.wait_until_succeeds(knows("fleet", ".running.by == [\"timer\"]"))
        web.succeed("systemctl stop ekiben-fleet.service")
        hub.succeed("systemctl start sshd")
        assert looks() == [("unchanged", ["timer"])] and looks() == []

with subtest("one host of three is changed: it alone has something to do"):
    content = change_hosts(hub, "web")
    hub.succeed(fleet("deploy web db plain"))
    # nobody else's git is at work in a host's own repository
    web.succeed(f"cd {own}; rm -rf fetched; mkdir -p fetched/index.lock; cd repository/.git; "
                "touch index.lock config.lock HEAD.lock packed-refs.lock refs/heads/main.lock; "
                f"chown -R --reference={own} {own}/fetched {own}/repository")
    assert (seen := states(hub)) == {"db": "up to date", "db2": "no key on the hub", "plain": "up to date", "web": "rebuild pending"}, seen
    said = hub.succeed(fleet("diff"))
    assert "db: up to date" in said and "plain: up to date" in said and f"web: {running(web)} -> /nix/store/" in said, said
    assert [poll(machine)["result"] for machine in HOSTS.values()] == ["unchanged", "unchanged", "deployed"]
    assert shows(web, "app") == content
    becomes(hub, "web", "up to date")

with subtest("what is published makes no other system: that is said"):
    write(hub, "/srv/fleet/hosts/web/note", "a note")
    hub.succeed(fleet("deploy web"))
    assert (seen := states(hub))["web"] == "sync pending", seen
    before = running(web)
    poll(web)
    becomes(hub, "web", "up to date")
    assert running(web) == before



def substitute():
    """Has web have what the hub has built for it, as a substituter would; returns the system."""
    shown = json.loads(hub.succeed("cat /var/lib/ekiben-hub/hosts/web/release/manifest.json"))
    toplevel = json.loads(shown["manifest"])["toplevel"]
    closure = hub.succeed(f"nix-store --query --requisites {toplevel}").split()
    missing = web.succeed(f"nix-store --check-validity --print-invalid {' '.join(closure)}").split()
    files = hub.succeed(f"nix-store --export {' '.join(missing)} | gzip | base64 -w0").strip()
    web.succeed(f"base64 -d <<< {files} | gzip -d | nix-store --import")
    return toplevel


with subtest("what the hub has built, and the host can have, is neither evaluated nor built there"):
    content = change_hosts(hub, "web")
    hub.succeed(fleet("deploy web"))
    toplevel = substitute()
    assert poll(web)["result"] == "deployed", last_run(web, "fleet")
    assert shows(web, "app") == content and running(web) == toplevel
    said = hub.succeed(fleet("log web last"))
    assert "activating" in said and "evaluating" not in said and "building" not in said, said

# on hosts alone
with subtest("a host that waits for a cache goes on with the release that has been published since"):
    web.succeed("cp -L /etc/ekiben/config.json /root; jq '.instances.fleet.build = \"substitute\"' /root/config.json > /root/new.json; "
                "rm /etc/ekiben/config.json; cp /root/new.json /etc/ekiben/config.json")
    change_hosts(hub, "web")
    hub.succeed(fleet("deploy web"))
    before = runs(web, "fleet")
    web.succeed("ekiben trigger fleet")
    web.wait_until_succeeds(knows("fleet", '.waiting // "" | test("in no cache yet")'))
    # as the timer does
    web.succeed("systemctl start ekiben-look@fleet.service")
    content = change_hosts(hub, "web")
    hub.succeed(fleet("deploy web"))
    web.wait_until_succeeds(knows("fleet", f"(.runs | length) > {before}"))
    assert last_run(web, "fleet")["result"] == "startedOver", last_run(web, "fleet")
    substitute()
    assert wait_for_run(web, "fleet", before + 1)["result"] == "deployed" and shows(web, "app") == content, last_run(web, "fleet")
    becomes(hub, "web", "up to date")
    web.succeed("cp /root/config.json /etc/ekiben/config.json")

# everywhere
with subtest("what does not build is not published"):
    change_hosts(hub, "web", trouble="build")
    assert "trouble in build" in hub.fail(fleet("deploy web"))
    becomes(hub, "web", "up to date")

with subtest("what does not run is rolled back, and the hub says so"):
    change_hosts(hub, "plain", trouble="activation")
    hub.succeed(fleet("deploy plain"))
    assert poll(plain)["result"] == "rolledBack", last_run(plain, "fleet")
    becomes(hub, "plain", "rolled back")
    hub.fail(fleet("status plain"))
    assert "Activation script snippet" in hub.succeed(fleet("log plain last"))
    change_hosts(hub, "plain")
    hub.succeed(fleet("deploy plain"))
    assert poll(plain)["result"] == "deployed", last_run(plain, "fleet")
    # it was tried, and it runs
    becomes(hub, "plain", "up to date")
    hub.succeed(fleet("status plain"))

# on hosts alone
with subtest("a group stands for its hosts, and nothing for a group that is none"):
    write(hub, "/srv/fleet/fleet.json", json.dumps(settings | {"groups": {"servers": ["db", "plain"], "none": []}}))
    said = hub.succeed(fleet("deploy @servers"), fleet("renew @servers"), fleet("history @servers"), fleet("build dry-build @servers"), fleet("log @servers"))
    assert "db: unchanged" in said and "plain:\n" in said and "web" not in said, said
    assert set(json.loads(hub.succeed(fleet("status --json @servers")))) == {"db", "plain"}
    assert "web" not in hub.succeed(fleet("diff @servers"))
    for group, why in {"@none": "no host in it", "@laptops": "fleet.json has none, servers"}.items():
        for command in ("deploy", "status --once", "flake-update"):
            assert why in hub.fail(fleet(f"{command} {group}"))
    write(hub, "/srv/fleet/fleet.json", json.dumps(settings))

with subtest("a release that somebody at the host has undone is not deployed again there, and the hub says so; the next one is"):
    before = shows(plain, "app")
    content = change_hosts(hub, "plain")
    hub.succeed(fleet("deploy plain"))
    assert poll(plain)["result"] == "deployed" and shows(plain, "app") == content
    plain.succeed("ekiben rollback fleet")
    assert shows(plain, "app") == before
    becomes(hub, "plain", "undone by hand")
    assert hub.execute(fleet("status plain"))[0] == 2
    assert poll(plain)["result"] == "withheld", last_run(plain, "fleet")
    assert states(hub)["plain"] == "undone by hand" and shows(plain, "app") == before
    assert "the hub is ahead on purpose" in plain.succeed("ekiben status fleet")
    # nor by another number
    write(hub, "/srv/fleet/fleet.json", json.dumps(settings | {"expiresAfter": 90 * 86400}))
    assert "plain: release" in hub.succeed(fleet("renew plain")) and poll(plain)["result"] == "withheld", last_run(plain, "fleet")
    assert states(hub)["plain"] == "undone by hand" and hub.execute(fleet("status plain"))[0] == 2
    write(hub, "/srv/fleet/fleet.json", json.dumps(settings))
    content = change_hosts(hub, "plain")
    hub.succeed(fleet("deploy plain"))
    assert poll(plain)["result"] == "deployed" and shows(plain, "app") == content
    becomes(hub, "plain", "up to date")

with subtest("a host that is at work is seen as that"):
    change_hosts(hub, "pair", trouble="build-hangs")
    hub.succeed(fleet("deploy --no-build db"), fleet("status db"))
    db.succeed("ekiben trigger fleet")
    becomes(hub, "db", "building")
    db.wait_until_succeeds("pkill -x sleep")
    becomes(hub, "db", "failing")

with subtest("a host fails for a reason of its own, and needs another run"):
    change_hosts(hub, "pair")
    hub.succeed(fleet("deploy db"))
    db.succeed("systemctl stop nix-daemon.socket nix-daemon.service")
    assert poll(db)["result"] == "failed"
    becomes(hub, "db", "failing")
    db.succeed("systemctl start nix-daemon.socket")
    db.succeed("ekiben trigger fleet")
    wait_until_at_rest(db, "fleet")
    assert (seen := last_run(db, "fleet"))["result"] == "deployed", seen
    hub.wait_until_succeeds(fleet("status --json db | jq -e '.db.state == \"extra runs\"'"))

with subtest("a host that is held is not silent: its hub is told until when, by whom and what for"):
    # root speaks for who has used sudo
    db.succeed("SUDO_USER=alice ekiben hold fleet 2h --reason 'the annual audit'")
    hub.succeed("systemctl start ekiben-hub-collect.service",
                "find /var/lib/ekiben-hub -path '*/db/*' -name heartbeat.json -exec touch -d '2 hours ago' {} +")
    assert states(hub)["db"] == "silent"
    before = runs(db, "fleet")
    db.succeed("systemctl start ekiben-fleet.service")
    becomes(hub, "db", "extra runs, held")
    content = change_hosts(hub, "pair")
    hub.succeed(fleet("deploy db"))
    db.succeed("systemctl start ekiben-fleet.service")
    said = hub.succeed(fleet("status --once db"))
    assert "1 host: 1 rebuild pending, held\n" in said and " by alice: the annual audit\n" in said and "  held until " in said, said
    # nor does a hub that is down fail what is held
    hub.succeed("systemctl stop sshd")
    db.succeed("systemctl start ekiben-fleet.service")
    hub.succeed("systemctl start sshd")
    assert runs(db, "fleet") == before and shows(db, "app") != content
    db.succeed("ekiben resume fleet")
    assert poll(db)["result"] == "deployed" and shows(db, "app") == content
    becomes(hub, "db", "up to date")

with subtest("another user of the hub's, or of a host's instance, takes over what there is"):
    waits = "/var/lib/ekiben/outbox/fleet/left"
    db.succeed(f"touch {waits}; chown nobody:daemon {waits}; systemd-tmpfiles --create --prefix=/var/lib/ekiben")
    assert db.succeed(f"stat -c '%U %G' {waits}; rm {waits}").strip() == f"root {db.succeed('stat -c %G /var/lib/ekiben/outbox/fleet').strip()}"
    hub.succeed("chown -R nobody: /var/lib/ekiben-hub/received; systemd-tmpfiles --create --prefix=/var/lib/ekiben-hub")
    hub.succeed("test -z \"$(find /var/lib/ekiben-hub/received ! -user deploy)\"; systemctl start ekiben-hub-collect.service")

with subtest("a host that is not heard of any more is silent"):
    write(hub, "/srv/fleet/fleet.json", json.dumps(settings | {"silentAfter": 1}))
    web.crash()
    hub.wait_until_succeeds(as_deploy("cd /srv/fleet; ekiben fleet status --json web | jq -e '.web.state == \"silent\"'"))
    assert hub.execute(fleet("status web"))[0] == 3
    # a laptop is no server
    write(hub, "/srv/fleet/fleet.json", json.dumps(settings | {"silentAfter": 1, "silentAfterOf": {"web": 86400}}))
    assert states(hub)["web"] == "up to date"

with subtest("who is taken out of the repository, or loses the key at the hub, is no host that is up to date"):
    hub.succeed(as_deploy("mv /srv/fleet/hosts/web /tmp/web"))
    assert states(hub)["web"] == "not in repository"
    hosts = "/var/lib/ekiben-hub/hosts"
    assert json.loads(hub.succeed(f"cat {hosts}/known.json")) == ["db", "plain", "web"]
    # as after a switch of the hub's to a system without
    hub.succeed("systemctl stop ekiben-hub-files.timer", f"echo '[\"db\", \"plain\"]' > {hosts}/known.json")
    assert states(hub)["web"] == "removed" and hub.execute(fleet("status web"))[0] == 0
    # as the hub's own unit does it, of the same system
    hub.succeed("jq 'del(.hub.files.web)' /etc/ekiben/config.json > /run/scenario-hub.json; ekiben --config /run/scenario-hub.json fleet files")
    said = hub.succeed(fleet("status --once web"))
    date = hub.succeed("date -d '30 days' '+%a %F'").strip()
    assert f"what the hub has of it is removed on {date}" in " ".join(said.split()), said
    hub.succeed(f"cp -a /var/lib/ekiben-hub/{{hosts,received}} /root; "
                f"jq '.web = 1000' {hosts}/removed.json > /root/removed.json; cat /root/removed.json > {hosts}/removed.json")
    hub.succeed(f"umount {hosts}/web/reports; ekiben --config /run/scenario-hub.json fleet files; "
                "systemctl start ekiben-hub-collect.service; systemd-tmpfiles --clean")
    assert hub.succeed(f"ls -A {hosts}/.removed") == ""
    assert "web" not in states(hub) and hub.succeed(f"ls {hosts} /var/lib/ekiben-hub/received").split().count("web") == 0
    hub.succeed(f"cp -a /root/hosts/web {hosts}; cp -a /root/received/web /var/lib/ekiben-hub/received; "
                "systemctl start 'var-lib-ekiben\\x2dhub-hosts-web-reports.mount'")
    hub.succeed(as_deploy("mv /tmp/web /srv/fleet/hosts/web"))
    assert states(hub)["web"] == "no key on the hub" and hub.execute(fleet("status web"))[0] == 4
    assert "the hub has no key of it" in hub.fail(fleet("deploy web"))
    hub.succeed("systemctl start ekiben-hub-files.service")
    assert states(hub)["web"] == "up to date"
