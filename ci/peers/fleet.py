# Measures a fleet of Ekiben's, and Bento beside it, on the hosts of the scenario `fleet`, and prints the tables
# of ci/README.md: `ci/bench fleet`, with one of them named, prints that one.
#
#   polls     what one poll costs the host and its hub: `db` is a host of Ekiben's, `plain` one of Bento's
#   hub       what a hub of 1, 100 and 1,000 hosts costs
#   bad-days  what Bento does on the days of the scenario `fleet-bad-days`; what Ekiben does, that one shows
#
# Both publish the same configuration from the same hub by the same sshd. Bento's own scripts run as they are;
# nixos-rebuild, which they call, is the stand-in in ci/peers/fleet-host.
#
# How it is counted. Processor time: that of the whole host by its control group, less what the host takes when
# nothing happens. Bytes: by the counters of the host's network port. Connections and round trips: by what
# passes there, see `Wire`. Seconds: of `systemctl start`, or of the command, by the host's shell.
# ruff: noqa
import itertools
import os
import re
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

PARTS = os.environ.get("EKIBEN_BENCH", "").split() or ["polls", "hub", "bad-days"]
BENTO = os.environ.get("BENTO")
# in turn, for what else the machine may do meanwhile
ROUNDS = 5
FLEET, BENTO_FLEET, CHROOT = "/srv/fleet", "/srv/bento", "/home/chroot"
PUBLISH = "HOME=/root bash /opt/bento/bento"
HUB = "/var/lib/ekiben-hub"


def say(text):
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def print_table(*rows):
    """A table, its head first."""
    print()
    for number, row in enumerate(rows):
        print(f"| {' | '.join(map(str, row))} |")
        if number == 0:
            print("|" + " --- |" * len(row))
    sys.stdout.flush()


def processor(machine):
    """The seconds of processor time that a host has taken since it booted."""
    stat = (machine.cgroup / "cpu.stat").read_text()
    return int(stat.split()[1]) / 1e6


class Took:
    """What hosts take while something is done: `with Took(hub) as took: ...`, then `took[hub]` in seconds."""

    def __init__(self, *hosts):
        self.hosts = hosts

    def __enter__(self):
        self.began = time.monotonic()
        self.before = {host: processor(host) for host in self.hosts}
        return self

    def __exit__(self, *_):
        self.seconds = time.monotonic() - self.began
        self.after = {host: processor(host) for host in self.hosts}

    def __getitem__(self, host):
        return max(0, self.after[host] - self.before[host] - idle[host] * self.seconds)


class Wire:
    """What passes a host's network port: bytes both ways, connections, round trips.

    A round trip is a connection's first packet, and each time the host sends something after it has heard
    something: it could not have known before what to send."""

    def __init__(self, machine):
        self.port = f"port-{machine.address.rsplit('.', 1)[1]}"
        self.address = socket.inet_aton(machine.address)

    def counters(self):
        link = json.loads(subprocess.run(["ip", "-j", "-s", "link", "show", self.port], check=True, capture_output=True).stdout)[0]
        return link["stats64"]["rx"]["bytes"], link["stats64"]["tx"]["bytes"]

    def __enter__(self):
        self.before = self.counters()
        self.connections = self.turns = 0
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3))
        self.socket.bind((self.port, 0))
        self.socket.settimeout(0.2)
        self.over = False
        self.thread = threading.Thread(target=self.listen, daemon=True)
        self.thread.start()
        return self

    def listen(self):
        heard = {}
        while True:
            try:
                frame = self.socket.recv(65536)
            except TimeoutError:
                if self.over:
                    return
                continue
            if frame[12:14] != b"\x08\x00" or frame[23] != 6:
                continue
            size = struct.unpack(">H", frame[16:18])[0]
            tcp = 14 + 4 * (frame[14] & 15)
            flags, payload = frame[tcp + 13], size - (tcp - 14) - 4 * (frame[tcp + 12] >> 4)
            sends = frame[26:30] == self.address
            connection = frame[tcp:tcp + 4] if sends else frame[tcp + 2:tcp + 4] + frame[tcp:tcp + 2]
            if sends and flags & 18 == 2:
                self.connections += 1
                self.turns += 1
                heard[connection] = False
            elif payload and not sends:
                heard[connection] = True
            elif payload and heard.get(connection):
                self.turns += 1
                heard[connection] = False

    def __exit__(self, *_):
        self.over = True
        self.thread.join()
        self.socket.close()
        self.sent, self.received = (after - before for before, after in zip(self.before, self.counters()))


