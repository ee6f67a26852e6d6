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
# connections are shared, by a socket that no run could make
server.succeed(as_deploy("printf 'ControlMaster auto\\nControlPath ~/.ssh/%%C\\n' > ~/.ssh/config"))


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
    server.succeed(as_deploy("git config --global url.ssh://deploy@elsewhere/.insteadOf ssh://short/"))
    server.succeed(as_deploy("git config --global core.sshCommand \"ssh -o 'HostName forge' -o HostKeyAlias=forge\""))
    use("git+ssh://short/srv/app")
    publish(forge, "app", "4")
    assert run(server, "app")["result"] == "deployed", status(server, "app")
    assert shows(server, "app") == "4"
    server.succeed(as_deploy("git config --global --unset core.sshCommand"))

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
    assert ended["news"][0].startswith("app: ") and ended["news"][1:] == ["greeting"], ended
    assert "  new       greeting\n" in server.succeed("ekiben status follower")
    check_deployed(server, "follower")
    assert deploy(server, "cat greeting; git rev-parse HEAD^") == f"hello\n{greeting}"
    assert deploy(server, "git log -1 --format='%an <%ae>'") == "Robot <robot@example.org>"
    assert forge.succeed(as_deploy("git -C /srv/other/config.git rev-parse main")).strip() == head(server)

# on hosts alone
with subtest("a timer sees what is new upstream and in what inputs lead to, and writes nothing to the repository"):
    def looks():
        """What came of the runs that a timer's look had begin."""
        return [run["result"] for run in look(server, "follower")]

    looks()
    before = digest(server)
    assert looks() == [] and looks() == [] and digest(server) == before
    forge.succeed(as_deploy(f"{clone}; git commit -q --allow-empty -m empty; git push -q"))
    assert looks() == ["deployed"] and looks() == []
    publish(forge, "app", "7")
    forge.succeed(pack)
    assert looks() == ["deployed"] and looks() == []
    forge.succeed(as_deploy("git -C /srv/other/config.git update-ref refs/heads/main main^"))
    assert looks() == ["failed"] and "no longer has" in last_run(server, "follower")["error"], last_run(server, "follower")
    deploy(server, "git push -q origin HEAD:main")
    assert looks() == ["unchanged"] and looks() == []
    deploy(server, "git branch -q --unset-upstream")
    assert looks() == ["failed"] and looks() == ["failed"]
    deploy(server, "git branch -q -u origin/main")
    assert looks() == ["unchanged"] and looks() == []

# everywhere
with subtest("an edit that a pulled commit would overwrite stops the run"):
    forge.succeed(as_deploy(f"{clone}; echo bye > greeting; git commit -qam bye; git push -q"))
    deploy(server, "git config core.logAllRefUpdates always; echo mine > greeting")
    before = digest(server)
    ended = run(server, "follower")
    assert ended["result"] == "failed" and "without changing your edits" in ended["error"], ended
    assert digest(server) == before
    deploy(server, "git config --unset core.logAllRefUpdates; git checkout -q greeting")

with subtest("a branch that has gone another way than its upstream is left to its owner"):
    deploy(server, "git commit -q --allow-empty -m mine")
    before = digest(server)
    ended = run(server, "follower")
    assert ended["result"] == "failed" and f"and its upstream have diverged; merge or rebase them, as by git -C {REPOSITORY} pull --rebase" in ended["error"], ended
    assert digest(server) == before
    deploy(server, "git reset -q --keep HEAD^")

def push_upstream(change):
    """Has somebody push a commit to the repository's upstream; returns it."""
    return forge.succeed(as_deploy(f"{clone}; {change}; git add -A -f .; git commit -qm change; git push -q; git rev-parse HEAD")).strip()


# git's own program for HTTP, as a proxy has it
GIT_BEHIND_PROXY = """
import http.server
class Git(http.server.CGIHTTPRequestHandler):
    def parse_request(self):
        is_well = super().parse_request()
        self.path = self.path.removeprefix("http://git.invalid")
        return is_well
http.server.ThreadingHTTPServer(("", 3128), Git).serve_forever()
"""


def upstream_is():
    """Where the repository's upstream stands."""
    return forge.succeed(as_deploy("git -C /srv/other/config.git rev-parse main")).strip()


