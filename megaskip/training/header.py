"""The header of a run: what trains, on what, with which data, and what it takes, measured."""

from megaskip.arch.packing import describe_attention
from megaskip.config import RunConfig
from megaskip.data.loader import DataLoader
from megaskip.log import get_logger
from megaskip.parallel.loading.source import ModelSource, uses_tf32
from megaskip.parallel.measure import bytes_by_kind
from megaskip.parallel.protocol import StepEngine
from megaskip.parallel.shared_moments import describe_sharing
from megaskip.parallel.topology import Topology
from megaskip.reporting.summary import human_bytes, table, versions
from megaskip.training.loop import Trainer

logger = get_logger(__name__)


def log_header(trainer: Trainer, source: ModelSource) -> None:
    """Log the header of a run on the model of `source`, on the first rank."""
    for line in table(header_rows(trainer, source), title="megaskip"):
        logger.info("%s", line)


def header_rows(trainer: Trainer, source: ModelSource) -> list[tuple[str, str]]:
    """Return the rows of the header."""
    checkpointer = trainer.checkpointer
    base = checkpointer.base
    return [
        ("model", f"{source.folder} ({base.model_type}, {base.num_layers} layers)"),
        *((("base", str(source.four_bit)),) if source.four_bit is not None else ()),
        *checkpointer.weights.describe(),
        *_sharing(trainer),
        ("engine", _engine_text(trainer.config, trainer.topology, trainer.engine)),
        ("attention", _attention_text(trainer.config, trainer.engine)),
        ("bytes on rank 0", _bytes_text(trainer.engine)),
        ("batch", f"{_batch_text(trainer.loader)}, {trainer.total_steps} steps"),
        *(("data", line) for line in trainer.loader.data.stats.lines()),
        ("run folder", str(checkpointer.output_dir)),
        ("versions", "  ".join(f"{name} {number}" for name, number in versions().items())),
    ]


def _sharing(trainer: Trainer) -> list[tuple[str, str]]:
    """Return what of the optimizer state is shared out; nothing where every rank holds all."""
    sizes = {name: p.numel() for name, p in trainer.engine.parameters.items()}
    shared = describe_sharing(sizes, trainer.topology.world_size)
    return [("optimizer state", shared)] if shared else []


def _engine_text(config: RunConfig, topology: Topology, engine: StepEngine) -> str:
    if topology.num_stages > 1:
        name = f"pipeline of {topology.num_stages} stages"
    else:
        name = "ZeRO-3" if config.parallel.ds_config else "replicas"
    dtype = next(engine.module.parameters()).dtype
    precision = f"{dtype}, TF32" if uses_tf32(dtype, topology.device) else f"{dtype}"
    if topology.sequence_size > 1:
        name += f", {topology.sequence_size} ranks share the tokens of a row,"
    return f"{name} on {topology.world_size} rank(s), {topology.device.type}, {precision}"


def _attention_text(config: RunConfig, engine: StepEngine) -> str:
    modules = dict(engine.module.named_children())
    model = modules.get("model") or modules["decoder"]
    return describe_attention(model, packing=config.data.packing)


def _bytes_text(engine: StepEngine) -> str:
    sizes = bytes_by_kind(engine)
    return "  ".join(f"{kind} {human_bytes(size)}" for kind, size in sizes.items())


def _batch_text(loader: DataLoader) -> str:
    size, replicas, rows = loader.global_batch_size, loader.world_size, loader.micro_batch_size
    return f"{size} rows = {replicas} replica(s) x {rows} x {size // (replicas * rows)}"
