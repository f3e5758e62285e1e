"""launch/train.py under a clock that jumps by up to three days whenever it is read."""

import random
import runpy
import sys
import time
from pathlib import Path

_rng = random.Random(0)
_time = time.time

# A process cannot have a wall clock of its own: what reads it is given another one.
time.time = lambda: _time() + _rng.uniform(-3, 3) * 86400
sys.argv[0] = str(Path(__file__).parents[2] / "launch/train.py")
runpy.run_path(sys.argv[0], run_name="__main__")