if is_host(server):
    with subtest("whatever changes upstream is followed, as git merge would"):
        push_upstream("mkdir -p d/e; echo x > d/x; echo y > d/e/y; ln -s greeting link; echo plain > plain; "
                      "printf x > \"$(printf 'odd\\377\\nname')\"")
        assert run(server, "follower")["result"] == "deployed", last_run(server, "follower")
        push_upstream("git rm -qr d link plain; echo d > d; mkdir -p link plain/a/b; echo z > link/z; echo x > plain/a/b/x; "
                      "printf y > \"$(printf 'odd\\377\\nname')\"")
        assert run(server, "follower")["result"] == "deployed", last_run(server, "follower")
        check_deployed(server, "follower")
        assert deploy(server, "cat d link/z plain/a/b/x; ls -A") == f"d\nz\nx\n{deploy(server, 'ls -A')}"

    with subtest("where a proxy leads to it, it is pushed to as well"):
        write(forge, "/tmp/git.py", GIT_BEHIND_PROXY)
        forge.succeed("mkdir -p /tmp/web/cgi-bin; ln -s /usr/lib/git-core/git-http-backend /tmp/web/cgi-bin/git",
                      as_deploy("git -C /srv/other/config.git config http.receivepack true"),
                      "systemd-run --unit=proxy --uid=deploy --working-directory=/tmp/web --setenv=GIT_PROJECT_ROOT=/srv/other "
                      f"--setenv=GIT_HTTP_EXPORT_ALL=1 {python} /tmp/git.py")
        forge.wait_for_open_port(3128)
        drop_in = "/run/systemd/system/ekiben-follower.service.d"
        server.succeed(f"mkdir -p {drop_in}; printf '[Service]\\nEnvironment=http_proxy=http://forge:3128 no_proxy=forge\\n' "
                       f"> {drop_in}/proxy.conf; systemctl daemon-reload")
        deploy(server, "git remote set-url origin http://git.invalid/cgi-bin/git/config.git")
        push_upstream("echo by > proxy")
        publish(forge, "app", "6a")
        forge.succeed(pack)
        ended = run(server, "follower")
        assert ended["result"] == "deployed" and not ended["warnings"] and upstream_is() == head(server), ended
        assert deploy(server, "cat proxy") == "by"
        deploy(server, "git remote set-url origin ssh://deploy@forge/srv/other/config.git")
        server.succeed(f"rm -r {drop_in}; systemctl daemon-reload")

    with subtest("a password that is not taken any more, and another server in the place of upstream, are said to be that"):
        forge.succeed("mkdir -p /srv/files/x.git/info; printf '<html>log in' > /srv/files/x.git/info/refs")
        deploy(server, "git remote set-url origin http://forge:8000/x.git")
        assert "or another server has answered" in (ended := run(server, "follower"))["error"], ended
        server.succeed(as_deploy("mv ~/.netrc ~/netrc; sed s/secret/old/ ~/netrc > ~/.netrc"))
        assert "now belongs into ~/.netrc of the instance's user" in (ended := run(server, "follower"))["error"], ended
        server.succeed(as_deploy("mv ~/netrc ~/.netrc"))
        deploy(server, "git remote set-url origin ssh://deploy@forge/srv/other/config.git")

    with subtest("a filter that is missing is found before the switch"):
        deploy(server, "git config filter.large.smudge 'no-such-program smudge'; git config filter.large.required true")
        push_upstream("echo '*.bin filter=large' > .gitattributes; echo pointer > x.bin")
        before = (digest(server), running(server), generation(server))
        ended = run(server, "follower")
        assert (ended["result"], ended["stage"]) == ("failed", "prepare") and "smudge filter large failed" in ended["error"], ended
        assert (digest(server), running(server), generation(server)) == before
        deploy(server, "git config filter.large.smudge 'sed s/pointer/contents/'; git config filter.large.clean 'sed s/contents/pointer/'")
        assert run(server, "follower")["result"] == "deployed", last_run(server, "follower")
        assert deploy(server, "cat x.bin; git status --porcelain") == "contents"

    with subtest("what upstream has withdrawn is an error, and is not pushed again"):
        push_upstream("echo secret > withdrawn")
        assert run(server, "follower")["result"] == "deployed", last_run(server, "follower")
        withdrawn = upstream_is()
        assert withdrawn == head(server)
        forge.succeed(as_deploy(f"{clone}; git reset -q --hard HEAD^; git push -qf"))
        for _ in range(2):
            before = (digest(server), running(server), generation(server), upstream_is())
            ended = run(server, "follower")
            assert (ended["result"], ended["stage"]) == ("failed", "prepare") and f"the upstream no longer has {withdrawn}" in ended["error"], ended
            assert (digest(server), running(server), generation(server), upstream_is()) == before
        # where nothing is remembered, what the user's git knows counts
        server.succeed("rm /var/lib/ekiben/instances/follower/upstream")
        deploy(server, "git update-ref refs/remotes/origin/main HEAD")
        assert "the upstream no longer has" in run(server, "follower")["error"]
        deploy(server, "git fetch -q; git reset -q --keep origin/main")
        ended = run(server, "follower")
        assert ended["result"] in ("deployed", "unchanged"), ended
        assert not deploy(server, "ls withdrawn 2> /dev/null || true") and upstream_is() == head(server)

    with subtest("a clone that fetches objects as git needs them is completed"):
        forge.succeed(as_deploy("git -C /srv/other/config.git config uploadpack.allowFilter true; "
                                "git -C /srv/other/config.git config uploadpack.allowAnySHA1InWant true"))
        server.succeed(f"mv {REPOSITORY} {REPOSITORY}.away; install -d -o deploy {REPOSITORY}")
        for options in ("--filter=blob:none --depth=1", "--filter=tree:0"):
            server.succeed(f"rm -r {REPOSITORY}; install -d -o deploy {REPOSITORY}")
            deploy(server, f"git clone -q {options} ssh://deploy@forge/srv/other/config.git .")
            push_upstream(f"echo {shlex.quote(options)} > new; mkdir -p deep/er; echo {shlex.quote(options)} >> deep/er/file")
            ended = run(server, "follower")
            assert ended["result"] == "deployed", (options, ended)
            assert deploy(server, "cat new; git status --porcelain") == options
        server.succeed(f"rm -r {REPOSITORY}; mv {REPOSITORY}.away {REPOSITORY}")

    with subtest("an sshd that has too many callers for a while is asked again"):
        ssh = "systemctl restart ssh 2> /dev/null || systemctl restart sshd"
        forge.succeed(f"echo 'MaxStartups 1:100:1' > /etc/ssh/sshd_config.d/scenario.conf; {ssh}")
        forge.wait_for_open_port(22)
        forge.succeed("systemd-run --quiet --unit=caller sh -c 'sleep infinity | nc localhost 22'")
        forge.wait_until_succeeds("pgrep -f 'sshd.*\\[accepted\\]|sshd.*\\[net\\]|sshd-auth'")
        push_upstream("echo patience > patience")
        follow(server, "follower")
        server.succeed("systemctl start --no-block ekiben-follower.service")
        wait_until_said(server, "follower", "trying again in 4 s")
        forge.succeed("systemctl stop caller")
        wait_until_idle(server, "follower")
        assert (seen := last_run(server, "follower"))["result"] == "deployed", seen
        assert deploy(server, "cat patience") == "patience"
        forge.succeed(f"rm /etc/ssh/sshd_config.d/scenario.conf; {ssh}")

    with subtest("a host key that is not the known one is said, and not tried again"):
        known = server.succeed(as_deploy("cat ~/.ssh/known_hosts; rm -f /tmp/other*; "
                                         "ssh-keygen -q -t ed25519 -N '' -f /tmp/other; "
                                         "echo forge $(cut -d' ' -f1,2 /tmp/other.pub) > ~/.ssh/known_hosts"))
        follow(server, "follower")
        ended = run(server, "follower")
        assert ended["result"] == "failed" and "Host key verification failed" in ended["error"], ended
        assert server.execute("journalctl -q -u ekiben-follower -o cat --after-cursor=$(cat /tmp/ekiben-follower) | "
                              "grep -F 'trying again'")[0] != 0
        server.succeed(as_deploy(f"printf %s {shlex.quote(known)} > ~/.ssh/known_hosts"))

