start_all()
for machine in machines:
    machine.wait_for_unit("multi-user.target")
hub.wait_for_unit("sshd.service")
hub.wait_for_open_port(22)
# what is left is looked at here first
hub.require_unit_state("ekiben-hub-collect.timer", "active")
hub.succeed("systemctl stop ekiben-hub-collect.timer")
HUB = "/var/lib/ekiben-hub"
HOST_KEY = hub.succeed("cut -d' ' -f1,2 /etc/ssh/ssh_host_ed25519_key.pub").strip()
for machine in (a, b):
    machine.succeed(
        "mkdir -p -m 700 /root/.ssh; install -m 600 $(readlink -f /etc/scenario/key) /root/.ssh/id_ed25519",
        f"echo {shlex.quote(f'hub,[hub]:2222 {HOST_KEY}')} > /root/.ssh/known_hosts",
        # no master, no agent, no question
        "printf 'BatchMode yes\\nConnectTimeout 10\\nIdentitiesOnly yes\\n' > /root/.ssh/config",
    )
# a person's key, for what has to work besides
ALICE = "-i /root/alice"
a.succeed(f"umask 077; printf %s {shlex.quote(hub.succeed('cat /etc/scenario/key-alice'))} > /root/alice")


def as_publisher(command):
    """The command line that runs `command` as the user that publishes."""
    return f"runuser -u ekiben-hub -- env HOME={HUB}/home sh -euc {shlex.quote(command)}"


# what `ekiben fleet deploy` would have written
for host in ("a", "b"):
    release = f"{HUB}/hosts/{host}/release"
    hub.succeed(as_publisher(f"echo manifest of {host} > {release}/manifest.json; echo archive of {host} > {release}/1.tar.gz"))
hub.succeed(
    "mkdir -p -m 700 /root/secrets; umask 077; echo secret of a > /root/secrets/a; echo secret of b > /root/secrets/b",
    "install -d -o ekiben-hub /srv/fleet; echo all of it > /srv/fleet/flake.nix; chmod -R a+rX /srv/fleet",
    "systemctl start ekiben-hub-files.service",
)

# Speaks SFTP by itself, so that nothing is left out because a client would not do it. What it is
# asked to do is appended; that prints one JSON object: attempt -> "ok", or the server's answer.
SFTP = r'''
import json, os, struct, subprocess, sys
def text(value):
    value = value.encode() if isinstance(value, str) else value
    return struct.pack(">I", len(value)) + value
number = lambda value: struct.pack(">I", value)
long = lambda value: struct.pack(">Q", value)
READ, WRITE, APPEND, CREATE, TRUNCATE, EXCLUSIVE = 1, 2, 4, 8, 16, 32
NONE = number(0)
MODE = lambda mode: number(4) + number(mode)
class Refused(Exception):
    pass
class Session:
    def __init__(self, *arguments):
        self.process = subprocess.Popen(["ssh", *arguments, "-s", "sftp"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.number = 0
        self.send(b"\1" + number(3))
        version = self.receive()
        assert version[:1] == b"\2", version
    def send(self, packet):
        self.process.stdin.write(text(packet))
        self.process.stdin.flush()
    def receive(self):
        size = self.process.stdout.read(4)
        if len(size) < 4:
            raise Refused("the connection is closed")
        return self.process.stdout.read(struct.unpack(">I", size)[0])
    def request(self, kind, *fields):
        self.number += 1
        self.send(bytes([kind]) + number(self.number) + b"".join(fields))
        answer = self.receive()
        kind, answer = answer[0], answer[5:]
        if kind == 101:
            status, size = struct.unpack(">II", answer[:8])
            if status:
                raise Refused(answer[8:8 + size].decode())
        return answer
    def handle(self, answer):
        return answer[4:]
    def open(self, path, flags=READ, attributes=NONE):
        return self.handle(self.request(3, text(path), number(flags), attributes))
    def close(self, handle):
        self.request(4, text(handle))
    def read(self, path, size=65536):
        handle = self.open(path)
        try:
            return self.request(5, text(handle), long(0), number(size))[4:].decode()
        finally:
            self.close(handle)
    def write(self, path, contents, flags=WRITE | CREATE | TRUNCATE, offset=0):
        handle = self.open(path, flags)
        try:
            for start in range(0, len(contents), 32768):
                self.request(6, text(handle), long(offset + start), text(contents[start:start + 32768]))
        finally:
            self.close(handle)
    def list(self, path):
        handle = self.handle(self.request(11, text(path)))
        names = []
        try:
            while True:
                answer = self.request(12, text(handle))
                count, answer = struct.unpack(">I", answer[:4])[0], answer[4:]
                for _ in range(count):
                    for keep in (True, False):
                        size = struct.unpack(">I", answer[:4])[0]
                        names += [answer[4:4 + size].decode()] * keep
                        answer = answer[4 + size:]
                    flags, answer = struct.unpack(">I", answer[:4])[0], answer[4:]
                    answer = answer[8 * bool(flags & 1) + 8 * bool(flags & 2) + 4 * bool(flags & 4) + 8 * bool(flags & 8):]
        except Refused as end:
            if str(end) != "End of file":
                raise
        finally:
            self.close(handle)
        return sorted(set(names) - {".", ".."})
    def extended(self, name, *fields):
        return self.request(200, text(name), *fields)
results = {}
def attempt(name, function):
    try:
        value = function()
        results[name] = value if isinstance(value, (str, list)) else "ok"
    except Refused as error:
        results[name] = f"refused: {error}"
'''
for machine in (a, b):
    machine.succeed(f"printf %s {shlex.quote(SFTP)} > /root/sftp.py")


