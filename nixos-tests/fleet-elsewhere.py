# ruff: noqa: F821
import itertools

start_all()
HUB = "/var/lib/ekiben-hub"
RELEASE = f"{HUB}/hosts/web/release"
COUNT = itertools.count(1)
FLAKE = '{ outputs = { self }: { nixosConfigurations.web = import ./system.nix { name = "web"; app = ./app; other = ./app; revision = "none"; }; }; }'
# The real ssh, which is handed no more of a session from the first request on that is as ~/gate/at says, until
# somebody writes into ~/gate/go. What it was handed is in ~/gate/told, in lines.
GATE = r"""#!/usr/bin/python3
import fnmatch, os, subprocess, sys, threading

os.chdir(os.path.expanduser("~/gate"))
ssh = subprocess.Popen(["/usr/bin/ssh", *sys.argv[1:]], stdin=subprocess.PIPE)
threading.Thread(target=lambda: os._exit(ssh.wait())).start()


def texts(fields):
    while fields:
        size = int.from_bytes(fields[:4], "big")
        yield fields[4:4 + size].decode(errors="replace")
        fields = fields[4 + size:]


while head := sys.stdin.buffer.read(4):
    packet = sys.stdin.buffer.read(int.from_bytes(head, "big"))
    kind, fields = packet[0], packet[5:]
    if kind == 3:
        path = next(texts(fields))
        line = f"{'create' if fields[7 + len(path.encode())] & 2 else 'open'} {path}"
    elif kind == 6:
        handle = next(texts(fields))
        line = f"write {int.from_bytes(fields[4 + len(handle):12 + len(handle)], 'big')}"
    elif kind == 200:
        line = " ".join(texts(fields)).replace("posix-rename@openssh.com", "rename").replace("hardlink@openssh.com", "link")
    else:
        line = str(kind)
    if fnmatch.fnmatch(line, open("at").read().strip()):
        open("held", "w").close()
        open("go").read()
    print(line, file=open("told", "a"))
    ssh.stdin.write(head + packet)
    ssh.stdin.flush()
ssh.stdin.close()
"""


def by(user, command):
    """The command line that runs `command` as a user of the desk, in a repository of their own."""
    return f"runuser -u {user} -- env HOME=/home/{user} USER={user} PATH=/home/{user}/bin:$PATH bash -euc {shlex.quote(f'cd ~/fleet; {command}')}"


def fleet(arguments, user="deploy"):
    return by(user, f"ekiben fleet {arguments} 2>&1")


def begin(user, arguments, at):
    """Begins to publish; returns when the hub would be asked what is like `at`, or at once if that is empty."""
    desk.succeed(by(user, f"rm -f ~/gate/held; printf %s {shlex.quote(at)} > ~/gate/at"))
    desk.succeed(f"rm -f /tmp/{user}.*; (if {fleet(arguments, user)} > /tmp/{user}.said; then echo 0; else echo 1; "
                 f"fi > /tmp/{user}.new; mv /tmp/{user}.new /tmp/{user}.status) > /dev/null 2>&1 &")
    if at:
        desk.wait_until_succeeds(f"test -e /home/{user}/gate/held")


def go_on_as(user):
    desk.succeed(by(user, "echo > ~/gate/at; timeout 10 sh -c 'echo > ~/gate/go'"))


def ended(user):
    """Waits until what was begun has ended; returns whether it succeeded, and what it said."""
    desk.wait_until_succeeds(f"test -e /tmp/{user}.status", timeout=200)
    return desk.succeed(f"cat /tmp/{user}.status").strip() == "0", desk.succeed(f"cat /tmp/{user}.said")


def change(user="deploy", trouble="none"):
    """Changes a user's configuration of the host; returns what the host's system says then."""
    content = str(next(COUNT))
    desk.succeed(by(user, f"echo {content} > hosts/web/app/content; echo {trouble} > hosts/web/app/trouble"))
    return content


def manifest():
    """What is published; its archive has to be there, and whole."""
    found = json.loads(json.loads(hub.succeed(f"cat {RELEASE}/manifest.json"))["manifest"])
    assert hub.succeed(f"sha256sum < {RELEASE}/{found['id']}.tar.gz").split()[0] == found["sha256"], found
    return found


def poll():
    """Has the host ask its hub; returns how the run ended, when the hub has been told."""
    result = run(web, "fleet")
    wait_until_idle(web, "deliver")
    return result


def becomes(state):
    desk.wait_until_succeeds(fleet(f"status --json web | jq -e '.web.state == \"{state}\"'"), timeout=60)


