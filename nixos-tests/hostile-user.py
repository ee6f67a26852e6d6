machine.start()
install(machine)
COUNT = iter(range(2, 1000))
OWN = "/var/lib/ekiben/instances/app"
machine.succeed("install -m 600 /dev/null /root/secret; echo top-secret-words > /root/secret")


def owned_by_root():
    """Everything of root's, but for what lives by itself, with its time and contents."""
    places = "/etc /root /usr /boot /nix/var/nix/profiles /nix/var/nix/gcroots /var/lib/ekiben"
    ours = "-path /var/lib/ekiben/status -o -path /var/lib/ekiben/instances -o -path /nix/var/nix/gcroots/auto -o -path /root/.cache"
    return machine.succeed(f"find {places} -xdev \\( {ours} \\) -prune -o ! -type d -printf '%p %U %m %T@ %s %l\\n' 2>/dev/null | sort | sha256sum || true")


def state():
    return owned_by_root(), generation(machine), running(machine), shows(machine, "app")


def attempt(point, command, words, trouble="none"):
    """Has the user do something while a run is held; the run has to fail, and nothing to change."""
    publish(machine, "app", str(next(COUNT)), trouble=trouble)
    before = state()
    if point:
        hold(machine, point)
        follow(machine, "app")
        machine.succeed("ekiben trigger app")
        wait_until_said(machine, "app", f"Held at {point}.")
        machine.succeed(as_deploy(command))
        go_on(machine, point)
    else:
        machine.succeed(as_deploy(command))
        machine.succeed("ekiben trigger app")
    machine.wait_until_succeeds("test ! -e /var/lib/ekiben/queue/app -a ! -e /var/lib/ekiben/runs/app.json", timeout=60)
    wait_until_idle(machine, "app")
    ended = last_run(machine, "app")
    assert ended["result"] == "failed" and words in ended["error"], ended
    assert state() == before
    machine.fail("grep -r top-secret /var/lib/ekiben/status /var/nixos-config", "journalctl -o cat -u ekiben-app | grep top-secret")


def works():
    """The next run is as if nothing had been."""
    publish(machine, "app", str(next(COUNT)))
    assert run(machine, "app")["result"] == "deployed", last_run(machine, "app")
    check_deployed(machine, "app")


NOT_A_SYSTEM = machine.succeed(as_deploy("echo plain > /tmp/plain; nix-store --add /tmp/plain")).strip()
INVALID = "/nix/store/00000000000000000000000000000000-nixos-system-machine"


def store_path(make):
    """What makes `candidate` a link to a store path that the user has made; /tmp/evil leaves a trace where root runs it."""
    return f"made=/tmp/made; rm -rf $made; {make}; ln -sfn $(nix-store --add $made) candidate"


machine.succeed(as_deploy(
    "mkdir -p /tmp/evil/bin; touch /tmp/evil/init /tmp/evil/nixos-version; "
    "printf '#!/bin/sh\\ntouch /tmp/root-ran-it\\n' > /tmp/evil/bin/switch-to-configuration; chmod +x /tmp/evil/bin/*"
))

CANDIDATES = (
    ("a path outside of the store", "ln -sfn /tmp/evil candidate", "not a store path"),
    ("a way out of the store", "ln -sfn /nix/store/../../tmp/evil candidate", "not a store path"),
    ("a path below a store path", "ln -sfn $(readlink /run/current-system)/etc candidate", "not a store path"),
    ("a store path that is not there", f"ln -sfn {INVALID} candidate", "is not valid"),
    ("a store path that is no system", f"ln -sfn {NOT_A_SYSTEM} candidate", "not a directory"),
    ("a store path that is a link out of the store", store_path("ln -s /tmp/evil $made"), "not a directory"),
    ("a store path that is a link to a system", store_path("ln -s $(readlink /run/current-system) $made"), "not a directory"),
    ("a system whose program is outside", store_path("cp -r /tmp/evil $made; ln -sf /tmp/evil/bin/switch-to-configuration $made/bin/"),
     "leads out of the store"),
    ("a system whose programs are outside", store_path("cp -r /tmp/evil $made; rm -r $made/bin; ln -s /tmp/evil/bin $made/bin"), "leads out of the store"),
    ("a system by way of a link outside",
     store_path("cp -r /tmp/evil $made; ln -sfn $(readlink /run/current-system) /tmp/way; ln -sf /tmp/way/init $made/init"),
     "leads out of the store"),
    ("a link to a link", "ln -sfn $(readlink candidate) /tmp/link; ln -sfn /tmp/link candidate", "not a store path"),
    ("an argument", "ln -sfn -- --delete candidate", "not a store path"),
    ("a file", "rm candidate; echo /run/current-system > candidate", "Failed to read the candidate"),
    ("a FIFO", "rm candidate; mkfifo candidate", "Failed to read the candidate"),
    ("a directory", "rm candidate; mkdir candidate", "Failed to read the candidate"),
    ("nothing", "rm candidate", "Failed to read the candidate"),
)


def edited(change):
    return f"jq {shlex.quote(change)} notes.json > notes.new; mv notes.new notes.json"


