# ruff: noqa: F821
import contextlib
import re
import textwrap
import time

start_all()
HUB = "/var/lib/ekiben-hub"
FLAKE = '{ outputs = { self }: { nixosConfigurations.NAME = import ./system.nix { name = "NAME"; app = ./app; other = ./app; revision = "none"; }; }; }'
COUNT = itertools.count(1)
# root's own is not for others to look into
PATH = "PATH=/run/current-system/sw/bin:/usr/bin:/bin"
PLACES = "etc/ekiben/config.json etc/systemd/system/ekiben-*.service"


def by(user, command):
    """The command line that runs `command` as a user of the desk, in a repository of their own."""
    return f"runuser -u {user} -- env HOME=/home/{user} USER={user} {PATH} bash -euc {shlex.quote(f'cd ~/fleet; {command}')} 2>&1"


def fleet_of(arguments, user="deploy"):
    return by(user, f"ekiben fleet {arguments}")


def deploys(arguments="", user="deploy"):
    """Publishes; returns what is said of that."""
    said = desk.succeed(fleet_of(f"deploy {arguments}", user))
    assert "published" in said, said
    return said


def change(name="web", user="deploy"):
    """Changes the configuration of a host; returns what its system says then."""
    content = str(next(COUNT))
    desk.succeed(by(user, f"echo {content} > hosts/{name}/app/content"))
    return content


def configure(directory, user="deploy", /, **options):
    """Gives a host's configuration these options of services.ekiben.fleet, as the module would."""
    script = []
    if "name" in options:
        script.append(f'.name = "{options["name"]}" | .servers |= map(.user = "fleet-{options["name"]}")')
    if "signers" in options:
        script.append(f".signers = {json.dumps(options['signers'])}")
    if "hub" in options:
        hubs = options["hub"] if isinstance(options["hub"], list) else [options["hub"]]
        servers = [{"port": 22, "user": f"fleet-{options.get('name', directory)}", **hub} for hub in hubs]
        script.append(f".servers = {json.dumps(servers)}")
    place = f"hosts/{directory}/systems/default/etc"
    change = f".instances.fleet |= (.hub |= ({' | '.join(script) or '.'}) | .flakeRef = .flakePath + \"#\" + .hub.name)"
    desk.succeed(by(user, f"jq {shlex.quote(change)} {place}/ekiben/config.json > new; mv new {place}/ekiben/config.json"))
    if "identityFile" in options:
        desk.succeed(by(user, f"sed -i 's#identity:/.*#identity:{options['identityFile']}#' {place}/systemd/system/ekiben-*.service"))


def hub_has(publishers=None, **hosts):
    """Has the hub be of these hosts with these keys, and these publishers, as a switch of its system would."""
    hub.succeed("rm -f /etc/ssh/authorized_keys.d/fleet-*")
    for name, keys in hosts.items():
        lines = "".join(f"restrict {key}\n" for key in keys)
        hub.succeed(f"printf %s {shlex.quote(lines)} > /etc/ssh/authorized_keys.d/fleet-{name}; "
                    f"systemd-tmpfiles --create --prefix={HUB}/hosts/{name}; "
                    f"systemctl start 'var-lib-ekiben\\x2dhub-hosts-{name}-reports.mount'")
    if publishers is not None:
        hub.succeed(f"printf 'restrict %s\\n' {shlex.join(publishers)} > /etc/ssh/authorized_keys.d/ekiben-publisher")
    config = {"hub": {"directory": HUB, "files": {name: {} for name in hosts}}}
    hub.succeed(f"rm -rf /etc/ekiben; mkdir /etc/ekiben; printf %s {shlex.quote(json.dumps(config))} > /etc/ekiben/config.json; "
                "systemctl start ekiben-hub-files")


def poll():
    """Has the host ask its hub; returns how the run ended, when the hub has been told."""
    result = run(web, "fleet")
    wait_until_idle(web, "deliver")
    return result


def becomes(state, name="web", user="deploy"):
    question = f'.["{name}"].state == "{state}"'
    desk.wait_until_succeeds(fleet_of(f"status --json {name} | jq -e {shlex.quote(question)}", user), timeout=60)


def follows(content, name="web", user="deploy"):
    """Checks that the host deploys what is published, that this says `content`, and that publishers see it."""
    result = poll()
    assert result["result"] in ("deployed", "unchanged"), result
    assert shows(web, "app") == content
    becomes("up to date", name, user)


def status_says(user="deploy"):
    """The exit status, and what a person is told."""
    return desk.execute(fleet_of("status --once", user))


