"""Routers that predict what skipping costs, compared like everything else."""

import dataclasses
import time
from pathlib import Path
from typing import Any

from filelock import FileLock

from megaskip.calibration.fit import fit_compensation
from megaskip.calibration.router_fit import fit_routers
from megaskip.checkpoint.atomic import read_json, write_json
from megaskip.checkpoint.base import BaseModel
from megaskip.checkpoint.routers import CONFIG, save_routers
from megaskip.config.commands.compare import BY_COST_TRAINED
from megaskip.study.comparison import Comparison
from megaskip.study.training_costs import COST, count_flops

BY_COST = {"by_cost": "none", "by_cost_fitted": "low_rank", BY_COST_TRAINED: "low_rank"}
"""Methods: what stands in the place of what is skipped."""


class CostRouters:
    """The routers in closed form of one comparison: fitted once for each seed, for all skips."""

    def __init__(
        self, comparison: Comparison, base: BaseModel, folder: Path, *, rank: int, groups: int
    ) -> None:
        """`folder` keeps what is fitted, to this text and with these settings alone; `rank` is that
        of the maps, `groups` as in fit_routers."""
        self._comparison, self._base, self._folder = comparison, base, folder
        self._rank, self._groups = rank, groups

    def run(self, method: str, seed: int) -> Path:
        """Return the folder whose `routers` are those of a method, before any training; they are
        fitted unless they are there. Ranks that share the folder wait for the one that fits."""
        run = self._run(method, seed)
        run.mkdir(parents=True, exist_ok=True)
        with FileLock(run / "fit.lock"):
            if not (run / "routers" / CONFIG).is_file():
                self._fit(BY_COST[method], seed, run)
        return run

    def fit_cost(self, method: str, seed: int) -> dict[str, Any] | None:
        """Return seconds, FLOPs, parameters and bytes of what `run` has fitted; None where nothing
        was fitted, or not counted."""
        file = self._run(method, seed) / COST
        return read_json(file) if file.is_file() else None

    def _run(self, method: str, seed: int) -> Path:
        return self._folder / f"by_cost-{BY_COST[method]}-s{seed}"

    def _fit(self, kind: str, seed: int, run: Path) -> None:
        """Fit maps and routers, and write them with what that took."""
        comparison, begun = self._comparison, time.monotonic()
        config = dataclasses.replace(
            comparison.plain, router="affine", compensation=kind, compensation_rank=self._rank
        )
        comparison.attach(config)

        def fit() -> None:
            if kind != "none":
                fit_compensation(comparison.engine, comparison.calibration)
            fit_routers(comparison.engine, comparison.cost_text, groups=self._groups, seed=seed)

        cost: dict[str, Any] = {"flops": count_flops(fit), "seconds": time.monotonic() - begun}
        parameters = sum(parameter.numel() for parameter in comparison.routers.parameters())
        write_json(run / COST, cost | {"parameters": parameters, "bytes": 4 * parameters})
        save_routers(run / "routers", comparison.routers, base=self._base)

    def write_start(self, method: str, skip: float, seed: int, folder: Path) -> None:
        """Write the router folder from which a run of a method starts, with the threshold at which
        calibration text skips that share of all units. Raises UnreachedError where there is
        none."""
        self._comparison.take(self.run(method, seed) / "routers", skip)
        save_routers(folder, self._comparison.routers, base=self._base)
