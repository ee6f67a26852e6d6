start_all()
HOST = "/var/lib/ekiben-hub/hosts/web"
RECEIVED = "/var/lib/ekiben-hub/received/web"
OWN = "/var/lib/ekiben/instances/fleet"
# how a release of a host is built
FLAKE = '{ outputs = { self }: { nixosConfigurations.web = import ./system.nix { name = "web"; app = ./app; other = ./app; revision = "none"; }; }; }'
COUNT = iter(range(2, 1000))
sequence = 0

for machine in (hub, web):
    machine.wait_for_unit("multi-user.target")
use_host_key(hub, "host-key")
hub.succeed("mkdir -m 700 /srv/publish", "install -m 600 /etc/scenario/signer /etc/scenario/other /srv/publish")
web.succeed("install -m 600 /etc/scenario/identity /root/identity", "mkdir -p /srv/release/app", f"echo {shlex.quote(FLAKE)} > /srv/release/flake.nix")
web.succeed(f"cd /etc/scenario; cp -Lr $({SYSTEM_FILES}) /srv/release")
web.succeed("cd /srv/release/app; echo 0 > content; echo none > trouble; echo default > variant")
hub.succeed(f"base64 -d <<< {web.succeed('tar -C /srv -cz release | base64 -w0').strip()} | tar -C /srv -xz")


def archive(content, trouble="none", add="true"):
    """Makes the archive of a release; `add` is a command that adds something odd to it, and may say in
    `.names` what is archived."""
    hub.succeed(f"cd /srv/release/app; echo {content} > content; echo {trouble} > trouble")
    hub.succeed(f"rm -rf /srv/odd; cp -r /srv/release /srv/odd; cd /srv/odd; {add}")
    hub.succeed("cd /srv/odd; tar --sort=name --mtime=@0 -cPf - $(cat .names 2>/dev/null || echo .) | gzip -n > /srv/publish/archive")


def offer(key="signer", **changes):
    """Publishes what `archive` has made; returns the release's identifier. `changes` are of the manifest."""
    global sequence
    sequence += 1
    sha256 = hub.succeed("sha256sum /srv/publish/archive | cut -c1-64").strip()
    size = int(hub.succeed("stat -c %s /srv/publish/archive"))
    manifest = {"format": 1, "host": "web", "id": sha256, "sequence": sequence, "sha256": sha256, "size": size, "attr": "web", "published": 1700000000}
    text = json.dumps(manifest | changes)
    hub.succeed(f"cp /srv/publish/archive {HOST}/release/{manifest['id']}.tar.gz", f"printf %s {shlex.quote(text)} > /srv/publish/manifest")
    signature = None
    if key:
        hub.succeed(f"cd /srv/publish; rm -f manifest.sig; ssh-keygen -q -Y sign -n ekiben -f {key} manifest")
        signature = hub.succeed("cat /srv/publish/manifest.sig")
    signed = json.dumps({"manifest": text, "signature": signature})
    hub.succeed(f"printf %s {shlex.quote(signed)} > {HOST}/release/.new", f"mv {HOST}/release/.new {HOST}/release/manifest.json")
    return manifest["id"]


def heartbeat():
    """What the host has said last of itself."""
    return json.loads(hub.succeed(f"cat {HOST}/reports/heartbeat.json 2>/dev/null || cat {RECEIVED}/heartbeat.json"))


def told(run):
    """Waits until the hub has the report of a run; returns it, and its log."""
    place = f"$(ls -d {HOST}/reports/{run}.json {RECEIVED}/{run}.json 2>/dev/null | head -n 1 || true)"
    hub.wait_until_succeeds(f'test -e "{place}"')
    return json.loads(hub.succeed(f"cat {place}")), hub.succeed(f"p={place}; zcat ${{p%.json}}.log.gz")


def deploys(content):
    """Publishes a good release, and checks that the next poll deploys it and tells the hub."""
    archive(content)
    release = offer()
    ended = run(web, "fleet")
    assert ended["result"] == "deployed" and ended["release"]["id"] == release, ended
    assert shows(web, "app") == str(content)
    report, words = told(ended["id"])
    assert report["release"]["id"] == release and report["result"] == "deployed", report
    assert "building '" in words and "activating the configuration" in words, words
    hub.wait_until_succeeds(f"jq -e '.deployed.id == \"{release}\" and .running == null' {HOST}/reports/heartbeat.json")
    return release