def sftp(machine, code, login="fleet-a"):
    """What became of the attempts in `code`, which has `s`, a session of `machine` at the hub."""
    script = f"from sftp import *\ns = Session({f'{login}@hub'!r})\n{code}\nprint(json.dumps(results))"
    return json.loads(machine.succeed(f"cd /root; timeout 120 python3 -c {shlex.quote(script)} 2>/tmp/sftp.err"))


def served():
    """Everything that the hub serves, with owners, permissions, times and contents; but not what the hosts leave."""
    return hub.succeed(
        f"cd {HUB}; find . -path './hosts/*/reports' -prune -o -printf '%p %y %U %G %m %T@ %l\\n' | sort; "
        "find hosts/*/release hosts/*/files -type f | sort | xargs sha256sum"
    )


def denied(results, *reasons):
    """Checks that every attempt was refused, for one of these reasons."""
    for name, result in results.items():
        assert result in [f"refused: {reason}" for reason in reasons], (name, result)
    return len(results)


before = served()
tried = 0
# a host that is cut off in the midst of a session: for later
b.succeed("mkfifo /tmp/hold; (sleep infinity > /tmp/hold &); ssh -s fleet-b@hub sftp < /tmp/hold > /tmp/said 2>&1 & echo $! > /tmp/ssh.pid")
cut_off = hub.wait_until_succeeds("pgrep -o -u fleet-b sshd", timeout=20).strip()
# nothing else is started for it
assert hub.succeed("ps -o comm= -u fleet-b | sort -u").split() == ["sshd-session"]
b.succeed("kill -STOP $(cat /tmp/ssh.pid)")

with subtest("what a host needs works"):
    could = sftp(a, r'''
attempt("list", lambda: s.list("/"))
attempt("manifest", lambda: s.read("release/manifest.json"))
attempt("archive", lambda: s.read("/release/1.tar.gz"))
attempt("put", lambda: s.write("reports/heartbeat.json.new", b"alive"))
attempt("rename", lambda: s.extended("posix-rename@openssh.com", text("reports/heartbeat.json.new"), text("reports/heartbeat.json")))
attempt("put again", lambda: s.write("reports/heartbeat.json.new", b"well"))
attempt("replace", lambda: s.extended("posix-rename@openssh.com", text("reports/heartbeat.json.new"), text("reports/heartbeat.json")))
attempt("own report", lambda: s.read("reports/heartbeat.json"))
attempt("limits", lambda: s.extended("limits@openssh.com"))
''')
    assert could == {
        "list": ["files", "release", "reports"], "manifest": "manifest of a\n", "archive": "archive of a\n", "put": "ok", "rename": "ok", "put again": "ok",
        "replace": "ok", "own report": "well", "limits": "ok",
    }, could
    # and with OpenSSH's client
    a.succeed(
        "cd /tmp; echo report > report.json; printf '%s\\n' "
        "'get release/manifest.json' 'put report.json reports/r.json.new' 'rename reports/r.json.new reports/r.json' 'ls -l reports' > batch",
        "cd /tmp; sftp -b batch fleet-a@hub; grep -x 'manifest of a' manifest.json",
        "cd /tmp; scp fleet-a@hub:release/1.tar.gz .; scp report.json fleet-a@hub:reports/s.json; grep -x 'archive of a' 1.tar.gz",
    )
    assert hub.succeed(f"cat {HUB}/hosts/a/reports/r.json {HUB}/hosts/a/reports/s.json") == "report\nreport\n"

with subtest("a host gets its own files, and knows what they are"):
    index = json.loads(sftp(a, 'attempt("index", lambda: s.read("files/index.json"))')["index"])
    file = index[0].pop("file")
    assert index == [{
        "path": "/var/lib/secrets/a", "mode": "0400", "owner": "app", "group": "root",
        "sha256": hub.succeed("sha256sum /root/secrets/a").split()[0],
    }], index
    assert sftp(a, f'attempt("file", lambda: s.read("files/{file}"))') == {"file": "secret of a\n"}
    assert sftp(b, 'attempt("list", lambda: s.list("files"))', "fleet-b")["list"] != sftp(a, 'attempt("list", lambda: s.list("files"))')["list"]

