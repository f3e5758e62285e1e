"""What --cache_prefix keeps: of which rows, in front of which layer, how many bytes, and what else
decides it."""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers

from megaskip.config import RunConfig, resolve_layers
from megaskip.data import TokenizedData, build_dataset
from megaskip.data.loader import DataLoader
from megaskip.data.row_states import bytes_of_rows
from megaskip.data.tokenizer import load_tokenizer
from megaskip.errors import ConfigError, DataError
from megaskip.parallel.cached_prefix import first_reads
from megaskip.parallel.loading.skeleton import skeleton
from megaskip.parallel.loading.source import ModelSource
from megaskip.parallel.preflight import free_memory
from megaskip.reporting.summary import human_bytes
from megaskip.training.schedule import total_steps

Rows = Sequence[int]
"""Of a micro-batch, by number."""

IN_MEMORY = "memory"
"""What --cache_prefix says instead of a folder."""
_FORMAT = 1
"""Raise when kept states would have another layout."""


def first_routed_layer(config: RunConfig, source: ModelSource) -> int:
    """Return the lowest routed layer; raises ConfigError when nothing is in front of it."""
    layers = resolve_layers(config.router.layers, source.text_config.num_hidden_layers)
    if layers[0] == 0:
        raise ConfigError(
            f"--cache_prefix: --layers {config.router.layers} routes layer 0, and in front of it "
            "is nothing to keep; leave --cache_prefix out"
        )
    return layers[0]


def stored_dtype(config: RunConfig, source: ModelSource) -> torch.dtype:
    """Return the type of the kept states."""
    kept = config.parallel.cache_prefix_dtype
    return source.dtype if kept == "run" else torch.bfloat16


def prefix_rows(
    config: RunConfig, source: ModelSource, world_size: int, global_batch_size: int
) -> Iterator[tuple[str, str]]:
    """Yield the row of --dry_run that says what --cache_prefix needs, as if nothing were there."""
    first, dtype = first_routed_layer(config, source), stored_dtype(config, source)
    kept, hidden_size = str(config.parallel.cache_prefix), source.text_config.hidden_size
    try:
        data = tokenized_data(config, source)
    except ConfigError as error:
        yield "prefix cache", f"not known without the data ({error})"
        return
    loader = DataLoader(
        data=data,
        rank=0,
        world_size=world_size,
        micro_batch_size=config.optim.micro_batch_size,
        global_batch_size=global_batch_size,
        seed=config.optim.seed,
        pad_token_id=0,
        prompt_tokens=config.router.prompt_tokens,
    )
    lengths, ranks = loader.lengths(), range(world_size)
    read = np.zeros(len(lengths), dtype=np.bool_)
    first_reads(
        reads_of_run(config, loader, ranks, 0, total_steps(config.optim, loader)), read, rank=0
    )
    needed, free = bytes_of_rows(lengths, read, hidden_size, dtype), room_in(kept)
    text = f"{human_bytes(needed)} for {read.sum()} rows in front of layer {first}, {dtype}"
    where = "in memory" if kept == IN_MEMORY else f"in {kept}"
    verdict = "" if needed <= free else ": too little"
    yield "prefix cache", f"{text}; {human_bytes(free)} are free {where}{verdict}"


def tokenized_data(config: RunConfig, source: ModelSource) -> TokenizedData:
    """Return the data of a run for its plan; raises ConfigError or DataError."""
    named, trust = config.model.tokenizer or source.folder, source.trust_remote_code
    return build_dataset(config.data, load_tokenizer(named, trust_remote_code=trust))


def require_room_for(needed: int, kept: str) -> None:
    """Raise DataError when `needed` bytes do not fit where --cache_prefix `kept` says."""
    free = room_in(kept)
    if needed > free:
        raise DataError(
            f"--cache_prefix {kept}: it needs {human_bytes(needed)}, and {human_bytes(free)} are "
            "free there; name another folder, use fewer rows (--max_samples, --max_steps) or a "
            "shorter --seq_length, or leave it out"
        )


def room_in(kept: str) -> int:
    """Return the bytes free where --cache_prefix `kept` says; its folder may not exist yet."""
    if kept == IN_MEMORY:
        return free_memory(torch.device("cpu"))
    folder = Path(kept).expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def reads_of_run(
    config: RunConfig, loader: DataLoader, ranks: Sequence[int], first_step: int, total_steps: int
) -> Iterator[tuple[int, Rows]]:
    """Yield (rank, rows) of every forward pass of `ranks`: those of the steps first, so that a row
    is computed in the batch in which it is first learnt from."""
    loaders = {rank: replace(loader, rank=rank) for rank in ranks}
    steps = {rank: of_rank.step_rows(first_step) for rank, of_rank in loaders.items()}
    if len(ranks) == loader.world_size:
        # Two epochs from anywhere hold every row; more steps read nothing else.
        epoch = math.ceil(loader.num_train / loader.global_batch_size)
        total_steps = min(total_steps, first_step + 2 * epoch)
    for _ in range(first_step, total_steps):
        for rank, micro_batches in steps.items():
            for rows in next(micro_batches):
                yield rank, rows
    for count in _counts_of_passes(config, first_step):
        for rank, of_rank in loaders.items():
            yield from ((rank, rows) for rows in of_rank.calibration_rows(count) if rows)
    for rank, of_rank in loaders.items():
        yield from ((rank, rows) for rows in of_rank.held_out_rows() if rows)


def _counts_of_passes(config: RunConfig, first_step: int) -> list[int]:
    """Return how many training rows the passes before the first and after the last step read."""
    has_maps = config.router.compensation != "none"
    is_fitted = has_maps and first_step == 0 and config.model.init_routers is None
    fitted = config.optim.fit_rows if is_fitted else 0
    calibrated = config.optim.calibration_rows if config.router.budget == "global" else 0
    return [count for count in (fitted, calibrated) if count]


def describe_states(
    config: RunConfig, source: ModelSource, device: torch.device, data_fingerprint: str
) -> dict[str, Any]:
    """Return all that decides the states of a data set's rows."""
    base, shape = source.describe(), cast(Any, skeleton(source))
    settings = {
        name: value
        for name, value in source.hf_config.to_dict().items()
        if name not in ("_name_or_path", "transformers_version")
    }
    return {
        "format": _FORMAT,
        "data": data_fingerprint,
        "weights": base.weights,
        "config": hashlib.sha256(
            json.dumps(settings, sort_keys=True, default=str).encode()
        ).hexdigest()[:16],
        "layer": first_routed_layer(config, source),
        "dtype": str(source.dtype),
        "base_dtype": "dtype" if source.four_bit is None else source.four_bit.quant_type,
        "stored_dtype": str(stored_dtype(config, source)),
        "attention": shape.config._attn_implementation,
        "compiled": config.parallel.compile,
        "device": device.type,
        "versions": [torch.__version__, transformers.__version__],
    }


def key_of(description: dict[str, Any]) -> str:
    """Return 32 hex digits; equal when, and only when, the states would be."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:32]
