"""How many positions a decoder was made for, rope scaling included. Knows configs, not weights."""

from collections.abc import Iterator, Mapping
from typing import Any

_SCALED = ("linear", "dynamic", "yarn")
"""Types of rope whose `factor` extends the positions of pre-training. Those of llama3 and longrope
are in max_position_embeddings already."""


def rope_settings(config: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the rope settings in a text config: one, or one for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    for settings in (parameters, *parameters.values()):
        if isinstance(settings, Mapping) and "rope_type" in settings:
            yield settings


def made_for_positions(config: Any) -> int | None:
    """Return how many positions the decoder of a text config was made for; None where its config
    does not say."""
    stated = getattr(config, "max_position_embeddings", None)
    if stated is None:
        return None
    return max(int(stated), *(_scaled(settings, stated) for settings in rope_settings(config)), 0)


def _scaled(settings: Mapping[str, Any], stated: int) -> int:
    if settings["rope_type"] not in _SCALED:
        return 0
    original = settings.get("original_max_position_embeddings") or stated
    return int(original * (settings.get("factor") or 1.0))


def too_long(config: Any, tokens: int) -> str | None:
    """Return what is to be said of rows of `tokens` tokens for the decoder of a text config; None
    where it was made for them."""
    positions = made_for_positions(config)
    if positions is None or tokens <= positions:
        return None
    types = sorted({str(settings["rope_type"]) for settings in rope_settings(config)})
    rope = f", with rope of type {', '.join(types)}" if types else ""
    return (
        f"--seq_length {tokens} is more than the {positions} positions that the model was made "
        f"for{rope}: what it predicts beyond them is poor; a smaller --seq_length, or scale its "
        "rope in config.json (rope_parameters)"
    )