def refuses(words, stage="prepare"):
    """Polls, and checks that nothing of what the hub offers is used."""
    before = (running(web), generation(web))
    ended = run(web, "fleet")
    assert ended["result"] == "failed" and ended["stage"] == stage and words in ended["error"], ended
    assert (running(web), generation(web)) == before
    assert web.succeed("ls /tmp /var/tmp | grep -x out || true") == ""
    return ended


def tells(state, words):
    """Checks that the hub says this of the host, and fails."""
    hub.succeed("systemctl start ekiben-hub-collect.service")
    said = hub.fail(f"ekiben fleet --directory {HOST.removesuffix('/hosts/web')} status --once web 2>&1")
    assert state in said and words in said, said


web.succeed(f"nix-env --profile {PROFILE} --set "
            "$(nix build --no-link --print-out-paths path:/srv/release#nixosConfigurations.web.config.system.build.toplevel)",
            f"{PROFILE}/bin/switch-to-configuration switch")

with subtest("the hub has nothing yet: said, and tried again by the next poll"):
    refuses("the hub has none for web yet")
    assert heartbeat()["seen"] is None

with subtest("first contact: one of two hubs is down, the other one has a release"):
    deploys(next(COUNT))

with subtest("nothing new: one session, nothing written, nothing built"):
    before = (running(web), generation(web))
    commit = web.succeed("cat /var/lib/ekiben/instances/fleet/repository/.git/refs/heads/main")
    assert run(web, "fleet")["result"] == "unchanged", last_run(web, "fleet")
    assert (running(web), generation(web)) == before
    assert web.succeed("cat /var/lib/ekiben/instances/fleet/repository/.git/refs/heads/main") == commit

# on hosts alone
with subtest("published twice within a second: the later one is deployed"):
    archive(next(COUNT))
    offer()
    content = next(COUNT)
    archive(content)
    release = offer()
    assert run(web, "fleet")["release"]["id"] == release
    assert shows(web, "app") == str(content)

with subtest("published while the host builds: it reports what it built, and the next poll brings the other"):
    content = next(COUNT)
    archive(content)
    first = offer()
    hold(web, "build: begun")
    follow(web, "fleet")
    web.succeed("ekiben trigger fleet")
    wait_until_said(web, "fleet", "Held at build: begun.")
    assert heartbeat()["running"]["id"] == first
    archive(next(COUNT))
    second = offer()
    go_on(web, "build: begun")
    wait_until_at_rest(web, "fleet")
    ended = last_run(web, "fleet")
    assert ended["result"] == "deployed" and ended["release"]["id"] == first, ended
    assert shows(web, "app") == str(content)
    assert told(ended["id"])[0]["release"]["id"] == first
    assert run(web, "fleet")["release"]["id"] == second

# everywhere
with subtest("the hub is down before: nothing is done, nothing is lost"):
    archive(next(COUNT))
    release = offer()
    hub.succeed("systemctl stop sshd")
    refuses("this looks like a problem of the network")
    hub.succeed("systemctl start sshd")
    assert run(web, "fleet")["release"]["id"] == release

for point in some(web, ("activate: switched", "build: begun", "activate: switching", "activate: persisted"), 1):
    with subtest(f"the hub goes down at {point}: the new system stays, the report comes later"):
        content = next(COUNT)
        archive(content)
        release = offer()
        hold(web, point)
        follow(web, "fleet")
        web.succeed("ekiben trigger fleet")
        wait_until_said(web, "fleet", f"Held at {point}.")
        hub.succeed("systemctl stop sshd; pkill -f '^sshd' || true")
        go_on(web, point)
        wait_until_at_rest(web, "fleet")
        ended = last_run(web, "fleet")
        assert ended["result"] == "deployed", ended
        assert shows(web, "app") == str(content)
        wait_until_idle(web, "deliver")
        assert web.succeed(f"ls /var/lib/ekiben/outbox/fleet/{ended['id']}.json")
        hub.succeed("systemctl start sshd")
        assert run(web, "fleet")["result"] == "unchanged"
        assert told(ended["id"])[0]["result"] == "deployed"
        assert heartbeat()["deployed"]["id"] == release

