"""Decode on a static cache: the same step again and again, so that a GPU can play it back."""

import copy
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from routed_models import as_exported, padded_ids, trained, whole_ids
from tensor_calls import OperationTape, Waits
from transformers import StaticCache

from megaskip import detach_routers
from megaskip.inference import static_decode
from megaskip.inference.executor import InferenceExecutor
from megaskip.inference.static_decode import (
    RECORDERS,
    CudaGraph,
    DecodeSteps,
    _stream_beside,
    let_generate_record,
)

GREEDY: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
SAMPLED = GREEDY | {"do_sample": True, "temperature": 2.0}
SEQUENCE = ("attn_sequence", "mlp_sequence", "block_sequence")
FAMILIES = ["llama", "gemma2", "gpt_oss", "deepseek_v3", "mixtral"]


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what is said, without leaving out what was said before."""
    said: list[str] = []
    monkeypatch.setattr(static_decode, "_say_not_recorded", said.append)
    return said


class Recorded:
    """Lets steps be recorded on this CPU, and keeps what was made for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tapes: list[OperationTape] = []
        monkeypatch.setitem(RECORDERS, "cpu", self._tape)

    def _tape(self, device: torch.device) -> OperationTape:
        self.tapes.append(OperationTape(device))
        return self.tapes[-1]

    @property
    def replays(self) -> list[int]:
        """Return how often each tape was played back."""
        return [tape.replays for tape in self.tapes]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    return Recorded(monkeypatch)


def generated(model: Any, options: dict[str, Any], ids: Any, mask: Any, **more: Any) -> Any:
    """Return the tokens and the decisions."""
    torch.manual_seed(3)
    tokens = model.generate(ids, attention_mask=mask, **options, **more)
    return tokens, model.skip_routers.keep()


@pytest.mark.parametrize(
    ("family", "granularity", "compensation"),
    [
        *itertools.product(FAMILIES, SEQUENCE, ["none"]),
        ("llama", "attn_sequence", "bias"),
        *itertools.product(["gemma2"], SEQUENCE, ["low_rank"]),
    ],
)
def test_steps_that_are_played_back_write_the_tokens_of_eager_decode(
    family: str, granularity: str, compensation: str, recorded: Recorded, warned: list[str]
) -> None:
    """Rows are padded on the left and differ; a sliding window of 16 becomes full on the way."""
    model = as_exported(*trained(family, granularity, compensation=compensation))
    ids, mask = padded_ids(rows=4)
    expected, keep = generated(model, GREEDY, ids, mask)
    rows = torch.stack([kept.flatten() for kept in keep.values()])
    assert bool((rows != rows[:, :1]).any()), "rows that agree show little"
    found, kept = generated(model, GREEDY, ids, mask, cache_implementation="static")
    assert torch.equal(found, expected)
    assert all(torch.equal(kept[layer], keep[layer]) for layer in keep)
    assert recorded.replays == ([2, 3] if family in ("gemma2", "gpt_oss") else [7])
    assert not warned


