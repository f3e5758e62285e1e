"""Proof by numbers that the experts of a layer can be skipped one by one.

With w for how much each expert of a token counts, a layer f(x; w) whose experts are added up with
these weights, and with nothing behind that is not linear, satisfies f(x; m w) + f(x; (1 - m) w) =
f(x; w) + f(x; 0) for any mask m, and f(x; m w) is what comes of leaving the masked ones out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megaskip.arch.decoder import find_decoder
from megaskip.arch.detach import unroute
from megaskip.arch.experts import experts_of
from megaskip.arch.probe import (
    TOKENS,
    TOLERANCE,
    ProbeGate,
    arguments_of,
    input_like,
    relative_to,
    worst_of,
)
from megaskip.arch.sites import find_sites
from megaskip.arch.sublayer import route_experts
from megaskip.errors import UnsupportedModelError
from megaskip.routing.decision import RoutingDecision
from megaskip.routing.executor import Run
from megaskip.routing.experts import Experts, run_pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertProbeReport:
    """What the probe measured on one layer, relative to the size of what its experts add."""

    layer: int
    left_out: float
    """Distance between experts that are left out and experts that count nothing."""
    rest: float
    """Distance between what an expert's absence changes and what the expert adds."""
    bend: float
    """Departure of f(x; a w) from a straight line in a."""
    at_one: float
    """|f(x; w) - plain layer|: keeping must be exact."""

    @property
    def passed(self) -> bool:
        """Return whether an expert that is skipped is gone, the others stay, and keeping is
        exact."""
        return self.at_one == 0 and worst_of([self.left_out, self.rest, self.bend]) <= TOLERANCE

    def explain(self, model_type: str) -> str:
        """Return the verdict as an error text."""
        return (
            f"{model_type}: skipping an expert of layer {self.layer} does not leave the sum of the "
            f"others. Distance between leaving experts out and counting them nothing: "
            f"{self.left_out:.1e}; between what is missing and what they add: {self.rest:.1e}; "
            f"departure from affine in keep: {self.bend:.1e} (each at most {TOLERANCE:.0e} of what "
            f"experts add); distance from the plain layer with everything kept: {self.at_one:.1e} "
            "(must be 0). megaskip does not skip experts of this family; take mlp_token"
        )


class _ExpertProbeGate(ProbeGate):
    """A gate that multiplies what experts count by given numbers, or leaves pairs out."""

    skips = writes = frozenset({"expert"})

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.pairs = torch.ones(TOKENS, experts.per_token)
        """What each expert of a token is multiplied by, float32 [N, K]."""
        self.leaves_out = False

    def run_experts(
        self, run: Run, hidden_states: Tensor, index: Tensor, weights: Tensor
    ) -> Tensor:
        """Run the experts on all pairs, or on those whose number is not zero."""
        keep = self.pairs.to(weights.device)
        if weights.shape != keep.shape:
            expected = f"{tuple(keep.shape)} (tokens, experts of each)"
            raise TypeError(f"weights of shape {tuple(weights.shape)}, expected {expected}")
        if not self.leaves_out:
            return run(hidden_states, index, weights * keep.to(weights.dtype))
        decision = RoutingDecision(logit=keep, keep=keep, unit_mask=keep > 0, unit_of_token=None)
        return run_pairs(run, hidden_states, index, weights, decision)


@torch.no_grad()
def probe_experts(model: nn.Module, index: int, experts: Experts) -> ExpertProbeReport:
    """Measure on layer `index` of `model` itself, not yet routed, whether its `experts` can be
    skipped one by one.

    Runs one forward pass of 8 tokens and the layer eight times. Under ZeRO-3 collective: every rank
    calls it. Raises UnsupportedModelError where the experts are called with something else.
    """
    parts = find_decoder(model)
    layer = parts.layers[index]
    was_training = model.training
    model.eval()
    try:
        args, kwargs = arguments_of(layer, parts.decoder)
        x = input_like(args[0])

        def run() -> Tensor:
            out = layer(x, *args[1:], **kwargs)
            return out[0] if isinstance(out, tuple) else out

        reference = run()
        gate = _ExpertProbeGate(experts)
        sites = find_sites(layer, parts.model_type)
        module = experts_of(layer, sites, experts, f"{parts.model_type}: layer {index}")
        route_experts(module, gate)
        try:
            return _measure(run, gate, reference, index)
        except TypeError as error:
            raise UnsupportedModelError(
                f"{parts.model_type}: the experts of layer {index} are not called with tokens, "
                f"their experts and how much each counts ({error}); take mlp_token"
            ) from None
        finally:
            unroute(module)
    finally:
        model.train(was_training)


def _measure(run: Run, gate: _ExpertProbeGate, reference: Tensor, index: int) -> ExpertProbeReport:
    ones = torch.ones_like(gate.pairs)
    some = ones.flatten().cumsum(0).view_as(ones) % 2  # every other pair

    def output(pairs: Tensor, *, leaves_out: bool = False) -> Tensor:
        gate.pairs, gate.leaves_out = pairs, leaves_out
        return run()

    everything, nothing = output(ones), output(0 * ones)
    these, others = output(some), output(1 - some)
    relative, added = relative_to(reference), everything - nothing
    left_out = [
        relative(output(some, leaves_out=True) - these, added),
        relative(output(0 * ones, leaves_out=True) - nothing, added),
    ]
    return ExpertProbeReport(
        layer=index,
        left_out=worst_of(left_out),
        rest=relative(these + others - nothing - everything, added),
        bend=relative(output(ones / 2) - (everything + nothing) / 2, added),
        at_one=float((everything - reference).abs().max()),
    )
