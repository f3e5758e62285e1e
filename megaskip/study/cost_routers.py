"""Routers that predict what skipping costs, compared like everything else."""

import dataclasses
from pathlib import Path

from megaskip.calibration.fit import fit_compensation
from megaskip.calibration.router_fit import fit_routers
from megaskip.checkpoint.base import BaseModel
from megaskip.checkpoint.routers import CONFIG, save_routers
from megaskip.config.commands.compare import BY_COST_TRAINED
from megaskip.study.comparison import Comparison

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
        fitted unless they are there."""
        run = self._folder / f"by_cost-{BY_COST[method]}-s{seed}"
        if not (run / "routers" / CONFIG).is_file():
            comparison, kind = self._comparison, BY_COST[method]
            config = dataclasses.replace(
                comparison.plain, router="affine", compensation=kind, compensation_rank=self._rank
            )
            comparison.attach(config)
            if kind != "none":
                fit_compensation(comparison.engine, comparison.calibration)
            fit_routers(comparison.engine, comparison.cost_text, groups=self._groups, seed=seed)
            save_routers(run / "routers", comparison.routers, base=self._base)
        return run

    def write_start(self, method: str, skip: float, seed: int, folder: Path) -> None:
        """Write the router folder from which a run of a method starts, with the threshold at which
        calibration text skips that share of all units. Raises UnreachedError where there is
        none."""
        self._comparison.take(self.run(method, seed) / "routers", skip)
        save_routers(folder, self._comparison.routers, base=self._base)