def write(path, text, machine=None):
    (machine or hub).succeed(f"mkdir -p $(dirname {path}); printf %s {shlex.quote(text)} > {path}")


def fleet(arguments):
    """The command line for `ekiben fleet` on the hub, by whoever publishes."""
    return as_deploy(f"cd {FLEET}; ekiben fleet {arguments} 2>&1")


def change(repository, name, content, trouble="none"):
    """Changes the configuration of a host."""
    hub.succeed(f"cd {repository}/hosts/{name}/app; echo {content} > content; echo {trouble} > trouble")


def bento_deploys():
    return hub.execute(f"cd {BENTO_FLEET}; {PUBLISH} deploy 2>&1")[1]


def in_another_minute():
    """Makes Bento's last release of another minute than the next, which a client would not see otherwise."""
    hub.succeed(f"touch -d 'yesterday 00:{next(COUNT) % 60:02}' {CHROOT}/plain/last_change_date")


def settle(machine):
    """Waits until no session of the last minute is left."""
    machine.wait_until_fails("systemctl list-units --no-legend 'user@*' 'session-*' | grep .")


def set_up():
    """Has the hub serve both, and each host run what it was given by hand."""
    for machine in (hub, db, plain):
        machine.start()
        machine.wait_for_unit("multi-user.target")
        machine.copy_from_host("ci/peers/fleet-host", "/")
    for machine in (db, plain):
        machine.succeed("install -m 600 /etc/scenario/identity /root/identity; mkdir -p -m 700 /root/.ssh; cp /root/identity /root/.ssh/id_ed25519")
    use_host_key(hub, "host-key")
    hub.succeed("systemctl stop ekiben-hub-collect.timer ekiben-hub-files.timer; install -m 600 -o deploy /etc/scenario/signer /home/deploy/signer")
    for name, repository in (("db", FLEET), ("plain", BENTO_FLEET)):
        machine = {"db": db, "plain": plain}[name]
        place = f"{repository}/hosts/{name}"
        pack = machine.succeed("tar -C /etc/scenario -cz system.nix switch-to-configuration systems | base64 -w0").strip()
        hub.succeed(f"mkdir -p {place}/app; base64 -d <<< {pack} | tar -C {place} -xz")
        # a build can be held: see `held`
        hub.succeed(f"sed -i 's,^ *case .trouble in,while [ -e /tmp/hold ]; do : > /tmp/held; sleep 0.1; done\\n&,' {place}/system.nix")
        write(f"{place}/flake.nix", f'{{ outputs = {{ self }}: {{ nixosConfigurations.{name} = import ./system.nix {{ name = "{name}"; app = ./app; other = ./app; revision = "none"; }}; }}; }}')
        change(repository, name, 0)
        machine.succeed(f"mkdir -p /srv; base64 -d <<< {hub.succeed(f'tar -C {place} -cz . | base64 -w0').strip()} | (mkdir -p /srv/first; tar -C /srv/first -xz)")
        machine.succeed(f"nix-env --profile {PROFILE} --set $(nix build --no-link --print-out-paths path:/srv/first#nixosConfigurations.{name}.config.system.build.toplevel)", f"{PROFILE}/bin/switch-to-configuration switch")
    write(f"{FLEET}/fleet.json", json.dumps({"signingKey": "/home/deploy/signer"}))
    hub.succeed(f"chown -R deploy {FLEET}")
    change(FLEET, "db", next(COUNT))
    hub.execute(fleet("deploy db"))
    assert run(db, "fleet")["result"] == "deployed", last_run(db, "fleet")
    wait_until_idle(db, "deliver")
    if BENTO:
        set_up_bento()
    settle(hub)
    for machine in (hub, db, plain):
        before, began = processor(machine), time.monotonic()
        time.sleep(10)
        idle[machine] = (processor(machine) - before) / (time.monotonic() - began)


