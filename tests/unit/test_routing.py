"""Decisions: float32 whatever the backbone, blind to padding and neighbours, causal on prompts."""

import pytest
import torch
from families import tiny_model
from torch import Tensor

from megaskip import RouterConfig, RouterSet, attach_routers
from megaskip.config import SUBLAYER_GRANULARITIES
from megaskip.routing import Pooling, straight_through

T = 12


def random_routers(routers: RouterSet, scale: float = 0.4, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in routers.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def ids_of(rows: int, tokens: int = T, seed: int = 0) -> Tensor:
    return torch.randint(3, 97, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def logits_of(routers: RouterSet) -> Tensor:
    return torch.stack([decision.logit for decision in routers.decisions().values()])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_straight_through_is_hard_forward_and_sigmoid_backward(temperature: float) -> None:
    logit = torch.tensor([[-1.0, -1e-7, 0.0, 2.0]], requires_grad=True)
    keep = straight_through(logit, 0.0, temperature)
    assert keep.tolist() == [[0.0, 0.0, 1.0, 1.0]]
    keep.sum().backward()
    score = torch.sigmoid(logit.detach() / temperature)
    torch.testing.assert_close(logit.grad, score * (1 - score) / temperature)


def test_small_negative_logits_skip_under_a_bfloat16_backbone() -> None:
    model = tiny_model().to(torch.bfloat16)
    routers = attach_routers(model, RouterConfig(layers=[3]))
    router, ids = routers.router(3), ids_of(1)
    pooled: list[Tensor] = []
    router.register_forward_pre_hook(lambda m, a: pooled.append(a[0]))
    with torch.no_grad():
        model(ids)
        feature = pooled[0].flatten()
        # sigmoid(-0.001) is 0.5 in bfloat16, which would count as "run".
        router.weight.copy_(-0.001 * feature / feature.square().sum())
        model(ids)
    assert pooled[0].dtype == router.weight.dtype == torch.float32
    (decision,) = routers.decisions().values()
    assert -0.0011 < float(decision.logit) < -0.0009
    assert routers.keep()[3].tolist() == [[0.0]]


@pytest.mark.parametrize("granularity", SUBLAYER_GRANULARITIES)
@pytest.mark.parametrize("left", [False, True])
def test_padding_and_batch_composition_change_no_decision(granularity: str, left: bool) -> None:
    model = tiny_model()
    routers = attach_routers(model, RouterConfig(granularity=granularity))
    random_routers(routers)
    rows = [ids_of(1, tokens, seed=tokens) for tokens in (5, 9, 12)]
    ids, mask = torch.zeros(3, T, dtype=torch.int64), torch.zeros(3, T, dtype=torch.int64)
    spans = []
    for i, row in enumerate(rows):
        span = slice(T - row.shape[1], T) if left else slice(0, row.shape[1])
        ids[i, span], mask[i, span] = row[0], 1
        spans.append(span)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=positions)
        together, kept = logits_of(routers), routers.keep()
        for i, row in enumerate(rows):
            model(row)
            span = spans[i] if "token" in granularity else slice(0, 1)
            torch.testing.assert_close(
                logits_of(routers)[:, 0], together[:, i, span], rtol=1e-4, atol=1e-5
            )
            for layer, alone in routers.keep().items():
                assert torch.equal(kept[layer][i, span], alone[0])
    assert len({float(k.sum()) for k in kept.values()}) >= 1
    assert 0 < routers.capacity() < 1 or "token" in granularity


@pytest.mark.parametrize("granularity", ["attn_sequence", "mlp_sequence", "block_sequence"])
@pytest.mark.parametrize("pool", ["prompt", "all"])
def test_tokens_after_the_prompt_change_decisions_only_when_all_are_pooled(
    granularity: str, pool: str
) -> None:
    model = tiny_model()
    routers = attach_routers(model, RouterConfig(granularity=granularity, pool=pool))
    random_routers(routers)
    ids, other = ids_of(4), ids_of(4, seed=9)
    other[:, :5] = ids[:, :5]
    real = torch.ones(4, T, dtype=torch.bool)
    prompt = real & (torch.arange(T) < 5)
    found = []
    with torch.no_grad():
        for batch in (ids, other):
            routers.set_batch(real, prompt)
            model(batch)
            found.append(logits_of(routers))
    same = torch.allclose(found[0], found[1], rtol=1e-5, atol=1e-6)
    assert same == (pool == "prompt")


def test_segments_of_a_packed_row_are_judged_apart() -> None:
    model = tiny_model()
    routers = attach_routers(model)
    random_routers(routers)
    first, second = ids_of(1, 7, seed=1), ids_of(1, 5, seed=2)
    packed = torch.cat([first, second], dim=1)
    segments = torch.tensor([[0] * 7 + [1] * 5])
    positions = torch.cat([torch.arange(7), torch.arange(5)]).unsqueeze(0)
    with torch.no_grad():
        routers.set_batch(segments >= 0, segments >= 0, segments)
        model(packed, position_ids=positions, use_cache=False)
        together, keep = logits_of(routers), routers.keep()
        for index, part in enumerate((first, second)):
            model(part, use_cache=False)
            torch.testing.assert_close(
                logits_of(routers)[:, 0, 0], together[:, 0, index], rtol=1e-4, atol=1e-5
            )
    assert keep[3].shape == (1, 12)
    assert keep[3][0, :7].unique().numel() == 1


def test_padding_is_no_unit_of_capacity() -> None:
    mask = torch.tensor([[True, True, False, False]])
    assert Pooling.tokens(mask).unit_mask.sum() == 2
    segments = torch.tensor([[0, 1, -1, -1], [0, -1, -1, -1]])
    pooling = Pooling.sequences(segments >= 0, segments >= 0, segments)
    assert pooling.unit_mask.tolist() == [[True, True], [True, False]]


def test_a_batch_of_another_shape_than_set_is_an_error() -> None:
    model = tiny_model()
    routers = attach_routers(model)
    routers.set_batch(torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"set_batch\(\) was given masks of \(2, 5\)"):
        model(ids_of(3))


def test_a_set_batch_holds_for_one_forward_pass() -> None:
    model = tiny_model()
    routers = attach_routers(model)
    routers.set_batch(torch.ones(2, T, dtype=torch.bool))
    model(ids_of(2))
    model(ids_of(3, 4))
    assert routers.keep()[3].shape == (3, 1)


def test_penalties_of_micro_batches_add_up_to_the_global_one() -> None:
    model = tiny_model()
    routers = attach_routers(model, RouterConfig(granularity="attn_token", capacity=0.3))
    random_routers(routers)
    ids, mask = ids_of(6), torch.ones(6, T, dtype=torch.bool)
    mask[1, 5:] = mask[4, 9:] = False
    total = float(mask.sum()) * len(routers.layers)

    def run(rows: slice) -> tuple[Tensor, Tensor]:
        routers.zero_grad()
        routers.set_batch(mask[rows])
        model(ids[rows], attention_mask=mask[rows].long())
        penalty = routers.penalty(total)
        penalty.backward()
        return penalty.detach(), torch.cat([p.grad.flatten() for p in routers.parameters()])

    whole, gradient = run(slice(0, 6))
    parts = [run(slice(i, i + 2)) for i in (0, 2, 4)]
    torch.testing.assert_close(sum(p for p, _ in parts), whole)
    torch.testing.assert_close(sum(g for _, g in parts), gradient)
    assert float(gradient.abs().max()) > 0


def test_decisions_are_overridden_in_a_context_and_free_again_after_it() -> None:
    model = tiny_model()
    routers = attach_routers(model)
    with routers.override({2: 0.0, 3: 1.0, 4: torch.tensor([[0.0], [1.0], [1.0]])}):
        model(ids_of(3))
    assert abs(routers.capacity() - 5 / 9) < 1e-6
    model(ids_of(3))
    assert routers.capacity() == 1.0


def test_an_override_ends_with_an_exception_and_adds_to_an_outer_one() -> None:
    model = tiny_model()
    routers = attach_routers(model)
    with routers.override({2: 0.0}):
        with pytest.raises(ZeroDivisionError), routers.disabled():
            raise ZeroDivisionError
        with routers.override({3: 0.0}):
            model(ids_of(2))
        assert [float(keep.detach().sum()) for keep in routers.keep().values()] == [0.0, 0.0, 2.0]
        model(ids_of(2))
        assert [float(keep.detach().sum()) for keep in routers.keep().values()] == [0.0, 2.0, 2.0]


def test_reading_decisions_before_a_forward_pass_is_an_error() -> None:
    routers = attach_routers(tiny_model())
    with pytest.raises(RuntimeError, match=r"no forward pass .* \[2, 3, 4\]"):
        routers.penalty()