def follows(content):
    """Checks that the host deploys what is published, that this says `content`, and that the desk sees it."""
    result = poll()
    assert result["result"] == "deployed" and result["release"]["sequence"] == manifest()["sequence"], result
    assert shows(web, "app") == content
    # bit by bit what was built elsewhere
    assert web.succeed("readlink -f /run/current-system").strip() == manifest()["toplevel"]
    becomes("up to date")


def stays(content):
    """Checks that the host sees what was published before, all of it."""
    result = poll()
    assert result["result"] == "unchanged", result
    assert shows(web, "app") == content


def published(said):
    return int(said.split("web: release ")[1].split(" published")[0])


def sftp(*commands, key="", login="ekiben-publisher"):
    """The command line by which somebody at the desk does what OpenSSH's sftp can do."""
    lines = "\n".join(commands)
    return by("deploy", f"printf %s {shlex.quote(lines)} | /usr/bin/sftp -b - -P 2222 -o BatchMode=yes {key} {login}@hub 2>&1")


for machine in machines:
    machine.wait_for_unit("multi-user.target")
use_host_key(hub, "host-key")
hub.wait_for_open_port(2222)
hub.succeed("echo secret > /root/secret; chmod 600 /root/secret; systemctl start ekiben-hub-files")
# nothing is evaluated or built there
hub.succeed("systemctl stop nix-daemon.socket nix-daemon.service; chmod 0 /usr/bin/nix*")
web.succeed("install -m 600 /etc/scenario/identity /root/identity")
pack = web.succeed("tar -C /etc/scenario -cz system.nix switch-to-configuration systems | base64 -w0").strip()
# the first system by hand, as on a new machine
web.succeed("mkdir -p /tmp/first/app; "
            "cp -r /etc/scenario/system.nix /etc/scenario/switch-to-configuration /etc/scenario/systems /tmp/first; "
            "echo 0 > /tmp/first/app/content")
expression = '(import /tmp/first/system.nix { name = "web"; app = /tmp/first/app; other = /tmp/first/app; revision = "first"; }).config.system.build.toplevel'
web.succeed(f"nix-env --profile {PROFILE} --set $(nix build --impure --no-link --print-out-paths --expr {shlex.quote(expression)})",
            f"{PROFILE}/bin/switch-to-configuration switch")
HOST_KEY = hub.succeed("ssh-keygen -y -f /etc/ssh/ssh_host_ed25519_key").strip()
for user, place in (("deploy", "sftp://ekiben-publisher@hub:2222"), ("alice", "sftp://the-hub/")):
    desk.succeed(
        f"install -d -o {user} /home/{user}/fleet /home/{user}/bin /home/{user}/gate; install -d -m 700 -o {user} /home/{user}/.ssh",
        f"install -m 600 -o {user} /etc/scenario/{user} /home/{user}/.ssh/id_ed25519; mkfifo /home/{user}/gate/go; "
        f"chmod 666 /home/{user}/gate/go",
        f"printf %s {shlex.quote(GATE)} > /home/{user}/bin/ssh; chmod 755 /home/{user}/bin/ssh",
        by(user, "echo > ~/gate/at; ekiben fleet init"),
        by(user, f"jq '.directory = \"{place}\"' fleet.json > new; mv new fleet.json; mkdir -p hosts/web/app; "
                 f"base64 -d <<< {pack} | tar -C hosts/web -xz; echo {shlex.quote(FLAKE)} > hosts/web/flake.nix"),
    )
# as alice's ssh has it
desk.succeed(by("alice", "printf 'Host the-hub\\nHostName hub\\nPort 2222\\nUser ekiben-publisher\\n' > ~/.ssh/config"))
first = change()
# what git would make something else of
desk.succeed(by("deploy", "printf '* text eol=crlf ident export-subst export-ignore\\n' | "
                          "tee .gitattributes hosts/web/.gitattributes > hosts/web/app/.gitattributes"))
desk.succeed(by("deploy", "printf '%s\\r\\na\\n' '$Id: x$ $Format:%H$' > hosts/web/app/mixed; ln -s user@desk.1:2 'hosts/web/app/.#mixed'"))

with subtest("a hub that nobody has vouched for is not published to"):
    assert "Host key verification failed" in desk.fail(fleet("deploy"))
    for user in ("deploy", "alice"):
        desk.succeed(by(user, f"echo {shlex.quote(f'[hub]:2222 {HOST_KEY}')} > ~/.ssh/known_hosts"))
    assert "expected sftp://[user@]host[:port][/path]" in desk.fail(fleet("--directory sftp:///x status"))

