machine.start()
install(machine)
machine.wait_for_open_port(8787)
machine.succeed("ekiben trigger app")
wait_for_run(machine, "app", 0)
machine.succeed(
    "echo secret > /root/secret; chmod 600 /root/secret",
    "runuser -u stranger -- sh -c 'umask 077; echo secret > ~/secret'",
    "mkdir -p /tmp/token; cp $(readlink -f /etc/scenario/token-app) /tmp/token/source; chmod -R go= /tmp/token",
    # what gives root to whoever runs it, unless that is prevented
    "mkdir -p /opt; cp $(readlink -f $(command -v setpriv)) /opt/become; chmod 4755 /opt/become",
)

# tries everything, and prints a line for each thing that it could do
PROBE = r'''
import ctypes, ctypes.util, errno, os, signal, socket, stat, subprocess, sys
libc = ctypes.CDLL(None, use_errno=True)

def attempt(name, function):
    try:
        function()
    except BaseException as error:
        print(f"denied {name}: {error!r}")
    else:
        print(f"COULD {name}")

def call(name, *arguments):
    def function():
        if getattr(libc, name)(*arguments) in (-1, 2**64 - 1):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return function

def syscall(number, *arguments):
    return call("syscall", ctypes.c_long(number), *map(ctypes.c_long, arguments))

def connects(family, kind, address):
    def function():
        with socket.socket(family, kind) as s:
            s.settimeout(2)
            s.connect(address)
    return function

def runs(*command):
    def function():
        done = subprocess.run(command, capture_output=True, timeout=20)
        if done.returncode:
            raise OSError(done.returncode, done.stderr[-100:])
    return function

for path in sys.argv[1:]:
    attempt(f"read {path}", lambda: open(path, "rb").read(1) if not os.path.isdir(path) else os.listdir(path))

# a file in every directory that is in sight, and every socket
for directory, names, files in os.walk("/"):
    names[:] = [name for name in names if not (directory == "/" and name == "proc") and not (directory == "/nix" and name == "store")
                and not os.path.join(directory, name).startswith(("/usr/share", "/usr/lib/", "/usr/lib64", "/sys/"))]
    try:
        path = os.path.join(directory, f".probe-{os.getpid()}")
        open(path, "x").close()
        os.unlink(path)
        print(f"COULD write in {directory}")
    except OSError:
        pass
    for name in files:
        path = os.path.join(directory, name)
        try:
            if stat.S_ISSOCK(os.lstat(path).st_mode):
                for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
                    attempt(f"connect to {path}", connects(socket.AF_UNIX, kind, path))
            elif os.access(path, os.W_OK) and stat.S_ISREG(os.lstat(path).st_mode):
                print(f"COULD overwrite {path}")
        except OSError:
            pass
for path in ("/nix/store/.probe", "/usr/lib/.probe", "/proc/sys/kernel/hostname", "/proc/sysrq-trigger", "/sys/kernel/.probe"):
    attempt(f"write {path}", lambda: open(path, "w").write("x"))

for name in ("AF_INET", "AF_INET6"):
    attempt(f"open {name}", lambda: socket.socket(getattr(socket, name), socket.SOCK_STREAM).close())
attempt("open AF_PACKET", lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close())
attempt("open a raw socket", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1).close())
attempt("see other processes", lambda: [pid for pid in os.listdir("/proc") if pid.isdigit() and os.stat(f"/proc/{pid}").st_uid != os.getuid()] or 1 / 0)
attempt("signal process 1", lambda: os.kill(1, 0))
attempt("trace process 1", syscall(101, 16, 1, 0, 0))
attempt("become root", lambda: os.setuid(0))
attempt("change groups", lambda: os.setgroups([0]))
attempt("become root by a setuid program", lambda: 1 / 0 if subprocess.run(["/opt/become", "--reuid=0", "id"], capture_output=True).returncode else None)
for name, flag in (("mount", 0x20000), ("user", 0x10000000), ("pid", 0x20000000), ("net", 0x40000000), ("uts", 0x4000000), ("ipc", 0x8000000), ("cgroup", 0x2000000)):
    attempt(f"make a {name} namespace", lambda: (pid := os.fork()) == 0 and os._exit(0 if libc.unshare(flag) == 0 else 1) or os.waitpid(pid, 0)[1] and 1 / 0)
attempt("mount", call("mount", b"none", b"/tmp", b"tmpfs", 0, None))
attempt("change root", lambda: os.chroot("/"))
attempt("make a device", lambda: os.mknod(f"{WRITABLE}/.device", stat.S_IFBLK | 0o600, os.makedev(8, 0)))
attempt("make a setuid file", lambda: (open(f"{WRITABLE}/.setuid", "w").close(), os.chmod(f"{WRITABLE}/.setuid", 0o4755)))
attempt("load a module", syscall(175, 0, 0, 0))
attempt("map writable and executable memory", lambda: ctypes.c_void_p(libc.mmap(None, 4096, 7, 0x22, -1, 0)).value in (None, 2**64 - 1, 2**32 - 1) and 1 / 0)
attempt("load a BPF program", syscall(321, 0, 0, 0))
attempt("reboot", call("reboot", 0))
attempt("set the clock", syscall(164, 0, 0))
attempt("set the host name", call("sethostname", b"x", 1))
attempt("swap", call("swapoff", b"/none"))
attempt("change the personality", call("personality", 8))
attempt("be scheduled in real time", lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)))
attempt("start a unit", runs("systemctl", "start", "ekiben-app.service"))
attempt("run a unit", runs("systemd-run", "--wait", "true"))
attempt("write to the kernel's log", lambda: open("/dev/kmsg", "w").close())
attempt("read a disk", lambda: open("/dev/sda", "rb").close())
try:
    os.unlink(f"{WRITABLE}/.setuid")
except OSError:
    pass
print("the probe has ended")
'''

