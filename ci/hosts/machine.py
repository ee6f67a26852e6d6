"""One host: a Debian system booted by systemd in namespaces of its own.

A `Machine` has the calls of the NixOS test driver's class of that name that the scenarios use,
with the same meaning, so that one script runs on both. What differs: a crash loses what is in
memory file systems, but nothing that was written to the disk and not yet synced, since the
kernel goes on; and limits of memory and tasks apply only where the kernel lets cgroups have
these controllers.
"""

import errno
import os
import pty
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import loader

HERE = Path(__file__).resolve().parent
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# between two looks at something that is waited for: the first ones, and at last
SOON, LATER = 0.05, 0.5
# what a fault does to the program whose operation it is; else it is the name of the error that the operation ends with
SIGNALS = {"kill": signal.SIGKILL, "hold": signal.SIGSTOP}
# what the disk is from then on: LASTING of faults.c, and the error that all operations end with
LASTING = {"full": 1000 + errno.ENOSPC, "read-only": 1000 + errno.EROFS}
# what makes a file system of a file, without a question
MKFS = {"btrfs": ["-qf"], "ext4": ["-qF"], "xfs": ["-qf"]}
# the page of faults.c
PAGE = struct.Struct("=IIii32s128s128s1024s")


class Failure(Exception):
    """A step of a scenario went wrong; the message says which and how."""


