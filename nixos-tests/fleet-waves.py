start_all()
HOSTS = {"db": db, "plain": plain, "web": web}
DIRECTORY = "/var/lib/ekiben-hub"
ASK = "curl -fsS -H 'Authorization: Bearer token-ci-0123456789' http://127.0.0.1:8787/ekiben"
NOTED = f"{DIRECTORY}/received/rollout.json"


def push(message, trouble="none", hosts=tuple(HOSTS)):
    """Changes hosts, `db` so that it has trouble, and has the hub publish that; returns what their systems say then."""
    content = {name: change_hosts(hub, name, trouble if name == "db" else "none") for name in hosts}
    hub.succeed(as_deploy(f"cd /srv/fleet; git add --all; git commit -qm {shlex.quote(message)}"))
    ended = run(hub, "publish")
    assert ended["result"] == "deployed", ended
    return content


def collect():
    hub.succeed("systemctl start ekiben-hub-collect.service")


def manifests():
    """What each host can fetch."""
    text = hub.succeed(f"for host in {' '.join(HOSTS)}; do jq -r .manifest {DIRECTORY}/hosts/$host/release/manifest.json; done")
    return {shown["host"]: shown for shown in map(json.loads, text.splitlines())}


def numbers():
    return {name: shown["sequence"] for name, shown in manifests().items()}


def renewed(before):
    """Who can fetch something else than before."""
    return {name for name, number in numbers().items() if number != before[name]}


def told():
    """How hosts stand, as a CI job is told."""
    return {name: host["state"] for name, host in json.loads(hub.succeed(ASK))["hosts"].items()}


def stands():
    """Where the roll-out stands; nothing if that is at its end."""
    line = hub.execute(fleet("status --once"))[1].splitlines()[0]
    return line if line.startswith("roll-out") else ""


def noted():
    return json.loads(hub.succeed(f"cat {NOTED}"))


def wait_until_soaked(machine):
    """Waits until a host that is still healthy has been so for as long as it has to."""
    hub.wait_until_succeeds(f"test $(date +%s) -gt {noted()['healthy'][machine.name][1] + 10}")


def soak(machine):
    """Has a host be healthy for as long as it has to."""
    collect()
    wait_until_soaked(machine)
    poll(machine)
    collect()


def follow_all():
    """Has all hosts poll, and the hub go on, until there is nothing more to do."""
    poll(db)
    soak(db)
    for machine in (web, plain):
        poll(machine)
        collect()
    assert (seen := stands()) == "", seen


def configure(machine, change, files="/etc/ekiben/config.json"):
    """Changes configuration files as jq says."""
    for file in machine.succeed(f"ls {files}").split():
        machine.succeed(f"jq {shlex.quote(change)} {file} > /tmp/config.json; cp --remove-destination /tmp/config.json {file}")


def have_canary(change):
    """Has the canary take this release, and those to come, by other options, as jq says."""
    change = f".instances.fleet{change}"
    configure(db, change)
    configure(hub, change, "/srv/fleet/hosts/db/db/systems/default/etc/ekiben/config.json")


def boots(machine, system=None):
    """Has a host boot what its loader chooses, or this system."""
    machine.shutdown()
    machine.start(choose=system)
    machine.succeed("systemctl is-system-running --wait || true")
    wait_until_idle(machine, "deliver")


with subtest("a fleet is set up"):
    # the hosts have its files
    configure(db, '.bootLoader = "grub"', "/etc/ekiben/config.json /etc/scenario/systems/*/etc/ekiben/config.json")
    settings = found_fleet(hub, {db: "db", plain: "plain", web: "web"}) | {"groups": {"canaries": ["db"]}}
    hub.succeed("install -m 600 /etc/scenario/signer /root/signer")
    hub.succeed(as_deploy("git config --global user.name Deploy; git config --global user.email deploy@localhost; git init -qb main /srv/fleet"))
    write(hub, "/srv/fleet/fleet.json", json.dumps(settings))
    for name in HOSTS:
        write(hub, f"/srv/fleet/hosts/{name}/flake.nix", f"{{ outputs = {{ self }}: {{ nixosConfigurations.{name} = {system(name)}; }}; }}")

