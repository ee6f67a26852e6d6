import itertools

start_all()
HOSTS = {"db": db, "plain": plain, "web": web}
COUNT = itertools.count(1)
NIXPKGS = "{ }: import <nixos-config>"


def fleet(arguments):
    """The command line for `ekiben fleet` on the hub, by whoever publishes."""
    return as_deploy(f"cd /srv/fleet; NIX_PATH=nixpkgs=/srv/nixpkgs ekiben fleet {arguments} 2>&1")


def states():
    """The state of each host, as the hub sees it."""
    return {name: shown["state"] for name, shown in json.loads(hub.execute(fleet("status --json"))[1]).items()}


def becomes(name, state):
    """Waits until the hub says this of a host: what the host tells comes a moment after the end of its run."""
    question = f'.["{name}"].state == "{state}"'
    hub.wait_until_succeeds(fleet(f"status --json {name} | jq -e {shlex.quote(question)}"))


def system(name):
    """The Nix expression of the stand-in system of a host, by files beside it."""
    return f'import ./{name}/system.nix {{ name = "{name}"; app = ./app; other = ./app; revision = "none"; }}'


def write(path, text):
    hub.succeed(as_deploy(f"mkdir -p $(dirname {path}); printf %s {shlex.quote(text)} > {path}"))


def change(directory, trouble="none"):
    """Changes the configuration of the hosts of a directory; returns what their systems say then."""
    content = str(next(COUNT))
    write(f"/srv/fleet/hosts/{directory}/app/content", content)
    write(f"/srv/fleet/hosts/{directory}/app/trouble", trouble)
    return content


def poll(name):
    """Has a host ask its hub; returns how the run ended, when the hub has been told."""
    ended = run(HOSTS[name], "fleet")
    wait_until_idle(HOSTS[name], "deliver")
    return ended


with subtest("a fleet is set up"):
    for machine in (hub, *HOSTS.values()):
        machine.wait_for_unit("multi-user.target")
        machine.wait_until_succeeds(as_deploy("nix-store --version; nix store ping 2>&1 || nix store info"))
    use_host_key(hub, "host-key")
    hub.succeed("install -m 600 -o deploy /etc/scenario/signer /home/deploy/signer")
    hub.succeed(fleet("init"))
    settings = json.loads(hub.succeed("cat /srv/fleet/fleet.json"))
    write("/srv/fleet/fleet.json", json.dumps(settings | {"signingKey": "/home/deploy/signer"}))
    for machine in (hub, plain):
        machine.succeed("mkdir -p /srv/nixpkgs/nixos", f"echo {shlex.quote(NIXPKGS)} > /srv/nixpkgs/nixos/default.nix")
    for name, directory in (("web", "web"), ("db", "pair"), ("plain", "plain")):
        machine = HOSTS[name]
        machine.succeed("install -m 600 /etc/scenario/identity /root/identity")
        pack = machine.succeed("tar -C /etc/scenario -cz system.nix switch-to-configuration systems | base64 -w0").strip()
        place = f"/srv/fleet/hosts/{directory}/{name}"
        hub.succeed(as_deploy(f"mkdir -p {place}; base64 -d <<< {pack} | tar -C {place} -xz"))
        change(directory)
    write("/srv/fleet/hosts/web/flake.nix", f"{{ outputs = {{ self }}: {{ nixosConfigurations.web = {system('web')}; }}; }}")
    write("/srv/fleet/hosts/pair/flake.nix", f"{{ outputs = {{ self }}: {{ nixosConfigurations = {{ db = {system('db')}; db2 = {system('db')}; }}; }}; }}")
    write("/srv/fleet/hosts/plain/configuration.nix", system("plain"))
    assert states() == {"db": "not deployed", "plain": "not deployed", "web": "not deployed"}, states()

with subtest("what is published for nobody is said, the others are published"):
    said = hub.fail(fleet("deploy"))
    assert "services.ekiben.hub.hosts" in said, said
    assert states() == {"db": "new machine", "plain": "new machine", "web": "new machine"}, states()

