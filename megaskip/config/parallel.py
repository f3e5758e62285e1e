"""The section of a run that says where it runs: sharding, stages, what is not computed or kept."""

from collections.abc import Iterator
from dataclasses import dataclass

from megaskip.config.checks import at_least
from megaskip.config.options import Checked, option


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig(Checked):
    """Where things run."""

    ds_config: str | None = option(None, metavar="JSON")
    """DeepSpeed JSON that owns sharding, e.g. ds_configs/zero3.json; without it every rank holds
    the model."""
    pipeline_stages: int = 1
    """Stages of a pipeline (ds_configs/pipeline.json): each holds a slice of the layers; ranks =
    stages x replicas, and the stages of a replica are neighbouring ranks."""
    pipeline_partition: str | None = option(None, metavar="LAYER,...")
    """First layer of every stage but the first, e.g. 12,18,25 [what balances the stages' work]."""
    sequence_parallel_size: int = 1
    """Ranks that share the tokens of each row, for a long --seq_length (Ulysses): each computes its
    share of every row, and of the attention its share of the heads. It divides heads and ranks, and
    neighbouring ranks share rows."""
    train_execution: str = option("dense", choices=("dense", "sparse"))
    """"dense": every unit runs and the decision multiplies it (the published objective; skipped
    units keep their gradient). "sparse": skipped units are really not computed."""
    compile: bool = False
    """Compile the decoder layers that have no router with torch.compile; where that fails they run
    as they are, and the log says why. Not with --ds_config, --pipeline_stages or --train full."""
    activation_checkpointing: bool = False
    """Keep only the inputs of routed layers and compute them again in the backward pass: less
    memory."""
    cache_prefix: str | None = option(None, metavar="FOLDER|memory")
    """Compute the hidden states in front of the first routed layer once for each row, keep them in
    this folder (for later runs, too) or in memory, and read them back: the layers below then cost
    no time and, once all rows are there, no memory [computed in every pass]."""
    cache_prefix_dtype: str = option("run", choices=("run", "bfloat16"))
    """Type of the kept states: that of the run, which changes nothing, or bfloat16, which halves
    those of a float32 run and rounds them."""
    loss_chunk_tokens: int = 1024
    """Logits are computed for this many tokens at a time, which bounds their memory."""
    dist_timeout: int = 600
    """Seconds after which a collective that does not answer ends the run."""
    heartbeat_timeout: int = 30
    """Seconds of silence after which a rank is taken for dead, and named."""
    world_size: int | None = None
    """With --dry_run, or `megaskip plan`: the number of ranks to plan for."""

    def _problems(self) -> Iterator[str]:
        yield from at_least("pipeline_stages", self.pipeline_stages, 1)
        yield from self._partition_problems()
        if self.cache_prefix is None and self.cache_prefix_dtype != "run":
            yield f"--cache_prefix_dtype {self.cache_prefix_dtype} needs --cache_prefix FOLDER"
        if self.cache_prefix is not None and self.pipeline_stages > 1:
            yield (
                f"--cache_prefix does not go with --pipeline_stages {self.pipeline_stages}: stages "
                "share out all layers, those in front of the routed ones too; use replicas or "
                "ZeRO-3"
            )
        yield from self._sequence_problems()
        yield from at_least("loss_chunk_tokens", self.loss_chunk_tokens, 1)
        if self.compile and self.pipeline_stages > 1:
            yield (
                f"--compile does not go with --pipeline_stages {self.pipeline_stages}: layers of a "
                "stage are not compiled; leave one of them out"
            )
        elif self.compile and self.ds_config is not None:
            yield (
                "--compile does not go with --ds_config, whose weights come and go: leave one of "
                "them out"
            )
        yield from at_least("dist_timeout", self.dist_timeout, 30)
        yield from at_least("heartbeat_timeout", self.heartbeat_timeout, 5)
        if self.world_size is not None:
            yield from at_least("world_size", self.world_size, 1)

    def boundaries(self) -> tuple[int, ...] | None:
        """Return --pipeline_partition as numbers, None when it is not given."""
        if self.pipeline_partition is None:
            return None
        return tuple(int(part) for part in self.pipeline_partition.split(","))

    def _sequence_problems(self) -> Iterator[str]:
        size = self.sequence_parallel_size
        yield from at_least("sequence_parallel_size", size, 1)
        if size <= 1:
            return
        flag = f"--sequence_parallel_size {size} does not go with"
        if self.pipeline_stages > 1:
            yield (
                f"{flag} --pipeline_stages {self.pipeline_stages}: a stage takes whole rows; take "
                "ZeRO-3 (--ds_config ds_configs/zero3.json)"
            )
        if self.cache_prefix is not None:
            yield f"{flag} --cache_prefix, which keeps the states of whole rows; leave one out"
        if self.compile:
            yield f"{flag} --compile: ranks exchange tokens inside of a layer; leave one out"

    def _partition_problems(self) -> Iterator[str]:
        if self.pipeline_partition is None:
            return
        try:
            first_layers = self.boundaries() or ()
        except ValueError:
            yield f"--pipeline_partition {self.pipeline_partition!r} is not a list such as 12,18,25"
            return
        if len(first_layers) != self.pipeline_stages - 1 or any(
            a >= b for a, b in zip((0, *first_layers), first_layers, strict=False)
        ):
            yield (
                f"--pipeline_partition {self.pipeline_partition} must be the first layers of all "
                f"stages but the first: with --pipeline_stages {self.pipeline_stages}, "
                f"{self.pipeline_stages - 1} rising numbers above 0"
            )


def sequence_problems(
    parallel: ParallelConfig, *, train: str, packing: bool, by_layer_and_token: bool
) -> Iterator[str]:
    """Yield what other sections of a run say that does not go with --sequence_parallel_size."""
    size = parallel.sequence_parallel_size
    if size <= 1:
        return
    flag = f"--sequence_parallel_size {size} does not go with"
    if train == "full":
        yield (
            f"{flag} --train full: ranks share the tokens of rows for a frozen backbone only; "
            "leave one of them out"
        )
    if packing:
        yield (
            f"{flag} --packing: the mask that keeps the samples of a row apart is made of the "
            "tokens of one rank; leave --packing out, long rows need none"
        )
    if by_layer_and_token:
        yield (
            f"{flag} --budget layer and decisions per token: its hinge is in the share of all "
            "tokens of a row, of which a rank sees some; take --budget global"
        )
