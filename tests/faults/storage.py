"""Disks that are full or read-only, two jobs in one folder, checkpoints that are cut off."""

import contextlib
import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from bench import LIMIT, Bench, Results, checked, fresh, is_message, is_over, output_of, wait_until
from kills import contents
from spawn import Ranks, start

FULL = ("No space left on device", "disk is full")
READ_ONLY = "Read-only file system"
FREE = (0, 4, 12, 24, 40, 64, 96, 160, 1024)
"""KiB that are free once a run has begun; one of the demo leaves some 200."""
ENOUGH_TO_START = 80_000
"""KiB: a run refuses to start where a few checkpoints would not fit."""


def full_disks(bench: Bench, moments: int) -> Results:
    """Let each command write to a disk with little room; then make room and go on."""
    run, sizes = bench.truth("one process"), FREE[:: 1 if moments >= 30 else 4]
    for free in sizes:
        yield checked("disk full", f"training, {free} KiB", lambda f=free: _full_run(bench, f))
    for name, argv in _commands(bench, run).items():
        for free in (0, 16):
            where = f"{name}, {free} KiB"
            yield checked(
                "disk full", where, lambda n=name, a=argv, f=free: _full_command(bench, n, a, f)
            )


def _full_run(bench: Bench, free: int) -> str:
    with disk(bench, "full-disk") as mount:
        fill(mount / "ballast", ENOUGH_TO_START)
        ranks = bench.begin("one process", mount / "run")
        wait_until(lambda: is_over("loading", mount / "run"), ranks)
        fill(mount / "more", free)
        statuses = ranks.wait(120)
        _require_refused(ranks, statuses, FULL)
        (mount / "more").unlink()
        difference = bench.resumed("one process", mount / "run")
        assert not difference, difference
        return f"{'refused' if any(statuses) else 'enough room'}; then bit for bit"


def _full_command(bench: Bench, name: str, argv: Sequence[str], free: int) -> str:
    with disk(bench, "full-disk") as mount:
        fill(mount / "ballast", free)
        ranks = start([*argv, str(mount / name)], 1, bench.new_log(name))
        statuses = ranks.wait(LIMIT)
        _require_refused(ranks, statuses, FULL)
        (mount / "ballast").unlink()
        again = start([*argv, str(mount / name)], 1, bench.new_log(name))
        # What had room enough the first time is there already.
        assert any(statuses) is (again.wait(LIMIT) == [0]), again.tails()
        return "refused; with room it works" if any(statuses) else "enough room"


def read_only_disks(bench: Bench, moments: int) -> Results:
    """Let each command write to a read-only folder; a run also to one that becomes read-only."""
    run = bench.truth("one process")
    flags = ["launch/train.py", *bench.flags("one process", Path("unused"))]
    position = flags.index("--output_dir")
    train = [*flags[:position], *flags[position + 2 :], "--output_dir"]
    for name, argv in {"training": train, **_commands(bench, run)}.items():
        yield checked("read-only", name, lambda n=name, a=argv: _read_only(bench, n, a))
    for phase in ("checkpoint", "routers"):
        yield checked("read-only", f"from a {phase} on", lambda p=phase: _turned(bench, p))


def _read_only(bench: Bench, name: str, argv: Sequence[str]) -> str:
    with disk(bench, "read-only") as mount:
        subprocess.run(["mount", "-o", "remount,ro", str(mount)], check=True)
        ranks = start([*argv, str(mount / name)], 1, bench.new_log(name))
        statuses = ranks.wait(LIMIT)
        assert statuses == [2], f"ends with {statuses}\n{ranks.tails()}"
        _require_refused(ranks, statuses, (READ_ONLY,))
        return "refused"


def _turned(bench: Bench, phase: str) -> str:
    """Make the folder of a run read-only once its first `phase` files are there."""
    folder = fresh(bench, f"turned-{phase}")
    folder.mkdir()
    pattern = {"checkpoint": "step_*/COMPLETE", "routers": "step_000006/COMPLETE"}[phase]
    ranks = bench.begin("one process", folder)
    wait_until(lambda: any(folder.glob(pattern)), ranks)
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
        statuses = ranks.wait(LIMIT)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
    _require_refused(ranks, statuses, (READ_ONLY,))
    difference = bench.resumed("one process", folder)
    assert not difference, difference
    return f"{'refused' if any(statuses) else 'done before'}; resumed bit for bit"


def _commands(bench: Bench, run: Path) -> dict[str, list[str]]:
    """Return other commands that write, each without the name of its output."""
    data = ["--data", str(bench.scratch / "rows.jsonl")]
    module = "megaskip/__main__.py"
    return {
        "exported": [module, "convert", "--run", str(run), "--mode", "copy", "--output"],
        "calibrated": [module, "calibrate", "--run", str(run), "--capacity", "0.5", "--output"],
        "smaller": [module, "export-static", "--run", str(run), "--count", "1", "--output"],
        "rows.out": [module, "inspect-data", *data, "--output"],
    }