with subtest("all is signed at once, and offered wave by wave, when the hosts before have been healthy for long enough"):
    content = push("first")
    commit = hub.succeed(as_deploy("git -C /srv/fleet rev-parse HEAD")).strip()
    assert (seen := states(hub)) == {"db": "new machine", "web": "waiting for wave 2", "plain": "waiting for wave 3"}, seen
    assert (seen := told()) == {"db": "published", "web": "waiting", "plain": "waiting"}, seen
    assert json.loads(hub.succeed(ASK))["hosts"]["plain"]["wave"] == 3
    shown = json.loads(hub.succeed(f"cat {DIRECTORY}/rollout/plan.json"))
    signed = {host["host"]: host["release"]["sequence"] for host in shown["hosts"]}
    assert (seen := stands()) == f"roll-out of {commit[:12]}: wave 1 of 3: 0 of 1 healthy, 1 silent or held; ekiben fleet resume, to go on without", seen
    assert poll(db)["result"] == "deployed"
    collect()
    assert "wave 1 of 3: 1 of 1 healthy" in (seen := stands()) and "soaks until" in seen, seen
    assert json.loads(hub.execute(fleet("status --json"))[1])["web"]["wave"] == 2
    # what has been heard once is no proof
    wait_until_soaked(db)
    collect()
    assert (seen := told()) == {"db": "deployed", "web": "waiting", "plain": "waiting"}, seen
    poll(db)
    collect()
    assert (seen := states(hub)) == {"db": "up to date", "web": "new machine", "plain": "waiting for wave 3"}, seen
    assert poll(web)["result"] == "deployed"
    collect()
    assert "3 of 3" in stands() and poll(plain)["result"] == "deployed"
    collect()
    assert (seen := stands()) == "" and set(told().values()) == {"deployed"}, seen
    assert numbers() == signed and {name: shows(machine, "app") for name, machine in HOSTS.items()} == content
    assert hub.succeed(f"ls {DIRECTORY}/hosts/*/release | grep next || true") == ""
    # nothing new: nothing begins anew
    assert run(hub, "publish")["result"] == "unchanged"
    assert numbers() == signed and stands() == ""
    assert "first" in hub.succeed(fleet("history plain"))
    # a plan of a newer version is none here, which is said
    plan = f"{DIRECTORY}/rollout/plan.json"
    hub.succeed(f"cp -a {plan} /tmp/plan; jq '.format = 2' /tmp/plan > {plan}")
    assert "unsupported format 2" in (seen := hub.execute(f"{fleet('status --once')} 2>&1")[1]), seen
    hub.succeed(f"cp -a /tmp/plan {plan}")

with subtest("a canary that rolls back stops it, for all to see, until somebody has it go on"):
    before = numbers()
    push("bad for the canary", trouble="activation")
    assert renewed(before) == {"db"} and poll(db)["result"] == "rolledBack"
    collect()
    assert "stopped in wave 1: db is rolled back; ekiben fleet resume, or abort" in stands(), stands()
    assert told() == {"db": "failing", "web": "stopped", "plain": "stopped"} and hub.execute(fleet("status --once"))[0] == 2
    assert "ekiben_rollout_stopped{} 1" in hub.succeed("cat /var/lib/ekiben-hub-metrics/fleet.prom")
    assert "The roll-out of" in hub.succeed("journalctl --sync; journalctl -q -u ekiben-hub-collect -o cat")
    # neither time nor another run has it go on
    assert run(hub, "publish")["result"] == "unchanged"
    collect()
    assert renewed(before) == {"db"}
    assert "goes on" in hub.succeed(fleet("resume"))
    collect()
    assert renewed(before) == {"db", "web"}, stands()

