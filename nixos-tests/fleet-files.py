start_all()
HOST = "/var/lib/ekiben-hub/hosts/web"
SECRETS = "/var/lib/secrets"
KEPT = "/var/lib/ekiben/instances/fleet/files"

for machine in (hub, web):
    machine.wait_for_unit("multi-user.target")
use_host_key(hub, "host-key")
hub.succeed("mkdir -m 700 /root/secrets; cd /root/secrets; umask 077; for name in plain token volatile; do echo first $name > $name; done")
hub.succeed("systemctl start ekiben-hub-files.service")
web.succeed("install -m 600 /etc/scenario/identity /root/identity")
if is_host(web):
    # some system: it is not what this is about
    web.succeed("ln -sfn $(nix-store --add /etc/hostname) /run/current-system")
else:
    install(web)


def serve(name, content):
    """Gives a file on the hub other contents."""
    hub.succeed(f"cd /root/secrets; umask 077; echo {content} > new; mv new {name}; systemctl start ekiben-hub-files.service")


def ask():
    """Has the host ask its hub, as if it had not for a while, and waits until root has seen what came."""
    web.succeed("systemctl stop ekiben-files.path; systemctl reset-failed ekiben-files.path; "
                f"touch -c -d '2 hours ago' {KEPT}/index.json; systemctl start ekiben-files.path")
    follow(web, "files")
    ended = run(web, "fleet")
    # no release is published here, and files do not wait for one
    assert "the hub has none for web yet" in ended["error"], ended
    # systemd says so of every end
    wait_until_said(web, "files", "ekiben-files.service - Files from the fleet's hub.")
    wait_until_idle(web, "files")


def tells(*trouble):
    """Waits until the hub knows this of the host's files, and nothing else."""
    condition = " and ".join([f"(.files | contains({json.dumps(what)}))" for what in trouble]) or ".files == null"
    hub.wait_until_succeeds(f"jq -e {shlex.quote(condition)} {HOST}/reports/heartbeat.json")


def is_there(path, *expected):
    """Checks a file's contents, permissions and owner."""
    found = web.succeed(f"cat {path}; stat -c '%a %U:%G' {path}").strip().split("\n")
    assert found == [*expected], found


with subtest("files arrive as they are declared, and nobody else can read them"):
    ask()
    is_there(f"{SECRETS}/plain", "first plain", "400 root:root")
    is_there("/run/fleet-secrets/volatile", "first volatile", "400 root:root")
    for command in (f"cat {SECRETS}/plain", f"ls {SECRETS}", f"ls {KEPT}"):
        web.fail(f"runuser -u deploy -- {command}")
    web.fail("grep -Rs 'first plain' /etc /run/current-system/")

with subtest("one that cannot be put in its place is told, and does not keep the others waiting"):
    tells('Failed to install "/var/lib/secrets/deep/er/token": there is no user "app"')
    web.require_unit_state("ekiben-files.service", "failed")
    hub.succeed("mkdir -p /srv/status/hosts; cd /srv/status; test -e fleet.json || ekiben fleet init")
    hub.succeed("systemctl start ekiben-hub-collect.service")
    shown = hub.fail("cd /srv/status; ekiben fleet status --once")
    assert "not in repository, files missing" in shown and 'there is no user "app"' in shown, shown

if is_host(web):
    with subtest("when its user is there, the next poll brings it"):
        web.succeed("echo u app - - | systemd-sysusers -")
        ask()
else:
    with subtest("a new system brings its user: the service that needs it has it from the first moment on"):
        publish(web, "app", "2", variant="app")
        deploy(web, "nix flake update; git add .; git commit -qm app")
        rebuild(web)
        web.require_unit_state("scenario-reader.service", "active")
        web.succeed("journalctl -u scenario-reader -o cat | grep -F 'The token is first token.'")
        ask()
