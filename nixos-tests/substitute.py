start_all()
CACHE = "/srv/www/cache"
# what NixOS builds on the machine itself, by its own word, are such derivations
FLAKE = """{
  outputs = { self }: {
    nixosConfigurations.server = import ./system.nix {
      name = "server";
      app = ./app;
      other = derivation {
        name = "part";
        system = "@system@";
        builder = "/bin/sh";
        PATH = "/usr/bin";
        preferLocalBuild = true;
        allowSubstitutes = false;
        content = builtins.readFile ./app/content;
        args = [ "-c" "mkdir $out; echo $content > $out/content" ];
      };
      revision = if builtins.pathExists ./imports && import (derivation {
        name = "imported";
        system = "@system@";
        builder = "/bin/sh";
        allowSubstitutes = false;
        content = builtins.readFile ./app/content;
        args = [ "-c" "echo $content > $out" ];
      }) == 0 then "none" else self.rev or "none";
    };
  };
}
"""
WEB = """
import functools, http.server, sys
http.server.ThreadingHTTPServer(("", int(sys.argv[1])), functools.partial(http.server.SimpleHTTPRequestHandler, directory=sys.argv[2])).serve_forever()
"""


def on_ci(command):
    return ci.succeed(as_deploy(f"cd /srv/config; {command}")).strip()


def commit(content, trouble="none"):
    """Commits and publishes another configuration."""
    on_ci(f"mkdir -p app; echo {content} > app/content; echo {trouble} > app/trouble; git add .; git commit -qm {content}")
    on_ci("git push -q /srv/www/config.git main; git -C /srv/www/config.git update-server-info")


def build(more=""):
    """Builds it."""
    return on_ci(f"nix build --no-link --print-out-paths {more} .#nixosConfigurations.server.config.system.build.toplevel")


def fill(*paths, key="?secret-key=/srv/key"):
    """Has the cache hold paths, and what they need."""
    on_ci(f"nix copy --to 'file://{CACHE}{key}' {' '.join(paths)}")


def waits(instance, what):
    server.wait_until_succeeds(knows(instance, f'.waiting // "" | test({json.dumps(what)})'), timeout=60)


def builds():
    """What this machine has ever built."""
    return server.succeed("ls -d /nix/var/log/nix/drvs/*/*").split()


def ends(content):
    """Waits until the instance has deployed something, which was not built here."""
    server.wait_until_succeeds(f"grep -x {content} /etc/app")
    wait_until_at_rest(server, "app")
    assert (seen := last_run(server, "app"))["result"] == "deployed" and builds() == BUILDS, seen
    check_deployed(server, "app")


for machine in (ci, server):
    machine.wait_for_unit("multi-user.target")
    machine.succeed(as_deploy("git config --global user.name Deploy; git config --global user.email deploy@localhost"))
ci.succeed(
    f"install -d -o deploy /srv/config /srv/www {CACHE}; printf %s {shlex.quote(WEB)} > /srv/web.py",
    "nix-store --generate-binary-cache-key ci /srv/key /srv/key.pub; chown deploy /srv/key",
    *(f"systemd-run --unit=web-{port} --setenv=PATH=$PATH python3 /srv/web.py {port} {place}" for port, place in ((8000, "/srv/www"), (8001, CACHE))),
)
system = ci.succeed("nix eval --impure --raw --expr builtins.currentSystem").strip()
pack = server.succeed("cd /etc/scenario; tar -chz system.nix switch-to-configuration systems | base64 -w0").strip()
ci.succeed(as_deploy("git init -q --bare -b main /srv/www/config.git; git init -qb main /srv/config; "
                     f"base64 -d <<< {pack} | tar -C /srv/config -xz"))
write(ci, "/srv/config/flake.nix", FLAKE.replace("@system@", system))
# what the system refers to
on_ci("sed -i 's,^ *name = \"nixos-system.*,& preferLocalBuild = true; allowSubstitutes = false;,; s,mkdir -p .out/bin,&; "
      "echo $other > $out/other,' system.nix")
commit("1")
fill(on_ci("nix store add-path app"))
server.succeed(
    "echo extra-substituters = http://ci:8001 >> /etc/nix/nix.conf; "
    f"echo 'extra-trusted-public-keys = {ci.succeed('cat /srv/key.pub').strip()}' >> /etc/nix/nix.conf",
    # as the module has it
    "printf '%s\n' 'narinfo-cache-negative-ttl = 0' 'always-allow-substitutes = true' 'download-attempts = 1' >> /etc/nix/nix.conf; "
    "systemctl restart nix-daemon",
    as_deploy(f"git clone -q http://ci:8000/config.git {REPOSITORY}"),
)
rebuild(server)
BUILDS = builds()
assert len(BUILDS) == 2, BUILDS

