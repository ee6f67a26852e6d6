# ruff: noqa: F821
import hashlib
import os
import random
import re
import time

SERVED = "/var/lib/ekiben-hub"
NIXPKGS = "/srv/nixpkgs"
SYSTEM = os.uname().machine + "-linux"


def stand_in(name, says):
    """The Nix expression of a system that says something, or does not build if that is "broken"."""
    return f'''{{ config.system.build.toplevel = derivation {{
      name = "nixos-system-{name}"; system = "{SYSTEM}"; builder = "/bin/sh"; PATH = "/usr/bin:/run/current-system/sw/bin"; says = {says};
      args = [ "-euc" "if [ $says = broken ]; then echo trouble in build >&2; exit 1; fi
        if [ {name} = hub ]; then mkdir -p $out/bin
          printf '#!/bin/sh\\necho $1 >> /tmp/switched\\n' > $out/bin/switch-to-configuration; chmod +x $out/bin/*
        else echo $says > $out; fi" ]; }}; }}'''


def flake(directory, *names, more=""):
    """Writes a flake; what its systems say is in the file `says` beside it, and in its input `app`."""
    says = '"${builtins.replaceStrings [ "\\n" ] [ "" ] (builtins.readFile ./says)}"'
    systems = " ".join(f'"{name}" = {stand_in(name, says)};' for name in names)
    write(hub, f"/srv/fleet/hosts/{directory}/flake.nix", f'''{{ inputs.app = {{ url = "git+file:///srv/app"; flake = false; }};
      outputs = {{ self, app }}: {{ nixosConfigurations = {{ {systems} }}; }}; }}''')
    write(hub, f"/srv/fleet/hosts/{directory}/says", "1")


def manifest(host, archived=True):
    """What is published for a host; its archive has to be there, and right, unless it is not `archived`."""
    release = f"{SERVED}/hosts/{host}/release"
    found = json.loads(json.loads(hub.succeed(f"cat {release}/manifest.json"))["manifest"])
    assert not archived or hub.succeed(f"sha256sum < {release}/{found['id']}.tar.gz").split()[0] == found["sha256"], found
    content = f"{found['sha256']} {found['attr'] or '-'} {found['toplevel'] or '-'}\n"
    assert hashlib.sha256(content.encode()).hexdigest() == found["id"], found
    return found


def numbers():
    return {host: manifest(host)["sequence"] for host in HOSTS}


def newer(before):
    """Which hosts have got a release since their numbers were these; no number may have become lower."""
    now = numbers()
    assert all(now[host] >= before[host] for host in HOSTS), (before, now)
    return [host for host in HOSTS if now[host] > before[host]]


def published(said):
    """Which hosts have got a release, by what was said of it."""
    return re.findall("^([a-z0-9]+): release [0-9]{10} published\\b", said, re.M)


def beat(host, archived=True, **changes):
    """Has a host send its heartbeat."""
    released = {key: manifest(host, archived)[key] for key in ("id", "sequence")}
    heartbeat = {
        "format": 1, "host": host, "version": "0", "seen": released, "deployed": released, "system": manifest(host, archived)["toplevel"],
        "running": None, "last": None, "runs": 1, "selfUpdated": False, "rebootNeeded": False, **changes,
    }
    write(hub, f"{SERVED}/hosts/{host}/reports/heartbeat.json", json.dumps(heartbeat))


HOSTS = ["db", "hub", "plain", "web", "web2"]

hub.start()
hub.wait_for_unit("multi-user.target")
hub.succeed(as_deploy("git config --global user.name Deploy; git config --global user.email deploy@localhost; git init -qb main /srv/app"))
publish(hub, "app", "1")
for host in HOSTS:
    hub.succeed(f"install -d -o deploy {SERVED}/received {SERVED}/hosts/{host}/release {SERVED}/hosts/{host}/reports")
    hub.succeed(f"chown root: {SERVED} {SERVED}/hosts {SERVED}/hosts/{host}")

def check_kept():
    """Checks that what can be published again is there, and nothing else."""
    ids = list(dict.fromkeys(noted["manifest"]["id"] for noted in json.loads(hub.succeed(fleet("history --json web")))))
    kept = hub.succeed(f"ls {SERVED}/hosts/web/release").split()
    assert set(kept) - {"received.json"} == {"manifest.json", *(f"{one}.tar.gz" for one in ids[:5])}, (kept, ids)


with subtest("init makes a repository, and changes nothing that is there"):
    write(hub, "/srv/fleet/README.md", "mine")
    # no file can be of any size
    hub.fail(fleet("init", "ulimit -f 0;"))
    assert "Created /srv/fleet/fleet.json." in hub.succeed(fleet("init"))
    hub.fail("find /srv/fleet -name '*.new' | grep .")
    assert hub.succeed(fleet("init")) == ""
    assert hub.succeed("cat /srv/fleet/README.md") == "mine"
    settings = json.loads(hub.succeed("cat /srv/fleet/fleet.json"))
    hub.succeed(as_deploy("ssh-keygen -q -t ed25519 -N '' -f /home/deploy/key"))
    write(hub, "/srv/fleet/fleet.json", json.dumps({**settings, "signingKey": "/home/deploy/key"}))
    assert "there is no host" in hub.fail(fleet("build web"))
    assert "see ekiben fleet bootstrap" in hub.succeed(fleet("build"))

