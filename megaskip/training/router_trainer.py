"""Router-tuning: what a run trains, measures and keeps when the backbone is frozen."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megaskip.arch.trainable import describe_layers, describe_trainable
from megaskip.calibration.fit import fit_compensation
from megaskip.calibration.threshold import calibrate_threshold
from megaskip.checkpoint import BaseModel, adapters
from megaskip.checkpoint.resume import require_same_routers, require_same_thresholds
from megaskip.checkpoint.routers import WEIGHTS, save_routers, write_router_files
from megaskip.log import get_logger
from megaskip.parallel.engine import Engine
from megaskip.parallel.position_losses import PositionLosses
from megaskip.routing import PREFIX, RouterSet
from megaskip.routing.adapters import ADAPTER, is_adapter
from megaskip.training.loop import Trainer
from megaskip.training.prefix import PrefixCache

logger = get_logger(__name__)

LONG_ROWS = 2048
"""Tokens of a row from which on held-out losses are told by position."""


@dataclass(kw_only=True)
class RouterTrainer(Trainer):
    """Trains the routers of a frozen model."""

    engine: Engine
    prefix: PrefixCache | None = None
    """With --cache_prefix."""

    def prepare(self) -> None:
        """Compute the states in front of the first routed layer that are not there, with
        --cache_prefix. Collective."""
        if self.prefix is None:
            return
        if self.step == 0:
            self.save()  # a run that is stopped meanwhile begins here again
        self.prefix.fill(
            self.engine,
            self.loader,
            self.step,
            progress=self.reporter.progress,
            check=self.stop_if_asked,
        )

    def prepare_step(self) -> None:
        """Let the adapters learn from --lora_start on. Every rank calls it."""
        adapters = self.engine.routers.adapters
        if adapters is not None:
            adapters.learn(self.step >= self.config.adapter.lora_start)

    def start(self) -> None:
        """Begin with the compensations in closed form, unless the routers come from a folder.
        Collective."""
        rows = self.config.optim.fit_rows
        has_maps = self.engine.routers.config.compensation != "none"
        if not has_maps or not rows or self.config.model.init_routers is not None:
            return
        self.save()  # a run that is stopped meanwhile begins here again
        batches = self.reporter.progress(self.loader.calibration(rows), "fitting, a pass")
        explained = fit_compensation(self.engine, batches, check=self.stop_if_asked)
        logger.info(
            "compensations fitted: they explain %.0f %% (layer %d) to %.0f %% (layer %d) of the "
            "variance of what they stand for",
            *_lowest_and_highest(explained),
        )

    def calibrate(self) -> None:
        """Take out the last small error of the capacity with the threshold. Collective."""
        routers, rows = self.engine.routers, self.config.optim.calibration_rows
        if routers.config.budget != "global" or not rows:
            return
        self.save()  # what is trained is safe while this takes its time
        batches = self.reporter.progress(self.loader.calibration(rows), "calibrating, a pass")
        self.calibrated = calibrate_threshold(self.engine, batches, check=self.stop_if_asked)
        logger.info(
            "calibrated on training data: capacity %.4f at threshold %s",
            self.calibrated,
            routers.settled_config().describe_threshold(),
        )

    def evaluate(self) -> dict[str, Any]:
        """Return the held-out numbers of the dense and of the routed model. Collective."""
        held_out = self.loader.held_out()
        if not held_out:
            return {}
        batches = self.reporter.progress(held_out, "held out")
        by_position = [self._by_position(), self._by_position()]
        dense, routed = (
            self.engine.evaluate(batches, routed=r, by_position=p, check=self.stop_if_asked)
            for r, p in zip((False, True), by_position, strict=True)
        )
        layers, base = self.engine.routers.layers, {}
        if self.engine.routers.adapters is not None:
            frozen = self.engine.evaluate(
                batches, routed=False, adapted=False, check=self.stop_if_asked
            )
            base = {"loss_base": frozen.loss}
        return {
            **base,
            "loss_dense": dense.loss,
            "loss_routed": routed.loss,
            "capacity": routed.capacity,
            "capacity_standard_error": routed.capacity_error,
            "capacity_per_layer": dict(zip(layers, routed.capacity_per_layer, strict=True)),
            **_span_rows(*by_position),
        }

    def _by_position(self) -> PositionLosses | None:
        """Return what sums up losses by position; None for rows of which all positions are near,
        and in pipeline stages."""
        tokens = self.config.data.seq_length
        if tokens < LONG_ROWS or self.topology.num_stages > 1:
            return None
        return PositionLosses(tokens, self.topology.device)

    def scores(self) -> dict[int, Tensor]:
        """Return router scores of the last micro-batch by layer. Collective; the first rank gets
        all layers'."""
        return self.engine.scores()


