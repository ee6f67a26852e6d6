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

# What the user may have running, and what starts programs for whoever asks there: a systemd of its own, and a stand-in for all
# else that listens at these addresses, and has memory, a terminal and an open file.
UID = machine.succeed("id -u deploy").strip()
PYTHON = machine.succeed("readlink -f $(command -v python3)").strip()
SOCKETS = [
    *(f"/run/user/{UID}/{name}" for name in ("docker.sock", "emacs/server", "gnupg/S.gpg-agent", "podman/podman.sock", "sway-ipc.sock",
                                             "tmux/default", "wayland-0")),
    *("/run/docker.sock", "/run/libvirt/libvirt-sock", "/run/podman/podman.sock", "/run/screens/S-deploy/1.main", "/run/some-service.sock"),
    *("/tmp/tmux-1000/default", "/tmp/.X11-unix/X0", "/var/tmp/some.sock", "/dev/shm/some.sock"),
]
CANARY = r'''
import ctypes, json, os, pty, signal, socket
names = json.loads(os.environ["SOCKETS"])
listening = []
for name in names:
    listening.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    listening[-1].bind(name.replace("@", "\0"))
    listening[-1].listen(1000)
libc = ctypes.CDLL(None)
memory = ctypes.create_string_buffer(b"untouched")
shared = libc.shmget(0, 4096, 0o1600)
open("/dev/shm/of-the-user", "w").write("untouched")
terminal, end = pty.openpty()
print(json.dumps({"pid": os.getpid(), "address": ctypes.addressof(memory), "shared": shared, "terminal": os.ttyname(end)}), flush=True)
signal.pause()
'''
directories = shlex.join(sorted({name.rpartition("/")[0] for name in SOCKETS}))
machine.succeed(
    f"mkdir -p /run/user/{UID}; chmod 700 /run/user/{UID}; chown deploy /run/user/{UID}; systemctl start user@{UID}.service",
    # so that it may listen there
    f"mkdir -p {directories}; for d in {directories}; do case $d in /run|/var/tmp|/dev/shm) chmod 1777 $d;; "
    "*) chown -R deploy $d;; esac; done",
    f"chown -R deploy /run/user/{UID}",
    f"printf %s {shlex.quote(CANARY)} > /srv/canary; chmod 644 /srv/canary",
    f"systemd-run -q --unit=canary -p User=deploy -E SOCKETS={shlex.quote(json.dumps([*SOCKETS, '@canary']))} {PYTHON} /srv/canary",
)
canary = json.loads(machine.wait_until_succeeds("journalctl -q -u canary -o cat | grep '^{'", timeout=60))

