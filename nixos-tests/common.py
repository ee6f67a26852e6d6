# What the scripts of all scenarios share: a machine with a repository, and inputs to update.
# ruff: noqa
import difflib
import itertools
import json
import shlex

REPOSITORY = "/var/nixos-config"
PROFILE = "/nix/var/nix/profiles/system"
SWITCH_LOCK = "/run/nixos/switch-to-configuration.lock"
# lists the files of /etc/scenario that a machine's system is built from
SYSTEM_FILES = "cd /etc/scenario; ls -d system.nix switch-to-configuration systems 2> /dev/null || true"


def is_host(machine):
    """Whether this is a namespace host, and its NixOS a stand-in that boots what it deployed."""
    return machine.execute("test -e /etc/scenario/switch-to-configuration")[0] == 0


def some(machine, cases, count=2):
    """All cases on a host; the first few on a virtual machine, which takes half a minute for a run."""
    return cases if is_host(machine) else cases[:count]


def as_deploy(command):
    """The command line that runs `command` as the user that owns the repository."""
    return f"runuser -u deploy -- env HOME=/home/deploy bash -euc {shlex.quote(command)}"


def deploy(machine, command):
    """Runs a command as the user that owns the repository, in it."""
    return machine.succeed(as_deploy(f"cd {REPOSITORY}; {command}")).strip()


def publish(machine, name, content, trouble="none", variant="default"):
    """Gives the input `name` a new revision; returns that. `trouble` breaks the system that is built
    with it; `variant` is another configuration of the machine, by its name in the scenario."""
    write = "".join(f"echo {value} > {file}; " for file, value in (("content", content), ("trouble", trouble), ("variant", variant)))
    return machine.succeed(as_deploy(f"cd /srv/{name}; {write} git add .; git commit -qm {content}; git rev-parse HEAD")).strip()


def install(machine):
    """Makes the inputs and the repository, and has the machine run what the repository says."""
    machine.wait_for_unit("multi-user.target")
    machine.succeed(as_deploy("git config --global user.name Deploy; git config --global user.email deploy@localhost"))
    for name in ("app", "other"):
        machine.succeed(as_deploy(f"git init -qb main /srv/{name}"))
        publish(machine, name, "1")
    machine.succeed(as_deploy(f"git init -qb main {REPOSITORY}; cd /etc/scenario; "
                              f"cp -Lr flake.nix $({SYSTEM_FILES}) {REPOSITORY}; chmod -R u+w {REPOSITORY}"))
    deploy(machine, "git add .; nix flake lock; git add .; git commit -qm initial")
    rebuild(machine)


def rebuild(machine):
    """What an administrator does by hand, as `nixos-rebuild switch` would."""
    # 4: some unit failed, as one may in a test
    machine.succeed(f"{build_into_profile(machine)}/bin/switch-to-configuration switch || [ $? = 4 ]")


def build_into_profile(machine):
    """The first part of that; returns the system, which does not run yet."""
    target = f'{REPOSITORY}#nixosConfigurations.{machine.name}.config.system.build.toplevel'
    system = deploy(machine, f"nix build --no-link --print-out-paths {target}")
    machine.succeed(f"nix-env --profile {PROFILE} --set {system}")
    return system


def status(machine, instance):
    """What `ekiben status --json` says of an instance."""
    return json.loads(machine.succeed(f"ekiben status --json {instance}"))[instance]


def knows(instance, question):
    """The command that succeeds if jq answers a question about an instance's status with yes."""
    return f"ekiben status --json {instance} | jq -e {shlex.quote(f'.[] | {question}')}"


def last_run(machine, instance):
    """How the last run of an instance ended."""
    return status(machine, instance)["runs"][0]


def runs(machine, instance):
    """How many runs of an instance have ended."""
    return len(status(machine, instance)["runs"])


def wait_for_run(machine, instance, after):
    """Waits until more than `after` runs of an instance have ended, and none is under way; returns the last."""
    machine.wait_until_succeeds(knows(instance, f"(.runs | length) > {after} and .running == null and .queued == false"))
    wait_until_idle(machine, instance)
    return last_run(machine, instance)


def run(machine, instance):
    """Starts a run and waits for its end; returns how it ended."""
    # a switch that restarts systemd ends the connection of whoever waits
    machine.execute(f"systemctl start ekiben-{instance}.service")
    wait_until_idle(machine, instance)
    return last_run(machine, instance)


def follow(machine, instance):
    """Remembers where the instance's journal ends now, for `wait_until_said`."""
    unit = f"ekiben-{instance}"
    machine.succeed(f"rm -f /tmp/{unit}; journalctl -q -u {unit} -n 1 --cursor-file=/tmp/{unit} > /dev/null || true")