with subtest("what no cache has yet is waited for, and status says how much that is, and which"):
    commit("2")
    server.succeed("ekiben trigger app")
    lacks = "2 paths are in no cache yet: part, nixos-system-server-stand-in"
    waits("app", lacks)
    said = server.execute("runuser -u member -- ekiben status")[1], server.execute("runuser -u member -- ekiben status app")[1]
    assert f"app: waiting: {lacks}" in said[0] and f"  waiting   {lacks}" in said[1], said
    # a part of it
    system = build()
    fill(on_ci(f"cat {system}/other"))
    waits("app", "1 path is in no cache yet: nixos-system-server-stand-in")
    fill(system)
    ends("2")
    assert status(server, "app")["waiting"] is None and running(server) == system

with subtest("what is in no cache for long has failed, is not known to be bad, and is deployed when it is there"):
    commit("3")
    before = what_stays(server)
    for _ in range(2):
        ended = run(server, "hasty")
        assert (ended["result"], ended["stage"], ended["refused"]) == ("failed", "build", False), ended
        assert ended["error"] == ("Failed to fetch server: 2 paths are in no cache yet: part, nixos-system-server-stand-in; "
                                  "waited for 4 s, and nothing is built here"), ended
        assert status(server, "hasty")["bad"] is None and differences(before, what_stays(server)) == []
    fill(build())
    ended = run(server, "hasty")
    assert ended["result"] == "deployed" and shows(server, "app") == "3" and builds() == BUILDS, ended

with subtest("what nobody has signed whom this machine trusts is not taken, and what is wrong is said"):
    commit("4")
    fill(build(), key="")
    ended = run(server, "hasty")
    assert ended["result"] == "failed" and "sign" in ended["error"] and "waited for 4 s" in ended["error"], ended
    assert status(server, "hasty")["bad"] is None and builds() == BUILDS

with subtest("a cache that does not answer is waited for"):
    commit("5")
    fill(build())
    ci.succeed("systemctl stop web-8001")
    server.succeed("ekiben trigger app")
    waits("app", "unable to download")
    ci.succeed(f"systemd-run --unit=web-8001 --setenv=PATH=$PATH python3 /srv/web.py 8001 {CACHE}")
    ends("5")

with subtest("what is newer, and asked for, is not kept waiting by what no cache will ever have; a request alone changes nothing"):
    asked = "journalctl -b --sync > /dev/null 2>&1; journalctl -b -u ekiben-app -o cat | grep -c 'asking again in'"
    before = runs(server, "app")
    for content, ask in (("5b", "ekiben trigger app"), ("5d", "systemctl start ekiben-look@app.service")):
        commit(content.replace("b", "a").replace("d", "c"))
        server.succeed("systemd-run --unit=waiting ekiben trigger --wait app")
        waits("app", "in no cache yet")
        server.succeed(ask)
        count = int(server.succeed(asked))
        server.wait_until_succeeds(f"test $({asked}) -gt {count + 1}")
        assert runs(server, "app") == before and status(server, "app")["waiting"], status(server, "app")
        commit(content)
        server.wait_until_succeeds(f"test $(ekiben status app --json | jq '.app.runs | length') -gt {before}")
        waits("app", "in no cache yet")
        fill(build())
        ends(content)
        # whoever has asked for the other one has this
        server.wait_until_succeeds("systemctl show --property SubState --value waiting.service | grep -x dead")
        known = status(server, "app")
        assert [run["result"] for run in known["runs"][:2]] == ["deployed", "startedOver"] and known["bad"] is None, known
        assert known["well"] and server.succeed("systemctl show --property ExecMainStatus --value waiting.service").strip() == "0"
        before += 2

with subtest("what evaluation imports is not built here, either"):
    on_ci("touch imports")
    commit("6")
    server.succeed("ekiben trigger app")
    waits("app", "imports")
    system = build()
    imported = on_ci("ls -d /nix/store/*-imported")
    fill(system, imported)
    ends("6")
    server.succeed(f"test -e {imported}")

with subtest("a rollback does not wait for a cache"):
    commit("6a")
    server.succeed("ekiben trigger app")
    waits("app", "in no cache yet")
    server.succeed("timeout 60 ekiben rollback app")
    wait_until_at_rest(server, "app")
    known = status(server, "app")
    assert [run["result"] for run in known["runs"][:2]] == ["restored", "failed"] and known["bad"] is None, known
    assert "since a rollback has been asked for" in known["runs"][1]["error"] and shows(server, "app") == "5d", known

with subtest("what cannot be evaluated has failed at once"):
    # whatever is said
    on_ci("sed -i 's/trouble in evaluation/& of nix.settings.max-jobs/' system.nix")
    commit("7", trouble="evaluation")
    ended = run(server, "hasty")
    assert ended["result"] == "failed" and "trouble in evaluation of nix.settings.max-jobs" in ended["error"], ended
    assert status(server, "hasty")["bad"] is not None
    assert builds() == BUILDS
