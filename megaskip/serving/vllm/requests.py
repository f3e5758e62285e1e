"""The requests of vLLM's batch, with what was decided about each.

vLLM has two model runners. The first tells logits processors which request enters, leaves or moves
to another row of the batch, before each step; the one here changes no logits. The second has slots,
of which a request keeps one, and asks the model for a class that is told what enters them.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from vllm.v1.sample.logits_processor.interface import LogitsProcessor, MoveDirectionality


@dataclass(slots=True)
class ServedRequest:
    """A request while it is in the batch.

    One that was put off for want of memory comes back as another: its keys are computed anew, from
    the prompt and what was generated, and its decisions again from the prompt alone.
    """

    prompt_tokens: int
    runs: dict[int, bool] = field(default_factory=dict)
    """Whether a routed layer's sublayer runs for it, by layer; empty before its prompt was read."""


class ServedRequests:
    """The requests of an engine, by the row (first runner) or slot (second runner) they are in."""

    def __init__(self) -> None:
        self._in: dict[int, ServedRequest] = {}

    def enter(self, number: int, prompt_tokens: int) -> None:
        """Note a request that enters a row or slot, whatever was there."""
        self._in[number] = ServedRequest(prompt_tokens=prompt_tokens)

    def leave(self, number: int) -> None:
        """Note that a row is free."""
        self._in.pop(number, None)

    def move(self, source: int, target: int, *, swap: bool) -> None:
        """Note that a row's request is in another row now, and with `swap` that one's in its."""
        moving, there = self._in.pop(source, None), self._in.pop(target, None)
        if moving is not None:
            self._in[target] = moving
        if there is not None and swap:
            self._in[source] = there

    def of(self, numbers: Iterable[int]) -> list[ServedRequest]:
        """Return the requests in rows or slots; none at all before the first request."""
        return [self._in[number] for number in numbers] if self._in else []


class RowFollower(LogitsProcessor):
    """Tells the requests of an engine what happens to the rows of the first runner's batch."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        self._requests = requests_of(vllm_config)

    def is_argmax_invariant(self) -> bool:
        """Return True: logits stay as they are."""
        return True

    def apply(self, logits: Tensor) -> Tensor:
        """Return the logits."""
        return logits

    def update_state(self, batch_update: Any) -> None:
        """Take over what left, entered and moved, in the order that vLLM asks for."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._requests.leave(row)
        for row, _, prompt, _ in batch_update.added:
            self._requests.enter(row, len(prompt))
        for source, target, direction in batch_update.moved:
            self._requests.move(source, target, swap=direction == MoveDirectionality.SWAP)


@functools.cache
def slot_follower() -> Any:
    """Return the class by which the second runner tells what enters its slots."""
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    class SlotFollower(DefaultModelState):
        """What vLLM keeps about requests, and who is in which slot."""

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            """Note a request; one that was put off comes back with the same prompt."""
            super().add_request(req_index, new_req_data)
            requests_of(self.vllm_config).enter(req_index, new_req_data.prompt_len)

    return SlotFollower


_OF_ENGINE: dict[str, ServedRequests] = {}
"""By vLLM's id of an engine's settings, which both the runner and the model know."""


def requests_of(vllm_config: Any) -> ServedRequests:
    """Return the requests of an engine."""
    return _OF_ENGINE.setdefault(vllm_config.instance_id, ServedRequests())