with subtest("a new host runs by hand what the hub has built; then it fetches"):
    for name, machine in HOSTS.items():
        # by hand, as on a new machine: what it will fetch is another one
        machine.succeed("mkdir -p /tmp/first/app; cp -r /etc/scenario/system.nix /etc/scenario/switch-to-configuration /etc/scenario/systems /tmp/first; echo 0 > /tmp/first/app/content")
        expression = f'(import /tmp/first/system.nix {{ name = "{name}"; app = /tmp/first/app; other = /tmp/first/app; revision = "first"; }}).config.system.build.toplevel'
        machine.succeed(f"nix-env --profile {PROFILE} --set $(nix build --impure --no-link --print-out-paths --expr {shlex.quote(expression)})", f"{PROFILE}/bin/switch-to-configuration switch")
        ended = poll(name)
        assert ended["result"] == "deployed", ended
        becomes(name, "up to date")
        # the same system that the hub has built
        shown = json.loads(hub.execute(fleet(f"status --json {name}"))[1])[name]
        assert running(machine) in json.dumps(shown), shown
    assert [shows(machine, "app") for machine in HOSTS.values()] == ["2", "3", "1"]

with subtest("nothing new: nothing is published, nothing is done"):
    before = hub.succeed("find /var/lib/ekiben-hub/hosts/*/release -name manifest.json -printf '%p %T@\\n' | sort")
    hub.execute(fleet("deploy web db plain"))
    assert hub.succeed("find /var/lib/ekiben-hub/hosts/*/release -name manifest.json -printf '%p %T@\\n' | sort") == before
    for name in HOSTS:
        assert poll(name)["result"] == "unchanged", last_run(HOSTS[name], "fleet")

with subtest("one host of three is changed: it alone has something to do"):
    content = change("web")
    hub.succeed(fleet("deploy web db plain"))
    assert states() == {"db": "up to date", "plain": "up to date", "web": "rebuild pending"}, states()
    assert [poll(name)["result"] for name in HOSTS] == ["unchanged", "unchanged", "deployed"]
    assert shows(web, "app") == content
    becomes("web", "up to date")

with subtest("what the hub has built, and the host can have, is neither evaluated nor built there"):
    content = change("web")
    hub.succeed(fleet("deploy web"))
    shown = json.loads(hub.succeed("cat /var/lib/ekiben-hub/hosts/web/release/manifest.json"))
    toplevel = json.loads(shown["manifest"])["toplevel"]
    # as a substituter would
    closure = hub.succeed(f"nix-store --export $(nix-store --query --requisites {toplevel}) | gzip | base64 -w0").strip()
    web.succeed(f"base64 -d <<< {closure} | gzip -d | nix-store --import")
    assert poll("web")["result"] == "deployed", last_run(web, "fleet")
    assert shows(web, "app") == content and running(web) == toplevel
    log = hub.succeed(fleet("log web"))
    assert "activating" in log and "evaluating" not in log and "building" not in log, log

with subtest("what does not build is not published"):
    change("web", trouble="build")
    assert "trouble in build" in hub.fail(fleet("deploy web"))
    becomes("web", "up to date")

with subtest("what does not run is rolled back, and the hub says so"):
    change("plain", trouble="activation")
    hub.succeed(fleet("deploy plain"))
    assert poll("plain")["result"] == "rolledBack", last_run(plain, "fleet")
    becomes("plain", "rolled back")
    hub.fail(fleet("status plain"))
    assert "Activation script snippet" in hub.succeed(fleet("log plain"))
    change("plain")
    hub.succeed(fleet("deploy plain"))
    assert poll("plain")["result"] == "deployed", last_run(plain, "fleet")
    # it was tried, and it runs
    becomes("plain", "up to date")
    hub.succeed(fleet("status plain"))

with subtest("a host fails for a reason of its own, and needs another run"):
    change("pair")
    hub.succeed(fleet("deploy db"))
    db.succeed("systemctl stop nix-daemon.socket nix-daemon.service")
    assert poll("db")["result"] == "failed"
    becomes("db", "failing")
    db.succeed("systemctl start nix-daemon.socket")
    db.succeed("ekiben trigger fleet")
    wait_until_at_rest(db, "fleet")
    assert last_run(db, "fleet")["result"] == "deployed", last_run(db, "fleet")
    hub.wait_until_succeeds(fleet("status --json db | jq -e '.db.state == \"extra runs\"'"))