def retry(what, condition, timeout):
    """Calls `condition` until it is true, ever less often; fails after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    pause = SOON
    while not condition():
        if time.monotonic() > deadline:
            raise Failure(f"timed out after {timeout} s: {what}")
        time.sleep(pause)
        pause = min(1.2 * pause, LATER)


class Machine:
    """A host named `name`; `disk` is the directory that outlives its boots."""

    def __init__(self, name, address, root, disk, cgroup, log, quiet=False):
        self.name = name
        self.address = address
        self.root = root
        self.disk = disk
        self.cgroup = cgroup
        self.log_file = log
        self.quiet = quiet
        self.stderr = subprocess.DEVNULL if quiet else None
        self.init = None
        self.process = None
        self.image = None
        self.kind = None
        # the systems that the loader has booted, one after the other
        self.boots = []
        # those that do not come up, and how often the loader boots such a one by itself, if it counts
        self.broken = set()
        self.tries = None

    # life

    def start(self, allow_reboot=False, choose=None, kexec=None, wait=True):
        """Boots the host, if it is not running: the system that the boot loader chooses, or `choose`, as by hand in the
        menu, or `kexec`, past the boot loader. Where that one does not come up, the power is cycled. Returns when
        systemd has started all, or, if `wait` is not set, answers."""
        if self.init:
            return
        system = kexec or self._load(choose)
        while system in self.broken:
            self.log(f"does not come up with {system}")
            if len(self.boots) > 100:
                raise Failure(f"{self.name} boots {system} for ever")
            system = self._load()
        self.log("boots")
        began = time.monotonic()
        self.cgroup.mkdir(parents=True, exist_ok=True)
        console, console_end = pty.openpty()
        threading.Thread(target=self._keep_console, args=(console,), daemon=True).start()

        def enter_cgroup():
            (self.cgroup / "cgroup.procs").write_text(str(os.getpid()))

        self.process = subprocess.Popen(
            ["unshare", "--mount", "--uts", "--ipc", "--net", "--cgroup", "--pid", "--fork", "--kill-child=KILL",
             HERE / "boot", self.root, self.disk, self.name, os.ttyname(console_end), system or ""],
            stdin=subprocess.PIPE, stdout=console_end, stderr=console_end, text=True, preexec_fn=enter_cgroup)
        os.close(console_end)
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        retry("the host's first process", lambda: children.read_text().strip(), 10)
        self.init = int(children.read_text().split()[0])
        self._plug_in()
        self.process.stdin.write("go\n")
        self.process.stdin.close()
        states = ("running", "degraded") if wait else ("running", "degraded", "starting")
        retry("systemd to answer", lambda: self._run(
            f"systemctl is-system-running {'--wait' if wait else ''}", stderr=subprocess.DEVNULL).stdout.strip() in states, 60)
        self.log(f"is up after {time.monotonic() - began:.1f} s")

    def _load(self, choose=None):
        bad = [system for system in self.broken if self.tries and self.boots.count(system) >= self.tries]
        system = loader.next_boot(self.disk / "upper/boot/grub", choose, bad)
        self.boots.append(system)
        return system

    def shutdown(self):
        """Powers the host off, orderly."""
        if not self.init:
            return
        self.log("is shut down")
        self._run("systemctl poweroff --no-block")
        self.wait_for_shutdown()

    def wait_for_shutdown(self):
        """Waits until the host has ended by itself; it is not started again."""
        try:
            self.process.wait(90)
        except subprocess.TimeoutExpired:
            raise Failure(f"{self.name} did not shut down in 90 s") from None
        self._gone()

    def crash(self):
        """Ends the host at once, as a power cut would; its disk stays."""
        if not self.init:
            return
        self.log("crashes")
        os.kill(self.init, signal.SIGKILL)
        self.process.wait()
        self._gone()

    def put_on_image(self, kind):
        """Gives the host, which must not run, a new disk, which is a file system of its own: see `cut_power`."""
        installed = self.disk.with_suffix(".installed")
        if self.image:
            subprocess.run(["umount", self.disk], check=True)
            self.image.unlink()
        else:
            self.disk.rename(installed)
        self.image, self.kind = self.disk.with_suffix(".image"), kind
        subprocess.run(["truncate", "-s", "1500M", self.image], check=True)
        subprocess.run([f"mkfs.{kind}", *MKFS[kind], self.image], check=True, stdout=subprocess.DEVNULL)
        self._mount_image()
        subprocess.run(["cp", "-a", f"{installed}/.", self.disk], check=True)

    def cut_power(self):
        """Ends the host at once, and gives its disk the contents that the file system's device has at that moment: what is
        only in memory is lost."""
        self.log("loses its power")
        frozen = self.cgroup / "cgroup.freeze"
        frozen.write_text("1")
        retry("all processes to be frozen", lambda: "frozen 1" in (self.cgroup / "cgroup.events").read_text(), 10)
        copy = self.image.with_suffix(".copy")
        subprocess.run(["cp", "--sparse=always", self.image, copy], check=True)
        os.kill(self.init, signal.SIGKILL)
        frozen.write_text("0")
        self.process.wait()
        self._gone()
        # processes that were killed take a moment to be gone
        retry("the disk to be free", lambda: subprocess.run(["umount", self.disk], stderr=subprocess.DEVNULL).returncode == 0, 30)
        copy.rename(self.image)
        self._mount_image()

    def _mount_image(self):
        self.disk.mkdir(exist_ok=True)
        # nothing gets there by the mere passing of time
        options = "loop" if self.kind == "xfs" else "loop,commit=300"
        subprocess.run(["mount", "-t", self.kind, "-o", options, self.image, self.disk], check=True)

    def release(self):
        """Ends the host, if it runs, and keeps its journal beside the log."""
        if self.init:
            journal = self._run("journalctl --no-pager -o short-precise")
            self.log_file.with_suffix(".journal").write_text(journal.stdout)
            self.crash()

    def _gone(self):
        self.init = None
        subprocess.run(["find", self.cgroup, "-mindepth", "1", "-depth", "-type", "d", "-delete"], stderr=subprocess.DEVNULL)

    def _keep_console(self, console):
        with open(self.log_file, "ab") as log:
            while True:
                try:
                    log.write(os.read(console, 65536))
                    log.flush()
                except OSError:  # no process has the console open any more
                    return

    def _plug_in(self):
        """Joins the host to the bridge, as eth1, like the first network of a NixOS test."""
        number = self.address.rsplit(".", 1)[1]
        port = f"port-{number}"
        # the same after each boot, or the others would go on sending to the one before
        mac = f"52:54:00:12:01:{int(number):02x}"
        inside = ["nsenter", "--target", str(self.init), "--net", "ip"]
        # of the host's last boot, if it crashed: the kernel takes its time
        subprocess.run(["ip", "link", "del", port], stderr=subprocess.DEVNULL)
        for command in (
            ["ip", "link", "add", port, "type", "veth", "peer", "name", "eth1", "address", mac,
             "netns", str(self.init)],
            ["ip", "link", "set", port, "master", "bridge", "up"],
            [*inside, "addr", "add", f"{self.address}/24", "dev", "eth1"],
            [*inside, "link", "set", "eth1", "up"],
            [*inside, "link", "set", "lo", "up"],
        ):
            subprocess.run(command, check=True)

    def block(self):
        """Pulls the network cable."""
        self._cable("down")

    def unblock(self):
        """Plugs the network cable in again."""
        self._cable("up")

    def _cable(self, state):
        subprocess.run(["ip", "link", "set", f"port-{self.address.rsplit('.', 1)[1]}", state], check=True)

    # faults: where the scenario says `fileFaults = true`

    def fault(self, program, number, act, words="", path=""):
        """Has the `number`th file operation of a program from now on (0: none; they are counted) go wrong: the program
        is killed ("kill") or held ("hold"), or the operation fails (an error's name), or the disk is "full" or "read-only"
        from then on. `words` are a part of the program's command line, `path` a part of the operation's."""
        act = -SIGNALS[act] if act in SIGNALS else LASTING.get(act) or getattr(errno, act)
        self._write_faults(PAGE.pack(0, number, act, 0, program.encode(), words.encode(), path.encode(), b""))

    def no_fault(self):
        """No operation goes wrong any more; returns how many fitted the last `fault`."""
        count = self._read_faults()[0]
        self._write_faults(bytes(PAGE.size))
        return count

    def fault_met(self):
        """What has gone wrong since the last `fault`; empty if nothing has."""
        _, _, _, process, *_, report = self._read_faults()
        return report.rstrip(b"\0").decode(errors="replace") if process else ""

    def let_go(self):
        """Lets the program that is held go on, if it still is."""
        _, _, _, process, *_ = self._read_faults()
        self.execute(f"kill -CONT {process}")

    def _read_faults(self):
        return PAGE.unpack(Path(f"/proc/{self.init}/root/dev/shm/faults").read_bytes()[:PAGE.size])

    def _write_faults(self, page):
        # in place: all programs have it mapped
        with open(f"/proc/{self.init}/root/dev/shm/faults", "r+b") as faults:
            faults.write(page)

    # commands

    def log(self, message):
        """Says what goes on, in the driver's manner."""
        if not self.quiet:
            print(f"{self.name}: {message}", flush=True)

    def _run(self, command, timeout=900, stderr=None):
        if not self.init:
            raise Failure(f"{self.name} is not running")
        return subprocess.run(
            ["nsenter", "--target", str(self.init), "--all", "timeout", str(timeout), "bash", "-c", f"set -euo pipefail; {command}"],
            env={"PATH": PATH, "HOME": "/root", "USER": "root", "LC_ALL": "C.UTF-8"}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr or self.stderr, text=True, errors="replace")

    def execute(self, command, check_return=True, check_output=True, timeout=900):
        """Runs a shell command as root; returns its exit status and its output."""
        self.start()
        done = self._run(command, timeout or 900)
        return (done.returncode, done.stdout)

    def succeed(self, *commands, timeout=None):
        """Runs commands that have to succeed; returns their output."""
        output = ""
        for command in commands:
            self.log(f"must succeed: {command}")
            status, text = self.execute(command, timeout=timeout)
            if status != 0:
                raise Failure(f"{self.name}: exit status {status} of: {command}\n{text}")
            output += text
        return output

    def fail(self, *commands, timeout=None):
        """Runs commands that have to fail; returns their output."""
        output = ""
        for command in commands:
            self.log(f"must fail: {command}")
            status, text = self.execute(command, timeout=timeout)
            if status == 0:
                raise Failure(f"{self.name}: unexpected success of: {command}\n{text}")
            output += text
        return output

    def wait_until_succeeds(self, command, timeout=900):
        """Repeats a command until it succeeds; returns its output."""
        return self._wait(command, timeout, lambda status: status == 0)

    def wait_until_fails(self, command, timeout=900):
        """Repeats a command until it fails; returns its output."""
        return self._wait(command, timeout, lambda status: status != 0)

    def _wait(self, command, timeout, wanted):
        self.log(f"waiting for: {command}")
        last = (0, "")

        def attempt():
            nonlocal last
            last = self.execute(command)
            return wanted(last[0])

        try:
            retry(command, attempt, timeout)
        except Failure as failure:
            raise Failure(f"{self.name}: {failure}; the last output was:\n{last[1]}") from None
        return last[1]

    def systemctl(self, query, user=None):
        """Runs systemctl; returns its exit status and its output."""
        return self.execute(f"systemctl {query}")

    def get_unit_property(self, unit, name):
        """One property of a unit, as systemd shows it."""
        return self.succeed(f"systemctl show --property {name} --value {shlex.quote(unit)}").strip()

    def wait_for_unit(self, unit, user=None, timeout=900):
        """Waits until a unit is active; fails at once if it has failed."""
        self.log(f"waiting for unit {unit}")

        def active():
            state = self.execute(f"systemctl show --property ActiveState --value {shlex.quote(unit)}")[1].strip()
            if state == "failed":
                raise Failure(f"{self.name}: unit {unit} has failed")
            return state == "active"

        retry(f"{self.name}: unit {unit} to be active", active, timeout)

    def require_unit_state(self, unit, require_state="active"):
        """Fails unless a unit is in the given state now."""
        state = self.execute(f"systemctl show --property ActiveState --value {shlex.quote(unit)}")[1].strip()
        if state != require_state:
            raise Failure(f"{self.name}: unit {unit} is {state}, not {require_state}")

    def wait_for_file(self, filename, timeout=900):
        """Waits until a file exists."""
        self.wait_until_succeeds(f"test -e {shlex.quote(filename)}", timeout)

    def wait_for_open_port(self, port, addr="localhost", timeout=900):
        """Waits until something listens on a TCP port."""
        self.wait_until_succeeds(f"nc -z {addr} {port}", timeout)

    def wait_for_closed_port(self, port, addr="localhost", timeout=900):
        """Waits until nothing listens on a TCP port."""
        self.wait_until_fails(f"nc -z {addr} {port}", timeout)

    def copy_from_host(self, source, target):
        """Copies a file or directory into the host."""
        parent = shlex.quote(os.path.dirname(target))
        self.succeed(f"mkdir -p {parent}")
        root = Path(f"/proc/{self.init}/root")
        inside = root / target.lstrip("/")
        if Path(source).is_dir():
            shutil.copytree(source, inside, dirs_exist_ok=True, symlinks=True)
        else:
            shutil.copy(source, inside)

    def copy_from_vm(self, source):
        """Copies a file of the host beside the logs."""
        shutil.copy(f"/proc/{self.init}/root/{source.lstrip('/')}", self.log_file.parent)


def script_environment(machines):
    """The names that a scenario's script finds, as in a NixOS test."""

    @contextmanager
    def subtest(name):
        print(f"subtest: {name}", flush=True)
        began = time.monotonic()
        try:
            yield
        except Exception:
            print(f"subtest FAILED: {name}", file=sys.stderr, flush=True)
            raise
        print(f"subtest passed in {time.monotonic() - began:.1f} s: {name}", flush=True)

    def start_all():
        for machine in machines.values():
            machine.start()

    names = {name.replace("-", "_"): machine for name, machine in machines.items()}
    return {**names, "subtest": subtest, "start_all": start_all, "machines": list(machines.values()), "retry": retry}
