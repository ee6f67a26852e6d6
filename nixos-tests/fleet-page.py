# ruff: noqa: F821
import re

SERVED = "/var/lib/ekiben-hub"
PAGE = "/var/lib/ekiben-page/index.html"
METRICS = "/var/lib/node-exporter-fleet/fleet.prom"
EVIL = "</p><script>document.title='evil'</script><img src=x onerror=\"document.title='evil'\"> & so on 'till <b>the end</b>"


def release(host, number, expires):
    """Has the hub offer a release to a host."""
    manifest = {
        "format": 1, "host": host, "id": f"{number:064x}", "sequence": number, "sha256": "0" * 64, "size": 0, "attr": None,
        "toplevel": None, "published": NOW - 4000, "expires": expires, "commit": None, "author": EVIL, "summary": EVIL,
        "dirty": False,
    }
    write(hub, f"{SERVED}/hosts/{host}/release/manifest.json", json.dumps({"manifest": json.dumps(manifest), "signature": None}))


def beat(host, number, **changes):
    """Has a host send its heartbeat."""
    released = {"id": f"{number:064x}", "sequence": number}
    heartbeat = {
        "format": 1, "host": host, "version": EVIL, "seen": released, "deployed": released, "system": None,
        "running": None, "last": None, "runs": 1, "selfUpdated": False, "rebootNeeded": False, **changes,
    }
    write(hub, f"{SERVED}/hosts/{host}/reports/heartbeat.json", json.dumps(heartbeat))


start_all()
hub.wait_for_unit("multi-user.target")
hub.succeed(fleet("init"))
NOW = int(hub.succeed("date +%s"))
HOSTS = {
    "db": {"last": {"release": {"id": f"{2:064x}", "sequence": 2}, "result": "failed", "stage": "build", "error": EVIL, "finished": NOW - 600}},
    "plain": {"refused": "no trusted signature", "kernel": EVIL},
    "web": {"last": {"release": {"id": f"{2:064x}", "sequence": 2}, "result": "deployed", "stage": None, "error": None, "finished": NOW - 90}},
}
for name, told in HOSTS.items():
    release(name, 2, NOW + 86400)
    beat(name, 2, **told)
    write(hub, f"/srv/fleet/hosts/{name}/configuration.nix", "{ }")


with subtest("the unit that collects writes a page that shows what status shows, the gravest first"):
    hub.wait_until_succeeds(f"grep -q 'up to date' {PAGE} && grep -q refusing {PAGE} && grep -q failing {PAGE}", timeout=60)
    page = hub.succeed(f"cat {PAGE}")
    assert re.findall("<h[12]>(.*)</h[12]>", page) == ["3 hosts", "db", "plain", "web"], page
    assert re.findall('<li class="(.*)">(.*)</li>', page) == [("bad", "1 failing"), ("bad", "1 refusing"), ("well", "1 up to date")], page
    assert '<li><span class="faint">last run</span> 10 min ago</li>' in page and "no trusted signature" in page, page
    assert hub.succeed(f"ls -A $(dirname {PAGE})").split() == ["index.html"]

with subtest("what a host says of itself is text there, and cannot be anything else"):
    assert "<script" not in page and "<img" not in page and page.count("onerror") == page.count("onerror=&quot;") == 1, page
    assert "&lt;/p&gt;&lt;script&gt;" in page and "Content-Security-Policy" in page, page

with subtest("a validator finds nothing wrong with the page"):
    code, said = hub.execute(f"tidy -quiet -errors --show-body-only no {PAGE} 2>&1")
    assert (code, said) == (0, ""), said

with subtest("a publisher has the same page by a command, whose exit status is that of status"):
    code, said = hub.execute(fleet("status --html /srv/fleet/page.html web plain db"))
    assert (code, said) == (2, ""), (code, said)
    once, by_hub = hub.succeed("cat /srv/fleet/page.html"), hub.succeed(f"cat {PAGE}")
    times = "as of .*<|[0-9]+ (s|min) ago"
    assert re.sub(times, "", once) == re.sub(times, "", by_hub), (once, by_hub)

