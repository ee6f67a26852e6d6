# Trials: a trial is a run in which one file operation of one program goes wrong. What the scenarios share that make some.
# ruff: noqa
import os
import random
import re
import subprocess
import time

# kind of run -> the programs whose operations go wrong in it; the first succeeds, the second goes back when
# all but the boot loader is changed
KINDS = {"update": ("ekiben", "git", "nix", "nix-env", "nix-store", "nix-daemon"), "back": ("ekiben", "git", "nix-env")}
# what happens to one operation; what the disk is from then on; what befalls the machine while the program is held
OF_ONE = ("kill", "ENOSPC", "EIO")
OF_THE_DISK = ("full", "read-only")
ACTS = (*OF_ONE, *OF_THE_DISK, "stop", "kill-all", "crash")
COUNT = iter(range(2, 100000))

def prepare_trial(content, kind="update"):
    """Something new in the input and in the upstream; returns how things are now."""
    publish(machine, "app", content, trouble="boot-loader" if kind == "back" else "none")
    machine.succeed(as_deploy(f"""
        # its git may have been the one that was killed; the upstream is somebody else's to mend
        find /srv/upstream.git -name '*.lock' -delete
        cd /srv/clone; git fetch -q {REPOSITORY} main; git reset -q --hard FETCH_HEAD
        # a file becomes a directory with directories in it, a link a directory; the next time it is the other way round
        if [ -d shape ]; then rm -r shape; echo {content} > shape; else rm -f shape; mkdir -p shape/a/b; touch shape/x shape/a/b/x; fi
        if [ -L link ]; then rm link; mkdir link; touch link/x; else rm -rf link; ln -s top link; fi
        echo {content} | tee top > new-{content}; rm -f $(ls new-* | head -n -3)
        git add .; git commit -qm 'upstream {content}'; git push -qf origin HEAD:main
    """))
    return what_stays(machine)


def ask():
    """Asks for a run as the webhook does, without Ekiben's program; returns the request's number. A power cut may bring
    the other name of the file back, which is therefore not in the queue."""
    return int(machine.succeed("cd /var/lib/ekiben; n=$(date +%s%3N); printf $n > .asked; sync .asked; ln .asked queue/app; sync queue; "
                               "rm .asked; echo $n"))


def run_asked():
    """A run by a request; returns how it ended."""
    ask()
    wait_until_at_rest(machine, "app")
    return last_run(machine, "app")


def befall(act):
    """What befalls the machine while a program is held."""
    if act in ("crash", "power-cut"):
        machine.crash() if act == "crash" else machine.cut_power()
        machine.start()
        return
    command = "stop --no-block" if act == "stop" else "kill --kill-whom=all --signal=KILL"
    machine.succeed(f"systemctl {command} ekiben-app.service")
    # if it is none of the unit's
    machine.let_go()


def faulty_run(program, number, act, words="", path=""):
    """Has a run with the fault; returns the request's number, and what went wrong."""
    held = act not in OF_ONE + OF_THE_DISK
    if act == "power-cut":
        # what others had written before
        machine.succeed("sync --file-system /")
    machine.succeed("journalctl -q -n 1 -o cat --output-fields= --show-cursor | sed -n 's/^-- cursor: //p' > /tmp/asked")
    machine.fault(program, number, "hold" if held else act, words, path)
    asked = ask()
    met = ""
    if act not in OF_ONE:
        retry("a fault, or the end", lambda: machine.fault_met() or machine.execute(at_rest("app"))[0] == 0, 60)
        met = machine.fault_met()
    if held and met:
        befall(act)
    elif met:
        # as far as it comes, which may be that it tries again and again; then somebody sees to the disk
        machine.wait_until_succeeds("systemctl show --property ActiveState ekiben-app.service | grep -E 'inactive|failed' || "
                                    "journalctl -q -u ekiben-app -o cat --after-cursor=$(cat /tmp/asked) | grep -F 'trying again in 4 s'", timeout=60)
        machine.no_fault()
    wait_until_at_rest(machine, "app", timeout=120)
    met = met or machine.fault_met()
    machine.no_fault()
    return asked, met


def left(but="none"):
    """What has been left behind, for others to stumble over or for ever."""
    return machine.execute("set +e; cd /var/lib/ekiben; ls -A runs queue | grep -vE '^$|:$'; ls -d /nix/var/nix/gcroots/ekiben/* 2> /dev/null; "
                           f"find . -path {but} -prune -o '(' -name '*.lock' ! -name flake.lock -o -name '*.new' -o -name '*.tmp-*' ')' -print")[1].split()


