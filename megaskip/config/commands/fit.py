"""Options of `megaskip fit` and `megaskip drop`."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megaskip.config.adapter import AdapterConfig, adapter_problems
from megaskip.config.checks import at_least, percentage, share
from megaskip.config.commands.hub import HubTarget
from megaskip.config.options import Checked, option
from megaskip.config.routing import COMPENSATIONS
from megaskip.config.run import COMPENSATION_LR, DTYPES

TARGETS = ("attn", "mlp", "block")
ORDERS = ("greedy", "cosine")


@dataclass(frozen=True, slots=True, kw_only=True)
class DropPlan(Checked):
    """Which layers go, and what stands in their places."""

    target: str = option("attn", choices=TARGETS)
    """What is dropped: attention, MLP, or whole block."""
    drop: float = option(25.0, metavar="PERCENT")
    """Percent of the model's layers that lose it; rounded to whole layers."""
    drop_layers: str | None = option(None, metavar="SPEC")
    """Drop exactly these, such as 5-8,28, in place of --drop and --order."""
    order: str = option("greedy", choices=ORDERS)
    """Which go first: greedy (by measured loss, with what is dropped before, compensations in
    place) or cosine (those that change their input least: LLM-Drop, arXiv 2406.15786)."""
    candidates: str | None = option(None, metavar="SPEC")
    """Layers that may go [all but the first]."""
    compensation: str = option("low_rank", choices=COMPENSATIONS)
    """What a dropped sublayer leaves in its place: nothing, a constant, or a linear map of what it
    read and a constant."""
    compensation_rank: int = 64
    """Rank of the linear map."""
    rows: int = 512
    """Rows of the data on which the maps are fitted (one forward pass)."""
    order_rows: int = 128
    """Rows on which the greedy order is measured (a forward pass for each layer, and some more)."""

    def _problems(self) -> Iterator[str]:
        yield from percentage("drop", self.drop)
        for name in ("compensation_rank", "rows", "order_rows"):
            yield from at_least(name, getattr(self, name), 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextAndModel(Checked):
    """What is read, and how."""

    model: str = option(metavar="MODEL")
    """Base model: a Hugging Face folder, a hub id, or demo."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    tokenizer: str | None = None
    """Tokenizer folder or hub id, when it is not the model's own."""
    dtype: str = option("auto", choices=DTYPES)
    """Type of the base's weights in memory."""
    trust_remote_code: bool = False
    """Run modelling code that comes with the model folder."""
    data: tuple[str, ...] = option(metavar="PATH[:weight]")
    """Text, as --data of `megaskip train`, repeatable."""
    eval_data: tuple[str, ...] = option((), metavar="PATH[:weight]")
    """Text to measure on, repeatable [carved off the data]."""
    held_out: int = 256
    """Rows carved off to measure on."""
    seq_length: int = 512
    """Longest row in tokens."""
    chat_template: str | None = None
    """A jinja file that replaces the tokenizer's chat template."""
    cache_dir: str | None = option(None, metavar="FOLDER")
    """Where tokenised data are kept."""
    micro_batch_size: int = 4
    """Rows per rank and forward pass."""
    seed: int = 0
    """Seed of the order of the data."""
    ds_config: str | None = option(None, metavar="JSON")
    """DeepSpeed JSON that owns sharding, as in training."""
    pipeline_stages: int = 1
    """Ranks that hold one copy of the model, each some of its layers."""

    def _problems(self) -> Iterator[str]:
        for name in ("seq_length", "held_out", "micro_batch_size", "pipeline_stages"):
            yield from at_least(name, getattr(self, name), 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class FitOptions(Checked):
    """Layers dropped for every text, with compensations in closed form. No gradient."""

    base: TextAndModel
    plan: DropPlan
    output: Path = option(metavar="FOLDER")
    """Router folder to write; it starts `megaskip train --init_routers`."""

    def _problems(self) -> Iterator[str]:
        yield from _stage_problems(self.base, self.plan)


@dataclass(frozen=True, slots=True, kw_only=True)
class DropOptions(Checked):
    """From a model to a smaller one: choose layers, fit, train, export."""

    base: TextAndModel
    plan: DropPlan
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    steps: int = 300
    """Steps of training the maps (and the adapters of --lora_rank) together; 0 exports the maps as
    they are fitted."""
    batch_size: int = 16
    """Rows of a step."""
    distill: float = 0.5
    """Share of each label that is the dense model's own prediction."""
    compensation_lr: float = COMPENSATION_LR
    """Peak learning rate of the maps."""
    nproc: int = 1
    """Ranks that fit and train, on this machine."""
    work_dir: Path | None = option(None, metavar="FOLDER")
    """Where the fitted routers and the run are kept [OUTPUT.work]; a command that is started again
    goes on there."""
    output: Path = option(metavar="FOLDER")
    """Hugging Face folder to write."""
    hub: HubTarget = field(default_factory=HubTarget)

    def _problems(self) -> Iterator[str]:
        yield from _stage_problems(self.base, self.plan)
        yield from at_least("steps", self.steps, 0)
        yield from share("distill", self.distill)
        yield from at_least("compensation_lr", self.compensation_lr, 0.0)
        yield from at_least("nproc", self.nproc, 1)
        if self.nproc % self.base.pipeline_stages:
            yield (
                f"--nproc {self.nproc} ranks cannot form copies of {self.base.pipeline_stages} "
                "stages; choose a multiple of --pipeline_stages"
            )
        elif self.batch_size < 1 or self.batch_size % self.rows_at_once:
            yield (
                f"--batch_size {self.batch_size} cannot be split into micro-batches of "
                f"{self.base.micro_batch_size} rows on {self.nproc} rank(s); choose a multiple of "
                f"{self.rows_at_once}"
            )
        yield from self._adapter_problems()

    def _adapter_problems(self) -> Iterator[str]:
        if not self.adapter.lora_rank:
            if self.plan.compensation == "none" and self.steps:
                yield "--compensation none has nothing to train; add --steps 0, or --lora_rank"
            return
        if not self.steps:
            yield "--lora_rank needs --steps: with --steps 0 nothing trains"
            return
        yield from adapter_problems(
            self.adapter,
            budget="static",
            train="routers",
            lr=1.0,
            max_steps=self.steps,
            cache_prefix=None,
        )

    @property
    def rows_at_once(self) -> int:
        """Return the rows of one micro-batch of all copies of the model."""
        return self.base.micro_batch_size * self.nproc // self.base.pipeline_stages


def _stage_problems(base: TextAndModel, plan: DropPlan) -> Iterator[str]:
    if plan.order == "cosine" and plan.drop_layers is None and base.pipeline_stages > 1:
        yield "--order cosine does not run in stages; take greedy, or --drop_layers"
