# At each landing a sample of all trials; `ci/sweep` names those that it wants, or none to have operations counted.
set_up(machine)
wanted = os.environ.get("TRIALS")
if wanted is None:
    with subtest("git changes the files, and cannot write the index"):
        failed = make(("update", "git", 2, act, "read-tree -m -u", "ekiben-app/index.lock") for act in ("ENOSPC", "EIO"))
        assert not failed, failed
    with subtest("a generation's link, or the profile's, cannot be made, or brought to its place"):
        failed = make(("update", "nix-env", number, "EIO", "--set", "profiles/system") for number in range(1, 4))
        assert not failed, failed
    with subtest("Nix cannot remove its lock of the profile, which it takes for removed from then on"):
        failed = make(("back", "nix-env", number, "EIO", "--switch-generation", "profiles/system.lock") for number in (1, 2, 3))
        assert not failed, failed
    with subtest("Nix cannot open what it locks, or a database, and says something else"):
        cases = (("nix-env", 1, "--set", "nix/var/nix/gc.lock"), ("nix-daemon", 2, "", "nix/var/nix/gc.lock"), ("nix", 1, "--out-link", "eval-cache-v5"))
        failed = make(("update", program, number, "EIO", words, path) for program, number, words, path in cases)
        assert not failed, failed
    with subtest("what the user's stages write cannot be written"):
        trials = (("ekiben", "EIO", "prepare app"), ("git", "ENOSPC", "commit-tree"), ("nix", "kill", "flake update"))
        failed = make(("update", program, 1, act, words) for program, act, words in trials)
        assert not failed, failed
    with subtest("a link of Nix's cannot be brought to its place, or the store cannot be asked: no root is left, and nothing is held against the candidate"):
        failed = make([("update", "nix-store", 2, "EIO", "--add-root", "gcroots/ekiben/"), ("update", "nix-store", 1, "kill", "--check-validity"),
                       ("update", "nix-store", 1, "EIO", "--add-root", "/gc.lock"), ("update", "nix", 2, "kill", "--out-link", "app/candidate")])
        assert not failed, failed
    with subtest("a root of the store cannot be removed once: no other stays for that, and it goes with the next run"):
        failed = make(("update", "ekiben", number, "EIO", "activate app", "gcroots/ekiben/app") for number in range(1, 4))
        assert not failed, failed
    with subtest("the metrics cannot be written once"):
        for number in range(2, 7):
            machine.fault("ekiben", number, "EIO", "metrics", "ekiben.prom")
            machine.succeed("rm -f /root/ekiben.prom; ekiben metrics /root/ekiben.prom", "grep last_run_success /root/ekiben.prom")
            assert machine.fault_met(), number
        machine.no_fault()
    with subtest("a request is taken, and that cannot be synced"):
        failed = make([("update", "ekiben", 1, "EIO", "begin", "lib/ekiben/queue")])
        assert not failed, failed
    with subtest("what is ours or git's in the repository is to go, and the disk fails once"):
        places = [("ekiben", number, ".git/ekiben-app") for number in range(36, 46)]
        places += [("ekiben", number, "/.git/index") for number in range(1, 4)] + [("git", number, ".lock") for number in range(4, 7)]
        words = {"ekiben": "candidate accept", "git": "fast-forward"}
        failed = make(("update", program, number, "EIO", words[program], path) for program, number, path in places)
        assert not failed, failed
    with subtest("what has become the branch stays it, whatever becomes of the push"):
        failed = make([("update", "git", 2, "read-only", "push --quiet", "refs/remotes/origin/main.lock")])
        assert not failed, failed
    with subtest("a git that is killed has not said no"):
        path = re.search(r"\bPATH=(\S+)", machine.succeed("systemctl show --property Environment ekiben-app.service"))[1]
        drop_in = "/run/systemd/system/ekiben-app.service.d"
        machine.succeed(f"mkdir -p /opt/killed {drop_in}; "
                        f"printf '[Service]\\nEnvironment=PATH=/opt/killed:{path}\\n' > {drop_in}/test.conf; systemctl daemon-reload")
        for question in ("symbolic-ref HEAD", "--verify --quiet HEAD:", "config --get branch.main.merge", "merge-base --is-ancestor"):
            before = prepare_trial(str(next(COUNT)))
            script = f"#!/bin/sh\ncase \"$*\" in *'{question}'*) kill -KILL $$;; esac\nexec {machine.succeed('command -v git').strip()} \"$@\"\n"
            machine.succeed(f"printf %s {shlex.quote(script)} > /opt/killed/git; chmod 755 /opt/killed/git")
            ended = run_asked()
            assert ended["result"] == "failed" and "git was ended by signal 9" in ended["error"], (question, ended)
            assert what_stays(machine) == before
        machine.succeed(f"rm -r /opt/killed {drop_in}; systemctl daemon-reload")
        succeed_after(" afterwards")
    failed = make(sample(operations(), ACTS, 100), may_miss=True)
    assert not failed, f"{len(failed)} trials failed: {failed}"
elif wanted == "":
    operations()
else:
    make(((kind, program, int(number), act) for kind, program, number, act in map(str.split, wanted.splitlines())), may_miss=True)