def blocks(text, indent):
    """The paragraphs of a text that are indented so: commands, or Nix."""
    return [textwrap.dedent(part) for part in text.split("\n\n") if re.match(f" {{{indent}}}[^ ]", part)]


def evaluated(nix):
    """What Nix makes of a part of a configuration."""
    return json.loads(desk.succeed(by("deploy", f"nix-instantiate --eval --json --strict --expr {shlex.quote('{ ' + nix + ' }')}")))


MANUAL = (globals()["PROJECT"] / "src/fleet/README.md").read_text().split("## Days of an administrator\n")[1].split("\n## ")[0]


def typed(start, user="deploy", /, **words):
    """A command of the manual's chapter, by what it begins with, with other words for some."""
    command = re.search(f"`({re.escape(start)}[^`]*)`", MANUAL)[1]
    for word, other in words.items():
        command = command.replace(word, other)
    return by(user, command)


def public(machine, file):
    return machine.succeed(f"install -m 600 {file} /tmp/private; ssh-keygen -y -f /tmp/private").strip()


for machine in (desk, hub, web):
    machine.wait_for_unit("multi-user.target")
use_host_key(hub, "host-key")
hub.succeed(f"umount {HUB}/hosts/*/reports; rm -r {HUB}/hosts/shop {HUB}/hosts/web")
hub_has(publishers=[])
for user in ("deploy", "alice"):
    desk.succeed(f"install -d -o {user} /home/{user}/fleet; install -d -m 700 -o {user} /home/{user}/.ssh; "
                 f"install -m 600 -o {user} /etc/scenario/{user} /home/{user}/.ssh/id_ed25519")

with subtest("a newcomer goes on from what init has written, to the first host that follows"):
    said = desk.succeed(fleet_of("init"))
    assert said.endswith("README.md says how to go on to the first host.\n"), said
    page = desk.succeed(by("deploy", "cat README.md"))
    (make_signer, _, is_hub) = blocks(page, 7)
    desk.succeed(by("deploy", make_signer))
    settings = json.loads("{" + ",".join(re.findall(r'`("[a-zA-Z]+": "[^"]+")`', page)).replace("hub.example.org", "hub") + "}")
    assert set(settings) == {"signingKey", "directory"}, settings
    desk.succeed(by("deploy", f"jq {shlex.quote('. + ' + json.dumps(settings))} fleet.json > new; mv new fleet.json"))
    assert list(evaluated(is_hub)["services"]["ekiben"]["hub"]) == ["enable", "publishers"]
    hub_has(publishers=[public(desk, "/etc/scenario/deploy")])
    assert "Host key verification failed" in desk.fail(fleet_of("status --once"))
    for user in ("deploy", "alice"):
        desk.succeed(by(user, "ssh-keyscan -t ed25519 hub web > ~/.ssh/known_hosts"))
    # what there was when reports were last collected is what it says
    desk.wait_until_succeeds(fleet_of("status --once | grep -Fx 'no hosts: see ekiben fleet bootstrap'"))
    assert status_says()[0] == 0

    said = desk.succeed(typed("ekiben fleet bootstrap", laptop="web"))
    assert max(len(line) for line in said.splitlines() if "ssh-ed25519 AAAA" not in line) <= 80, said
    on_host, on_hub, in_repository, publishing, following = re.split(r"^\d\. ", said, flags=re.M)[1:]
    identity = web.succeed(*blocks(on_host, 2)).split("\n")[-2]
    hosts = evaluated(blocks(on_hub, 2)[0].replace("ssh-ed25519 ...", identity))["services"]["ekiben"]["hub"]["hosts"]
    hub.succeed("systemctl stop ekiben-hub-collect.timer")
    hub_has(**{name: [host["publicKey"]] for name, host in hosts.items()})
    options = evaluated(blocks(in_repository, 2)[0].strip()[1:-1])["services"]["ekiben"]["fleet"]
    assert options["hub"] == {"host": "hub", "hostKey": " ".join(public(hub, "/etc/scenario/host-key").split()[:2])}, options
    assert options["signers"] == [" ".join(public(desk, "/home/deploy/.ssh/ekiben-signer").split()[:2])], options
    pack = web.succeed(f"cd /etc/scenario; tar -chz $({SYSTEM_FILES}) | base64 -w0").strip()
    desk.succeed(by("deploy", f"mkdir -p hosts/web/app; base64 -d <<< {pack} | tar -C hosts/web -xz; chmod -R u+w hosts; "
                              f"echo {shlex.quote(FLAKE.replace('NAME', 'web'))} > hosts/web/flake.nix"))
    content = change()
    configure("web", **options)
    # before the hub has heard of it, too
    code, said = status_says()
    assert code == 0 and said.startswith("1 host: 1 not deployed\n"), said
    hub.succeed("systemctl start ekiben-hub-collect.timer")
    over_ssh, by_hand = blocks(publishing, 2)
    desk.succeed(by("deploy", over_ssh))
    assert shows(web, "app") == content and by_hand.strip() == "nixos-rebuild switch --flake .#web"
    code, said = status_says()
    assert code == 0 and said.startswith("1 host: 1 new machine\n"), said
    assert "The run ended: deployed.\n" in web.succeed(*blocks(following, 2))
    becomes("up to date")
    # what needs no flake
    desk.succeed(by("deploy", "mkdir hosts/plain; touch hosts/plain/configuration.nix"))
    said = desk.succeed(fleet_of("bootstrap plain"))
    desk.succeed(by("deploy", "rm -r hosts/plain"))
    assert "imports = [ ./fleet.nix ];" in said and "nixos-rebuild switch -I nixos-config=$PWD/configuration.nix" in said and "flake" not in said, said