def set_up_bento():
    hub.copy_from_host(BENTO, "/opt/bento")
    write("/etc/ssh/sshd_config.d/zz-bento.conf", "Match Group sftp_users\n  X11Forwarding no\n  AllowTcpForwarding no\n  ChrootDirectory %h\n  ForceCommand internal-sftp\n")
    hub.succeed(
        f"groupadd sftp_users; useradd --system --no-create-home --home-dir {CHROOT}/plain --gid sftp_users plain",
        "cut -d' ' -f2- /etc/ssh/authorized_keys.d/fleet-plain > /etc/ssh/authorized_keys.d/plain",
        "systemctl restart sshd",
    )
    write(f"{BENTO_FLEET}/config.sh", f"CHROOT_DIR={CHROOT}\nREMOTE_IP=hub\n")
    change(BENTO_FLEET, "plain", next(COUNT))
    said = bento_deploys()
    assert "update required" in said, said
    plain.succeed("mkdir -m 700 /var/bento; ssh-keyscan hub >> /root/.ssh/known_hosts 2> /dev/null; cd /var/bento; echo get /config/bootstrap.sh | sftp plain@hub; /bin/sh bootstrap.sh")
    bento_polls()
    assert shows(plain, "app") == hub.succeed(f"cat {BENTO_FLEET}/hosts/plain/app/content").strip()


def bento_polls():
    """Has Bento's client ask; returns what it said."""
    follow_from = plain.succeed("date +@%s.%N").strip()
    plain.execute("systemctl start bento-upgrade.service")
    return said_by_bento(follow_from)


def said_by_bento(since):
    return plain.succeed(f"journalctl --sync; journalctl -q -u bento-upgrade -o cat --since={since} || true")


# one poll

def timed(machine, command):
    """Runs a command, that may fail; returns how many seconds it took."""
    return timed_all(machine, command)[0]


def timed_all(machine, command):
    """The same, with the processor time of the command and those whom it waited for, which are not the host's own."""
    _, said = machine.execute(f"TIMEFORMAT='%R %U %S'; {{ time {command} > /dev/null 2>&1; }} 2>&1 || true")
    seconds, user, system = map(float, said.split())
    return seconds, user + system


def measure_poll(machine, start, check):
    """One poll: what it takes of host, hub and network."""
    settle(hub)
    with Wire(machine) as wire, Took(machine, hub) as took:
        seconds = timed(machine, start)
        wait_until_idle(machine, "fleet")
        wait_until_idle(machine, "deliver")
        settle(hub)
    check()
    return [1000 * took[machine], 1000 * took[hub], wire.connections, wire.turns, wire.sent / 1000, wire.received / 1000, seconds]


def ekiben_poll(result=None):
    """As the timer has it: a look, and a run if that does not find that nothing is new."""
    known = last_run(db, "fleet")
    def check():
        last = last_run(db, "fleet")
        assert status(db, "fleet")["looked"] if result is None else last != known and last["result"] == result, last
    found = "test ! -s /var/lib/ekiben/instances/fleet/found"
    return measure_poll(db, f"{{ systemctl start ekiben-look@fleet.service; {found} || systemctl start ekiben-fleet.service; }}", check)


def bento_poll(words):
    since = plain.succeed("date +@%s.%N").strip()
    def check():
        assert words in said_by_bento(since), said_by_bento(since)
    return measure_poll(plain, "systemctl start bento-upgrade.service", check)


def acknowledged():
    """Has the hub collect what has arrived, and the host know of it."""
    hub.succeed("systemctl start ekiben-hub-collect.service")
    ekiben_poll()


