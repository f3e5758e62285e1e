"""Every supported family: fresh routers change nothing, skipping is the identity, gradients
hold."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from families import FAMILIES, tiny_model
from torch import nn

from megaskip import RouterConfig, RouterSet, attach_routers, detach_routers
from megaskip.arch import probe_layer
from megaskip.arch.checkpointing import checkpoint_activations
from megaskip.arch.expert_probe import ExpertProbeReport
from megaskip.arch.probe import ProbeReport, worst_of
from megaskip.arch.sublayer import RoutedSublayer
from megaskip.arch.task_loss import TaskLoss, verify_task_loss
from megaskip.config import SUBLAYER_GRANULARITIES
from megaskip.errors import ConfigError, UnsupportedModelError
from megaskip.routing import SparseExecutor

VOCABULARY = 97


def ids_of(rows: int = 3, tokens: int = 12, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)


def randomise(routers: RouterSet, scale: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in routers.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


@pytest.mark.parametrize("granularity", SUBLAYER_GRANULARITIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_router_is_bit_exact_base_and_adds_only_its_own_keys(
    family: str, granularity: str
) -> None:
    model = tiny_model(family)
    ids = ids_of()
    with torch.no_grad():
        before, keys = model(ids).logits, set(model.state_dict())
        routers = attach_routers(model, RouterConfig(granularity=granularity))
        assert torch.equal(model(ids).logits, before)
    target = granularity.split("_")[0]
    added = {f"skip_routers.{layer}.{target}.weight" for layer in (2, 3, 4)}
    assert set(model.state_dict()) - keys == added
    assert keys <= set(model.state_dict())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == added
    assert routers.capacity() == 1.0


@pytest.mark.parametrize("family", FAMILIES)
def test_probe_proves_that_skipping_is_the_identity(family: str) -> None:
    report = probe_layer(tiny_model(family), 3)
    assert report.passed, report.explain(family)
    assert report.at_one == 0


@pytest.mark.parametrize("kind", [ProbeReport, ExpertProbeReport])
def test_a_probe_that_measures_no_number_fails(kind: Any) -> None:
    names = [field.name for field in dataclasses.fields(kind) if field.name != "layer"]
    assert kind(layer=3, **dict.fromkeys(names, 0.0)).passed
    for name in names:
        assert not kind(layer=3, **(dict.fromkeys(names, 0.0) | {name: math.nan})).passed, name
    assert math.isnan(worst_of([0.0, math.nan]))


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "glm4"])
def test_probe_catches_a_gate_in_front_of_a_norm(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megaskip.arch.sites._norm_behind_attention", lambda children: None)
    model = tiny_model(family)
    with pytest.raises(UnsupportedModelError, match=r"departure from affine .* attention \d"):
        attach_routers(model)
    assert not any(isinstance(module, RoutedSublayer) for module in model.modules())


def test_family_that_scales_the_residual_is_refused_with_numbers() -> None:
    model = tiny_model("minimax")
    with pytest.raises(UnsupportedModelError, match="Distance from the input .* skipped: [1-9]"):
        attach_routers(model)


def test_a_model_of_which_a_later_layer_is_refused_stays_as_it_was() -> None:
    model = tiny_model()
    # As hybrid models have it: a layer whose first half is no attention.
    layer = model.get_decoder().layers[4]
    layer.conv = layer.self_attn
    del layer.self_attn
    with pytest.raises(UnsupportedModelError, match="LlamaDecoderLayer has the children"):
        attach_routers(model, RouterConfig(layers=(2, 3, 4)), verify=False)
    assert not any(isinstance(module, RoutedSublayer) for module in model.modules())
    assert attach_routers(model, RouterConfig(layers=(2, 3)), verify=False).layers == (2, 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_skipping_everything_equals_the_identity_layer(family: str) -> None:
    model = tiny_model(family)
    routers = attach_routers(model, RouterConfig(granularity="block_sequence", layers=[2, 3, 4]))
    inputs: dict[int, torch.Tensor] = {}
    layers = model.get_decoder().layers
    for index in (2, 3, 4, 5):
        layers[index].register_forward_pre_hook(
            lambda module, args, index=index: inputs.__setitem__(index, args[0])
        )
    with routers.override(dict.fromkeys(routers.layers, 0.0)), torch.no_grad():
        model(ids_of())
    assert torch.equal(inputs[2], inputs[5])


@pytest.mark.parametrize("granularity", ["attn_sequence", "mlp_token", "block_token"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_equal_with_activation_checkpointing(family: str, granularity: str) -> None:
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model = tiny_model(family)
        routers = attach_routers(model, RouterConfig(granularity=granularity, capacity=0.3))
        randomise(routers)
        if checkpointing:
            checkpoint_activations(model, routers.layers[0])
        calls = count_calls(model.get_decoder().layers[3].self_attn)
        ids = ids_of()
        loss = model(ids, labels=ids, use_cache=False).loss + routers.penalty()
        loss.backward()
        assert len(calls) == (2 if checkpointing else 1)
        return [p.grad for p in routers.parameters() if p.grad is not None]

    plain, checkpointed = gradients(False), gradients(True)
    assert len(plain) == 3
    assert all(float(g.abs().max()) > 0 for g in plain)
    for one, other in zip(plain, checkpointed, strict=True):
        assert torch.equal(one, other)


def count_calls(module: nn.Module) -> list[int]:
    calls: list[int] = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("family", FAMILIES)
def test_unrouted_lower_layers_keep_no_activations(family: str) -> None:
    model = tiny_model(family)
    routers = attach_routers(model)
    seen: dict[int, bool] = {}
    for index, layer in enumerate(model.get_decoder().layers):
        layer.register_forward_hook(
            lambda m, a, out, index=index: seen.__setitem__(index, out.requires_grad)
        )
    model(ids_of(), use_cache=False)
    assert seen == {i: i >= routers.layers[0] for i in range(6)}


@pytest.mark.parametrize("granularity", ["attn_sequence", "attn_token", "block_sequence"])
@pytest.mark.parametrize("family", FAMILIES)
def test_batched_generation_equals_one_by_one(family: str, granularity: str) -> None:
    model = tiny_model(family)
    routers = attach_routers(model, RouterConfig(granularity=granularity))
    randomise(routers)
    ids = ids_of(rows=4)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    together = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    for row in range(4):
        one = ids[row : row + 1]
        alone = model.generate(one, attention_mask=torch.ones_like(one), **options)
        assert torch.equal(together[row : row + 1], alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_beam_search_carries_each_rows_decisions(family: str) -> None:
    model = tiny_model(family)
    routers = attach_routers(model)
    randomise(routers)
    ids = ids_of(rows=4, seed=3)
    with torch.no_grad():
        model(ids)
    assert 0 < routers.capacity() < 1
    options: dict[str, Any] = {"max_new_tokens": 5, "num_beams": 3, "eos_token_id": None}
    together = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    for row in range(4):
        one = ids[row : row + 1]
        alone = model.generate(one, attention_mask=torch.ones_like(one), **options)
        assert torch.equal(together[row : row + 1], alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_from_hidden_states_is_the_models_own(family: str) -> None:
    verify_task_loss(TaskLoss(tiny_model(family), chunk_tokens=3))


@pytest.mark.parametrize("granularity", SUBLAYER_GRANULARITIES)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "mixtral"])
def test_sparse_execution_computes_less_and_gives_the_same(family: str, granularity: str) -> None:
    model = tiny_model(family)
    routers = attach_routers(model, RouterConfig(granularity=granularity))
    randomise(routers)
    ids = ids_of(rows=5)
    with torch.no_grad():
        dense = model(ids).logits
        kept = routers.capacity()
        assert 0 < kept < 1
        routers.executor = SparseExecutor()
        rows = count_rows(model, routers.layers, "attn" in granularity)
        sparse = model(ids).logits
    torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-5)
    if granularity != "attn_token" and family in ("llama", "gemma2"):
        assert sum(rows) <= 3 * ids.numel() * kept + 1e-3


def count_rows(model: Any, layers: tuple[int, ...], attention: bool) -> list[int]:
    """Return a list that fills with the tokens that reach the first matrix of each routed
    sublayer."""
    rows: list[int] = []
    for layer in layers:
        module = getattr(model.get_decoder().layers[layer], "self_attn" if attention else "mlp")
        for child in [c for c in module.modules() if isinstance(c, nn.Linear)][:1]:
            child.register_forward_pre_hook(lambda m, a: rows.append(a[0].shape[:-1].numel()))
    return rows


def test_detaching_restores_classes_hooks_and_keys() -> None:
    model = tiny_model("gemma2")
    types = [type(module) for module in model.modules()]
    keys = list(model.state_dict())
    for granularity in SUBLAYER_GRANULARITIES:
        attach_routers(model, RouterConfig(granularity=granularity))
        with pytest.raises(ConfigError, match="has routers already"):
            attach_routers(model)
        detach_routers(model)
        assert [type(module) for module in model.modules()] == types
        assert list(model.state_dict()) == keys
        assert not model.get_decoder()._forward_pre_hooks


def test_layer_zero_is_refused_where_it_owns_the_cache_length() -> None:
    with pytest.raises(ConfigError, match="layer 0 cannot be routed"):
        attach_routers(tiny_model(), RouterConfig(layers="0-2"))
