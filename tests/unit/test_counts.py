"""Counts of a step add up, are one tensor on the way, and say what ran."""

import pytest
import torch

from megaskip.routing import Counts, Measured, RoutingDecision


def decision(logits: list[float], real: int) -> RoutingDecision:
    logit = torch.tensor([logits])
    return RoutingDecision(
        logit=logit,
        keep=(logit >= 0).float(),
        unit_mask=torch.arange(len(logits))[None] < real,
        unit_of_token=None,
    )


def test_counts_hold_the_real_units_of_each_layer() -> None:
    counts = Counts.of([decision([1.0, -2.0, 9.0], real=2), decision([-3.0, 4.0, 9.0], real=3)])
    assert counts.kept.tolist() == [1.0, 2.0]
    assert counts.units.tolist() == [2.0, 3.0]
    assert counts.logits.tolist() == [-1.0, 10.0]
    assert counts.squares.tolist() == [5.0, 106.0]
    assert counts.capacity() == pytest.approx(3 / 5)
    assert counts.capacity_per_layer() == pytest.approx((1 / 2, 2 / 3))


def test_packed_counts_add_up_as_counts_do() -> None:
    first = Counts.of([decision([1.0, -2.0], real=2)])
    second = Counts.of([decision([0.5, 3.0], real=1)])
    packed = first.pack() + second.pack()
    assert len(packed) == Counts.size(1)
    both = first + second
    assert torch.equal(Counts.unpack(packed).pack(), both.pack())
    assert both.kept.tolist() == [2.0] and both.units.tolist() == [3.0]
    assert torch.equal((both + Counts.zeros(1)).pack(), both.pack())


def test_nothing_seen_is_no_capacity_and_no_error() -> None:
    nothing = Counts.zeros(3)
    assert nothing.capacity() == 0.0 and nothing.capacity_per_layer() == (0.0, 0.0, 0.0)
    assert float(Measured.of(nothing).capacity) == 0.0


def test_counts_of_a_stage_have_their_place_among_all_layers() -> None:
    own = Counts.of([decision([1.0, -2.0], real=2), decision([3.0, 4.0], real=2)])
    among = own.among(5, first=2)
    assert among.kept.tolist() == [0.0, 0.0, 1.0, 2.0, 0.0]
    assert among.squares.tolist() == [0.0, 0.0, 5.0, 25.0, 0.0]
    assert among.capacity() == own.capacity()
