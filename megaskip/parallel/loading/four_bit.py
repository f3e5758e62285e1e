"""Linear layers in 4 bit by bitsandbytes: packed as they are read (--base_dtype nf4), or as they
lie in a folder. Knows settings, not tensors."""

import re
from dataclasses import dataclass
from typing import Any

QUANT_TYPES = ("nf4", "fp4")
_STORAGE = "uint8"


@dataclass(frozen=True, slots=True, kw_only=True)
class FourBit:
    """How the linear layers of a base are packed."""

    quant_type: str = "nf4"
    """The 16 levels of a weight, as bitsandbytes calls them: nf4 or fp4."""
    nested: bool = False
    """Whether the scales of blocks are quantised, too (bnb_4bit_use_double_quant)."""
    is_stored: bool = False
    """Whether the folder holds them packed; else they are packed as they are read."""
    kept: tuple[str, ...] | None = None
    """Modules that are not packed (llm_int8_skip_modules); None for those that transformers leaves
    out by itself."""

    def __str__(self) -> str:
        """Return the words for it."""
        if not self.is_stored:
            return f"linear layers in 4 bit ({self.quant_type})"
        nested = " with nested scales" if self.nested else ""
        return f"bitsandbytes {self.quant_type}{nested}, as stored in the folder"


def stored_four_bit(settings: Any) -> FourBit | None:
    """Return what the quantization_config of a config.json says about 4-bit weights of
    bitsandbytes; None for anything else, and for forms of them that are not read."""
    if not is_bitsandbytes(settings) or not _is_4_bit(settings):
        return None
    kind = settings.get("bnb_4bit_quant_type", "fp4")  # transformers' default
    kept = settings.get("llm_int8_skip_modules")
    storage = settings.get("bnb_4bit_quant_storage") or _STORAGE
    if kind not in QUANT_TYPES or storage != _STORAGE or not _are_patterns(kept):
        return None
    return FourBit(
        quant_type=kind,
        nested=bool(settings.get("bnb_4bit_use_double_quant")),
        is_stored=True,
        kept=None if kept is None else tuple(kept),
    )


def is_bitsandbytes(settings: Any) -> bool:
    """Return whether a quantization_config is one of bitsandbytes; old ones do not name it."""
    if not isinstance(settings, dict):
        return False
    loads = any(settings.get(f"load_in_{bits}bit") for bits in (4, 8))
    return settings.get("quant_method", "bitsandbytes" if loads else None) == "bitsandbytes"


def describe_bitsandbytes(settings: dict[str, Any]) -> str:
    """Return the words for settings of bitsandbytes that are not read."""
    if not _is_4_bit(settings):
        return "bitsandbytes in 8 bit"
    kept = settings.get("llm_int8_skip_modules")
    if not _are_patterns(kept):
        return f"bitsandbytes with llm_int8_skip_modules {kept!r}, which are no names of modules"
    storage = settings.get("bnb_4bit_quant_storage") or _STORAGE
    kind = settings.get("bnb_4bit_quant_type", "fp4")
    return f"bitsandbytes {kind} in {storage}, where nf4 or fp4 in {_STORAGE} is read"


def _are_patterns(kept: Any) -> bool:
    """Return whether transformers can compare names of modules with `kept`, as patterns."""
    if kept is None:
        return True
    if not isinstance(kept, list) or not all(isinstance(name, str) for name in kept):
        return False
    try:
        for name in kept:
            re.compile(f"(?:{name})")
    except re.error:
        return False
    return True


def _is_4_bit(settings: dict[str, Any]) -> bool:
    four, eight = (
        settings.get(f"load_in_{bits}bit") or settings.get(f"_load_in_{bits}bit") for bits in (4, 8)
    )
    return bool(four) and not eight