is_there(f"{SECRETS}/deep/er/token", "first token", "440 app:app")
web.fail(f"runuser -u app -- cat {SECRETS}/plain")
web.succeed(f"runuser -u app -- cat {SECRETS}/deep/er/token")
tells()
web.require_unit_state("ekiben-files.service", "inactive")

with subtest("nothing new: root does not even look"):
    starts = "journalctl -q -o cat -u ekiben-files | grep -c ^Starting"
    looked = web.succeed(starts)
    assert "the hub has none for web yet" in run(web, "fleet")["error"]
    wait_until_idle(web, "files")
    assert web.succeed(starts) == looked

with subtest("nothing new for a while: root looks, and nothing is written"):
    before = web.succeed(f"stat -c '%n %i %z' {SECRETS}/plain {SECRETS}/deep/er/token")
    ask()
    assert web.succeed(f"stat -c '%n %i %z' {SECRETS}/plain {SECRETS}/deep/er/token") == before

with subtest("new contents arrive, in one step"):
    before = web.succeed(f"stat -c %i {SECRETS}/plain")
    serve("plain", "second plain")
    ask()
    is_there(f"{SECRETS}/plain", "second plain", "400 root:root")
    assert web.succeed(f"stat -c %i {SECRETS}/plain") != before
    assert web.succeed(f"ls -A {SECRETS}").split() == ["deep", "plain"]

with subtest("permissions that somebody has changed are put right"):
    web.succeed(f"chmod 444 {SECRETS}/plain; chown deploy {SECRETS}/plain")
    ask()
    is_there(f"{SECRETS}/plain", "second plain", "400 root:root")

with subtest("what somebody has written stays, until it is moved away"):
    web.succeed(f"echo mine > {SECRETS}/plain")
    serve("plain", "third plain")
    ask()
    assert web.succeed(f"cat {SECRETS}/plain") == "mine\n"
    tells("the file was not installed by Ekiben")
    web.succeed(f"mv {SECRETS}/plain /root/mine")
    ask()
    is_there(f"{SECRETS}/plain", "third plain", "400 root:root")
    tells()

with subtest("a directory for files that somebody has removed is made again"):
    web.succeed(f"rm -r {SECRETS}")
    ask()
    is_there(f"{SECRETS}/plain", "third plain", "400 root:root")
    assert web.succeed(f"stat -c '%a %U' {SECRETS}") == "711 root\n"
    tells()

# on hosts alone
with subtest("what root was cut off at is done after the next poll"):
    for number, act in ((1, "kill"), (5, "EIO")):
        serve("plain", f"plain {act}")
        web.fault("ekiben", number, act, "install fleet")
        run(web, "fleet")
        web.wait_until_succeeds("systemctl is-failed ekiben-files.service")
        web.no_fault()
        web.succeed("systemctl reset-failed ekiben-files.service")
        run(web, "fleet")
        web.wait_until_succeeds(f"grep -x 'plain {act}' {SECRETS}/plain")
        wait_until_idle(web, "files")
    serve("plain", "third plain")
    ask()

with subtest("the hub serves nothing that somebody else could have chosen"):
    hub.succeed("systemctl stop ekiben-hub-files.timer",
        "mkdir -p /srv/agenix.d/1; echo fourth plain > /srv/agenix.d/1/plain; chown nobody /srv/agenix.d/1/plain; "
        "ln -sfn /srv/agenix.d/1 /srv/agenix")
    hub.succeed("install -d -o nobody /srv/nobody /srv/nobody/own; ln -s /etc/shadow /srv/nobody/plain; "
                "ln -s /root/secrets /srv/nobody/dir; ln -s /srv/nobody/plain /srv/link; ln -s /etc/shadow /srv/theirs; "
                "chown -h nobody /srv/theirs")
    for source in ("/srv/nobody/plain", "/srv/nobody/dir/plain", "/srv/link", "/srv/theirs", "/srv/nobody/own/../plain", "/srv/agenix/plain"):
        hub.succeed(f"jq '.hub.files.web[\"{SECRETS}/plain\"].source = \"{source}\"' /etc/ekiben/config.json > /root/config.json")
        code, said = hub.execute("ekiben --config /root/config.json fleet files 2>&1")
        hub.fail(f"grep -rs ^root: {HOST}/files")
        if source == "/srv/agenix/plain":
            assert code == 0, said
        else:
            assert code != 0 and "is owned by nobody, who could redirect it" in said, said
    ask()
    is_there(f"{SECRETS}/plain", "fourth plain", "400 root:root")
    hub.succeed("systemctl start ekiben-hub-files.service")
    ask()
    is_there(f"{SECRETS}/plain", "third plain", "400 root:root")