def polls():
    """What one poll costs."""
    rounds = {key: [] for key in (("Ekiben", "nothing new"), ("Bento", "nothing new"), ("Ekiben", "new release"), ("Bento", "new release"))}
    for number in range(ROUNDS):
        say(f"polls, round {number + 1} of {ROUNDS}")
        content = next(COUNT)
        acknowledged()
        rounds["Ekiben", "nothing new"].append(ekiben_poll())
        if BENTO:
            rounds["Bento", "nothing new"].append(bento_poll("no update required"))
        change(FLEET, "db", content)
        hub.execute(fleet("deploy db"))
        rounds["Ekiben", "new release"].append(ekiben_poll("deployed"))
        if BENTO:
            change(BENTO_FLEET, "plain", content)
            bento_deploys()
            in_another_minute()
            rounds["Bento", "new release"].append(bento_poll("update required"))
            assert shows(plain, "app") == str(content)
    forms = {
        "processor time of the host": "{:.0f} ms", "of the hub": "{:.0f} ms", "connections": "{:.0f}", "round trips": "{:.0f}",
        "sent by the host": "{:.1f} kB", "received": "{:.1f} kB", "time": "{:.1f} s",
    }
    done = {key: list(map(statistics.median, zip(*figures))) for key, figures in rounds.items() if figures}
    for key, figures in rounds.items():
        say(f"{key}: {[[round(figure, 2) for figure in row] for row in figures]}")
    head = ["one poll", *(f"{who}, {what}" for who, what in done)]
    print_table(head, *([name, *(form.format(figures[number]) for figures in done.values())] for number, (name, form) in enumerate(forms.items())))
    if BENTO:
        # how much of it is sshd's session, which Bento leaves as the hub has it
        hub.succeed("echo '  PAMServiceName ekiben-hub' >> /etc/ssh/sshd_config.d/zz-bento.conf; systemctl restart sshd")
        without = statistics.median(bento_poll("no update required")[1] for _ in range(3))
        hub.succeed("sed -i /PAMServiceName/d /etc/ssh/sshd_config.d/zz-bento.conf; systemctl restart sshd")
        print(f"\nWith the hub's PAM service for Ekiben's hosts, a poll of Bento's with nothing new takes {without:.0f} ms of the hub.", flush=True)


# a hub of many

def add_hosts(names):
    """Has the hub serve more hosts, as the module would: by what it renders for the host `plain`, under other names."""
    rendered = Path("ci/rendered/fleet/hub")
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        for path in rendered.rglob("*"):
            if not path.is_file():
                continue
            text, place = path.read_text(), Path(directory) / path.relative_to(rendered)
            if "plain" in path.name:
                copies = {place.with_name(place.name.replace("plain", name)): text.replace("plain", name) for name in names}
            elif place.parent.name in ("sysusers.d", "tmpfiles.d"):
                lines = [line for line in text.splitlines() if "plain" in line]
                copies = {place.with_name("more.conf"): "".join(line.replace("plain", name) + "\n" for name in names for line in lines)}
            else:
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            for copy, text in copies.items():
                copy.write_text(text)
        # NixOS has 600 such users at most, unless they are given their numbers
        numbers = Path(directory) / "etc/sysusers.d/more.conf"
        numbers.write_text("r - 1100-9999\n" + numbers.read_text())
        hub.copy_from_host(directory, "/")
    mounts = " ".join(shlex.quote(rf"var-lib-ekiben\x2dhub-hosts-{name}-reports.mount") for name in names)
    with Took(hub) as took:
        # by number, as NixOS has it: mount(8) reads no further than to the group it looks for, and not over a very long line
        hub.succeed("systemd-sysusers 2>&1; sort -t: -k3,3n -o /etc/group /etc/group; systemd-tmpfiles --create 2>&1; systemctl daemon-reload")
        hub.execute(f"systemctl start {mounts} 2> /dev/null")
    assert hub.execute("systemctl --failed --no-legend | grep -c reports")[1].strip() == "0"
    say(f"{len(names)} hosts more: {took[hub]:.1f} s of processor time, {took.seconds:.1f} s")


def publisher(count, arguments):
    """The command line for `ekiben fleet` in a repository of that many hosts."""
    return as_deploy(f"cd /srv/fleet-{count}; ekiben fleet --directory /srv/hub-{count} {arguments} 2>&1")


def measure_command(command, rounds=3):
    """Processor time and seconds of a command on the hub: the medians."""
    figures = []
    for _ in range(rounds):
        with Took(hub) as took:
            seconds, processor_time = timed_all(hub, command)
        figures.append((took[hub] + processor_time, seconds))
    return tuple(map(statistics.median, zip(*figures)))


SESSION = """-pwd
-reget release/manifest.json {0}/manifest
-reget files/index.json {0}/index
-put /root/heartbeat reports/heartbeat.json.new
-rename reports/heartbeat.json.new reports/heartbeat.json
"""
# asks again and again, as hosts do, for some seconds; prints how often it was answered, and how often not
ASK = r"""
import subprocess, sys, tempfile, time
names, seconds = sys.argv[2:], float(sys.argv[1])
until = time.monotonic() + seconds
done = failed = 0
with tempfile.TemporaryDirectory() as place:
    open(place + "/batch", "w").write(open("/root/batch").read().format(place))
    for number in range(10**9):
        if time.monotonic() > until and (seconds or number):
            break
        ended = subprocess.run(["sftp", "-b", place + "/batch", "-o", "BatchMode=yes", "fleet-" + names[number % len(names)] + "@hub"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        done += ended.returncode == 0
        failed += ended.returncode != 0
print(done, failed)
"""