with subtest("an update right now, by a user who is not root, who sees what happens"):
    content = change("web")
    hub.succeed(fleet("deploy web"))
    said = web.succeed("runuser -u alice -- ekiben trigger --wait fleet 2>&1")
    assert "activating the configuration" in said and said.endswith("The run ended: deployed.\n"), said
    assert shows(web, "app") == content
    change("web", trouble="activation")
    hub.succeed(fleet("deploy web"))
    assert "The run ended: rolled back: " in web.fail("runuser -u alice -- ekiben trigger --wait fleet 2>&1")
    web.fail("runuser -u nobody -- ekiben trigger --wait fleet")

with subtest("inputs are updated between releases, and the hub says so"):
    # the hub and the host see the same repository
    hub.succeed(as_deploy("git config --global user.name Deploy; git config --global user.email deploy@localhost; git init -qb main /srv/app; cd /srv/app; echo one > content; git add .; git commit -qm one"))
    pack = hub.succeed("tar -C /srv -cz app | base64 -w0").strip()
    web.succeed(f"base64 -d <<< {pack} | tar -C /srv -xz; chown -R ekiben-fleet /srv/app")
    write("/srv/fleet/hosts/web/flake.nix", f"""{{ inputs.app = {{ url = "git+file:///srv/app"; flake = false; }};
      outputs = {{ self, app }}: {{ nixosConfigurations.web = {system("web").replace("app = ./app;", "inherit app;")}; }}; }}""")
    hub.succeed(fleet("flake-update web"), fleet("deploy web"))
    assert poll("web")["result"] == "deployed", last_run(web, "fleet")
    assert shows(web, "app") == "one"
    becomes("web", "up to date")
    git = "runuser -u ekiben-fleet -- git -C /srv/app -c user.name=A -c user.email=a@localhost"
    web.succeed(f"echo two > /srv/app/content; {git} commit -qam two")
    assert poll("web")["summary"] == "update app", last_run(web, "fleet")
    assert shows(web, "app") == "two"
    becomes("web", "auto updated")
    assert poll("web")["result"] == "unchanged", last_run(web, "fleet")
    # a release comes on top, and what it pins is updated again
    write("/srv/fleet/hosts/web/note", "new")
    hub.succeed(fleet("deploy web"))
    ended = poll("web")
    assert ended["result"] == "deployed" and ended["summary"].endswith(", update app"), ended
    assert shows(web, "app") == "two"
    becomes("web", "auto updated")

with subtest("what takes a reboot is rebooted into, when it is time for that"):
    web.succeed(f"echo three > /srv/app/content; echo reboot > /srv/app/trouble; {git} add .; {git} commit -qam three")
    ended = poll("web")
    assert ended["result"] == "deployed" and ended["rebootNeeded"], ended
    becomes("web", "auto updated, reboot needed")
    assert shows(web, "app") == "two"
    assert "/usr/bin/ekiben reboot --kexec --between 01:00 05:00" in web.succeed("systemctl cat ekiben-reboot.service")
    now, later = web.succeed("date +%H:%M").strip(), web.succeed("date +%H:%M -d '+2 hours'").strip()
    web.succeed(f"ekiben reboot --between {later} {now}", "systemctl is-system-running --wait || true", "test ! -e /run/nologin")
    assert "Rebooting: " in web.execute(f"ekiben reboot --between {now} {later} 2>&1")[1]
    web.crash()
    web.start()
    assert shows(web, "app") == "three"
    web.succeed("chown -R ekiben-fleet /srv/app")
    assert poll("web")["result"] == "unchanged", last_run(web, "fleet")
    becomes("web", "auto updated")
    # nothing to reboot into
    web.succeed("ekiben reboot")

with subtest("a host that is not heard of any more is silent"):
    write("/srv/fleet/fleet.json", json.dumps(settings | {"signingKey": "/home/deploy/signer", "silentAfter": 1}))
    web.crash()
    hub.wait_until_succeeds(as_deploy("cd /srv/fleet; ekiben fleet status --json web | jq -e '.web.state == \"silent\"'"))
    hub.fail(fleet("status web"))