with subtest("a browser shows it, on a desk and on a phone, dark and light"):
    browser = "env HOME=/tmp chromium --headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --hide-scrollbars"
    for name, options in (("desk", "--window-size=1200,800"),
                          ("dark", "--window-size=1200,800 --force-dark-mode --blink-settings=preferredColorScheme=0"),
                          ("phone", "--window-size=500,900")):
        hub.succeed(f"timeout 120 {browser} {options} --screenshot=/tmp/fleet-page-{name}.png file://{PAGE} 2>&1")
        hub.copy_from_vm(f"/tmp/fleet-page-{name}.png")
    # it has run nothing
    dom = hub.succeed(f"timeout 120 {browser} --dump-dom file://{PAGE} 2> /dev/null")
    assert "<title>Fleet</title>" in dom and "<script" not in dom, dom

with subtest("Prometheus can read the metrics, and its alerts find what is wrong"):
    assert hub.succeed(f"promtool check metrics < {METRICS} 2>&1") == ""
    found = hub.succeed(f"cat {METRICS}")
    for line in (
        'ekiben_host_well{host="db"} 0', 'ekiben_host_well{host="web"} 1', 'ekiben_host_state{host="db",state="failing"} 1',
        'ekiben_host_state{host="plain",state="refusing"} 1', f'ekiben_host_last_run_timestamp_seconds{{host="web"}} {NOW - 90}',
        f'ekiben_host_release_expiry_timestamp_seconds{{host="web"}} {NOW + 86400}',
    ):
        assert line in found.splitlines(), (line, found)
    heard = int(re.findall(r'ekiben_host_heard_timestamp_seconds\{host="web"\} (\d+)', found)[0])
    assert NOW - 60 <= heard <= NOW + 300, (NOW, heard)
    manual = hub.succeed("cat /etc/scenario/manual")
    rules = next(part.split("\n```", 1)[0] for part in manual.split("```yaml\n")[1:] if part.startswith("groups:"))

    def summary(alert):
        text = rules.partition(f"alert: EkibenHost{alert}\n")[2].partition('summary: "')[2].partition('"')[0]
        return text.replace("{{ $labels.host }}", "web").replace("{{ $labels.state }}", "failing")

    def fires(text, **labels):
        return [{"exp_labels": labels, "exp_annotations": {"summary": text}}]

    host = {"instance": "hub:9100", "host": "web"}
    of_web = ", ".join(f'{label}="{value}"' for label, value in host.items())
    still = fires("the hub hub:9100 does not collect: see systemctl status ekiben-hub-collect", file=METRICS, instance="hub:9100")
    check_alerts(hub, rules, [
        ({f"ekiben_host_well{{{of_web}}}": "1+0x40 0+0x200", f'ekiben_host_state{{{of_web}, state="failing"}}': "1+0x240"},
         [("30m", "EkibenHostNotWell", []), ("1h", "EkibenHostNotWell", fires(summary("NotWell"), state="failing", **host))]),
        ({f"ekiben_host_release_expiry_timestamp_seconds{{{of_web}}}": "864000+0x20000"},
         [("24h", "EkibenHostExpires", []), ("200h", "EkibenHostExpires", fires(summary("Expires"), **host))]),
        ({f'node_textfile_mtime_seconds{{file="{METRICS}", instance="hub:9100"}}': "0+0x60"},
         [("10m", "EkibenHubStandsStill", []), ("20m", "EkibenHubStandsStill", still)]),
    ])

with subtest("who may only read is told that the hub does not collect, and is not told that all hosts are silent as if that were known"):
    seen = "cd /; ekiben fleet status db web 2>&1"
    old = f"touch -d '3 hours ago' {SERVED}/received/all.json {SERVED}/received/*/heartbeat.json"
    # or what it collects in this moment is not old
    hub.succeed("systemctl stop ekiben-hub-collect.timer ekiben-hub-collect.service")
    hub.succeed(f"mount --bind {SERVED}/received {SERVED}/received", f"{old}; mount -o remount,bind,ro {SERVED}/received")
    hub.succeed("systemctl start ekiben-hub-collect.timer")
    code, said = hub.execute(seen)
    assert code == 3 and said.startswith("the hub has collected nothing for 3 h: "), (code, said)
    code, said = hub.execute(fleet("status web"))
    assert code == 3 and said.startswith("Failed to collect all that hosts have sent: ") and "Read-only file system" in said, (code, said)
    hub.fail("systemctl start ekiben-hub-collect.service")
    assert "hub: ekiben-hub-collect.service has failed; see systemctl status" in hub.fail("ekiben status")
    hub.succeed(f"umount {SERVED}/received", "systemctl start ekiben-hub-collect.service ekiben-hub-files.service", "ekiben status")
    assert "collected" not in hub.execute(seen)[1]
