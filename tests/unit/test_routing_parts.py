"""The parts of a RouterSet, each without a model: thresholds, one pass's state, steering."""

import copy
import math
import pickle
import threading
from typing import Any

import pytest
import torch
from tensor_calls import Waits
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megaskip import RouterConfig, RouterSet
from megaskip.errors import ConfigError
from megaskip.routing import (
    DenseExecutor,
    Measured,
    Pooling,
    RoutingDecision,
    RoutingState,
    Steering,
    Thresholds,
)
from megaskip.routing.handover import carried_keep, receive_keep
from megaskip.routing.thresholds import logit_of, threshold_of

LAYERS = (2, 3)


def decision(keep: Tensor) -> RoutingDecision:
    return RoutingDecision(
        logit=keep, keep=keep, unit_mask=torch.ones_like(keep) > 0, unit_of_token=None
    )


class GeneratorsOfTheirDevice(TorchFunctionMode):
    """Refuses random numbers of a generator of another device, as a GPU does and meta does not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        generator, device = kwargs.get("generator"), torch.device(kwargs.get("device") or "cpu")
        if generator is not None and generator.device.type != device.type:
            raise RuntimeError(f"Expected a '{device.type}' device type for generator")
        return func(*args, **kwargs)


def test_routers_are_made_where_the_default_device_is_not_the_cpu() -> None:
    """As it is where vLLM builds models."""
    config = RouterConfig(router="mlp", compensation="low_rank")
    with GeneratorsOfTheirDevice(), torch.device("meta"):
        made = RouterSet(config, LAYERS, 8)
    assert all(parameter.is_meta for parameter in made.parameters())
    assert not any(p.is_meta for p in RouterSet(config, LAYERS, 8).parameters())


# -- decisions


@pytest.mark.parametrize("keep", ([0, 0, 0], [1, 1, 1], [0, 1, 0]))
def test_the_device_is_waited_for_once_whatever_is_selected(keep: list[float]) -> None:
    expected = [index for index, kept in enumerate(keep) if not kept]
    rows = decision(torch.tensor(keep).float().unsqueeze(1))
    tokens = decision(torch.tensor([keep]).float())
    with Waits() as waits:
        pairs = [(selected, selected.others) for selected in (rows.rows, tokens.tokens)]
        for selected, skipped in pairs:
            assert len(selected.mask) == len(skipped.mask) == 3
            assert (selected.all, selected.none) == (not expected, len(expected) == 3)
            _ = selected.index, skipped.index
    assert len(waits.take()) == 2
    for selected, skipped in pairs:
        assert len(selected.index) == 3 - len(expected)
        assert skipped.index.tolist() == expected and skipped.index.dtype == torch.int64


# -- thresholds


def test_thresholds_are_of_all_layers_or_of_each() -> None:
    logit = torch.tensor([[-1.0, 0.0, 1.0]])
    alike = Thresholds(RouterConfig(threshold=0.5), LAYERS)
    assert alike.keep(logit, 2).tolist() == alike.keep(logit, 3).tolist() == [[0.0, 1.0, 1.0]]
    apart = Thresholds(RouterConfig(threshold=(0.1, 0.9)), LAYERS)
    assert apart.keep(logit, 2).tolist() == [[1.0, 1.0, 1.0]]
    assert apart.keep(logit, 3).tolist() == [[0.0, 0.0, 0.0]]


def test_thresholds_of_another_number_of_layers_are_an_error_and_change_nothing() -> None:
    thresholds = Thresholds(RouterConfig(threshold=0.25), LAYERS)
    with pytest.raises(ConfigError, match="threshold holds 3 numbers for 2 routed layers"):
        thresholds.configure(RouterConfig(threshold=(0.1, 0.2, 0.3)))
    assert thresholds.logits == dict.fromkeys(LAYERS, logit_of(0.25))


def test_thresholds_are_scores_as_long_as_scores_are_told_apart() -> None:
    assert threshold_of(logit_of(0.3)) == pytest.approx(0.3)
    for logit in (-1e4, -40.0, -14.9, 0.0, 14.9, 40.0, 1e4):
        assert logit_of(threshold_of(logit)) == pytest.approx(logit, abs=1e-6)
        assert RouterConfig(threshold=threshold_of(logit)).describe_threshold()
    assert threshold_of(-math.inf) < -1e6 and 1e6 < threshold_of(math.inf) < math.inf


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_logits_beyond_what_a_sigmoid_tells_apart_have_thresholds_between_them(
    scale: float,
) -> None:
    logit = scale * torch.tensor([[40.0, 40.5, 41.0]])
    steering = Steering(RouterConfig(), LAYERS)
    steering.budget.place(scale * 40.25)
    settled = Thresholds(steering.settled(RouterConfig()), LAYERS)
    assert settled.keep(logit, 2).tolist() == [[0.0, 1.0, 1.0]]


# -- the state of one forward pass


def test_a_pass_is_described_once() -> None:
    state = RoutingState(DenseExecutor(), "token")
    pooling = Pooling.of("token", torch.ones(2, 5, dtype=torch.bool))
    state.begin(pooling, described=True)
    assert state.take_description() and not state.take_description()
    assert state.pooling_for(torch.zeros(2, 5, 8)) is pooling
    with pytest.raises(ValueError, match=r"masks of \(2, 5\).*see \(3, 5\)"):
        state.pooling_for(torch.zeros(3, 5, 8))


@pytest.mark.parametrize(("unit", "units"), [("sequence", 1), ("token", 5)])
def test_a_pass_that_nobody_described_takes_every_token_for_real(unit: str, units: int) -> None:
    state = RoutingState(DenseExecutor(), unit)
    pooling = state.pooling_for(torch.zeros(2, 5, 8))
    assert pooling.unit_mask.tolist() == [[True] * units] * 2 and pooling.shape == (2, 5)


def test_the_first_decision_of_a_pass_stays_until_the_next_pass() -> None:
    state = RoutingState(DenseExecutor(), "token")
    first = decision(torch.ones(1, 1))
    state.record(2, first)
    state.record(2, decision(torch.zeros(1, 1)))  # as in the recomputation of the backward pass
    assert state.decisions_of([2]) == [first]
    state.begin(None)
    with pytest.raises(RuntimeError, match=r"routed layers \[2\]"):
        state.decisions_of([2])


def test_an_overridden_decision_keeps_its_gradient() -> None:
    state = RoutingState(DenseExecutor(), "token")
    keep = torch.tensor([[1.0, 0.0]], requires_grad=True)
    with state.override({2: 0.0}):
        found = state.overridden(2, keep)
        assert state.overridden(3, keep) is keep
    found.sum().backward()
    assert found.tolist() == [[0.0, 0.0]]
    assert keep.grad is not None and keep.grad.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda routers: pickle.loads(pickle.dumps(routers))]
)
def test_a_copy_is_free_has_made_no_pass_and_has_gates_of_its_own(copied: object) -> None:
    routers = RouterSet(RouterConfig(), LAYERS, 8)
    routers.set_batch(torch.ones(1, 4, dtype=torch.bool))
    gate = routers.gates[2]
    gate.decide(torch.zeros(1, 4, 8))
    routers.state.lock.acquire()
    twin = copied(routers)  # type: ignore[operator]
    assert routers.decisions() and not twin.decisions() and twin.gates[2].decision is None
    free: list[bool] = []
    thread = threading.Thread(target=lambda: free.append(twin.state.lock.acquire(blocking=False)))
    thread.start()
    thread.join()
    assert free == [True]
    with torch.no_grad():
        twin.router(2).weight.fill_(-1.0)
        twin.gates[2].decide(torch.ones(1, 4, 8))
        gate.decide(torch.ones(1, 4, 8))
    assert float(twin.keep()[2]) == 0.0 and float(gate.decision.keep) == 1.0  # type: ignore[union-attr]


# -- steering


def test_steering_decides_as_thresholds_do_and_adds_the_gradient() -> None:
    config = RouterConfig(threshold=0.6)
    logit = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    steering, thresholds = Steering(config, LAYERS), Thresholds(config, LAYERS)
    keep = steering.keep(logit, 2)
    assert torch.equal(keep.detach(), thresholds.keep(logit, 2))
    keep.sum().backward()
    assert logit.grad is not None and bool((logit.grad > 0).all())


@pytest.mark.parametrize("threshold", [0.5, (0.2, 0.7)])
def test_settled_thresholds_decide_without_steering_what_steering_decides(
    threshold: float | tuple[float, ...],
) -> None:
    config = RouterConfig(threshold=threshold, capacity=0.5)
    steering = Steering(config, LAYERS)
    assert steering.settled(config) is config
    steering.budget.steer(Measured(capacity=0.9, units=64.0, spread=1.0), None)
    settled = steering.settled(config)
    assert isinstance(settled.threshold, type(threshold)) and settled != config
    logit = torch.linspace(-3, 3, 50)[None]
    for layer in LAYERS:
        alone = Thresholds(settled, LAYERS).keep(logit, layer)
        assert torch.equal(alone, steering.keep(logit, layer))


def test_configuring_forgets_what_steering_has_learnt() -> None:
    steering = Steering(RouterConfig(), LAYERS)
    steering.budget.steer(Measured(capacity=0.9, units=64.0, spread=1.0), None)
    steering.configure(RouterConfig())
    assert steering.budget.offset == 0.0


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_routers_are_held_to_the_capacity_from_the_first_step(frozen: bool) -> None:
    """Others learn to rank first, while nearly everything is to run."""
    steering = Steering(RouterConfig(capacity=0.5, freeze_routers=frozen), LAYERS)
    steering.budget.steer(Measured(capacity=0.5, units=64.0, spread=1.0), 0.01)
    assert float(steering.budget.offset) == (0.0 if frozen else pytest.approx(-0.47, abs=0.03))


def test_thresholds_of_frozen_routers_move_little() -> None:
    """Near the threshold predicted costs lie much closer together than their spread says."""
    steering = Steering(RouterConfig(capacity=0.5, freeze_routers=True), LAYERS)
    steering.budget.steer(Measured(capacity=0.9, units=64.0, spread=1.0), None)
    assert float(steering.budget.offset) == pytest.approx(0.4 * 0.05)


# -- between stages


def test_a_stage_goes_on_with_the_decisions_of_the_stages_below() -> None:
    below, above = (RouterSet(RouterConfig(capacity=0.5), LAYERS, 8) for _ in range(2))
    assert carried_keep(below) is None
    mask = torch.ones(2, 4, dtype=torch.bool)
    below.set_batch(mask)
    below.gates[2].decide(torch.zeros(2, 4, 8))
    carried = carried_keep(below)
    assert carried is not None
    received = carried.detach().requires_grad_()
    above.set_batch(mask)
    receive_keep(above, received)
    above.gates[3].decide(torch.zeros(2, 4, 8))
    assert above.capacity() == 1.0
    above.penalty().backward()
    assert received.grad is not None and float(received.grad.abs().min()) > 0


# -- names that were


def test_old_names_work_and_say_the_new_one() -> None:
    routers = RouterSet(RouterConfig(), LAYERS, 8)
    with pytest.warns(FutureWarning, match=r"announce\(\) is now called set_batch\(\)"):
        routers.announce(torch.ones(1, 4, dtype=torch.bool))
    assert routers.state.take_description()
    with pytest.warns(FutureWarning, match=r"every_gate_open\(\) is now called disabled\(\)"):
        context = routers.every_gate_open()
    with context:
        assert routers.state.overrides == dict.fromkeys(LAYERS, 1.0)
    assert routers.state.overrides == {}