def ask(names, at_once, seconds):
    """Has so many hosts ask at once, for some seconds or, if 0, one time each; returns answered, unanswered, seconds and the hub's time."""
    workers = [names[number::at_once] for number in range(at_once)]
    lines = " ".join(f"python3 /root/ask.py {seconds} {' '.join(worker or names)} &" for worker in workers)
    with Took(hub) as took:
        said = plain.succeed(f"{lines} wait")
        seconds = time.monotonic() - took.began
    done, failed = map(sum, zip(*(map(int, line.split()) for line in said.splitlines())))
    return done, failed, seconds, took[hub]


def hub_part():
    """What a hub of 1, 100 and 1,000 hosts costs."""
    names = [f"h{number:04}" for number in range(1, 1001)]
    columns = {}
    write("/root/batch", SESSION, plain)
    write("/root/ask.py", ASK, plain)
    write("/root/heartbeat", json.dumps({"x": "x" * 1000}), plain)
    plain.succeed("test -s /root/.ssh/known_hosts || ssh-keyscan hub >> /root/.ssh/known_hosts 2> /dev/null")
    known = 0
    for count in (1, 100, 1000):
        say(f"{count} hosts")
        add_hosts(names[known:count])
        known = count
        mine = names[:count]
        hub.succeed(f"for h in {' '.join(mine)}; do cp {HUB}/hosts/db/release/manifest.json {HUB}/hosts/$h/release/; done")
        column = columns[count] = {}
        for at_once in (1, 4, 16):
            done, failed, seconds, processor_time = ask(mine, at_once, 10)
            say(f"{count} hosts, {at_once} at once: {done} answered, {failed} not, {seconds:.1f} s, hub {1000 * processor_time / done:.1f} ms each")
            column[f"sessions a second, {at_once} at a time"] = f"{done / seconds:.1f}" + (f" ({failed} refused)" if failed else "")
            if at_once == 4:
                column["processor time of the hub for each"] = f"{1000 * processor_time / done:.0f} ms"
        if count == 1000:
            for herd in (50, 200):
                done, failed, seconds, *_ = ask(mine[:herd], herd, 0)
                column[f"{herd} hosts in the same moment"] = f"{done} answered, {failed} refused, in {seconds:.1f} s"
                columns[1][f"{herd} hosts in the same moment"] = ""
        column["a start of the collecting unit"] = measure_command("systemctl start ekiben-hub-collect.service")
        column["a start of the unit for files"] = measure_command("systemctl start ekiben-hub-files.service")
        # what the repository's side costs
        hub.succeed(f"install -d -o deploy /srv/fleet-{count} /srv/hub-{count} /srv/hub-{count}/received; mkdir -p /srv/fleet-{count}/hosts")
        write(f"/srv/fleet-{count}/fleet.json", json.dumps({"signingKey": "/home/deploy/signer"}))
        system = os.uname().machine + "-linux"
        flake = "{ outputs = { self }: { nixosConfigurations.NAME.config.system.build.toplevel = derivation { name = \"nixos-system-NAME\"; system = \"SYSTEM\"; builder = \"/bin/sh\"; says = builtins.readFile ./says; args = [ \"-c\" \"echo $says > $out\" ]; }; }; }".replace("SYSTEM", system)
        write(f"/srv/fleet-{count}/flake", flake)
        hub.succeed(f"cd /srv/fleet-{count}; for h in {' '.join(mine)}; do mkdir -p hosts/$h; echo 1 > hosts/$h/says; sed s/NAME/$h/g flake > hosts/$h/flake.nix; install -d -o deploy /srv/hub-{count}/hosts/$h/release /srv/hub-{count}/hosts/$h/reports; done; chown -R deploy .")
        column["first `deploy --no-build`"] = measure_command(publisher(count, "deploy --no-build"), rounds=1)
        column["`deploy` with nothing changed"] = measure_command(publisher(count, "deploy --no-build"))
        figures = []
        for number in range(3):
            hub.succeed(f"echo more {number} > /srv/fleet-{count}/hosts/{mine[-1]}/says")
            figures.append(measure_command(publisher(count, "deploy"), rounds=1))
        column["`deploy` with one host changed"] = tuple(map(statistics.median, zip(*figures)))
        hub.succeed(f"echo last > /srv/fleet-{count}/hosts/{mine[-1]}/says")
        column["`deploy HOST`"] = measure_command(publisher(count, f"deploy {mine[-1]}"))
        beat = "for h in NAMES; do sed s/db/$h/g /var/lib/ekiben-hub/received/db/heartbeat.json > /srv/hub-COUNT/hosts/$h/reports/heartbeat.json; done; chown -R deploy /srv/hub-COUNT".replace("NAMES", " ".join(mine)).replace("COUNT", str(count))
        hub.succeed(beat)
        column["`collect`, a heartbeat from each"] = measure_command(publisher(count, "collect"), rounds=1)
        column["`collect`, nothing there"] = measure_command(publisher(count, "collect"))
        column["`status`"] = measure_command(publisher(count, "status"))
        if BENTO and count <= 100:
            bento_hub(count, mine, column, flake)
        for name, value in column.items():
            say(f"{count}: {name}: {value}")  # of processor time, and of the clock
    # the seconds are for whoever looks on: they are also those of what else the machine does
    shown = lambda value: f"{value[0]:.2f} s" if isinstance(value, tuple) else value
    print_table(["hosts", *columns], *([name, *(shown(column.get(name, "")) for column in columns.values())] for name in columns[1]))
    memory()