with subtest("a host's key is rotated, without a gap"):
    web.succeed('ssh-keygen -q -t ed25519 -N "" -C web -f /root/ekiben-identity-2')
    new = web.succeed("cat /root/ekiben-identity-2.pub").strip()
    hub_has(web=[identity, new])
    configure("web", identityFile="/root/ekiben-identity-2")
    content = change()
    deploys()
    follows(content)
    hub_has(web=[new])
    content = change()
    deploys()
    follows(content)
    web.succeed("rm /root/ekiben-identity")

with subtest("a release whose key, name or signers would cut the host off from the hub is not kept, and the next one comes"):
    web.succeed('ssh-keygen -q -t ed25519 -N "" -f /root/ekiben-identity-unknown')
    good = desk.succeed(by("deploy", "cp -a hosts/web/systems/default/etc /tmp/good; cat hosts/web/systems/default/etc/ekiben/config.json"))
    there = json.loads(good)["instances"]["fleet"]["hub"]["servers"][0]
    for options, words in (
        ({"identityFile": "/root/ekiben-identity-unknown"}, "Permission denied"),
        ({"identityFile": "/root/nowhere"}, "`services.ekiben.fleet.identityFile` is missing or empty"),
        ({"name": "other", "hub": there}, 'it is for host "web", this is other'),
        ({"signers": [new]}, "signed by none of `signers`"),
    ):
        before = running(web)
        configure("web", **options)
        change()
        deploys()
        result = poll()
        assert result["result"] == "rolledBack" and "health check hub" in result["error"], (options, result)
        desk.wait_until_succeeds(fleet_of(f"log web {result['id']} | grep -F {shlex.quote(words)}"))
        assert running(web) == before, options
        desk.succeed(by("deploy", "rm -r hosts/web/systems/default/etc; cp -a /tmp/good hosts/web/systems/default/etc"))
    # an older Ekiben has no unit for that
    for change_of_units in ("rm {}/ekiben-reach@.service", "cp -a /tmp/good/systemd/system/ekiben-reach@.service {}"):
        desk.succeed(by("deploy", change_of_units.format("hosts/web/systems/default/etc/systemd/system")))
        content = change()
        deploys()
        follows(content)

with subtest("a host is installed again, with a new key"):
    web.succeed("rm -r /var/lib/ekiben/* /root/ekiben-identity-2; systemd-tmpfiles --create; systemctl restart ekiben-fleet.path")
    result = poll()
    assert "identityFile` is missing or empty" in result["error"], result
    web.succeed('ssh-keygen -q -t ed25519 -N "" -C web -f /root/ekiben-identity-2')
    result = poll()
    assert "Permission denied" in result["error"], result
    identity = web.succeed("cat /root/ekiben-identity-2.pub").strip()
    hub_has(web=[identity])
    # what runs knows nothing of a release; there need be none that is newer
    follows(content)

