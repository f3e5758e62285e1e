"""What a skipped unit gets in the place of its sublayer: a small affine map of what it reads.

Zero is a poor stand-in for a sublayer's update; a low-rank linear map costs next to nothing and is
much closer. Shapes: D hidden, r rank, [...] any number of leading dimensions.
"""

import math

import torch
from torch import Tensor, nn


class BiasCompensation(nn.Module):
    """The same vector for every unit: `bias` float32 [D], zero at the start."""

    def __init__(self, hidden_size: int, *, device: torch.device | None = None) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=torch.float32, device=device))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the update [..., D] of units that read `hidden_states` [..., D], in its dtype."""
        bias = self.bias.to(hidden_states.device, torch.float32)
        return bias.to(hidden_states.dtype).expand_as(hidden_states)


class LowRankCompensation(BiasCompensation):
    """x A B + b: `down` float32 [r, D] (A transposed), `up` float32 [D, r] (B transposed), `bias`.

    `up` and `bias` are zero at the start, so a fresh map returns zero; `down` is then random, the
    same on every rank, so that `up` has a gradient. Computed in float32.
    """

    def __init__(self, hidden_size: int, rank: int, *, device: torch.device | None = None) -> None:
        super().__init__(hidden_size, device=device)
        generator = torch.Generator().manual_seed(0)
        down = random_normal(rank, hidden_size, generator) / math.sqrt(hidden_size)
        self.down = nn.Parameter(down.to(device=device or torch.get_default_device()))
        up = torch.zeros(hidden_size, rank, dtype=torch.float32, device=device)
        self.up = nn.Parameter(up)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the update [..., D] of units that read `hidden_states` [..., D], in its dtype."""
        device = hidden_states.device
        down, up, bias = (p.to(device, torch.float32) for p in (self.down, self.up, self.bias))
        inner = nn.functional.linear(hidden_states.float(), down)
        return nn.functional.linear(inner, up, bias).to(hidden_states.dtype)


def random_normal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Return float32 [rows, columns] of a generator of the CPU, on the CPU: the default device may
    be a GPU, as it is where vLLM builds models, and that takes no such generator."""
    shape = rows, columns
    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)


def is_compensation(name: str) -> bool:
    """Return whether a parameter of a RouterSet, such as "12.attn.compensation.up", belongs to a
    compensation."""
    return ".compensation." in name


def describe_compensation(kind: str, rank: int, *, layers: int, parameters: int) -> str:
    """Return what compensations there are: "low_rank of rank 64 in 8 layers: 590,336 parameters,
    2.25 MiB float32"."""
    ranked = f" of rank {rank}" if kind == "low_rank" else ""
    size = 4 * parameters / 2**20
    return f"{kind}{ranked} in {layers} layers: {parameters:,} parameters, {size:.2f} MiB float32"


def make_compensation(
    kind: str, hidden_size: int, rank: int, *, device: torch.device | None = None
) -> BiasCompensation | None:
    """Return a fresh map of a kind of RouterConfig.compensation; None for "none"."""
    if kind == "none":
        return None
    if kind == "bias":
        return BiasCompensation(hidden_size, device=device)
    return LowRankCompensation(hidden_size, rank, device=device)
