"""Do to runs what machines do to them, and check that nothing is lost; under 15 minutes.

    python tests/faults/faults.py                       # everything; disks need root
    python tests/faults/faults.py --only kills cuts --moments 6 --seed 3

Prints a table of the faults that were tried, and ends with 1 when one was not survived. --seed
draws other moments. Not among the everyday tests: it takes all cores of a small machine.
"""

import argparse
import collections
import os
import sys
import tempfile
import time
from pathlib import Path

from bench import Bench, Result
from kills import kills, stops
from storage import clocks, cuts, full_disks, read_only_disks, two_jobs

FAULTS = {
    "kills": kills,
    "stops": stops,
    "full_disks": full_disks,
    "read_only_disks": read_only_disks,
    "two_jobs": two_jobs,
    "clocks": clocks,
    "cuts": cuts,
}
NEED_ROOT = {"full_disks", "read_only_disks"}


def main() -> int:
    """Try the faults that the flags name; return the exit status."""
    arguments = parse()
    begun, results = time.monotonic(), list[Result]()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        bench = Bench(Path(arguments.keep or scratch), arguments.seed)
        for name in arguments.only:
            if name in NEED_ROOT and os.geteuid() != 0:
                print(f"NOT TRIED: {name}, which needs root to mount small disks", flush=True)
                continue
            for result in FAULTS[name](bench, arguments.moments):
                results.append(result)
                show(result)
    return report(results, time.monotonic() - begun)


def parse() -> argparse.Namespace:
    """Return the flags."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--moments", type=int, default=30, help="kills -9; fewer of the rest, too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", help="folder for what the runs leave [removed at the end]")
    return parser.parse_args()


def show(result: Result) -> None:
    """Print one line for a fault, and all that is known of one that was not survived."""
    verdict = "ok    " if result.survived else "FAILED"
    text = result.outcome if not result.survived else result.outcome.splitlines()[0]
    print(f"{verdict} {result.fault:11} {result.where:40} {text}", flush=True)


def report(results: list[Result], seconds: float) -> int:
    """Print how many faults of each kind were survived; return the exit status."""
    tried = collections.Counter(result.fault for result in results)
    survived = collections.Counter(result.fault for result in results if result.survived)
    print(f"\n{'fault':12} {'tried':>6} {'survived':>9}")
    for fault, count in tried.items():
        print(f"{fault:12} {count:6} {survived[fault]:9}")
    print(f"{'all':12} {len(results):6} {survived.total():9}   in {seconds:.0f} s")
    return int(not results or survived.total() < len(results))


if __name__ == "__main__":
    sys.exit(main())