with subtest("what answers in the place of the hub's sshd, and is none, is said to be that"):
    page = "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<html>log in</html>"
    answer = f"one = server.accept()[0]; one.recv(99); one.sendall({page.encode()}); one.close()"
    portal = f"import socket\nserver = socket.create_server(('', 2299))\nwhile True:\n  {answer}"
    desk.succeed(f"systemd-run --unit=portal $(readlink -f $(command -v python3)) -c {shlex.quote(portal)}")
    desk.wait_for_open_port(2299)
    said = desk.fail(fleet("--directory sftp://localhost:2299 status"))
    assert "connection closed by what answers there, which may be no sshd" in said, said
    desk.succeed("systemctl stop portal")

with subtest("from a third machine, without root, a release is published, followed and seen"):
    becomes("not deployed")
    first_number = published(desk.succeed(fleet("deploy")))
    assert first_number == manifest()["sequence"] and abs(first_number - int(hub.succeed("date +%s"))) < 60
    assert "web: unchanged" in desk.succeed(fleet("deploy"))
    becomes("new machine")
    follows(first)
    assert "activating the configuration" in desk.succeed(fleet("log web last"))
    when, identifier, how = desk.succeed(fleet("log web")).splitlines()[1].split("  ")[:3]
    assert when.endswith(" ago") and how == "deployed"
    assert desk.succeed(fleet(f"log web {identifier}")) == desk.succeed(fleet("log web last"))
    assert "no report of run \"none\" has arrived; see ekiben fleet log web" in desk.fail(fleet("log web none"))
    assert "up to date" in desk.succeed(fleet("diff"))
    assert "there is web" in desk.fail(fleet("log db")) and "there is web" in desk.fail(fleet("status db"))
    assert "on its own" in desk.fail(fleet("collect"))
    # the key of the desk's own sshd is no hub's
    for user in ("deploy", "alice"):
        said = desk.succeed(fleet("bootstrap db", user))
        # by what their own ssh knows
        assert 'host = "hub";' in said and "port = 2222;" in said and f'hostKey = "{" ".join(HOST_KEY.split()[:2])}";' in said, said
    # somebody else, as their ssh is configured
    assert json.loads(desk.succeed(fleet("status --json", "alice")))["web"]["state"] == "up to date"
    broken = change(trouble="activation")
    desk.succeed(fleet("deploy"))
    assert poll()["result"] == "rolledBack"
    becomes("rolled back")
    desk.fail(fleet("status --once"))
    second = change()
    assert published(desk.succeed(fleet("deploy"))) > first_number
    follows(second)
    # what can be published again
    assert len(hub.succeed(f"ls {RELEASE} | grep -v json").split()) == 3
    assert hub.succeed(f"stat -c %U {RELEASE}/manifest.json").strip() == "ekiben-publisher"
    assert desk.succeed("find /home/*/.cache/ekiben/fleet -mindepth 1; find /tmp -name 'ekiben-fleet*'") == ""