with subtest("nothing of the other host, the repository or the hub is in sight"):
    could = sftp(a, r'''
for path in ("/..", "..", "../..", "/release/../.."):
    attempt(f"list {path}", lambda: s.list(path))
''')
    assert set(map(tuple, could.values())) == {("files", "release", "reports")}, could
    could = sftp(a, r'''
B, HUB = "/var/lib/ekiben-hub/hosts/b", "/var/lib/ekiben-hub"
for path in ("../b/release/manifest.json", "/../b/release/manifest.json", "/../../hosts/b/release/manifest.json", f"{B}/release/manifest.json",
             "../b/files/index.json", f"{B}/files/index.json", "/b/release/manifest.json", "/hosts/b/release/manifest.json",
             "~fleet-b/release/manifest.json", "/etc/passwd", "/etc/shadow", "../../../../../etc/passwd", "/root/secrets/b",
             "/srv/fleet/flake.nix", "/proc/self/root/etc/passwd", "/proc/1/root/etc/passwd", "/dev/null", f"{HUB}/received"):
    attempt(f"read {path}", lambda: s.read(path))
    attempt(f"stat {path}", lambda: s.request(17, text(path)))
    attempt(f"lstat {path}", lambda: s.request(7, text(path)))
for path in ("../b", B, f"{B}/reports", f"{B}/files", f"{HUB}/hosts", "/etc", "/proc", "/nix/store", "/home"):
    attempt(f"list {path}", lambda: s.list(path))
for path in (f"{B}/reports/x", "../b/reports/x", f"{HUB}/received/x", "/tmp/x", "/home/alice/.ssh/authorized_keys"):
    attempt(f"write {path}", lambda: s.write(path, b"x"))
''')
    tried += denied(could, "No such file")

with subtest("a host cannot change what it is served, nor write anywhere but where it reports"):
    could = sftp(a, r'''
for path in ("release/manifest.json", "release/1.tar.gz", "files/index.json"):
    for name, flags in (("write", WRITE), ("append", WRITE | APPEND), ("truncate", WRITE | TRUNCATE), ("write and read", READ | WRITE)):
        attempt(f"{name} {path}", lambda: s.open(path, flags))
for path in ("x", "release/x", "files/x", "/x"):
    attempt(f"write {path}", lambda: s.write(path, b"x"))
own = "reports/heartbeat.json"
for old, new in ((own, "release/manifest.json"), (own, "release/x"), (own, "x"), ("release/manifest.json", "reports/x"), ("release/manifest.json", "release/x"),
                 ("release", "x"), ("reports", "x"), ("reports", "release/x"), ("files", "reports/files"), (own, "files/index.json")):
    attempt(f"rename {old} {new}", lambda: s.request(18, text(old), text(new)))
    attempt(f"posix-rename {old} {new}", lambda: s.extended("posix-rename@openssh.com", text(old), text(new)))
''')
    # a rename across file systems is a "Failure", and is not done
    tried += denied({name: result for name, result in could.items() if "rename" not in name}, "Permission denied")
    tried += denied({name: result for name, result in could.items() if "rename" in name}, "Permission denied", "Failure")

with subtest("even among its own reports, a host can do nothing but write and rename"):
    could = sftp(a, r'''
own = "reports/heartbeat.json"
s.write("reports/other.json", b"other")
for target in (own, "release/manifest.json"):
    attempt(f"remove {target}", lambda: s.request(13, text(target)))
    attempt(f"chmod {target}", lambda: s.request(9, text(target), MODE(0o6777)))
    attempt(f"utimes {target}", lambda: s.request(9, text(target), number(8) + number(0) + number(0)))
    attempt(f"chown {target}", lambda: s.request(9, text(target), number(2) + number(0) + number(0)))
    attempt(f"truncate {target}", lambda: s.request(9, text(target), number(1) + long(0)))
    attempt(f"lsetstat {target}", lambda: s.extended("lsetstat@openssh.com", text(target), MODE(0o777)))
    attempt(f"symlink {target}", lambda: s.request(20, text("/etc/passwd"), text(f"reports/link")))
    attempt(f"symlink to {target}", lambda: s.request(20, text("../" + target), text(f"reports/link")))
    attempt(f"hardlink {target}", lambda: s.extended("hardlink@openssh.com", text(target), text("reports/link")))
    attempt(f"readlink {target}", lambda: s.request(19, text(target)))
    attempt(f"statvfs {target}", lambda: s.extended("statvfs@openssh.com", text(target)))
handle = s.open(own, READ | WRITE)
other = s.open("reports/other.json", READ | WRITE)
attempt("fsetstat", lambda: s.request(10, text(handle), MODE(0o777)))
attempt("fstatvfs", lambda: s.extended("fstatvfs@openssh.com", text(handle)))
attempt("fsync", lambda: s.extended("fsync@openssh.com", text(handle)))
attempt("copy-data", lambda: s.extended("copy-data", text(handle), long(0), long(0), text(other), long(0)))
s.close(handle)
attempt("mkdir", lambda: s.request(14, text("reports/directory"), NONE))
attempt("rmdir", lambda: s.request(15, text("reports")))
attempt("expand-path", lambda: s.extended("expand-path@openssh.com", text("~root")))
attempt("home-directory", lambda: s.extended("home-directory", text("alice")))
attempt("users-groups-by-id", lambda: s.extended("users-groups-by-id@openssh.com", text(number(0) + number(1001)), text(number(0))))
''')
    tried += denied({name: result for name, result in could.items()}, "Permission denied")
    # OpenSSH's client, too
    for command in ("rm reports/r.json", "mkdir reports/d", "ln -s /etc reports/l", "ln reports/r.json reports/l",
                    "chmod 777 reports/r.json", "chown 0 reports/r.json", "rm release/manifest.json"):
        a.fail(f"cd /tmp; echo {shlex.quote(command)} | sftp -b - fleet-a@hub")
        tried += 1