with subtest("the hub has another address, and another key"):
    old, new = (" ".join(public(hub, f"/etc/scenario/{file}").split()[:2]) for file in ("host-key", "other"))
    address = hub.succeed("hostname -I").split()[0]
    for machine in (desk, web):
        machine.succeed(f"echo {address} new-hub >> /etc/hosts")
    configure("web", hub=[{"host": "hub", "hostKey": old}, {"host": "new-hub", "hostKey": new}])
    content = change()
    deploys()
    follows(content)
    use_host_key(hub, "other")
    for machine in (desk, web):
        machine.succeed("sed -i 's/ hub$/ gone/' /etc/hosts")
    assert "Could not resolve hostname hub" in desk.fail(fleet_of("deploy"))
    # the publishers' part of it
    for user in ("deploy", "alice"):
        desk.succeed(by(user, "ssh-keyscan -t ed25519 new-hub web > ~/.ssh/known_hosts"))
    desk.succeed(by("deploy", "jq '.directory = \"sftp://ekiben-publisher@new-hub\"' fleet.json > new; mv new fleet.json"))
    configure("web", hub={"host": "new-hub", "hostKey": new})
    content = change()
    deploys()
    follows(content)

with subtest("a publisher's laptop is lost: another signer goes on, and what the thief publishes counts for nothing any more"):
    desk.succeed(by("alice", "ssh-keygen -q -t ed25519 -N '' -C alice -f ~/.ssh/ekiben-signer"))
    signers = {user: " ".join(public(desk, f"/home/{user}/.ssh/ekiben-signer").split()[:2]) for user in ("deploy", "alice")}
    publishers = {user: public(desk, f"/etc/scenario/{user}") for user in ("deploy", "alice")}
    hub_has(publishers=list(publishers.values()), web=[identity])
    configure("web", signers=list(signers.values()))
    content = change()
    deploys()
    follows(content)
    # a clone of the repository, which says whose home the key is in
    desk.succeed("rm -rf /home/alice/fleet; cp -r /home/deploy/fleet /home/alice; chown -R alice /home/alice/fleet")
    # the thief is faster
    evil = change()
    deploys()
    hub_has(publishers=[publishers["alice"]], web=[identity])
    assert "Permission denied" in desk.fail(fleet_of("deploy"))
    configure("web", "alice", signers=[signers["alice"]])
    content = change(user="alice")
    deploys(user="alice")
    follows(content, user="alice")
    assert status_says("alice")[0] == 0
    # by a copy of what the hub serves, or as whoever has taken that over
    hub_has(publishers=list(publishers.values()), web=[identity])
    change(user="deploy")
    deploys()
    hub_has(publishers=[publishers["alice"]], web=[identity])
    assert "signed by none of `signers`" in poll()["error"]
    becomes("refusing", user="alice")
    code, said = status_says("alice")
    assert code == 2 and "signed by none of `signers`" in said, said
    content = change(user="alice")
    deploys(user="alice")
    follows(content, user="alice")

with subtest("a host is renamed"):
    shop = web.succeed('ssh-keygen -q -t ed25519 -N "" -C shop -f /root/ekiben-identity-shop; cat /root/ekiben-identity-shop.pub').strip()
    hub_has(web=[identity], shop=[shop])
    desk.succeed(by("alice", f"mv hosts/web hosts/shop; echo {shlex.quote(FLAKE.replace('NAME', 'shop'))} > hosts/shop/flake.nix"))
    configure("shop", "alice", name="shop", identityFile="/root/ekiben-identity-shop")
    content = change("shop", "alice")
    deploys("shop", user="alice")
    code, said = status_says("alice")
    assert code == 4 and said.startswith("2 hosts: 1 not in repository; 1 new machine\n"), said
    desk.succeed(typed("ekiben fleet build switch <new>", "alice", **{"<new>": "shop", "<address>": "web"}))
    follows(content, "shop", "alice")

with subtest("a host is removed: said, and cleaned up after a while"):
    hub_has(shop=[shop])
    code, said = status_says("alice")
    assert code == 0 and "2 hosts: 1 up to date; 1 removed\n" in said and "what the hub has of it is removed on " in said, said
    content = change("shop", "alice")
    deploys(user="alice")
    follows(content, "shop", "alice")
    hub.succeed(f"echo '{{\"web\": 1000}}' > {HUB}/hosts/removed.json; systemctl start ekiben-hub-files; "
                "systemctl start ekiben-hub-collect")
    code, said = status_says("alice")
    assert code == 0 and said.startswith("1 host: 1 up to date\n") and hub.succeed(f"cd {HUB}/received; ls -d */") == "shop/\n", said

