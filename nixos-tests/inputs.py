start_all()
install(server)
server.wait_for_unit("sshd.service")
COUNT = iter(range(2, 1000))
CACHE = "/var/cache/ekiben/app"
server.succeed(
    "chown deploy /srv; echo 127.0.0.1 forge github.com api.github.com >> /etc/hosts",
    # a certificate that everything here trusts
    "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=forge -addext subjectAltName=DNS:github.com,DNS:api.github.com "
    "-keyout /srv/key -out /srv/certificate 2> /dev/null; chown deploy /srv/key; "
    "cat /srv/certificate >> /etc/ssl/certs/ca-certificates.crt",
    as_deploy("ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/id_ed25519; cp ~/.ssh/id_ed25519.pub ~/.ssh/authorized_keys"),
    as_deploy("ssh-keyscan -t ed25519 forge > ~/.ssh/known_hosts; git clone -q --bare /srv/app /srv/bare"),
    as_deploy("nix registry add app git://forge/app?ref=main; cp -r /srv/app/. /srv/plain; rm -rf /srv/plain/.git"),
)
RUN = "systemd-run --quiet --collect --uid=deploy --setenv=HOME=/home/deploy"
START = {
    "git-daemon": "$(git --exec-path)/git-daemon --export-all --base-path=/srv --listen=127.0.0.1 --reuseaddr /srv",
    "forge": "python3 /etc/scenario/forge.py /srv/certificate /srv/key",
}


def start(name):
    server.succeed(f"{RUN} --unit={name} -p AmbientCapabilities=CAP_NET_BIND_SERVICE {START[name]}")
    for port in {"git-daemon": [9418], "forge": [443, 8000]}[name]:
        server.wait_for_open_port(port)


def use(url):
    """Has the repository take the input from there, as its user would: by a commit."""
    url = url.replace("&", "\\&")
    deploy(server, f"sed -i '/app = {{/,/url/s#url = .*#url = \"{url}\";#' flake.nix; "
                   f"{'git diff --quiet || { nix flake lock; git commit -qam use; }'}")


def renew():
    """A new revision of the input, everywhere that it is served; returns what the system then says."""
    content = str(next(COUNT))
    publish(server, "app", content)
    server.succeed(as_deploy("git -C /srv/bare fetch -q /srv/app +refs/heads/*:refs/heads/*; cp /srv/app/* /srv/plain"))
    return content


def works(instance="app"):
    """Checks that what is new is deployed."""
    content = renew()
    ended = run(server, instance)
    assert ended["result"] == "deployed", ended
    assert shows(server, "app") == content, (shows(server, "app"), content)


def fails(message, instance="app"):
    """Checks that a run fails in its first stage and changes nothing."""
    before = digest(server), running(server)
    ended = run(server, instance)
    assert (ended["result"], ended["stage"]) == ("failed", "prepare"), ended
    assert message in ended["error"] + status(server, instance)["output"], (message, ended, status(server, instance)["output"])
    assert (digest(server), running(server)) == before
    return ended


for name in START:
    start(name)

GIT = ("stop the daemon", "systemctl stop git-daemon", lambda: start("git-daemon"), "unable to connect")
HTTP = ("stop the server", "systemctl stop forge", lambda: start("forge"), "connect")


def answers(code):
    return (f"the answer is {code}", f"echo {code} > /srv/answer", "rm /srv/answer", "")


def move(name):
    return ("moved away", f"mv /srv/{name} /srv/away", f"mv /srv/away /srv/{name}", "")


def hide(file, message):
    return (f"no {file}", f"mv /home/deploy/.ssh/{file} /root/hidden", f"mv /root/hidden /home/deploy/.ssh/{file}", message)


NO_NAME = ("no such name", "sed -i s/forge/other/ /etc/hosts", "sed -i s/other/forge/ /etc/hosts", "")
RENAMED = ("the branch has another name", as_deploy("git -C /srv/app branch -m main trunk"), as_deploy("git -C /srv/app branch -m trunk main"), "")
OTHER_KEY = ("another host key", "sed -i 's/ AAAA[^ ]*$/ AAAAC3NzaC1lZDI1NTE5AAAAIIJ5kg0Zg8m1pYV8JqkSxZb1m1Y3u5vYV0m5v3QZ1b9W/' /home/deploy/.ssh/known_hosts",
             as_deploy("ssh-keyscan -t ed25519 forge > ~/.ssh/known_hosts"), "Host key verification failed")
SSHD = ("sshd is down", "systemctl stop sshd", lambda: server.succeed("systemctl start sshd") and server.wait_for_open_port(22), "Connection refused")
BROKEN = {
    "git://forge/app?ref=main": [GIT, RENAMED, move("app"), NO_NAME],
    "git://forge/app": [GIT, NO_NAME],
    "git://forge/app?ref=main&shallow=1": [GIT],
    "git+ssh://deploy@forge/srv/app?ref=main": [SSHD, hide("known_hosts", "Host key verification failed"), OTHER_KEY,
                                                hide("authorized_keys", "Permission denied")],
    "git+http://forge:8000/git/app?ref=main": [HTTP, answers(401), answers(404), answers(500), RENAMED],
    "git+file:///srv/app": [move("app")],
    "git+file:///srv/bare?ref=main": [move("bare")],
    "http://forge:8000/files/app.tar.gz": [HTTP, answers(404), answers(500)],
    "path:/srv/plain": [move("plain")],
    "github:acme/app": [HTTP, answers(403), answers(500)],
    "flake:app": [GIT],
}