with subtest("what is pushed next takes its place"):
    before = numbers()
    content = push("mended")
    assert renewed(before) == {"db"} and told()["plain"] == "waiting" and "wave 1 of 3" in stands(), stands()
    assert hub.succeed(f"ls {DIRECTORY}/hosts/plain/release | grep -c next").strip() == "1"
    follow_all()
    assert {name: shows(machine, "app") for name, machine in HOSTS.items()} == content

with subtest("a canary that is given another release by hand proves nothing of the one that is rolled out"):
    before = numbers()
    push("bad for the canary, had it tried that", trouble="activation")
    hub.succeed(fleet(f"deploy --again {before['db']} db"))
    poll(db)
    poll(db)
    collect()
    assert "0 of 1 healthy; ekiben fleet resume, to go on without" in stands() and renewed(before) == {"db"}, stands()
    push("as before")
    follow_all()

with subtest("a canary that dies when it has deployed, or that runs something else after a reboot, stops it, too"):
    before = numbers()
    push("the canary dies")
    assert poll(db)["result"] == "deployed"
    collect()
    # who could speak to nobody is not silent: the hub was away, and if that cannot be noted, it is yet to be
    hub.succeed(f"touch -d '2 hours ago' {DIRECTORY}/received/db/heartbeat.json {DIRECTORY}/received/all.json")
    hub.fault("ekiben", 2, "EIO", "fleet collect", "return.json")
    hub.fail("systemctl start ekiben-hub-collect.service")
    hub.no_fault()
    collect()
    assert "wave 1 of 3: 0 of 1 healthy" in (seen := stands()) and "silent" not in seen and renewed(before) == {"db"}, seen
    # nor was that a part of its soak, be it that the hub was away or that its clock was behind
    assert noted()["healthy"]["db"][1] == int(hub.succeed(f"cat {DIRECTORY}/received/return.json")), noted()
    hub.succeed(f"echo $(($(date +%s) - 7200)) > {DIRECTORY}/received/return.json")
    collect()
    assert "stopped in wave 1: db has been silent since it has got the release" in (seen := stands()) and renewed(before) == {"db"}, seen
    old = running(db)
    push("the canary boots something else")
    assert poll(db)["result"] == "deployed"
    collect()
    assert "1 of 1 healthy" in (seen := stands()), seen
    new = running(db)
    db.succeed(f"nix-env --profile {PROFILE} --set {old}; {old}/bin/switch-to-configuration switch")
    assert poll(db)["result"] == "drifted"
    collect()
    assert "stopped in wave 1: db is drifted" in (seen := stands()) and renewed(before) == {"db"}, seen
    db.succeed(f"nix-env --profile {PROFILE} --set {new}; {new}/bin/switch-to-configuration switch")
    poll(db)
    hub.succeed(fleet("resume"))
    follow_all()

with subtest("a canary that has to boot its release is healthy once it has; one that does not boot it, or not well, stops it"):
    before = numbers()
    have_canary('.operation = "boot"')
    push("to be booted")
    for _ in range(2):
        assert poll(db)["result"] == "awaitingBoot", last_run(db, "fleet")
        collect()
        assert "0 of 1 healthy" in stands() and states(hub)["db"] == "awaiting boot", stands()
    boots(db)
    collect()
    assert "1 of 1 healthy" in stands() and renewed(before) == {"db"}, stands()
    follow_all()
    for trouble, is_booted in (("unit", True), ("none", False)):
        before, old = numbers(), running(db)
        push("not well when it has booted, or not booted", trouble)
        assert poll(db)["result"] == "awaitingBoot", last_run(db, "fleet")
        boots(db, None if is_booted else old)
        collect()
        assert "stopped in wave 1: db is rolled back" in stands() and renewed(before) == {"db"}, stands()
        if is_booted:
            # nor is what runs there until then any better as another release
            sick = running(db)
            write(hub, "/srv/fleet/hosts/db/note", "nothing of the system's")
            hub.succeed(as_deploy("cd /srv/fleet; git add --all; git commit -qm 'the same again'"))
            assert run(hub, "publish")["result"] == "deployed"
            assert (seen := poll(db))["result"] == "failed" and "scenario-trouble" in seen["error"] and running(db) == sick, seen
            collect()
            assert "stopped in wave 1: db is failing" in stands() and renewed(before) == {"db"}, stands()
        boots(db)
    # a hub that is down meanwhile, or boots as well, proves nothing against a release
    have_canary(".healthChecks.hub |= (.timeout = 3 | .retries = 0)")
    push("not to be blamed")
    assert poll(db)["result"] == "awaitingBoot", last_run(db, "fleet")
    hub.succeed("ip link set eth1 down")
    boots(db)
    assert (seen := last_run(db, "fleet"))["result"] == "rolledBack" and "health check hub" in seen["error"], seen
    hub.succeed("ip link set eth1 up")
    assert poll(db)["result"] == "deployed", last_run(db, "fleet")
    have_canary(".healthChecks.hub |= (.timeout = 40 | .retries = 2)")
    have_canary('.operation = "switch"')
    push("as before")
    follow_all()