with subtest("what the hub has no more is removed; not what somebody has changed"):
    hub.succeed("jq '.hub.files.web |= del(.[\"/var/lib/secrets/plain\"], .[\"/run/fleet-secrets/volatile\"])' /etc/ekiben/config.json > /root/config.json")
    web.succeed("echo mine > /run/fleet-secrets/volatile")
    hub.succeed("systemctl stop ekiben-hub-files.timer; ekiben --config /root/config.json fleet files")
    ask()
    web.fail(f"test -e {SECRETS}/plain")
    assert web.succeed("cat /run/fleet-secrets/volatile") == "mine\n"
    is_there(f"{SECRETS}/deep/er/token", "first token", "440 app:app")
    web.succeed("rm /run/fleet-secrets/volatile")
    hub.succeed("systemctl start ekiben-hub-files.service")
    ask()
    is_there(f"{SECRETS}/plain", "third plain", "400 root:root")
    assert web.succeed(f"ls {KEPT} | wc -l").strip() == "4"


def offer(*changes):
    """Serves what a hub in wrong hands could serve: an index of its own."""
    sha256 = hub.succeed("test -e /root/evil || echo evil > /root/evil; sha256sum /root/evil | cut -c1-64").strip()
    usual = {"path": f"{SECRETS}/evil", "mode": "0400", "owner": "root", "group": "root", "file": sha256, "sha256": sha256}
    index = json.dumps([usual | change for change in changes])
    hub.succeed(f"cp /root/evil {HOST}/files/{sha256}; echo {shlex.quote(index)} > {HOST}/files/index.json; "
                f"chgrp -R fleet-web {HOST}/files; chmod 640 {HOST}/files/*")


def picture():
    """All files that are there but for the good ones; a directory's size changes with what is in it."""
    places = f"/etc /root /home /run/systemd/system /run/fleet-secrets {SECRETS}/* /var/lib"
    lines = web.succeed(f"find {places} -path /var/lib/ekiben -prune -o -path '*/journal' -prune -o "
                        f"-path {SECRETS} -o -printf '%p %m %u %g %s\\n'").splitlines()
    return {line for line in lines if f"{SECRETS}/good" not in line}


