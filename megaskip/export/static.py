"""Which sublayers a model does without for good: those that routers seldom let run.

Knows capacities, no models and no files.
"""

from collections.abc import Collection, Mapping, Sequence

from megaskip.arch.trainable import describe_layers
from megaskip.errors import ConfigError

WORDS = {"attn": "attention", "mlp": "MLP"}


def choose_dropped(
    capacity: Mapping[int, float],
    *,
    below: float | None = None,
    count: int | None = None,
    layers: Collection[int] | None = None,
) -> tuple[int, ...]:
    """Return the layers to drop, ascending: those `below` a capacity, the `count` lowest, or given.

    `capacity` has the measured one by routed layer. Of equals the deeper one goes. Layer 0 is never
    chosen. Raises ConfigError unless exactly one way is given and it leaves something and takes
    something.
    """
    ways = {"--below": below, "--count": count, "--layers": layers}
    given = [flag for flag, value in ways.items() if value is not None]
    if len(given) != 1:
        raise ConfigError(
            f"say in exactly one way what to drop: --below, --count or --layers; found "
            f"{' and '.join(given) or 'none'}"
        )
    if layers is not None:
        return _listed(capacity, layers)
    routed = sorted((share, -layer) for layer, share in capacity.items() if layer)
    if below is not None:
        chosen = _below(routed, below)
    else:
        if count is None or not 1 <= count <= len(routed):
            raise ConfigError(f"--count {count} is outside [1, {len(routed)}], the routed layers")
        chosen = [-layer for _, layer in routed[:count]]
    if len(chosen) == len(routed):
        raise ConfigError(
            f"{given[0]} {ways[given[0]]:g} drops every routed layer "
            f"({describe_layers(chosen)}); lower it, or list them with --layers if that is meant"
        )
    return tuple(sorted(chosen))


def _below(routed: Sequence[tuple[float, int]], limit: float) -> list[int]:
    if not 0 < limit <= 1:
        raise ConfigError(f"--below {limit:g} is outside (0, 1]: capacities are shares")
    chosen = [-layer for share, layer in routed if share < limit]
    if not chosen:
        lowest = f"{routed[0][0]:.3f}, of layer {-routed[0][1]}" if routed else "none"
        raise ConfigError(
            f"--below {limit:g} drops nothing: the lowest capacity is {lowest}; raise it, or use "
            "--count"
        )
    return chosen


def _listed(capacity: Mapping[int, float], layers: Collection[int]) -> tuple[int, ...]:
    if not layers:
        raise ConfigError("--layers names no layer to drop")
    named = ",".join(map(str, layers))
    if 0 in layers:
        raise ConfigError(
            f"--layers {named}: layer 0 is never dropped, because caches and servers count on it; "
            "leave it out"
        )
    unknown = sorted(set(layers) - capacity.keys())
    if unknown:
        raise ConfigError(
            f"--layers {named}: layer {unknown[0]} has no router; the routed ones are "
            f"{describe_layers(capacity)}"
        )
    return tuple(sorted(set(layers)))


def sublayers(target: str, layers: Sequence[int]) -> dict[str, list[int]]:
    """Return the layers by what they lose: a dropped block loses its attention and its MLP."""
    lost = WORDS if target == "block" else (target,)
    return {name: list(layers) if name in lost else [] for name in WORDS}


def describe_dropped(dropped: Mapping[str, Sequence[int]]) -> str:
    """Return e.g. "attention of layers 4-6"."""
    return ", ".join(
        f"{WORDS[name]} of layers {describe_layers(layers)}"
        for name, layers in dropped.items()
        if layers
    )