with subtest("a canary that has been healthy stops it when a unit fails later, or after a reboot, or a health check, and says which"):
    dropin = "/etc/systemd/system/scenario-trouble.service.d"
    dies = "systemctl kill --signal KILL scenario-trouble; until systemctl is-failed scenario-trouble; do sleep 0.1; done"
    is_broken = f"mkdir -p {dropin}; printf '[Service]\\nExecStartPre=false\\n' > {dropin}/broken.conf"
    is_mended = f"rm -rf {dropin}; systemctl daemon-reload; systemctl restart scenario-trouble; touch /var/well"
    unit, check = "Failed to keep up scenario-trouble.service", "Failed to pass health check well: exited with 1"
    have_canary('.healthChecks.well = {command: "test -e /var/well", units: [], timeout: 5, retries: 0}')
    db.succeed("touch /var/well")
    for what, why, reboots, ask in ((dies, unit, False, look), (is_broken, unit, True, poll), ("rm /var/well", check, False, look)):
        before = numbers()
        push("well at first", "mortal 100000 1 no")
        assert poll(db)["result"] == "deployed"
        collect()
        assert "1 of 1 healthy" in stands(), stands()
        db.succeed(what)
        if reboots:
            boots(db)
        wait_until_soaked(db)
        ask(db)
        collect()
        assert "stopped in wave 1: db is not well any more" in stands() and renewed(before) == {"db"}, stands()
        code, said = hub.execute(fleet("status --once db"))
        assert code == 2 and why in said and told()["db"] == "failing", said
        assert f"not well any more: {why}; see to that" in db.fail("ekiben status fleet")
        # it may well be mended
        db.succeed(is_mended)
        look(db)
        collect()
        assert states(hub)["db"] == "up to date", states(hub)
        db.succeed("ekiben status fleet")
    # it is judged once all is up
    slow = "[Unit]\nDefaultDependencies=no\nAfter=ekiben-boot.service\n[Service]\nType=oneshot\nExecStart=/bin/sh -c 'until test -e /var/go; do sleep 0.1; done'\n"
    db.succeed(f"rm /var/well; printf {shlex.quote(slow)} > /etc/systemd/system/slow.service",
               "ln -s ../slow.service /etc/systemd/system/multi-user.target.wants")
    db.shutdown()
    db.start(wait=False)
    db.wait_for_unit("ekiben-boot.service")
    assert db.succeed("systemctl show --property SystemState --value").strip() == "starting"
    look(db)
    db.succeed("ekiben status fleet", "touch /var/go", "systemctl is-system-running --wait || true",
               "rm /etc/systemd/system/slow.service /etc/systemd/system/multi-user.target.wants/slow.service; systemctl daemon-reload")
    look(db)
    assert f"not well any more: {check}; see to that" in db.fail("ekiben status fleet")
    db.succeed("touch /var/well")
    look(db)
    db.succeed("ekiben status fleet")
    # nor is what another hand's switch has stopped for a moment
    db.succeed("rm /var/well; mkdir -p /run/nixos")
    occupy(db, SWITCH_LOCK)
    look(db)
    db.succeed("ekiben status fleet", "systemctl stop holder")
    look(db)
    assert f"not well any more: {check}; see to that" in db.fail("ekiben status fleet")
    db.succeed("touch /var/well")
    look(db)
    db.succeed("ekiben status fleet")
    have_canary(" |= del(.healthChecks.well)")
    push("as before")
    follow_all()

