"""Where a router may act inside an HF decoder layer. Knows attribute names, not parallelism.

An update must be multiplied where it meets the residual: in families with a norm behind the
sublayer (gemma2, gemma3, olmo2, glm4) a gate in front of that norm would be undone by it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from megaskip.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sites:
    """Child names of a decoder layer: what is skipped, and where its update meets the residual."""

    attention: str
    """Runs the attention; its input is what the router reads."""
    attention_update: str
    """Returns the attention's update of the residual: the attention itself, or the norm behind
    it."""
    mlp: str
    mlp_update: str
    mlp_is_tuple: bool = False
    """The MLP returns a tuple whose first entry is its output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyException:
    """A family's departure from the rules below, with the reason."""

    reason: str
    mlp_is_tuple: bool = False


EXCEPTIONS = {
    "gpt_oss": FamilyException(reason="its MLP returns (output, router scores)", mlp_is_tuple=True),
    "zaya": FamilyException(reason="its MLP returns (output, router state)", mlp_is_tuple=True),
}

SUBLAYERS = {"attn": ("self_attn",), "mlp": ("mlp", "block_sparse_moe", "feed_forward")}
"""Names that a layer may have for its sublayers, as modules and in files, which may be older than
the modules (mixtral)."""


def find_sites(
    layer: nn.Module, model_type: str, names: Mapping[str, Sequence[str]] = SUBLAYERS
) -> Sites:
    """Return the sites of a decoder layer; raises UnsupportedModelError when it has no such
    children, which have one of `names` by attn or mlp."""
    children = dict(layer.named_children())
    attention = next((name for name in names["attn"] if name in children), None)
    mlp = next((name for name in names["mlp"] if name in children), None)
    if attention is None or mlp is None:
        raise UnsupportedModelError(
            f"{model_type}: {type(layer).__name__} has the children {', '.join(children)}; "
            f"expected {names['attn'][0]} and one of {', '.join(names['mlp'])}. Name "
            "another layer with --layers if this one is special"
        )
    exception = EXCEPTIONS.get(model_type)
    return Sites(
        attention=attention,
        attention_update=_norm_behind_attention(children) or attention,
        mlp=mlp,
        mlp_update=_norm_behind_mlp(children) or mlp,
        mlp_is_tuple=exception is not None and exception.mlp_is_tuple,
    )


def _norm_behind_mlp(children: dict[str, nn.Module]) -> str | None:
    names = ("post_mlp_layernorm", "post_feedforward_layernorm")
    return next((name for name in names if name in children), None)


def _norm_behind_attention(children: dict[str, nn.Module]) -> str | None:
    if "post_self_attn_layernorm" in children:
        return "post_self_attn_layernorm"
    # Llama's post_attention_layernorm stands in front of the MLP; it stands behind the attention
    # only where the MLP has a norm behind it too.
    if "post_feedforward_layernorm" in children and "post_attention_layernorm" in children:
        return "post_attention_layernorm"
    return None
