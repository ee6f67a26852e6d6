# At each landing a sample of all trials; `ci/sweep` names those that it wants, or none to have operations counted.
set_up(machine)
wanted = os.environ.get("TRIALS")
if wanted is None:
    with subtest("git changes the files, and cannot write the index"):
        failed = make(("update", "git", 2, act, "read-tree -m -u", "index.lock") for act in ("ENOSPC", "EIO"))
        assert not failed, failed
    with subtest("a generation's link, or the profile's, cannot be made, or brought to its place"):
        failed = make(("update", "nix-env", number, "EIO", "--set", "profiles/system") for number in range(1, 4))
        assert not failed, failed
    with subtest("a request is taken, and that cannot be synced"):
        failed = make([("update", "ekiben", 1, "EIO", "begin", "lib/ekiben/queue")])
        assert not failed, failed
    failed = make(sample(operations(), ACTS, 100))
    assert not failed, f"{len(failed)} trials failed: {failed}"
elif wanted == "":
    operations()
else:
    make((kind, program, int(number), act) for kind, program, number, act in map(str.split, wanted.splitlines()))
