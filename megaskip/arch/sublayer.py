"""Sublayers that ask a gate: dynamic subclasses of whatever class the model uses. No arithmetic of
their own.

The class of the instance is exchanged, its forward is never overridden: an overridden `forward`
switches activation checkpointing off in silence in transformers 5.
"""

import functools
from typing import Any, Protocol

from torch import Tensor, nn

from megaskip.arch.sites import Sites
from megaskip.errors import UnsupportedModelError
from megaskip.routing.executor import Kwargs, Run


class SublayerGate(Protocol):
    """What a routed sublayer asks; megaskip.routing.Gate is the one that routes."""

    skips: frozenset[str]
    """Sublayers that a decision may leave out: attn, mlp; or expert."""
    writes: frozenset[str]
    """Where the decision is multiplied: attn or mlp (an update of the residual), block (the whole
    layer)."""

    def decide(self, hidden_states: Tensor) -> None:
        """Decide from the layer's normalised input [B, T, D]."""
        ...

    def run_attention(self, run: Run, hidden_states: Tensor, kwargs: Kwargs) -> Any:
        """Run the attention on what is kept."""
        ...

    def run_mlp(self, run: Run, hidden_states: Tensor, *, is_tuple: bool) -> Any:
        """Run the MLP on what is kept."""
        ...

    def run_experts(
        self, run: Run, hidden_states: Tensor, index: Tensor, weights: Tensor
    ) -> Tensor:
        """Decide about each of the tokens [N, D] at each of its experts, `index` int64 [N, K], and
        run those that are kept; `weights` [N, K] say how much each counts."""
        ...

    def apply(self, update: Tensor, site: str) -> Tensor:
        """Multiply the update [B, T, D] of the site ("attn" or "mlp") by the decision."""
        ...

    def run_block(self, run: Run, hidden_states: Tensor, kwargs: Kwargs) -> Tensor | None:
        """Run the layer on the rows that are known beforehand to run, and return its output [B, T,
        D]; None where all rows enter it."""
        ...

    def mix(self, hidden_states: Tensor, output: Tensor) -> Tensor:
        """Return the layer's output where it is kept, its input [B, T, D] elsewhere."""
        ...


class RoutedSublayer:
    """What all routed sublayers carry; names start with `_skip_` so that they collide with
    nothing."""

    _skip_gate: SublayerGate
    _skip_base: type
    _skip_site: str
    """Whose update this sublayer returns: attn or mlp."""
    _skip_writes: bool
    """Whether the output meets the residual here, so that it is multiplied here."""


class RoutedAttention(RoutedSublayer):
    """Reads the layer's normalised input, has the gate decide, and runs on what is kept."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the attention's output tuple, as its class does."""
        gate, run = self._skip_gate, super().forward  # type: ignore[misc]
        hidden_states, extra = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        gate.decide(hidden_states)
        if "attn" not in gate.skips:
            return run(hidden_states, *extra, **kwargs)
        assert not extra, "decoder layers pass the attention's arguments by keyword"
        output = gate.run_attention(run, hidden_states, kwargs)
        return (gate.apply(output[0], "attn"), *output[1:]) if self._skip_writes else output


class RoutedMlp(RoutedSublayer):
    """Runs the MLP on what its layer's gate decided."""

    _skip_is_tuple: bool

    def forward(self, hidden_states: Tensor) -> Any:
        """Return the MLP's output, as its class does."""
        gate = self._skip_gate
        output = gate.run_mlp(super().forward, hidden_states, is_tuple=self._skip_is_tuple)  # type: ignore[misc]
        if not self._skip_writes:
            return output
        if self._skip_is_tuple:
            return gate.apply(output[0], "mlp"), *output[1:]
        return gate.apply(output, "mlp")


class RoutedExperts(RoutedSublayer):
    """All experts of a layer in one module, which runs each on the tokens that its gate keeps."""

    def forward(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sums [N, D], as its class does."""
        return self._skip_gate.run_experts(super().forward, hidden_states, index, weights)  # type: ignore[misc]


class RoutedNorm(RoutedSublayer):
    """The norm behind a sublayer, where its update meets the residual."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the norm's output times the decision."""
        return self._skip_gate.apply(super().forward(hidden_states), self._skip_site)  # type: ignore[misc]


class RoutedBlock(RoutedSublayer):
    """A decoder layer that is kept or skipped as a whole."""

    _skip_returns_tensor = False
    """Whether it did so last, instead of a tuple: what stands for its output must look like it."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the layer's output where it is kept, its input elsewhere."""
        run = super().forward  # type: ignore[misc]
        if self._skip_returns_tensor and not args:  # rows are selected of keyword arguments
            output = self._skip_gate.run_block(run, hidden_states, kwargs)
            if output is not None:
                return output
        output = run(hidden_states, *args, **kwargs)
        self.__dict__["_skip_returns_tensor"] = isinstance(output, Tensor)
        if isinstance(output, tuple):
            return self._skip_gate.mix(hidden_states, output[0]), *output[1:]
        return self._skip_gate.mix(hidden_states, output)


def route_experts(experts: nn.Module, gate: SublayerGate) -> nn.Module:
    """Make the module that holds all experts of a layer ask `gate`, and return it: nothing else of
    the layer does."""
    return _route(experts, RoutedExperts, gate, "expert", writes=False)


def route_layer(layer: nn.Module, sites: Sites, gate: SublayerGate) -> list[nn.Module]:
    """Make the sublayers of a decoder layer ask `gate`; returns the modules that now do.

    The attention always does: its input is what the router reads, whatever is skipped.
    """
    attention_writes = "attn" in gate.writes
    behind = sites.attention_update != sites.attention
    attention = getattr(layer, sites.attention)
    routed = [
        _route(attention, RoutedAttention, gate, "attn", writes=attention_writes and not behind)
    ]
    if attention_writes and behind:
        routed.append(_route(getattr(layer, sites.attention_update), RoutedNorm, gate, "attn"))
    if "mlp" in gate.skips:
        mlp_writes = "mlp" in gate.writes
        behind = sites.mlp_update != sites.mlp
        mlp = getattr(layer, sites.mlp)
        extra = {"writes": mlp_writes and not behind, "is_tuple": sites.mlp_is_tuple}
        routed.append(_route(mlp, RoutedMlp, gate, "mlp", **extra))
        if mlp_writes and behind:
            routed.append(_route(getattr(layer, sites.mlp_update), RoutedNorm, gate, "mlp"))
    if "block" in gate.writes:
        routed.append(_route(layer, RoutedBlock, gate, "block"))
    return routed


@functools.cache
def routed_class(base: type, mixin: type) -> type:
    """Return the subclass of `base` that asks a gate; one per pair, so that class comparisons
    hold.

    It has the name of `base`, by which device maps and FSDP know what they must not split.
    """
    return type(base.__name__, (mixin, base), {"__module__": base.__module__})


def _route(
    module: nn.Module, mixin: type[RoutedSublayer], gate: SublayerGate, site: str, **extra: Any
) -> nn.Module:
    base = type(module)
    if "forward" in vars(module):
        raise UnsupportedModelError(
            f"{base.__name__} has a forward of its own on the instance, which hides the routing: "
            "the model was dispatched (device_map) or patched. Attach routers before that, or "
            "export them and load the folder with device_map"
        )
    module.__class__ = routed_class(base, mixin)  # type: ignore[arg-type]
    for name, value in {"gate": gate, "base": base, "site": site, **extra}.items():
        module.__dict__[f"_skip_{name}"] = value
    return module
