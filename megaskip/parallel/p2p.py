"""Point-to-point between the stages of a replica."""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor


class P2PChannel:
    """The channel to the rank of a neighbouring stage. A send does not wait for its receiver, but
    for the send before it."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._pending: list[tuple[Any, Tensor]] = []
        self.bytes_sent: list[int] = [0, 0]
        """So far, by the position of the tensor in what `send` is given."""

    def send(self, tensors: Sequence[Tensor | None]) -> None:
        """Start sending tensors, one after the other."""
        self.wait()
        for index, tensor in enumerate(tensors):
            assert tensor is not None, "what crossed a boundary has a gradient"
            data = tensor.detach().contiguous()
            self.bytes_sent[index] += data.nbytes
            # The tensor has to live until it has arrived.
            self._pending.append((dist.isend(data, self._rank), data))

    def receive(self, tensors: list[Tensor]) -> list[Tensor]:
        """Fill tensors with what the neighbour sends, and return them."""
        for tensor in tensors:
            dist.recv(tensor, self._rank)
        return tensors

    def wait(self) -> None:
        """Return when everything sent has arrived."""
        for work, _ in self._pending:
            work.wait()
        self._pending = []