# on hosts alone
OUTBOX = "/var/lib/ekiben/outbox/fleet"
for what, trouble in (("full", f"mount -t tmpfs -o size=4k,nr_inodes=1 tmpfs {OUTBOX}"), ("read-only", f"mount --bind -o ro {OUTBOX} {OUTBOX}")):
    with subtest(f"the place of reports is {what}: the unit has failed, and the hub gets the report when that is mended"):
        archive(next(COUNT), trouble="activation")
        release = offer()
        web.succeed(trouble)
        follow(web, "fleet")
        web.succeed("ekiben trigger fleet")
        # it was the end of its run that has failed at first
        web.wait_until_succeeds("systemctl is-failed ekiben-fleet.service && "
                                "systemctl show --property ActiveState --value ekiben-retry@fleet | grep -x activating")
        wait_until_said(web, "fleet", f"write {OUTBOX}/")
        web.succeed(f"umount {OUTBOX}")
        wait_until_at_rest(web, "fleet")
        rolled_back = [run for run in status(web, "fleet")["runs"] if run["release"] and run["release"]["id"] == release and run["result"] == "rolledBack"]
        assert status(web, "fleet")["tried"]["count"] == len(rolled_back), rolled_back
        assert told(rolled_back[-1]["id"])[0]["result"] == "rolledBack"
        deploys(next(COUNT))

with subtest("a journal that cannot be read keeps no run from its end"):
    archive(next(COUNT))
    offer()
    web.succeed("mount --bind $(readlink -f $(type -P false)) $(readlink -f $(command -v journalctl))")
    ended = run(web, "fleet")
    web.succeed("umount $(readlink -f $(command -v journalctl))")
    assert ended["result"] == "deployed" and told(ended["id"])[0]["result"] == "deployed", ended

with subtest("the hub has a report: the host keeps it no longer"):
    hub.succeed("systemctl start ekiben-hub-collect.service")
    assert run(web, "fleet")["result"] == "unchanged"
    assert web.succeed("ls /var/lib/ekiben/outbox/fleet") == ""

with subtest("the connection breaks in mid-download: what has come is not fetched again"):
    content = next(COUNT)
    archive(content, add="head -c 8000000 /dev/urandom > noise")
    release = offer()
    # as a download that was cut off leaves it
    hub.succeed(f"mv {HOST}/release/{release}.tar.gz {HOST}/whole; head -c 5000000 {HOST}/whole > {HOST}/release/{release}.tar.gz")
    refuses("the archive does not match the manifest")
    hub.succeed(f"mv {HOST}/whole {HOST}/release/{release}.tar.gz")
    assert run(web, "fleet")["result"] == "deployed", last_run(web, "fleet")

with subtest("the host is killed in mid-download: the next poll completes it"):
    content = next(COUNT)
    archive(content, add="head -c 50000000 /dev/urandom > noise")
    release = offer()
    place = f"/var/lib/ekiben/instances/fleet/{release}.tar.gz"
    # the path unit would have it go on at once
    web.succeed("systemctl stop ekiben-fleet.path; systemctl start --no-block ekiben-fleet.service")
    came = web.succeed(f"until test -s {place}; do :; done; pkill -STOP -x -u ekiben-fleet ssh; stat -c %s {place}")
    web.succeed("systemctl kill --kill-whom=all --signal=KILL ekiben-fleet.service")
    assert 0 < int(came) < int(hub.succeed(f"stat -c %s {HOST}/release/{release}.tar.gz"))
    wait_until_idle(web, "fleet")
    web.succeed("systemctl start ekiben-fleet.path")
    wait_until_at_rest(web, "fleet")
    assert run(web, "fleet")["result"] in ("deployed", "unchanged"), last_run(web, "fleet")
    assert shows(web, "app") == str(content)

# everywhere
with subtest("a system that does not run: rolled back, told, not tried again until something changes"):
    before = (running(web), generation(web))
    archive(next(COUNT), trouble="activation")
    bad = offer()
    ended = run(web, "fleet")
    assert ended["result"] == "rolledBack" and (running(web), generation(web)) == before, ended
    report, words = told(ended["id"])
    assert report["result"] == "rolledBack" and "trouble" in words, (report, words)
    again = run(web, "fleet")
    assert "known to be bad" in again["error"], again
    # also while it is looked at again, and after that
    tells("rolled back", "exited with 2")
    beat = heartbeat()
    assert (beat["last"]["result"], beat["last"]["release"]["id"], beat["seen"]["id"]) == ("rolledBack", bad, bad), beat
    deploys(next(COUNT))

