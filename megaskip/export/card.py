"""The README.md of an exported folder: what it is, what it was made from, how it is loaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megaskip._version import __version__
from megaskip.arch.trainable import describe_layers
from megaskip.config import RouterConfig
from megaskip.routing.compensation import describe_compensation

_LOAD_FOLDER = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("this folder", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("this folder", trust_remote_code=True)
```

Needs torch and transformers; `modeling_megaskip.py` is all of the code."""
_USE = {
    "adapter": """```python
from transformers import AutoModelForCausalLM
from megaskip import load_routers

model = AutoModelForCausalLM.from_pretrained("BASE")
routers = load_routers(model, "this folder")
```""",
    "routed": f"""{_LOAD_FOLDER} Pad on the left for batches
and pass the attention mask. Decisions and what is saved live in the cache: the default
`DynamicCache` saves, a static cache does so where sequences decide. A sequence is judged by the
whole text of its first forward pass; to score an answer after a prompt, pass `prompt_mask` (true on
the prompt).
""",
    "hf": _LOAD_FOLDER,
    "decilm": """```bash
vllm serve "this folder" --trust-remote-code
```

Needs a server that runs DeciLM ("nemotron-nas") models, as vLLM does; `configuration_decilm.py` is
its config class. transformers alone has no such model.""",
}


def use_text(form: str, made_from: str) -> str:
    """Return how a folder is loaded: an adapter, a routed model, or one with dropped sublayers in
    the form hf or decilm. `made_from` is the base's name."""
    return _USE[form].replace("BASE", made_from)


def routing_rows(
    config: RouterConfig, layers: tuple[int, ...], kv: str, *, map_parameters: int = 0
) -> dict[str, str]:
    """Return the rows of a card about routers; `map_parameters` are those of all compensations."""
    reads = {"own": "", "first": f", all of which read what layer {layers[0]} reads"}
    paper = "Router-Tuning / MindSkip (arXiv 2410.13184)"
    rows = {
        "method": f"{paper}, one {config.router} router a layer{reads[config.router_input]}",
        "skips": f"{config.granularity} of layers {describe_layers(layers)}",
        "asked capacity": f"{config.capacity:g} of the routed units run",
        "threshold": f"{config.describe_threshold()} (scores are sigmoids), pool `{config.pool}`",
    }
    if map_parameters:
        kind, rank, count = config.compensation, config.compensation_rank, len(layers)
        rows["compensation of what is skipped"] = describe_compensation(
            kind, rank, layers=count, parameters=map_parameters
        )
    capacities = sorted(capacity for capacity, _ in config.calibrated)
    if capacities:
        listed = ", ".join(f"{capacity:g}" for capacity in capacities)
        rows["calibrated for"] = f"{listed}: `model.set_capacity({capacities[0]:g})`"
    if config.skips_attention_by_token:
        rows["keys and values of skipped tokens"] = "kept" if kv == "keep" else "dropped"
    return rows


def write_card(
    folder: Path,
    base: Path,
    made_from: str,
    *,
    title: str,
    summary: str,
    rows: Mapping[str, Any],
    use: str,
) -> None:
    """Write README.md: the metadata that hubs read, a table of `rows`, and how to load it.

    `made_from` is the name of the base, which lies in the folder `base`.
    """
    head = yaml.safe_dump(card_metadata(base, made_from), sort_keys=False)
    table = "\n".join(
        f"| {key} | {value} |" for key, value in {**rows, "megaskip": __version__}.items()
    )
    text = (
        f"---\n{head}---\n\n# {Path(made_from).name}, {title}\n\n{summary}\n\n| | |\n|---|---|\n"
        f"{table}\n\n{use}\n"
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


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
    head: Any = None
    if text.startswith("---"):
        try:
            head = yaml.safe_load(text.split("---", 2)[1])
        except yaml.YAMLError:
            head = None
    head = head if isinstance(head, dict) else {}
    keys = ("license", "license_name", "license_link", "language")
    return {"license": "other"} | {key: head.get(key) for key in keys if head.get(key)}
