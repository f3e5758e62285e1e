"""The data of a run: read and tokenised once, then dealt to the replicas."""

from pathlib import Path

from megaskip.arch.positions import too_long
from megaskip.checkpoint.resume import read_state
from megaskip.config import OptimConfig, RunConfig
from megaskip.data import TokenizedData
from megaskip.data.dataset import data_for_model
from megaskip.data.loader import DataLoader
from megaskip.data.tokenizer import load_tokenizer
from megaskip.errors import ConfigError
from megaskip.log import get_logger
from megaskip.parallel.loading.source import ModelSource
from megaskip.parallel.topology import Topology

logger = get_logger(__name__)


def read_data(config: RunConfig, source: ModelSource) -> tuple[TokenizedData, int]:
    """Return (tokenised data, padding token) for a model.

    Raises DataError or ConfigError. No rank waits for another.
    """
    tokenizer = load_tokenizer(
        config.model.tokenizer or source.folder, trust_remote_code=source.trust_remote_code
    )
    model = source.text_config
    warning = too_long(model, config.data.seq_length)
    if warning is not None:
        logger.warning("%s", warning)
    return data_for_model(config.data, tokenizer, model.vocab_size)


def make_loader(
    config: RunConfig,
    topology: Topology,
    data: TokenizedData,
    pad_token_id: int,
    checkpoint: Path | None,
) -> DataLoader:
    """Return the loader of this rank's replica; `checkpoint` is the one that the run continues
    from. Raises ConfigError when its global batch cannot be split over these replicas."""
    optim, replicas = config.optim, topology.num_replicas
    size = optim.micro_batch_size * optim.gradient_accumulation_steps * replicas
    if checkpoint is not None:
        size = _global_batch_of(checkpoint, optim, replicas)
    return DataLoader(
        data=data,
        rank=topology.replica,
        world_size=replicas,
        micro_batch_size=optim.micro_batch_size,
        global_batch_size=size,
        seed=optim.seed,
        pad_token_id=pad_token_id,
        prompt_tokens=config.router.prompt_tokens,
        sequence_rank=topology.sequence_rank,
        sequence_size=topology.sequence_size,
    )


def _global_batch_of(checkpoint: Path, optim: OptimConfig, replicas: int) -> int:
    """Return the rows of a global batch of the run that continues: another number of replicas
    accumulates more or fewer micro-batches."""
    size = read_state(checkpoint).global_batch_size
    rows = optim.micro_batch_size * replicas
    if size % rows:
        raise ConfigError(
            f"--resume {checkpoint}: its global batch of {size} rows cannot be split over "
            f"{replicas} replicas with --micro_batch_size {optim.micro_batch_size}; choose one so "
            f"that replicas x size divides {size}"
        )
    if size // rows != optim.gradient_accumulation_steps:
        logger.info(
            "gradient accumulation is %d, to keep the global batch of %d rows", size // rows, size
        )
    return size
