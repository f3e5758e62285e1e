"""Which decoder layers get a router: a count or a list, resolved against the model's depth."""

from collections.abc import Sequence

from megaskip.errors import ConfigError

HALF = "half"


def resolve_layers(spec: int | str | Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Return the absolute indices of the routed layers, ascending.

    `spec` is "half" (the deepest half except the last layer, as published), a count n (the n
    deepest except the last; 16 of 32 gives 15..30), or a list such as "8-14,16". Raises
    ConfigError. Source: paper section 5; count semantics as in the published code.
    """
    text = (
        ",".join(map(str, spec))
        if isinstance(spec, Sequence) and not isinstance(spec, str)
        else str(spec)
    )
    text = text.strip()
    if text == HALF:
        return _deepest(max(num_layers // 2, 1), num_layers)
    if text.isdigit() and isinstance(spec, (int, str)):
        return _deepest(int(text), num_layers)
    layers = _parse_list(text)
    outside = [layer for layer in layers if not 0 <= layer < num_layers]
    if outside:
        raise ConfigError(
            f"--layers {text}: layer {outside[0]} is out of range, the model has layers 0 to "
            f"{num_layers - 1}"
        )
    return layers


def _deepest(count: int, num_layers: int) -> tuple[int, ...]:
    if not 1 <= count <= num_layers - 1:
        raise ConfigError(
            f"--layers {count}: a count must be between 1 and {num_layers - 1} for a model of "
            f"{num_layers} layers (the last layer is never counted in); give a list such as "
            "8-14,16 to name layers"
        )
    return tuple(range(num_layers - 1 - count, num_layers - 1))


def _parse_list(text: str) -> tuple[int, ...]:
    layers: set[int] = set()
    for part in text.rstrip(",").split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ConfigError(
                f"--layers {text!r}: {part!r} is neither a number nor a range such as 8-14"
            )
        span = range(int(first), int(last or first) + 1)
        if not span:
            raise ConfigError(f"--layers {text!r}: the range {part!r} is empty")
        layers.update(span)
    return tuple(sorted(layers))