def wait_until_said(machine, instance, what):
    """Waits until the instance's journal has said something since `follow`."""
    unit = f"ekiben-{instance}"
    machine.wait_until_succeeds(
        f"journalctl -q -u {unit} -o cat $(test ! -s /tmp/{unit} || echo --after-cursor=$(cat /tmp/{unit})) | grep -F {shlex.quote(what)}"
    )


def hold(machine, *points):
    """Has runs stop at these fault points, until `go_on`."""
    machine.succeed(f"printf '%s\\n' {shlex.join(points)} > /run/ekiben-fault")


def go_on(machine, point):
    """Lets all runs go on from a fault point."""
    machine.succeed(f"echo {shlex.quote(f'go on: {point}')} >> /run/ekiben-fault")


def occupy(machine, lock):
    """Has somebody hold a lock until `systemctl stop holder`."""
    machine.succeed(f"systemd-run --unit=holder flock {lock} $(command -v sleep) infinity")
    machine.wait_until_fails(f"flock --nonblock {lock} true")


def is_idle(instance):
    """The command that succeeds if the instance's service, or another of ours by that name, does not run, nor is about to."""
    # a run that could not begin is tried again
    units = " ".join(f"ekiben-{kind}{instance}.service" for kind in ("due@", "found@", "retry@", ""))
    # what systemd says of all of them in one moment: which are neither inactive nor failed, or have a job
    return f"said=$(systemctl list-units --output=json {units}) && ! grep -qE '\"active\":\"[^if]|\"job\":\"[^\"]' <<< \"$said\""


def wait_until_idle(machine, instance):
    """Waits until the instance's service, or another of ours by that name, does not run."""
    machine.wait_until_succeeds(is_idle(instance))


def at_rest(instance):
    """The command that succeeds if an instance does nothing and has nothing to do."""
    # in this order: a run that ends may leave a request, which begins the next one
    return f"{is_idle(instance)} && test ! -e /var/lib/ekiben/queue/{instance} -a ! -e /var/lib/ekiben/runs/{instance}.json"


def wait_until_at_rest(machine, instance, timeout=900):
    """Waits until an instance does nothing and has nothing to do."""
    machine.wait_until_succeeds(at_rest(instance), timeout=timeout)


def look(machine, instance="fleet"):
    """Has a timer's look begin, and what comes of it end; returns the runs that began, the last one first."""
    known = {run["id"] for run in status(machine, instance)["runs"]}
    machine.execute(f"systemctl start ekiben-look@{instance}.service")
    wait_until_at_rest(machine, instance)
    wait_until_idle(machine, "deliver")
    machine.require_unit_state(f"ekiben-look@{instance}.service", "inactive")
    return [run for run in status(machine, instance)["runs"] if run["id"] not in known]


def use_host_key(machine, file):
    """Has a machine's sshd use the private key /etc/scenario/`file`."""
    machine.succeed(f"install -m 600 /etc/scenario/{file} /etc/ssh/ssh_host_ed25519_key", "systemctl restart sshd")


def head(machine):
    """The repository's current commit."""
    return deploy(machine, "git rev-parse HEAD")


def generation(machine):
    """Number and path of the current generation, as in "system-3-link /nix/store/..."."""
    return machine.succeed(f"echo $(readlink {PROFILE}) $(readlink -f {PROFILE})").strip()


def running(machine):
    """The path of the running system."""
    return machine.succeed("readlink -f /run/current-system").strip()


def shows(machine, name):
    """What the running system says of an input."""
    return machine.succeed(f"cat /etc/{name} || {{ namei -l /etc/{name}; exit 1; }}").strip()


# what must not change of a repository: every file and directory, with its time and permissions, and every ref; in git's
# directory, too, but for loose objects, which change nothing if nothing refers to them
MOST = "find . -path './.git/objects/??' -prune -o"
DIGEST = f"""
    {MOST} -type f -printf '%p %T@ %m\\n' | sort
    {MOST} -type f -print0 | sort -z | xargs -0 sha256sum
    {MOST} ! -type f -printf '%y %p %l\\n' | sort
    git for-each-ref
"""


def digest(machine):
    """All of the repository, to be compared with later."""
    return deploy(machine, DIGEST)


def what_stays(machine):
    """All that a run that does not succeed has to leave as it was."""
    parts = {
        "repository": as_deploy(f"cd {REPOSITORY}; {DIGEST}"),
        "generation": f"echo $(readlink {PROFILE}) $(readlink -f {PROFILE})",
        # nix's file of locks, where nix could not remove it, locks nothing
        "generations": "ls --ignore=system.lock /nix/var/nix/profiles",
        "running": "readlink -f /run/current-system",
        "shows": "cat /etc/app /etc/other /etc/revision",
    }
    said = machine.succeed("; printf '\\0'; ".join(parts.values())).split("\0")
    return dict(zip(parts, said))


