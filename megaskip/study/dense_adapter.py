"""A control: the dense model, trained as the maps are, with nothing skipped.

Maps that are trained on a text learn its kind, too, which makes them look better than "over dense"
says. LoRA (peft) on every linear projection of the sublayers that would be dropped, of as many
parameters, with the same text, seed, steps and loss, shows how much of it a training alone gives.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from megaskip.arch import find_decoder
from megaskip.arch.sites import find_sites
from megaskip.arch.task_loss import TaskLoss
from megaskip.checkpoint.atomic import new_folder, write_json, write_tensors
from megaskip.config import RunConfig
from megaskip.data import Batch
from megaskip.errors import UnsupportedModelError
from megaskip.extras import extra
from megaskip.parallel.full_engine import FullEngine
from megaskip.parallel.topology import Topology
from megaskip.study.training_costs import COST, count_flops
from megaskip.training.schedule import learning_rate

WEIGHTS = "adapter.safetensors"
_DOWN, _UP = "lora_A", "lora_B"


def projections(model: Any, layers: Sequence[int], target: str) -> dict[str, nn.Linear]:
    """Return the linear projections of the sublayers `target` (attn, mlp or block) of `layers`, by
    their names in the model. Raises UnsupportedModelError where there is none."""
    parts, wanted = find_decoder(model), {}
    names = {id(module): name for name, module in model.named_modules()}
    for layer in layers:
        sites = find_sites(parts.layers[layer], parts.model_type)
        for site in {"attn": (sites.attention,), "mlp": (sites.mlp,)}.get(
            target, (sites.attention, sites.mlp)
        ):
            for module in parts.layers[layer].get_submodule(site).modules():
                if isinstance(module, nn.Linear):
                    wanted[names[id(module)]] = module
    if not wanted:
        raise UnsupportedModelError(
            f"{parts.model_type}: no linear projection in {target} of layers {list(layers)}, where "
            "dense_adapted would train; leave it out of --methods"
        )
    return wanted


def rank_for(modules: dict[str, nn.Linear], parameters: int) -> int:
    """Return the rank at which LoRA on `modules` has nearly as many `parameters`, at least 1."""
    of_a_rank = sum(module.in_features + module.out_features for module in modules.values())
    return max(round(parameters / of_a_rank), 1)


class AdapterEngine(FullEngine):
    """Trains adapters alone, on the text and on what the model says of it without them, as
    routers and maps are trained."""

    def __init__(
        self, module: TaskLoss, config: RunConfig, topology: Topology, adapted: Any
    ) -> None:
        """`adapted` is the PeftModel around the model of `module`."""
        super().__init__(module, config, topology)
        self._adapted, self._distill = adapted, config.optim.distill

    def _loss(self, batch: Batch) -> Tensor:
        inputs = (batch.input_ids, batch.attention_mask, batch.position_ids, batch.labels)
        teacher = None
        if self._distill:
            with torch.no_grad(), self._adapted.disable_adapter():
                teacher = self.module(*inputs, predicting=batch.predicting, states_only=True)
        loss: Tensor = self.module(
            *inputs, predicting=batch.predicting, teacher=teacher, share=self._distill
        )
        return loss


def train_adapter(
    loss: TaskLoss,
    modules: dict[str, nn.Linear],
    rank: int,
    steps: Iterator[list[Batch]],
    config: RunConfig,
    topology: Topology,
    folder: Path,
) -> None:
    """Train LoRA of `rank` on `modules` of the model in `loss`, and write weights, report.json and
    cost.json; the model is as before afterwards. Raises MissingExtraError without peft."""
    with extra("bench"):
        from peft import LoraConfig, get_peft_model

    torch.manual_seed(config.optim.seed)
    # alpha = rank: what is added is B A, at the scale of the maps.
    settings = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(modules))
    adapted: Any = get_peft_model(loss.model, settings)
    try:
        engine = AdapterEngine(loss, config, topology, adapted)
        total, begun = config.optim.max_steps, time.monotonic()
        assert total is not None, "a comparison says how many steps"
        flops = 0

        def step_of(step: int) -> Any:
            return engine.train_step(next(steps), learning_rate(config.optim, step, total))

        for step in range(total):
            if step:
                step_of(step)
            else:
                flops = count_flops(lambda: step_of(0))
        seconds = time.monotonic() - begun
        weights = {
            f"{name}.{own}": getattr(module, own)["default"].weight
            for name, module in adapted.get_base_model().named_modules()
            if name in modules
            for own in (_DOWN, _UP)
        }
        parameters = sum(weight.numel() for weight in weights.values())
        with new_folder(folder) as draft:
            write_tensors(draft / WEIGHTS, weights)
            write_json(draft / COST, {"flops": flops * total, "parameters": parameters})
            report = {"seconds": seconds, "rank": rank, "lr": config.optim.lr}
            write_json(draft / "report.json", report)
    finally:
        adapted.unload()


@contextlib.contextmanager
def merged(model: Any, folder: Path) -> Iterator[None]:
    """Let a model have a trained adapter in its weights in here: it costs nothing to run."""
    stored = load_file(folder / WEIGHTS)
    before: dict[str, Tensor] = {}
    try:
        for name in sorted({name.rpartition(".")[0] for name in stored}):
            linear = model.get_submodule(name)
            before[name] = linear.weight.data
            update = stored[f"{name}.{_UP}"] @ stored[f"{name}.{_DOWN}"]
            linear.weight.data = linear.weight.data + update.to(linear.weight)
        yield
    finally:
        for name, weight in before.items():
            model.get_submodule(name).weight.data = weight
