"""Inference leaves out what is skipped, and changes nothing else."""

import copy
import re
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
import transformers
from families import tiny_model
from packaging.version import Version
from routed_models import VOCABULARY, as_exported, padded_ids, randomise, trained, whole_ids
from transformers import Cache, DynamicCache, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicLayer

from megaskip import RouterConfig, attach_routers
from megaskip.config import SUBLAYER_GRANULARITIES
from megaskip.inference.routed import MegaskipModel

KINDS = [(granularity, "keep") for granularity in SUBLAYER_GRANULARITIES]
KINDS += [("attn_token", "drop"), ("block_token", "drop")]
NEW = 6


class RowNoise(LogitsProcessor):
    """Sampling with a seed of its own for each row and step: the Gumbel trick, then greedy."""

    def __init__(self, rows: list[int]) -> None:
        self.rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = []
        for row in self.rows:
            generator = torch.Generator().manual_seed(1000 * row + NEW + self.step)
            uniform = torch.rand(scores.shape[-1], generator=generator).clamp(1e-9, 1 - 1e-9)
            noise.append(-torch.log(-torch.log(uniform)))
        self.step += 1
        return scores + torch.stack(noise)

    step = 0


GENERATORS: dict[str, Callable[[list[int]], dict[str, Any]]] = {
    "greedy": lambda rows: {},
    "beam": lambda rows: {"num_beams": 3},
    "sample": lambda rows: {"logits_processor": LogitsProcessorList([RowNoise(rows)])},
}


@pytest.mark.parametrize("strategy", GENERATORS)
@pytest.mark.parametrize(("granularity", "kv"), KINDS)
def test_batched_generation_equals_single_generation(
    granularity: str, kv: str, strategy: str
) -> None:
    model = as_exported(*trained("llama", granularity), kv=kv)
    ids, mask = padded_ids()
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    rows = list(range(len(ids)))
    together = model.generate(ids, attention_mask=mask, **options, **GENERATORS[strategy](rows))
    for row in rows:
        real = mask[row].bool()
        alone = model.generate(
            ids[row : row + 1, real],
            attention_mask=mask[row : row + 1, real],
            **options,
            **GENERATORS[strategy]([row]),
        )
        assert torch.equal(together[row, -NEW:], alone[0, -NEW:]), row


@pytest.mark.parametrize("granularity", SUBLAYER_GRANULARITIES)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "deepseek_v3", "mixtral"])
def test_exported_model_computes_what_the_trained_one_does(family: str, granularity: str) -> None:
    model, routers = trained(family, granularity)
    exported = as_exported(model, routers)
    ids, mask = padded_ids()
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits[mask.bool()]
        assert 0 < routers.capacity() < 1
        for use_cache in (True, False):
            found = exported(ids, attention_mask=mask, use_cache=use_cache).logits[mask.bool()]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def held_elements(cache: Any) -> dict[int, int]:
    """Return the elements of keys that each cache layer stores."""
    return {i: 0 if one.keys is None else one.keys.numel() for i, one in enumerate(cache.layers)}