with subtest("what is to be signed is deployed only if one of the signers has signed it"):
    server.succeed("install -m 600 -o deploy /etc/scenario/signer /etc/scenario/other /home/deploy")
    sign = "git -c gpg.format=ssh -c user.signingKey=/home/deploy/{} commit -S -q --allow-empty"

    def push_signed(text, how, change="true"):
        """Pushes a commit as another machine's user would."""
        deploy(server, "rm -rf /tmp/other; git clone -q ssh://deploy@forge/srv/other/config.git /tmp/other; cd /tmp/other; "
                       "git config user.name Other; "
               f"git config user.email other@localhost; echo {text} > signed; git add .; {how} -m {text}; {change}; git push -q")

    def refuses_unsigned(what):
        before = what_stays(server)
        ended = run(server, "signed")
        assert (ended["result"], ended["stage"]) == ("failed", "prepare") and what in ended["error"], ended
        assert not (seen := differences(before, what_stays(server))), seen

    # whatever the user's own settings say
    deploy(server, "git config gpg.ssh.allowedSignersFile ~/anybody; echo '*' $(ssh-keygen -y -f ~/other) > ~/anybody")
    deploy(server, "printf '#!/bin/sh\\necho \"[GNUPG:] GOODSIG 0 x\" >&2; echo \"[GNUPG:] TRUST_ULTIMATE\"\\n' > ~/anything; "
                   "chmod +x ~/anything")
    deploy(server, "for kind in gpg.program gpg.openpgp.program gpg.ssh.program; do git config --global $kind ~/anything; done")
    push_signed("unsigned", "git commit -q")
    refuses_unsigned("it is not signed")
    push_signed("by-another", "git -c gpg.ssh.program=ssh-keygen" + sign.format("other").removeprefix("git"))
    refuses_unsigned("signed by none of `signers`")
    # that key's time is over: one who has found it says that the commit is older
    backdated = "GIT_COMMITTER_DATE='1 Jun 2019 12:00' git -c gpg.ssh.program=ssh-keygen" + sign.format("other").removeprefix("git")
    push_signed("backdated", backdated)
    refuses_unsigned("signed by none of `signers`, or by one whose time is over")
    # signed by the signer, then changed
    forge_signature = "git cat-file commit HEAD | sed 's/^forged$/other words/' > /tmp/forged; git reset -q --hard $(git hash-object -t commit -w /tmp/forged)"
    push_signed("forged", "git -c gpg.ssh.program=ssh-keygen" + sign.format("signer").removeprefix("git"), forge_signature)
    refuses_unsigned("signed by none of `signers`")
    # a signature of his, but not of a commit: another namespace
    elsewhere = ("git cat-file commit HEAD > /tmp/plain; ssh-keygen -q -Y sign -n ekiben -f ~/signer < /tmp/plain > /tmp/plain.sig; "
                 "sed \"/^committer/r \"<(sed '1s/^/gpgsig /; 2,$s/^/ /' /tmp/plain.sig) /tmp/plain > /tmp/elsewhere; "
                 "git reset -q --hard $(git hash-object -t commit -w /tmp/elsewhere)")
    push_signed("elsewhere", "git commit -q", elsewhere)
    refuses_unsigned("signed by none of `signers`")
    push_signed("signed", "git -c gpg.ssh.program=ssh-keygen" + sign.format("signer").removeprefix("git"))
    publish(forge, "app", "8")
    forge.succeed(pack)
    ended = run(server, "signed")
    assert ended["result"] == "deployed" and shows(server, "app") == "8", ended
    # Ekiben's own commit is on top of that
    assert deploy(server, "git log -1 --format=%G?") == "N"
    assert run(server, "signed")["result"] == "unchanged"
    publish(forge, "app", "9")
    forge.succeed(pack)
    assert run(server, "signed")["result"] == "deployed" and shows(server, "app") == "9"
    # it stays that when it has been undone
    server.succeed("ekiben rollback signed")
    assert run(server, "signed")["result"] == "withheld" and shows(server, "app") == "8", last_run(server, "signed")
    publish(forge, "app", "9a")
    forge.succeed(pack)
    assert run(server, "signed")["result"] == "deployed" and shows(server, "app") == "9a", last_run(server, "signed")
    deploy(server, "git commit -q --allow-empty -m mine")
    refuses_unsigned("it is not signed")
    deploy(server, "git reset -q --hard HEAD^; git push -q; for kind in gpg.program gpg.openpgp.program gpg.ssh.program; "
                   "do git config --global --unset $kind; done")

with subtest("an upstream that cannot be pushed to is a warning"):
    forge.succeed("chmod -R a-w /srv/other/config.git/objects")
    deploy(server, "git rev-parse HEAD")
    publish(forge, "app", "7")
    forge.succeed(pack)
    ended = run(server, "follower")
    assert ended["result"] == "deployed", ended
    assert "Failed to push" in " ".join(ended["warnings"]), ended
    assert shows(server, "app") == "7"