def differences(before, after):
    """What is different between two states, line by line."""
    return [
        f"{key}: {line}"
        for key in before
        for line in difflib.unified_diff(before[key].splitlines(), after[key].splitlines(), lineterm="", n=0)
        if not line.startswith(("---", "+++", "@@"))
    ]


def check_deployed(machine, instance):
    """Checks that what the instance deployed last is there: branch, profile, running system and status agree."""
    deployed = status(machine, instance)["deployed"]
    branch = deploy(machine, "git rev-parse HEAD; git status --porcelain; git for-each-ref refs/ekiben")
    assert branch == deployed["commit"], (branch, deployed)
    state = f"systemctl show --property ActiveState --value ekiben-{instance}.service"
    seen = machine.succeed(f"{state}; readlink -f /run/current-system {PROFILE}; cat /etc/revision").split()
    assert seen == ["inactive", deployed["system"], deployed["system"], branch], (seen, deployed)


# tries what a unit of ours has no business to do, from inside of it
PROBE = r"""
import json, os, socket, subprocess, sys
could = []
def attempt(name, function):
    try:
        function()
        could.append(name)
    except (OSError, subprocess.CalledProcessError):
        pass
def write(directory):
    path = f"{directory}/.probe"
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    os.unlink(path)
def connect(family, address):
    with socket.socket(family) as s:
        s.settimeout(3)
        s.connect(address)
# every directory that is in sight, but for the many of the store and the like
for directory, names, _ in os.walk("/"):
    names[:] = [name for name in names if not os.path.join(directory, name).startswith(("/proc", "/nix/store/", "/nix/.", "/usr/", "/lib", "/sys/"))]
    attempt(f"write {directory}", lambda: write(directory))
for path in ("/etc/shadow", "/proc/1/environ", *sys.argv[1:]):
    attempt(f"read {path}", lambda: open(path, "rb").read(1))
attempt("reach itself", lambda: connect(socket.AF_INET, ("127.0.0.1", 22)))
attempt("reach D-Bus", lambda: connect(socket.AF_UNIX, "/run/dbus/system_bus_socket"))
attempt("reach systemd", lambda: connect(socket.AF_UNIX, "/run/systemd/private"))
attempt("start a unit", lambda: subprocess.run(["systemctl", "start", "systemd-tmpfiles-clean.timer"], check=True, capture_output=True))
attempt("be root", lambda: subprocess.run(["/opt/become", "--reuid=0", "true"], check=True, capture_output=True))
attempt("be another", lambda: os.setuid(1001))
attempt("chown", lambda: os.chown("/tmp", 1001, 1001))
attempt("mount", lambda: subprocess.run(["mount", "-t", "tmpfs", "none", "/tmp"], check=True, capture_output=True))
attempt("make a device", lambda: os.mknod("/tmp/disk", 0o60600, os.makedev(8, 0)))
attempt("make a program that is root's for all", lambda: os.chmod(os.open("/tmp/suid", os.O_CREAT), 0o4755))
"""


def check_alerts(machine, rules, cases):
    """Checks rules of Prometheus by series and their values, and, of moments and alerts, what fires then."""
    tests = [
        {
            "interval": "1m",
            "input_series": [{"series": series, "values": values} for series, values in given.items()],
            "alert_rule_test": [{"eval_time": at, "alertname": alert, "exp_alerts": fires} for at, alert, fires in expected],
        }
        for given, expected in cases
    ]
    tests = json.dumps({"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": tests})
    machine.succeed(f"mkdir /run/rules; printf %s {shlex.quote(tests)} > /run/rules/tests.yml; printf '%s\n' {shlex.quote(rules)} > /run/rules/rules.yml",
                    "cd /run/rules; promtool check rules rules.yml")
    code, said = machine.execute("cd /run/rules; promtool test rules tests.yml 2>&1")
    assert code == 0, said


