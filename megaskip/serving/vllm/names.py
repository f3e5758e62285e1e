"""What vLLM calls exported models: one architecture for each kind of export and base architecture.

Imports transformers, not vLLM.
"""

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

DROPPED, ROUTED = "MegaskipDropped", "MegaskipRouted"
"""What the architecture of an export begins with; the base's follows."""
KINDS = (DROPPED, ROUTED)


def base_architectures() -> dict[str, str]:
    """Return the architecture of a causal LM, e.g. LlamaForCausalLM, by family, e.g. llama."""
    named = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return {family: name if isinstance(name, str) else name[0] for family, name in named.items()}


def split_architecture(name: str) -> tuple[str, str]:
    """Return (kind, architecture of the base) of an export's architecture; ("", "") for others."""
    kind = next((kind for kind in KINDS if name.startswith(kind)), "")
    return kind, name.removeprefix(kind) if kind else ""