def judge(kind, content, before, asked, act, met):
    """Which end it is; fails if it is neither, or is reported wrongly."""
    after = what_stays(machine)
    known = status(machine, "app")
    ended = known["runs"][0]
    # systemd holds against a unit that a process of it was killed, however it went on
    machine.succeed("systemctl reset-failed ekiben-app.service")
    assert known["served"] >= asked, f"lost: the request {asked}, {known['served']} is served"
    assert known["running"] is None, f"misreported: {known['running']} is running"
    # what nobody could remove, what was being written and what is the user's goes with the next run
    behind = [name for name in left("./instances") if not name.endswith(".new") and name not in met.split()] if act not in OF_THE_DISK else []
    assert not behind, f"left behind: {behind}"
    # but what took the machine down
    blamed = known["bad"] if kind == "update" else None
    assert not blamed or "went down" in blamed["error"], f"held against the candidate: {blamed}"
    if after == before:
        assert ended["started"] >= asked // 1000 and ended["result"] in ("failed", "rolledBack") and ended["error"], f"misreported: {ended}"
        assert known["deployed"] is None or known["deployed"]["commit"] == head(machine), f"misreported: {known['deployed']}"
        return "old"
    assert after["shows"].split()[0] == content and kind == "update", "neither end: {}\n{}".format(ended, "\n".join(differences(before, after)))
    check_deployed(machine, "app")
    # after a boot the run is concluded, and another one looks what is new
    told = next(run for run in known["runs"] if run["result"] != "unchanged")
    assert told["result"] == "deployed" and told["commit"] == head(machine), f"misreported: {told}"
    changed = [line for line in differences(before, after)
               if re.search(r"(lock|ekiben)", line) and line.startswith("repository: +") and "flake.lock" not in line]
    assert not changed, f"left behind: {changed}"
    pushed = machine.succeed(as_deploy("git -C /srv/upstream.git rev-parse main")).strip() == head(machine)
    assert pushed or told["warnings"], "misreported: not pushed, and not said"
    return "new"


def succeed_after(why):
    """The next run has to deploy."""
    content = str(next(COUNT))
    prepare_trial(content)
    ended = run_asked()
    assert ended["result"] == "deployed" and shows(machine, "app") == content, f"wedged{why}: {ended}"
    assert not left(), f"left behind{why}: {left()}"
    check_deployed(machine, "app")


def repair():
    """What an administrator would do, so that the next trial has a chance."""
    deploy(machine, "find .git -name '*.lock' -delete; rm -rf .git/ekiben-*; git reset -q --hard; git clean -fdqx")
    machine.succeed("find /var/lib/ekiben/instances /var/cache/ekiben -name '*.lock' ! -name flake.lock -delete",
                    "rm -f /var/lib/ekiben/runs/*; systemctl reset-failed; systemctl restart ekiben-app.path")
    prepare_trial(str(next(COUNT)))
    if run_asked()["result"] != "deployed":
        # from what there is now
        deploy(machine, "nix flake update app; git commit -qam repaired")
        rebuild(machine)
        succeed_after(", repaired by hand")


def trial(kind, program, number, act, words="", path=""):
    """Makes one trial, of all operations or of some: see `Machine.fault`; returns how it ended, and what was wrong with
    that."""
    content = str(next(COUNT))
    before = prepare_trial(content, kind)
    met, end = "", "failed"
    try:
        asked, met = faulty_run(program, number, act, words, path)
        end = judge(kind, content, before, asked, act, met) if met else "unmet"
        # the next trial begins where nothing is held against a candidate
        if end == "old" or kind == "back" or left():
            succeed_after(" afterwards")
        return end, ""
    except (AssertionError, Exception) as failure:
        machine.no_fault()
        said = machine.execute("journalctl -q -u ekiben-app -o cat -n 12")[1]
        problem = f"{failure}\n  at: {met}\n  journal: {said}".replace("\n", "\n    ")
        machine.execute("systemctl kill --kill-whom=all --signal=KILL ekiben-app.service")
        wait_until_at_rest(machine, "app", timeout=120)
        repair()
        return "FAILED", problem


def operations():
    """How many operations each program makes in a run of each kind: (kind, program) -> number."""
    counts = {}
    for kind, programs in KINDS.items():
        for program in programs:
            prepare_trial(str(next(COUNT)), kind)
            machine.fault(program, 0, "kill")
            ended = run_asked()
            counts[kind, program] = machine.no_fault()
            assert ended["result"] == ("rolledBack" if kind == "back" else "deployed"), ended
            print(f"operations: {kind} {program} {counts[kind, program]}", flush=True)
    succeed_after(", counted")
    return counts


def set_up(host):
    """Makes a host the one that trials are made on."""
    global machine
    machine = host
    machine.start()
    install(machine)
    machine.succeed("install -d -o deploy /srv/upstream.git /srv/clone")
    # which is not what the trials are about: git does not sync all that it has received
    machine.succeed(as_deploy("git init -q --bare -b main /srv/upstream.git; git -C /srv/upstream.git config core.fsync all"))
    deploy(machine, "git remote add origin /srv/upstream.git; git push -qu origin main")
    machine.succeed(as_deploy("git clone -q /srv/upstream.git /srv/clone"))
    succeed_after(" at first")


def sample(counts, acts, seconds):
    """Some trials, for so many seconds: other ones for each commit."""
    seed = os.environ.get("SEED") or subprocess.run(["git", "-C", PROJECT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(f"these are the trials of SEED={seed}", flush=True)
    chosen = random.Random(f"{seed} {machine.kind}")
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        kind, program = chosen.choice(list(counts))
        yield kind, program, chosen.randint(1, counts[kind, program]), chosen.choice(acts)


def make(trials, may_miss=False):
    """Makes trials, and says how each ended; returns those that did not end well, or whose operation was not met if it
    must be."""
    failed = []
    for each in trials:
        began = time.monotonic()
        end, problem = trial(*each)
        print("trial:", *each, "->", end, f"in {time.monotonic() - began:.1f} s", problem and f"\n    {problem}", flush=True)
        if problem or end == "unmet" and not may_miss:
            failed.append(each)
    return failed