def bento_hub(count, names, column, flake):
    """What publishing to as many costs with Bento, which evaluates only (NOLOCALBUILD), too."""
    place = f"/srv/bento-{count}"
    write(f"{place}/config.sh", f"CHROOT_DIR=/srv/chroot-{count}\nREMOTE_IP=hub\nNOLOCALBUILD=1\n")
    write(f"{place}/flake", flake)
    hub.succeed(f"cd {place}; mkdir /srv/chroot-{count}; for h in {' '.join(names)}; do id $h > /dev/null 2>&1 || useradd --no-create-home --gid sftp_users $h; mkdir -p hosts/$h; echo 1 > hosts/$h/says; sed s/NAME/$h/g flake > hosts/$h/flake.nix; done; rm flake")
    deploy = f"bash -c 'cd {place}; {PUBLISH} deploy'"
    column["Bento: first `deploy`"] = measure_command(deploy, rounds=1)
    column["Bento: `deploy` with nothing changed"] = measure_command(deploy, rounds=1)
    hub.succeed(f"echo more > {place}/hosts/{names[-1]}/says")
    column["Bento: `deploy` with one host changed"] = measure_command(deploy, rounds=1)
    column["Bento: `status`"] = measure_command(f"bash -c 'cd {place}; {PUBLISH} status'", rounds=1)


def memory():
    """What sessions take of the hub's memory, and what sshd takes without."""
    pss = "for p in $(pgrep '^sshd'); do awk '/^Pss:/ { print $2 }' /proc/$p/smaps_rollup 2> /dev/null || true; done | awk '{ s += $1 } END { print s }'"
    empty = int(hub.succeed(pss))
    plain.succeed("for i in $(seq 50); do (sleep 30 | sftp -b - -o BatchMode=yes fleet-h0001@hub > /dev/null 2>&1 &); done")
    hub.wait_until_succeeds("[ $(pgrep -f 'sshd.*fleet-h0001' | wc -l) -ge 80 ]", timeout=25)
    full = int(hub.succeed(pss))
    sessions = int(plain.succeed("pgrep -x sftp | wc -l"))
    print(f"\nsshd takes {empty / 1024:.1f} MiB, and {(full - empty) / 1024 / sessions:.1f} MiB for each of {sessions} sessions.", flush=True)



# bad days

def publish_bento(content, trouble="none"):
    """Changes the configuration of Bento's host and publishes it; returns what that said."""
    change(BENTO_FLEET, "plain", content, trouble)
    return bento_deploys()


def afresh():
    """A good release that is deployed and reported, some hours ago; returns what its system says."""
    content = next(COUNT)
    hub.succeed(f"rm -f {CHROOT}/plain/logs/* {BENTO_FLEET}/hosts/plain/noise")
    publish_bento(content)
    in_another_minute()
    bento_polls()
    assert shows(plain, "app") == str(content) and hub_says() == "up to date", hub_says()
    # by its name, or the next report would be of the same minute
    hub.succeed(f"cd {CHROOT}/plain/logs; for log in *; do mv $log 20000101-0000_${{log#*_}}; done")
    return content