for url, ways in BROKEN.items():
    with subtest(f"what cannot be fetched has not been asked for: {url}"):
        use(url)
        works()
        for name, breaks, mends, message in ways:
            print(f"{url}: {name}")
            renew()
            server.succeed(breaks)
            print("   ", fails(message)["error"])
            mends() if callable(mends) else server.succeed(mends)
        works()

# listens instead of a server, and hangs up: PORT WAY
HANG_UP = """
import socket, sys
BEGINNINGS = {"22": b"SSH-2.0-x\\r\\n", "9418": b"00", "443": b"\\x16\\x03\\x03\\x00\\x7a\\x02", "8000": b"HTTP/1.1 200 OK\\r\\nContent-Length: 9\\r\\n\\r\\n0"}
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
while True:
    client, _ = listener.accept()
    try:
        if sys.argv[2] == "in mid-answer":
            client.sendall(BEGINNINGS[sys.argv[1]])
            client.recv(4096)
    except OSError:
        pass
    client.close()
"""
SERVERS = {
    "git://forge/app?ref=main": (9418, GIT),
    "git+ssh://deploy@forge/srv/app?ref=main": (22, SSHD),
    "git+http://forge:8000/git/app?ref=main": (8000, HTTP),
    "git+https://github.com/git/app?ref=main": (443, HTTP),
}

for url, (port, (_, stop, restart, _)) in SERVERS.items():
    with subtest(f"a server that hangs up for a while is asked again: {url}"):
        use(url)
        works()
        for way in ("at once", "in mid-answer"):
            content = renew()
            server.succeed(stop, f"systemd-run --quiet --collect --unit=hang-up python3 -c {shlex.quote(HANG_UP)} {port} '{way}'")
            server.wait_for_open_port(port)
            follow(server, "patient")
            server.succeed("systemctl start --no-block ekiben-patient")
            wait_until_said(server, "patient", "trying again in 1 s")
            server.succeed("systemctl stop hang-up")
            restart()
            wait_until_idle(server, "patient")
            assert last_run(server, "patient")["result"] == "deployed" and shows(server, "app") == content, (way, last_run(server, "patient"))

with subtest("what the network fails is tried again"):
    use("git://forge/app?ref=main")
    works()
    content = renew()
    server.succeed("systemctl stop git-daemon")
    follow(server, "patient")
    server.succeed("systemctl start --no-block ekiben-patient")
    wait_until_said(server, "patient", "trying again in 1 s")
    start("git-daemon")
    wait_until_idle(server, "patient")
    assert last_run(server, "patient")["result"] == "deployed" and shows(server, "app") == content
    server.succeed("systemctl stop git-daemon")
    fails("(3 attempts); this looks like a problem of the network", "patient")
    fails("unable to connect", "everything")
    start("git-daemon")
    works("everything")

with subtest("a server whose certificate has expired is to blame, and not what was to be built with what it has"):
    deploy(server, "sed -i '/other = {/,/url/s#url = .*#url = \"https://github.com/files/other.tar.gz\";#' flake.nix")
    publish(server, "other", next(COUNT))
    deploy(server, "nix flake lock; git commit -qam other")
    source = f"(builtins.getFlake \"git+file://{REPOSITORY}\").inputs.other.outPath"
    content = renew()
    server.succeed(
        f"nix-store --delete {deploy(server, f'nix eval --raw --impure --expr {shlex.quote(source)}')}",
        "cp -p /srv/certificate /srv/good; openssl req -x509 -key /srv/key -subj /CN=forge -addext subjectAltName=DNS:github.com "
        "-not_before 20200101000000Z -not_after 20210101000000Z -out /srv/certificate; systemctl stop forge",
    )
    start("forge")
    ended = run(server, "app")
    assert ended["stage"] == "build" and "was not OK (60)" in status(server, "app")["output"], (ended, status(server, "app")["output"])
    server.succeed("mv /srv/good /srv/certificate; systemctl stop forge")
    start("forge")
    # the timer would refuse what is known to be bad
    ended = run(server, "app")
    assert ended["result"] == "deployed" and shows(server, "app") == content, ended

with subtest("what a killed git or a power cut has left in the cache is in nobody's way"):
    locks = "refs/heads/main.lock packed-refs.lock HEAD.lock config.lock shallow.lock"
    server.succeed(f"cd {CACHE}/nix/gitv3; for place in */; do (cd $place; mkdir -p refs/heads; touch {locks}); done; chown -R deploy .")
    works()
    for damage in (
        f"rm {CACHE}/nix/gitv3/*/HEAD",
        f"for d in {CACHE}/nix/gitv3/*/; do mkdir -p $d/refs/heads; : > $d/refs/heads/main; done; chown -R deploy {CACHE}",
        f"find {CACHE}/nix/gitv3 -path '*/objects/*' -type f -exec truncate -s 0 {{}} +",
        f"for f in {CACHE}/nix/*.sqlite; do echo damaged > $f; done",
        # a clock that was wrong then
        f"find {CACHE} -exec touch -d tomorrow {{}} +",
    ):
        server.succeed(damage)
        works()