with subtest("Flakes of one and of several hosts, and plain configurations are found and built"):
    flake("web", "web")
    flake("pair", "web2", "db")
    # shared by a link that leads out of the directory
    write(hub, "/srv/fleet/shared/says.nix", '"1"')
    hub.succeed("install -d -o deploy /srv/nixpkgs")
    write(hub, "/srv/nixpkgs/nixos/default.nix", "{ }: import <nixos-config>")
    write(hub, "/srv/fleet/hosts/plain/configuration.nix", stand_in("plain", "import ./says.nix"))
    write(hub, "/srv/fleet/hosts/hub/configuration.nix", stand_in("hub", '"1"'))
    hub.succeed(as_deploy("ln -s ../../shared/says.nix /srv/fleet/hosts/plain/says.nix"))
    hub.succeed(as_deploy("cd /srv/fleet; git init -qb main .; git add .; git commit -qm initial"))
    said = hub.fail(fleet("build dry-build"))
    assert "lock file" in said and len(re.findall("^(plain|hub): /nix/store/", said, re.M)) == 2, said
    said = hub.succeed(fleet("flake-update"))
    assert "hosts/web: updated" in said and "hosts/pair: updated" in said, said
    hub.succeed(fleet("build dry-build"))
    said = hub.succeed(fleet("build"))
    for host in HOSTS:
        (toplevel,) = re.findall(f"^{host}: (/nix/store/.*)$", said, re.M)
        hub.succeed(f"test -e {toplevel}")
    # from anywhere below, and from elsewhere
    hub.succeed(as_deploy("cd /srv/fleet/hosts/web; ekiben fleet build web"), as_deploy("EKIBEN_FLEET=/srv/fleet ekiben fleet build web"))
    assert "see --repository" in hub.fail(as_deploy("cd /; ekiben fleet build 2>&1"))

with subtest("A name is matched whole"):
    assert "web2" not in hub.succeed(fleet("build web"))
    said = hub.fail(fleet("build we"))
    assert "there is db, hub, plain, web, web2" in said, said
    flake("twice", "db")
    assert "db is defined in hosts/pair and in hosts/twice" in hub.fail(fleet("build"))
    hub.succeed("rm -r /srv/fleet/hosts/twice")

with subtest("deploy publishes all once, and then what has changed"):
    earliest = int(hub.succeed("date +%s"))
    assert sorted(published(hub.succeed(fleet("deploy", prefix="umask 077;")))) == HOSTS
    # seconds since 1970
    assert all(earliest <= number <= int(hub.succeed("date +%s")) for number in numbers().values()), numbers()
    # readable to the host's own user
    hub.succeed(f"runuser -u nobody -- cat {SERVED}/hosts/web/release/manifest.json {SERVED}/hosts/web/release/*.tar.gz > /dev/null")
    key = hub.succeed("cut -d' ' -f1,2 /home/deploy/key.pub").strip()
    hub.succeed(
        f"cd /tmp; echo 'fleet {key}' > signers; jq -r .signature < {SERVED}/hosts/web/release/manifest.json > signature",
        f"cd /tmp; jq -j .manifest < {SERVED}/hosts/web/release/manifest.json | "
        "ssh-keygen -Y verify -n ekiben -I fleet -f signers -s signature",
    )
    # a key that comes later does not sign what is published, but what is in the repository
    identifier, before = manifest("web")["id"], numbers()
    write(hub, "/srv/fleet/fleet.json", json.dumps(settings))
    served = hub.succeed(f"cat {SERVED}/hosts/web/release/manifest.json")
    assert "its release is signed, and fleet.json has no signingKey" in hub.fail(fleet("deploy web"))
    assert hub.succeed(f"cat {SERVED}/hosts/web/release/manifest.json") == served
    hub.succeed(fleet("deploy --unsigned web"), f"jq -e '.signature == null' {SERVED}/hosts/web/release/manifest.json")
    write(hub, "/srv/fleet/fleet.json", json.dumps({**settings, "signingKey": "/home/deploy/key"}))
    assert "published: the same, signed again" in hub.succeed(fleet("deploy web"))
    hub.succeed(f"jq -e '.signature != null' {SERVED}/hosts/web/release/manifest.json")
    # and so does another key in its place, once
    hub.succeed(as_deploy("ssh-keygen -q -t ed25519 -N '' -C 'one more key' -f /home/deploy/other"))
    for name in ("other", "key"):
        write(hub, "/srv/fleet/fleet.json", json.dumps({**settings, "signingKey": f"/home/deploy/{name}"}))
        assert published(hub.succeed(fleet("deploy web"))) == ["web"]
        assert "web: unchanged" in hub.succeed(fleet("deploy web"))
        hub.succeed(
            f"cd /tmp; echo \"fleet $(cut -d' ' -f1,2 /home/deploy/{name}.pub)\" > signers; "
            f"jq -r .signature < {SERVED}/hosts/web/release/manifest.json > signature",
            f"cd /tmp; jq -j .manifest < {SERVED}/hosts/web/release/manifest.json | "
            "ssh-keygen -Y verify -n ekiben -I fleet -f signers -s signature",
        )
    assert newer(before) == ["web"] and manifest("web")["id"] == identifier
    before = hub.succeed(f"find {SERVED} ! -path {SERVED}/received ! -name all.json -printf '%p %T@\\n' | sort")
    began = time.monotonic()
    said = hub.succeed(fleet("deploy"))
    print(f"five unchanged hosts took {time.monotonic() - began:.1f} s", flush=True)
    assert said.count("unchanged") == 5, said
    assert hub.succeed(f"find {SERVED} ! -path {SERVED}/received ! -name all.json -printf '%p %T@\\n' | sort") == before
    write(hub, "/srv/fleet/hosts/web/says", "2")
    before = numbers()
    said = hub.succeed(fleet("deploy"))
    assert published(said) == ["web"] and said.count("unchanged") == 4, said
    assert newer(before) == ["web"]
    # through the link
    write(hub, "/srv/fleet/shared/says.nix", '"2"')
    assert published(hub.succeed(fleet("deploy plain"))) == ["plain"]
    # a plain configuration is also what NIX_PATH says
    write(hub, "/srv/nixpkgs/nixos/default.nix", "{ }: " + stand_in("plain", '"nixpkgs"'))
    assert published(hub.succeed(fleet("deploy plain"))) == ["plain"]
    write(hub, "/srv/nixpkgs/nixos/default.nix", "{ }: import <nixos-config>")
    # what its siblings in the flake are is part of a host's archive
    write(hub, "/srv/fleet/hosts/pair/says", "2")
    assert published(hub.succeed(fleet("deploy web2"))) == ["web2"]
    assert newer(before) == ["plain", "web", "web2"]
    hub.succeed(fleet("deploy"))
    check_kept()