def hub_says():
    """The state of Bento's host, as its hub shows it."""
    said = hub.succeed(f"cd {BENTO_FLEET}; {PUBLISH} status 2> /dev/null | grep '^ *plain '")
    return re.search("new machine|auto updated|extra logs|rebuild pending|sync pending|rollbacked|up to date|failing", said)[0]


def runs_now(old, new):
    return f"the host runs the {({str(old): 'old', str(new): 'new'}).get(shows(plain, 'app'), 'neither')} configuration, the hub says \"{hub_says()}\""


def next_poll(old, new):
    said = bento_polls()
    what = "nothing" if "no update required" in said else "an update" if "update required" in said else "an error"
    return f"next poll: {what}; {runs_now(old, new)}"


class Held:
    """Bento's client in the middle of a build."""

    def __enter__(self):
        plain.succeed("rm -f /tmp/held; touch /tmp/hold", "systemctl start --no-block bento-upgrade.service")
        plain.wait_for_file("/tmp/held")

    def __exit__(self, *_):
        plain.succeed("rm /tmp/hold")
        plain.wait_until_succeeds("systemctl show --property ActiveState --value bento-upgrade | grep -E '^(inactive|failed)$'")


def down_before():
    old, new = afresh(), next(COUNT)
    publish_bento(new)
    hub.succeed("systemctl stop sshd")
    said = bento_polls()
    first = "an error in the journal" if "network problem" in said else said
    hub.succeed("systemctl start sshd")
    return f"{first}; {next_poll(old, new)}"


def down_during():
    old, new = afresh(), next(COUNT)
    publish_bento(new)
    with Held():
        hub.succeed("systemctl stop sshd; pkill '^sshd' || true")
    first = runs_now(old, new)
    hub.succeed("systemctl start sshd")
    return f"{first}; hub back: {next_poll(old, new)}"


def undeliverable():
    old, new = afresh(), next(COUNT)
    publish_bento(new)
    hub.succeed(f"chown root {CHROOT}/plain/logs")
    bento_polls()
    hub.succeed(f"chown plain {CHROOT}/plain/logs")
    return f"{runs_now(old, new)}; hub takes reports again: {next_poll(old, new)}"


def cut_download(kill):
    old, new = afresh(), next(COUNT)
    hub.succeed(f"head -c 60000000 /dev/urandom > {BENTO_FLEET}/hosts/plain/noise")
    publish_bento(new)
    plain.succeed(f"systemctl start --no-block bento-upgrade.service; until [ -s /var/bento/noise ]; do :; done; {kill}")
    plain.wait_until_succeeds("systemctl show --property ActiveState --value bento-upgrade | grep -E '^(inactive|failed)$'")
    whole = plain.execute(f"[ $(stat -c %s /var/bento/noise) = 60000000 ]")[0] == 0
    return f"{'whole' if whole else 'in part'}; {runs_now(old, new)}; {next_poll(old, new)}"


def killed_publishing():
    old, new = afresh(), next(COUNT)
    # between two lines of Bento's: the files are there, the date is not
    write("/opt/killer/touch", "#!/bin/sh\ncase $1 in */last_change_date) kill -9 $PPID; exit ;; esac\nexec /usr/bin/touch \"$@\"\n")
    hub.succeed("chmod +x /opt/killer/touch")
    change(BENTO_FLEET, "plain", new)
    hub.execute(f"cd {BENTO_FLEET}; PATH=/opt/killer:$PATH {PUBLISH} deploy 2>&1")
    again = "no changes" if "no changes" in bento_deploys() else "published"
    return f"deploy again: {again}; {next_poll(old, new)}"


def twice_a_minute():
    afresh()
    first, second = next(COUNT), next(COUNT)
    hub.wait_until_succeeds("[ $(date +%-S) -lt 30 ]")
    publish_bento(first)
    minute = hub.succeed("date +%M")
    bento_polls()
    publish_bento(second)
    assert hub.succeed("date +%M") == minute
    said = next_poll(first, second)
    hub.wait_until_succeeds(f"[ $(date +%M) != {minute.strip()} ]")
    return f"{said}; a minute later, {next_poll(first, second)}"


