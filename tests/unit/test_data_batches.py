"""Packing never cuts or leaks, batches say what they hold, and the order never depends on ranks."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megaskip.data import GlobalBatchOrder, PackedRow, Row, collate, pack, shard
from megaskip.data.mix import in_pass, interleave, mix
from megaskip.data.order import hashed, hashed_one, permutation
from megaskip.errors import ConfigError, DataError


def make_row(length: int, *, prompt: int = 0, seed: int = 0) -> Row:
    ids = np.random.default_rng(seed).integers(5, 60, length).astype(np.int32)
    supervised = np.arange(length) >= max(prompt, 1)
    return Row(input_ids=ids, supervised=supervised, prompt_length=prompt, source=0)


@pytest.mark.parametrize("seed", range(5))
def test_packing_puts_every_row_whole_into_exactly_one_bin_that_it_fits(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 65, 300).tolist()
    bins = pack(lengths, seq_length=64)
    assert sorted(i for members in bins for i in members) == list(range(300))
    assert all(sum(lengths[i] for i in members) <= 64 for members in bins)
    assert len(bins) <= 1.05 * sum(lengths) / 64 + 1
    assert bins == pack(lengths, seq_length=64)


def test_packing_prefers_the_fullest_bin_that_fits() -> None:
    assert pack([6, 7, 3, 4], seq_length=10) == [[1, 2], [0, 3]]


def test_packed_logits_equal_those_of_the_samples_alone() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    rows = [make_row(n, seed=n) for n in (7, 1, 12, 5)]
    packs = [PackedRow(segments=tuple(rows[:3])), PackedRow(segments=(rows[3],))]
    batch = collate(packs, pad_token_id=0, prompt_tokens=4)
    assert batch.attention_mask is None and batch.segment_ids is not None
    assert batch.position_ids[1].tolist() == [*range(5), *range(19)]  # padding begins anew
    with torch.no_grad():
        packed = model(batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        for number, row in enumerate(rows):
            b, s = divmod(number, 3)
            alone = model(torch.from_numpy(row.input_ids.astype(np.int64))[None]).logits[0]
            assert (packed[b][batch.segment_ids[b] == s] - alone).abs().max() < 1e-5


def test_padded_logits_equal_those_of_the_samples_alone() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    rows = [make_row(7, seed=1), make_row(12, seed=2)]
    batch = collate(rows, pad_token_id=0, prompt_tokens=4)
    with torch.no_grad():
        together = model(
            batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        ).logits
        for b, row in enumerate(rows):
            alone = model(torch.from_numpy(row.input_ids.astype(np.int64))[None]).logits[0]
            assert (together[b, : len(row)] - alone).abs().max() < 1e-5


def test_no_label_is_predicted_across_samples() -> None:
    rows = (make_row(5), make_row(3), make_row(4, prompt=2))
    batch = collate([PackedRow(segments=rows)], pad_token_id=0, prompt_tokens=4)
    assert batch.labels[0].eq(-100).nonzero().flatten().tolist() == [0, 5, 8, 9, 12, 13, 14, 15]
    assert batch.counts.supervised == sum(int(row.supervised.sum()) for row in rows) == 8


def test_padding_is_on_the_right_in_multiples_and_marked_everywhere() -> None:
    batch = collate([make_row(3), make_row(9)], pad_token_id=63, prompt_tokens=4)
    assert batch.input_ids.shape == (2, 16)
    assert batch.input_ids[0, 3:].eq(63).all() and batch.labels[0, 3:].eq(-100).all()
    assert batch.token_mask.sum(1).tolist() == [3, 9]
    assert batch.segment_ids is None
    assert batch.attention_mask is not None and batch.attention_mask.dtype == torch.int64
    assert batch.position_ids.tolist() == [[*range(16)]] * 2
    assert (
        collate([make_row(9)], pad_token_id=0, prompt_tokens=4, pad_to_multiple=1).input_ids.shape[
            1
        ]
        == 9
    )


def test_prompt_mask_covers_the_prompt_or_the_first_tokens_of_each_sample() -> None:
    rows = (make_row(6, prompt=2), make_row(5), make_row(2))
    batch = collate([PackedRow(segments=rows)], pad_token_id=0, prompt_tokens=3)
    assert batch.prompt_mask[0].int().tolist() == [1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 0, 0, 0]
    assert batch.segment_ids is not None
    assert batch.segment_ids[0].tolist() == [0] * 6 + [1] * 5 + [2] * 2 + [-1] * 3
    assert not (batch.prompt_mask & ~batch.token_mask).any()


def test_batch_moves_as_a_whole() -> None:
    batch = collate([make_row(3)], pad_token_id=0, prompt_tokens=4).to("meta")
    assert batch.input_ids.is_meta and batch.prompt_mask.is_meta and batch.segment_ids is None


@pytest.mark.parametrize("size", [2, 4])
def test_shares_of_the_tokens_of_rows_add_up_to_the_rows(size: int) -> None:
    rows = [make_row(29, prompt=3, seed=1), make_row(11, seed=2), make_row(17, prompt=4, seed=3)]
    whole = collate(rows, pad_token_id=0, prompt_tokens=4, pad_to_multiple=8 * size)
    shares = [whole.share_of_tokens(rank, size) for rank in range(size)]
    for name in ("input_ids", "labels", "token_mask", "prompt_mask", "position_ids"):
        together = torch.cat([getattr(share, name) for share in shares], dim=1)
        assert torch.equal(together, getattr(whole, name)), name
    for count in ("rows", "samples", "tokens", "supervised"):
        total = sum(getattr(share.counts, count) for share in shares)
        assert total == getattr(whole.counts, count), count
    width, pairs = whole.input_ids.shape[1] // size, []
    for rank, share in enumerate(shares):
        row, column = share.predicting // width, share.predicting % width + rank * width
        pairs += zip(row.tolist(), column.tolist(), share.targets.tolist(), strict=True)
        assert share.row_tokens.tolist() == [29, 11, 17]
        assert share.row_prompts.tolist() == [3, 4, 4]
    expected = [
        (number, token - 1, int(row.input_ids[token]))
        for number, row in enumerate(rows)
        for token in row.supervised.nonzero()[0].tolist()
    ]
    assert sorted(pairs) == expected
    assert whole.share_of_tokens(0, 1) is whole


def test_each_epoch_sees_every_row_once_and_batches_cross_epochs() -> None:
    order = GlobalBatchOrder(10, 4, seed=3)
    seen = [i for step in range(5) for i in order.indices(step)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert [order.epoch(step) for step in (0, 5)] == [0.0, 2.0]


def test_batch_larger_than_the_data_wraps() -> None:
    seen = GlobalBatchOrder(3, 7, seed=0).indices(1)
    assert len(seen) == 7 and {seen.count(i) for i in range(3)} <= {2, 3}


def test_order_is_a_function_of_seed_and_step_alone() -> None:
    one, other = GlobalBatchOrder(50, 8, seed=1), GlobalBatchOrder(50, 8, seed=1)
    forward = [one.indices(step) for step in range(20)]
    backward = [other.indices(step) for step in reversed(range(20))][::-1]
    assert forward == backward
    assert forward != [GlobalBatchOrder(50, 8, seed=2).indices(step) for step in range(20)]


def test_order_is_the_same_for_ever() -> None:
    assert permutation(8, 0, 0).tolist() == [4, 0, 1, 7, 6, 2, 5, 3]


def test_one_hash_equals_the_hash_in_the_row() -> None:
    assert [hashed_one(i, 5, 6) for i in range(4)] == hashed(4, 5, 6).tolist()


@pytest.mark.parametrize(("world", "micro"), [(1, 24), (1, 1), (2, 3), (4, 2), (8, 3), (24, 1)])
def test_ranks_and_micro_batches_share_out_the_global_batch_exactly(world: int, micro: int) -> None:
    indices = GlobalBatchOrder(100, 24, seed=0).indices(3)
    parts = [shard(indices, rank=r, world_size=world, micro_batch_size=micro) for r in range(world)]
    in_order = [i for m in range(24 // world // micro) for r in range(world) for i in parts[r][m]]
    assert in_order == indices


def test_batch_that_cannot_be_shared_out_is_an_error() -> None:
    with pytest.raises(
        ConfigError, match="global batch of 10 rows cannot be split over 4 data-par"
    ):
        shard(list(range(10)), rank=0, world_size=4, micro_batch_size=1)
    with pytest.raises(DataError, match="hold no rows"):
        GlobalBatchOrder(0, 4, seed=0)


@pytest.mark.parametrize(("weight", "total"), [(1, 10), (2.5, 25), (0.3, 3), (3, 30)])
def test_weight_says_exactly_how_often_rows_are_seen(weight: float, total: int) -> None:
    order = mix(np.zeros(10, dtype=int), weights=[weight], seed=0)
    counts = np.bincount(order, minlength=10)
    assert len(order) == total
    assert counts.max() - counts.min() <= 1


def test_mixture_depends_on_the_seed_and_weighs_each_source() -> None:
    sources = np.array([0] * 100 + [1] * 40)
    order = mix(sources, weights=[0.5, 2], seed=0)
    assert np.bincount(sources[order]).tolist() == [50, 80]
    assert order.tolist() == mix(sources, weights=[0.5, 2], seed=0).tolist()
    assert sorted(order) != sorted(mix(sources, weights=[0.5, 2], seed=1))


def test_streamed_share_is_close_to_the_weight() -> None:
    kept = sum(in_pass(i, weight=2.3, number=2, seed=0, source=0) for i in range(4000))
    assert abs(kept / 4000 - 0.3) < 0.03
    assert all(in_pass(i, weight=2.3, number=1, seed=0, source=0) for i in range(50))


def test_sources_take_turns_in_proportion() -> None:
    assert "".join(interleave(["aaaa", "bb"], rates=[2, 1])) == "abaaba"
    assert "".join(interleave(["a", "bbb"], rates=[1, 1])) == "abbb"
