"""LoRA on the frozen base: how large, where, and from which step on. The standard library only."""

from collections.abc import Iterator
from dataclasses import dataclass

from megaskip.config.checks import at_least
from megaskip.config.options import Checked, option
from megaskip.config.routing import UNDECIDED


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig(Checked):
    """LoRA adapters that train with the routers."""

    lora_rank: int = 0
    """Train LoRA adapters of this rank on the frozen base, beside the routers (needs peft); 0
    trains the routers alone."""
    lora_alpha: float | None = None
    """An adapter's update is multiplied by alpha / rank [2 x --lora_rank]."""
    lora_targets: str = option("all", metavar="TARGETS")
    """Linear layers that get an adapter: "all" (of attention and MLP in every decoder layer),
    "attn", "mlp", or names such as q_proj,v_proj."""
    lora_start: int = 0
    """Optimizer step from which the adapters learn; until then the routers learn alone."""
    lora_lr: float = 2e-4
    """Peak learning rate of the adapters, which follows the schedule of --lr."""

    @property
    def alpha(self) -> float:
        """Return --lora_alpha, or its default for the rank."""
        return 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha

    @property
    def names(self) -> tuple[str, ...] | None:
        """Return --lora_targets as names of layers; None where it names a kind of them."""
        if self.lora_targets in TARGETS:
            return None
        return tuple(name.strip() for name in self.lora_targets.split(",") if name.strip())

    def _problems(self) -> Iterator[str]:
        yield from at_least("lora_rank", self.lora_rank, 0)
        yield from at_least("lora_start", self.lora_start, 0)
        yield from at_least("lora_lr", self.lora_lr, 0.0)
        if self.lora_alpha is not None:
            yield from at_least("lora_alpha", self.lora_alpha, 0.0)
            if self.lora_alpha == 0:
                yield "--lora_alpha 0 switches the adapters off; leave out --lora_rank for that"
        if self.names == ():
            yield (
                f"--lora_targets {self.lora_targets!r} names nothing; it is one of "
                f"{', '.join(TARGETS)} or a list such as q_proj,v_proj"
            )
        yield from self._without_rank()

    def _without_rank(self) -> Iterator[str]:
        if self.lora_rank:
            return
        given = {
            "lora_alpha": self.lora_alpha is not None,
            "lora_targets": self.lora_targets != "all",
            "lora_start": self.lora_start > 0,
        }
        for name, is_given in given.items():
            if is_given:
                yield f"--{name} needs --lora_rank: without it there are no adapters"


TARGETS = ("all", "attn", "mlp")
"""Kinds of layers that --lora_targets can name."""


def adapter_problems(
    adapter: AdapterConfig,
    *,
    budget: str,
    train: str,
    lr: float,
    max_steps: int | None,
    cache_prefix: str | None,
) -> Iterator[str]:
    """Yield where adapters do not go together with the other settings of a run."""
    rank, start = adapter.lora_rank, adapter.lora_start
    if budget == "dense" and not rank:
        yield "--budget dense trains adapters alone: give it --lora_rank"
    if not rank:
        return
    if train == "full":
        yield f"--lora_rank {rank} trains adapters of a frozen model; leave out --train full"
    if lr == 0:
        yield "--lr 0 keeps the adapters still, too: --lora_lr is scaled with it; take a tiny --lr"
    if cache_prefix is not None:
        yield (
            f"--cache_prefix does not go with --lora_rank {rank}: adapters change the layers in "
            "front of the first routed one; leave one of them out"
        )
    if max_steps is not None and start >= max_steps:
        yield (
            f"--lora_start {start} lies behind the last step (--max_steps {max_steps}), so no "
            "adapter would learn; give a lower --lora_start, or more steps"
        )
    if start and budget in UNDECIDED:
        yield (
            f"--lora_start {start} with --budget {budget}: no router learns before it; leave "
            "--lora_start out"
        )