with subtest("who publishes can do nothing else at the hub"):
    def everything():
        return hub.succeed(f"cd {HUB}; find . -path ./received/web -prune -o -printf '%p %y %U %G %m %l\\n' | sort; "
                           "find hosts/*/release hosts/*/files -type f | sort | xargs sha256sum")
    before = everything()
    assert hub.succeed(f"cat {HUB}/hosts/web/files/*") != "" and "authorized_keys" in hub.succeed("ls -d /etc/ssh/authorized_keys.d")
    for command in ("id", "/bin/sh", "'sftp; id'", "'scp -t /tmp'", ""):
        said = desk.fail(by("deploy", f"ssh -T -p 2222 ekiben-publisher@hub {command} < /dev/null 2>&1"))
        assert said.strip() == "This service allows sftp connections only.", said
    assert "PTY allocation request failed" in desk.fail(by("deploy", "ssh -tt -p 2222 ekiben-publisher@hub < /dev/null 2>&1"))
    for forward in ("-W 127.0.0.1:2222", "-R 8001:127.0.0.1:2222", "-R /received/socket:127.0.0.1:2222"):
        said = desk.fail(by("deploy", f"timeout 20 ssh -N -o ExitOnForwardFailure=yes {forward} -p 2222 ekiben-publisher@hub < /dev/null 2>&1"))
        assert "prohibited" in said or "forwarding failed" in said, said
    # all at once there is, but for what it may: none of these is a name that is not there
    assert set(desk.succeed(sftp("ls -1")).split()[3:]) == {"home", "hosts", "received", "rollout"}
    desk.succeed(sftp("ls received/web", "get received/web/heartbeat.json /tmp/heartbeat.json", "get hosts/web/release/manifest.json /tmp/manifest.json"))
    desk.succeed("touch /tmp/x")
    for command in (
        "ls hosts/web/files", "get hosts/web/files/index.json /tmp/index.json", "ls hosts/web/reports", "ls home", "put /tmp/x hosts/web/reports/x",
        "put /tmp/x hosts/web/files/x", "put /tmp/x hosts/web/x", "put /tmp/x hosts/x", "put /tmp/x x", "put /tmp/x received/x", "put /tmp/x received/web/x",
        "put /tmp/x received/web/heartbeat.json", "put /tmp/x home/x", "rm received/web/heartbeat.json",
        "rename received/web/heartbeat.json hosts/web/release/h",
        "rename hosts/web/release hosts/web/old", "rename hosts/web hosts/old", "mkdir hosts/db", "mkdir hosts/web/release/d", "rmdir hosts/web/release",
        "ln -s /etc hosts/web/release/l", "ln received/web/heartbeat.json hosts/web/release/l", "chmod 777 hosts/web/release/manifest.json",
        "chown 0 hosts/web/release/manifest.json", "get /etc/passwd /tmp/p", "get ../../../etc/passwd /tmp/p",
        "get /etc/ssh/authorized_keys.d/ekiben-publisher /tmp/p",
        "put /tmp/x /etc/ssh/authorized_keys.d/ekiben-publisher", "mkdir .ssh",
    ):
        said = desk.fail(sftp(command))
        assert any(words in said for words in ("ermission denied", "not found", "No such file", "Couldn't", "couldn't")), said
    for key, login in (("", "fleet-web"), ("", "ekiben-hub"), ("", "root"), ("-i /tmp/other -o IdentitiesOnly=yes", "ekiben-publisher")):
        desk.succeed("install -m 600 -o deploy /etc/scenario/other /tmp/other")
        assert "Permission denied (publickey" in desk.fail(sftp("ls", key=key, login=login))
    # people's own ssh says who the hub is, and not a host's configuration
    said = desk.fail(fleet("status --once --directory sftp://root@hub:2222"))
    assert "Permission denied (publickey" in said and "hub.hosts" not in said, said
    said = web.fail("ssh -p 2222 -i /root/identity -o StrictHostKeyChecking=no -o BatchMode=yes ekiben-publisher@hub < /dev/null 2>&1")
    assert "Permission denied (publickey" in said, said
    assert everything() == before

with subtest("what cannot be read is not taken for what is not there, nor what cannot be written for done"):
    number = manifest()["sequence"]
    third = change()
    hub.succeed(f"chmod 0 {RELEASE}/manifest.json")
    assert "Permission denied" in desk.fail(fleet("deploy"))
    hub.succeed(f"chmod 644 {RELEASE}/manifest.json; chmod 555 {RELEASE}")
    assert "Permission denied" in desk.fail(fleet("deploy"))
    hub.succeed(f"chmod 775 {RELEASE}")
    assert manifest()["sequence"] == number
    hub.succeed(f"install -d /tmp/release; cp -a {RELEASE}/. /tmp/release; mount -t tmpfs -o size=64k,mode=777 none {RELEASE}; "
                f"cp -a /tmp/release/. {RELEASE}")
    hub.succeed(f"dd if=/dev/zero of={RELEASE}/fill bs=1k 2>/dev/null || true")
    desk.fail(fleet("deploy"))
    hub.succeed(f"cmp {RELEASE}/manifest.json /tmp/release/manifest.json", f"umount {RELEASE}")
    assert manifest()["sequence"] == number
    stays(second)
    assert published(desk.succeed(fleet("deploy"))) > number
    follows(third)
    second = third