STATE = "/var/lib/ekiben"
disks = {
    "hub": (hub, f"tar -C {HUB} --exclude reports --warning=no-file-changed -cf DISK . || [ $? = 1 ]",
            f"find {HUB}/received {HUB}/hosts/*/release -mindepth 1 -delete; tar -C {HUB} -xf DISK"),
    "host": (web, f"cd {STATE}; tar -cf DISK . ; readlink -f {PROFILE} > DISK.system",
        f"systemctl stop ekiben-fleet.path ekiben-deliver.path; find {STATE} -mindepth 1 -delete; tar -C {STATE} -xf DISK; "
        f"nix-env --profile {PROFILE} --set $(cat DISK.system); {PROFILE}/bin/switch-to-configuration switch"),
    "publisher": (desk, "tar -C /home/alice -cf DISK .", "find /home/alice -mindepth 1 -delete; tar -C /home/alice -xf DISK"),
}


def keep(age):
    for machine, save, _ in disks.values():
        machine.succeed(save.replace("DISK", f"/tmp/{age}"))


with subtest("old disks of hub, host and publisher, in all combinations: the next release ends on the host"):
    keep("old")
    content = change("shop", "alice")
    deploys(user="alice")
    follows(content, "shop", "alice")
    keep("new")
    for ages in itertools.product(("old", "new"), repeat=3):
        what = dict(zip(disks, ages))
        for name, (machine, _, restore) in disks.items():
            machine.succeed(restore.replace("DISK", f"/tmp/{what[name]}"))
        hub.succeed(f"rm -f {HUB}/hosts/*/reports/*")
        code, said = status_says("alice")
        if (what["hub"], what["publisher"]) == ("old", "new"):
            assert code == 4 and "hub went back" in said and "deploy again" in said, said
        result = poll()
        if (what["hub"], what["host"]) == ("old", "new"):
            assert "has been seen before" in result["error"] and "deploy again" in web.fail("ekiben status fleet"), result
            becomes("refusing", "shop", "alice")
            code, said = status_says("alice")
            assert code == 2 and "deploy again" in said, said
        else:
            assert result["result"] in ("deployed", "unchanged"), result
        content = change("shop", "alice")
        deploys(user="alice")
        follows(content, "shop", "alice")

with subtest("a hub that is frozen is noticed on both sides, by its publisher at once, by its host by the date"):
    desk.succeed(by("alice", "jq '.expiresAfter = 45' fleet.json > new; mv new fleet.json"))
    content = change("shop", "alice")
    deploys(user="alice")
    follows(content, "shop", "alice")
    hub.succeed(f"cp -a {HUB}/hosts/shop/release /tmp/frozen")
    desk.succeed(by("alice", "jq '.expiresAfter = 2592000' fleet.json > new; mv new fleet.json"))
    deploys(user="alice")
    hub.succeed(f"cd {HUB}/hosts/shop/release; rm *; cp -a /tmp/frozen/. .")
    # once the hub has looked at what is there now
    desk.wait_until_succeeds(fleet_of("status --once | grep 'hub went back'", "alice"))
    code, said = status_says("alice")
    assert (code, "deploy again" in said) == (4, True), said
    web.wait_until_fails("ekiben status fleet")
    assert "stale: the release expired" in web.fail("ekiben status fleet"), web.execute("ekiben status fleet")
    deploys(user="alice")
    follows(content, "shop", "alice")
    web.succeed("ekiben status fleet")

@contextlib.contextmanager
def clock_of_web(offset):
    """Has the clock of the host's runs be wrong by so much."""
    library = web.succeed("ls /usr/lib/*/faketime/libfaketime.so.1").strip()
    drop_in = "/run/systemd/system/ekiben-fleet.service.d"
    wrong = f"[Service]\nEnvironment=LD_PRELOAD={library} FAKETIME={offset} NO_FAKE_STAT=1 DONT_FAKE_MONOTONIC=1\n"
    web.succeed(f"mkdir {drop_in}; printf %s {shlex.quote(wrong)} > {drop_in}/clock.conf; systemctl daemon-reload")
    yield
    web.succeed(f"rm -r {drop_in}; systemctl daemon-reload")


for offset, why in (("-3d", "which is tomorrow by this machine's clock; set that one"), ("+40d", "it expired 10 d ago")):
    with subtest(f"a host's clock is wrong by {offset}: it takes nothing and says so; set, it follows"):
        before, content = shows(web, "app"), change("shop", "alice")
        deploys(user="alice")
        with clock_of_web(offset):
            result = poll()
            assert result["result"] == "failed" and why in result["error"] and shows(web, "app") == before, result
            assert abs(result["finished"] - time.time()) > 2 * 86400, result
            becomes("refusing", "shop", "alice")
            code, said = status_says("alice")
            assert code == 2 and why in said, said
        follows(content, "shop", "alice")
