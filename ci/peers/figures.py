# Measures Ekiben's webhook and two peers, one after the other at the same address of the same host, and
# prints the tables of ci/README.md. ci/bench runs it on the hosts of the scenario `attacks`.
#
# The peers check the same token and ask for the same run by the same file. They sync nothing and are in no
# sandbox. The attacks, and the client that has to be served meanwhile, are those of the scenario.
# ruff: noqa
import ast
import re
import statistics
import sys
import time
from pathlib import Path

# by unit
LISTENERS = {"ekiben-webhook": "Ekiben", "http-server": "Python's `http.server`", "adnanh-webhook": "adnanh/webhook"}
PLAIN = "ekiben-plain"
REQUEST = "/var/lib/ekiben/queue/app"
MEASURE = "python3 /usr/local/lib/bench/measure.py"
AB = "ab -q -n 2000 -c 16 -m POST -H 'Authorization: Bearer token-app-0123456789' http://127.0.0.1:8787/ekiben"
# in turn, for what else the machine may do meanwhile
ROUNDS = 5
# how to show them, and which of several is the one
COSTS = {
    "memory, idle": ("{:.2f} MiB", max),
    "POST to answer (Ekiben's: on disk by then), p50 / p99": ("{:.2f} / {:.2f} ms", min),
    "the same when a run is asked for already": ("{:.2f} / {:.2f} ms", min),
    "requests per second meanwhile, 16 at a time, a connection each": ("{:.0f}", max),
    "memory, at most, under that load": ("{:.2f} MiB", max),
    "POST to first line of the run, p50 / p99": ("{:.0f} / {:.0f} ms", min),
    "start of its unit to first answer, p50": ("{:.0f} ms", min),
    "the same without a sandbox": ("{:.0f} ms", min),
}
# requests of the good client during an attack, one a second
ASKED = 6
PATIENCE = 30
MIB = 1024 * 1024

scenario = {
    node.targets[0].id: ast.literal_eval(node.value)
    for node in ast.parse(Path("nixos-tests/attacks.py").read_text()).body
    if isinstance(node, ast.Assign) and node.targets[0].id in ("ATTACKS", "CLIENT", "ALL")
}
ATTACKS = (*scenario["ALL"], "idle:5000", "half_open:1", " ".join(("idle:500", *scenario["ALL"])))
NAMES = {
    "idle:200": "200 silent connections",
    "idle:5000": "5000 silent connections",
    "half_open:1": "500 connections a second that are never finished",
    ATTACKS[-1]: "everything at once",
}


def say(text):
    print(text, file=sys.stderr, flush=True)


def take_over(unit):
    """Has this unit, freshly started, listen at the address, and no other."""
    server.succeed(f"systemctl stop {' '.join((*LISTENERS, PLAIN))} ekiben-webhook.socket {PLAIN}.socket; rm -f {REQUEST}; systemctl start {unit}")
    server.wait_for_open_port(8787)


def process(unit):
    return server.get_unit_property(f"{unit}.service", "MainPID")


def memory(unit, which):
    """VmRSS or VmHWM of the unit's main process, in MiB; 0 if it is gone."""
    return int(server.succeed(f"awk '/{which}/ {{ print $2 }}' /proc/{process(unit)}/status || echo 0")) / 1024


def measure(what, count, *rest):
    lines = server.succeed(f"{MEASURE} {what} {count} {' '.join(rest)}").split()
    return sorted(map(float, lines))


