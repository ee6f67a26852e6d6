# Some trials on each file system, all of them ended by a power cut.
counts = {}
for kind in ("btrfs", "ext4", "xfs"):
    with subtest(f"the power is cut, on {kind}"):
        machine.put_on_image(kind)
        set_up(machine)
        counts = counts or operations()
        failed = make(sample(counts, ["power-cut"], 25), may_miss=True)
        assert not failed, f"{len(failed)} trials failed: {failed}"
        machine.crash()
