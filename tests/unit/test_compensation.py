"""What a skipped unit gets: nothing while it is fresh, its map of what was read afterwards, and a
unit that runs pays nothing for it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, tiny_model
from routed_models import as_exported, padded_ids, randomise, whole_ids
from torch import Tensor, nn

from megaskip import RouterConfig, RouterSet, attach_routers, load_routers, save_routers
from megaskip.arch.checkpointing import checkpoint_activations
from megaskip.arch.sites import find_sites
from megaskip.config import SUBLAYER_GRANULARITIES
from megaskip.errors import CheckpointError, ConfigError
from megaskip.routing import SparseExecutor
from megaskip.routing.compensation import BiasCompensation

KINDS = ("bias", "low_rank")
LAYERS = (2, 3, 4)


def attached(
    granularity: str = "attn_sequence",
    kind: str = "low_rank",
    family: str = "llama",
    **settings: Any,
) -> tuple[Any, RouterSet]:
    """Return a tiny model with routers that decide by what they read, and random maps."""
    model = tiny_model(family)
    config = RouterConfig(
        granularity=granularity, compensation=kind, compensation_rank=4, **settings
    )
    routers = attach_routers(model, config)
    randomise(routers)
    return model, routers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("granularity", SUBLAYER_GRANULARITIES)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_a_fresh_map_changes_nothing_skipped_or_not(
    family: str, granularity: str, kind: str
) -> None:
    model, ids = tiny_model(family), whole_ids(3, 12)
    config = RouterConfig(granularity=granularity, compensation=kind)
    routers = attach_routers(model, config)
    other = tiny_model(family)
    plain = attach_routers(other, RouterConfig(granularity=granularity))
    for keep in (1.0, 0.0):
        decisions = dict.fromkeys(routers.layers, keep)
        with torch.no_grad(), routers.override(decisions), plain.override(decisions):
            assert torch.equal(model(ids).logits, other(ids).logits), keep


def test_what_trains_has_names_and_shapes_under_the_one_prefix() -> None:
    model, _ = attached()
    names = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    of_layer = {n: s for n, s in names.items() if n.startswith("skip_routers.3.")}
    assert of_layer == {
        "skip_routers.3.attn.weight": (1, 32),
        "skip_routers.3.attn.compensation.bias": (32,),
        "skip_routers.3.attn.compensation.down": (4, 32),
        "skip_routers.3.attn.compensation.up": (32, 4),
    }
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if n in names)


def reference(model: Any, target: str, layer: int, router: nn.Module) -> list[Any]:
    """Hook an unrouted model so that a layer's `target` is replaced by the router's map."""
    block = model.get_decoder().layers[layer]
    sites = find_sites(block, model.config.model_type)
    read: list[Tensor] = []

    def note(_: nn.Module, args: Any, kwargs: Any) -> None:
        read[:] = [args[0] if args else kwargs["hidden_states"]]

    def replace(_: nn.Module, __: Any, output: Any) -> Any:
        update = router.compensation(read[0])
        return (update, *output[1:]) if isinstance(output, tuple) else update

    def replace_block(_: nn.Module, args: Any, output: Any) -> Any:
        whole = args[0] + router.compensation(read[0])
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    attention = block.get_submodule(sites.attention)
    mlp = block.get_submodule(sites.mlp)
    source = mlp if target == "mlp" else attention
    handles = [source.register_forward_pre_hook(note, with_kwargs=True)]
    if target == "block":
        return [*handles, block.register_forward_hook(replace_block)]
    site = sites.mlp_update if target == "mlp" else sites.attention_update
    return [*handles, block.get_submodule(site).register_forward_hook(replace)]


@pytest.mark.parametrize("target", ["attn", "mlp", "block"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_skipped_sublayer_is_its_map_where_the_update_meets_the_residual(
    family: str, target: str
) -> None:
    """Behind a norm where the family has one, and of what the sublayer itself reads."""
    model, routers = attached(f"{target}_sequence", family=family)
    plain, ids = tiny_model(family), whole_ids(2, 9)
    reference(plain, target, 3, routers.router(3))
    with torch.no_grad(), routers.disabled(), routers.override({3: 0.0}):
        got = model(ids).logits
    with torch.no_grad():
        assert torch.allclose(got, plain(ids).logits, atol=1e-5)


@pytest.mark.parametrize("granularity", SUBLAYER_GRANULARITIES)
def test_all_executors_agree(granularity: str) -> None:
    model, routers = attached(granularity)
    ids, mask = padded_ids()
    exported = as_exported(model, routers)
    real = mask.bool()
    with torch.no_grad():
        dense = model(ids, attention_mask=mask).logits
        capacity = routers.capacity()
        routers.executor = SparseExecutor()
        sparse = model(ids, attention_mask=mask).logits
        shipped = exported(ids, attention_mask=mask).logits
    assert 0 < capacity < 1
    assert torch.allclose(sparse[real], dense[real], atol=1e-5)
    assert torch.allclose(shipped[real], dense[real], atol=1e-5)


@pytest.mark.parametrize("granularity", SUBLAYER_GRANULARITIES)
def test_generation_with_a_cache_is_that_of_a_pass_over_the_whole_text(granularity: str) -> None:
    """Batched and alone; a token that decides for itself decides alike in decode."""
    model, routers = attached(granularity)
    exported = as_exported(model, routers)
    ids = whole_ids(3, 8)
    batched = exported.generate(
        ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=-1
    )
    for row in range(3):
        alone = exported.generate(
            ids[row : row + 1], max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=-1
        )
        assert torch.equal(batched[row], alone[0])
    prompt = torch.zeros_like(batched, dtype=torch.bool)
    prompt[:, :8] = True
    with torch.no_grad():
        routers.set_batch(torch.ones_like(prompt), prompt)
        whole = model(batched).logits
    assert torch.equal(whole[:, 7:-1].argmax(-1), batched[:, 8:])


def count_calls(routers: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the units of each call of a map."""
    calls: list[int] = []
    for layer in routers.layers:
        compensation = routers.router(layer).compensation
        forward = type(compensation).forward

        def counted(self: Any, read: Tensor, forward: Any = forward) -> Tensor:
            calls.append(read.numel() // read.shape[-1])
            return forward(self, read)

        monkeypatch.setattr(type(compensation), "forward", counted)
        break
    return calls


@pytest.mark.parametrize("granularity", SUBLAYER_GRANULARITIES)
def test_units_that_run_pay_nothing_and_skipped_ones_once(
    granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, routers = attached(granularity)
    exported, ids = as_exported(model, routers), whole_ids(4, 8)
    calls = count_calls(exported.skip_routers, monkeypatch)
    with torch.no_grad(), exported.skip_routers.disabled():
        exported(ids)
    assert not calls
    with torch.no_grad():
        exported(ids)
    keep = exported.skip_routers.keep()
    skipped = sum(int((1 - one.expand(4, 8)).sum()) for one in keep.values())
    assert sum(calls) == skipped > 0


@pytest.mark.parametrize("granularity", SUBLAYER_GRANULARITIES)
def test_gradients_reach_maps_and_routers_and_nothing_else(granularity: str) -> None:
    """Also with activation checkpointing, which runs the sublayers again."""
    found = []
    for checkpointed in (False, True):
        model, routers = attached(granularity)
        if checkpointed:
            checkpoint_activations(model, routers.layers[0])
        ids = whole_ids(3, 12)
        loss = model(ids, labels=ids, use_cache=False).loss + routers.penalty()
        loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert set(found[0]) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(float(grad.abs().max()) > 0 for grad in found[0].values())
    for name, grad in found[0].items():
        assert torch.allclose(found[1][name], grad, atol=1e-6), name


def test_no_input_is_held_after_the_pass() -> None:
    model, routers = attached("block_token")
    exported = as_exported(model, routers)
    with torch.no_grad():
        exported(whole_ids(2, 8))
    assert all(gate._compensation_input is None for gate in exported.skip_routers.gates.values())


def test_a_static_budget_never_runs_its_layers_and_only_maps_train() -> None:
    model, routers = attached(budget="static", layers=(2, 4))
    with torch.no_grad():
        model(whole_ids(3, 12))
    assert routers.capacity() == routers.config.capacity == 0.0
    assert float(routers.penalty()) == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_router_folders_hold_the_maps(kind: str, tmp_path: Path) -> None:
    model, routers = attached(kind=kind)
    save_routers(tmp_path / "routers", routers)
    other = tiny_model()
    loaded = load_routers(other, tmp_path / "routers")
    assert loaded.config.compensation == kind
    with torch.no_grad():
        assert torch.equal(other(whole_ids(2, 9)).logits, model(whole_ids(2, 9)).logits)
    (tmp_path / "routers/router_config.json").write_text(
        (tmp_path / "routers/router_config.json")
        .read_text()
        .replace(f'"compensation": "{kind}"', '"compensation": "none"')
    )
    with pytest.raises(CheckpointError, match=r"unexpected .*compensation\.bias"):
        load_routers(tiny_model(), tmp_path / "routers")


def test_a_rank_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="compensation_rank 0 must be at least 1"):
        RouterConfig(compensation="low_rank", compensation_rank=0)
    with pytest.raises(ConfigError, match="compensation 'lowrank' is not one of"):
        RouterConfig(compensation="lowrank")


def test_the_map_of_a_bias_is_the_same_for_every_unit() -> None:
    compensation = BiasCompensation(4)
    with torch.no_grad():
        compensation.bias.copy_(torch.arange(4.0))
    update = compensation(torch.randn(2, 3, 4, dtype=torch.bfloat16))
    assert update.dtype == torch.bfloat16
    assert torch.equal(update, torch.arange(4.0).bfloat16().expand(2, 3, 4))