def _require_refused(ranks: Ranks, statuses: list[int], reasons: Sequence[str]) -> None:
    """Require one message with one of the reasons where a run has failed."""
    assert set(statuses) <= {0, 2}, f"ends with {statuses}\n{ranks.tails()}"
    if any(statuses):
        text = output_of(ranks)
        assert is_message(ranks), f"no message, or a traceback:\n{text[-3000:]}"
        assert any(reason in text for reason in reasons), text[-3000:]


@contextlib.contextmanager
def disk(bench: Bench, name: str) -> Iterator[Path]:
    """Yield a small disk of its own, in memory; needs root."""
    mount = fresh(bench, name)
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128m", "tmpfs", str(mount)], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


def fill(ballast: Path, free: int) -> None:
    """Leave at most `free` KiB on a disk, to which others may write meanwhile, by a file that takes
    the rest."""
    with ballast.open("wb") as file:
        size = 0
        while (room := shutil.disk_usage(ballast.parent).free - free * 1024) > 0:
            size += min(room, 1 << 20)
            with contextlib.suppress(OSError):
                os.posix_fallocate(file.fileno(), 0, size)


# -- two jobs, and a clock


def two_jobs(bench: Bench, moments: int) -> Results:
    """Start two runs, and two exports, into one folder at the same moment."""
    yield checked("two jobs", "one run folder", lambda: _two_runs(bench))
    yield checked("two jobs", "one export", lambda: _two_exports(bench))


def _two_runs(bench: Bench) -> str:
    folder = fresh(bench, "shared")
    both = [bench.begin("one process", folder) for _ in range(2)]
    statuses = sorted(ranks.wait(120)[0] for ranks in both)
    assert statuses == [0, 2], f"{statuses}\n{both[0].tails()}\n{both[1].tails()}"
    refused = next(ranks for ranks in both if ranks.processes[0].returncode == 2)
    assert "another job writes there" in output_of(refused) or "holds a run already" in output_of(
        refused
    ), refused.tails()
    difference = bench.difference("one process", folder)
    assert not difference, difference
    return "one runs as if alone, the other is refused"


def _two_exports(bench: Bench) -> str:
    run, folder, alone = bench.truth("one process"), fresh(bench, "both"), fresh(bench, "alone")
    script = ["tools/convert_to_hf.py", "--run", str(run), "--mode", "copy", "--output"]
    both = [start([*script, str(folder)], 1, bench.new_log(folder.name)) for _ in range(2)]
    statuses = sorted(ranks.wait(LIMIT)[0] for ranks in both)
    assert statuses in ([0, 0], [0, 2]), f"{both[0].tails()}\n{both[1].tails()}"
    assert start([*script, str(alone)], 1, bench.new_log(alone.name)).wait(LIMIT) == [0]
    assert contents(folder) == contents(alone), "another folder than a single export's"
    return f"whole; they end with {statuses}"


def clocks(bench: Bench, moments: int) -> Results:
    """Train while the clock jumps by hours and days."""
    script = str(Path(__file__).with_name("jumping_clock.py"))
    for engine in ("ZeRO-3", "stages"):

        def run(engine: str = engine) -> str:
            bench.truth(engine)
            folder = fresh(bench, f"clock-{engine}")
            # Tokenise, too: drafts of the cache are told by their age.
            cache = str(fresh(bench, f"clock-cache-{engine}"))
            ranks = bench.begin(engine, folder, "--cache_dir", cache, script=script)
            assert not any(ranks.wait(180)), ranks.tails()
            difference = bench.difference(engine, folder)
            assert not difference, difference
            return "bit for bit"

        yield checked("clock jumps", engine, run)


# -- checkpoints that are cut off


def cuts(bench: Bench, moments: int) -> Results:
    """Cut a file of a checkpoint at random bytes and resume."""
    from tiny_run import alone, router_trainer, tiny_config

    from megaskip.errors import CheckpointError

    config, source = tiny_config(calibration_rows=0), fresh(bench, "tiny")
    names = ("trainer.json", "optim.safetensors", "routers.safetensors", "router_config.json")
    with alone() as topology:
        router_trainer(source, topology, config).run()
        torch.manual_seed(0)
        trainer = router_trainer(fresh(bench, "tiny-resumed"), topology, config)
        for number in range(50):
            rng = random.Random(f"{bench.rng_seed} cut {number}")
            name = names[number % len(names)]
            folder = fresh(bench, "cut")
            shutil.copytree(source / "step_000006", folder)
            content = (folder / name).read_bytes()
            size = rng.randrange(len(content.rstrip()))
            (folder / name).write_bytes(content[:size])

            def resume(folder: Path = folder, name: str = name) -> str:
                with pytest.raises(CheckpointError, match=re.escape(name)):
                    trainer.resume(folder)
                return "refused by name"

            yield checked("cut off", f"{name} at byte {size} of {len(content)}", resume)