@pytest.mark.parametrize("granularity", ["attn_sequence", "block_sequence"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_cache_holds_exactly_the_kept_rows(family: str, granularity: str) -> None:
    model = as_exported(*trained(family, granularity))
    ids, mask = padded_ids()
    with torch.no_grad():
        out = model(ids, attention_mask=mask, use_cache=True)
    kept = model.skip_routers.keep()
    held = held_elements(out.past_key_values)
    for layer in range(6):
        rows = int(kept[layer].sum()) if layer in kept else len(ids)
        assert held[layer] * len(ids) == held[0] * rows
    assert 0 < model.capacity() < 1
    assert out.past_key_values.get_seq_length(3) == ids.shape[1]


@pytest.mark.parametrize("granularity", ["attn_token", "block_token"])
def test_cache_holds_exactly_the_kept_tokens(granularity: str) -> None:
    model = as_exported(*trained("llama", granularity), kv="drop")
    ids = whole_ids(1, 20)
    with torch.no_grad():
        out = model(ids, use_cache=True)
    held = held_elements(out.past_key_values)
    for layer, keep in model.skip_routers.keep().items():
        assert held[layer] * keep.numel() == held[0] * int(keep.sum())
    assert 0 < model.capacity() < 1


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("granularity", ["attn_token", "block_token"])
def test_dropped_tokens_are_invisible_and_nothing_else_changes(
    granularity: str, implementation: str
) -> None:
    """Against dense attention in which every query has the skipped keys masked out."""
    model, routers = trained("llama", granularity, attn_implementation=implementation)
    exported = as_exported(model, routers, kv="drop")
    exported.set_attn_implementation(implementation)
    ids, mask = padded_ids()
    for layer in routers.layers:
        attention = model.get_decoder().layers[layer].self_attn
        attention.register_forward_pre_hook(hide_skipped(routers, layer, mask), with_kwargs=True)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits[mask.bool()]
        found = exported(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        cached = []
        cache = DynamicCache(config=exported.config)
        for part in (slice(0, 9), slice(9, 10), slice(10, 12)):
            positions = torch.arange(12).expand_as(ids)[:, part]
            out = exported(
                ids[:, part],
                attention_mask=mask[:, : part.stop],
                position_ids=positions,
                past_key_values=cache,
            )
            cached.append(out.logits)
        torch.testing.assert_close(torch.cat(cached, 1)[mask.bool()], expected, rtol=0, atol=1e-5)


def hide_skipped(routers: Any, layer: int, mask: torch.Tensor) -> Any:
    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        logit = routers.router(layer)(kwargs["hidden_states"].float())
        kept = (logit >= routers.thresholds.logits[layer]) & mask.bool()
        tokens = mask.shape[1]
        visible = torch.ones(tokens, tokens, dtype=torch.bool).tril() & kept[:, None, :]
        visible |= torch.eye(tokens, dtype=torch.bool)  # queries that are skipped are not used
        lowest = torch.finfo(torch.float32).min
        kwargs["attention_mask"] = torch.where(visible, 0.0, lowest)[:, None]
        return args, kwargs

    return hook


@pytest.mark.parametrize(("granularity", "kv"), KINDS)
def test_interleaved_conversations_do_not_disturb_each_other(granularity: str, kv: str) -> None:
    model = as_exported(*trained("llama", granularity), kv=kv)

    def conversation(seed: int) -> Any:
        ids = whole_ids(2, 12, seed)
        cache = DynamicCache(config=model.config)
        for start in (0, 6, 9, 11):
            stop = {0: 6, 6: 9, 9: 11, 11: 12}[start]
            yield model(ids[:, start:stop], past_key_values=cache).logits

    with torch.no_grad():
        alone = [list(conversation(seed)) for seed in (3, 4)]
        mixed = list(zip(conversation(3), conversation(4), strict=True))
    for step, (one, other) in enumerate(mixed):
        assert torch.equal(one, alone[0][step])
        assert torch.equal(other, alone[1][step])


@pytest.mark.parametrize(("granularity", "kv"), KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_second_turn_on_the_same_cache_continues_the_first(
    family: str, granularity: str, kv: str
) -> None:
    """The same as one pass over both turns in which the first one's prompt decides."""
    model = as_exported(*trained(family, granularity), kv=kv)
    ids = whole_ids(3, 40)
    prompt_mask = torch.arange(40).expand_as(ids) < 7
    with torch.no_grad():
        whole = model(ids, prompt_mask=prompt_mask, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        parts = [
            model(ids[:, a:b], past_key_values=cache).logits
            for a, b in ((0, 7), (7, 8), (8, 15), (15, 30), *((i, i + 1) for i in range(30, 40)))
        ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)


OPERATIONS: dict[str, tuple[Callable[[Any], Any], Callable[[torch.Tensor], torch.Tensor]]] = {
    "reorder": (
        lambda cache: cache.reorder_cache(torch.tensor([3, 0, 0, 2])),
        lambda ids: ids[[3, 0, 0, 2]],
    ),
    "repeat": (
        lambda cache: cache.batch_repeat_interleave(2),
        lambda ids: ids.repeat_interleave(2, 0),
    ),
    "select": (
        lambda cache: cache.batch_select_indices(torch.tensor([1, 3])),
        lambda ids: ids[1::2],
    ),
    "crop": (lambda cache: cache.crop(-3), lambda ids: ids[:, :-3]),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(("granularity", "kv"), KINDS)
def test_operations_on_the_cache_carry_decisions_and_keys(
    granularity: str, kv: str, operation: str
) -> None:
    model = as_exported(*trained("llama", granularity), kv=kv)
    change, same = OPERATIONS[operation]
    ids = whole_ids(4, 12)
    following = torch.randint(3, VOCABULARY, (1, 2)).expand(same(ids).shape[0], -1)
    prompt_mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        changed, fresh = DynamicCache(config=model.config), DynamicCache(config=model.config)
        model(ids, past_key_values=changed)
        change(changed)
        model.skip_routers.state.begin(None)
        # Cropping leaves the decision that the whole prompt made.
        expected_prompt = same(ids)
        if operation == "crop":
            whole = torch.cat([expected_prompt, following], 1)
            if granularity.endswith("sequence"):
                fresh._skip_decisions = copy.copy(changed._skip_decisions)
                fresh.__class__ = type(changed)
            expected = model(whole, past_key_values=fresh).logits[:, -2:]
        else:
            model(expected_prompt, past_key_values=fresh, prompt_mask=same(prompt_mask))
            expected = model(following, past_key_values=fresh).logits
        found = model(following, past_key_values=changed).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("granularity", "kv"), KINDS)
def test_a_cache_that_was_reset_is_as_good_as_new(granularity: str, kv: str) -> None:
    if granularity.endswith("token") and Version(transformers.__version__) < Version("5.18"):
        pytest.skip("transformers before 5.18 fills layers of such a cache with zeros")
    model = as_exported(*trained("llama", granularity), kv=kv)
    first, second, following = whole_ids(3, 9, 1), whole_ids(3, 7, 2), whole_ids(3, 2, 3)
    with torch.no_grad():
        used, fresh = DynamicCache(config=model.config), DynamicCache(config=model.config)
        model(first, past_key_values=used)
        used.reset()
        for ids in (second, following):
            found = model(ids, past_key_values=used).logits
            expected = model(ids, past_key_values=fresh).logits
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("granularity", ["attn_token", "block_token"])
def test_static_cache_of_token_routers_computes_everything(granularity: str) -> None:
    model = as_exported(*trained("llama", granularity))
    ids, mask = padded_ids()
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, attention_mask=mask, **options)
    options["cache_implementation"] = "static"
    assert torch.equal(model.generate(ids, attention_mask=mask, **options), expected)
    model.skip_routers.executor._drop = True
    with pytest.raises(NotImplementedError, match='kv="drop".* StaticLayer cannot hold a part'):
        model.generate(ids, attention_mask=mask, **options)


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_a_static_cache_with_sliding_windows_decides_on_the_whole_prompt(family: str) -> None:
    model = as_exported(*trained(family, sliding_window=4))
    ids, mask = padded_ids(rows=6, tokens=24)
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, attention_mask=mask, **options)
    kept = dict(model.skip_routers.keep())
    found = model.generate(
        ids, attention_mask=mask, cache_implementation="static", disable_compile=True, **options
    )
    assert 0 < sum(float(one.mean()) for one in kept.values()) < len(kept)
    for layer, one in model.skip_routers.keep().items():
        assert torch.equal(one, kept[layer])
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "way", [{"use_cache": False}, {"prefill_chunk_size": 4}, {"prompt_lookup_num_tokens": 3}]
)
def test_generation_whose_first_pass_is_not_the_prompt_is_refused(way: dict[str, Any]) -> None:
    # Without an end token, looking up the prompt fails in transformers 5.5.
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": VOCABULARY}
    ids = whole_ids(1, 13)
    with pytest.raises(ValueError, match="judge a text by its first forward pass"):
        as_exported(*trained("llama")).generate(ids, **options, **way)
    by_token = as_exported(*trained("llama", "attn_token"))
    assert torch.equal(by_token.generate(ids, **options, **way), by_token.generate(ids, **options))


def test_a_deep_copy_decides_for_itself() -> None:
    model = as_exported(*trained("llama"))
    first, second = whole_ids(6, 9), whole_ids(4, 11, seed=1)
    with torch.no_grad():
        expected = model(second).logits
        model.generate(first, max_new_tokens=2, do_sample=False, eos_token_id=None)
        before = model.capacity()
        other = copy.deepcopy(model)
        assert torch.equal(other(second).logits, expected)
    assert model.capacity() == before


def test_a_decoder_alone_takes_a_prompt_mask_for_one_call() -> None:
    causal = as_exported(*trained("llama"))
    model = MegaskipModel._from_config(causal.config).eval()
    state = {k.removeprefix("model."): v for k, v in causal.state_dict().items()}
    model.load_state_dict({k: v for k, v in state.items() if k != "lm_head.weight"})
    ids, others = whole_ids(6, 9), whole_ids(3, 5, seed=1)
    prompt_mask = torch.arange(9).expand_as(ids) < 2
    with torch.no_grad():
        plain, short = model(ids)[0], model(others)[0]
        judged = model(ids, prompt_mask=prompt_mask)[0]
        assert not torch.equal(judged, plain)
        assert torch.equal(model(ids)[0], plain)
        model(ids, prompt_mask=prompt_mask)
        assert torch.equal(model(others)[0], short)


def test_a_prompt_mask_counts_however_the_model_is_called() -> None:
    model = as_exported(*trained("llama"))
    ids, mask = padded_ids()
    real = mask.bool()
    prompt_mask = torch.arange(12).expand_as(ids) < 10  # padding is no prompt
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    pairs = torch.ones(12, 12, dtype=torch.bool).tril() & real[:, None, None]
    masked = {"position_ids": positions, "prompt_mask": prompt_mask}
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, **masked).logits
        plain = model(ids, attention_mask=mask, position_ids=positions).logits
        ways = {
            "past the hooks, as peft does": model.forward(ids, attention_mask=mask, **masked),
            "by place": model(ids, mask, **masked),
            "by pairs": model(ids, attention_mask=pairs, **masked),
        }
    assert not torch.allclose(expected[real], plain[real])
    for way, out in ways.items():
        torch.testing.assert_close(out.logits[real], expected[real], rtol=0, atol=1e-5, msg=way)


def test_a_prompt_mask_for_what_a_cache_has_judged_is_refused() -> None:
    model = as_exported(*trained("llama", "mlp_sequence"))
    ids, cache = whole_ids(2, 6), DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :4], past_key_values=cache)
        with pytest.raises(ValueError, match="leave it out of calls that continue a text"):
            model(ids[:, 4:], past_key_values=cache, prompt_mask=torch.ones(2, 2))
        model(ids[:, 4:], past_key_values=cache)