with subtest("An archive that is gone or another one is sent again by the next deploy"):
    archive = f"{SERVED}/hosts/web/release/{manifest('web')['id']}.tar.gz"
    # what has another size is seen at once, what has not as soon as its host says so
    for harm, refused in ((f"rm {archive}", None), (f"truncate -s 10 {archive}", None), (f"printf x | dd of={archive} conv=notrunc status=none", "no match")):
        hub.succeed(as_deploy(harm))
        beat("web", archived=False, refused=refused)
        assert "published: the same, sent again" in hub.succeed(fleet("deploy web"))
        assert manifest("web")["id"] in archive
    hub.succeed(f"rm {SERVED}/received/web/heartbeat.json")

with subtest("A release says what it is made from; the hub keeps what has been published"):
    web = "/srv/fleet/hosts/web"
    write(hub, f"{web}/says", "committed")
    assert "Publishing uncommitted changes to " in hub.succeed(fleet("deploy web"))
    assert manifest("web")["dirty"] is True
    hub.succeed(as_deploy("cd /srv/fleet; git add .; git commit -qm 'web: say more'"))
    commit = hub.succeed(as_deploy("git -C /srv/fleet rev-parse HEAD")).strip()
    write(hub, f"{web}/says", "1")
    hub.succeed(as_deploy("cd /srv/fleet; git commit -qam 'web: say 1'"))
    commit = hub.succeed(as_deploy("git -C /srv/fleet rev-parse HEAD")).strip()
    assert f"Publishing {commit} by Deploy <deploy@localhost>: web: say 1" in hub.succeed(fleet("deploy web"))
    found = manifest("web")
    assert (found["commit"], found["author"], found["summary"], found["dirty"]) == (commit, "Deploy <deploy@localhost>", "web: say 1", False), found
    assert commit[:12] in hub.execute(fleet("status --wide web"))[1]
    noted = json.loads(hub.succeed(fleet("history --json web")))
    sequence = [one["manifest"]["sequence"] for one in noted]
    assert sequence == sorted(sequence, reverse=True) and len(sequence) > 5, noted
    assert noted[0]["manifest"] == found, noted[0]
    assert re.search(f"web +{found['sequence']} +{commit[:12]} +web: say 1 - Deploy", hub.succeed(fleet("history")))
    # what somebody else publishes the hub notes, too, in its own time
    release = f"{SERVED}/hosts/web/release"
    served = hub.succeed(f"cat {release}/manifest.json")
    forged = json.dumps({"manifest": json.dumps({**found, "sequence": found["sequence"] + 1, "author": "Mallory"}), "signature": None})
    write(hub, f"{release}/manifest.json", forged)
    hub.succeed(fleet("collect"))
    assert "Mallory" in hub.succeed(fleet("history web")).splitlines()[1]
    write(hub, f"{release}/manifest.json", served)

