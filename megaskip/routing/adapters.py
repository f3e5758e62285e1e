"""LoRA adapters beside a frozen model: parameters by the names of the layers that they adapt.

The layers are peft's, but nothing is put between a linear layer and its model: the weights stay
outside of the modules that DeepSpeed shards, and no state-dict key of the model changes. Knows no
model and no file. Shapes: D features in, E features out, r rank, [...] any leading dimensions.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megaskip.config import AdapterConfig

ADAPTER = "adapter."
"""What the names of adapters begin with among those of what trains."""
PEFT_NAME = "default"
"""What peft calls an adapter that has no other name."""
_MATRICES = ("lora_A", "lora_B")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptedLayer:
    """A linear layer that gets an adapter."""

    layer: int
    """Number of its decoder layer."""
    path: str
    """Its name inside of that, such as "self_attn.q_proj"."""
    in_features: int
    out_features: int


class AdapterSet(nn.Module):
    """All adapters of a model: for each layer `lora_A` float32 [r, D] and `lora_B` float32 [E, r].

    An update is x A^T B^T * scaling, computed in the type of x. `lora_B` is zero at the start, so
    fresh adapters change nothing; `lora_A` is random by `seed`, the same on every rank.
    """

    def __init__(
        self,
        tree: nn.Module,
        stack: str,
        layers: Sequence[AdaptedLayer],
        settings: Any,
        *,
        seed: int = 0,
        device: torch.device | None = None,
    ) -> None:
        """`tree` holds peft's LoRA layers under the names of those that they adapt, `stack` is what
        the names of decoder layers begin with in the causal LM, such as "model.layers", and
        `settings` is peft's LoraConfig; see megaskip.arch.adapters."""
        super().__init__()
        self.stack = stack
        self.layers = tuple(layers)
        self.settings = settings
        self.enabled = True
        """Whether updates are added."""
        self.learns = True
        """Whether they have a gradient; see `learn`."""
        self._tree = tree
        # Found once: a name is looked up for microseconds, in every layer of every pass.
        self._of_peft: dict[AdaptedLayer, Any] = {
            layer: tree.get_submodule(self.name_of(layer)) for layer in self.layers
        }
        generator = torch.Generator().manual_seed(seed)
        for layer in self.layers:
            down, up = self._matrices(layer)
            bound = layer.in_features**-0.5  # what nn.Linear and peft begin with
            values = torch.rand(
                down.weight.shape, generator=generator, dtype=torch.float32, device="cpu"
            )
            fresh = ((2 * values - 1) * bound).to(device)
            down.weight = nn.Parameter(fresh)
            shape = (layer.out_features, fresh.shape[0])
            up.weight = nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device))

    @property
    def lowest(self) -> int:
        """Return the lowest decoder layer that has an adapter."""
        return min(layer.layer for layer in self.layers)

    def name_of(self, layer: AdaptedLayer) -> str:
        """Return the name of an adapted layer in the causal LM."""
        return f"{self.stack}.{layer.layer}.{layer.path}"

    def tensors(self) -> dict[str, nn.Parameter]:
        """Return all parameters by peft's names in the causal LM, such as
        "model.layers.3.self_attn.q_proj.lora_A.weight"."""
        return {
            f"{self.name_of(layer)}.{kind}.weight": matrix.weight
            for layer in self.layers
            for kind, matrix in zip(_MATRICES, self._matrices(layer), strict=True)
        }

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Return all parameters as they are named among what trains."""
        return {f"{ADAPTER}{name}": parameter for name, parameter in self.tensors().items()}

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over values by the names of `tensors`."""
        for name, parameter in self.tensors().items():
            parameter.copy_(tensors[name])

    def learn(self, active: bool) -> None:
        """Let adapters have a gradient from now on, or not."""
        self.learns = active
        self.requires_grad_(active)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Hold a context in which nothing is added: the frozen model."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def add(self, layer: AdaptedLayer, output: Tensor, read: Tensor) -> Tensor:
        """Return a layer's output [..., E] of `read` [..., D] with its update added."""
        if not self.enabled:
            return output
        down, up = (matrix.weight.to(read) for matrix in self._matrices(layer))
        update = nn.functional.linear(nn.functional.linear(read, down), up)
        result: Tensor = output + update * self.scaling(layer)
        return result

    def scaling(self, layer: AdaptedLayer) -> float:
        """Return what the update of a layer is multiplied by: alpha / r."""
        return float(self._of_peft[layer].scaling[PEFT_NAME])

    @torch.no_grad()
    def delta(self, layer: AdaptedLayer) -> Tensor:
        """Return what the adapter adds to a layer's weight, float32 [E, D]."""
        down, up = (matrix.weight for matrix in self._matrices(layer))
        added: Tensor = (up @ down) * self.scaling(layer)
        return added

    def config(self) -> AdapterConfig:
        """Return rank, alpha and targets as settings, the targets by their names."""
        return AdapterConfig(
            lora_rank=self.settings.r,
            lora_alpha=float(self.settings.lora_alpha),
            lora_targets=",".join(sorted(self.settings.target_modules)),
        )

    def describe(self) -> str:
        """Return rank, layers, parameters and size in one line."""
        shapes = {name: tuple(p.shape) for name, p in self.trained_parameters().items()}
        return describe_adapters(self.config(), shapes)

    def _matrices(self, layer: AdaptedLayer) -> tuple[Any, Any]:
        of_peft = self._of_peft[layer]
        return of_peft.lora_A[PEFT_NAME], of_peft.lora_B[PEFT_NAME]


def is_adapter(name: str) -> bool:
    """Return whether a parameter of what trains belongs to an adapter."""
    return name.startswith(ADAPTER)


def describe_adapters(config: AdapterConfig, trained: Mapping[str, Sequence[int]]) -> str:
    """Return what adapters there are among the shapes of what trains, in one line."""
    shapes = {name: shape for name, shape in trained.items() if is_adapter(name)}
    kinds = sorted({name.rsplit(".", 3)[1] for name in shapes})
    count = sum(math.prod(shape) for shape in shapes.values())
    return (
        f"LoRA of rank {config.lora_rank}, alpha {config.alpha:g}, on {len(shapes) // 2} linear "
        f"layers ({', '.join(kinds)}): {count:,} parameters, {4 * count / 2**20:.2f} MiB float32"
    )