with subtest("a canary that does not build, or of which nothing is known, is no canary: the others wait until somebody says so"):
    flake = "/srv/fleet/hosts/db/flake.nix"
    good = hub.succeed(f"cat {flake}")
    for trouble, broken in (("build", good), ("none", "{ outputs = { self }: throw 0; }")):
        before = numbers()
        for name in HOSTS:
            change_hosts(hub, name, trouble if name == "db" else "none")
        write(hub, flake, broken)
        hub.succeed(as_deploy("cd /srv/fleet; git add --all; git commit -qm broken"))
        assert run(hub, "publish")["result"] == "partly"
        collect()
        assert noted()["stopped"] == "wave 1: none of its hosts could be published" and renewed(before) == set(), noted()
        write(hub, flake, good)
    content = push("mended again")
    follow_all()
    assert {name: shows(machine, "app") for name, machine in HOSTS.items()} == content

with subtest("a wave of which no host is well, or that has lost a release, waits until somebody says so, and then no longer"):
    before = numbers()
    push("nobody will be there")
    # also of a plan that the hub has not looked at yet
    hub.succeed(f"touch -d '2 hours ago' {DIRECTORY}/received/db/heartbeat.json", fleet("resume"))
    collect()
    assert renewed(before) == {"db", "web"}, stands()
    before = numbers()
    push("nobody is there")
    hub.succeed(f"touch -d '2 hours ago' {DIRECTORY}/received/db/heartbeat.json")
    collect()
    assert "0 of 1 healthy, 1 silent or held; ekiben fleet resume, to go on without" in (seen := stands()) and renewed(before) == {"db"}, seen
    # the end of a hold says nothing of that
    hub.succeed(fleet("hold"), fleet("resume"))
    collect()
    assert renewed(before) == {"db"}, stands()
    hub.succeed(fleet("resume"), f"cd {DIRECTORY}/hosts/web/release; rm *.next; touch -d '2 minutes ago' .")
    collect()
    assert "stopped in wave 2: web can no longer get its release: deploy again" in (seen := stands()) and renewed(before) == {"db"}, seen
    hub.succeed(fleet("resume"))
    collect()
    assert renewed(before) == {"db", "plain"}, stands()
    content = push("all is there")
    follow_all()
    assert {name: shows(machine, "app") for name, machine in HOSTS.items()} == content

with subtest("settings that cannot be read keep nobody from being heard"):
    hub.succeed("mv /srv/fleet/fleet.json /root; echo '{' > /srv/fleet/fleet.json; rm -r /var/lib/ekiben-hub-metrics/*")
    collect()
    hub.succeed("grep -q ekiben_host_well /var/lib/ekiben-hub-metrics/fleet.prom; mv /root/fleet.json /srv/fleet/fleet.json")

