"""The optimizer's moments of adapters and of large compensations, shared out over the ranks: each
rank updates some of them and sends them to the others, who hold the weights too.

AdamW treats every number by itself, so the result is bit for bit that of a rank that holds all.
What is small (routers, most compensations) every rank updates.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaskip.parallel.topology import Topology
from megaskip.routing.adapters import is_adapter
from megaskip.routing.compensation import is_compensation

LARGE_COMPENSATIONS = 20_000_000
"""Parameters of all compensations from which their moments are shared out: 160 MB are 1 % of a
16 GB device."""


class SharedMoments:
    """Which rank updates which parameter, and how the others get it. The same on every rank."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], topology: Topology) -> None:
        self._parameters = parameters
        self._rank, self._world_size = topology.rank, topology.world_size
        self._owners = share_out({n: p.numel() for n, p in parameters.items()}, self._world_size)

    def mine(self) -> dict[str, nn.Parameter]:
        """Return what this rank updates: its share of what is shared out, and all the rest."""
        others = {name for name, owner in self._owners.items() if owner != self._rank}
        return {name: p for name, p in self._parameters.items() if name not in others}

    @torch.no_grad()
    def spread(self) -> None:
        """Give every rank what others have updated. Collective."""
        for owner, owned in self._by_owner(learning=True).items():
            flat = torch.cat([parameter.flatten() for parameter in owned.values()])
            dist.broadcast(flat, src=owner)
            if owner != self._rank:
                _fill(owned, flat)

    @torch.no_grad()
    def states(self, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
        """Return the optimizer's state of every parameter, on the first rank; on the others of what
        they update. Collective."""
        states = {name: dict(optimizer.state[p]) for name, p in self.mine().items()}
        for owner, owned in self._by_owner().items():
            if owner == 0:
                continue
            for kind in ("exp_avg", "exp_avg_sq", "step"):
                for name, parameter in owned.items():
                    # Another rank has none of its own to send, but memory for it.
                    like = torch.zeros(()) if kind == "step" else parameter
                    self._to_first(states, name, kind, owner, like)
        return states

    def _to_first(self, states: Any, name: str, kind: str, owner: int, like: Tensor) -> None:
        if self._rank == owner:
            dist.send(states[name][kind].to(self._device), dst=0)
        elif self._rank == 0:
            received = torch.empty_like(like, device=self._device)
            dist.recv(received, src=owner)
            states.setdefault(name, {})[kind] = received.cpu()

    @property
    def _device(self) -> torch.device:
        return next(iter(self._parameters.values())).device

    def _by_owner(self, *, learning: bool = False) -> dict[int, dict[str, nn.Parameter]]:
        """Return what each rank updates for all, in its order: everything, or what is `learning`
        now (adapters may begin later); nothing where there are no other ranks."""
        owned: dict[int, dict[str, nn.Parameter]] = {}
        for name, owner in self._owners.items():
            if self._parameters[name].requires_grad or not learning:
                owned.setdefault(owner, {})[name] = self._parameters[name]
        return dict(sorted(owned.items()))


def share_out(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Return the rank that updates each shared parameter among those of `sizes`, so that all have
    about as much; of one rank alone nothing is shared."""
    if ranks == 1:
        return {}
    shared = {name: size for name, size in sizes.items() if is_adapter(name)}
    compensations = {name: size for name, size in sizes.items() if is_compensation(name)}
    if sum(compensations.values()) >= LARGE_COMPENSATIONS:
        shared |= compensations
    loads = [0] * ranks
    owners = {}
    for name in sorted(shared, key=lambda name: (-shared[name], name)):
        owner = loads.index(min(loads))
        owners[name] = owner
        loads[owner] += shared[name]
    return {name: owners[name] for name in shared}


def moment_numel(sizes: Mapping[str, int], ranks: int) -> int:
    """Return of how many parameters of `sizes` the rank that has most holds moments."""
    owners = share_out(sizes, ranks)
    loads = [0] * ranks
    for name, owner in owners.items():
        loads[owner] += sizes[name]
    return max(loads) + sum(size for name, size in sizes.items() if name not in owners)


def describe_sharing(sizes: Mapping[str, int], ranks: int) -> str | None:
    """Return whose moments are shared out among parameters of `sizes`, for headers and plans; None
    where every rank holds all."""
    shared = share_out(sizes, ranks)
    kinds = {"adapters": is_adapter, "compensations": is_compensation}
    names = [kind for kind, belongs in kinds.items() if any(map(belongs, shared))]
    if not names:
        return None
    return f"the moments of {' and '.join(names)} are shared out over {ranks} ranks"


def _fill(owned: Mapping[str, nn.Parameter], flat: Tensor) -> None:
    parts = flat.split([parameter.numel() for parameter in owned.values()])
    for parameter, values in zip(owned.values(), parts, strict=True):
        parameter.copy_(values.view_as(parameter))