with subtest("what one publisher leaves there runs nothing at another's, removes nothing, and keeps nobody from publishing"):
    hub.wait_until_succeeds(f"test -e {HUB}/received/web/received.json")
    reports = hub.succeed(f"ls {HUB}/received/web")
    outside = f"{HUB}/received/outside"
    hub.succeed(f"touch {outside}.json {outside}.log.gz {outside}.tar.gz; chown ekiben-hub {outside}.*; mkdir -p /tmp/other; "
                f"cp {RELEASE}/*.json /tmp/other")
    newest = json.loads(hub.succeed(f"cat {HUB}/received/web/received.json"))["reports"][-1]
    runs = ["x\n!touch /tmp/owned\n-lpwd", "../outside", "../../../received/outside", outside, newest]
    for index in (json.dumps({"reports": runs}), json.dumps({"reports": runs * 300}), "{"):
        desk.succeed(f"printf %s {shlex.quote(index)} > /tmp/received.json; chmod 644 /tmp/received.json")
        desk.succeed(sftp("put /tmp/received.json hosts/web/release/evil", "rename hosts/web/release/evil hosts/web/release/received.json",
                          "put /tmp/received.json hosts/web/release/received.json.new"))
        assert "activating the configuration" in desk.succeed(fleet("log web last", "alice"))
        # the hub puts that right, and goes on
        hub.wait_until_succeeds(f"jq -e '.reports[-1] == \"{newest}\" and (.reports | length) < 10' {RELEASE}/received.json")
    assert hub.succeed(f"ls {HUB}/received/web") == reports
    # a plan without waves, and one of fewer waves than have been
    wave = {"hosts": ["*"], "soak": 0, "mayFail": 0, "waitForSilent": False}
    for waves in ([], [wave]):
        plan = json.dumps({"format": 1, "id": "evil", "waves": waves, "hosts": []})
        desk.succeed(f"printf %s {shlex.quote(plan)} > /tmp/plan.json; chmod 644 /tmp/plan.json")
        desk.succeed(sftp("put /tmp/plan.json rollout/evil", "rename rollout/evil rollout/plan.json"))
        hub.succeed("printf '{\"id\": \"evil\", \"wave\": 9}' > /tmp/rollout.json", f"install -o ekiben-hub -m 644 /tmp/rollout.json {HUB}/received/rollout.json")
        assert "panicked" not in desk.execute(fleet("status --once", "alice"))[1]
        hub.succeed("systemctl start ekiben-hub-collect")
    desk.succeed(sftp("rm rollout/plan.json"))
    hub.succeed(f"rm {HUB}/received/rollout.json")
    # names that are none, and one that many have waited for
    odd = ['x\\".sent', 'x\\".tar.gz', "*.sent", "a b.tar.gz", "-rf.tar.gz", f"{'0' * 64}.tar.gz", "0b6f5d0c-7b9a-4c8e-9a51-000000000000.manifest.json.sent"]
    desk.succeed(sftp(*(f'put /tmp/x "hosts/web/release/{name}"' for name in odd)))
    hub.succeed(f"touch $'{RELEASE}/x\\n!touch owned\\n.sent' $'{RELEASE}/sftp> # x\\n.tar.gz'; chown ekiben-publisher {RELEASE}/*; "
                f"touch -d '2 hours ago' {RELEASE}/{'0' * 64}.tar.gz")
    published_before = manifest()
    for changes in ({"id": "../../../../received/outside"}, {"id": outside}, {"sequence": 2**64 - 1}, {"sequence": 2 * 10**12},
                    {"host": "db"}, {"sequence": 4 * 10**9}):
        forged = json.dumps({"manifest": json.dumps({**published_before, **changes}), "signature": None})
        desk.succeed(f"printf %s {shlex.quote(forged)} > /tmp/manifest.json; chmod 644 /tmp/manifest.json")
        desk.succeed(sftp("put /tmp/manifest.json hosts/web/release/evil", "rename hosts/web/release/evil hosts/web/release/manifest.json"))
        content = change()
        if changes == {"sequence": 4 * 10**9}:
            # nobody without a key can tell that from a release of a clock that is wrong
            assert "remove the host's `release/manifest.json` from the hub" in desk.fail(fleet("deploy"))
            break
        assert published(desk.succeed(fleet("deploy"))) < 2 * 10**9
    hub.succeed(f"rm {RELEASE}/manifest.json; truncate -s 4G {RELEASE}/evil; mv {RELEASE}/evil {RELEASE}/manifest.json; "
                f"chown ekiben-publisher {RELEASE}/manifest.json")
    published(desk.succeed(fleet("deploy")))
    follows(content)
    second = content
    hub.succeed(f"ls {outside}.json {outside}.log.gz {outside}.tar.gz")
    left = hub.succeed(f"ls {RELEASE}")
    assert "a b.tar.gz" in left and "0" * 64 not in left and "manifest.json.sent" not in left, left
    for machine in (desk, hub):
        machine.fail("test -e /tmp/owned || test -e /home/deploy/fleet/owned")
    hub.succeed(f"cd {RELEASE}; find . -type f ! -name received.json ! -name manifest.json ! -name '{manifest()['id']}.tar.gz' -delete; rm {outside}.*")

