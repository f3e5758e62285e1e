"""Experts are skipped token by token: the others stay as they were, and what is skipped is not
computed."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, MIXTURES, MORE_MIXTURES, tiny_model
from routed_models import as_exported, padded_ids, randomise, trained, whole_ids

from megaskip import RouterConfig, attach_routers, detach_routers
from megaskip.arch.checkpointing import checkpoint_activations
from megaskip.arch.expert_probe import probe_experts
from megaskip.arch.experts import find_experts
from megaskip.arch.sublayer import RoutedSublayer
from megaskip.arch.task_loss import TaskLoss
from megaskip.calibration.capacities import CalibratedCapacity
from megaskip.calibration.equal_scores import give_directions
from megaskip.calibration.expert_load import measure_load, write_loads
from megaskip.calibration.job import measure_loads
from megaskip.config import RunConfig, parse_run_config
from megaskip.data import Batch
from megaskip.errors import ConfigError, UnsupportedModelError
from megaskip.measures.costs import CostModel
from megaskip.parallel.engine import Engine
from megaskip.parallel.loading.source import resolve_source
from megaskip.parallel.topology import read_topology
from megaskip.routing import SparseExecutor
from megaskip.routing.executor import Run
from megaskip.study.expert_drops import (
    StaticDrop,
    drop_experts,
    order_by_load,
    order_by_loss,
    random_drop,
)
from megaskip.training.dry_run import dry_run_lines

ROUTED = [name for name in (*FAMILIES, *MORE_MIXTURES) if name in MIXTURES]
EXPERTS = RouterConfig(granularity="expert_token")
LAYER = 3


def experts_module(model: Any, layer: int = LAYER) -> Any:
    modules = model.get_decoder().layers[layer].named_modules()
    return next(module for name, module in modules if name.endswith(".experts"))


@pytest.mark.parametrize("family", ROUTED)
def test_fresh_routers_are_the_base_and_have_a_row_for_each_expert(family: str) -> None:
    model = tiny_model(family)
    ids, keys = whole_ids(2, 8), set(model.state_dict())
    classes = [type(module) for module in model.modules()]
    with torch.no_grad():
        before = model(ids).logits
        routers = attach_routers(model, EXPERTS)
        assert torch.equal(model(ids).logits, before)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert shapes == {f"skip_routers.{layer}.expert.weight": (4, 32) for layer in (2, 3, 4)}
    assert set(model.state_dict()) - keys == set(shapes)
    assert routers.capacity() == 1.0
    detach_routers(model)
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("family", ROUTED)
def test_a_skipped_expert_leaves_the_weighted_sum_of_the_others(family: str) -> None:
    model, routers = trained(family, "expert_token")
    module, told = experts_module(model), []
    hook = module.register_forward_hook(lambda m, args, out: told.append((*args, out)))
    ids = whole_ids(2, 8)
    with torch.no_grad():
        model(ids)
        hook.remove()
        hidden, index, weights, summed = told[0]
        keep = routers.decisions()[LAYER].keep.view_as(weights)
        assert 0 < float(keep.mean()) < 1
        base: Run = lambda *args: module._skip_base.forward(module, *args)  # noqa: E731
        alone = torch.stack(
            [
                base(hidden, index[:, k : k + 1], weights[:, k : k + 1]) * keep[:, k : k + 1]
                for k in range(2)
            ]
        )
    torch.testing.assert_close(summed, alone.sum(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ROUTED)
def test_pairs_that_are_skipped_are_not_computed_and_nothing_else_changes(family: str) -> None:
    model, routers = trained(family, "expert_token")
    rows: list[int] = []
    module = experts_module(model)
    counted = type("Counted", (module._skip_base,), {"forward": counting(module._skip_base, rows)})
    ids, mask = padded_ids()
    with torch.no_grad():
        dense = model(ids, attention_mask=mask).logits[mask.bool()]
        assert 0 < routers.capacity() < 1
        kept = int(routers.decisions()[LAYER].keep.sum())
        detach_routers(model)
        module.__class__ = counted
        again = attach_routers(model, EXPERTS, verify=False)
        again.load_state_dict(routers.state_dict())
        again.executor = SparseExecutor()
        sparse = model(ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(sparse, dense, rtol=0, atol=1e-5)
    assert rows == [kept]


def counting(base: Any, pairs: list[int]) -> Run:
    def forward(self: Any, hidden: Any, index: Any, weights: Any) -> Any:
        pairs.append(index.numel())
        return base.forward(self, hidden, index, weights)

    return forward


@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_all_or_nothing_takes_the_short_way(keep: float) -> None:
    model, routers = trained("mixtral", "expert_token")
    ids = whole_ids(2, 8)
    with routers.override(dict.fromkeys(routers.layers, keep)), torch.no_grad():
        dense = model(ids).logits
        routers.executor = SparseExecutor()
        assert torch.equal(model(ids).logits, dense)
    assert routers.capacity() == keep


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_exported_model_computes_and_generates_what_the_trained_one_does(family: str) -> None:
    model, routers = trained(family, "expert_token")
    exported = as_exported(model, routers)
    ids, mask = padded_ids()
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits[mask.bool()]
        found = exported(ids, attention_mask=mask).logits[mask.bool()]
        assert exported.capacity() == routers.capacity() < 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    together = exported.generate(ids, attention_mask=mask, **options)
    for row in range(len(ids)):
        real = ids[row : row + 1, mask[row].bool()]
        assert torch.equal(together[row, -4:], exported.generate(real, **options)[0, -4:])


def test_padding_is_not_counted_and_changes_no_decision() -> None:
    model, routers = trained("olmoe", "expert_token")
    ids, mask = padded_ids()
    with torch.no_grad():
        model(ids, attention_mask=mask)
        together = routers.decisions()[LAYER]
        assert int(together.units()) == 2 * int(mask.sum())
        assert routers.counts().units.tolist() == [2.0 * int(mask.sum())] * 3
        for row in range(len(ids)):
            model(ids[row : row + 1, mask[row].bool()])
            alone = routers.decisions()[LAYER]
            real = mask[row].bool().repeat_interleave(2)
            assert torch.equal(together.keep[row, real], alone.keep[0])
            assert torch.equal(together.expert[row, real], alone.expert[0])
    assert routers.keep()[LAYER].shape == (1, int(mask[-1].sum()))


@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_of_a_layer_that_is_computed_again_are_the_same(sparse: bool) -> None:
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model = tiny_model("mixtral")
        config = RouterConfig(granularity="expert_token", router="affine", capacity=0.3)
        routers = attach_routers(model, config)
        randomise(routers)
        if sparse:
            routers.executor = SparseExecutor()
        if checkpointing:
            checkpoint_activations(model, routers.layers[0])
        ids = whole_ids(2, 8)
        loss = model(ids, labels=ids, use_cache=False).loss + routers.penalty()
        loss.backward()
        return [parameter.grad for parameter in routers.parameters() if parameter.grad is not None]

    plain, again = gradients(False), gradients(True)
    assert len(plain) == 6 and all(float(gradient.abs().max()) > 0 for gradient in plain)
    for mine, other in zip(plain, again, strict=True):
        assert torch.equal(mine, other)


def test_a_router_learns_from_experts_that_it_skips() -> None:
    """The published gradient: what an expert would add counts, too, where it is skipped."""
    model, routers = trained("mixtral", "expert_token")
    module, told = experts_module(model), []
    hook = module.register_forward_hook(lambda m, args, out: told.append((*args, out)))
    ids = whole_ids(2, 8)
    with routers.override(dict.fromkeys(routers.layers, 0.0)):
        loss = model(ids, labels=ids).loss
    hook.remove()
    hidden, index, weights, summed = told[0]
    keep = routers.decisions()[LAYER].keep
    gradient, of_sum = torch.autograd.grad(loss, [keep, summed])
    for k in range(2):
        added = module._skip_base.forward(module, hidden, index[:, k, None], weights[:, k, None])
        torch.testing.assert_close(gradient.view(-1, 2)[:, k], (of_sum * added).sum(-1))
    assert float(gradient.abs().max()) > 1e-4


def test_training_holds_all_pairs_of_a_batch_to_the_capacity() -> None:
    model = tiny_model("mixtral")
    config = RouterConfig(granularity="expert_token", router="affine", capacity=0.4)
    routers = attach_routers(model, config, register=False)
    randomise(routers)
    ids = whole_ids(8, 16)
    with torch.no_grad():
        for _ in range(60):
            model(ids)
            routers.steer()
    assert routers.capacity() == pytest.approx(0.4, abs=0.05)
    settled = routers.settled_config()
    model(ids)
    kept = routers.capacity()
    routers.configure(settled)
    model(ids)
    assert routers.capacity() == pytest.approx(kept, abs=0.02)


# -- what is refused


def test_a_dense_model_is_refused_in_a_line() -> None:
    with pytest.raises(UnsupportedModelError, match="^llama: .* needs a mixture of experts"):
        attach_routers(tiny_model("llama"), EXPERTS)


def test_a_dense_layer_of_a_mixture_is_refused_and_the_model_stays_as_it_was() -> None:
    model = tiny_model("deepseek_v3")
    config = RouterConfig(granularity="expert_token", layers=(1, 2))
    with pytest.raises(UnsupportedModelError, match="layer 1 has no experts"):
        attach_routers(model, config, verify=False)
    assert not any(isinstance(module, RoutedSublayer) for module in model.modules())


def test_experts_with_a_norm_behind_them_are_refused_with_numbers() -> None:
    model = tiny_model("mixtral")
    block = model.get_decoder().layers[2].mlp
    norm = torch.nn.LayerNorm(32)
    block.register_forward_hook(lambda module, args, out: norm(out))
    report = probe_experts(model, 2, find_experts(model.config.to_dict()))
    assert report.bend > 0.1 and report.left_out < 1e-3
    with pytest.raises(UnsupportedModelError, match=r"departure from affine in keep: [1-9]"):
        attach_routers(model, EXPERTS)
    assert not any(isinstance(module, RoutedSublayer) for module in model.modules())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda module: setattr(module, "num_experts", 3), "with 3 num_experts, expected"),
        (lambda module: setattr(module, "forward", module.forward), "has a forward of its own"),
    ],
)
def test_experts_that_cannot_be_reached_are_refused(change: Any, expected: str) -> None:
    model = tiny_model("olmoe")
    change(experts_module(model, 2))
    with pytest.raises(UnsupportedModelError, match=expected):
        attach_routers(model, EXPERTS, verify=False)


def test_experts_that_are_called_otherwise_are_refused() -> None:
    model = tiny_model("olmoe")
    block, experts = model.get_decoder().layers[2].mlp, experts_module(model, 2)
    experts.__class__ = type("Other", (type(experts),), {"forward": lambda self, x: x})
    block.__class__ = type("Block", (type(block),), {"forward": lambda self, x: self.experts(x)})
    with pytest.raises(UnsupportedModelError, match="are not called with tokens, their experts"):
        attach_routers(model, EXPERTS)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"router_input": "first"}, "--router_input first does not go with"),
        ({"compensation": "bias"}, "--compensation bias does not go with"),
    ],
)
def test_settings_that_make_no_sense_for_experts_are_refused(
    settings: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        RouterConfig(granularity="expert_token", **settings)


# -- what follows from decisions


def test_units_of_the_global_batch_are_pairs() -> None:
    model, routers = trained("mixtral", "expert_token")
    engine = Engine(model, routers, RunConfig(), read_topology({}))
    counts = type("Counts", (), {"tokens": 7, "samples": 3})()
    assert engine._units(type("Batch", (), {"counts": counts})()) == 14


def test_experts_that_a_bias_tells_apart_are_no_fresh_routers() -> None:
    config = RouterConfig(granularity="expert_token", router="affine")
    routers = attach_routers(tiny_model("mixtral"), config)
    with torch.no_grad():
        routers.router(2).bias[1] = -1.0
    assert give_directions(routers).keys() == {3, 4}


def test_a_skipped_pair_costs_the_flops_of_one_expert_less() -> None:
    model, routers = trained("qwen2_moe", "expert_token")
    costs = CostModel(model, routers)
    units = [20.0] * 3
    full = costs.price(10, 1, units, units)
    assert full.flops == full.dense_flops and full.kv_ratio == 1
    cheaper = costs.price(10, 1, [19.0, 20.0, 20.0], units)
    an_expert = 2 * 3 * 32 * 16
    assert full.flops - cheaper.flops == pytest.approx(an_expert)
    assert cheaper.kv_ratio == 1


@pytest.mark.parametrize("stages", [1, 2])
def test_a_plan_of_a_mixture_in_float32_counts_a_router_for_each_expert(
    stages: int, tmp_path: Path
) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path)
    flags = ["--model", str(tmp_path), "--data", "demo", "--max_steps", "3", "--seq_length", "16"]
    staged = ["--ds_config", "ds_configs/pipeline.json", "--pipeline_stages", "2"]
    flags += [*(staged if stages == 2 else []), "--granularity", "expert_token"]
    config = parse_run_config(flags)
    text = " ".join(dry_run_lines(config, resolve_source(config.model), stages))
    assert "expert_token of layers 2-4" in text
    assert ".expert.weight [4, 32]" in text


# -- beside routers that learn


@pytest.fixture
def engine() -> Engine:
    model = tiny_model("mixtral")
    config = RouterConfig(granularity="expert_token", router="affine", layers="1-4")
    routers = attach_routers(model, config, register=False)
    return Engine(TaskLoss(model, chunk_tokens=64), routers, RunConfig(), read_topology({}))


def batch(seed: int) -> Batch:
    ids, mask = padded_ids(seed=seed)
    real = mask.bool()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    labels = ids.masked_fill(~real, -100)
    return Batch(
        input_ids=ids, labels=labels, token_mask=real, prompt_mask=real, position_ids=positions
    )


def test_the_load_of_experts_is_counted_over_real_tokens_and_drawn(
    engine: Engine, tmp_path: Path
) -> None:
    load = measure_load(engine, [batch(0), None])
    tokens = int(batch(0).token_mask.sum())
    assert load.assigned.sum(1).tolist() == [2.0 * tokens] * 4
    assert torch.equal(load.ran, load.assigned)
    drop_experts(engine.routers, {(1, 0), (3, 2)})
    after = measure_load(engine, [batch(0)])
    assert torch.equal(after.assigned[0], load.assigned[0])  # layers above read other states
    lost = after.assigned - after.ran
    assert lost.nonzero().tolist() == [[0, 0], [2, 2]]
    assert "2 of 16 experts run none" in after.describe()
    numbers = {"kept": 0.5, "held_out": 0.5, "held_out_error": 0.0, "loss": 1.0}
    point = CalibratedCapacity(capacity=0.5, threshold=0.5, described="0.5", **numbers)
    loads = measure_loads(engine, [batch(0)], [point])
    assert torch.equal(loads[0.5].ran, after.ran)
    write_loads(tmp_path, loads)
    stored = json.loads((tmp_path / "expert_load.json").read_text())
    assert stored["0.5"]["ran"]["3"][2] == 0.0 < stored["0.5"]["assigned"]["3"][2]
    assert (tmp_path / "expert_load_0.5.png").stat().st_size > 5000


def test_experts_are_dropped_in_the_order_of_what_their_pairs_are_worth(engine: Engine) -> None:
    text, calls = [batch(1)], []
    order = order_by_loss(engine, text, progress=lambda: calls.append(1))
    assert len(calls) == len(order) == len(set(order)) == 16
    dense = engine.evaluate(text, routed=False).loss
    drop = StaticDrop(engine, text, order)
    half = drop.at(0.5)
    assert half.share == 0.5 and math.isfinite(half.loss)
    assert engine.evaluate(text, routed=True).loss == pytest.approx(dense)
    assert drop.at(0.0).loss == pytest.approx(dense)
    least = order_by_load(measure_load(engine, text))
    counts = measure_load(engine, text).assigned
    assert counts[least[0][0] - 1, least[0][1]] == counts.min()


def test_pairs_dropped_by_chance_are_as_many_as_asked(engine: Engine) -> None:
    text = [batch(seed) for seed in range(4)]
    dropped = random_drop(engine, text, 0.25, 0)
    assert dropped.share == pytest.approx(0.25, abs=0.05)
    assert dropped == random_drop(engine, text, 0.25, 0) != random_drop(engine, text, 0.25, 1)
