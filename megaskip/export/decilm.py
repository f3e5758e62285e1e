"""A base with dropped layers as DeciLM ("nemotron-nas"), the one format of servers for such models.

Written to the sources of vLLM (model_executor/models/nemotron_nas.py and
transformers_utils/{config,model_arch_config_convertor}.py of 2026, transformers 5), and run there
(tests/serving). What they ask for:

- `block_configs` of a config class that the folder brings along (`auto_map.AutoConfig`, so serve
  with --trust-remote-code): vLLM has none of its own for this model type, and reads the blocks'
  fields as attributes. The model itself is vLLM's, picked by `architectures`.
- A layer without attention has no `input_layernorm`, one without MLP no `post_attention_layernorm`;
  tensors of those names would not load. Layer 0 keeps its attention.
- An MLP's size is int(2 * ffn_mult * hidden_size / 3), rounded up to a multiple of 256.

llama.cpp's converter reads the same fields (conversion/deci.py; run in tests/serving/llamacpp).
There a last layer without attention and MLP must not be (src/models/deci.cpp picks the tokens whose
logits are asked for in the last layer, behind its attention), so the model ends before it.
"""

import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megaskip.errors import UnsupportedModelError

FAMILIES = ("llama", "mistral")
NORMS = {"attn": "input_layernorm", "mlp": "post_attention_layernorm"}
"""The norm that goes with a dropped sublayer."""
CODE = "configuration_decilm.py"
_MULTIPLE = 256
_DIGITS = 6
"""Decimals of ffn_mult that NVIDIA's config class keeps."""


def require_decilm(hf_config: Any, names: Collection[str]) -> None:
    """Raise UnsupportedModelError with every reason for which DeciLM cannot say what a base is.

    `hf_config` is the base's config with its defaults, `names` are its stored tensors.
    """
    reasons = list(_obstacles(hf_config, names))
    if reasons:
        raise UnsupportedModelError(
            f"--format decilm cannot express this base: {'; '.join(reasons)}. Use --format hf"
        )


def decilm_config(
    hf_config: Any, base: Mapping[str, Any], dropped: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    """Return the config.json of a DeciLM model from the base's config and its config.json.

    `dropped` has the layers by attn or mlp.
    """
    stem = CODE.removesuffix(".py")
    return {
        **hf_config.to_dict(),  # Llama's defaults are not those of every family
        **base,
        **_rope_of_older_readers(hf_config),
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {"AutoConfig": f"{stem}.DeciLMConfig"},
        "num_hidden_layers": _depth(hf_config, dropped),
        "block_configs": _blocks(hf_config, dropped),
    }


def write_decilm_code(folder: Path) -> None:
    """Put the config class into the folder."""
    shutil.copyfile(Path(__file__).with_name(CODE), folder / CODE)


def ffn_mult(intermediate_size: int, hidden_size: int) -> float | None:
    """Return the multiplier that stands for an MLP's size; None when there is none."""
    mult = round(3 * intermediate_size / (2 * hidden_size), _DIGITS)
    return mult if intermediate_size_of(mult, hidden_size) == intermediate_size else None


def intermediate_size_of(mult: float, hidden_size: int) -> int:
    """Return the MLP's size that servers make of a multiplier."""
    return -(-int(2 * mult * hidden_size / 3) // _MULTIPLE) * _MULTIPLE


def _rope_of_older_readers(hf_config: Any) -> dict[str, Any]:
    """Return the rotary embedding in the fields of before transformers 5: SGLang and llama.cpp's
    converter take 10000 where they find no rope_theta (sources of 2025 and 2026)."""
    rope = dict(hf_config.rope_parameters)
    fields: dict[str, Any] = {"rope_theta": rope["rope_theta"]}
    return fields if rope.get("rope_type") == "default" else {**fields, "rope_scaling": rope}


def _blocks(hf_config: Any, dropped: Mapping[str, Sequence[int]]) -> list[dict[str, Any]]:
    group = hf_config.num_attention_heads // hf_config.num_key_value_heads
    mult = ffn_mult(hf_config.intermediate_size, hf_config.hidden_size)
    return [
        {
            "attention": _block("n_heads_in_group", group, layer in dropped.get("attn", ())),
            "ffn": _block("ffn_mult", mult, layer in dropped.get("mlp", ())),
        }
        for layer in range(_depth(hf_config, dropped))
    ]


def _depth(hf_config: Any, dropped: Mapping[str, Sequence[int]]) -> int:
    """Return the number of layers up to the last one that still computes something."""
    gone = set(dropped.get("attn", ())) & set(dropped.get("mlp", ()))
    return 1 + max(layer for layer in range(hf_config.num_hidden_layers) if layer not in gone)


def _block(field: str, value: float | None, no_op: bool) -> dict[str, Any]:
    return {field: None if no_op else value, "no_op": no_op, "replace_with_linear": False}


def _obstacles(hf_config: Any, names: Collection[str]) -> Iterator[str]:
    """Yield what of the base DeciLM has no field for."""
    if hf_config.model_type not in FAMILIES:
        yield f"its model_type is {hf_config.model_type}, expected {' or '.join(FAMILIES)}"
        return
    biases = sorted(name for name in names if name.endswith(".bias"))
    if biases:
        yield f"it has biases ({biases[0]})"
    if hf_config.hidden_act != "silu":
        yield f"its hidden_act is {hf_config.hidden_act}, expected silu"
    if getattr(hf_config, "sliding_window", None) is not None:
        yield f"its attention slides (sliding_window {hf_config.sliding_window})"
    if any(".quant_state." in name for name in names):
        yield "it is quantised"
    if ffn_mult(hf_config.intermediate_size, hf_config.hidden_size) is None:
        yield (
            f"its intermediate_size is {hf_config.intermediate_size}, and ffn_mult stands for "
            f"multiples of {_MULTIPLE} alone"
        )
