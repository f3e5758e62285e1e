"""--dry_run: what a job would train, need and take, without weights and without ranks."""

import math
from collections.abc import Iterator

from megaskip.arch.positions import too_long
from megaskip.arch.trainable import describe_layers, describe_trainable
from megaskip.config import RunConfig, resolve_layers
from megaskip.data import StreamingRows
from megaskip.errors import ConfigError
from megaskip.parallel.ds_config import read_ds_config
from megaskip.parallel.estimate import Estimate, estimate
from megaskip.parallel.estimate_stages import estimate_stages
from megaskip.parallel.loading.source import ModelSource
from megaskip.parallel.shared_moments import describe_sharing
from megaskip.parallel.topology import sizes_of_ranks
from megaskip.reporting.summary import human_bytes, table
from megaskip.routing.adapters import describe_adapters, is_adapter
from megaskip.routing.compensation import describe_compensation, is_compensation
from megaskip.training.prefix_plan import prefix_rows, tokenized_data

_MUCH_OPTIMIZER_STATE = 0.01
"""Share of a rank's memory above which the plan says what the optimizer state takes."""


def dry_run_lines(config: RunConfig, source: ModelSource, world_size: int) -> list[str]:
    """Return the table that --dry_run prints, for `world_size` ranks."""
    ds_content = read_ds_config(config.parallel.ds_config, config)
    num_stages = config.parallel.pipeline_stages
    if world_size % num_stages:
        raise ConfigError(
            f"--world_size {world_size} is not a multiple of --pipeline_stages {num_stages}"
        )
    share = config.parallel.sequence_parallel_size
    if world_size % share:
        raise ConfigError(
            f"--world_size {world_size} is not a multiple of --sequence_parallel_size {share}; "
            f"change the ranks, or {sizes_of_ranks(world_size)}"
        )
    if num_stages > 1:
        stages = estimate_stages(config, source, world_size)
        needs = max(stages, key=lambda stage: stage.total)
    else:
        stages = []
        needs = estimate(config, source, world_size=world_size, ds_content=ds_content)
    size = config.optim.micro_batch_size * config.optim.gradient_accumulation_steps
    size *= world_size // (num_stages * share)
    size_text = f"{needs.parameters:,} parameters, {source.dtype}"
    rows = [
        ("model", f"{source.folder} ({source.hf_config.model_type}), {size_text}"),
        *((("base", str(source.four_bit)),) if source.four_bit is not None else ()),
        *_trainable(config, source, needs),
        ("ranks", f"{world_size}, {_engine_name(num_stages, ds_content is not None)}"),
        *([("tokens of a row", f"shared by {share} ranks")] if share > 1 else ()),
        *((f"bytes on stage {n}", human_bytes(stage.total)) for n, stage in enumerate(stages)),
        ("bytes on a rank", human_bytes(needs.total)),
        ("  weights", human_bytes(needs.weights)),
        ("  gathered weights", human_bytes(needs.gathers)),
        ("  trained, with optimizer", _trained_bytes(config, needs, world_size)),
        ("  activations", human_bytes(needs.activations)),
        ("  logits, temporaries", human_bytes(needs.workspace)),
        ("  on top, on a GPU", "what CUDA and NCCL take for themselves, often 1 to 2 GiB"),
        ("global batch", f"{size} rows of at most {config.data.seq_length} tokens"),
        *_positions(config, source),
        *_length(config, source, size),
        *(prefix_rows(config, source, world_size, size) if config.parallel.cache_prefix else ()),
    ]
    return table(rows, title="dry run: nothing is loaded, nothing is started")


def _engine_name(num_stages: int, sharded: bool) -> str:
    if num_stages > 1:
        return f"{num_stages} stages; below, the stage that needs most"
    return "ZeRO-3" if sharded else "the whole model on each"


def _trainable(
    config: RunConfig, source: ModelSource, needs: Estimate
) -> Iterator[tuple[str, str]]:
    if config.model.train == "full":
        yield "trains", f"every weight, {needs.parameters:,} parameters"
        return
    layers = resolve_layers(config.router.layers, source.text_config.num_hidden_layers)
    yield "routes", f"{config.router.granularity} of layers {describe_layers(layers)}"
    trained = dict(needs.trainable)
    routers = {name: shape for name, shape in trained.items() if not is_adapter(name)}
    yield "trains", describe_trainable(routers) or "adapters alone"
    maps = [math.prod(shape) for name, shape in needs.trainable if is_compensation(name)]
    if maps:
        kind, rank = config.router.compensation, config.router.compensation_rank
        text = describe_compensation(kind, rank, layers=len(layers), parameters=sum(maps))
        yield "compensation", text
    if config.adapter.lora_rank:
        yield "adapters", describe_adapters(config.adapter, trained)


def _trained_bytes(config: RunConfig, needs: Estimate, world_size: int) -> str:
    """Return the bytes of what trains; what is shared out of it; and what its optimizer state is of
    a rank's memory, where that is much."""
    size = human_bytes(needs.trained)
    if config.model.train == "full":
        return size
    sizes = {name: math.prod(shape) for name, shape in needs.trainable}
    shared, share = describe_sharing(sizes, world_size), needs.moments / needs.total
    if share <= _MUCH_OPTIMIZER_STATE:
        return f"{size}; {shared}" if shared else size
    return (
        f"{size}; the optimizer state in it, {human_bytes(needs.moments)}, is {100 * share:.1f} % "
        f"of what a rank needs, and {shared or 'every rank holds all of it'}: a lower --lora_rank "
        "or --compensation_rank, or fewer --layers, make it smaller"
    )


def _positions(config: RunConfig, source: ModelSource) -> Iterator[tuple[str, str]]:
    """Yield what is to be said of rows that are longer than the model was made for."""
    warning = too_long(source.text_config, config.data.seq_length)
    if warning is not None:
        yield "positions", warning


def _length(config: RunConfig, source: ModelSource, size: int) -> Iterator[tuple[str, str]]:
    """Yield steps and tokens; from the flags, else from the data if there is a tokenizer."""
    steps = config.optim.max_steps
    if steps is None:
        try:
            data = tokenized_data(config, source)
        except ConfigError as error:
            yield "steps", f"not known without the data ({error}); give --max_steps"
            return
        if isinstance(data.train, StreamingRows):
            yield "steps", "not known for a stream; give --max_steps"
            return
        steps = max(math.ceil(config.optim.epochs * len(data.train) / size), 1)
        for line in data.stats.lines():
            yield "data", line
    yield "steps", f"{steps}, at most {steps * size * config.data.seq_length:,} tokens"