with subtest("cut off at any moment, a release is not there, and the next try mends it"):
    last = second
    for at, cut in (
        ("rename *.tar.gz", lambda: hub.succeed("kill $(pgrep -u ekiben-publisher sshd)")),
        ("create *.manifest.json.sent", lambda: desk.succeed("kill $(pgrep -u deploy -x ssh)")),
        ("link *", lambda: desk.succeed("pkill -KILL -u deploy -x ekiben; pkill -KILL -u deploy")),
        ("rename *manifest.json", lambda: desk.crash()),
    ):
        number = manifest()["sequence"]
        content = change()
        begin("deploy", "deploy", at)
        cut()
        if desk.init:
            succeeded, said = ended("deploy")
            assert not succeeded and "published" not in said, said
        else:
            desk.start()
            desk.wait_for_unit("multi-user.target")
        desk.succeed(by("deploy", "echo > ~/gate/at"))
        assert manifest()["sequence"] == number
        stays(last)
        said = desk.succeed(fleet("deploy"))
        assert published(said) > number, said
        assert ("has not responded for 30 s" in said) == (at == "rename *manifest.json"), said
        follows(content)
        last = content
        assert hub.succeed(f"ls {RELEASE} | grep -v -e json -e 'gz$' || true") == ""
        # neither do those leave anything that were killed
        assert desk.succeed("find /home/*/.cache/ekiben/fleet -mindepth 1") == ""
    # in the midst of an archive
    desk.succeed(by("deploy", "head -c 8000000 /dev/urandom > hosts/web/big"))
    begin("deploy", "deploy", "write 1048576")
    hub.wait_until_succeeds(f"test $(stat -c %s {RELEASE}/*.tar.gz.sent) -gt 100000")
    hub.succeed("kill $(pgrep -u ekiben-publisher sshd)")
    assert not ended("deploy")[0]
    stays(last)
    desk.succeed(by("deploy", "echo > ~/gate/at"), fleet("deploy"))
    follows(last)
    desk.succeed(by("deploy", "rm hosts/web/big"))

with subtest("of two who publish at once, one does, and the other is told"):
    number = manifest()["sequence"]
    desk.succeed(by("alice", "rm -r hosts; true"), "cp -r /home/deploy/fleet/hosts /home/alice/fleet; chown -R alice /home/alice/fleet")
    content, other = change("alice"), change("deploy")
    begin("alice", "deploy", "rename *manifest.json")
    begin("deploy", "deploy", "")
    desk.wait_until_succeeds("grep 'web is being published by alice at desk' /tmp/deploy.said")
    go_on_as("alice")
    succeeded, said = ended("alice")
    assert succeeded and published(said) > number, said
    succeeded, said = ended("deploy")
    assert not succeeded and "another release was published in the meantime; deploy again" in said, said
    follows(content)
    assert published(desk.succeed(fleet("deploy"))) > number
    follows(other)

with subtest("of two who hold at once, nobody's hold is lost; who is silent for too long keeps nobody from it"):
    hub.succeed(f"install -d {HUB}/hosts/other")
    begin("alice", "hold web", "rename *holds.json")
    begin("deploy", "hold other", "")
    desk.wait_until_succeeds("grep 'holds.json is being published by alice at desk' /tmp/deploy.said")
    go_on_as("alice")
    assert ended("alice")[0] and ended("deploy")[0]
    held = {host for host, _ in json.loads(hub.succeed(f"cat {HUB}/rollout/holds.json"))["held"]}
    assert held == {"web", "other"}, held
    begin("alice", "resume web", "create *.holds.json.sent")
    said = desk.succeed(fleet("resume other"))
    assert "has not responded for 30 s" in said and "other: not held" in said, said
    go_on_as("alice")
    succeeded, said = ended("alice")
    assert not succeeded and "somebody else has changed it in the meantime; try again" in said, said
    desk.succeed(fleet("resume web", "alice"))
    assert hub.succeed(f"ls {HUB}/rollout").split() == ["holds.json"]
    assert all(hold["until"] == 0 for _, hold in json.loads(hub.succeed(f"cat {HUB}/rollout/holds.json"))["held"])
    hub.succeed(f"rmdir {HUB}/hosts/other")
    desk.succeed(by("alice", "echo > ~/gate/at"))

