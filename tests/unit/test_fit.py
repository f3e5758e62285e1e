"""Compensations in closed form, and the order in which layers are dropped."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from routed_models import VOCABULARY
from torch import Tensor

from megaskip import RouterConfig, attach_routers
from megaskip.arch.task_loss import TaskLoss
from megaskip.calibration.drop_order import greedy_drop_order
from megaskip.calibration.fit import fit_compensation
from megaskip.calibration.fit_progress import FitProgress
from megaskip.calibration.static_drop import mean_similarity
from megaskip.config import SUBLAYER_GRANULARITIES, RunConfig
from megaskip.data import Batch
from megaskip.errors import CheckpointError, ConfigError, MegaskipError
from megaskip.parallel.engine import Engine
from megaskip.parallel.topology import process_group, read_topology


def batches(count: int = 8, *, padding: int = 0, seed: int = 0) -> list[Batch]:
    """Return batches of 16 rows with 12 real tokens and some padding behind them."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = torch.randint(3, VOCABULARY, (16, 12), generator=generator)
        ids = torch.nn.functional.pad(ids, (0, padding))
        real = torch.zeros_like(ids, dtype=torch.bool)
        real[:, :12] = True
        made.append(
            Batch(
                input_ids=ids,
                labels=ids.masked_fill(~real, -100),
                token_mask=real,
                prompt_mask=real,
                position_ids=torch.arange(ids.shape[1]).expand_as(ids),
            )
        )
    return made


@pytest.fixture
def make_engine() -> Iterator[Any]:
    topology = read_topology({})

    def make(**settings: Any) -> Engine:
        model = tiny_model(settings.pop("family", "llama"))
        config = RouterConfig(**{"layers": "1-4", "compensation_rank": 8, **settings})
        routers = attach_routers(model, config, register=False)
        return Engine(TaskLoss(model, chunk_tokens=64), routers, RunConfig(), topology)

    with process_group(topology, timeout=60):
        yield make


def unexplained(engine: Engine, text: list[Batch]) -> dict[int, float]:
    """Return by layer the share of the updates' variance that the maps miss, measured by itself."""
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in engine.routers.layers}
    for layer, gate in engine.routers.gates.items():

        def observe(read: Tensor, update: Tensor, layer: int = layer) -> None:
            seen[layer].append((read[:, :12].flatten(0, 1), update[:, :12].flatten(0, 1)))

        gate.observe = observe
    with torch.no_grad(), engine.routers.disabled():
        list(engine.forwards(text))
    missed = {}
    for layer, pairs in seen.items():
        read, update = (torch.cat(column) for column in zip(*pairs, strict=True))
        error = update - engine.routers.router(layer).compensation(read)  # type: ignore[misc]
        missed[layer] = float(error.square().sum() / (update - update.mean(0)).square().sum())
        engine.routers.gates[layer].observe = None
    return missed


@pytest.mark.parametrize("kind", ["bias", "low_rank"])
@pytest.mark.parametrize("granularity", SUBLAYER_GRANULARITIES)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_maps_explain_as_much_as_is_said(
    make_engine: Any, family: str, granularity: str, kind: str
) -> None:
    engine = make_engine(granularity=granularity, compensation=kind, family=family)
    text = batches()
    with torch.no_grad():
        zero = unexplained(engine, text)
    said = fit_compensation(engine, text)
    missed = unexplained(engine, text[2:])  # the rows of the second phase
    for layer, explained in said.items():
        assert 1 - missed[layer] == pytest.approx(explained, abs=2e-3)
        assert missed[layer] < zero[layer]
        assert (explained > 0.1) == (kind == "low_rank")


def test_padding_does_not_count(make_engine: Any) -> None:
    found = []
    for padding in (0, 5):
        engine = make_engine(compensation="low_rank")
        fit_compensation(engine, batches(padding=padding))
        found.append({n: p.clone() for n, p in engine.routers.named_parameters()})
    probe = torch.randn(64, 32)
    for layer in (1, 4):
        maps = [
            of[f"{layer}.attn.compensation.up"] @ of[f"{layer}.attn.compensation.down"]
            for of in found
        ]
        assert torch.allclose(probe @ maps[0].t(), probe @ maps[1].t(), atol=1e-4)


def test_a_rank_without_text_of_its_own_adds_nothing(make_engine: Any) -> None:
    first, second = make_engine(compensation="low_rank"), make_engine(compensation="low_rank")
    text = batches(4)
    fit_compensation(first, text)
    fit_compensation(second, [text[0], *text[1:], None])
    for name, parameter in first.routers.named_parameters():
        assert torch.allclose(second.routers.get_parameter(name), parameter, atol=1e-5), name


def test_fitted_maps_lose_less_than_nothing_does(make_engine: Any) -> None:
    engine, held_out = make_engine(compensation="low_rank"), batches(2, seed=1)
    everything_skipped = dict.fromkeys(engine.routers.layers, 0.0)
    losses = []
    for fitted in (False, True):
        if fitted:
            fit_compensation(engine, batches())
        with engine.routers.override(everything_skipped):
            losses.append(kl_to_dense(engine, held_out))
    assert losses[1] < 0.8 * losses[0]