with subtest("no attempt has changed anything that is served"):
    assert served() == before

with subtest("no shell, no command, no terminal, no other subsystem"):
    for command in ("id", "'sh -c id'", "internal-sftp", "'/bin/sh'", "'sftp; id'", "'scp -t /tmp'", "'scp -f /etc/passwd'", ""):
        said = a.fail(f"ssh -T fleet-a@hub {command} < /dev/null 2>&1")
        assert said.strip() == "This service allows sftp connections only.", said
    said = a.fail("ssh -tt fleet-a@hub < /dev/null 2>&1")
    assert "PTY allocation request failed" in said, said
    said = a.fail("ssh -s fleet-a@hub other < /dev/null 2>&1")
    assert "subsystem request failed" in said, said
    # it takes the refusal for an answer, and does not understand it
    said = a.fail("cd /tmp; scp -O fleet-a@hub:/etc/passwd . 2>&1")
    assert "protocol error" in said or "lost connection" in said, said
    a.fail("test -e /tmp/passwd")
    said = a.fail("cd /tmp; scp fleet-a@hub:/etc/passwd . 2>&1")
    assert "No such file" in said, said
    tried += 12
    # and no trace of an attempt
    assert hub.succeed(f"find /etc /home /root /srv /tmp /var \\( -user fleet-a -o -user fleet-b \\) ! -path '{HUB}/hosts/*/reports*'") == ""