with subtest("who has been silent for too long publishes nothing any more"):
    number = manifest()["sequence"]
    content, other = change("deploy"), change("alice")
    begin("alice", "deploy", "rename *manifest.json")
    newer = published(desk.succeed(fleet("deploy")))
    assert newer > number
    go_on_as("alice")
    succeeded, said = ended("alice")
    assert not succeeded and "another release was published in the meantime; deploy again" in said, said
    assert manifest()["sequence"] == newer
    follows(content)

with subtest("of two who plan a roll-out at once, one does, and the other is told"):
    for user in ("alice", "deploy"):
        desk.succeed(by(user, """jq '.waves = [{"hosts": ["web"]}]' fleet.json > new; mv new fleet.json"""))
    content, other = change("deploy"), change("alice")
    begin("alice", "deploy --waves", "create *plan.json*")
    desk.succeed(fleet("deploy --waves"))
    planned = hub.succeed(f"cat {HUB}/rollout/plan.json")
    go_on_as("alice")
    succeeded, said = ended("alice")
    assert not succeeded and "another release was published in the meantime; deploy again" in said, said
    assert hub.succeed(f"cat {HUB}/rollout/plan.json") == planned
    hub.succeed("systemctl start ekiben-hub-collect")
    follows(content)
    desk.succeed(fleet("deploy"))

with subtest("no number is given twice, whoever publishes when"):
    numbers = [manifest()["sequence"]]
    for _ in range(8):
        for user in ("alice", "deploy"):
            change(user)
            begin(user, "deploy", "")
        for user in ("alice", "deploy"):
            succeeded, said = ended(user)
            assert succeeded or "another release was published in the meantime" in said, said
            numbers += [published(said)] if succeeded else []
    assert len(set(numbers)) == len(numbers) and manifest()["sequence"] == max(numbers) > numbers[0] == min(numbers), numbers
    assert len(numbers) > 4

with subtest("a hub that was restored, or built anew, is noticed, and goes on with the next deploy, its hosts with it"):
    hub.succeed(f"cp -a {RELEASE} /tmp/backup")
    content = change()
    number = published(desk.succeed(fleet("deploy")))
    follows(content)
    for restore, state in (("cp -a /tmp/backup/. .", "refusing"), ("true", "hub went back")):
        hub.succeed(f"cd {RELEASE}; rm *; {restore}")
        code, said = desk.execute(fleet("status --once web"))
        assert code == 4 and "hub went back" in said and f"{number} has been published" in said, said
        assert poll()["result"] == "failed"
        becomes(state)
        newer = published(desk.succeed(fleet("deploy")))
        assert newer > number
        number = newer
        stays(content)
        becomes("up to date")
    # what was published, the hub has written down, where publishers cannot
    noted = json.loads(desk.succeed(fleet("history --json web")))
    assert noted[0]["manifest"]["sequence"] == number and noted[0]["manifest"]["commit"] is None, noted[0]
    assert str(number) in desk.succeed(fleet("history", "alice"))

with subtest("a directory that is synced in any order: the host waits for what is missing"):
    # once from there, for what the numbers go on from
    desk.succeed(by("deploy", "mkdir -p ~/served/hosts/web/reports"),
                 sftp("lcd /home/deploy/served", "get -R received", "lcd hosts/web", "get -R hosts/web/release"))
    number, content = manifest()["sequence"], change()
    newer = published(desk.succeed(fleet("--directory /home/deploy/served deploy")))
    assert newer > number
    local = "/home/deploy/served/hosts/web/release"
    new = json.loads(json.loads(desk.succeed(f"cat {local}/manifest.json"))["manifest"])["id"]
    before = shows(web, "app")
    # the manifest first
    desk.succeed(sftp(f"put {local}/manifest.json {RELEASE.removeprefix(HUB)}/manifest.json"))
    result = poll()
    assert result["result"] == "failed" and result["stage"] == "prepare" and "the hub does not have its archive" in result["error"], result
    becomes("refusing")
    # then half of the archive, in its place
    desk.succeed(f"head -c 2000 {local}/{new}.tar.gz > /tmp/half", sftp(f"put /tmp/half hosts/web/release/{new}.tar.gz"))
    result = poll()
    assert result["result"] == "failed" and "the archive does not match the manifest" in result["error"], result
    assert shows(web, "app") == before
    # then all of it
    desk.succeed(sftp(f"put {local}/{new}.tar.gz hosts/web/release/{new}.tar.gz"))
    assert poll()["result"] == "deployed" and shows(web, "app") == content
    # and what the host says comes back the same way
    wait_until_idle(web, "deliver")
    hub.wait_until_succeeds(f"jq -e '.deployed.sequence == {newer}' {HUB}/received/web/heartbeat.json")
    desk.succeed(sftp("lcd /home/deploy/served", "get -R received"))
    assert json.loads(desk.succeed(fleet("--directory /home/deploy/served status --json 2>/dev/null")))["web"]["state"] == "up to date"
    # over sftp it goes on from there
    change()
    assert published(desk.succeed(fleet("deploy"))) > number

