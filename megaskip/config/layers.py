"""Which decoder layers get a router: a count or a list, resolved against the model's depth."""

from collections.abc import Iterator, Sequence

from megaskip.config.value_types import shown
from megaskip.errors import ConfigError

HALF = "half"


def resolve_layers(
    spec: int | str | Sequence[int], num_layers: int, *, flag: str = "layers"
) -> tuple[int, ...]:
    """Return the absolute indices of the routed layers, ascending.

    `spec` is "half" (the deepest half except the last layer, as published), a count n (the n
    deepest except the last; 16 of 32 gives 15..30), or a list such as "8-14,16". Raises
    ConfigError, which names `flag`. Source: paper section 5; count semantics as in the published
    code.
    """
    text = (
        ",".join(map(str, spec))
        if isinstance(spec, Sequence) and not isinstance(spec, str)
        else str(spec)
    )
    text = text.strip()
    if text == HALF:
        return _deepest(max(num_layers // 2, 1), num_layers, flag)
    if _is_number(text) and isinstance(spec, (int, str)):
        return _deepest(int(text), num_layers, flag)
    layers: set[int] = set()
    for span in _ranges(text.rstrip(","), flag):
        if span[-1] >= num_layers:  # before a range of any length is counted out
            raise ConfigError(
                f"--{flag} {text.rstrip(',')}: layer {max(span[0], num_layers)} is out of range, "
                f"the model has layers 0 to {num_layers - 1}"
            )
        layers.update(span)
    return tuple(sorted(layers))


def _deepest(count: int, num_layers: int, flag: str) -> tuple[int, ...]:
    if num_layers == 1:
        raise ConfigError(
            f"--{flag}: the model has one layer, and the last is never counted in; name it with "
            f"--{flag} 0-0"
        )
    if not 1 <= count <= num_layers - 1:
        raise ConfigError(
            f"--{flag} {count}: a count must be between 1 and {num_layers - 1} for a model of "
            f"{num_layers} layers (the last layer is never counted in); give a list such as "
            "8-14,16 to name layers"
        )
    return tuple(range(num_layers - 1 - count, num_layers - 1))


def _ranges(text: str, flag: str) -> Iterator[range]:
    """Yield the ranges of a list, each with at least one number."""
    for item in text.split(","):
        first, dash, last = item.strip().partition("-")
        if not _is_number(first) or (dash and not _is_number(last)):
            raise ConfigError(
                f"--{flag} {shown(text)}: {shown(item)} is neither a number nor a range such as "
                "8-14"
            )
        span = range(int(first), int(last or first) + 1)
        if not span:
            raise ConfigError(f"--{flag} {shown(text)}: the range {shown(item)} is empty")
        yield span


def _is_number(text: str) -> bool:
    """Return whether a text is a whole number of a size that a layer can have: `isdigit` alone
    takes superscripts, too."""
    return text.isascii() and text.isdigit() and len(text) < 10