NOTES = (
    ("a link to a secret", "ln -sfn /root/secret notes.json", "Failed to read"),
    ("a FIFO", "rm notes.json; mkfifo notes.json", "not a regular file"),
    ("a directory", "rm notes.json; mkdir notes.json", "not a regular file"),
    ("endless", "rm notes.json; truncate -s 10G notes.json", "it is sparse"),
    ("no JSON", "echo '{' > notes.json", "Failed to read"),
    ("of another run", edited(f'.run = "{32 * "0"}"'), "there is no proposal"),
    ("of no run", edited('.run = ".."'), "expected the identifier of a run"),
    ("of another commit", edited(f'.proposal.commit = "{40 * "0"}"'), "Failed to"),
    ("of no commit", edited('.proposal.commit = "--help"'), "expected the name of a git object"),
    ("of no branch", edited('.proposal.branch = "--force"'), "expected a branch"),
    ("of a stage of root's", edited('.stage = "conclude"'), "not valid for this stage"),
)
for name, file, cases in (("candidate is", "candidate", some(machine, CANDIDATES, 2)), ("notes are", "notes.json", some(machine, NOTES, 1))):
    for what, make, words in cases:
        with subtest(f"the {name} {what}"):
            attempt("activate: begun", f"cd {OWN}; {make}", words)
            machine.succeed(as_deploy(f"rm -rf {OWN}/{file}"), "test ! -e /tmp/root-ran-it")

# on hosts alone
with subtest("what the notes say does not forge the journal, or steer a terminal"):
    forged = "a\nekiben: forged line\x1b[2J"
    failure = {"stage": "build", "message": forged, "tail": [forged], "transient": False}
    command = f"cd {OWN}; " + edited(f".failure = {json.dumps(failure)} | .proposal = null")
    attempt("activate: begun", command, "")
    machine.fail("journalctl -u ekiben-app -o cat | grep '^ekiben: forged'", "(ekiben status app || true) | grep -P '\\x1b'",
                 "(ekiben status app || true) | grep '^ekiben: forged'")

for place in ("flake.lock", "index", "notes.json", "candidate"):
    with subtest(f"{place} in the state directory is a link to root's file"):
        machine.succeed(as_deploy(f"cd {OWN}; rm -rf {place}; ln -s /root/secret {place}"))
        works()
        machine.succeed("grep top-secret /root/secret")
    with subtest(f"{place} in the state directory is a FIFO"):
        machine.succeed(as_deploy(f"cd {OWN}; rm -rf {place}; mkfifo {place}"))
        works()

# everywhere
with subtest("flake.lock of the repository is a link"):
    deploy(machine, "cp flake.lock /tmp/flake.lock; ln -sf /root/secret flake.lock; git commit -qam link")
    attempt(None, "true", "is not a regular file")
    deploy(machine, "git reset -q --hard HEAD~1")
    deploy(machine, "rm flake.lock; mkfifo flake.lock")
    attempt(None, "true", "is not a regular file")
    deploy(machine, "rm flake.lock; git restore flake.lock")
    works()

with subtest("the user can write neither the queue nor what root says"):
    for path in ("queue/app", "queue/x", "runs/app.json", "status/app.json", "status/x", "instances/x", "x"):
        machine.fail(as_deploy(f"echo x > /var/lib/ekiben/{path}"))
    machine.fail(as_deploy("flock --nonblock /run/ekiben/turn true"), as_deploy("ls /run/ekiben"))
    machine.fail(as_deploy("mv /var/lib/ekiben/instances/app /var/lib/ekiben/instances/away"), as_deploy("ls /var/lib/ekiben/runs"))

with subtest("root runs nothing of the repository's: hooks, monitor, filters, configuration, flake"):
    spy = "id -u >> /tmp/spy"
    hooks = "post-checkout post-commit reference-transaction pre-push post-merge post-index-change post-rewrite update pre-auto-gc"
    deploy(
        machine,
        f"touch /tmp/spy; chmod 666 /tmp/spy; printf '#!/bin/sh\\n{spy}\\n' | tee /tmp/spy.sh > /tmp/filter.sh; "
        "echo cat >> /tmp/filter.sh; chmod +x /tmp/*.sh; "
        f"for hook in {hooks}; do cp /tmp/spy.sh .git/hooks/$hook; done; "
        "git config core.fsmonitor /tmp/spy.sh; git config core.pager /tmp/spy.sh; git config core.sshCommand /tmp/spy.sh; "
        "git config filter.spy.clean /tmp/filter.sh; git config filter.spy.smudge /tmp/filter.sh; "
        "echo '* filter=spy' > .git/info/attributes; git config --global alias.rev-parse '!/tmp/spy.sh'; : > /tmp/spy",
    )
    works()
    machine.fail("grep -x 0 /tmp/spy")
    # the user's own git does run what is left of them, as the user
    assert "1000" in machine.succeed("cat /tmp/spy")
    assert machine.succeed(f"find {REPOSITORY} /home/deploy {OWN} -user root") == ""