with subtest("a hub in wrong hands can put files where it may, and nowhere else"):
    web.succeed(
        f"install -d -o app {SECRETS}/theirs; install -d -m 777 {SECRETS}/everybodys; ln -s /etc {SECRETS}/link; mkdir {SECRETS}/directory",
        f"ln -s /etc/evil {SECRETS}/dangling; mkfifo {SECRETS}/fifo",
    )
    places = (
        "/etc/evil", "etc/evil", "/", "", f"{SECRETS}", f"{SECRETS}/", f"{SECRETS}/../evil", f"{SECRETS}/a/../../../../etc/evil", "/var/lib/secrets-evil/evil",
        f"{SECRETS}/theirs/evil", f"{SECRETS}/everybodys/evil", f"{SECRETS}/link/evil", f"{SECRETS}/link/shadow", f"{SECRETS}/directory", f"{SECRETS}/dangling",
        f"{SECRETS}/fifo", f"{SECRETS}/fifo/evil", f"{SECRETS}/.ekiben", f"{SECRETS}/.ekiben.new", f"{SECRETS}/.ekiben/evil",
        f"{SECRETS}/{'x' * 300}", f"{SECRETS}/nul\0", "/proc/self/evil",
        f"{SECRETS}/{'d/' * 20}evil", f"{SECRETS}/new/{'x' * 256}", f"{SECRETS}/new/{'x' * 256}/evil", f"{SECRETS}/{'d/' * 500}evil",
        f"{KEPT}/evil", "/var/lib/ekiben/runs/fleet.json", "/run/systemd/system/evil.service", "/home/deploy/evil", "/root/.ssh/authorized_keys",
    )
    others = (
        {"mode": "4755"}, {"mode": "02755"}, {"mode": "-1"}, {"mode": "rwx"}, {"mode": ""}, {"owner": "nobody else"}, {"owner": ""},
        {"owner": "0"}, {"group": "none"},
        {"sha256": "0" * 64},
    )
    # what it had before is gone
    offer({"path": f"{SECRETS}/good"})
    ask()
    for number, change in enumerate([{"path": place} for place in places] + [*others]):
        sound = f"{SECRETS}/good{number}"
        before = picture()
        # the file that is right arrives all the same, unless nothing is fetched at all
        offer(change, {"path": sound})
        run(web, "fleet") if "sha256" in change else ask()
        assert picture() == before, (change, picture() ^ before)
        if "sha256" not in change:
            is_there(sound, "evil", "400 root:root")
            web.require_unit_state("ekiben-files.service", "failed")

with subtest("what is wrong with the index as a whole: nothing is fetched, all stays as it was"):
    before = picture()
    web.succeed(f"touch {KEPT}/../canary; chown ekiben-fleet {KEPT}/../canary")
    for file in ("../canary", "../../release/manifest.json", "/etc/passwd", "index.json", "a" * 63, "a" * 64, "x" * 64):
        offer({"file": file})
        assert run(web, "fleet")["stage"] == "prepare"
    # more than can be told of, and more than a host has room for
    offer(*[{"path": f"{SECRETS}/evil{number}"} for number in range(257)])
    assert run(web, "fleet")["stage"] == "prepare"
    hub.succeed("head -c 300000 /dev/zero > /root/evil")
    offer({})
    assert "has more than 262144 bytes" in run(web, "fleet")["error"]
    for text in ("", "{}", "[1]", '[{"path": 5}]', "[" * 200000, " " * 300000):
        hub.succeed(f"printf %s {shlex.quote(text[:100000])} > {HOST}/files/index.json; "
                    f"printf '%{max(0, len(text) - 100000)}s' '' >> {HOST}/files/index.json")
        assert run(web, "fleet")["stage"] == "prepare"
    assert picture() == before
    web.succeed(f"test -e {KEPT}/../canary")

with subtest("root reads nothing for the instance's user that only root may read"):
    sha256 = web.succeed("echo stolen > /root/stolen; sha256sum /root/stolen | cut -c1-64").strip()
    stolen = {"path": f"{SECRETS}/stolen", "mode": "0444", "owner": "root", "group": "root", "file": sha256, "sha256": sha256}
    web.succeed(f"mkdir -m 700 /root/others; echo {shlex.quote(json.dumps([stolen]))} > /root/others/index.json; "
                f"mv /root/stolen /root/others/{sha256}")
    before = picture()
    own = "runuser -u ekiben-fleet -- env -C /var/lib/ekiben/instances/fleet"
    for lure in ("mv files kept; ln -s /root/others files", f"ln -sf /root/others/index.json files/index.json; ln -s /root/others/{sha256} files/{sha256}"):
        web.succeed(f"{own} sh -euc {shlex.quote(lure)}")
        web.execute("systemctl start ekiben-files.service")
        assert picture() == before
        web.execute(f"{own} sh -c 'rm files && mv kept files'")
    web.succeed(f"rm {KEPT}/index.json; rm -r /root/others")