with subtest("no way through the hub: ports, sockets, agent, X11, tunnel"):
    # what a forward would lead to
    for machine, port in ((hub, 8000), (a, 8001)):
        machine.succeed(f"systemd-run --unit=inner $(readlink -f $(command -v python3)) -m http.server --bind 127.0.0.1 --directory /srv {port}")
        machine.wait_for_open_port(port, "127.0.0.1")
    talk = "import socket; s = socket.socket(socket.AF_UNIX); s.settimeout(5); s.connect(PATH); s.send(b'\\0AUTH\\r\\n'); exit(not s.recv(1))"
    fetch = "curl -fsS -m 5 http://127.0.0.1"
    for options, machine, probe, words in (
        ("-L 9001:127.0.0.1:8000", a, f"{fetch}:9001/", "administratively prohibited"),
        ("-D 9002", a, f"{fetch}:8000/ --socks5-hostname 127.0.0.1:9002", "administratively prohibited"),
        ("-L /tmp/local.sock:/run/dbus/system_bus_socket", a, f"python3 -c {shlex.quote(talk.replace('PATH', repr('/tmp/local.sock')))}", "open failed"),
        ("-R 9003:127.0.0.1:8001", hub, f"{fetch}:9003/", "remote port forwarding failed"),
        ("-R 9004", hub, f"{fetch}:8001/ --socks5-hostname 127.0.0.1:9004", "remote port forwarding failed"),
        ("-R /tmp/remote.sock:/run/dbus/system_bus_socket", hub,
         f"python3 -c {shlex.quote(talk.replace('PATH', repr('/tmp/remote.sock')))}", "remote port forwarding failed"),
    ):
        # what the administrator's users may do shows that the attempt is a real one
        for login in (f"{ALICE} alice@hub", "fleet-a@hub"):
            a.succeed("rm -f /tmp/control /tmp/said /tmp/local.sock; "
                      f"ssh -f -N -M -S /tmp/control -E /tmp/said {options} {login} < /dev/null > /dev/null 2>&1")
            if "alice" in login:
                machine.wait_until_succeeds(probe, timeout=20)
            else:
                machine.fail(probe)
                a.wait_until_succeeds(f"grep {shlex.quote(words)} /tmp/said", timeout=20)
                machine.fail(probe)
            a.succeed(f"ssh -S /tmp/control -O exit {login}")
            # a socket that has been forwarded stays
            hub.succeed("rm -f /tmp/remote.sock")
        tried += 1
    # a socket among the reports would be nothing that a collector expects
    said = a.fail("timeout 20 ssh -N -o ExitOnForwardFailure=yes -R /reports/socket:127.0.0.1:8001 fleet-a@hub < /dev/null 2>&1")
    assert "remote port forwarding failed" in said, said
    hub.fail(f"test -e {HUB}/hosts/a/reports/socket")
    tried += 1
    said = a.execute("timeout 20 env DISPLAY=127.0.0.1:5 ssh -o ForwardX11Trusted=yes -X fleet-a@hub < /dev/null 2>&1")[1]
    assert "X11 forwarding request failed" in said, said
    # an agent is refused without a word: while such a session is open, the hub has no socket for it
    a.succeed(
        "ssh-agent -a /tmp/agent.sock > /tmp/agent.env; export SSH_AUTH_SOCK=/tmp/agent.sock; ssh-add -q /root/.ssh/id_ed25519;"
        " mkfifo /tmp/hold; (sleep infinity > /tmp/hold & echo $! > /tmp/hold.pid); "
        "ssh -A -s fleet-a@hub sftp < /tmp/hold > /tmp/said 2>&1 & echo $! > /tmp/ssh.pid"
    )
    hub.wait_until_succeeds("pgrep -u fleet-a sshd", timeout=20)
    assert hub.succeed("find /tmp /run /var/tmp -type s \\( -name 'agent.*' -o -user fleet-a \\) ! -path '/run/user/*'; "
                       "ss -Hlxp | grep -F fleet-a || true") == ""
    a.succeed("kill $(cat /tmp/hold.pid) $(cat /tmp/ssh.pid); . /tmp/agent.env > /dev/null; kill $SSH_AGENT_PID")
    tried += 3
    # devices that the users could use, if sshd let them; not everywhere can there be one
    device = "test -e /dev/net/tun || { mkdir -p /dev/net; mknod -m 666 /dev/net/tun c 10 200; }"
    if hub.execute(f"{device}; ip tuntap add dev tun7 mode tun user alice; ip tuntap add dev tun8 mode tun user fleet-a")[0] == 0:
        a.succeed(device)
        hub.succeed("ip link set tun7 up; ip link set tun8 up")
        tunnel = "rm -f /tmp/said; ssh -f -N -M -S /tmp/control -E /tmp/said"
        # whoever holds its other end has a carrier
        for login, number in ((f"{ALICE} alice@hub", 7), ("fleet-a@hub", 8)):
            a.succeed(f"{tunnel} -w any:{number} {login} < /dev/null > /dev/null 2>&1")
            if number == 7:
                hub.wait_until_succeeds("ip link show tun7 | grep LOWER_UP", timeout=20)
            else:
                a.wait_until_succeeds("grep 'Tunnel forwarding failed' /tmp/said", timeout=20)
                hub.fail("ip link show tun8 | grep LOWER_UP")
            a.succeed(f"ssh -S /tmp/control -O exit {login}")
        tried += 1

with subtest("one session a connection, and none for a host that is gone"):
    master = "ssh -S /tmp/control -o ProxyCommand=false"
    a.succeed(
        "rm -f /tmp/control; ssh -f -N -M -S /tmp/control fleet-a@hub < /dev/null > /dev/null 2>&1",
        "rm -f /tmp/hold /tmp/said; mkfifo /tmp/hold; (sleep infinity > /tmp/hold & echo $! > /tmp/hold.pid); "
        f"{master} -s fleet-a@hub sftp < /tmp/hold > /tmp/said 2>&1 &",
    )
    hub.wait_until_succeeds("pgrep -u fleet-a sshd", timeout=20)
    a.wait_until_succeeds(f"({master} -s fleet-a@hub sftp < /dev/null 2>&1 || true) | grep 'Session open refused by peer'", timeout=20)
    a.succeed("kill $(cat /tmp/hold.pid); ssh -S /tmp/control -O exit fleet-a@hub")
    hub.wait_until_fails(f"kill -0 {cut_off}", timeout=60)
    b.succeed("kill -KILL $(cat /tmp/ssh.pid)")
    tried += 1