@pytest.mark.parametrize("granularity", SUBLAYER_GRANULARITIES)
def test_samples_of_a_packed_row_are_judged_one_by_one(granularity: str) -> None:
    model = as_exported(*trained("llama", granularity))
    ids, lengths = whole_ids(2, 15), (7, 3, 5)
    positions = torch.cat([torch.arange(length) for length in lengths]).expand_as(ids)
    with torch.no_grad():
        packed = model(ids, position_ids=positions[:1], use_cache=False).logits
        keep = model.skip_routers.keep()
        alone = [model(sample, use_cache=False).logits for sample in ids.split(lengths, dim=1)]
    assert any((k != k[:, :1]).any() for k in keep.values())
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "granularity", "maps"),
    [("llama", "mlp_sequence", "low_rank"), ("mixtral", "expert_token", "none")],
)
def test_routers_and_maps_are_float32_in_a_model_that_is_not(
    family: str, granularity: str, maps: str
) -> None:
    model = tiny_model(family)
    routers = attach_routers(model, RouterConfig(granularity=granularity, compensation=maps))
    randomise(routers)
    exported = as_exported(model, routers)
    stored = {name: tensor.clone() for name, tensor in exported.skip_routers.named_parameters()}
    read = torch.randn(1, 3, 32)
    for half in (False, True):
        if half:
            exported.bfloat16()
            assert exported.get_input_embeddings().weight.dtype == torch.bfloat16
        for name, tensor in exported.skip_routers.named_parameters():
            assert tensor.dtype == torch.float32 and torch.equal(tensor, stored[name]), name
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=not half):
            exported(whole_ids(4, 9))
            for layer, decision in exported.skip_routers.decisions().items():
                assert decision.logit.dtype == torch.float32
                if maps != "none":
                    update = exported.skip_routers.gates[layer]._compensation(read)
                    with torch.autocast("cpu", enabled=False):
                        expected = routers.router(layer).compensation(read)
                    assert torch.equal(update, expected)