with subtest("hosts can be held, and the roll-out itself"):
    before = numbers()
    assert "held by deploy: audit" in hub.succeed(fleet("hold --reason audit web"))
    content = push("held")
    assert (seen := states(hub))["web"] == "waiting for wave 2, held" and told()["web"] == "held", seen
    poll(db)
    soak(db)
    # its wave waits for none
    assert "wave 2" in (seen := stands()) and renewed(before) == {"db"}, seen
    hub.succeed(fleet("hold --for 2h @canaries"), fleet("resume @canaries"), fleet("hold"), fleet("resume web"))
    collect()
    assert "held by deploy; ekiben fleet resume" in (seen := stands()) and renewed(before) == {"db"}, seen
    hub.succeed(fleet("resume"))
    collect()
    assert renewed(before) == {"db", "web"}
    follow_all()
    assert {name: shows(machine, "app") for name, machine in HOSTS.items()} == content
    # nobody else can have whoever does so wait for ever
    hub.fail(f"runuser -u nobody -- flock --nonblock {DIRECTORY}/rollout true")
    # who is held for longer than all the others take gets it when that is over
    before = numbers()
    hub.succeed(fleet("hold web"))
    content = push("held until the end")
    poll(db)
    soak(db)
    hub.succeed(fleet("resume"))
    collect()
    poll(plain)
    collect()
    assert "3 of 3: 1 of 1 healthy, 1 silent or held" in (seen := stands()) and renewed(before) == {"db", "plain"}, seen
    hub.succeed(fleet("resume web"))
    collect()
    assert renewed(before) == set(HOSTS), stands()
    poll(web)
    collect()
    assert stands() == "" and {name: shows(machine, "app") for name, machine in HOSTS.items()} == content
    # nor is anything published for them by hand
    hub.succeed(fleet("hold plain"))
    change_hosts(hub, "plain")
    before = numbers()
    assert "plain: held by deploy" in hub.succeed(fleet("deploy plain")) and renewed(before) == set()
    hub.succeed(fleet("resume plain"))

with subtest("abort has all who got the new release go back to what they ran before, by a new number"):
    good, before = {name: shows(machine, "app") for name, machine in HOSTS.items()}, numbers()
    push("bad for all")
    poll(db)
    soak(db)
    assert renewed(before) == {"db", "web"} and poll(web)["result"] == "deployed"
    collect()
    new = numbers()
    # who cannot sign changes nothing: neither is the roll-out ended, nor held
    stood, known = stands(), hub.succeed(f"cat {DIRECTORY}/rollout/*.json")
    hub.succeed("chmod 0 /home/deploy/signer")
    for command in ("abort", f"deploy --again {before['web']} web", "deploy", "deploy --waves", "renew"):
        said = hub.fail(fleet(command) + " 2>&1")
        assert "Failed to sign with /home/deploy/signer" in said, said
    hub.succeed("chmod 600 /home/deploy/signer")
    assert (numbers(), stands(), hub.succeed(f"cat {DIRECTORY}/rollout/*.json")) == (new, stood, known)
    # what is only renewed meanwhile, in another plan or by hand, is what they have got all the same
    for lasts, command in ((3600, "deploy --waves"), (86400, "deploy db web")):
        write(hub, "/srv/fleet/fleet.json", json.dumps(settings | {"expiresAfter": lasts, "waves": [{"hosts": ["db"]}, {"hosts": ["web"], "soak": 3600}]}))
        assert hub.succeed(fleet(command)).count("renewed") >= 2 and all(numbers()[name] > new[name] for name in ("db", "web")), stands()
        new = numbers()
    # who names hosts for waves leaves out the others
    assert "a roll-out is under way" in hub.fail(fleet("deploy --waves web"))
    write(hub, "/srv/fleet/fleet.json", json.dumps(settings))
    said = hub.succeed(fleet("abort"))
    assert said.endswith("roll-out: ended\n"), said
    assert f"{before['web']} again" in said and "plain" not in said.replace("plain: release", ""), said
    after = numbers()
    assert stands() == "" and after["web"] > new["web"] and after["db"] > new["db"], after
    follow = {name: poll(HOSTS[name])["result"] for name in ("db", "web")}
    assert {name: shows(machine, "app") for name, machine in HOSTS.items()} == good | {"plain": shows(plain, "app")}, follow
    collect()
    assert numbers() == after and "none is under way" in hub.fail(fleet("abort"))
    # one that is cut off is completed by the next one, before the last that it does, too: or the next roll-out would be held
    for number in (1, 7):
        push("bad for all as well")
        hub.fault("ekiben", number, "kill", "abort", "holds.json")
        hub.fail(fleet("abort"))
        hub.no_fault()
        assert hub.succeed(fleet("abort")).endswith("roll-out: ended\n") and stands() == ""
    # and the hold of one that something else has ended can be ended
    push("held for ever")
    hub.succeed(fleet("hold"), fleet("deploy"), fleet("resume"))
    assert "none is under way" in hub.fail(fleet("resume"))