with subtest("no way in but a host's own key under its own name"):
    refusals = (
        ("fleet-b", ""), ("ekiben-hub", ""), ("root", ""), ("alice", ""), ("fleet-c", ""), ("sshd", ""),
        ("fleet-a", "-o PubkeyAuthentication=no"),
    )
    for user, options in refusals:
        said = a.fail(f"ssh -T {options} {user}@hub id < /dev/null 2>&1")
        assert "Permission denied (publickey" in said, said
    # passwords: they are not even asked for, whatever the password is
    hub.succeed("echo fleet-a:let-me-in | chpasswd; echo alice:let-me-in | chpasswd")
    a.succeed("printf '#!/bin/sh\\necho let-me-in\\n' > /tmp/ask; chmod +x /tmp/ask")
    BY_PASSWORD = "env SSH_ASKPASS=/tmp/ask SSH_ASKPASS_REQUIRE=force ssh -T -o BatchMode=no -o NumberOfPasswordPrompts=1 -o PubkeyAuthentication=no"
    said = a.fail(f"{BY_PASSWORD} fleet-a@hub id < /dev/null 2>&1")
    assert "Permission denied (publickey)." in said, said
    # an authority that the administrator trusts for people
    a.succeed("cd /tmp; cp /root/.ssh/id_ed25519 .; ssh-keygen -y -f id_ed25519 > id_ed25519.pub; "
              "ssh-keygen -q -s /root/alice -I test -n fleet-b,alice id_ed25519.pub")
    by_certificate = "ssh -T -i /tmp/id_ed25519 -o CertificateFile=/tmp/id_ed25519-cert.pub"
    assert "uid=1001" in a.succeed(f"{by_certificate} alice@hub id < /dev/null")
    said = a.fail(f"{by_certificate} fleet-b@hub id < /dev/null 2>&1")
    assert "Permission denied (publickey)." in said, said
    tried += len(refusals) + 2

with subtest("the administrator's own sshd is as it was: another user, by password and by key, with forwards"):
    assert "uid=1001" in a.succeed(f"{BY_PASSWORD} alice@hub id < /dev/null")
    assert "uid=1001" in a.succeed(f"{BY_PASSWORD} -p 2222 alice@hub id < /dev/null")
    assert "uid=1001" in a.succeed(f"ssh {ALICE} alice@hub id < /dev/null")
    assert "fleet" in a.succeed(f"printf 'GET / HTTP/1.0\\r\\n\\r\\n' | ssh {ALICE} -W 127.0.0.1:8000 alice@hub")
    a.succeed(f"cd /tmp; echo 'ls /etc' | sftp {ALICE} -b - alice@hub")
    # but the users of the hub's machine see nothing of the fleet
    for path in ("hosts", "hosts/a", "hosts/a/release/manifest.json", "hosts/a/files", "received"):
        hub.fail(f"runuser -u alice -- ls {HUB}/{path}")

with subtest("who publishes sees reports, and no host's files"):
    hub.succeed(as_publisher(f"cat {HUB}/hosts/a/reports/heartbeat.json {HUB}/hosts/b/release/manifest.json; ls {HUB}/received"))
    hub.fail(as_publisher(f"ls {HUB}/hosts/a/files"), as_publisher(f"touch {HUB}/hosts/a/x"), as_publisher(f"touch {HUB}/hosts/x"))

with subtest("who publishes from elsewhere can replace a release and read reports, by whatever request, and nothing else"):
    b.succeed(
        f"umask 077; printf %s {shlex.quote(hub.succeed('cat /etc/scenario/key-publisher'))} > /root/publisher",
        "printf 'Match user ekiben-publisher\\nIdentityFile /root/publisher\\n' >> /root/.ssh/config",
    )
    could = sftp(b, r'''
release = "hosts/a/release"
attempt("list", lambda: s.list("/"))
attempt("put", lambda: s.write(f"{release}/new", b"manifest"))
attempt("link", lambda: s.extended("hardlink@openssh.com", text(f"{release}/new"), text(f"{release}/claim")))
attempt("link again", lambda: s.extended("hardlink@openssh.com", text(f"{release}/new"), text(f"{release}/claim")))
attempt("rename", lambda: s.extended("posix-rename@openssh.com", text(f"{release}/new"), text(f"{release}/other.json")))
attempt("get", lambda: s.read(f"{release}/other.json"))
for name in ("claim", "other.json"):
    attempt(f"remove {name}", lambda: s.request(13, text(f"{release}/{name}")))
attempt("received", lambda: s.list("received"))
''', "ekiben-publisher")
    assert could.pop("list")[-3:] == ["hosts", "received", "rollout"] and could.pop("get") == "manifest", could
    assert set(could.pop("received")) <= {"all.json", "rollout.json"}, could
    assert could.pop("link again") == "refused: Failure" and set(could.values()) == {"ok"}, could
    before = served()
    could = sftp(b, r'''
for path in ("hosts/a/files/index.json", "hosts/a/reports/heartbeat.json", "/etc/passwd", "../../etc/passwd", "/root/secrets/a", "home/x"):
    attempt(f"read {path}", lambda: s.read(path))
for path in ("hosts/a/files", "hosts/a/reports", "home", "/etc"):
    attempt(f"list {path}", lambda: s.list(path))
for path in ("x", "hosts/x", "hosts/a/x", "hosts/a/files/x", "hosts/a/reports/x", "received/x",
             "home/x", "home/.ssh/authorized_keys", "/etc/ssh/authorized_keys.d/fleet-a"):
    attempt(f"write {path}", lambda: s.write(path, b"x"))
target = "hosts/a/release/manifest.json"
attempt("chmod", lambda: s.request(9, text(target), MODE(0o6777)))
attempt("lsetstat", lambda: s.extended("lsetstat@openssh.com", text(target), MODE(0o777)))
attempt("symlink", lambda: s.request(20, text("/etc"), text("hosts/a/release/link")))
attempt("link of what is another's", lambda: s.extended("hardlink@openssh.com", text("hosts/a/files/index.json"), text("hosts/a/release/link")))
attempt("mkdir", lambda: s.request(14, text("hosts/a/release/directory"), NONE))
attempt("rmdir", lambda: s.request(15, text("hosts/a/release")))
attempt("rename", lambda: s.extended("posix-rename@openssh.com", text("hosts/a/release"), text("hosts/a/old")))
attempt("statvfs", lambda: s.extended("statvfs@openssh.com", text(target)))
attempt("expand-path", lambda: s.extended("expand-path@openssh.com", text("~root")))
attempt("home-directory", lambda: s.extended("home-directory", text("alice")))
''', "ekiben-publisher")
    tried += denied(could, "Permission denied", "No such file")
    for command in ("id", "''"):
        said = b.fail(f"ssh -T ekiben-publisher@hub {command} < /dev/null 2>&1")
        assert said.strip() == "This service allows sftp connections only.", said
    said = b.fail("timeout 20 ssh -W 127.0.0.1:8000 ekiben-publisher@hub < /dev/null 2>&1")
    assert "prohibited" in said, said
    assert "Permission denied (publickey" in a.fail("ssh -T ekiben-publisher@hub < /dev/null 2>&1")
    tried += 4
    assert served() == before

