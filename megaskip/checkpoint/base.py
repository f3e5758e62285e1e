"""Which base model routers belong to: a short description that another model does not match by
accident."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaskip.checkpoint.atomic import read_json
from megaskip.checkpoint.header import METADATA, read_header
from megaskip.config.value_types import is_of, shown, wrong_types
from megaskip.errors import CheckpointError

_SAMPLES = 16
_SAMPLE_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModel:
    """A base model's identity and shape."""

    name: str
    revision: str | None
    model_type: str
    num_layers: int
    hidden_size: int
    weights: str | None
    """Fingerprint of the weight files; None when the model did not come from files."""

    def require(self, other: "BaseModel", what: str) -> None:
        """Raise CheckpointError unless `other`, the model at hand, is this one; its name may
        differ."""
        for field in ("model_type", "num_layers", "hidden_size", "weights"):
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs and None not in (mine, theirs):
                raise CheckpointError(
                    f"{what} belongs to another base model: {field} is {mine} there ({self.name}) "
                    f"and {theirs} in the model at hand ({other.name}); name the base that it was "
                    "trained on"
                )

    def to_json(self) -> dict[str, Any]:
        """Return the description as a JSON object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any], source: Path) -> "BaseModel":
        """Read a description; raises CheckpointError when a field is missing or is no such
        value."""
        names = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in names if name not in content]
        if missing:
            raise CheckpointError(f"{source}: base_model lacks {', '.join(missing)}")
        described = cls(**{name: content[name] for name in names})
        for problem in wrong_types(described, f"{source}: base_model."):
            raise CheckpointError(problem)
        return described


def describe_base(
    config: Any,
    folder: str | Path | None = None,
    revision: str | None = None,
    *,
    name: str | None = None,
) -> BaseModel:
    """Return the identity of a model with HF `config`, whose weight files lie in `folder`, if
    any.

    `name` is what the model was asked for by: a hub id is recorded instead of the folder of the
    cache, which exists on one machine only, and with the commit where no revision was named.
    """
    text = config.get_text_config(decoder=True)
    path = str(getattr(config, "_name_or_path", "") or folder or "")
    if name is not None and is_hub_id(name):
        path = name
        if folder is not None and Path(folder).parent.name == "snapshots":
            revision = revision or Path(folder).name
    return BaseModel(
        name=path,
        revision=revision or getattr(config, "_commit_hash", None),
        model_type=config.model_type,
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        weights=_fingerprint(Path(folder)) if folder is not None else None,
    )


def is_hub_id(name: str) -> bool:
    """Return whether a model's name is one of the hub, such as org/model, and no folder here."""
    return name.count("/") == 1 and not name.startswith((".", "/")) and not Path(name).exists()


def describe_folder(folder: Path) -> BaseModel:
    """Return the identity of the model in a local folder, from its files alone."""
    content = read_json(folder / "config.json")
    text = content.get("text_config") or content
    sizes = text if isinstance(text, dict) else {}
    expected = {"num_hidden_layers": (sizes, int), "hidden_size": (sizes, int)}
    for name, (holder, kind) in {**expected, "model_type": (content, str)}.items():
        if name not in holder:
            raise CheckpointError(f"{folder / 'config.json'} lacks {name}")
        if not is_of(holder[name], kind):
            raise CheckpointError(
                f"{folder / 'config.json'}: {name} is {shown(holder[name])}, expected "
                f"{'a whole number' if kind is int else 'text'}"
            )
    return BaseModel(
        name=str(folder),
        revision=None,
        model_type=content["model_type"],
        num_layers=sizes["num_hidden_layers"],
        hidden_size=sizes["hidden_size"],
        weights=_fingerprint(folder),
    )


def _fingerprint(folder: Path) -> str | None:
    """Hash the headers of all shards and a few samples of each: the same on every disk, cheap at
    any size."""
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        return None
    digest = hashlib.sha256()
    for shard in shards:
        header, start = read_header(shard)
        header.pop(METADATA, None)
        digest.update(json.dumps(header, sort_keys=True).encode())
        data = shard.stat().st_size - start
        with open(shard, "rb") as handle:
            for sample in range(_SAMPLES):
                handle.seek(start + data * sample // _SAMPLES)
                digest.update(handle.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]
