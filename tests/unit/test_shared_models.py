"""A routed model in the hands of others: threads, copies, offloaded caches, device maps."""

import copy
import threading
from typing import Any

import pytest
import torch
from families import tiny_model
from routed_models import as_exported, trained, whole_ids
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from megaskip import RouterConfig, attach_routers
from megaskip.arch import wiring
from megaskip.errors import UnsupportedModelError


@pytest.mark.parametrize("granularity", ["mlp_sequence", "block_token"])
def test_threads_take_turns_on_one_model(granularity: str) -> None:
    """One thread waits inside its forward pass; another must not decide over it meanwhile."""
    model = as_exported(*trained("llama", granularity))
    inputs = {name: whole_ids(3, 9, seed) for name, seed in (("first", 1), ("second", 2))}
    with torch.no_grad():
        alone = {name: model(ids).logits for name, ids in inputs.items()}
    inside, second_came, found = threading.Event(), threading.Event(), {}

    def wait(*_: Any) -> None:
        if threading.current_thread().name == "second":
            second_came.set()
        else:
            inside.set()
            second_came.wait(0.5)

    def run(name: str) -> None:
        with torch.no_grad():
            found[name] = model(inputs[name]).logits

    model.model.layers[2].mlp.register_forward_pre_hook(wait)
    threads = [threading.Thread(target=run, args=(name,), name=name) for name in inputs]
    threads[0].start()
    inside.wait(10)
    threads[1].start()
    for thread in threads:
        thread.join(20)
    assert all(torch.equal(found[name], alone[name]) for name in inputs)


def test_decisions_are_in_the_cache_before_the_next_thread_decides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a model that routers were attached to, without the turn of an exported one around it."""
    model, _ = trained("llama")
    prompts = {name: whole_ids(3, 9, seed) for name, seed in (("first", 1), ("second", 2))}
    follow, real = whole_ids(3, 1, 7), wiring.cached_decisions
    caches = {name: DynamicCache(config=model.config) for name in ("alone", *prompts)}
    second_came, looked = threading.Event(), []

    def cached_decisions(cache: Any) -> Any:
        if threading.current_thread().name == "first":
            looked.append(cache)
            if len(looked) == 2:  # after its forward pass
                threads[1].start()
                second_came.wait(0.5)
        return real(cache)

    def run(name: str) -> None:
        with torch.no_grad():
            model(prompts[name], past_key_values=caches[name])

    with torch.no_grad():
        model(prompts["first"], past_key_values=caches["alone"])
        expected = model(follow, past_key_values=caches["alone"]).logits
    monkeypatch.setattr(wiring, "cached_decisions", cached_decisions)
    model.model.layers[2].mlp.register_forward_pre_hook(
        lambda *_: second_came.set() if threading.current_thread().name == "second" else None
    )
    threads = [threading.Thread(target=run, args=(name,), name=name) for name in prompts]
    threads[0].start()
    threads[0].join(20)
    threads[1].join(20)
    with torch.no_grad():
        found = model(follow, past_key_values=caches["first"]).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_failed_forward_pass_does_not_keep_others_out() -> None:
    model = as_exported(*trained("llama"))
    ids = whole_ids(2, 6)
    with pytest.raises(IndexError):
        model(ids + 1000)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(model(ids)), daemon=True)
    thread.start()
    thread.join(10)
    assert found


def test_a_model_is_copied_after_a_pass_with_gradient() -> None:
    model, routers = trained("llama")
    ids = whole_ids(2, 6)
    logits = model(ids).logits
    torch.testing.assert_close(copy.deepcopy(model)(ids).logits, logits, rtol=0, atol=0)
    assert routers.keep()


class Offloaded(DynamicCache):
    """Says that it is offloaded, and does not copy: its streams are those of a GPU."""

    def update(self, *args: Any, **kwargs: Any) -> Any:
        self.offloading = False
        try:
            return super().update(*args, **kwargs)
        finally:
            self.offloading = True


def test_an_offloaded_cache_computes_everything() -> None:
    """It fetches a layer's keys when the layer below is updated, so none may be passed over."""
    model = as_exported(*trained("llama"))
    ids = whole_ids(3, 9)
    cache = Offloaded(config=model.config)
    cache.offloading = True
    with torch.no_grad(), pytest.warns(UserWarning, match="an offloaded cache cannot hold a part"):
        model(ids, past_key_values=cache)
    assert all(type(layer) is DynamicLayer for layer in cache.layers)


def test_an_offloaded_cache_cannot_drop_keys() -> None:
    model = as_exported(*trained("llama", "attn_token"), kv="drop")
    cache = Offloaded(config=model.config)
    cache.offloading = True
    with torch.no_grad(), pytest.raises(NotImplementedError, match="an offloaded cache cannot"):
        model(whole_ids(3, 9), past_key_values=cache)


def test_routers_on_another_device_decide_on_that_of_the_layer() -> None:
    """As accelerate places modules under a device_map: here the routers run on no device."""
    model = as_exported(*trained("llama"))
    router = model.skip_routers.router(3)
    router.register_forward_hook(lambda module, args, logit: logit.to("meta"))
    gate = model.skip_routers.gates[3]
    hidden = torch.zeros(1, 4, model.config.hidden_size)
    model.skip_routers.state.begin(None)
    with pytest.raises(NotImplementedError, match="meta"):  # it was brought back, or tried to be
        gate.decide(hidden)


def test_a_model_with_forwards_on_its_instances_is_refused_with_the_reason() -> None:
    model = tiny_model("llama")
    attention = model.model.layers[2].self_attn
    attention.forward = attention.forward
    with pytest.raises(UnsupportedModelError, match="dispatched"):
        attach_routers(model, RouterConfig(layers="2-3"))
    with pytest.raises(UnsupportedModelError, match="dispatched"):
        attach_routers(model, RouterConfig(layers="2-3"), verify=False)