with subtest("a host that leaves more than there is room for harms nobody but itself"):
    free = "df --output=avail,iavail / /var /tmp"
    others = hub.succeed(free)
    could = sftp(a, r'''
attempt("fill", lambda: s.write("reports/fill", bytes(16 << 20)))
attempt("one more", lambda: s.write("reports/more", bytes(100000)))
''')
    tried += denied(could, "Failure")
    assert 3 << 20 < int(hub.succeed(f"du -sB1 {HUB}/hosts/a/reports").split()[0]) <= 4 << 20
    assert sftp(b, 'attempt("put", lambda: s.write("reports/heartbeat.json", b"well"))', "fleet-b") == {"put": "ok"}
    hub.succeed(as_publisher(f"rm -f {HUB}/hosts/a/reports/*"))
    could = sftp(a, r'''
for count in range(200):
    attempt(f"file {count}", lambda: s.write(f"reports/{count}", b""))
''')
    assert [could[f"file {count}"] for count in range(63)] == ["ok"] * 63, could
    tried += denied({name: result for name, result in could.items() if int(name.split()[1]) >= 63}, "Failure")
    # neither is a hole in a file more than it seems
    hub.succeed(as_publisher(f"rm -f {HUB}/hosts/a/reports/*"))
    print(sftp(a, 'attempt("far", lambda: s.write("reports/far", b"x", offset=2**62))\nattempt("after it", lambda: s.write("reports/r.json", b"x"))'))
    hub.succeed(as_publisher(f"rm -f {HUB}/hosts/a/reports/*"))
    assert sftp(b, 'attempt("put", lambda: s.write("reports/heartbeat.json", b"well"))', "fleet-b") == {"put": "ok"}
    print(others, hub.succeed(free))

with subtest("without its file system a host can leave nothing"):
    unit = hub.succeed(f"systemd-escape --path --suffix=mount {HUB}/hosts/a/reports").strip()
    hub.succeed(f"systemctl stop {shlex.quote(unit)}")
    assert sftp(a, 'attempt("put", lambda: s.write("reports/x", b"x"))') == {"put": "refused: Permission denied"}
    hub.succeed(f"systemctl start {shlex.quote(unit)}")
    assert sftp(a, 'attempt("put", lambda: s.write("reports/x", b"x"))') == {"put": "ok"}
    hub.succeed(f"systemctl reload {shlex.quote(unit)}")
    assert sftp(a, 'attempt("get", lambda: s.read("reports/x"))') == {"get": "x"}

with subtest("a file that changes is served anew, one that is gone stays, neither is ever in sight of others"):
    hub.succeed("umask 077; echo new secret of a > /root/secrets/a.new; mv /root/secrets/a.new /root/secrets/a", "systemctl start ekiben-hub-files.service")
    index = json.loads(sftp(a, 'attempt("index", lambda: s.read("files/index.json"))')["index"])
    could = sftp(a,
                 f'attempt("file", lambda: s.read("files/{index[0]["file"]}"))\nattempt("list", lambda: s.list("files"))\n'
                 f'attempt("old", lambda: s.read("files/{file}"))')
    assert could == {"file": "new secret of a\n", "list": sorted([index[0]["file"], "index.json"]), "old": "refused: No such file"}, could
    hub.succeed("rm /root/secrets/b")
    hub.fail("systemctl start ekiben-hub-files.service")
    hub.succeed("journalctl -u ekiben-hub-files -o cat | grep -F 'Failed to serve /root/secrets/b to b: No such file'")
    index = json.loads(sftp(b, 'attempt("index", lambda: s.read("files/index.json"))', "fleet-b")["index"])
    assert sftp(b, f'attempt("file", lambda: s.read("files/{index[0]["file"]}"))', "fleet-b") == {"file": "secret of b\n"}
    hub.fail("grep -Rs 'secret of' /etc/ekiben /etc/systemd/system /etc/tmpfiles.d")
    hub.require_unit_state("ekiben-hub-files.timer", "active")

