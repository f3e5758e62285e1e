"""Every way to skip parts of one model, on the same documents and at equal skip.

Knows a model and its texts, not how routers were trained.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megaskip.arch import attach_routers, detach_routers, find_decoder
from megaskip.arch.adapters import add_adapters
from megaskip.calibration.allocation import UnreachedError, allocate
from megaskip.calibration.capacities import reach_capacity
from megaskip.calibration.router_fit import split_off
from megaskip.calibration.similarity import mean_similarity
from megaskip.calibration.threshold import TOLERANCE
from megaskip.checkpoint.adapters import load_adapter
from megaskip.checkpoint.routers import fill_routers, read_router_config
from megaskip.config import RouterConfig, RunConfig, resolve_layers
from megaskip.data import Batch
from megaskip.data.tokenizer import load_tokenizer
from megaskip.errors import ConfigError
from megaskip.parallel.build import build_engine, choose_executor
from megaskip.parallel.engine import Engine
from megaskip.parallel.loading.source import ModelSource
from megaskip.parallel.topology import Topology
from megaskip.reporting.token_map import TokenMap, token_map_texts
from megaskip.routing import RouterSet
from megaskip.runs.source import open_text
from megaskip.study.agreement import Continuations
from megaskip.study.baselines import (
    Order,
    Policy,
    random_order,
    skipping,
    static_order,
    uniform_order,
)
from megaskip.study.measured import Measured, Yardstick
from megaskip.study.over_seeds import point_of
from megaskip.study.pareto import Point
from megaskip.study.questions import PAIRS, Question, QuestionSet, read_choices, read_pairs
from megaskip.study.scoring import score, short_names, spread_documents

_ROWS = 2
"""Rows of a micro-batch; a batch for forward passes only has four times as many (DataLoader)."""
_SHOWN_TOKENS = 60
"""Of the document in the picture."""
_LONGEST = 2048
"""Most tokens of a question with an option; a longer one loses its beginning, as in lm-eval."""
_NAMES = {"attn": "attentions", "mlp": "MLPs", "block": "layers"}


class Comparison:
    """The model, its texts, and the routers through which every method skips."""

    def __init__(
        self,
        config: RunConfig,
        topology: Topology,
        source: ModelSource,
        *,
        prefill_runs: int = 0,
        cost_rows: int = 0,
    ) -> None:
        """Load the model of `source`; `config.router.layers` are what all methods route and
        `config.data.held_out` the documents to measure on; see `measure` for `prefill_runs`.
        `cost_rows` are read beside the calibration text, for `cost_text`."""
        self._config, self._topology = config, topology
        self.skips = _NAMES[config.router.target]
        """What is skipped, as a plural noun."""
        self._engine = build_engine(config, topology, source, None)
        self.model: Any = self._engine.model
        self.depth = len(find_decoder(self.model).layers)
        self.layers = resolve_layers(config.router.layers, self.depth)
        self._tokenizer = load_tokenizer(source.folder)
        self._vocabulary = source.text_config.vocab_size
        loader = open_text(
            config.data,
            config.model,
            source,
            prompt_tokens=config.data.prompt_tokens,
            micro_batch_size=_ROWS,
            tokenizer=self._tokenizer,
        )
        documents = spread_documents(loader.data.held_out, config.data.held_out)
        data = dataclasses.replace(loader.data, held_out=documents)
        loader = dataclasses.replace(loader, data=data)
        rows = config.optim.calibration_rows + cost_rows
        cost_text, calibration = split_off(loader.calibration(rows), cost_rows / rows)
        self.cost_text = self._here(cost_text)
        """Text on which costs are measured; none of the calibration text."""
        self._calibration = self._here(calibration)
        self._held_out = self._here(loader.held_out())
        if not self._held_out:
            raise ConfigError("no text is held out to measure on; give --eval_data or more --data")
        names = short_names([source.name for source in data.stats.sources])
        self._domains = [names[row.segments[0].source] for row in documents]
        self._yardstick = Yardstick(held_out=self._held_out, prefill_runs=prefill_runs)
        self._near: dict[Path, RouterConfig] = {}

    def add_pairs(self, folder: Path, limit: int) -> None:
        """Measure minimal pairs, too: `limit` of every set in `folder`."""
        self._add_questions({PAIRS: read_pairs(folder, limit)})

    def add_choices(self, paths: Sequence[Path], limit: int) -> None:
        """Measure multiple-choice tasks, too: `limit` questions of every file of `paths`."""
        self._add_questions(read_choices(paths, limit))

    def _add_questions(self, tasks: Mapping[str, Sequence[Question]]) -> None:
        longest = getattr(self.model.config, "max_position_embeddings", _LONGEST)
        for name, questions in tasks.items():
            if name in {task.name for task in self._yardstick.questions}:
                raise ConfigError(f"two tasks are called {name}; rename the file of --choice")
            asked = QuestionSet(
                name,
                questions,
                self._tokenizer,
                prompt_tokens=self._config.data.prompt_tokens,
                vocabulary=self._vocabulary,
                max_length=min(longest, _LONGEST),
            )
            asked.batches = self._here(asked.batches)
            self._yardstick.questions.append(asked)

    def add_continuations(self, count: int, tokens: int = 64) -> None:
        """Compare `count` greedy continuations of `tokens` tokens with the dense model's, too."""
        self._yardstick.continuations = Continuations(
            self.model, self.routers, self._held_out, count=count, tokens=tokens
        )

    def fingerprint(self) -> str:
        """Return a hash of all text that is measured on, fitted to or searched with, and of the
        right answers."""
        digest = hashlib.sha256()
        asked = self._yardstick.questions
        digest.update(repr([(task.name, task.questions) for task in asked]).encode())
        tasks = [batch for task in asked for batch in task.batches]
        for batch in (*self.cost_text, *self._calibration, *self._held_out, *tasks):
            for tensor in (batch.input_ids, batch.labels, batch.prompt_mask):
                digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _here(self, batches: Sequence[Batch | None]) -> list[Batch]:
        return [batch.to(self._topology.device) for batch in batches if batch is not None]

    @property
    def engine(self) -> Engine:
        """Return the engine with the routers that are attached now."""
        return self._engine

    @property
    def calibration(self) -> Sequence[Batch]:
        """Return the calibration text."""
        return self._calibration

    def some_calibration(self, rows: int) -> Sequence[Batch]:
        """Return about the first `rows` rows of the calibration text."""
        size = len(self._calibration[0].input_ids)
        return self._calibration[: -(-rows // size)]

    @property
    def routers(self) -> RouterSet:
        """Return the routers that are attached now."""
        return self._engine.routers

    @property
    def plain(self) -> RouterConfig:
        """Return the configuration of routers that decide nothing yet, for all methods alike."""
        granularity = self._config.router.granularity
        return RouterConfig(granularity=granularity, layers=self.layers)

    def share(self, skip: float) -> float:
        """Return the share of the routed layers that makes `skip` of all layers."""
        share = skip * self.depth / len(self.layers)
        if not 0 < share < 1:
            raise ConfigError(
                f"--skip {100 * skip:g} cannot be reached by {len(self.layers)} routed layers of "
                f"{self.depth}; route more (--layers)"
            )
        return share

    # -- ways to skip

    def orders(self, seeds: Sequence[int]) -> dict[str, list[Order]]:
        """Return the baselines' orders of layers, one a seed where they have seeds."""
        similarity = self.similarity()
        return {
            "static": [static_order(similarity, self.layers)],
            "random": [random_order(self.layers, seed) for seed in seeds],
            "uniform": [uniform_order(self.layers)],
        }

    def similarity(self) -> dict[int, float]:
        """Return how little what is skipped changes the calibration text, by routed layer."""
        return mean_similarity(self._engine, self._calibration)

    @property
    def everything(self) -> Policy:
        """Return the policy that skips nothing: the dense model."""
        return skipping(static_order({}, ()), self.layers, 0.0)

    def policy(self, order: Order, skip: float) -> Policy:
        """Return the policy that skips the share `skip` of all layers in that order."""
        return skipping(order, self.layers, skip * self.depth)

    def take(self, routers: Path, skip: float, *, rounds: int = 0) -> float:
        """Put the routers of a folder on the model, at the threshold at which the calibration text
        skips the share `skip` of all; return the capacity it keeps.

        With `rounds` of `allocate` every layer gets its own threshold; the search begins at those
        of the last share. Raises UnreachedError when no threshold keeps the capacity.
        """
        config, layers, _ = read_router_config(routers)
        if layers != self.layers:
            raise ConfigError(f"{routers}: routes layers {layers}, the comparison {self.layers}")
        if config.granularity != self.plain.granularity:
            raise ConfigError(
                f"{routers}: skips by {config.granularity}, the comparison by "
                f"{self.plain.granularity}; remove the run, or take another --output"
            )
        # The capacity of training does not matter, because the threshold is searched. All methods
        # decide on the prompt, as in generation: with pool="all" a method would see the answer that
        # it is scored on.
        self.attach(
            dataclasses.replace(
                self.plain,
                router=config.router,
                prompt_tokens=config.prompt_tokens,
                compensation=config.compensation,
                compensation_rank=config.compensation_rank,
            ),
            routers,
        )
        fill_routers(routers, self.routers)
        capacity = 1 - self.share(skip)
        kept, _ = reach_capacity(self._engine, self._calibration, capacity, rounds=6)
        if rounds:
            near = self._near.get(routers)
            kept = allocate(self._engine, self._calibration, capacity, rounds=rounds, near=near)
            self._near[routers] = self.routers.config
        if abs(kept - capacity) > TOLERANCE:
            raise UnreachedError(
                f"{routers}: at the nearest threshold they keep {kept:.3f} of the calibration "
                f"text, not {capacity:.3f}: it has too few different rows (--calibration_rows)"
            )
        return kept

    def attach(
        self, config: RouterConfig, folder: Path | None = None, *, run: RunConfig | None = None
    ) -> None:
        """Put fresh routers on the model in place of those that are there, and the adapter of a
        router folder, if it has one, or fresh adapters as a `run` would have them."""
        detach_routers(self.model)
        routers = attach_routers(self.model, config, register=False, verify=False)
        if folder is not None:
            device = self._topology.device
            routers.take_adapters(load_adapter(self.model, folder, device=device))
        if run is not None:
            device = self._topology.device
            add_adapters(self.model, routers, self.model, run, device=device)
        self._engine = Engine(self._engine.module, routers, self._config, self._topology)

    def engine_of(self, config: RunConfig) -> Engine:
        """Return an engine of the routers that are attached now, which trains as `config` says."""
        choose_executor(self.routers, config)
        return Engine(self._engine.module, self.routers, config, self._topology)

    # -- measures

    def measure(self, policy: Policy | None) -> Measured:
        """Return what a policy does to the documents; without one the routers decide."""
        return self._yardstick.measure(self.model, self.routers, policy, self.everything)

    def picture(self, title: str) -> TokenMap:
        """Return what the routers do to the first held-out document."""
        first = self._held_out[0]
        score(self.model, self.routers, self._held_out[:1])
        tokens = first.input_ids[0][first.token_mask[0]][:_SHOWN_TOKENS]
        keep = torch.stack(
            [kept[0].expand(len(first.token_mask[0])) for kept in self.routers.keep().values()]
        )
        return TokenMap(
            tokens=token_map_texts(self._tokenizer, tokens.tolist()),
            layers=self.layers,
            ran=(keep[:, : len(tokens)] > 0).cpu().numpy(),
            num_layers=self.depth,
            prompt_tokens=0,
            title=title,
            target=self.routers.config.target,
        )

    def point(
        self,
        method: str,
        asked: float,
        measured: Sequence[Measured],
        dense: Measured,
        *,
        train_seconds: float | None = None,
    ) -> Point:
        """Return a method's point: scores are averaged over seeds, then paired with dense."""
        point = point_of(method, asked, measured, dense, self.layers, self.depth, self._domains)
        return dataclasses.replace(point, train_seconds=train_seconds)