def take_over(machine, unit, reads, more=""):
    """What a stand-in for a unit's program could do, from inside the unit, among it to read `reads`."""
    probe = PROBE + more + 'print("could " + json.dumps(could))'
    python = machine.succeed("readlink -f $(command -v python3)").strip()
    machine.succeed(
        # what gives root to whoever runs it, unless that is prevented
        "mkdir -p /opt; cp $(readlink -f $(command -v setpriv)) /opt/become; chmod 4755 /opt/become; "
        "runuser -u nobody -- /opt/become --reuid=0 true",
        f"mkdir -p /srv /run/systemd/system/{unit}.service.d; printf %s {shlex.quote(probe)} > /srv/probe.py; chmod 644 /srv/probe.py",
        f"printf '%s\n' [Service] ExecStart= 'ExecStart={python} /srv/probe.py {' '.join(reads)}' > /run/systemd/system/{unit}.service.d/probe.conf",
        f"systemctl daemon-reload; systemctl start {unit}.service",
        "journalctl --sync", f"rm -r /run/systemd/system/{unit}.service.d; systemctl daemon-reload",
    )
    said = machine.succeed(f"journalctl -q -u {unit} -o cat | grep '^could ' | tail -n 1")
    return set(json.loads(said.removeprefix("could ")))


# a fleet, published from /srv/fleet on its hub by the user deploy
COUNT_OF_CHANGES = itertools.count(1)
NIXPKGS = "/etc/scenario/nixpkgs"


def fleet(arguments, prefix=""):
    """The command line for `ekiben fleet` on the hub, by whoever publishes."""
    return as_deploy(f"cd /srv/fleet; export NIX_PATH=nixpkgs={NIXPKGS}; {prefix} ekiben fleet {arguments} 2>&1")


def states(hub):
    """The state of each host, as the hub sees it."""
    return {name: shown["state"] for name, shown in json.loads(hub.execute(fleet("status --json"))[1]).items()}


def becomes(hub, name, state):
    """Waits until the hub says this of a host: what the host tells comes a moment after the end of its run."""
    question = f'.["{name}"].state == "{state}"'
    hub.wait_until_succeeds(fleet(f"status --json {name} | jq -e {shlex.quote(question)}"))


def write(hub, path, text):
    """Writes a file of whoever publishes."""
    hub.succeed(as_deploy(f"mkdir -p $(dirname {path}); printf %s {shlex.quote(text)} > {path}"))


def change_hosts(hub, directory, trouble="none"):
    """Changes the configuration of the hosts of a directory; returns what their systems say then."""
    content = str(next(COUNT_OF_CHANGES))
    write(hub, f"/srv/fleet/hosts/{directory}/app/content", content)
    write(hub, f"/srv/fleet/hosts/{directory}/app/trouble", trouble)
    return content


def system(name):
    """The Nix expression of the system of a host, by files beside it: see system.nix."""
    return f'import ./{name}/system.nix {{ name = "{name}"; app = ./app; other = ./app; revision = "none"; }}'


def poll(machine):
    """Has a host ask its hub; returns how the run ended, when the hub has been told."""
    ended = run(machine, "fleet")
    wait_until_idle(machine, "deliver")
    return ended


def found_fleet(hub, directories):
    """Makes the fleet's repository with all that hosts' systems are built from, in a directory for
    each host, and has the hosts run a system of which the hub does not know; returns the settings."""
    for machine in (hub, *directories):
        machine.wait_for_unit("multi-user.target")
        machine.wait_until_succeeds(as_deploy("nix-store --version; nix store ping 2>&1 || nix store info"))
    use_host_key(hub, "host-key")
    hub.succeed("install -m 600 -o deploy /etc/scenario/signer /home/deploy/signer")
    hub.succeed(fleet("init"))
    settings = json.loads(hub.succeed("cat /srv/fleet/fleet.json")) | {"signingKey": "/home/deploy/signer"}
    write(hub, "/srv/fleet/fleet.json", json.dumps(settings))
    for machine, directory in directories.items():
        name = machine.name
        machine.succeed("install -m 600 /etc/scenario/identity /root/identity")
        pack = machine.succeed(f"cd /etc/scenario; tar -chz $({SYSTEM_FILES}) | base64 -w0").strip()
        place = f"/srv/fleet/hosts/{directory}/{name}"
        hub.succeed(as_deploy(f"mkdir -p {place}; base64 -d <<< {pack} | tar -C {place} -xz"))
        change_hosts(hub, directory)
        first = "readlink -f /run/current-system"
        if is_host(machine):
            # it has none yet
            machine.succeed(f"mkdir -p /tmp/first/app; cd /etc/scenario; cp -r $({SYSTEM_FILES}) /tmp/first; "
                            "echo 0 > /tmp/first/app/content")
            expression = (f'(import /tmp/first/system.nix {{ name = "{name}"; app = /tmp/first/app; other = /tmp/first/app; revision = "first"; }})'
                          ".config.system.build.toplevel")
            first = f"nix build --impure --no-link --print-out-paths --expr {shlex.quote(expression)}"
        machine.succeed(f"nix-env --profile {PROFILE} --set $({first})", f"{PROFILE}/bin/switch-to-configuration switch")
    return settings
