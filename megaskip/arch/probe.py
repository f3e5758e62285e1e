"""Proof by numbers that skipping is the identity on a model: run it, do not guess from attribute
names.

With a for the attention's keep and m for the MLP's, a decoder layer f(x; a, m) that is gated in the
right places satisfies f(x; 0, 0) = x, is affine in a at m = 0 and in m at a = 0, and f(x; 1, 1) is
the plain layer.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megaskip.arch.decoder import find_decoder
from megaskip.arch.detach import unroute
from megaskip.arch.sites import find_sites
from megaskip.arch.sublayer import route_layer
from megaskip.routing.executor import Kwargs, Run

TOKENS = 8
"""Of the input that a layer is probed with."""
_INPUT_SCALE = 0.1
TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReport:
    """What the probe measured on one layer, relative to the size of the layer's update."""

    layer: int
    at_zero: float
    """|f(x; 0, 0) - x|: skipping must be the identity."""
    bend_attention: float
    """Departure of f(x; a, 0) from a straight line in a."""
    bend_mlp: float
    """Departure of f(x; 0, m) from a straight line in m."""
    at_one: float
    """|f(x; 1, 1) - plain layer|: keeping must be exact."""

    @property
    def passed(self) -> bool:
        """Return whether skipping is the identity, gates are affine, and keeping is exact."""
        worst = worst_of([self.at_zero, self.bend_attention, self.bend_mlp])
        return self.at_one == 0 and worst <= TOLERANCE

    def explain(self, model_type: str) -> str:
        """Return the verdict as an error text."""
        return (
            f"{model_type}: skipping a sublayer of layer {self.layer} is not the identity. "
            f"Distance from the input with everything skipped: {self.at_zero:.1e}; departure from "
            f"affine in keep: attention {self.bend_attention:.1e}, MLP {self.bend_mlp:.1e} (each "
            f"at most {TOLERANCE:.0e} of the update); distance from the plain layer with "
            f"everything kept: {self.at_one:.1e} (must be 0). megaskip does not route this family; "
            "a row in EXCEPTIONS of megaskip/arch/sites.py could teach it where the gates belong"
        )


class ProbeGate:
    """A gate that multiplies by given numbers, and leaves out what it would multiply by zero, as
    inference does: a norm behind must make zero of zero."""

    skips = writes = frozenset({"attn", "mlp"})

    def __init__(self) -> None:
        self.keep = {"attn": 1.0, "mlp": 1.0}

    def decide(self, hidden_states: Tensor) -> None:
        """Decide nothing."""

    def run_attention(self, run: Run, hidden_states: Tensor, kwargs: Kwargs) -> Any:
        """Run unless the number is zero."""
        if not self.keep["attn"]:
            return torch.zeros_like(hidden_states), None
        return run(hidden_states, **kwargs)

    def run_mlp(self, run: Run, hidden_states: Tensor, *, is_tuple: bool) -> Any:
        """Run unless the number is zero."""
        if self.keep["mlp"]:
            return run(hidden_states)
        update = torch.zeros_like(hidden_states)
        return (update, None) if is_tuple else update

    def run_experts(
        self, run: Run, hidden_states: Tensor, index: Tensor, weights: Tensor
    ) -> Tensor:
        """Run all experts."""
        return run(hidden_states, index, weights)

    def apply(self, update: Tensor, site: str) -> Tensor:
        """Multiply by the number set for the site."""
        return update * self.keep[site] if self.keep[site] else update

    def run_block(self, run: Run, hidden_states: Tensor, kwargs: Kwargs) -> Tensor | None:
        """Return None: all rows enter the layer."""
        return None

    def mix(self, hidden_states: Tensor, output: Tensor) -> Tensor:
        """Return the output: whole layers are not probed, their mix is the identity by
        construction."""
        return output


@torch.no_grad()
def probe_layer(model: nn.Module, index: int) -> ProbeReport:
    """Measure on layer `index` of `model` itself, not yet routed, whether its gates would be in the
    right places.

    Runs one forward pass of 8 tokens and the layer seven times. Under ZeRO-3 collective: every rank
    calls it.
    """
    parts = find_decoder(model)
    layer = parts.layers[index]
    was_training = model.training
    model.eval()
    try:
        args, kwargs = arguments_of(layer, parts.decoder)
        x = input_like(args[0])

        def plain() -> Tensor:
            out = layer(x, *args[1:], **kwargs)
            return out[0] if isinstance(out, tuple) else out

        reference = plain()
        with _gated(layer, parts.model_type) as keep:

            def run(attention: float, mlp: float) -> Tensor:
                keep.update(attn=attention, mlp=mlp)
                return plain()

            return _measure(run, x, reference, index)
    finally:
        model.train(was_training)


def _measure(
    run: Callable[[float, float], Tensor], x: Tensor, reference: Tensor, index: int
) -> ProbeReport:
    zero, relative = run(0.0, 0.0), relative_to(reference)

    def bend(half: Tensor, full: Tensor) -> float:
        return relative(half - (zero + full) / 2, full - zero)

    return ProbeReport(
        layer=index,
        at_zero=relative(zero - x, reference - x),
        bend_attention=bend(run(0.5, 0.0), run(1.0, 0.0)),
        bend_mlp=bend(run(0.0, 0.5), run(0.0, 1.0)),
        at_one=float((run(1.0, 1.0) - reference).abs().max()),
    )


def worst_of(distances: Sequence[float]) -> float:
    """Return the largest of `distances`; NaN, which no tolerance lets pass, where one of them is
    (max would leave it out)."""
    return float(torch.tensor(distances, dtype=torch.float64).max())


def relative_to(reference: Tensor) -> Callable[[Tensor, Tensor], float]:
    """Return a function of (difference, update): the largest difference of two outputs such as
    `reference`, as a share of the largest update."""
    # Residual additions in bfloat16 round by this much, whatever the gates do.
    rounding = 4 * torch.finfo(reference.dtype).eps * float(reference.abs().max())

    def relative(difference: Tensor, update: Tensor) -> float:
        excess = max(float(difference.float().abs().max()) - rounding, 0.0)
        return excess / max(float(update.float().abs().max()), 1e-12)

    return relative


@contextlib.contextmanager
def _gated(layer: nn.Module, model_type: str) -> Iterator[dict[str, float]]:
    gate = ProbeGate()
    routed = route_layer(layer, find_sites(layer, model_type), gate)
    try:
        yield gate.keep
    finally:
        for module in routed:
            unroute(module)


def arguments_of(layer: nn.Module, decoder: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what `decoder` passes to `layer` for a short input: masks, positions, whatever the
    family needs."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> None:
        seen.append((args, kwargs))

    handle = layer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        device = next(buffer for buffer in (*decoder.parameters(), *decoder.buffers())).device
        ids = torch.arange(1, TOKENS + 1, device=device).unsqueeze(0)
        decoder(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    args, kwargs = seen[0]
    return (args, kwargs) if args else ((kwargs.pop("hidden_states"),), kwargs)


def input_like(hidden_states: Tensor) -> Tensor:
    """Return small seeded noise: a large residual would hide the update behind rounding."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(hidden_states.shape, generator=generator, device="cpu") * _INPUT_SCALE
    return noise.to(device=hidden_states.device, dtype=hidden_states.dtype)
