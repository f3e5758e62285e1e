"""Processes that are killed or asked to stop, at random moments of every phase."""

import os
import random
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench import (
    LIMIT,
    PHASES,
    Bench,
    Result,
    Results,
    checked,
    fresh,
    is_over,
    is_saving,
    output_of,
    wait_until,
)
from spawn import Ranks, start

SPREAD = ("ZeRO-3", "stages")


def kills(bench: Bench, moments: int) -> Results:
    """Kill -9 a random rank of two at random moments, a sixth of them in exports; then resume."""
    yield from _at_moments(bench, moments - moments // 6, "kill -9", _killed)
    yield from kills_of_exports(bench, moments // 6)


def stops(bench: Bench, moments: int) -> Results:
    """Send SIGTERM to one rank, as a node may, or to all, as launchers do; then resume."""
    yield from _at_moments(
        bench, len(PHASES) * 2 if moments >= 30 else moments, "SIGTERM", _stopped
    )


def _at_moments(
    bench: Bench, count: int, fault: str, run: Callable[[Bench, str, str, random.Random, Path], str]
) -> Results:
    """Try a fault `count` times, the phases and engines in turns; two runs at a time."""
    for engine in SPREAD:
        bench.truth(engine)

    def attempt(number: int) -> Result:
        engine = SPREAD[number % 2]
        phase = PHASES[number // 2 % len(PHASES)]
        rng = random.Random(f"{bench.rng_seed} {fault} {number}")
        folder = fresh(bench, f"{fault.replace(' ', '')}-{number}")
        return checked(fault, f"{engine}, {phase}", lambda: run(bench, engine, phase, rng, folder))

    with ThreadPoolExecutor(2) as pool:
        yield from pool.map(attempt, range(count))


def _killed(bench: Bench, engine: str, phase: str, rng: random.Random, folder: Path) -> str:
    ranks = bench.begin(engine, folder)
    _wait_for_moment(bench, engine, phase, rng, folder, ranks)
    victim = rng.choice((0, 1))
    was_running = ranks.processes[victim].poll() is None
    seconds = _end(ranks, [victim], signal.SIGKILL)
    outcome = f"rank {victim} gone, all ended in {seconds:.1f} s"
    if was_running and not is_over("report", folder):
        _require_named(ranks, victim, folder)
    else:
        outcome = "it was done already"
    difference = bench.resumed(engine, folder)
    assert not difference, difference
    return f"{outcome}; resumed bit for bit"


def _stopped(bench: Bench, engine: str, phase: str, rng: random.Random, folder: Path) -> str:
    ranks = bench.begin(engine, folder)
    _wait_for_moment(bench, engine, phase, rng, folder, ranks)
    victims = rng.choice(([0], [1], [0, 1]))
    _end(ranks, victims, signal.SIGTERM)
    statuses = [process.returncode for process in ranks.processes]
    text = output_of(ranks)
    assert "Traceback" not in text, text
    outcome = "stopped politely" if statuses == [0, 0] else f"ended with {statuses}"
    if len(victims) == 1 and statuses[victims[0]] == -signal.SIGTERM:
        _require_named(ranks, victims[0], folder)
    difference = bench.resumed(engine, folder)
    assert not difference, difference
    return f"rank {victims}: {outcome}; resumed bit for bit"


def _wait_for_moment(
    bench: Bench, engine: str, phase: str, rng: random.Random, folder: Path, ranks: Ranks
) -> None:
    """Wait for a random moment of a phase."""
    if phase == "checkpoint write":
        wait_until(lambda: is_saving(folder), ranks)
        time.sleep(rng.uniform(0, 0.05))
        return
    index = PHASES.index(phase)
    if index:
        wait_until(lambda: is_over(PHASES[index - 1], folder), ranks)
    time.sleep(rng.uniform(0, bench.spans[engine][phase]))


def _end(ranks: Ranks, victims: list[int], number: signal.Signals) -> float:
    """Send a signal to some ranks and wait for the end of all; return the seconds that took."""
    begun = time.monotonic()
    for victim in victims:
        if ranks.processes[victim].poll() is None:
            os.kill(ranks.processes[victim].pid, number)
    ranks.wait(LIMIT)
    return time.monotonic() - begun


def _require_named(ranks: Ranks, victim: int, folder: Path) -> None:
    """Require that the survivor has said which rank is lost, and that it ended with an error."""
    survivor = 1 - victim
    text = ranks.text(survivor)
    if ranks.processes[survivor].returncode == 0 and is_over("report", folder):
        return  # all was written before the signal came
    assert ranks.processes[survivor].returncode not in (0, None), "the survivor ends with 0"
    named = f"rank {victim} (process {ranks.processes[victim].pid}" in text
    alone = f"rank {survivor} of 2 waited" in text  # before the ranks have met
    assert named or alone, f"the lost rank {victim} is not named:\n{text[-3000:]}"
    assert "Traceback" not in text, text


# -- exports


def kills_of_exports(bench: Bench, moments: int) -> Results:
    """Kill -9 `megaskip convert` at random moments; then convert again."""
    run, truth = bench.truth("one process"), fresh(bench, "exported")
    begun = time.monotonic()
    ranks = _convert(bench, run, truth)
    assert ranks.wait(LIMIT) == [0], ranks.tails()
    span = time.monotonic() - begun
    for number in range(moments):
        rng = random.Random(f"{bench.rng_seed} export {number}")
        # The writing is at the end; before it nothing can be half done.
        delay, folder = span * rng.uniform(0.3, 1.1), fresh(bench, f"export-{number}")
        yield checked(
            "kill -9",
            f"export, {delay:.2f} s",
            lambda d=delay, f=folder: _export(bench, run, truth, f, d),
        )


def _export(bench: Bench, run: Path, truth: Path, folder: Path, delay: float) -> str:
    ranks = _convert(bench, run, folder)
    time.sleep(delay)
    ranks.kill()
    was_there = folder.exists()
    if was_there:
        assert contents(folder) == contents(truth), "half a folder"
        return "done already, and whole"
    again = _convert(bench, run, folder)
    assert again.wait(LIMIT) == [0], again.tails()
    assert contents(folder) == contents(truth), "another folder than the uninterrupted one"
    return "nothing there; the next export is whole"


def _convert(bench: Bench, run: Path, output: Path) -> Ranks:
    script = ["tools/convert_to_hf.py", "--run", str(run), "--output", str(output)]
    return start([*script, "--mode", "copy"], 1, bench.new_log(output.name))


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file of a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