@pytest.mark.parametrize(
    ("options", "rows"),
    [(GREEDY, 1), (SAMPLED, 1), (SAMPLED, 4)],
    ids=["greedy, 1 row", "sampled, 1 row", "sampled, 4 rows"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_are_whole_are_written_like_eager_decode(
    family: str, options: dict[str, Any], rows: int, recorded: Recorded
) -> None:
    """Sampled with a seed. What a step does is played back here."""
    model = as_exported(*trained(family, "block_sequence"))
    ids = whole_ids(rows, 12)
    expected, _ = generated(model, options, ids, None)
    found, _ = generated(model, options, ids, None, cache_implementation="static")
    assert torch.equal(found, expected)
    assert sum(recorded.replays) >= 5
    assert options is GREEDY or not torch.equal(generated(model, GREEDY, ids, None)[0], expected)


@pytest.mark.parametrize("rows", [1, 4])
def test_without_a_recorder_a_static_cache_writes_the_same(rows: int, recorded: Recorded) -> None:
    RECORDERS.pop("cpu")
    model = as_exported(*trained("llama", "block_sequence"))
    ids = whole_ids(rows, 12)
    expected, _ = generated(model, SAMPLED, ids, None)
    found, _ = generated(model, SAMPLED, ids, None, cache_implementation="static")
    assert torch.equal(found, expected)
    assert not recorded.replays


def test_what_a_step_takes_from_the_host_is_not_played_back() -> None:
    """The check above can fail: a tape knows nothing of Python."""
    numbers, total = iter(range(9)), torch.zeros(1)
    tape = OperationTape()
    output = tape.record(lambda: total.add_(next(numbers) + 1) * 2)
    assert total.item() == 0
    tape.replay()
    tape.replay()
    assert total.item() == 2 and output.item() == 4


def steps_of(model: Any, ids: Any, mask: Any, count: int) -> Any:
    """Yield (the steps' runner, cache) before each of `count` decode steps, behind the prompt."""
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + count)
    steps = DecodeSteps(model)
    inputs: dict[str, Any] = {"attention_mask": mask, "past_key_values": cache, "use_cache": True}
    position = (mask.cumsum(1) - 1).clamp(min=0)
    first = {"is_first_iteration": True, "position_ids": position, **inputs}
    # Not around the yield: generators that take turns would leave it on for other tests.
    with torch.no_grad():
        model(**model.prepare_inputs_for_generation(ids, **first))
    for step in range(count):
        inputs["attention_mask"] = mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        prepared = model.prepare_inputs_for_generation(
            ids[:, :1], position_ids=position[:, -1:] + step + 1, **inputs
        )
        yield steps, cache, torch.no_grad()(lambda prepared=prepared: steps(**prepared))


@pytest.mark.parametrize("compensation", ["none", "low_rank"])
@pytest.mark.parametrize("granularity", SEQUENCE)
def test_a_step_waits_for_nothing_and_keeps_its_operations_and_addresses(
    granularity: str, compensation: str
) -> None:
    routed = trained("gemma2", granularity, compensation=compensation, sliding_window=13)
    model = as_exported(*routed)
    ids, mask = padded_ids(rows=4)
    addresses, listings = [], []
    for number, (steps, cache, step) in enumerate(steps_of(model, ids, mask, 6)):
        with Waits() as waits:
            if number < 3:
                step()
            else:
                tape = OperationTape()
                with tape:
                    step()
                listings.append(tape.listing())
        assert number == 0 or not waits.take()
        kept = [x for layer in cache.layers for x in (layer.keys, layer.values) if x is not None]
        indices = [d.rows.index for d in model.skip_routers.decisions().values()]
        tensors = [x for x in (*steps._buffers, *kept, *indices) if isinstance(x, torch.Tensor)]
        addresses.append([(x.data_ptr(), x.shape) for x in tensors])
    # The window of 13 is full from the second step on.
    assert addresses[2:] == addresses[2:3] * 4
    assert listings == listings[:1] * 3 and len(listings[0]) > 100


@pytest.mark.parametrize("granularity", ["attn_sequence", "block_sequence"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_static_cache_has_room_for_what_is_kept_alone(family: str, granularity: str) -> None:
    model = as_exported(*trained(family, granularity))
    ids, mask = padded_ids(rows=4)
    caches = [cache for _, cache, _ in steps_of(model, ids, mask, 2)]
    keep, layers = model.skip_routers.keep(), caches[0].layers
    assert 0 < model.capacity() < 1
    for index, layer in enumerate(layers):
        rows = int(keep[index].sum()) if index in keep else len(ids)
        tensors = [x for x in (layer.keys, layer.values) if x is not None]
        held = sum(x.untyped_storage().nbytes() for x in tensors)
        assert held == 4 * 2 * rows * 2 * 8 * layer.max_cache_len  # float32, heads of 8
        assert len(tensors) == 2 * (rows > 0)


def test_a_static_cache_that_was_reset_is_as_good_as_new() -> None:
    model = as_exported(*trained("llama", "attn_sequence"))
    used = StaticCache(config=model.config, max_cache_len=30)
    for seed in (1, 2):
        ids = whole_ids(4, 9, seed)
        expected, _ = generated(model, GREEDY, ids, None)
        for given in ({"past_key_values": used}, {"cache_implementation": "static"}):
            found, _ = generated(model, GREEDY, ids, None, **given)
            assert torch.equal(found, expected)
        assert used.batch_size == len(ids)
        used.reset()


def test_two_generations_in_turns_keep_their_own(recorded: Recorded) -> None:
    model = as_exported(*trained("llama", "block_sequence"))
    texts = [padded_ids(rows=4, seed=seed) for seed in (0, 5)]
    alone = [[step().logits for *_, step in steps_of(model, *text, 6)] for text in texts]
    turns = zip(*(steps_of(model, *text, 6) for text in texts), strict=True)
    for number, turn in enumerate(turns):
        for text, (steps, cache, step) in enumerate(turn):
            assert torch.equal(step().logits, alone[text][number])
            assert (steps._output is not None) == (number >= 2)
            assert model.skip_routers.decisions() == dict(cache._skip_decisions)
    assert recorded.replays == [4] * 4


def test_generations_of_a_thread_record_on_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = {0: SimpleNamespace(cuda_stream=0), 1: SimpleNamespace(cuda_stream=7)}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[device.index])
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    made = [CudaGraph(torch.device("cuda", index))._stream for index in (0, 0, 1)]
    _stream_beside.cache_clear()
    assert made[0] is made[1] is not made[2]


# -- where it does not apply


@pytest.mark.parametrize(
    ("granularity", "options", "why"),
    [
        ("mlp_token", {}, "decide per token"),
        ("attn_sequence", {"num_beams": 2}, "beam_search does"),
        ("block_sequence", {"disable_compile": True}, None),
    ],
)
def test_elsewhere_it_decodes_eagerly_and_says_why(
    granularity: str,
    options: dict[str, Any],
    why: str | None,
    recorded: Recorded,
    warned: list[str],
) -> None:
    model = as_exported(*trained("llama", granularity))
    ids, mask = padded_ids(rows=4)
    options = GREEDY | options
    expected, _ = generated(model, options, ids, mask)
    found, _ = generated(model, options, ids, mask, cache_implementation="static")
    assert torch.equal(found, expected)
    assert not recorded.tapes
    assert len(warned) == (why is not None)
    assert why is None or why in warned[0]


def test_a_step_that_waits_is_not_recorded(recorded: Recorded, warned: list[str]) -> None:
    model = as_exported(*trained("llama", "attn_sequence"))
    ids, mask = padded_ids(rows=4)
    expected, _ = generated(model, GREEDY, ids, mask)
    waits: list[float] = []
    model.lm_head.register_forward_hook(lambda *call: waits.append(call[2].sum().item()))
    found, _ = generated(model, GREEDY, ids, mask, cache_implementation="static")
    assert torch.equal(found, expected)
    assert recorded.replays == [0]
    assert warned and "a step waits for the device 1 times" in warned[0]


def test_a_model_with_routers_attached_generates_like_an_exported_one(
    recorded: Recorded, warned: list[str]
) -> None:
    model, routers = trained("llama", "attn_sequence")
    base = type(model)
    let_generate_record(model)
    ids, mask = padded_ids(rows=4)
    generated(model, GREEDY, ids, mask, cache_implementation="static")
    assert not recorded.tapes and "of a training" in warned[0]
    routers.executor = InferenceExecutor(unit="sequence")
    expected, _ = generated(model, GREEDY, ids, mask)
    other = copy.deepcopy(model)
    found, _ = generated(other, GREEDY, ids, mask, cache_implementation="static")
    assert torch.equal(found, expected) and recorded.replays == [7]
    assert type(model).__name__ == base.__name__ and type(model) is not base
    detach_routers(model)
    assert type(model) is base and not [name for name in vars(model) if name.startswith("_skip")]