def percentiles(times):
    return statistics.median(times), times[len(times) * 99 // 100]


def needs(package):
    """The Debian packages that one needs, itself among them."""
    options = "--recurse --installed --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces --no-enhances"
    return set(server.succeed(f"apt-cache depends {options} {package} | grep '^[a-z]'").split())


def on_disk():
    """Size and number of packages, of each."""
    python = needs("python3") - needs("dpkg")
    kib = sum(map(int, server.succeed(f"dpkg-query -W -f '${{Installed-Size}}\\n' {' '.join(python)}").split()))
    go = Path(f"/proc/{server.init}/root/usr/bin/webhook").read_bytes()
    modules = {*re.findall(rb"webhook/vendor/(github\.com/[\w-]+/[\w-]+|[a-z.]+\.\w+/(?:x/)?\w+)", go), b"itself"}
    crates = re.findall(r"^name = ", Path("Cargo.lock").read_text(), re.M)
    size = {"ekiben": 0, "webhook": 0}
    for name in size:
        size[name] = int(server.succeed(f"stat -c %s /usr/bin/{name}")) / MIB
    sizes = [f"{size['ekiben']:.2f} MiB", f"{kib / 1024:.0f} MiB", f"{size['webhook']:.1f} MiB"]
    return sizes, [f"{len(crates)} crates", f"{len(python)} Debian packages", f"{len(modules)} Go modules"]


def figures(unit):
    """What one costs, by row of COSTS."""
    say(f"measuring {unit}")
    server.succeed("systemctl stop ekiben-app.path")
    take_over(unit)
    yield memory(unit, "VmRSS")
    measure("answers", 20)
    for what in ("answers", "answers-when-queued"):
        yield percentiles(measure(what, 500))
    report = server.succeed(AB)
    assert re.search(r"Failed requests: +0\n", report) and "Non-2xx" not in report, report
    yield float(re.search(r"Requests per second: +([0-9.]+)", report)[1])
    yield memory(unit, "VmHWM")
    server.succeed(f"rm -f {REQUEST}; systemctl start ekiben-app.path")
    yield percentiles(measure("first-lines", 50))
    server.succeed("systemctl stop ekiben-app.path")
    for started in (unit, PLAIN if unit == "ekiben-webhook" else unit):
        take_over(started)
        yield statistics.median(measure("starts", 5, started))


def costs():
    """The cells of COSTS: of each listener the best of some rounds."""
    rounds = {unit: [] for unit in LISTENERS}
    for _ in range(ROUNDS):
        for unit in LISTENERS:
            rounds[unit].append(list(figures(unit)))
    rows = {}
    for number, (name, (form, best)) in enumerate(COSTS.items()):
        cells = [[figure[number] for figure in rounds[unit]] for unit in LISTENERS]
        rows[name] = [form.format(*map(best, zip(*cell))) if isinstance(cell[0], tuple) else form.format(best(cell)) for cell in cells]
    return rows


def attacked(unit, attack):
    """How a listener fares under an attack, in words."""
    take_over(unit)
    client.succeed("python3 /tmp/client.py 5 0")
    before, idle = process(unit), memory(unit, "VmRSS")
    attacker.succeed(f"timeout 200 python3 /tmp/attack.py 200 {attack} > /dev/null 2>&1 & echo $! > /tmp/attack.pid")
    lines = [line.split() for line in client.succeed(f"python3 /tmp/client.py {ASKED} 1").splitlines()]
    attacker.succeed("kill $(cat /tmp/attack.pid)")
    over = time.monotonic()
    try:
        client.wait_until_succeeds("python3 /tmp/client.py 1 0 | grep -q 202", timeout=PATIENCE)
        wedged = time.monotonic() - over
    except Exception:
        wedged = None
    peak = memory(unit, "VmHWM")
    took = [float(took) for took, status in lines if status == "202"]
    say(f"{unit}: {attack}: {lines}, {wedged}, {peak:.1f} MiB")
    if process(unit) != before:
        return "dead"
    words = "answers on" if len(took) == ASKED else f"answers {len(took)} of {ASKED}"
    if took and max(took) > 1000:
        words += f", after up to {max(took) / 1000:.1f} s"
    if wedged is None:
        words += f", wedged for more than {PATIENCE} s"
    elif wedged > 1:
        words += f", wedged for {wedged:.0f} s more"
    return words + (f", grows to {peak:.0f} MiB" if peak > idle + 16 else "")


def print_table(head, rows):
    print(f"\n| {head} | {' | '.join(LISTENERS.values())} |\n|{' --- |' * (1 + len(LISTENERS))}")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


start_all()
server.wait_for_unit("multi-user.target")
server.copy_from_host("ci/peers/host", "/")
server.succeed("systemctl daemon-reload")
attacker.succeed(f"printf %s {shlex.quote(scenario['ATTACKS'])} > /tmp/attack.py")
client.succeed(f"printf %s {shlex.quote(scenario['CLIENT'])} > /tmp/client.py")

rows = costs()
rows["size on disk"], rows["packages it is made of"] = on_disk()
print_table("cost", rows)

outcomes = {NAMES.get(attack, attack.partition(":")[0].replace("_", " ")): [attacked(unit, attack) for unit in LISTENERS] for attack in ATTACKS}
unmoved = [name for name, cells in outcomes.items() if set(cells) == {"answers on"}]
shown = {name: cells for name, cells in outcomes.items() if name not in unmoved}
print_table("attack", {**shown, f"{len(unmoved)} others": ["answers on"] * len(LISTENERS)})
say(f"the others: {', '.join(unmoved)}")