def published_meanwhile():
    afresh()
    first, second = next(COUNT), next(COUNT)
    publish_bento(first)
    in_another_minute()
    with Held():
        publish_bento(second)
    return f"{runs_now(first, second)}; {next_poll(first, second)}"


def clock_behind():
    afresh()
    first, second = next(COUNT), next(COUNT)
    library = plain.succeed("ls /usr/lib/*/faketime/libfaketime.so.1").strip()
    write("/run/systemd/system/bento-upgrade.service.d/clock.conf", f"[Service]\nEnvironment=LD_PRELOAD={library} FAKETIME=-5h DONT_FAKE_MONOTONIC=1\n", plain)
    plain.succeed("systemctl daemon-reload")
    publish_bento(first)
    bento_polls()
    middle = shows(plain, "app") == str(first)
    minute = hub.succeed("date +%M")
    hub.wait_until_succeeds(f"[ $(date +%M) != {minute.strip()} ]")
    publish_bento(second)
    said = next_poll(first, second)
    plain.succeed("rm -r /run/systemd/system/bento-upgrade.service.d; systemctl daemon-reload")
    return f"first release {'deployed' if middle else 'not deployed'}; second release, {said}"


def troubled(trouble):
    old, new = afresh(), next(COUNT)
    said = publish_bento(new, trouble)
    published = "published" if "update required" in said else "not published"
    called = re.search(r"\b(success|failure) \(", said)
    bento_polls()
    why = hub.execute(f"cd {CHROOT}/plain/logs; zcat $(ls | tail -n 1) | grep -q trouble")[0] == 0
    return f"{published}, the build is called \"{called[1] if called else said}\"; {runs_now(old, new)}; its log says why: {'yes' if why else 'no'}; {next_poll(old, new)}"


def other_host_key():
    old, new = afresh(), next(COUNT)
    publish_bento(new)
    use_host_key(hub, "signer")
    refused = bento_polls()
    first = "refused" if "Host key verification failed" in refused else refused
    plain.succeed("rm /root/.ssh/known_hosts")
    second = next_poll(old, new)
    use_host_key(hub, "host-key")
    plain.succeed("rm /root/.ssh/known_hosts; ssh-keyscan hub >> /root/.ssh/known_hosts 2> /dev/null")
    return f"{first}; by a host that has never met the hub: {second}"


def replayed():
    old = afresh()
    hub.succeed(f"rm -rf /srv/kept; cp -a {CHROOT}/plain/config /srv/kept")
    new = afresh()
    hub.succeed(f"rsync -a --delete /srv/kept/ {CHROOT}/plain/config/; touch {CHROOT}/plain/last_change_date")
    said = next_poll(old, new)
    status = plain.execute("echo put /etc/hostname config/flake.nix | sftp -b - plain@hub > /dev/null 2>&1")[0]
    return f"{said} (old is the one served again); the host can change what is published for it: {'no' if status else 'yes'}"


def vanished():
    afresh()
    plain.crash()
    time.sleep(1)
    said = hub_says()
    plain.start()
    return f"the hub says \"{said}\""


def bad_days():
    """What Bento does on bad days."""
    if not BENTO:
        return say("BENTO names no directory with Bento's sources")
    days = {
        "hub down before": down_before,
        "hub down during the build": down_during,
        "report undeliverable": undeliverable,
        "connection breaks in mid-download": lambda: cut_download("pkill -x ssh"),
        "host killed in mid-download": lambda: cut_download("systemctl kill -s KILL bento-upgrade.service"),
        "killed in mid-publish": killed_publishing,
        "published twice within a minute": twice_a_minute,
        "published while the host builds": published_meanwhile,
        "clock of the host 5 hours behind": clock_behind,
        "does not build": lambda: troubled("build"),
        "does not run (activation fails)": lambda: troubled("activation"),
        "does not run (a unit fails)": lambda: troubled("unit"),
        "cuts the host off": lambda: troubled("network"),
        "another host key": other_host_key,
        "replayed": replayed,
        "host vanished": vanished,
    }
    rows = []
    for name, day in days.items():
        rows.append([name, day()])
        say(": ".join(rows[-1]))
    print_table(["day", "what Bento does"], *rows)


COUNT = itertools.count(1)
idle = {}
say("setting up")
set_up()
for part in PARTS:
    say(part)
    {"polls": polls, "hub": hub_part, "bad-days": bad_days}[part]()
