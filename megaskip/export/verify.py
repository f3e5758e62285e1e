"""Proof that an exported folder is the trained model: logits and routers of a fresh process against
its own."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from megaskip.arch.adapters import detach_adapters
from megaskip.checkpoint.atomic import read_json
from megaskip.checkpoint.routers import load_routers
from megaskip.config import ModelConfig
from megaskip.data.tokenizer import read_tokenizer
from megaskip.errors import CheckpointError, ConfigError
from megaskip.export.merge import MERGED, merged, merged_tensors
from megaskip.extras import MissingExtraError
from megaskip.inference.executor import InferenceExecutor
from megaskip.parallel.loading.source import resolve_source
from megaskip.parallel.loading.stored_values import DTYPES
from megaskip.parallel.loading.weight_check import check_weights
from megaskip.routing import PREFIX
from megaskip.routing.adapters import AdapterSet

_TEXT = "A frozen language model learns which of its layers it can skip."
TOLERANCE = 1e-5
_CHILD = """
import os
import sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
torch.manual_seed(0)
folder, target = sys.argv[1], sys.argv[3]
ids = torch.tensor([[int(i) for i in sys.argv[2].split(",")]])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
model.eval()
assert "megaskip" not in sys.modules, "the folder imports megaskip"
state = dict(model.state_dict())
if os.path.isdir(os.path.join(folder, "adapter")):
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, os.path.join(folder, "adapter"))
with torch.no_grad():
    answer = {"logits": model(ids).logits.contiguous()}
# Beside the logits: where every router keeps, routers that were never read make no difference.
answer |= {name: tensor for name, tensor in state.items() if name.startswith("skip_routers.")}
save_file(answer, target)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """How far the exported model is from the trained one."""

    difference: float
    """Largest absolute difference of logits in float32."""
    scale: float
    """Largest absolute logit."""
    tokens: int
    wrong_routers: tuple[str, ...] = ()
    """Router weights that the folder does not load as they were trained."""

    @property
    def passed(self) -> bool:
        """Return whether the routers are the trained ones and only rounding is left."""
        return not self.wrong_routers and self.difference <= TOLERANCE * max(self.scale, 1.0)

    def require(self, folder: Path, expected: str = "the trained model's") -> None:
        """Raise CheckpointError unless the folder has passed; `expected` says whose logits it was
        compared with."""
        if self.wrong_routers:
            names = ", ".join(self.wrong_routers)
            raise CheckpointError(
                f"{folder} loads other routers than the trained ones ({names}); do not use it"
            )
        if not self.passed:
            raise CheckpointError(
                f"{folder}: its logits differ by {self.difference:.1e} from {expected}, whose "
                f"largest is {self.scale:.1e}; do not use this folder"
            )


def verify_folder(folder: Path, base: Path, routers: Path) -> Verified:
    """Compare logits and routers of `folder`, in a fresh process without megaskip, with the trained
    ones.

    Both in float32 on the CPU. A folder without `routing` has no routers to compare, and an adapter
    in its weights, if `routers` have one. Raises
    CheckpointError when the folder does not load.
    """
    ids = _probe_ids(base)
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "logits.safetensors"
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": scratch}
        command = [sys.executable, "-c", _CHILD, str(folder.resolve()), ids, str(target)]
        child = subprocess.run(
            command, env=environment, cwd=scratch, capture_output=True, text=True, check=False
        )
        if child.returncode:
            lines = child.stderr.strip().splitlines()
            raise CheckpointError(
                f"{folder} does not load in a fresh process: {lines[-1] if lines else 'no output'}"
            )
        loaded = load_file(target)
    routing = read_json(folder / "config.json").get("routing")
    trained = _trained(base, routers, ids, {"adapter": MERGED} if routing is None else routing)
    expected = trained.pop("logits")
    if routing is None:
        trained = {}
    wrong = [name for name in trained if not _same(loaded.get(name), trained[name])]
    return Verified(
        difference=float((loaded["logits"] - expected).abs().max()),
        scale=float(expected.abs().max()),
        tokens=expected.shape[1],
        wrong_routers=tuple(wrong),
    )


@torch.no_grad()
def _trained(
    base: Path, routers: Path, ids: str, routing: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Return the trained model's logits and, by their full names, its router weights; an adapter
    is merged into weights of the stored type where the folder's `routing` says so."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, trust_remote_code=False
    )
    attached = load_routers(model.eval(), routers)
    if attached.adapters is not None and routing.get("adapter") == MERGED:
        _merge(model, attached.adapters, base)
    if (kv := routing.get("kv")) == "drop":
        # Training has no such semantics; without a cache, nothing of what holds them is shared.
        attached.executor = InferenceExecutor(unit=attached.config.unit, kv=kv)
    inputs = torch.tensor([[int(i) for i in ids.split(",")]])
    logits: torch.Tensor = model(inputs, use_cache=False).logits
    return {"logits": logits} | {f"{PREFIX}.{k}": v for k, v in attached.state_dict().items()}


def _merge(model: Any, adapters: AdapterSet, base: Path) -> None:
    """Put the adapter into the weights of a model in float32, rounded as they are stored."""
    plan = check_weights(resolve_source(ModelConfig(model=str(base))))
    detach_adapters(model)
    for layer, stored in merged_tensors(adapters, plan, base).items():
        weight = model.get_submodule(adapters.name_of(layer)).weight
        weight.copy_(merged(weight.to(DTYPES[stored.dtype]), adapters.delta(layer)))


def _same(loaded: torch.Tensor | None, expected: torch.Tensor) -> bool:
    return loaded is not None and torch.equal(loaded, expected)


def _probe_ids(base: Path) -> str:
    """Return the token ids of a short text, or the first ids where the base has no tokenizer."""
    try:
        tokenizer = read_tokenizer(base, trust_remote_code=False)
    except (ConfigError, MissingExtraError):
        return ",".join(map(str, range(1, 33)))
    return ",".join(map(str, tokenizer(_TEXT)["input_ids"]))
