"""Proof that an exported folder is the trained model: logits and routers of a fresh process against
its own."""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from megaskip.checkpoint.atomic import read_json
from megaskip.checkpoint.routers import load_routers
from megaskip.data.tokenizer import read_tokenizer
from megaskip.errors import CheckpointError, ConfigError
from megaskip.extras import MissingExtraError
from megaskip.inference.executor import InferenceExecutor
from megaskip.routing import PREFIX

TEXT = "A frozen language model learns which of its layers it can skip."
TOLERANCE = 1e-5
_CHILD = """
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
with torch.no_grad():
    answer = {"logits": model(ids).logits.contiguous()}
# Beside the logits: where every router keeps, routers that were never read make no difference.
state = model.state_dict().items()
answer |= {name: tensor for name, tensor in state if name.startswith("skip_routers.")}
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

    def require(self, folder: Path) -> None:
        """Raise CheckpointError unless the folder has passed."""
        if self.wrong_routers:
            names = ", ".join(self.wrong_routers)
            raise CheckpointError(
                f"{folder} loads other routers than the trained ones ({names}); do not use it"
            )
        if not self.passed:
            raise CheckpointError(
                f"{folder}: its logits differ by {self.difference:.1e} from the trained model's, "
                f"whose largest is {self.scale:.1e}; do not use this folder"
            )


def verify_folder(folder: Path, base: Path, routers: Path, text: str = TEXT) -> Verified:
    """Compare logits and routers of `folder`, in a fresh process without megaskip, with the trained
    ones.

    Both in float32 on the CPU. A folder without `routing` has no routers to compare. Raises
    CheckpointError when the folder does not load.
    """
    ids = _probe_ids(base, text)
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
    trained = _trained(base, routers, ids, "keep" if routing is None else routing["kv"])
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
def _trained(base: Path, routers: Path, ids: str, kv: str) -> dict[str, torch.Tensor]:
    """Return the trained model's logits and, by their full names, its router weights."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, trust_remote_code=False
    )
    attached = load_routers(model.eval(), routers)
    if kv == "drop":
        # Training has no such semantics; without a cache, nothing of what holds them is shared.
        attached.executor = InferenceExecutor(unit=attached.config.unit, kv=kv)
    inputs = torch.tensor([[int(i) for i in ids.split(",")]])
    logits: torch.Tensor = model(inputs, use_cache=False).logits
    return {"logits": logits} | {f"{PREFIX}.{k}": v for k, v in attached.state_dict().items()}


def _same(loaded: torch.Tensor | None, expected: torch.Tensor) -> bool:
    return loaded is not None and torch.equal(loaded, expected)


def _probe_ids(base: Path, text: str) -> str:
    """Return token ids of the text, or the first ids where the base has no tokenizer."""
    try:
        tokenizer = read_tokenizer(base, trust_remote_code=False)
    except (ConfigError, MissingExtraError):
        return ",".join(map(str, range(1, 33)))
    return ",".join(map(str, tokenizer(text)["input_ids"]))