with subtest("the hub tells of all hosts at once: who looks asks for no single one, unless that is old, or older than what was published from here"):
    def asked(arguments):
        desk.succeed(by("deploy", "rm -f ~/gate/told"))
        desk.execute(fleet(arguments))
        return desk.succeed(by("deploy", "cat ~/gate/told")).count("manifest.json\n")
    poll()
    becomes("up to date")
    question = f".web.manifest | fromjson | .manifest | fromjson | .sequence == {manifest()['sequence']}"
    hub.wait_until_succeeds(f"jq -e {shlex.quote(question)} {HUB}/received/all.json")
    counts = [asked(arguments) for arguments in ("status", "status web", "deploy")]
    assert counts[:2] == [0, 1] and counts[2] > 0, counts
    hub.succeed("systemctl stop ekiben-hub-collect.timer ekiben-hub-collect.service")
    change()
    desk.succeed(fleet("deploy"))
    assert asked("status") == 1 and json.loads(desk.execute(fleet("status --json 2>/dev/null"))[1])["web"]["state"] == "rebuild pending"
    # as alice sees it, who has not published that, it is as of then
    assert json.loads(desk.execute(fleet("status --json 2>/dev/null", "alice"))[1])["web"]["state"] == "up to date"
    hub.succeed("systemctl start ekiben-hub-collect.service")
    assert json.loads(desk.execute(fleet("status --json 2>/dev/null", "alice"))[1])["web"]["state"] == "rebuild pending"
    assert asked("status") == 0
    for trouble in ("touch -d '1 hour ago' all.json", "echo '{' > all.json", "rm all.json"):
        hub.succeed(f"cd {HUB}/received; {trouble}")
        assert asked("status") == 1, trouble
        assert json.loads(desk.execute(fleet("status --json 2> /dev/null | cat", "alice"))[1])["web"]["state"] == "rebuild pending"
        assert desk.execute(fleet("status", "alice"))[1].startswith("the hub has collected nothing for 1 h: ") == ("ago" in trouble)
    hub.succeed("systemctl start ekiben-hub-collect.timer")

with subtest("a job publishes by the script in the manual, and reads what came of each host"):
    with open("src/fleet/README.md") as manual:
        script = "#!/bin/sh\n# publish.sh" + manual.read().split("#!/bin/sh\n# publish.sh")[1].split("```")[0]
    desk.succeed(by("deploy",
                    f"printf %s {shlex.quote(script)} > ~/publish.sh; jq '.signingKey = \"~/.ssh/fleet-signer\"' fleet.json > new; "
                    "mv new fleet.json"))
    line = shlex.quote(f"[hub]:2222 {HOST_KEY}")
    job = f"PUBLISHER_KEY=$(cat /etc/scenario/deploy) SIGNING_KEY=$(cat /etc/scenario/other) HUB_KEY={line} sh ~/publish.sh web 2> ~/said"
    content = change()
    told = json.loads(desk.succeed(by("deploy", job)))
    assert told == {"web": {"state": "published", "release": manifest()["sequence"]}}, told
    assert "web: building ..." in desk.succeed("cat /home/deploy/said")
    assert json.loads(desk.succeed(by("deploy", job))) == {"web": {"state": "unchanged", "release": manifest()["sequence"]}}
    follows(content)
    change(trouble="build")
    code, said = desk.execute(by("deploy", job))
    told = json.loads(said)["web"]
    assert code == 1 and told["state"] == "failed" and "Failed to build web" in told["error"], (code, said)
    # however much there is to say
    flake = '{ outputs = _: { nixosConfigurations.web = throw (toString (builtins.genList (_: "word") 300)); }; }'
    desk.succeed(by("deploy", f"cp hosts/web/flake.nix ~/kept; echo {shlex.quote(flake)} > hosts/web/flake.nix"))
    code, said = desk.execute(by("deploy", job))
    assert code == 1 and "word word" in json.loads(said)["web"]["error"], (code, said)
    desk.succeed(by("deploy", "mv ~/kept hosts/web/flake.nix"))