READS = ["/root/secrets/a", f"{HUB}/hosts/a/files/index.json", f"{HUB}/hosts/a/reports/heartbeat.json", "/home/alice/secret"]
MORE = f"""
attempt("remove a report", lambda: os.unlink("{HUB}/hosts/a/reports/heartbeat.json"))
attempt("reach a", lambda: connect(socket.AF_INET, ("192.168.1.1", 22)))
"""

with subtest("the units of the hub can do what they are for, and nothing else"):
    hub.succeed("runuser -u alice -- sh -c 'umask 077; echo secret > ~/secret'")
    assert sftp(a, 'attempt("put", lambda: s.write("reports/heartbeat.json", b"well"))') == {"put": "ok"}
    # private ones
    scratch = ("/tmp", "/var/tmp", "/dev/shm", "/dev/mqueue", "/dev")
    could = take_over(hub, "ekiben-hub-files", READS, MORE)
    assert {what for what in could if not what.startswith(tuple(f"write {place}" for place in scratch))} == {
        # root's own directories there, and every source
        *(f"write {HUB}/hosts{place}" for place in ("", "/.removed", "/a", "/a/files", "/b", "/b/files")),
        *(f"read {path}" for path in ("/etc/shadow", "/root/secrets/a", f"{HUB}/hosts/a/files/index.json",
                                      f"{HUB}/hosts/a/reports/heartbeat.json", "/home/alice/secret")),
    }, could
    could = take_over(hub, "ekiben-hub-collect", READS, MORE)
    assert {what for what in could if not what.startswith(tuple(f"write {place}" for place in (*scratch, "/run/lock")))} == {
        f"write {HUB}/home", f"write {HUB}/received", f"write {HUB}/rollout",
        *(f"write {HUB}/hosts/{host}/{place}" for host in ("a", "b") for place in ("release", "reports")),
        f"read {HUB}/hosts/a/reports/heartbeat.json", "remove a report",
    }, could

with subtest("what a host has left is collected, whatever another has left"):
    heartbeat = {
        "format": 1, "host": "a", "version": "1", "seen": None, "deployed": None, "system": f"/nix/store/{'x' * 32}-x", "running": None, "last": None,
        "runs": 0, "selfUpdated": False, "rebootNeeded": False,
    }
    put = "attempt('put', lambda: s.write('reports/heartbeat.json', {!r}))"
    # one that the hub cannot read
    hub.succeed(as_publisher(f"rm -f {HUB}/hosts/b/reports/*"))
    assert sftp(b, "attempt('odd', lambda: s.close(s.open('reports/heartbeat.json', WRITE | CREATE, MODE(0))))", "fleet-b") == {"odd": "ok"}
    assert sftp(a, put.format(json.dumps(heartbeat).encode())) == {"put": "ok"}
    # logs of next to nothing that would be 2 GiB on the hub's disk
    report = {
        "format": 1, "host": "a", "system": f"/nix/store/{'x' * 32}-x", "result": "failed", "trigger": "timer", "started": 0, "finished": 0,
        "commit": None, "summary": None, "stage": "build", "error": "no", "warnings": [], "rebootNeeded": False,
    }
    left = sftp(a, f"""
def leave(run):
    s.write("reports/%s.json" % run, json.dumps({{**{report!r}, "id": run}}).encode())
    log = s.open("reports/%s.log.gz" % run, WRITE | CREATE)
    s.request(6, text(log), long(2**26 - 1), text(b"x"))
    s.close(log)
for number in range(30):
    attempt("report %d" % number, lambda: leave("%032x" % number))
""")
    assert set(left.values()) == {"ok"}, left
    hub.succeed("systemctl start ekiben-hub-collect.timer")
    hub.wait_until_succeeds(f"test $(stat -c %U {HUB}/received/a/heartbeat.json) = ekiben-hub -a ! -e {HUB}/hosts/a/reports/heartbeat.json", timeout=90)
    hub.fail(f"test -e {HUB}/received/b/heartbeat.json")
    hub.wait_until_succeeds(f"test $(ls {HUB}/received/a/*.json | wc -l) = 32 -a -z \"$(ls {HUB}/hosts/a/reports)\"", timeout=90)
    assert int(hub.succeed(f"du -sk {HUB}/received/a").split()[0]) < 1000, hub.succeed(f"ls -ls {HUB}/received/a")

print(f"{tried} attempts were refused")
