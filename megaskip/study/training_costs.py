"""What each method of a comparison takes to make: seconds, FLOPs, parameters, bytes. Knows runs and
numbers."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from megaskip.bench.counts import attention_formulas
from megaskip.checkpoint.atomic import read_json
from megaskip.reporting.summary import human_bytes, or_dash

CONTROL = "dense_adapted"
"""The method that others are set against: LoRA for as many steps."""
COST = "cost.json"
"""In the folder of a run: FLOPs and parameters."""
COST_HEADER = (
    *("method", "asked", "fit s", "training s", "TFLOP", "parameters", "saved"),
    *("seconds / LoRA", "FLOPs / LoRA"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingCost:
    """What a method takes at a skip, a mean over its runs; None for what was not counted."""

    method: str
    asked: float
    fit_seconds: float | None
    """Of the closed form before the training, or instead of it."""
    train_seconds: float | None
    """Of the steps and what stands between them."""
    flops: float | None
    """Of the fit and of all steps: the first step's, times their number."""
    parameters: int | None
    """That are fitted or trained."""
    saved_bytes: int | None
    """Of the weights on disk."""
    seconds_ratio: float | None = None
    """Fit and training over the training of LoRA in the same comparison."""
    flops_ratio: float | None = None

    @property
    def seconds(self) -> float | None:
        """Return the seconds of fit and training."""
        known = [s for s in (self.fit_seconds, self.train_seconds) if s is not None]
        return sum(known) if known else None

    def row(self) -> tuple[str, ...]:
        """Return the row below COST_HEADER."""
        tera = None if self.flops is None else self.flops / 1e12
        return (
            self.method,
            f"{self.asked:.1%}",
            or_dash(self.fit_seconds, ".1f"),
            or_dash(self.train_seconds, ".1f"),
            or_dash(tera, ".3g"),
            or_dash(self.parameters, ",d"),
            "-" if self.saved_bytes is None else human_bytes(self.saved_bytes),
            or_dash(self.seconds_ratio, ".2f"),
            or_dash(self.flops_ratio, ".2f"),
        )


def count_flops(work: Callable[[], object]) -> int:
    """Return the FLOPs of what `work` does."""
    with FlopCounterMode(display=False, custom_mapping=attention_formulas()) as counter:
        work()
    return int(counter.get_total_flops())


def cost_of(
    method: str, asked: float, runs: Sequence[Path], fit: dict[str, Any] | None
) -> TrainingCost:
    """Return the cost of a method whose runs are `runs`, if it is trained, behind a `fit` with
    seconds, flops, parameters and bytes, if there was one."""
    fit = fit or {}
    counted = [read_json(run / COST) for run in runs if _has(run)]
    flops = [c["flops"] for c in counted] or ([0] if fit and not runs else [])
    reports = [read_json(run / "report.json") for run in runs]
    return TrainingCost(
        method=method,
        asked=asked,
        fit_seconds=fit.get("seconds"),
        train_seconds=statistics.mean(r["seconds"] for r in reports) if runs else None,
        flops=statistics.mean(flops) + fit.get("flops", 0) if flops else None,
        parameters=counted[0]["parameters"] if counted else fit.get("parameters"),
        saved_bytes=_bytes(runs[0]) if runs else fit.get("bytes"),
    )


def over_control(costs: Sequence[TrainingCost]) -> list[TrainingCost]:
    """Return costs with their ratios to the control at the same skip, where it is there."""
    controls = {cost.asked: cost for cost in costs if cost.method == CONTROL}
    rows = []
    for cost in costs:
        control = controls.get(cost.asked)
        if control is not None:
            seconds = _ratio(cost.seconds, control.seconds)
            flops = _ratio(cost.flops, control.flops)
            cost = dataclasses.replace(cost, seconds_ratio=seconds, flops_ratio=flops)
        rows.append(cost)
    return rows


def _has(run: Path) -> bool:
    return (run / COST).is_file()


def _bytes(run: Path) -> int:
    folder = run / "routers" if (run / "routers").is_dir() else run
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def _ratio(value: float | None, control: float | None) -> float | None:
    return None if value is None or not control else value / control
