"""What a base in 4 bit does not go with, whether a flag or its folder makes it one."""

from collections.abc import Iterator


def four_bit_problems(
    base: str, *, train: str, ds_config: str | None, pipeline_stages: int
) -> Iterator[str]:
    """Yield what of these settings a 4-bit base does not do; `base` is what the lines call it."""
    if train == "full":
        yield (
            f"{base} is for a frozen base: --train full changes every weight; leave --train full "
            "out, or take a base in 16 or 32 bit"
        )
    if ds_config is not None and pipeline_stages == 1:
        yield (
            f"{base} does not go with ZeRO-3 (--ds_config {ds_config}): DeepSpeed shares out a "
            "weight by its elements, and 4-bit ones are packed, with scales beside them; use "
            "replicas, or --pipeline_stages 2 or more"
        )