# on hosts alone
with subtest("a system that cannot be built: told, not tried again"):
    archive(next(COUNT), trouble="build")
    offer()
    ended = run(web, "fleet")
    assert (ended["result"], ended["stage"]) == ("failed", "build"), ended
    assert "trouble in build" in told(ended["id"])[1]
    assert "known to be bad" in run(web, "fleet")["error"]
    deploys(next(COUNT))
    # it is gone for good, with all that came with it
    assert web.succeed(f"runuser -u ekiben-fleet -- git -C {OWN}/repository fsck --no-progress --unreachable --no-reflogs") == ""
    assert web.succeed(f"ls {OWN}/*.tar.gz | wc -l").strip() == "1"

# everywhere
with subtest("a system that cuts the host off from the hub: rolled back, and told afterwards"):
    before = (running(web), generation(web))
    archive(next(COUNT), trouble="network")
    offer()
    ended = run(web, "fleet")
    assert ended["result"] == "rolledBack" and "health check hub" in ended["error"], ended
    assert (running(web), generation(web)) == before
    assert told(ended["id"])[0]["result"] == "rolledBack"
    deploys(next(COUNT))

# on hosts alone
def vanishes(*points):
    """Publishes a good release, and has the hub vanish from the network during the switch to it. Then
    runs hold at `points`; returns what the release shows."""
    content = next(COUNT)
    archive(content)
    offer()
    hold(web, "activate: switched", *points)
    follow(web, "fleet")
    web.succeed("ekiben trigger fleet")
    wait_until_said(web, "fleet", "Held at activate: switched.")
    hub.succeed("ip link set eth1 down")
    go_on(web, "activate: switched")
    return str(content)


with subtest("the hub vanishes during the switch: it is the same with the old system, so the new one stays"):
    content = vanishes()
    wait_until_at_rest(web, "fleet")
    ended = last_run(web, "fleet")
    assert ended["result"] == "deployed" and "the old system failed, too" in ended["warnings"][0], ended
    assert shows(web, "app") == content and generation(web).endswith(running(web))
    hub.succeed("ip link set eth1 up")
    assert run(web, "fleet")["result"] == "unchanged", last_run(web, "fleet")
    assert told(ended["id"])[0]["warnings"] == ended["warnings"]

with subtest("the hub vanishes during the switch, and the run is killed meanwhile: the old system, then another try"):
    before = (running(web), generation(web))
    content = vanishes("back: system restored")
    wait_until_said(web, "fleet", "Held at back: system restored.")
    web.succeed("rm /run/ekiben-fault; systemctl kill --kill-whom=main --signal=KILL ekiben-fleet.service")
    wait_until_at_rest(web, "fleet")
    ended = last_run(web, "fleet")
    assert ended["result"] == "rolledBack" and (running(web), generation(web)) == before, ended
    hub.succeed("ip link set eth1 up")
    assert run(web, "fleet")["result"] == "deployed", last_run(web, "fleet")
    assert shows(web, "app") == content

with subtest("clocks are years apart: ignored"):
    # the manifest's time is for people
    archive(next(COUNT))
    offer(published=4000000000)
    assert run(web, "fleet")["result"] == "deployed", last_run(web, "fleet")
    archive(next(COUNT))
    offer(published=1)
    assert run(web, "fleet")["result"] == "deployed", last_run(web, "fleet")
    archive(next(COUNT))
    offer(published=2**64 - 1)
    assert run(web, "fleet")["result"] == "deployed", last_run(web, "fleet")

# everywhere
with subtest("the hub's host key is another one: refused, said, nothing fetched, nothing told"):
    archive(next(COUNT))
    release = offer()
    wait_until_idle(web, "deliver")
    beat = heartbeat()
    use_host_key(hub, "other")
    refuses("Host key verification failed; hub.hostKey here is not the key of the hub")
    assert heartbeat() == beat
    use_host_key(hub, "host-key")
    assert run(web, "fleet")["release"]["id"] == release

