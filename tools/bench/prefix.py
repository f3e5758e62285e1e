"""Seconds of a training step with --cache_prefix and without, in turns on one machine.

    python tools/bench/prefix.py --model demo --seq_length 128

"floor" reads nothing: the states of its one batch are a tensor in memory, so only the routed layers
and those above them run.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megaskip.arch.prefix import FrozenPrefix
from megaskip.config import RouterConfig, RunConfig
from megaskip.config.run import ModelConfig
from megaskip.data import Batch, Row, collate
from megaskip.data.collate import placeholder_batch
from megaskip.data.row_states import StatesOnDisk, make_folder
from megaskip.log import quiet_libraries
from megaskip.parallel.build import build_engine
from megaskip.parallel.cached_prefix import CachedPrefix, compute_states
from megaskip.parallel.engine import Engine
from megaskip.parallel.loading.source import ModelSource, resolve_source
from megaskip.parallel.topology import process_group, read_topology

_RATE = 1e-6


class _OneTensor:
    """Gives the states of the one batch that there is."""

    def __init__(self, states: torch.Tensor) -> None:
        self._states = states

    def entering(self, batch: Batch) -> torch.Tensor:
        return self._states


def main() -> None:
    """Print the median seconds of each way, and ratios of neighbouring steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="folder, hub id or demo")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--layers", default="half", help="as --layers of megaskip train")
    parser.add_argument("--rows", type=int, default=2, help="of the batch")
    parser.add_argument("--seq_length", type=int, default=128, help="tokens of each row")
    parser.add_argument("--turns", type=int, default=9, help="steps of each way")
    parser.add_argument("--cpu_time", action="store_true", help="of this process, on a busy CPU")
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    quiet_libraries()
    model = ModelConfig(model=options.model, dtype=options.dtype)
    config = RunConfig(model=model, router=RouterConfig(layers=options.layers))
    source = resolve_source(config.model)
    batch = _batch(options.rows, options.seq_length, source.text_config.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        steps = _ways(config, source, batch, Path(folder))
        for step in steps.values():
            step()
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for name in itertools.chain.from_iterable([steps] * options.turns):
            begun = clock()
            steps[name]()
            seconds[name].append(clock() - begun)
    plain = seconds["without"]
    for name, own in seconds.items():
        ratio = statistics.median(b / a for a, b in zip(plain, own, strict=True))
        print(f"{name:8} {statistics.median(own):.4f} s a step, {ratio:.3f} of without")


def _ways(
    config: RunConfig, source: ModelSource, batch: Batch, folder: Path
) -> dict[str, Callable[[], object]]:
    engines = {name: _engine(config, source) for name in ("without", "cached", "floor")}
    first = engines["cached"].routers.layers[0]
    lengths = batch.token_mask.sum(1).numpy()
    hidden_size = source.text_config.hidden_size
    make_folder(folder / "states", lengths, hidden_size, source.dtype, {})
    states = StatesOnDisk(folder / "states", lengths, hidden_size, source.dtype)
    for name in ("cached", "floor"):
        prefix = FrozenPrefix(engines[name].module, first)
        placeholder = placeholder_batch(batch.input_ids.device)
        compute_states(prefix, states, [range(len(lengths))], lambda rows: batch, placeholder)
        prefix.leave_out()
    cached = CachedPrefix(states, source.dtype)
    engines["cached"].prefix = cached
    engines["floor"].prefix = _OneTensor(cached.entering(batch))
    return {
        name: lambda engine=engine: engine.train_step([batch], _RATE)
        for name, engine in engines.items()
    }


def _engine(config: RunConfig, source: ModelSource) -> Engine:
    topology = read_topology({})
    with process_group(topology, timeout=60):
        return build_engine(config, topology, source, None)


def _batch(rows: int, tokens: int, vocabulary: int) -> Batch:
    """Return random rows, of which every token but the first has a loss."""
    ids = torch.randint(3, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(0))
    supervised = torch.arange(tokens).numpy() > 0
    made = [
        Row(input_ids=row.int().numpy(), supervised=supervised, prompt_length=8, source=0)
        for row in ids
    ]
    return collate(made, pad_token_id=0, prompt_tokens=32, row_numbers=range(rows))


if __name__ == "__main__":
    main()
