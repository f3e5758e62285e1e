"""What ran in a model, noted while it generates."""

from typing import Any

import numpy as np
import torch

from megaskip.arch import find_decoder
from megaskip.routing import Routers


class RunRecord:
    """Context that notes which (layer, token) pairs ran, for the first row: call by call where each
    token decides. A sequence's decisions stay what they are."""

    def __init__(self, routers: Routers, model: Any) -> None:
        """`routers` are those of `model`."""
        self._routers = routers
        self._decoder = find_decoder(model).decoder
        self._calls: list[np.ndarray] = []
        self.layers: tuple[int, ...] = tuple(self._routers.layers)

    def __enter__(self) -> None:
        self._handle = self._decoder.register_forward_hook(self._note)

    def __exit__(self, *exc: object) -> None:
        self._handle.remove()

    def matrix(self, tokens: int) -> np.ndarray:
        """Return float32 [routed layers, tokens] of the text that went through the model so far: 1
        where the layer ran, of experts the share of the token's that did."""
        if self._routers.config.unit == "sequence":  # steps that are played back call no hooks
            return self._ran(tokens)
        empty = np.zeros((len(self.layers), 0), dtype=np.float32)
        return np.concatenate([empty, *self._calls], axis=1)

    def _note(self, module: Any, args: Any, output: Any) -> None:
        if self._routers.config.unit == "token":
            self._calls.append(self._ran(output[0].shape[1]))

    def _ran(self, tokens: int) -> np.ndarray:
        rows = [keep[0].expand(tokens) for keep in self._routers.keep().values()]
        return torch.stack(rows).cpu().numpy()