with subtest("Who deploys from a clone that is behind, or beside, is told what gets lost, before it does"):
    def beside(commands):
        return hub.succeed(as_deploy(f"cd /srv/beside; export NIX_PATH=nixpkgs={NIXPKGS}; {commands}"))

    def say(what):
        return f"echo {what} > hosts/web/says; git commit -qam 'web: say {what}'; "

    hub.succeed("install -d -o deploy /srv/beside /srv/shallow", as_deploy("git clone -q /srv/fleet /srv/beside"))
    hub.succeed(as_deploy("cd /srv/fleet; " + say(2)))
    commit = hub.succeed(as_deploy("git -C /srv/fleet rev-parse HEAD")).strip()
    assert " lose" not in hub.succeed(fleet("deploy"))
    # no commit of this clone's
    said = beside("ekiben fleet deploy 2>&1")
    lines = rf"Publishing .*\nwarning: 1 host loses what has been published, last .* ago from commit {commit[:12]} by Deploy <deploy@localhost>: it is not part "
    assert re.match(lines, said) and published(said) == ["web"], said
    # what it has published is part of what follows
    assert " lose" not in beside("ekiben fleet deploy 2>&1") + hub.succeed(fleet("deploy"))
    # one of its own, and the other is known
    done = beside(say(3) + "git fetch -q; ekiben fleet deploy --json 2> /tmp/said")
    assert {host: one.get("lost") for host, one in json.loads(done).items() if "lost" in one} == {"web": commit}, done
    assert len(re.findall("^warning: 1 host loses", hub.succeed("cat /tmp/said"), re.M)) == 1
    # the last one before, on purpose
    number = json.loads(hub.succeed(fleet("history --json web")))[1]["manifest"]["sequence"]
    assert "again" in (said := hub.succeed(fleet(f"deploy --again {number} web"))) and " lose" not in said, said
    assert " lose" not in beside("git merge -q -X ours origin/main; ekiben fleet deploy 2>&1")
    # what a shallow clone does not know, it does not say
    hub.succeed(as_deploy("git clone -q --depth 1 file:///srv/fleet /srv/shallow"))
    said = beside("cd /srv/shallow; ekiben fleet deploy 2>&1")
    assert published(said) == ["web"] and " lose" not in said, said
    hub.succeed(as_deploy("cd /srv/fleet; " + say(1)), fleet("deploy web"), "rm -r /srv/beside /srv/shallow")

with subtest("A release expires; what is half over is renewed, by deploy or alone, and nothing else with it"):
    def lasts(days, **more):
        write(hub, "/srv/fleet/fleet.json", json.dumps({**settings, "signingKey": "/home/deploy/key", "expiresAfter": days and days * 86400, **more}))
    before = manifest("web")
    assert before["expires"] == before["published"] + 30 * 86400, before
    lasts(59)
    assert "web: unchanged" in hub.succeed(fleet("deploy web")) and hub.succeed(fleet("renew web")) == "Nothing expires before long.\n"
    lasts(61)
    assert "published: renewed" in hub.succeed(fleet("deploy web")) and "web: unchanged" in hub.succeed(fleet("deploy web"))
    renewed = manifest("web")
    assert renewed["id"] == before["id"] and renewed["sequence"] > before["sequence"], renewed
    assert 60 * 86400 < renewed["expires"] - int(hub.succeed("date +%s")) <= 61 * 86400
    # of what is in the repository, nothing gets out
    write(hub, f"{web}/says", "not yet")
    lasts(None)
    assert "web: release" in hub.succeed(fleet("renew web")) and hub.succeed(fleet("renew web")) == "Nothing expires before long.\n"
    kept = ("id", "published", "commit")
    assert [manifest("web")[key] for key in kept] == [renewed[key] for key in kept] and manifest("web")["expires"] is None
    # nor is an old one renewed, whoever offers it, nor one that this publisher does not know
    hub.succeed(fleet("deploy web"))
    newest = hub.succeed(f"cat {release}/manifest.json")
    write(hub, f"{release}/manifest.json", served)
    lasts(30)
    assert "it is not known to be the last one that was published; deploy" in hub.fail(fleet("renew web"))
    write(hub, f"{release}/manifest.json", newest)
    hub.succeed("mv /home/deploy/.local/state/ekiben/published /tmp/published")
    assert "it is not known to be the last one that was published; deploy" in hub.fail(fleet("renew web"))
    # unless it has looked, and would publish the same
    lasts(None)
    assert "web: unchanged" in hub.succeed(fleet("deploy web"))
    lasts(30)
    assert "web: release" in hub.succeed(fleet("renew web"))
    hub.succeed("rm -r /home/deploy/.local/state/ekiben/published; mv /tmp/published /home/deploy/.local/state/ekiben/published")
    hub.succeed(fleet("renew web"))
    write(hub, f"{web}/says", "1")
    hub.succeed(fleet("deploy web"))

with subtest("A hub that was restored or rebuilt is noticed, and goes on by itself with the next deploy"):
    hub.succeed(f"rm -rf /tmp/backup; cp -a {SERVED} /tmp/backup")
    write(hub, f"{web}/says", "after the backup")
    hub.succeed(fleet("deploy web"))
    last = manifest("web")["sequence"]
    beat("web")
    hub.succeed(fleet("status web"))
    for restore, offers in (("cp -a /tmp/backup/. .", "the hub offers release 1"), ("true", "the hub offers no release")):
        hub.succeed(f"cd {SERVED}; find . -type f -delete; {restore}")
        code, said = hub.execute(fleet("status web"))
        assert code == 4 and "hub went back" in said and offers in said and f"{last} has been published" in said, said
        assert "published" in hub.succeed(fleet("deploy web"))
        assert manifest("web")["sequence"] > last and manifest("web")["toplevel"]
        last = manifest("web")["sequence"]
        assert (got := states(hub))["web"] == "new machine", got
    # the same contents, by a higher number
    hub.succeed(f"cp -a {release}/manifest.json /tmp/kept", fleet("deploy"), f"sed -i 's/{last}/{last - 5}/' {release}/manifest.json")
    assert states(hub)["web"] == "hub went back"
    assert manifest("web")["sequence"] < last and "web: release" in hub.succeed(fleet("deploy web")) and manifest("web")["sequence"] > last
    hub.succeed(f"rm -rf {SERVED}/received/*/*")
    write(hub, f"{web}/says", "2")
    hub.succeed(fleet("deploy"))