# tries everything, and prints a line for each thing that it could do
PROBE = r'''
import ctypes, errno, json, os, signal, socket, stat, subprocess, sys
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
for name, flag in (("mount", 0x20000), ("user", 0x10000000), ("pid", 0x20000000),
                   ("net", 0x40000000), ("uts", 0x4000000), ("ipc", 0x8000000), ("cgroup", 0x2000000)):
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
# what else the user has running
pid, uid = CANARY["pid"], CANARY["uid"]
def buffer(address):
    return (ctypes.c_ulong * 2)(address, 9)
def memory_of_another(number):
    own = ctypes.create_string_buffer(b"untouched")
    return call("syscall", ctypes.c_long(number), ctypes.c_long(pid), buffer(ctypes.addressof(own)), ctypes.c_long(1),
                buffer(CANARY["address"]), ctypes.c_long(1), ctypes.c_long(0))
def of_pidfd():
    fd = libc.syscall(ctypes.c_long(434), ctypes.c_long(pid), ctypes.c_long(0))
    syscall(438, fd, 1, 0)()
attempt("connect to @canary", connects(socket.AF_UNIX, socket.SOCK_STREAM, "\0canary"))
attempt("signal a process of the user's", lambda: os.kill(pid, 0))
attempt("trace a process of the user's", syscall(101, 0x4206, pid, 0, 0))
attempt("read memory of the user's", memory_of_another(310))
attempt("write memory of the user's", memory_of_another(311))
attempt("open memory of the user's", lambda: open(f"/proc/{pid}/mem", "r+b").close())
attempt("take a file of the user's", of_pidfd)
attempt("go out by a process of the user's", lambda: os.listdir(f"/proc/{pid}/root/run/user/{uid}"))
attempt("read the environment of the user's", lambda: open(f"/proc/{pid}/environ", "rb").read())
attempt("attach shared memory of the user's", lambda: ctypes.c_void_p(libc.shmat(CANARY["shared"], None, 0)).value in (None, 2**64 - 1, 2**32 - 1) and 1 / 0)
attempt("open shared memory of the user's", lambda: open("/dev/shm/of-the-user", "r+").close())
attempt("write to a terminal of the user's", lambda: os.close(os.open(CANARY["terminal"], os.O_RDWR | os.O_NOCTTY)))
os.environ["XDG_RUNTIME_DIR"] = f"/run/user/{uid}"
attempt("start a unit of the user's", runs("systemctl", "--user", "start", "default.target"))
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


def could_of(said):
    """What the probe could do, by what it has printed."""
    print(said)
    assert sum(line.startswith("denied ") for line in said.splitlines()) > 25, said
    return {line.removeprefix("COULD ") for line in said.splitlines() if line.startswith("COULD ")}


def probe_for(writable):
    """The command line of the probe."""
    script = f"WRITABLE, CANARY = {writable!r}, {canary | {'uid': UID}!r}\n{PROBE}"
    path = machine.succeed(f"rm -rf /tmp/probe; printf %s {shlex.quote(script)} > /tmp/probe; nix-store --add /tmp/probe").strip()
    return f"{PYTHON} {path}"


def probe(unit, writable, read):
    """What a stand-in for a unit's program could do, from inside the unit."""
    command = probe_for(writable)
    machine.succeed(
        f"mkdir -p /run/systemd/system/{unit}.service.d; printf '%s\n' [Service] ExecStart= ExecStartPre= ExecStopPost= Type=oneshot "
        f"Restart=no WatchdogSec=0 LogLevelMax=debug 'ExecStart={command} {read}' > /run/systemd/system/{unit}.service.d/probe.conf",
        "systemctl daemon-reload",
        f"journalctl -q -u {unit} -n 1 --cursor-file=/tmp/cursor > /dev/null",
    )
    machine.succeed(f"systemctl restart {unit}.service")
    machine.wait_until_succeeds(f"journalctl -q -u {unit} -o cat --after-cursor=$(cat /tmp/cursor) | "
                                "grep -x 'the probe has ended'", timeout=60)
    said = machine.succeed(f"journalctl -q -u {unit} -o cat --after-cursor=$(cat /tmp/cursor)")
    machine.succeed(f"rm -r /run/systemd/system/{unit}.service.d; systemctl daemon-reload; systemctl reset-failed")
    return could_of(said)


with subtest("a webhook that was taken over can do nothing but ask for runs"):
    could = probe("ekiben-webhook", "/var/lib/ekiben/queue", f"{READ} /var/lib/ekiben/instances/app/notes.json {REPOSITORY}/flake.nix /home/deploy")
    assert could == {
        # what it is for
        "write in /var/lib/ekiben/queue",
        "connect to /run/systemd/notify",
    }, could

# what is the user's, and not for its stages
OUTSIDE = {
    *(f"connect to {name}" for name in (*SOCKETS, f"/run/user/{UID}/systemd/private", "/run/dbus/system_bus_socket")),
    *(f"{what} of the user's" for what in (
        "trace a process", "read memory", "write memory", "open memory", "take a file", "read the environment",
        "attach shared memory", "open shared memory", "write to a terminal", "start a unit",
    )),
    "go out by a process of the user's",
}
# this is as it is: abstract addresses belong to the network, and signals go to whatever has the same user
REACHED = {"connect to @canary", "signal a process of the user's"}
if machine.get_unit_property("ekiben-app", "PrivateUsers") == "no":
    # a machine without user namespaces
    REACHED |= {what for what in OUTSIDE if "process" in what or what.endswith((" memory of the user's", " file of the user's", " environment of the user's"))}

with subtest("outside of the sandbox, the user can do all that is tried"):
    could = could_of(machine.succeed(f"runuser -u deploy -- {probe_for('/home/deploy')} 2> /dev/null"))
    assert OUTSIDE | REACHED <= could, (OUTSIDE | REACHED) - could

with subtest("a stage of the user's can write to the repository and its own state, and reach nothing else that is the user's"):
    could = probe("ekiben-app", "/var/lib/ekiben/instances/app", READ)
    own = (
        *(f"{what} {place}" for what in ("write in", "overwrite") for place in (REPOSITORY, "/var/lib/ekiben/instances/app", "/var/cache/ekiben/app")),
        # of its own
        *(f"write in {place}" for place in ("/tmp", "/var/tmp", "/dev/shm", "/dev/mqueue")),
        # inputs come over the network, and are built by the daemon
        "open AF_INET", *(f"connect to {name}" for name in ("/nix/var/nix/daemon-socket/", "/run/nscd/", "/run/systemd/notify", "/run/systemd/resolve/")),
        *REACHED,
    )
    assert f"write in {REPOSITORY}/.git" in could and "connect to /nix/var/nix/daemon-socket/socket" in could, could
    assert not {what for what in could if not what.startswith(own)}, {what for what in could if not what.startswith(own)}
    machine.succeed("test -e /dev/shm/of-the-user", f"ipcs -m -i {canary['shared']}")

with subtest("what a timer starts can do no more than that, and cannot write to the repository either"):
    looks = probe("ekiben-look@app", "/var/lib/ekiben/instances/app", READ)
    assert looks - could == {"overwrite /var/lib/ekiben/looks/app"} and not [what for what in looks if REPOSITORY in what], looks

with subtest("what systemd thinks of it, which proves nothing by itself"):
    for unit in ("ekiben-webhook", "ekiben-app"):
        print(machine.execute(f"systemd-analyze security --no-pager {unit}.service | tail -n 1")[1])