with subtest("a hub that has much to be told of does not keep itself from being told"):
    hub.succeed("rm /root/evil")
    offer(*[{"path": f"/etc/{'evil' * 50}/{number}"} for number in range(256)])
    ask()
    tells("Failed to install", "/etc/evil")
    assert int(hub.succeed(f"stat -c %s {HOST}/reports/heartbeat.json")) < 262144
    # in words that can be read
    hub.succeed("systemctl start ekiben-hub-collect.service")
    shown = hub.fail("cd /srv/status; ekiben fleet status --once")
    assert shown.count("Failed to install") > 1 and "\N{REPLACEMENT CHARACTER}" not in shown, shown

with subtest("directories that were made for a file go with it; others, and what is in them, stay"):
    offer({"path": f"{SECRETS}/made/for/evil"}, {"path": f"{SECRETS}/directory/made/evil"})
    ask()
    is_there(f"{SECRETS}/made/for/evil", "evil", "400 root:root")
    web.succeed(f"touch {SECRETS}/made/mine")
    offer({"path": f"{SECRETS}/good"})
    ask()
    assert web.succeed(f"find {SECRETS}/made {SECRETS}/directory").split() == [f"{SECRETS}/made", f"{SECRETS}/made/mine", f"{SECRETS}/directory"]
    web.succeed(f"rm -r {SECRETS}/made")

with subtest("nobody has root remove a file by a directory that is not root's"):
    offer({"path": f"{SECRETS}/handed/evil"})
    ask()
    web.succeed(f"mkdir -m 755 /srv/precious; cp -p {SECRETS}/handed/evil /srv/precious; mv {SECRETS}/handed /root; "
                f"ln -s /srv/precious {SECRETS}/handed")
    offer({"path": f"{SECRETS}/good"})
    ask()
    web.succeed(f"test -e /srv/precious/evil; rm {SECRETS}/handed")

with subtest("a record of what is in its place that makes no sense does not stop anything"):
    web.succeed("echo nonsense > /var/lib/ekiben/files/fleet.json")
    ask()
    is_there(f"{SECRETS}/good", "evil", "400 root:root")
    tells()

with subtest("no index: all stays as it is"):
    before = picture()
    hub.succeed(f"rm {HOST}/files/index.json")
    assert "the hub has none for web yet" in run(web, "fleet")["error"]
    assert picture() == before

# everywhere
with subtest("all is well again; at boot, what was on a file system in memory is there without the hub"):
    web.succeed(f"rm -rf {SECRETS}/theirs {SECRETS}/everybodys {SECRETS}/link {SECRETS}/directory {SECRETS}/dangling {SECRETS}/fifo")
    hub.succeed("systemctl start ekiben-hub-files.service")
    ask()
    tells()
    assert web.succeed(f"ls -A {SECRETS}").split() == ["deep", "plain"]
    hub.succeed("systemctl stop sshd")
    web.shutdown()
    web.start()
    web.wait_for_unit("multi-user.target")
    is_there("/run/fleet-secrets/volatile", "first volatile", "400 root:root")
    is_there(f"{SECRETS}/plain", "third plain", "400 root:root")

with subtest("the unit that does it can do what it is for, and nothing else"):
    web.succeed("echo secret > /root/secret; chmod 600 /root/secret")
    could = take_over(web, "ekiben-files", ["/root/secret", f"{KEPT}/index.json", "/var/lib/ekiben/files/fleet.json"])
    # of its own, and gone with it
    scratch = ("/tmp", "/var/tmp", "/dev/shm", "/dev/mqueue", "/dev")
    assert {what for what in could if not what.startswith(tuple(f"write {place}" for place in scratch))} == {
        *(f"write {place}" for place in (SECRETS, f"{SECRETS}/deep", f"{SECRETS}/deep/er", "/run/fleet-secrets", "/var/lib/ekiben/files",
                                         "/var/lib/ekiben/outbox/fleet")),
        *(f"read {path}" for path in ("/etc/shadow", "/root/secret", f"{KEPT}/index.json", "/var/lib/ekiben/files/fleet.json")),
        "chown",
    }, could