with subtest("What does not build is not published, and keeps nobody else waiting"):
    write(hub, "/srv/fleet/hosts/web/says", "broken")
    write(hub, "/srv/fleet/hosts/hub/configuration.nix", stand_in("hub", '"2"'))
    before = numbers()
    said = hub.fail(fleet("deploy"))
    assert "web: Failed to build web" in said and "| trouble in build" in said.replace("nixos-system-web> ", ""), said
    assert "hub" in published(said) and "web" not in newer(before), said
    hub.succeed("grep 'trouble in build' /home/deploy/.local/state/ekiben/logs/web.log")
    write(hub, "/srv/fleet/hosts/plain/configuration.nix", "{")
    said = hub.fail(fleet("deploy plain"))
    assert "plain: Failed to evaluate" in said and "syntax error" in said, said
    # evaluated only, if so asked for
    assert published(hub.succeed(fleet("deploy --no-build web"))) == ["web"]
    write(hub, "/srv/fleet/hosts/plain/configuration.nix", stand_in("plain", "import ./says.nix"))
    write(hub, "/srv/fleet/hosts/web/says", "3")
    hub.succeed(fleet("deploy"))
    # a flake that cannot even be looked at
    write(hub, "/srv/fleet/hosts/odd/flake.nix", "{")
    write(hub, "/srv/fleet/hosts/web/says", "4")
    said = hub.fail(fleet("deploy"))
    assert "Failed to evaluate hosts/odd" in said and published(said) == ["web"], said
    hub.succeed("rm -r /srv/fleet/hosts/odd")

with subtest("A repository can be a flake itself: what git tracks is what a host gets"):
    hub.succeed("install -d -o deploy /srv/own /srv/own-hub/received /srv/own-hub/hosts/own/release")
    for name, text in (("fleet.json", "{}"), ("says", "1"), ("gone", ""), ("hosts/own/configuration.nix", "a module")):
        write(hub, f"/srv/own/{name}", text)
    write(hub, "/srv/own/flake.nix", f"{{ outputs = _: {{ nixosConfigurations.own = {stand_in('own', '(builtins.readFile ./says)')}; }}; }}")
    hub.succeed(as_deploy("cd /srv/own; git init -qb main .; git add .; rm gone; echo edited > says; touch untracked"))
    hub.succeed(fleet("deploy --repository /srv/own --directory /srv/own-hub own"))
    files = hub.succeed("tar tzf /srv/own-hub/hosts/own/release/*.tar.gz").split()
    assert files == ["flake.nix", "fleet.json", "hosts/own/configuration.nix", "says"], files
    toplevel = json.loads(json.loads(hub.succeed("cat /srv/own-hub/hosts/own/release/manifest.json"))["manifest"])["toplevel"]
    assert hub.succeed(f"cat {toplevel}").strip() == "edited"

with subtest("A link that leads out of the repository is named and publishes nothing, and so is what nobody could unpack"):
    hub.succeed(as_deploy("echo signer-private > /home/deploy/secret; cd /srv/own; git rm -q --cached gone; git add -A; "
                          "git commit -qm own"))
    made = "find /srv/own-hub /var/lib/ekiben-hub -name '*.tar.gz' | sort | xargs sha256sum"
    before = hub.succeed(made)
    for make, why in (
        ("ln -s /home/deploy/secret odd", "link to /home/deploy/secret, outside of the repository"),
        ("ln -s $(realpath --relative-to=. /home/deploy/secret) odd", "outside of the repository"),
        ("ln -s $(realpath --relative-to=. /home/deploy) odd", "outside of the repository"),
        ("ln -s /nix/store odd", "outside of the repository"),
        ("ln -s $(git rev-parse --show-toplevel)/.git/config odd", "outside of the repository"),
        ("ln -s nowhere odd", "dangling link to nowhere"),
        ("touch $'odd\\nname'", "line breaks, control characters and backslashes are not allowed"),
        ("touch odd; chmod 0 odd", "Permission denied"),
        ("cp /home/deploy/key odd", "it is the key that signs releases"),
    ):
        hub.succeed(as_deploy(f"cd /srv/fleet/hosts/web; {make}"))
        said = hub.fail(fleet("deploy web"))
        assert "hosts/web/odd" in said and why in said, said
        hub.succeed("rm /srv/fleet/hosts/web/odd*")
        # and of what git tracks in a repository that is a flake itself
        if "nowhere" not in make and "realpath --relative-to=. /home/deploy)" not in make and "/nix/store" not in make and "chmod" not in make:
            hub.succeed(as_deploy("jq '.signingKey = \"/home/deploy/key\"' /srv/own/fleet.json > /tmp/own.json; "
                                  f"cat /tmp/own.json > /srv/own/fleet.json; cd /srv/own; {make}; git add -A"))
            said = hub.fail(fleet("deploy --repository /srv/own --directory /srv/own-hub own"))
            assert "/srv/own/odd" in said and why in said, said
            hub.succeed(as_deploy("cd /srv/own; rm odd*; git add -A"))
    assert hub.succeed(made) == before
    # an editor's lock, and links within
    hub.succeed(as_deploy("cd /srv/fleet/hosts/web; ln -s deploy@hub.1:2 '.#flake.nix'; ln -s $PWD/says inside; ln -s ../../shared dir"))
    hub.succeed(fleet("build web"))
    hub.succeed(as_deploy("cd /srv/fleet/hosts/web; rm '.#flake.nix' inside dir"))

