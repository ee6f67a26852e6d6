start_all()
install(server)
forge.wait_for_unit("sshd.service")
SSH = "ssh://deploy@forge/srv/app"

# the inputs and the repository's upstream live on the forge, for whoever has the key
server.succeed(as_deploy("ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/id_ed25519"))
key = server.succeed("cat /home/deploy/.ssh/id_ed25519.pub").strip()
forge.succeed(as_deploy(f"mkdir -m 700 ~/.ssh; echo {shlex.quote(key)} > ~/.ssh/authorized_keys"))
forge.succeed(as_deploy("git config --global user.name Forge; git config --global user.email forge@localhost; git init -qb main /srv/app"))
publish(forge, "app", "2")
server.succeed(as_deploy("ssh-keyscan -t ed25519 forge > ~/.ssh/known_hosts"))


def use(url):
    """Has the repository take the input from somewhere else, as its user would: by a commit."""
    deploy(server, f"sed -i '/app = {{/,/url/s#url = .*#url = \"{url}\";#' flake.nix; nix flake lock; git commit -qam use")


with subtest("an input behind SSH is fetched with the user's key"):
    use(f"git+{SSH}")
    publish(forge, "app", "3")
    assert run(server, "app")["result"] == "deployed", status(server, "app")
    check_deployed(server, "app")
    assert shows(server, "app") == "3"

with subtest("the user's git configuration counts"):
    server.succeed(as_deploy("git config --global url.ssh://deploy@forge/.insteadOf ssh://short/"))
    use("git+ssh://short/srv/app")
    publish(forge, "app", "4")
    assert run(server, "app")["result"] == "deployed", status(server, "app")
    assert shows(server, "app") == "4"

with subtest("an input behind a password is fetched with the user's netrc"):
    python = forge.succeed("readlink -f $(command -v python3)").strip()
    forge.succeed("mkdir /srv/files", f"systemd-run --unit=files {python} /etc/scenario/files.py")
    forge.wait_for_open_port(8000)
    pack = "tar --exclude=.git -C /srv -czf /srv/files/app.tar.gz app"
    forge.succeed(pack)
    server.succeed(as_deploy("umask 077; echo machine forge login deploy password secret > ~/.netrc"))
    deploy(server, "sed -i '/app = {/,/url/s#url = .*#url = \"http://forge:8000/app.tar.gz\";#' flake.nix")
    deploy(server, "nix --netrc-file ~/.netrc flake lock; git commit -qam use")
    publish(forge, "app", "5")
    forge.succeed(pack)
    assert run(server, "app")["result"] == "deployed", status(server, "app")
    assert shows(server, "app") == "5"
    assert "secret" not in server.succeed("journalctl -u ekiben-app -o cat; ekiben status --json app")

with subtest("nothing of it needed root, and none of it is root's"):
    server.succeed("test -z \"$(find /home/deploy /var/nixos-config /var/lib/ekiben/instances/app ! -user deploy)\"")

with subtest("an upstream that is ahead is followed, and gets the lock commit"):
    forge.succeed(as_deploy("git init -q --bare -b main /srv/other/config.git"))
    deploy(server, "git remote add origin ssh://deploy@forge/srv/other/config.git; git push -qu origin main")
    clone = "cd /tmp; rm -rf clone; git clone -q /srv/other/config.git clone; cd clone"
    forge.succeed(as_deploy(f"{clone}; echo hello > greeting; git add .; git commit -qm greeting; git push -q"))
    greeting = forge.succeed(as_deploy("git -C /srv/other/config.git rev-parse main")).strip()
    publish(forge, "app", "6")
    forge.succeed(pack)
    ended = run(server, "follower")
    assert ended["result"] == "deployed", ended
    assert ended["summary"] == "pull, update app", ended
    check_deployed(server, "follower")
    assert deploy(server, "cat greeting; git rev-parse HEAD^") == f"hello\n{greeting}"
    assert deploy(server, "git log -1 --format='%an <%ae>'") == "Robot <robot@example.org>"
    assert forge.succeed(as_deploy("git -C /srv/other/config.git rev-parse main")).strip() == head(server)

with subtest("an edit that a pulled commit would overwrite stops the run"):
    forge.succeed(as_deploy(f"{clone}; echo bye > greeting; git commit -qam bye; git push -q"))
    deploy(server, "echo mine > greeting")
    before = digest(server)
    ended = run(server, "follower")
    assert ended["result"] == "failed" and "without touching your edits" in ended["error"], ended
    assert digest(server) == before
    deploy(server, "git checkout -q greeting")

with subtest("a branch that has gone another way than its upstream is left to its owner"):
    deploy(server, "git commit -q --allow-empty -m mine")
    before = digest(server)
    ended = run(server, "follower")
    assert ended["result"] == "failed" and "has other commits; merge or rebase them" in ended["error"], ended
    assert digest(server) == before
    deploy(server, "git reset -q --keep HEAD^")

with subtest("an upstream that cannot be pushed to is a warning"):
    forge.succeed("chmod -R a-w /srv/other/config.git/objects")
    deploy(server, "git rev-parse HEAD")
    publish(forge, "app", "7")
    forge.succeed(pack)
    ended = run(server, "follower")
    assert ended["result"] == "deployed", ended
    assert "Failed to push" in " ".join(ended["warnings"]), ended
    assert shows(server, "app") == "7"