with subtest("a git that is killed while it fetches"):
    server.succeed("mkdir -p /run/systemd/system/ekiben-app.service.d /opt/bin",
        "printf '#!/bin/sh\\ncase \"$*\" in *\" fetch \"*) : > refs/heads/main.lock; kill -9 $$ ;; "
        "esac\\nexec /usr/bin/git \"$@\"\\n' > /opt/bin/git; chmod +x /opt/bin/git",
                   "printf '[Service]\\nEnvironment=PATH=/opt/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\\n' "
                    "> /run/systemd/system/ekiben-app.service.d/git.conf; systemctl daemon-reload")
    renew()
    fails("Failed to update app")
    server.succeed("rm -r /run/systemd/system/ekiben-app.service.d; systemctl daemon-reload")
    works()

with subtest("a name that is no input's"):
    fails('Failed to update ap: the flake has no input "ap"; expected one of app, other', "typo")
    fails('Failed to update alias: the flake has no input "alias"', "alias")

with subtest("an input that follows another is updated by updating that"):
    server.succeed(as_deploy("git init -qb main /srv/lib; echo 1 > /srv/lib/content; git -C /srv/lib add .; git -C /srv/lib commit -qm 1"))
    flake = '{ inputs.lib = { url = "git+file:///srv/lib"; flake = false; }; outputs = _: { }; }'
    server.succeed(as_deploy(f"cd /srv/app; echo {shlex.quote(flake)} > flake.nix; git add .; nix flake lock; git add .; "
                             "git commit -qm flake"))
    deploy(server, "sed -i '0,/flake = false;/s///; s/  outputs =/  inputs.alias.follows = \"app\\/lib\";\\n  outputs =/; "
                   "s/      app,/      app,\\n      alias,/' flake.nix; nix flake update app; git commit -qam follow")
    works()
    locked = 'jq -r ".nodes.lib.locked.rev, .nodes.app.locked.rev" flake.lock'
    for instance in ("alias", "nested"):
        old = deploy(server, locked).split()
        new = server.succeed(as_deploy(f"cd /srv/lib; echo {instance} > content; git commit -qam new; git rev-parse HEAD")).strip()
        ended = run(server, instance)
        assert ended["result"] == "deployed", ended
        assert deploy(server, locked).split() == [new, old[1]]
    server.succeed(as_deploy("echo edited > /srv/lib/content"))
    fails("git+file:///srv/lib has uncommitted changes; commit them", "alias")
    server.succeed(as_deploy("git -C /srv/lib checkout -q ."))

with subtest("no secret of an input's URL, and no access token, is shown"):
    use("git+http://me:geheim@forge:8000/git/app?ref=main")
    works()
    server.succeed("echo 404 > /srv/answer")
    said = fails("")["error"]
    server.succeed("rm /srv/answer")
    assert "forge:8000" in said, said
    server.succeed(as_deploy("mkdir -p ~/.config/nix; echo 'access-tokens forge=geheim' > ~/.config/nix/nix.conf"))
    assert "access-tokens ***" in fails("syntax error")["error"]
    server.succeed(as_deploy("rm ~/.config/nix/nix.conf"), "journalctl --sync")
    found = server.execute("{ grep -rh geheim /var/lib/ekiben/status /var/lib/ekiben/instances/app/notes.json || true; "
                           "ekiben status || true; ekiben status --json || true; journalctl -q -o cat -u 'ekiben*'; "
                           "} | grep geheim")
    assert found[0] != 0, found[1]
    works()

with subtest("a user whom the Nix daemon does not let in"):
    server.succeed("cp /etc/nix/nix.conf /root/nix.conf; echo 'allowed-users = root' >> /etc/nix/nix.conf; systemctl restart nix-daemon")
    assert "does not let deploy in; add that to nix.settings.allowed-users" in fails("", "patient")["error"]
    server.succeed("cp /root/nix.conf /etc/nix/nix.conf; systemctl restart nix-daemon")
    works()

with subtest("a flake in a directory of its repository"):
    deploy(server, "mkdir hosts; git mv $(git ls-files | cut -d/ -f1 | sort -u) hosts; echo note > note; git add note; git commit -qm below")
    works("below")
    assert deploy(server, "git show --name-only --format=; git status --short").split() == ["hosts/flake.lock"]
    renew()
    deploy(server, "echo >> hosts/flake.lock")
    fails("hosts/flake.lock: it has uncommitted changes", "below")
    deploy(server, "git restore hosts; echo mine > note")
    assert run(server, "below")["result"] == "deployed"
    assert deploy(server, "git show --name-only --format=; cat note").split() == ["hosts/flake.lock", "mine"]