with subtest("A host that the hub does not serve is named"):
    flake("new", "new")
    hub.succeed(fleet("flake-update"))
    said = hub.fail(fleet("deploy new"))
    assert "add the host to services.ekiben.hub.hosts" in said, said
    hub.succeed("rm -r /srv/fleet/hosts/new")

with subtest("A number is higher than any that the host has seen, and never jumps, whatever the hub or a host says"):
    now = int(hub.succeed("date +%s"))
    beat("db", seen={"id": "0" * 64, "sequence": now + 1000})
    write(hub, "/srv/fleet/hosts/pair/says", "3")
    assert "db" in published(hub.succeed(fleet("deploy"))) and manifest("db")["sequence"] == now + 1001
    # beyond all reason, from a host; and a release of the hub's own, which the next one would have been
    beat("web", seen={"id": "0" * 64, "sequence": now + 200_000})
    release, number = f"{SERVED}/hosts/web/release", manifest("web")["sequence"]
    for changes in ({"sequence": 2**64 - 1}, {"sequence": now + 300_000}, {"sequence": now + 3000}, {"id": "/../../other"}, {"id": "1" * 64},
                    {"host": "db"}, {}):
        forged = json.dumps({"manifest": json.dumps({**manifest("web"), **changes}), "signature": "none"})
        # what is published is changed, or not; what is signed is the publisher's own
        for says in ("4", "5"):
            write(hub, f"{release}/manifest.json", forged)
            write(hub, "/srv/fleet/hosts/web/says", says)
            assert published(hub.succeed(fleet("deploy web"))) == ["web"], changes
            before, number = number, manifest("web")["sequence"]
            assert before < number <= max(before, int(hub.succeed("date +%s"))) + 1, (changes, before, number)
    # nor does one that is too large to be one, or of another kind, keep anybody from publishing
    for command in (f"truncate -s 4G {release}/manifest.json", f"mkfifo {release}/manifest.json"):
        hub.succeed(as_deploy(f"rm {release}/manifest.json; {command}"))
        assert published(hub.succeed(fleet("deploy web"))) == ["web"]

with subtest("status shows the state of the hosts"):
    released = {key: manifest("web")[key] for key in ("id", "sequence")}
    assert set((got := states(hub)).values()) == {"new machine", "rebuild pending"}, got
    for host in HOSTS:
        beat(host)
    beat("web", last={"release": released, "result": "failed", "stage": "build", "error": "no\\u001b[31m luck", "finished": 0})
    beat("db", deployed=None)
    beat("web2", deployed=None, system=f"/nix/store/{'x' * 32}-x")
    assert (got := states(hub)) == {"db": "sync pending", "hub": "up to date", "plain": "up to date", "web": "failing", "web2": "rebuild pending"}, got
    said = hub.fail(fleet("status"))
    assert re.search("^web +.*failing", said, re.M) and "luck" in said and "\x1b" not in said, said
    hub.succeed(fleet("status web2"))
    # trouble with one host hides no other
    for name in ("hosts/db/release/manifest.json", "received/db/heartbeat.json"):
        hub.succeed(as_deploy(f"cp -p {SERVED}/{name} /tmp/kept; echo junk > {SERVED}/{name}"))
        assert (got := states(hub))["db"] == "unreadable" and got["plain"] == "up to date", got
        said = hub.fail(fleet("status db"))
        assert f"Failed to read {SERVED}/{name}: " in said, said
        hub.succeed(as_deploy(f"cp -p /tmp/kept {SERVED}/{name}"))
    assert states(hub)["db"] == "sync pending"
    identifier = "0123456789abcdef" * 2
    report = {
        "format": 1, "host": "db", "system": f"/nix/store/{'x' * 32}-x", "id": identifier, "result": "failed", "trigger": "timer", "started": 0, "finished": 1,
        "commit": None, "summary": None, "release": None, "stage": "build", "error": "no", "warnings": [], "rebootNeeded": False,
    }
    write(hub, f"{SERVED}/hosts/db/reports/{identifier}.json", json.dumps(report))
    hub.succeed(as_deploy(f"printf 'it said \\033[31mno\\n' | gzip > {SERVED}/hosts/db/reports/{identifier}.log.gz"))
    hub.succeed(fleet("collect"))
    assert json.loads(hub.succeed(f"cat {SERVED}/hosts/db/release/received.json")) == {"reports": [identifier]}
    assert hub.succeed(f"ls {SERVED}/hosts/db/reports") == ""
    assert "it said \ufffd[31mno" in hub.succeed(fleet("log db last"))
    # a small file that is a long log
    hub.succeed(as_deploy(f"(head -c 200M /dev/zero | tr '\\0' x) | gzip > {SERVED}/received/db/{identifier}.log.gz"))
    assert "the rest is left out" in hub.succeed(fleet("log db last"))