# What answers in place of the hub's SFTP server, in a way that it never would.
HOSTILE = r"""
import sys

def say(kind, *fields, number=None):
    texts = [field if isinstance(field, bytes) else field.to_bytes(4, "big") for field in (number, *fields)]
    packet = bytes([kind]) + b"".join(texts)
    sys.stdout.buffer.write(len(packet).to_bytes(4, "big") + packet)
    sys.stdout.buffer.flush()

def text(size):
    return size.to_bytes(4, "big") + bytes(size)

way = sys.argv[1]
while head := sys.stdin.buffer.read(4):
    packet = sys.stdin.buffer.read(int.from_bytes(head, "big"))
    kind, number = packet[0], int.from_bytes(packet[1:5], "big")
    if kind == 1:
        if way == "greets as a shell does":
            print("Welcome!\n" * 9, flush=True)
        say(2, number=4 if way == "speaks another version" else 3)
    elif way == "says that it says more than anybody may":
        sys.stdout.buffer.write(bytes([127, 255, 255, 255]))
        sys.stdout.buffer.flush()
    elif way == "answers another question":
        say(102, text(4), number=number + 1)
    elif way == "answers with something else":
        say(99, text(4), number=number)
    elif way == "answers with half of a name":
        say(102, 1000, number=number)
    elif kind == 3:
        say(102, text(4), number=number)
    elif kind == 5 and way == "has a file without an end":
        say(103, text(32768), number=number)
    elif kind == 5 and way == "has nothing in a file, and no end of it":
        say(103, text(0), number=number)
    elif kind == 5 and way == "sends more of a file than was asked for":
        say(103, text(200000), number=number)
    else:
        say(101, 0, text(0), text(0), number=number)
"""

# on hosts alone
with subtest("a hub that answers as no SFTP server would is refused, whatever it says"):
    archive(next(COUNT))
    offer()
    hub.succeed(f"printf %s {shlex.quote(HOSTILE)} > /run/hostile.py; usermod --shell /bin/sh fleet-web")
    odd = "the answer is not valid SFTP"
    for way, words in (
        ("greets as a shell does", odd),
        ("speaks another version", odd),
        ("says that it says more than anybody may", odd),
        ("answers another question", odd),
        ("answers with something else", odd),
        ("answers with half of a name", odd),
        ("has a file without an end", "it has more than"),
        ("has nothing in a file, and no end of it", "EOF"),
        ("sends more of a file than was asked for", "it has more than"),
        ("says yes to everything", odd),
    ):
        lines = ("UsePAM yes", "HostKey /etc/ssh/ssh_host_ed25519_key", "AuthorizedKeysFile /etc/ssh/authorized_keys.d/%u",
                 f'Subsystem sftp /usr/bin/python3 /run/hostile.py "{way}"')
        hub.succeed(
            f"printf '%s\\n' {shlex.join(lines)} > /run/sshd_hostile; systemctl stop sshd",
            "systemd-run --unit=hostile --property=RuntimeDirectory=sshd /usr/sbin/sshd -D -f /run/sshd_hostile",
        )
        hub.wait_for_open_port(22)
        refuses(words)
        assert web.succeed(f"ls {OWN}/fetched/fleet {OWN} | grep -c tar.gz || true").strip() == "1", way
        hub.succeed("systemctl stop hostile")
    hub.succeed("systemctl restart sshd")
    assert run(web, "fleet")["result"] == "deployed", last_run(web, "fleet")

# on hosts alone
for what, how, words in (
    ("is not signed", {"key": None}, "not signed"),
    ("is signed by somebody else", {"key": "other"}, "signed by none of `signers`"),
    ("is another host's", {"host": "db"}, 'it is for host "db", this is web'),
    ("is of another format", {"format": 2}, "unsupported format 2"),
    ("names a way out", {"id": "../../" + "a" * 58}, "expected a SHA-256"),
    ("names another archive", {"sha256": "0" * 64}, "the archive does not match the manifest"),
    ("says what is too large", {"size": 1 << 40}, "its archive has 1099511627776 bytes, more than 67108864"),
    ("says another size", {"size": 1}, "the archive does not match the manifest"),
    ("goes back", {"sequence": 1}, "has been seen before"),
):
    with subtest(f"a manifest that {what} is refused, and the hub is told in the same session"):
        archive(next(COUNT))
        offer(**how)
        refuses(words)
        assert words in (seen := heartbeat())["refused"], seen
        # what the hub itself cannot read it says, too
        tells("unreadable" if what in ("is another host's", "is of another format", "names a way out") else "refusing",
              words if words in "not signed the archive does not match the manifest" else "")
deploys(next(COUNT))
assert (seen := heartbeat())["refused"] is None, seen

