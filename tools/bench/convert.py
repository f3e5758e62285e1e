"""What an export costs at different model sizes: seconds, bytes written, peak memory.

    python tools/bench/convert.py --gib 0.1 1 4

Makes Llamas with random weights, gives them fresh routers, and runs tools/convert_to_hf.py on them
in a process of its own, as overlay and as copy.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # runs from a clone

from memory import make_model

from megaskip import RouterConfig, RouterSet, save_routers
from megaskip.checkpoint.base import describe_folder
from megaskip.config import resolve_layers
from megaskip.reporting.summary import versions

_CHILD = """
import resource, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from megaskip.export.folder import export_folder
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begun = time.perf_counter()
done = export_folder(Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), mode=sys.argv[5])
seconds = time.perf_counter() - begun
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(seconds, done.written, peak * 1024)
"""


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, nargs="+", default=[0.1, 1, 4], help="[0.1 1 4]")
    parser.add_argument("--work_dir", help="where models are made [the system's temporary folder]")
    options = parser.parse_args()
    print("  ".join(f"{name} {number}" for name, number in versions().items()))
    columns = ("seconds", "MB written", "MB of memory", "MB/s")
    print(f"{'':18}" + "".join(f"{column:>14}" for column in columns))
    for gib in options.gib:
        with tempfile.TemporaryDirectory(dir=options.work_dir) as scratch:
            folder = Path(scratch)
            size = make_model(folder / "base", gib)
            routers = fresh_routers(folder)
            for mode in ("overlay", "copy"):
                seconds, written, peak = convert(folder, routers, mode)
                speed = f"{size / seconds / 1e6:.0f}" if mode == "copy" else "-"
                cells = (f"{seconds:.3f}", f"{written / 1e6:.3f}", f"{peak / 1e6:.3f}", speed)
                name = f"{mode} {size / 1e9:.2f} GB"
                print(f"{name:18}" + "".join(f"{cell:>14}" for cell in cells), flush=True)


def fresh_routers(folder: Path) -> Path:
    """Write routers that keep everything and return their folder."""
    shape = json.loads((folder / "base/config.json").read_text(encoding="utf-8"))
    config = RouterConfig()
    layers = resolve_layers(config.layers, shape["num_hidden_layers"])
    routers = RouterSet(config, layers, shape["hidden_size"])
    return save_routers(folder / "routers", routers, base=describe_folder(folder / "base"))


def convert(folder: Path, routers: Path, mode: str) -> tuple[float, float, float]:
    """Return (seconds, bytes written, bytes of peak memory above the start) of one export."""
    os.sync()
    time.sleep(1)
    paths = [str(ROOT), str(routers), str(folder / "base"), str(folder / mode)]
    command = [sys.executable, "-c", _CHILD, *paths, mode]
    child = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    seconds, written, peak = child.stdout.split()[-3:]
    return float(seconds), float(written), float(peak)


if __name__ == "__main__":
    main()
