"""Baselines skip what they say, exactly as much as they are asked to."""

import numpy as np
import pytest
import torch
from families import tiny_model
from routed_models import VOCABULARY

from megaskip import RouterConfig, attach_routers
from megaskip.calibration.similarity import UpdateSimilarity
from megaskip.data import Batch
from megaskip.measures.paired import ratio_difference
from megaskip.study.baselines import (
    random_order,
    skipping,
    static_order,
    uniform_order,
)
from megaskip.study.scoring import score

LAYERS = (1, 2, 3, 4)


def batch(rows: int = 6) -> Batch:
    ids = torch.randint(3, VOCABULARY, (rows, 8), generator=torch.Generator().manual_seed(3))
    real = torch.ones_like(ids, dtype=torch.bool)
    return Batch(
        input_ids=ids,
        labels=ids,
        token_mask=real,
        prompt_mask=real,
        position_ids=torch.arange(8).expand_as(ids),
    )


@pytest.mark.parametrize("target", ["attn", "mlp", "block"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_similarity_is_that_of_the_stream_before_and_after(family: str, target: str) -> None:
    """As a layer whose other sublayer is zeroed returns it, over the real tokens."""
    model, one = tiny_model(family), batch()
    one.token_mask[0, 5:] = False
    layer = model.model.layers[2]
    seen = UpdateSimilarity(model, target, layers=[2])
    with torch.no_grad(), seen.watching():
        if target == "mlp":
            layer.self_attn.o_proj.weight.zero_()
        elif target == "attn":
            layer.mlp.down_proj.weight.zero_()
        seen.set_batch(one.token_mask)
        states = model(one.input_ids, output_hidden_states=True).hidden_states
        seen.set_batch(None)
        model(one.input_ids)  # counts for nothing
    cosine = torch.nn.functional.cosine_similarity(states[2], states[3], dim=-1)
    direct = float(cosine[one.token_mask].mean())
    assert float(seen.sums[2]) / seen.tokens == pytest.approx(direct, abs=1e-5)
    assert seen.tokens == one.token_mask.sum()
    assert not seen.sums[[0, 1, 3, 4]].any()


@pytest.mark.parametrize("count", [1.0, 1.5, 2.75])
def test_orders_skip_the_exact_share_on_average(count: float) -> None:
    similarity = {1: 0.5, 2: 0.9, 3: 0.7, 4: 0.6}
    orders = [static_order(similarity, LAYERS), random_order(LAYERS, 0), uniform_order(LAYERS)]
    for order in orders:
        keep = skipping(order, LAYERS, count)(range(1000))
        skipped = sum(float((1 - one).sum()) for one in keep.values()) / 1000
        assert skipped == pytest.approx(count, abs=0.003)


def test_static_drops_the_most_similar_and_uniform_spreads() -> None:
    similarity = {1: 0.5, 2: 0.9, 3: 0.7, 4: 0.6}
    keep = skipping(static_order(similarity, LAYERS), LAYERS, 2.0)([0])
    assert {layer for layer, one in keep.items() if not one.any()} == {2, 3}
    keep = skipping(uniform_order(LAYERS), LAYERS, 2.0)([0])
    assert {layer for layer, one in keep.items() if not one.any()} == {2, 4}


def test_a_policy_that_skips_nothing_scores_the_dense_model() -> None:
    dense = tiny_model()
    with torch.no_grad():
        logits = dense(batch().input_ids).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), batch().labels[:, 1:], reduction="none"
    )
    model = tiny_model()
    routers = attach_routers(model, RouterConfig(layers="1-4"))
    nothing = skipping(static_order({}, ()), LAYERS, 0.0)
    scores = score(model, routers, [batch()], nothing)
    np.testing.assert_allclose(scores.nll, expected.sum(1).numpy(), rtol=1e-5)
    assert scores.kept.all()
    policy = skipping(random_order(LAYERS, 1), LAYERS, 2.0)
    pairs = score(model, routers, [batch()], policy, documents=[0, 0, 1, 1, 2, 2])
    np.testing.assert_allclose(pairs.kept.mean(axis=0), 0.5)


def test_an_interval_covers_a_difference_that_is_there() -> None:
    rng = np.random.default_rng(0)
    theirs = rng.normal(size=400)
    ours = theirs + 0.1 + 0.2 * rng.normal(size=400)
    gap = ratio_difference(ours, theirs, np.ones(400))
    assert gap.low < 0.1 < gap.high
    assert gap.low > 0