READ = (
    "/tmp/token/source /etc/shadow /root/secret /root /home/stranger/secret /var/lib/ekiben/runs /proc/1/environ /proc/1/mem"
)


def probe(unit, writable, read):
    """What a stand-in for a unit's program could do, from inside the unit."""
    machine.succeed("rm -rf /tmp/probe")
    script = f"WRITABLE = {writable!r}\n{PROBE}"
    path = machine.succeed(f"printf %s {shlex.quote(script)} > /tmp/probe; nix-store --add /tmp/probe").strip()
    python = machine.succeed("readlink -f $(command -v python3)").strip()
    machine.succeed(
        f"mkdir -p /run/systemd/system/{unit}.service.d; printf '%s\n' [Service] ExecStart= ExecStartPre= ExecStopPost= Type=oneshot "
        f"Restart=no WatchdogSec=0 'ExecStart={python} {path} {read}' > /run/systemd/system/{unit}.service.d/probe.conf",
        "systemctl daemon-reload",
        f"journalctl -q -u {unit} -n 1 --cursor-file=/tmp/cursor > /dev/null",
    )
    machine.succeed(f"systemctl restart {unit}.service")
    machine.wait_until_succeeds(f"journalctl -q -u {unit} -o cat --after-cursor=$(cat /tmp/cursor) | grep -x 'the probe has ended'", timeout=60)
    said = machine.succeed(f"journalctl -q -u {unit} -o cat --after-cursor=$(cat /tmp/cursor)")
    print(said)
    machine.succeed(f"rm -r /run/systemd/system/{unit}.service.d; systemctl daemon-reload; systemctl reset-failed")
    could = {line.removeprefix("COULD ") for line in said.splitlines() if line.startswith("COULD ")}
    assert sum(line.startswith("denied ") for line in said.splitlines()) > 25, said
    return could


with subtest("a webhook that was taken over can do nothing but ask for runs"):
    could = probe("ekiben-webhook", "/var/lib/ekiben/queue", f"{READ} /var/lib/ekiben/instances/app/notes.json {REPOSITORY}/flake.nix /home/deploy")
    assert could == {
        # what it is for
        "write in /var/lib/ekiben/queue",
        # its own socket lies there
        "write in /run/ekiben-webhook",
        "connect to /run/systemd/notify",
    }, could

with subtest("a stage of the user's can write to the repository and its own state, and be nobody else"):
    could = probe("ekiben-app", "/var/lib/ekiben/instances/app", READ)
    own = (
        *(f"{what} {place}" for what in ("write in", "overwrite") for place in (REPOSITORY, "/var/lib/ekiben/instances/app", "/var/cache/ekiben/app")),
        # private ones, and one that only Debian has
        *(f"write in {place}" for place in ("/tmp", "/var/tmp", "/dev/shm", "/dev/mqueue", "/run/lock")),
        # inputs come over the network, and are built by the daemon
        "open AF_INET", "connect to ",
    )
    assert f"write in {REPOSITORY}/.git" in could and "connect to /nix/var/nix/daemon-socket/socket" in could, could
    assert not {what for what in could if not what.startswith(own)}, could

with subtest("what systemd thinks of it, which proves nothing by itself"):
    for unit in ("ekiben-webhook", "ekiben-app"):
        print(machine.execute(f"systemd-analyze security --no-pager {unit}.service | tail -n 1")[1])