with subtest("a release can be published again, as long as there is its archive"):
    # the hub leaves to publishers what is new
    hub.succeed(f"touch -d '2 hours ago' {DIRECTORY}/hosts/db/release/*.tar.gz")
    push("another one")
    follow_all()
    commits = [shown["manifest"] for shown in json.loads(hub.succeed(fleet("history --json db")))]
    first = commits[-1]
    said = hub.fail(fleet(f"deploy --again {first['sequence']} db"))
    assert f"its archive is gone; check out commit {first['commit']}, and deploy" in said, said
    last = next(shown for shown in commits if shown["id"] != commits[0]["id"])
    said = hub.succeed(fleet(f"deploy --again {last['sequence']} db"))
    assert f"{last['sequence']} again, of {last['commit'][:12]}" in said and manifests()["db"]["id"] == last["id"], said
    # nobody who only has the hub can have it sign something
    hub.succeed(f"sed -i 's/{last['sha256']}/{'0' * 64}/' {DIRECTORY}/received/db/history")
    assert "not known to be signed with the signingKey" in hub.fail(fleet(f"deploy --again {last['sequence']} db"))
    assert "no host has had it" in hub.fail(fleet("deploy --again 5"))

with subtest("by hand, also from elsewhere: the silent hold up nothing unless they shall, and some may fail"):
    key = hub.succeed("ssh-keygen -y -f /etc/ssh/ssh_host_ed25519_key").strip()
    hub.succeed(as_deploy(f"install -D -m 600 /etc/scenario/publisher ~/.ssh/id_ed25519; echo {shlex.quote(f'localhost {key}')} > ~/.ssh/known_hosts"))
    assert "fleet.json has no waves" in hub.fail(fleet("deploy --waves"))
    elsewhere = "sftp://ekiben-publisher@localhost"
    for number, (directory, waves, poll_first, begun) in enumerate((
        (DIRECTORY, [{"hosts": ["db", "web"]}, {"hosts": ["*"]}], [web], True),
        (elsewhere, [{"hosts": ["db", "web"], "waitForSilent": True}, {"hosts": ["*"]}], [web], False),
        (elsewhere, [{"hosts": ["db", "web"], "mayFail": 1}, {"hosts": ["*"]}], [db, web], True),
        (DIRECTORY, [{"hosts": ["db", "web"], "soak": 3600}, {"hosts": ["*"]}], [db, web], False),
    )):
        write(hub, "/srv/fleet/fleet.json", json.dumps(settings | {"directory": directory, "waves": waves}))
        # it has been silent since before, or fails
        content = {name: change_hosts(hub, name, "activation" if name == "db" and "mayFail" in waves[0] else "none") for name in HOSTS}
        before = numbers()
        if db not in poll_first:
            hub.succeed(f"touch -d '2 hours ago' {DIRECTORY}/received/db/heartbeat.json")
        said = hub.succeed(fleet("deploy --waves"))
        assert "for wave 2" in said and "wave 1 of 2" in said, said
        collect()
        assert renewed(before) == {"db", "web"}, said
        for machine in poll_first:
            poll(machine)
        collect()
        assert (renewed(before) == set(HOSTS)) == begun, stands()
        if db not in poll_first:
            assert poll(db)["result"] == "deployed"
        collect()
        assert (renewed(before) == set(HOSTS)) == (begun or number == 1), stands()
    # for one host, at once, and for the others as planned
    change_hosts(hub, "plain")
    write(hub, "/srv/fleet/fleet.json", json.dumps(settings | {"directory": elsewhere, "waves": waves}))
    before = numbers()
    assert "web" not in hub.succeed(fleet("deploy plain")) and renewed(before) == {"plain"} and "wave 1 of 2" in stands()
    # what is published for all ends it, and what was to follow is gone
    content = {name: change_hosts(hub, name) for name in HOSTS}
    hub.succeed(fleet("deploy --waves"))
    collect()
    before = numbers()
    assert "held by" in hub.succeed(fleet("hold")) and "goes on" in hub.succeed(fleet("resume"))
    said = hub.succeed(fleet("abort"))
    assert "again" in said and renewed(before) == {"db", "web"} and stands() == "", said
    hub.succeed(fleet("deploy"))
    assert stands() == "" and all(poll(machine) for machine in HOSTS.values())
    assert {name: shows(machine, "app") for name, machine in HOSTS.items()} == content
    write(hub, "/srv/fleet/fleet.json", json.dumps(settings))