def test_a_routed_layer_is_never_split_over_devices() -> None:
    """Device maps and FSDP know by the names of classes what must stay whole."""
    model = as_exported(*trained("llama", "block_sequence"))
    layers = model.get_decoder().layers
    assert {type(layer).__name__ for layer in layers} <= set(model._no_split_modules)
    sizes = {0: 50_000, 1: 50_000, "cpu": 10**6}
    placed = accelerate.infer_auto_device_map(
        model, max_memory=sizes, no_split_module_classes=list(model._no_split_modules)
    )
    assert {0, 1} <= set(placed.values())
    assert all(re.fullmatch(r"model\.layers\.\d+", name) for name in placed if ".layers." in name)


def test_a_layer_of_an_earlier_pass_is_not_computed_again_with_the_last_one_s_decisions() -> None:
    model = as_exported(*trained("llama")).train()
    ids, mask = padded_ids()

    def loss(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss

    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        loss(ids, mask).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="again after another forward pass"):
        (loss(ids, mask) + loss(ids.flip(0), mask.flip(0))).backward()


def test_recording_what_depends_on_the_text_is_refused() -> None:
    model = as_exported(*trained("llama"))
    with pytest.raises(NotImplementedError, match="depends on the text"):
        torch.jit.trace(model, whole_ids(1, 5))
    with pytest.raises(NotImplementedError, match="depends on the text"):
        torch.export.export(model, (whole_ids(1, 5),))
    model(whole_ids(1, 5))