with subtest("a manifest that was changed after it was signed is refused"):
    archive(next(COUNT))
    offer()
    hub.succeed(f"sed -i 's/1700000000/1700000001/' {HOST}/release/manifest.json")
    refuses("signed by none of `signers`")

for what, add in (
    ("a link out", "ln -s /etc/passwd link"),
    ("a link to link through", "ln -s /tmp d; echo d > .names; echo flake.nix >> .names"),
    ("a hard link", "ln flake.nix hard"),
    ("a device", "mknod null c 1 3"),
    ("a FIFO", "mkfifo fifo"),
    ("an absolute name", "touch /tmp/out; echo /tmp/out > .names; echo . >> .names; rm -f /tmp/out.keep"),
    ("a name above", "touch ../out; echo ../out > .names"),
    ("a repository", "mkdir .git; touch .git/config"),
    ("300 MB of nothing", "truncate -s 300M bomb"),
    ("30,000 names", "mkdir many; cd many; seq 30000 | xargs touch"),
):
    with subtest(f"an archive with {what} is refused, and leaves nothing"):
        archive(next(COUNT), add=add)
        web.succeed("rm -f /tmp/out")
        offer()
        refuses("Failed to unpack")
        tells("refusing", "Failed to unpack")
        wait_until_idle(web, "deliver")
        assert web.succeed(f"ls {OWN}/fetched/fleet") == ""

with subtest("what has expired is not taken for new; what runs and has expired is stale, on both sides, until it is renewed"):
    archive(next(COUNT))
    past, future = (int(web.succeed("date +%s")) + seconds for seconds in (-100, 1000))
    offer(expires=past)
    refuses("it expired 1 min ago")
    tells("refusing", "nobody has renewed it")
    offer(expires=future)
    assert run(web, "fleet")["result"] == "deployed", last_run(web, "fleet")
    web.succeed("ekiben status fleet")
    # time passes
    offer(expires=past)
    assert run(web, "fleet")["result"] == "unchanged", last_run(web, "fleet")
    assert "stale: the release expired" in web.fail("ekiben status fleet")
    tells("stale", "its release has expired")
    offer(expires=future)
    assert run(web, "fleet")["result"] == "unchanged", last_run(web, "fleet")
    web.succeed("ekiben status fleet")
    hub.succeed(f"systemctl start ekiben-hub-collect.service; ekiben fleet --directory {HOST.removesuffix('/hosts/web')} status --once web")

with subtest("an archive that is gone: the hub says why, until it is back"):
    archive(next(COUNT))
    release = offer()
    hub.succeed(f"mv {HOST}/release/{release}.tar.gz {HOST}/away")
    ended = refuses("the hub does not have its archive")
    assert "this machine" not in ended["error"], ended
    tells("refusing", "the hub does not have its archive")
    hub.succeed(f"mv {HOST}/away {HOST}/release/{release}.tar.gz")
    assert run(web, "fleet")["result"] == "deployed", last_run(web, "fleet")

with subtest("a release without the system of its host: the hub says so"):
    archive(next(COUNT))
    offer(attr="other")
    assert (run(web, "fleet")["stage"], poll(web)["stage"]) == ("build", "prepare")
    tells("failing", "other")

with subtest("a disk that fills up in mid-download is this machine's trouble, and no refusal"):
    web.succeed(f"cp -a {OWN} /root/own; mount -t tmpfs -o size=$(( $(du -sm {OWN} | cut -f1) + 15 ))M tmpfs {OWN}; "
                f"cp -a /root/own/. {OWN}; chown --reference=/root/own {OWN}; chmod 700 {OWN}")
    archive(next(COUNT), add="head -c 30000000 /dev/urandom > noise")
    offer()
    ended = run(web, "fleet")
    assert "o space left" in ended["error"] and "a problem of this machine" in ended["error"], ended
    assert heartbeat()["refused"] is None
    tells("failing", "o space left")
    web.succeed(f"umount {OWN}")
    assert run(web, "fleet")["result"] == "deployed", last_run(web, "fleet")

with subtest("files that cannot be fetched: the hub says so"):
    hub.succeed(f"echo junk > {HOST}/files/index.json; chgrp fleet-web {HOST}/files/index.json; chmod 640 {HOST}/files/index.json")
    assert run(web, "fleet")["result"] == "failed", last_run(web, "fleet")
    tells("files missing", "Failed to read the index")
    hub.succeed("systemctl start ekiben-hub-files.service")
    assert run(web, "fleet")["result"] == "unchanged", last_run(web, "fleet")