def _lowest_and_highest(explained: Mapping[int, float]) -> tuple[float, int, float, int]:
    """Return (percent, layer) of the layer that is explained least, and of that explained most."""
    low, high = min(explained, key=explained.__getitem__), max(explained, key=explained.__getitem__)
    return 100 * explained[low], low, 100 * explained[high], high


def _span_rows(
    dense: PositionLosses | None, routed: PositionLosses | None
) -> dict[str, list[dict[str, float]]]:
    """Return the losses by span of positions, as they are in reports. Collective."""
    if dense is None or routed is None:
        return {}
    pairs = zip(dense.over_ranks(), routed.over_ranks(), strict=True)
    return {
        "by_position": [
            {
                "first": span.first,
                "stop": span.stop,
                "loss_dense": span.loss,
                "loss_routed": other.loss,
                "tokens": span.tokens,
            }
            for span, other in pairs
        ]
    }


class RouterWeights:
    """The trained routers, and adapters if there are any, as files: those of a router folder."""

    def __init__(self, routers: RouterSet, base: BaseModel) -> None:
        self._routers = routers
        self._base = base

    def stored_as(self, name: str) -> tuple[str, str]:
        """Return (file in a checkpoint folder, name of the tensor in it) of a parameter."""
        if is_adapter(name):
            file = f"{adapters.FOLDER}/{adapters.WEIGHTS}"
            return file, f"{adapters.PREFIX}{name.removeprefix(ADAPTER)}"
        return WEIGHTS, f"{PREFIX}.{name}"

    def write(self, folder: Path) -> None:
        """Write a router folder's files into a checkpoint folder."""
        write_router_files(folder, self._routers, self._base)

    def require_same(self, checkpoint: Path) -> None:
        """Raise CheckpointError when a checkpoint's routers are set up in another way."""
        require_same_routers(checkpoint, self._routers)

    def steering(self) -> dict[str, float]:
        """Return what the budget remembers."""
        return self._routers.steering.budget.state()

    def steer_from(self, state: Mapping[str, float], checkpoint: Path) -> None:
        """Continue the budget from `state`; raises CheckpointError when the thresholds are not
        those of `checkpoint` then."""
        self._routers.steering.budget.restore(state)
        require_same_thresholds(checkpoint, self._routers)

    def save_result(self, output_dir: Path) -> dict[str, Path]:
        """Write the run's router folder."""
        folder = save_routers(output_dir / "routers", self._routers, base=self._base)
        return {"routers": folder}

    def describe(self) -> list[tuple[str, str]]:
        """Return what trains and what capacity is asked of it."""
        config = self._routers.config
        trained = {n: p.shape for n, p in self._routers.trained_parameters().items()}
        routers = {n: shape for n, shape in trained.items() if not is_adapter(n)}
        maps, lora = self._routers.describe_compensation(), self._routers.adapters
        layers = describe_layers(self._routers.layers)
        asked = f"{config.capacity:.2f} of layers {layers}, {config.granularity}"
        return [
            ("trains", describe_trainable(routers) or "adapters alone"),
            *([] if maps is None else [("compensation", maps)]),
            *([] if lora is None else [("adapters", lora.describe())]),
            ("capacity asked", f"{asked}, budget {config.budget}"),
        ]
