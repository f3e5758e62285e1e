"""The README.md of an exported folder: what it is, what it was made from, how it is loaded."""

from pathlib import Path
from typing import Any

import yaml

from megaskip._version import __version__
from megaskip.arch.trainable import describe_layers
from megaskip.config import RouterConfig

_USE = {
    "adapter": """```python
from transformers import AutoModelForCausalLM
from megaskip import load_routers

model = AutoModelForCausalLM.from_pretrained("BASE")
routers = load_routers(model, "this folder")
```""",
    "folder": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("this folder", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("this folder", trust_remote_code=True)
```

Needs torch and transformers; `modeling_megaskip.py` is all of the code. Pad on the left for batches
and pass the attention mask. Decisions and what is saved live in the cache: the default
`DynamicCache` saves, a static cache computes everything. A sequence is judged by the whole text of
its first forward pass; to score an answer after a prompt, pass `prompt_mask` (true on the prompt).
""",
}


def _calibrated_rows(config: RouterConfig) -> list[tuple[str, str]]:
    capacities = sorted(capacity for capacity, _ in config.calibrated)
    if not capacities:
        return []
    listed = ", ".join(f"{capacity:g}" for capacity in capacities)
    return [("calibrated for", f"{listed}: `model.set_capacity({capacities[0]:g})`")]


def write_card(
    folder: Path,
    config: RouterConfig,
    layers: tuple[int, ...],
    base: Path,
    made_from: str,
    *,
    mode: str,
    kv: str,
    facts: dict[str, Any],
) -> None:
    """Write README.md with the metadata that hubs read; `facts` are further rows of its table."""
    rows = [
        (
            "method",
            f"Router-Tuning / MindSkip (arXiv 2410.13184), one {config.router} router a layer",
        ),
        ("skips", f"{config.granularity} of layers {describe_layers(layers)}"),
        ("asked capacity", f"{config.capacity:g} of the routed units run"),
        ("threshold", f"{config.describe_threshold()} (scores are sigmoids), pool `{config.pool}`"),
        *_calibrated_rows(config),
        *_kv_rows(config, kv),
        *facts.items(),
        ("megaskip", __version__),
    ]
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    use = _USE["adapter" if mode == "adapter" else "folder"].replace("BASE", made_from)
    head = yaml.safe_dump(card_metadata(base, made_from), sort_keys=False)
    title = f"# {Path(made_from).name}, routed\n\nA model that learnt which layers it can skip."
    text = f"---\n{head}---\n\n{title}\n\n| | |\n|---|---|\n{table}\n\n{use}\n"
    (folder / "README.md").write_text(text, encoding="utf-8")


def _kv_rows(config: RouterConfig, kv: str) -> list[tuple[str, str]]:
    """Return the row on keys and values, where skipped tokens could have some."""
    if not config.skips_attention_by_token:
        return []
    return [("keys and values of skipped tokens", "kept" if kv == "keep" else "dropped")]


def card_metadata(base: Path, name: str) -> dict[str, Any]:
    """Return the fields that hubs read at the head of a card."""
    card: dict[str, Any] = {
        "base_model": name,
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mixture-of-depths", "router-tuning", "custom_code"],
    }
    return card | _base_licence(base)


def _base_licence(base: Path) -> dict[str, Any]:
    """Return the licence fields of the base's own card; "other" when it does not say."""
    card = base / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    found: Any = None
    if text.startswith("---"):
        try:
            found = yaml.safe_load(text.split("---", 2)[1])
        except yaml.YAMLError:
            found = None
    found = found if isinstance(found, dict) else {}
    keys = ("license", "license_name", "license_link", "language")
    return {"license": "other"} | {key: found.get(key) for key in keys if found.get(key)}