with subtest("an archive of few bytes with a name of many is refused before anything is made of it"):
    # GNU tar has a long name before the file that is meant
    write_long_name = """
import gzip, tarfile
header = tarfile.TarInfo("x")
header.type, header.size = b"L", 1 << 28
with gzip.open("/srv/publish/archive", "wb", 1) as archive:
    archive.write(header.tobuf(tarfile.GNU_FORMAT))
    for _ in range(256):
        archive.write(b"a" * (1 << 20))
"""
    hub.succeed(f"python3 -c {shlex.quote(write_long_name)}")
    offer()
    ended = refuses("expected names of at most 1024 bytes")
    assert ended["finished"] - ended["started"] < 30, ended

with subtest("an archive that is larger than allowed is not fetched, or not to its end"):
    taken = "du -sm /var/lib/ekiben/instances/fleet | cut -f1"
    hub.succeed("head -c 70000000 /dev/urandom > /srv/publish/archive")
    offer()
    before_it = int(web.succeed(taken))
    refuses("its archive has 70000000 bytes, more than 67108864")
    assert int(web.succeed(taken)) <= before_it
    offer(size=60000000)
    refuses("Failed to")
    assert int(web.succeed(taken)) - before_it < 66

with subtest("what the hub does not hand out is not taken for what it does not have"):
    archive(next(COUNT))
    release = offer()
    for path, usual in ((f"{HOST}/release", "755"), (f"{HOST}/release/manifest.json", "644"), (f"{HOST}/release/{release}.tar.gz", "644")):
        hub.succeed(f"chmod 700 {path}")
        refuses("Permission denied")
        hub.succeed(f"chmod {usual} {path}")
    assert run(web, "fleet")["result"] == "deployed", last_run(web, "fleet")

with subtest("this host's own key is missing: said, nothing is lost, and it goes on when it is there again"):
    archive(next(COUNT))
    offer()
    web.succeed("mv /root/identity /root/identity.away")
    assert "the file of `services.ekiben.fleet.identityFile` is missing or empty" in run(web, "fleet")["error"], last_run(web, "fleet")
    web.succeed("mv /root/identity.away /root/identity")
    assert run(web, "fleet")["result"] == "deployed", last_run(web, "fleet")

with subtest("a heartbeat that the hub has no room for does not count as told"):
    # so that there is nothing else to tell
    hub.succeed("systemctl start ekiben-hub-collect.service")
    assert run(web, "fleet")["result"] == "unchanged", last_run(web, "fleet")
    hub.succeed(f"cat /dev/zero > {HOST}/reports/full || true")
    web.succeed("echo trouble > /var/lib/ekiben/outbox/fleet/files")
    wait_until_idle(web, "deliver")
    web.fail("systemctl start ekiben-deliver.service")
    assert heartbeat()["files"] is None
    hub.succeed(f"rm {HOST}/reports/full")
    web.succeed("systemctl start ekiben-deliver.service")
    assert heartbeat()["files"] == "trouble\n"
    web.succeed("rm /var/lib/ekiben/outbox/fleet/files")

STATUS = "/var/lib/ekiben/status/fleet.json"

with subtest("who has lost what the hub offered last does not go back either"):
    deploys(next(COUNT))
    archive(next(COUNT))
    # what lies in the user's own directory first, then what root has written down, too
    for lost in ("true", f"mv {STATUS} /root/status.json"):
        web.succeed(f"rm {OWN}/seen.json", lost)
        offer(sequence=1)
        refuses("has been seen before")
        offer()
        web.succeed(f"printf %s {shlex.quote(json.dumps({'id': 'a' * 64, 'sequence': sequence - 1}))} > {OWN}/seen.json")
    web.succeed(f"mv /root/status.json {STATUS}")
    assert run(web, "fleet")["result"] == "deployed", last_run(web, "fleet")