def kl_to_dense(engine: Engine, text: list[Batch]) -> float:
    """Return the mean divergence of the predictions from those of the dense model."""
    model, total = engine.module.model, 0.0
    with torch.no_grad():
        for batch in text:
            logits = model(batch.input_ids).logits.log_softmax(-1)
            with engine.routers.disabled():
                dense = model(batch.input_ids).logits.log_softmax(-1)
            total += float((dense.exp() * (dense - logits)).sum(-1).mean())
    return total


def test_nothing_to_fit_is_said(make_engine: Any) -> None:
    with pytest.raises(ConfigError, match="nothing to fit with compensation none"):
        fit_compensation(make_engine(), batches(1))
    with pytest.raises(ConfigError, match="no text"):
        fit_compensation(make_engine(compensation="bias"), [])


def overflowing(engine: Engine) -> Engine:
    """Return the engine with a model that computes nan behind the MLP of its layer 2."""
    engine.model.get_submodule("model.layers.2.mlp.down_proj").weight.data[3, 3] = torch.nan
    return engine


def test_numbers_that_are_not_finite_are_one_message(make_engine: Any) -> None:
    """No map, order or choice follows from nan: it would be an arbitrary one."""
    text = batches(1)
    for compensation in ("bias", "low_rank"):
        engine = make_engine(compensation=compensation, granularity="mlp_sequence")
        with pytest.raises(MegaskipError, match="what layer 2 reads and returns .* nan or inf"):
            fit_compensation(overflowing(engine), text)
    with pytest.raises(MegaskipError, match="the loss of the text: found nan or inf"):
        greedy_drop_order(overflowing(make_engine()), text, 2)
    with pytest.raises(MegaskipError, match="how much the layers change what they read"):
        mean_similarity(overflowing(make_engine()), text)


@pytest.mark.parametrize("compensation", ["none", "low_rank"])
def test_the_order_is_that_of_an_exhaustive_search(make_engine: Any, compensation: str) -> None:
    """Measured with what is dropped before; on this model no cost shrinks beside others."""
    engine, text = make_engine(compensation=compensation), batches(2)
    if compensation != "none":
        fit_compensation(engine, batches())
    passes: list[None] = []
    dense, order = greedy_drop_order(engine, text, 3, progress=lambda: passes.append(None))

    def loss(layers: list[int]) -> float:
        with engine.routers.disabled(), engine.routers.override(dict.fromkeys(layers, 0.0)):
            return engine.evaluate(text, routed=True).loss

    gone: list[int] = []
    for step in order:
        losses = {n: loss([*gone, n]) for n in engine.routers.layers if n not in gone}
        assert step.loss == pytest.approx(losses[step.layer], abs=1e-6)
        assert losses[step.layer] <= min(losses.values()) + 1e-3
        gone.append(step.layer)
    assert dense == pytest.approx(loss([]), abs=1e-6)
    assert 5 <= len(passes) <= 5 + 3 + 2 + 2


def test_more_layers_than_are_routed_are_refused(make_engine: Any) -> None:
    with pytest.raises(ConfigError, match="5 layers cannot be dropped of 4 routed ones"):
        greedy_drop_order(make_engine(), batches(1), 5)


def test_static_routers_train_their_maps_alone(make_engine: Any) -> None:
    engine = make_engine(compensation="low_rank", budget="static")
    fit_compensation(engine, batches())
    before = {n: p.clone() for n, p in engine.routers.named_parameters()}
    assert all("compensation" in name for name in engine.parameters)
    engine._distill = 1.0
    losses = [engine.train_step(batches(1), 1e-2).loss_task for _ in range(8)]
    assert losses[-1] < losses[0]
    for name, parameter in engine.routers.named_parameters():
        assert torch.equal(parameter, before[name]) == name.endswith("attn.weight"), name


def test_maps_do_not_learn_to_change_what_frozen_routers_decide(make_engine: Any) -> None:
    """Their gradients are those under decisions that nothing can change."""
    settings = {"compensation": "low_rank", "granularity": "mlp_token"}
    weights = make_engine(**settings).routers.state_dict()
    generator = torch.Generator().manual_seed(0)
    for tensor in weights.values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) / 8)

    def gradients(weights: dict[str, Tensor], **more: Any) -> dict[str, Tensor]:
        engine = make_engine(**settings, **more)
        engine.routers.load_state_dict(weights)
        with engine.routers.override(decided):
            engine.train_step(batches(1), 0.0)
        grads = {n: p.grad for n, p in engine.parameters.items() if p.grad is not None}
        assert all("compensation" in name for name in grads) == bool(more)
        return {name: grad.clone() for name, grad in grads.items() if "compensation" in name}

    free = make_engine(**settings).routers
    shape = batches(1)[0].input_ids.shape
    mask = torch.rand(len(free.layers), *shape, generator=generator) < 0.5
    decided = {layer: keep.float() for layer, keep in zip(free.layers, mask, strict=True)}
    blind = {n: t if "compensation" in n else torch.zeros_like(t) for n, t in weights.items()}
    frozen, truth = gradients(weights, freeze_routers=True), gradients(blind)
    learning = gradients(weights)
    for name, gradient in truth.items():
        assert torch.equal(frozen[name], gradient), name
    lowest = f"{free.layers[0]}.mlp.compensation.up"
    assert not torch.allclose(learning[lowest], truth[lowest], rtol=1e-2)


