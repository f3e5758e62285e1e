"""Options of `megaskip fit-routers`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megaskip.config.checks import at_least, share, share_hint
from megaskip.config.commands.fit import TextAndModel
from megaskip.config.options import Checked, option
from megaskip.config.routing import COMPENSATIONS, SUBLAYER_GRANULARITIES


@dataclass(frozen=True, slots=True, kw_only=True)
class FitRoutersOptions(Checked):
    """Routers that predict what skipping costs, and maps for what they skip, in closed form."""

    base: TextAndModel
    granularity: str = option(
        "mlp_token",
        choices=SUBLAYER_GRANULARITIES,
        elsewhere={
            "expert_token": "; routers of experts are not fitted: train them with `megaskip train`"
        },
        metavar="GRANULARITY",
    )
    """What one decision covers, as in training. Costs differ most between single tokens."""
    layers: str = option("all", metavar="SPEC")
    """Routed layers, as in training, or all but the first."""
    capacity: tuple[float, ...] = option((0.9, 0.75, 0.5), separator=",", metavar="SHARE,...")
    """Shares of the routed units to keep; thresholds of all are stored, the first is in force."""
    compensation: str = option("low_rank", choices=COMPENSATIONS)
    """What a skipped unit gets in the place of its sublayer; fitted before the costs are measured
    with it."""
    compensation_rank: int = 64
    """Rank of the linear map."""
    rows: int = 512
    """Rows of the data on which maps are fitted and thresholds found."""
    cost_rows: int = 256
    """Other rows, on which costs are measured: a forward and a backward pass for each of
    --groups."""
    groups: int = 4
    """Into how many groups the layers are dealt, each of which skips together: about one over the
    share that will be skipped."""
    distill: float = 1.0
    """Share of each label that is the dense model's own prediction; its costs scatter less than
    those of the text."""
    activation_checkpointing: bool = False
    """As in training: less memory, for a third more time."""
    output: Path = option(metavar="FOLDER")
    """Router folder to write."""

    def _problems(self) -> Iterator[str]:
        if not self.capacity:
            yield "--capacity names no share; give shares such as 0.9,0.75"
        for capacity in self.capacity:
            if not 0 < capacity < 1:
                problem = f"--capacity {capacity:g} must lie inside (0, 1): 1 is the base model"
                yield problem + share_hint(capacity)
        for name in ("compensation_rank", "rows", "cost_rows", "groups"):
            yield from at_least(name, getattr(self, name), 1)
        yield from share("distill", self.distill)