with subtest("a number of days to come is refused; who holds one is let go by root, and by nobody else"):
    archive(next(COUNT))
    offer(sequence=int(web.succeed("date +%s")) + 2 * 86400)
    refuses("which is tomorrow by this machine's clock")
    release = offer()
    out_of_range, high, higher = (json.dumps({"id": "a" * 64, "sequence": number}) for number in ((1 << 64) - 1, 1 << 39, (1 << 39) + 1))
    for far, words in (
        (f"echo {shlex.quote(out_of_range)} > {OWN}/seen.json", "ekiben forget-releases fleet"),
        (f"echo {shlex.quote(high)} > {OWN}/seen.json", "release 549755813888 of aaaa"),
        (f"jq '.runs[0].release = {higher}' {STATUS} > /root/status.json; cp /root/status.json {STATUS}", "release 549755813889 of aaaa"),
    ):
        web.succeed(far)
        refuses(words)
        web.fail("runuser -u ekiben-fleet -- ekiben forget-releases")
        refuses(words)
        assert "will accept the next release of its hub" in web.succeed("ekiben forget-releases")
        offer(key=None)
        refuses("not signed")
        release = offer()
        assert run(web, "fleet")["release"]["id"] == release, last_run(web, "fleet")
        # once: what was offered since is known
        offer(sequence=sequence - 2)
        refuses("has been seen before")
        archive(next(COUNT))
        offer()

with subtest("what lies in the way in directories of Ekiben's own does not stay there"):
    content = next(COUNT)
    archive(content)
    release = offer()
    outbox = "/var/lib/ekiben/outbox/fleet"
    web.succeed(
        f"cd {OWN}; rm -r fetched; touch fetched; mkdir -p {release}.tar.gz/deep; touch {'b' * 64}.tar.gz; chown -R ekiben-fleet .",
        f"mkdir {outbox}/{'c' * 32}.json; touch {outbox}/{'d' * 32}.log.gz {outbox}/junk",
    )
    ended = run(web, "fleet")
    assert ended["result"] == "deployed" and shows(web, "app") == str(content), ended
    told(ended["id"])
    assert run(web, "fleet")["result"] == "unchanged", last_run(web, "fleet")
    assert web.succeed(f"cd {OWN}; ls | grep tar.gz || true; ls fetched/fleet") == ""
    assert web.succeed(f"ls {outbox} | grep -E '^(c{{32}}|d{{32}}|junk)' || true") == ""

def configure(change):
    """Has the host's hub, as its configuration says, be another: by a program of jq's."""
    web.succeed("test -e /root/config.json || cp -L /etc/ekiben/config.json /root")
    web.succeed(f"jq {shlex.quote('.instances.fleet.hub |= (' + change + ')')} /root/config.json > /root/new.json; "
                "rm /etc/ekiben/config.json; cp /root/new.json /etc/ekiben/config.json")


# elsewhere the configuration is in the store
if is_host(web):
    with subtest("the hub's key is rotated: a host that knows both follows"):
        another = hub.succeed("ssh-keygen -y -f /srv/publish/other").strip()
        configure(f'.servers |= map(., .hostKey = "{another}")')
        for key in ("other", "host-key"):
            use_host_key(hub, key)
            assert run(web, "fleet")["result"] == "unchanged", last_run(web, "fleet")

    with subtest("the signer is rotated: a host that knows both follows; one that knows the new one only waits for it"):
        archive(next(COUNT))
        for key in ("signer", "other"):
            configure(f'.signers += ["{another}"]')
            offer(key=key)
            assert run(web, "fleet")["result"] in ("deployed", "unchanged"), last_run(web, "fleet")
        configure(f'.signers = ["{another}"]')
        offer()
        refuses("signed by none of `signers`")
        offer(key="other")
        assert run(web, "fleet")["result"] == "unchanged", last_run(web, "fleet")
        configure(".")

    with subtest("a host that was restored, or installed again, takes what the hub offers"):
        deploys(next(COUNT))
        web.succeed(f"rm -rf /root/old; mkdir /root/old; cp -a {OWN} {STATUS} /root/old")
        release = deploys(next(COUNT))
        for restore in ("cp -a /root/old/fleet/. .; cp -a /root/old/fleet.json ../../status", "true"):
            web.succeed(f"cd {OWN}; find . -mindepth 1 -delete; rm {STATUS}; {restore}")
            assert run(web, "fleet")["release"]["id"] == release, last_run(web, "fleet")
            assert (seen := last_run(web, "fleet"))["result"] in ("deployed", "unchanged"), seen
            wait_until_idle(web, "deliver")
            hub.succeed("systemctl start ekiben-hub-collect.service")
            hub.succeed(f"ekiben fleet --directory {HOST.removesuffix('/hosts/web')} status --once web")

# everywhere
with subtest("after all that, a good release is deployed"):
    deploys(next(COUNT))