with subtest("Nobody obeys a file of somebody else's, and nobody but the hub's user collects"):
    hub.succeed(
        "mkdir -p /tmp/planted/hosts/x /tmp/evil/received /tmp/evil/hosts/x/release; chmod -R 777 /tmp/evil; chown -R deploy /tmp/planted",
        "install -d -o deploy /tmp/planted/mine /home/deploy/docs/deep; "
        "touch /home/deploy/docs/thesis.txt /home/deploy/docs/a.log /home/deploy/docs/deep/x; chown -R deploy /home/deploy/docs",
        "ln -s /home/deploy/docs /tmp/evil/hosts/x/reports; install -d /root/precious/sub",
    )
    shell = json.dumps("id -un > /tmp/ran-as; echo 1")
    write(hub, "/tmp/planted/hosts/x/flake.nix",
        f'{{ outputs = _: {{ nixosConfigurations.x.config.system.build.toplevel = builtins.exec [ "/bin/sh" "-c" {shell} ]; }}; '
        f'}}')
    write(hub, "/tmp/planted/fleet.json",
          json.dumps({"directory": "/tmp/evil", "flags": ["--option", "allow-unsafe-native-code-during-evaluation", "true", "--impure"]}))
    precious = "find /home/deploy/docs /root/precious | sort"
    before = hub.succeed(precious)
    # the file or the directory that it is in
    for owners in ("nobody /tmp/planted/fleet.json", "nobody /tmp/planted", "nobody -R /tmp/planted/hosts /tmp/planted/fleet.json /tmp/evil"):
        hub.succeed("chmod 755 /tmp/planted; chown deploy /tmp/planted /tmp/planted/fleet.json", f"chown {owners}")
        for command in ("status --once", "build dry-build", "deploy", "collect", "log x", "diff", "bootstrap x"):
            for place in ("cd /tmp/planted/mine", "export EKIBEN_FLEET=/tmp/planted", "cd /tmp/planted"):
                said = hub.fail(as_deploy(f"{place}; ekiben fleet {command} 2>&1"))
                assert "/tmp/planted" in said and "owned by nobody, not by deploy" in said and "--repository" in said, said
    hub.succeed("chown -R deploy /tmp/planted", "rm /tmp/evil/hosts/x/reports; ln -s /root/precious /tmp/evil/hosts/x/reports")
    for place in ("cd /tmp/planted/mine", "export EKIBEN_FLEET=/srv/fleet; cd /", "cd /srv/fleet"):
        assert "owned by deploy, not by root" in hub.fail(f"{place}; ekiben fleet status --once 2>&1")
    # nor is anything taken or removed where a hub of somebody else's leads to
    for who in ("deploy", "root"):
        hub.execute(f"runuser -u {who} -- sh -c 'cd /; ekiben fleet status --once --directory /tmp/evil'")
    assert hub.succeed(precious) == before
    hub.fail("test -e /tmp/ran-as")
    # root looks, and leaves nothing behind
    hub.succeed(as_deploy(f"rm -r {SERVED}/received/db"))
    beat("db")
    hub.succeed(f"cd /; ekiben fleet status --once --directory {SERVED} db")
    assert "owned by deploy, who alone can collect" in hub.fail(f"cd /; ekiben fleet collect --directory {SERVED} 2>&1")
    hub.succeed(f"test ! -e {SERVED}/received/db")
    assert states(hub)["db"] == "up to date"

with subtest("where there is no hub, that is said"):
    for command in ("status", "deploy", "resume", "log web"):
        said = hub.fail(f"cd /; ekiben fleet {command} --directory /nowhere 2>&1")
        assert "Failed to find /nowhere: this machine is no hub" in said, said

with subtest("diff compares what runs with what would be deployed"):
    said = hub.succeed(fleet("diff"))
    assert "hub: up to date" in said and f"web2: /nix/store/{'x' * 32}-x is not in the store of this machine" in said, said
    beat("web", system=manifest("hub")["toplevel"])
    assert f"{manifest('hub')['toplevel']} -> {manifest('web')['toplevel']}" in hub.succeed(fleet("diff web"))

with subtest("flake-update takes inputs and hosts"):
    lock = lambda name: json.loads(hub.succeed(f"cat /srv/fleet/hosts/{name}/flake.lock"))["nodes"]["app"]["locked"]["rev"]
    new = publish(hub, "app", "2")
    said = hub.succeed(fleet("flake-update app web"))
    assert (lock("web") == new) and lock("pair") != new, said
    hub.succeed(fleet("flake-update app"))
    assert lock("pair") == new
    before = hub.succeed("cat /srv/fleet/hosts/*/flake.lock")
    publish(hub, "app", "3")
    said = hub.fail(fleet("flake-update ap"))
    assert "no flake has an input of this name" in said and "updated" not in said, said
    assert before == hub.succeed("cat /srv/fleet/hosts/*/flake.lock")
    hub.succeed("mv /srv/app /srv/away")
    assert "Failed to update app" in hub.fail(fleet("flake-update app"))
    hub.succeed("mv /srv/away /srv/app")
    hub.succeed(fleet("deploy"))