def test_maps_learn_at_a_rate_of_their_own(make_engine: Any) -> None:
    engine = make_engine(compensation="low_rank")
    engine.train_step(batches(1), 5e-4)
    rates = {id(p): g["lr"] for g in engine.optimizer.param_groups for p in g["params"]}
    config = RunConfig().optim
    assert rates[id(engine.parameters["1.attn.weight"])] == 5e-4
    up = engine.parameters["1.attn.compensation.up"]
    assert rates[id(up)] == pytest.approx(5e-4 * config.compensation_lr / config.lr)
    assert dataclasses.replace(config, lr=0.0).compensation_lr_ratio == 1.0


def test_a_rank_above_the_hidden_size_is_filled_as_far_as_it_goes(make_engine: Any) -> None:
    engine, whole = (
        make_engine(compensation="low_rank", compensation_rank=rank) for rank in (40, 32)
    )
    text = batches()
    assert fit_compensation(engine, text) == pytest.approx(fit_compensation(whole, text), abs=1e-4)
    read = torch.randn(5, 32)
    for layer in engine.routers.layers:
        wide, exact = (e.routers.router(layer).compensation for e in (engine, whole))
        assert wide is not None
        assert exact is not None
        assert torch.allclose(wide(read), exact(read), atol=1e-3)


class Killed(Exception):
    """Ends a fit as a signal would."""


def killed_after(calls: int) -> Any:
    left = iter(range(calls))

    def check() -> None:
        if next(left, None) is None:
            raise Killed

    return check


@pytest.fixture
def progress_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("megaskip.calibration.fit.SAVED_EVERY", 2)

    def make(**settings: Any) -> FitProgress:
        return FitProgress(tmp_path / "out.partial.safetensors", settings, read_topology({}))

    return make


@pytest.mark.parametrize("kind", ["bias", "low_rank"])
def test_a_fit_that_was_killed_goes_on_and_ends_with_the_same_bits(
    make_engine: Any, progress_in: Any, kind: str
) -> None:
    text, whole, said = batches(), make_engine(compensation=kind), []
    explained = fit_compensation(whole, text)
    for calls in (1, 2, 1, 1, 2, 3, 99):  # rows 2 ends the first of the two phases
        engine, progress = make_engine(compensation=kind), progress_in(rows=8)
        said.append(progress.batches)
        try:
            found = fit_compensation(engine, text, check=killed_after(calls), progress=progress)
        except Killed:
            continue
    assert said == [0, 0, 2, 2, 2, 4, 6]
    assert found == explained
    again, progress = make_engine(compensation=kind), progress_in(rows=8)
    assert list(progress.results) == ["maps"]
    assert fit_compensation(again, [None], check=killed_after(0), progress=progress) == explained
    for fitted in (engine, again):
        for name, tensor in whole.routers.state_dict().items():
            assert torch.equal(fitted.routers.state_dict()[name], tensor), name


@pytest.mark.parametrize("compensation", ["none", "low_rank"])
def test_an_order_that_was_killed_measures_nothing_twice(
    make_engine: Any, progress_in: Any, compensation: str
) -> None:
    text = batches(2)

    def order(calls: int, kept: FitProgress | None = None) -> Any:
        engine = make_engine(compensation=compensation)
        if compensation != "none":
            fit_compensation(engine, text, progress=kept)
        return greedy_drop_order(engine, text, 3, progress=killed_after(calls), kept=kept)

    expected = order(99)
    for calls in (2, 4):
        with pytest.raises(Killed):
            order(calls, progress_in(rows=8))
    progress = progress_in(rows=8)
    assert list(progress.losses) == [(), (1,), (2,), (3,), (4,)]
    assert order(99, progress) == expected
    assert len(progress_in(rows=8).losses) > 5
    progress.remove()
    assert not progress_in(rows=8).losses


def test_progress_of_another_fit_and_damaged_progress_are_refused(
    progress_in: Any, tmp_path: Path
) -> None:
    progress_in(rows=8).keep_loss((1,), 2.5)
    with pytest.raises(CheckpointError, match="of a fit with other flags, ranks, model or text"):
        progress_in(rows=9)
    (tmp_path / "out.partial.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="is damaged: .*remove it"):
        progress_in(rows=8)
