"""What is measured before sublayers are dropped for good: on a text, with the routed model.

Loads model and text when they are first asked for, and once.
"""

import dataclasses
import functools
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from megaskip.arch.decoder import find_decoder
from megaskip.arch.padding import needs_mask
from megaskip.arch.task_loss import TaskLoss
from megaskip.calibration.static_drop import without_maps
from megaskip.checkpoint.routers import load_routers, read_router_config
from megaskip.config import DataConfig, ModelConfig, ParallelConfig
from megaskip.config.commands.export_static import ExportStaticOptions
from megaskip.data.collate import Batch
from megaskip.data.loader import DataLoader
from megaskip.errors import DataError
from megaskip.parallel.forward_engine import ForwardEngine
from megaskip.parallel.loading.source import ModelSource, source_in
from megaskip.parallel.loading.whole import load_whole
from megaskip.parallel.topology import Topology
from megaskip.routing import Counts, Routers, RouterSet
from megaskip.runs.source import TrainedRouters, open_text, read_as


class TextMeasure:
    """A model with its routers, and the text that the options or the run name."""

    def __init__(
        self, options: ExportStaticOptions, routers: TrainedRouters, source: ModelSource
    ) -> None:
        self._options, self._routers, self._source = options, routers, source

    @property
    def has_text(self) -> bool:
        """Return whether a text is named, by --data or by the run."""
        return bool(self._options.text.data) or self._options.source.run is not None

    def capacity(self) -> tuple[dict[int, float], str]:
        """Return (share of real units that run by routed layer, the text it was measured on)."""
        batches = [b for b in self._loader.calibration(self._options.rows) if b is not None]
        model, routers = self._model
        return measure_capacity(model, routers, batches), self._about(batches)

    def losses(self, dropped: Collection[int]) -> tuple[float, float, str]:
        """Return (loss with, loss without the compensations of the `dropped` layers, the text): the
        mean of a supervised token in nats, with those layers skipped and all others run.

        On rows that are held out of the text; on calibration rows where none are. Raises DataError
        for a text without tokens to predict.
        """
        held_out = [batch for batch in self._loader.held_out() if batch is not None]
        chosen = held_out or self._loader.calibration(self._options.rows)
        batches = _first(self._options.rows, [batch for batch in chosen if batch is not None])
        if not any(batch.counts.supervised for batch in batches):
            raise DataError("the text holds no tokens to predict; name another with --data")
        model, routers = self._model
        task = TaskLoss(model, chunk_tokens=ParallelConfig().loss_chunk_tokens)
        task.needs_mask = needs_mask(model, routers)
        topology = Topology(rank=0, world_size=1, local_rank=0, device=model.device)
        engine = ForwardEngine(task, routers, topology)
        with routers.override({layer: float(layer not in dropped) for layer in routers.layers}):
            compensated = engine.evaluate(batches, routed=True).loss
            with without_maps(routers):
                plain = engine.evaluate(batches, routed=True).loss
        return compensated, plain, f"{self._about(batches)}{', held out' if held_out else ''}"

    @functools.cached_property
    def _model(self) -> tuple[Any, RouterSet]:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = load_whole(self._as_in_the_run, device).eval()
        return model, load_routers(model, self._routers.folder)

    @functools.cached_property
    def _loader(self) -> DataLoader:
        data, settings = self._settings
        prompt_tokens = read_router_config(self._routers.folder)[0].prompt_tokens
        return open_text(data, settings, self._as_in_the_run, prompt_tokens=prompt_tokens)

    @functools.cached_property
    def _as_in_the_run(self) -> ModelSource:
        _, settings = self._settings
        source = source_in(self._source.folder, self._source.hf_config, settings)
        return dataclasses.replace(source, weights=self._source.weights)

    @functools.cached_property
    def _settings(self) -> tuple[DataConfig, ModelConfig]:
        return read_as(self._options.source, self._options.text, self._routers.base)

    def _about(self, batches: Sequence[Batch]) -> str:
        data, _ = self._settings
        return f"{sum(len(batch.input_ids) for batch in batches)} rows of {', '.join(data.data)}"


@torch.no_grad()
def measure_capacity(
    model: nn.Module, routers: Routers, batches: Iterable[Batch]
) -> dict[int, float]:
    """Return, for each routed layer, the share of real units that run in `batches`."""
    decoder = find_decoder(model).decoder
    device = next(model.parameters()).device
    masked = needs_mask(model, routers)
    counts = Counts.zeros(len(routers.layers), device=device)
    for batch in batches:
        batch = batch.to(device)
        masks = (batch.token_mask, batch.prompt_mask, batch.segment_ids)
        routers.set_batch(*masks, batch.counts.segments)
        decoder(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask if masked else None,
            position_ids=batch.position_ids,
            use_cache=False,
        )
        counts = counts + Counts.of(routers.decisions().values())
    if not counts.units.all():
        raise DataError("the calibration text holds no tokens; name another with --data")
    return dict(zip(routers.layers, counts.capacity_per_layer(), strict=True))


def _first(rows: int, batches: Sequence[Batch]) -> list[Batch]:
    """Return the first batches, as many as hold `rows` rows."""
    chosen: list[Batch] = []
    for batch in batches:
        if sum(len(other.input_ids) for other in chosen) >= rows:
            break
        chosen.append(batch)
    return chosen