with subtest("cut off at any moment, each host has one release or the other, and the roll-out goes on"):
    # the unit that publishes, when the canary has been offered its release, and that cannot be told
    before = numbers()
    for name in HOSTS:
        change_hosts(hub, name)
    hub.succeed(as_deploy("cd /srv/fleet; git add --all; git commit -qm killed"))
    place, told_in = "/run/systemd/system/ekiben-release-publish@.service.d", "/var/lib/ekiben/instances/publish"
    strace = f"strace -f -qq -o /dev/null -P {told_in} -e trace=openat -e inject=openat:signal=KILL"
    hub.succeed(f"mkdir -p {place}; printf '%s\n' [Service] SystemCallFilter= ExecStart= 'ExecStart={strace} ekiben release publish %i' > {place}/strace.conf",
                "systemctl daemon-reload")
    run(hub, "publish")
    hub.succeed(f"rm -r {place}; systemctl daemon-reload")
    assert (seen := last_run(hub, "publish"))["result"] == "failed" and renewed(before) == {"db"}, seen
    after = numbers()
    ended = run(hub, "publish")
    assert ended["result"] == "unchanged" and numbers() == after, ended
    follow_all()
    assert renewed(after) == {"web", "plain"}
    # the one that collects, at each of its calls that put something on the disk or remove it
    write(hub, "/srv/fleet/fleet.json", json.dumps(settings | {"waves": [{"hosts": ["db"]}, {"hosts": ["web"]}]}))
    calls, killed = "/^(fsync|rename|unlink)", 0
    for first in (1, 3):
        content, before = {name: change_hosts(hub, name) for name in HOSTS}, numbers()
        hub.succeed(fleet("deploy --waves"))
        signed = {host["host"]: host["release"]["sequence"] for host in json.loads(hub.succeed(f"cat {DIRECTORY}/rollout/plan.json"))["hosts"]}
        for number, name in enumerate(("db", "web", "plain"), first):
            assert poll(HOSTS[name])["result"] == "deployed"
            # what the host has sent has been taken in by this, and no wave begun
            assert "roll-out" in hub.execute(f"runuser -u ekiben-hub -- ekiben fleet status --once --directory {DIRECTORY}")[1]
            strace = f"strace -f -qq -o /dev/null -e 'trace={calls}' -e 'inject={calls}:signal=KILL:when={number}'"
            killed += hub.execute(f"runuser -u ekiben-hub -- {strace} ekiben fleet collect --directory {DIRECTORY}")[0] != 0
            for other, shown in manifests().items():
                assert shown["sequence"] in (before[other], signed[other]), shown
                hub.succeed(f"ls {DIRECTORY}/hosts/{other}/release/{shown['id']}.tar.gz")
            collect()
        assert stands() == "" and numbers() == signed and {name: shows(machine, "app") for name, machine in HOSTS.items()} == content
    assert killed >= 3, killed
