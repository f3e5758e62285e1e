"""Packed rows: whichever attention runs them, samples do not see each other."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import FAMILIES, tiny_model
from tiny_run import alone, rows, tiny_config
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from megaskip import attach_routers
from megaskip.arch import packing
from megaskip.arch.packing import (
    choose_packed_attention,
    describe_attention,
    keeps_samples_apart,
    require_apart,
    takes_lengths,
)
from megaskip.arch.task_loss import TaskLoss
from megaskip.data import Batch, PackedRow, collate
from megaskip.errors import UnsupportedModelError
from megaskip.parallel.engine import Engine


def packed(seed: int) -> Batch:
    """Return a row of three samples and one of two, which is filled up with padding."""
    packs = [PackedRow(segments=tuple(rows(count, seed + count))) for count in (3, 2)]
    return collate(packs, pad_token_id=0, prompt_tokens=32)


def by_lengths(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any
) -> Any:
    """Attend as flash attention does when it is told lengths: sample by sample, of all rows, in
    one."""
    if "cu_seq_lens_q" not in kwargs:
        return mixing(module, query, key, value, attention_mask, **kwargs)
    assert attention_mask is None
    bounds, longest = kwargs["cu_seq_lens_q"].tolist(), kwargs["max_length_q"]
    flat = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)]
    attended = []
    for begin, end in zip(bounds, bounds[1:], strict=False):
        assert end - begin <= longest
        sample = [tensor[begin:end].transpose(0, 1)[None] for tensor in flat]
        causal = {"is_causal": True, "scale": kwargs["scaling"], "enable_gqa": True}
        attended.append(scaled_dot_product_attention(*sample, **causal)[0].transpose(0, 1))
    return torch.cat(attended).view_as(query.transpose(1, 2)), None


def mixing(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any
) -> Any:
    """Attend over a whole row, whatever samples are in it."""
    how = {"is_causal": True, "scale": kwargs["scaling"], "enable_gqa": True}
    return scaled_dot_product_attention(query, key, value, **how).transpose(1, 2), None


def broken(*args: Any, **kwargs: Any) -> Any:
    """Say what flex attention does of heads that are too small for Triton."""
    raise NotImplementedError("NYI: embedding dimension of the query, key, and value must be 16")


@pytest.fixture(autouse=True)
def attentions() -> Iterator[None]:
    AttentionInterface.register("flash_by_lengths", by_lengths)
    AttentionInterface.register("mixing", mixing)
    AttentionInterface.register("broken", broken)
    yield
    for name in ("flash_by_lengths", "mixing", "broken"):
        del AttentionInterface._global_mapping[name]


def test_lengths_are_those_that_transformers_would_read_off_the_device() -> None:
    batch = packed(0)
    (bounds, _), (longest, _) = prepare_fa_kwargs_from_position_ids(batch.position_ids)
    assert torch.equal(batch.lengths["cu_seq_lens_q"], bounds)
    assert batch.lengths["max_length_q"] == int(longest)
    assert not collate(rows(3), pad_token_id=0, prompt_tokens=32).lengths


def test_losses_and_gradients_by_lengths_are_those_with_a_mask() -> None:
    found = {}
    for attention in ("sdpa", "flash_by_lengths"):
        config, model = tiny_config(), tiny_model()
        model.config._attn_implementation = attention  # a name with flash is looked for in the hub
        with alone() as topology:
            routers = attach_routers(model, config.router, register=False)
            for number, router in enumerate(routers.parameters()):
                torch.nn.init.normal_(router, generator=torch.Generator().manual_seed(number))
            loss = TaskLoss(model, chunk_tokens=64)
            loss.needs_mask, loss.takes_lengths = False, takes_lengths(model)
            engine = Engine(loss, routers, config, topology)
            result = engine.train_step([packed(1), packed(2)], 0.0)
        found[attention] = result, {name: p.grad for name, p in engine.parameters.items()}
    (mask, gradients), (lengths, others) = found.values()
    assert lengths.loss_task == pytest.approx(mask.loss_task, rel=1e-6)
    assert lengths.capacity_per_layer == mask.capacity_per_layer
    assert 0 < mask.capacity < 1
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_proof_passes_where_samples_are_apart(family: str) -> None:
    model = tiny_model(family)
    before = model.config._attn_implementation
    if family == "gpt_oss":  # transformers 5.23 makes its mask without positions
        with pytest.raises(UnsupportedModelError, match="gpt_oss: samples of packed rows see each"):
            choose_packed_attention(model)
        return
    choose_packed_attention(model)  # on a CPU: the family's own
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("name", ["broken", "mixing", "not_installed"])
def test_a_faster_attention_that_cannot_run_here_is_left_out(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    before = model.config._attn_implementation
    monkeypatch.setattr(packing, "_faster", lambda model: [name])
    choose_packed_attention(model)
    assert model.config._attn_implementation == before


def test_the_proof_sees_samples_that_are_not_apart() -> None:
    model = tiny_model()
    model.config._attn_implementation = "flash_by_lengths"
    assert keeps_samples_apart(model)
    assert "by their lengths" in describe_attention(model, packing=True)
    model.set_attn_implementation("mixing")
    with pytest.raises(UnsupportedModelError, match=r"see each other in its attention \(mixing\)"):
        require_apart(model)