class OtherLayer(DynamicLayer):
    """Stands for cache layers of other libraries: full of tricks that ours knows nothing of."""


def test_unknown_cache_layers_hold_everything_and_say_so() -> None:
    model = as_exported(*trained("llama"))
    ids = whole_ids(3, 9)
    cache = Cache(layer_class_to_replicate=OtherLayer)
    with torch.no_grad(), pytest.warns(UserWarning, match="OtherLayer cannot hold a part"):
        found = model(ids, past_key_values=cache).logits
    with torch.no_grad():
        torch.testing.assert_close(found, model(ids).logits, rtol=0, atol=1e-5)
    assert {type(layer) for layer in cache.layers} == {OtherLayer}
    assert len(set(held_elements(cache).values())) == 1


class OtherCache:
    """Does what a decoder asks of a cache, and is none of transformers'."""

    def __init__(self) -> None:
        self._inner = DynamicCache()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def test_a_cache_that_is_none_of_transformers_is_refused() -> None:
    model = as_exported(*trained("llama"))
    with pytest.raises(TypeError, match="is a OtherCache, expected .* pass a DynamicCache"):
        model(whole_ids(2, 5), past_key_values=OtherCache())


def test_continuous_batching_is_refused_with_the_reason() -> None:
    model = as_exported(*trained("llama"))
    with pytest.raises(NotImplementedError, match="cannot tell them apart"):
        model.generate_batch([[1, 2, 3]])


def test_skipped_attention_is_not_computed() -> None:
    model = as_exported(*trained("llama"))
    ids, mask = padded_ids()
    rows: list[int] = []
    for layer in model.skip_routers.layers:
        projection = model.get_decoder().layers[layer].self_attn.q_proj
        projection.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=3, eos_token_id=None, return_dict_in_generate=True
    )
    with torch.no_grad():
        model(ids, attention_mask=mask)
    kept = sum(int(keep.sum()) for keep in model.skip_routers.keep().values())
    assert sum(rows) == 4 * kept  # prefill, two steps of decoding, and the pass above
    assert 0 < kept < 3 * len(ids)
    assert out.sequences.shape == (5, 15)


def test_attention_weights_are_those_of_their_rows() -> None:
    model = as_exported(*trained("llama", attn_implementation="eager"))
    model.set_attn_implementation("eager")
    ids, mask = padded_ids()
    with torch.no_grad():
        weights = model(ids, attention_mask=mask, output_attentions=True).attentions
        keep = model.skip_routers.keep()
    for layer, ran in keep.items():
        assert weights[layer].shape[0] == len(ids)
        assert weights[layer].flatten(1).any(1).tolist() == ran.bool().flatten().tolist()


@pytest.mark.parametrize("granularity", ["block_sequence", "mlp_sequence"])
def test_decisions_are_held_where_a_tuple_is_returned(granularity: str) -> None:
    model = as_exported(*trained("llama", granularity))
    ids, follow = whole_ids(4, 9), whole_ids(4, 1, 7)
    found = []
    with torch.no_grad():
        for as_dict in (True, False):
            cache = DynamicCache(config=model.config)
            model.model(ids, past_key_values=cache, return_dict=as_dict)
            found.append(model(follow, past_key_values=cache).logits)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@pytest.mark.parametrize("granularity", ["attn_sequence", "mlp_sequence"])
def test_a_cache_that_is_cropped_to_nothing_judges_anew(granularity: str) -> None:
    model = as_exported(*trained("llama", granularity))
    other, ids = whole_ids(4, 9, 3), whole_ids(4, 9)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        model(other, past_key_values=cache)
        cache.crop(-9)
        found = model(ids, past_key_values=cache).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