with subtest("Who writes an input cannot have this machine's files read"):
    leak = lambda arguments: as_deploy(f"ekiben fleet --repository /home/deploy/leak {arguments} 2>&1")
    lock_file = "/home/deploy/leak/hosts/leak/flake.lock"
    hub.succeed(as_deploy("mkdir -p /home/deploy/lib; git init -qb main /home/deploy/lib; cp -r /srv/app /home/deploy/private"), leak("init"))
    write(hub, "/home/deploy/leak/hosts/leak/flake.nix", f'''{{ inputs.lib.url = "git+file:///home/deploy/lib";
      outputs = {{ self, lib }}: {{ nixosConfigurations.leak = {stand_in("leak", "lib.says")}; }}; }}''')

    def change_lib(url, says):
        inputs = f'inputs.key = {{ url = "{url}"; flake = false; }};' if url else ""
        write(hub, "/home/deploy/lib/flake.nix", f"{{ {inputs} outputs = inputs: {{ says = {says}; }}; }}")
        hub.succeed(as_deploy("cd /home/deploy/lib; rm -f flake.lock; git add --all; git commit -qm change"))

    change_lib("", '"1"')
    hub.succeed(leak("flake-update"))
    before = hub.succeed(f"cat {lock_file}")
    for url, says in (
        ("path:/home/deploy/private", 'builtins.readFile "${inputs.key}/content"'),
        ("file:///home/deploy/key", "builtins.readFile inputs.key"),
        ("git+file:///home/deploy/private", 'builtins.readFile "${inputs.key}/content"'),
    ):
        change_lib(url, says)
        for arguments in ("flake-update", "flake-update lib"):
            said = hub.fail(leak(arguments))
            assert "Failed to update inputs: lib/key would be" in said and "/home/deploy/" in said, said
        assert hub.succeed(f"cat {lock_file}") == before
    # if somebody means it
    hub.succeed(as_deploy("cd /home/deploy/leak/hosts/leak; nix flake update --flake path:."))
    assert "file:///home/deploy/private" in hub.succeed(f"cat {lock_file}")
    hub.succeed(as_deploy("cd /home/deploy/lib; git commit -qm again --allow-empty"), leak("flake-update"))
    assert "hosts/leak: unchanged" in hub.succeed(leak("flake-update lib"))
    hub.succeed("rm -r /home/deploy/leak /home/deploy/lib /home/deploy/private")

with subtest("Of two deploys at once, one waits, and both are seen"):
    said = hub.succeed(f"flock {SERVED}/received sleep 2 & sleep 0.5; " + fleet("deploy web", prefix="date +%s.%N;") + "; date +%s.%N")
    assert float(said.split()[-1]) - float(said.split()[0]) > 1 and "publishing;" in said, said
    number = manifest("web")["sequence"]
    hub.succeed(as_deploy(
        "cd /srv/fleet; export NIX_PATH=nixpkgs=/srv/nixpkgs; echo first > hosts/web/says; ekiben fleet deploy web & first=$!; sleep 0.3;"
        " echo second > hosts/web/says; ekiben fleet deploy web; wait $first"
    ))
    last = manifest("web")
    assert last["sequence"] > number and hub.succeed(f"cat {last['toplevel']}").strip() == "second", last
    for number in (1, 2):
        before = numbers()
        write(hub, "/srv/fleet/hosts/web/says", f"fast {number}")
        hub.succeed(fleet("deploy web"))
        assert newer(before) == ["web"]

def check_killed(number, command, **arguments):
    """Changes a host, has the deploy killed; returns whether it has published that."""
    before = manifest("web")
    write(hub, "/srv/fleet/hosts/web/says", f"killed {number}")
    hub.succeed(fleet("build web"))
    code, said = hub.execute(fleet(command, **arguments))
    after = manifest("web")
    assert after == before or after["sequence"] > before["sequence"], (before, after)
    return code, after != before, said


with subtest("A deploy that is killed leaves the old release or the new one"):
    began = time.monotonic()
    assert check_killed("never", "deploy web")[:2] == (0, True)
    patience = time.monotonic() - began
    seen = [check_killed(number, "deploy web", prefix=f"timeout -s KILL {random.random() * patience:.2f}")[1] for number in range(5)]
    # at each of its calls that put something on the disk or remove it
    calls = "/^(fsync|rename|unlink)"
    for number in range(1, 100) if is_host(hub) else []:
        strace = f"strace -f -qq -o /dev/null -e 'trace={calls}' -e 'inject={calls}:signal=KILL:when={number}'"
        code, new, said = check_killed(f"at call {number}", "deploy --no-build web", prefix=strace)
        if code == 0:
            break
        seen.append(new)
    print(f"killed {len(seen)} times: {seen.count(False)} times the old release, {seen.count(True)} times the new one", flush=True)
    assert not is_host(hub) or (code == 0 and False in seen and True in seen), said
    # nothing is left of the others
    write(hub, "/srv/fleet/hosts/web/says", "at last")
    hub.succeed(fleet("deploy"))
    check_kept()
    assert hub.execute(f"ls {SERVED}/hosts/web/release | grep new")[1] == ""

with subtest("This machine's own configuration can be activated"):
    assert "is not this machine" in hub.fail(fleet("build switch web"))
    assert "expected one host" in hub.fail(fleet("build test"))
    assert "must be run as root" in hub.fail(fleet("build test hub"))
    if is_host(hub):
        assert "owned by deploy, not by root" in hub.fail("cd /srv/fleet; ekiben fleet build switch hub 2>&1")
        hub.succeed("cp -r /srv/fleet /root/fleet; chown -R root /root/fleet; cd /root/fleet; "
                    "export NIX_PATH=nixpkgs=/srv/nixpkgs; ekiben fleet build switch hub")
        # first for now, then for good
        assert hub.succeed("cat /tmp/switched").split() == ["test", "boot"]
        assert generation(hub).endswith(manifest("hub")["toplevel"])

with subtest("A new host is told what to do"):
    assert f'signers = [ "{key}" ]' in hub.succeed(fleet("bootstrap laptop"))
    assert "expected a host name" in hub.fail(fleet("bootstrap Laptop.local"))
