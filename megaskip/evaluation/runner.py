"""What a batch of token rows gets from a model: logits, new tokens, and what was kept for them.

Knows models and routers, not tasks. `Runner` is the seam for other ways to spread a model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from megaskip.arch import find_decoder
from megaskip.arch.padding import needs_mask
from megaskip.parallel.loading.staged_model import StagedModel
from megaskip.routing import Routers


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """Rows padded on the right. B rows, T tokens."""

    input_ids: Tensor
    """int64 [B, T]."""
    token_mask: Tensor
    """bool [B, T], real tokens."""
    prompt_mask: Tensor
    """bool [B, T], the tokens that a sequence is judged by."""
    last: int
    """How many of the last positions need logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What one call of the model kept, by routed layer (R, none for a dense model) and row."""

    kept: Tensor
    """float32 [R, B] on the CPU: units that ran."""
    units: Tensor
    """float32 [R, B] on the CPU: real units."""


class Runner(Protocol):
    """Runs batches through a model, wherever its weights are. Rank behaviour is said by a few
    attributes.

    The ranks of one copy of the model must all be given the same batches (a pipeline), or batches
    of any shape but equally many (ZeRO-3: `lock_step`).
    """

    routers: Routers | None
    device: torch.device
    share: int
    """This rank takes every `shares`-th batch, from number `share` on."""
    shares: int
    lock_step: bool
    """Whether ranks that run out of batches must go on calling."""
    answers: bool
    """Whether this rank's results count. Of a pipeline the last stage's do: the others' logits are
    empty, and they know what was kept up to their own layers only."""

    def logits(self, batch: TokenBatch) -> tuple[Tensor, Kept]:
        """Return (logits [B, batch.last, V] of any dtype, what was kept)."""
        ...

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, stop: "StopRows", **options: Any
    ) -> tuple[Tensor, list[Kept]]:
        """Return (ids [B, T + new], what each call of the model kept, prefill first).

        Rows are padded on the left; a row that has stopped is filled up with padding.
        """
        ...


class LocalRunner:
    """A whole model on this rank's device, or one that ZeRO-3 gathers layer by layer."""

    answers = True

    def __init__(
        self,
        model: Any,
        routers: Routers | None,
        *,
        share: int = 0,
        shares: int = 1,
        lock_step: bool = False,
    ) -> None:
        self.model = model
        self.routers = routers
        self.device: torch.device = model.device
        self.share, self.shares, self.lock_step = share, shares, lock_step
        self._needs_mask = self._find_needs_mask()

    @torch.no_grad()
    def logits(self, batch: TokenBatch) -> tuple[Tensor, Kept]:
        """Return (logits [B, batch.last, V], what was kept)."""
        if self.routers is not None:
            self.routers.set_batch(batch.token_mask, batch.prompt_mask)
        out = self.model(
            input_ids=batch.input_ids,
            attention_mask=batch.token_mask.long() if self._needs_mask else None,
            use_cache=False,
            logits_to_keep=batch.last,
        )
        return out.logits[:, -batch.last :], self._kept(len(batch.input_ids))

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, stop: "StopRows", **options: Any
    ) -> tuple[Tensor, list[Kept]]:
        """Return (ids [B, T + new], what each call kept)."""
        calls: list[Kept] = []

        def note(module: Any, args: Any, output: Any) -> None:
            calls.append(self._kept(output[0].shape[0]))

        handle = find_decoder(self.model).decoder.register_forward_hook(note)
        try:
            ids: Tensor = self.model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                stopping_criteria=StoppingCriteriaList([stop]),
                use_cache=True,
                synced_gpus=self.lock_step and self.shares > 1,
                **options,
            )
        finally:
            handle.remove()
        return ids, calls

    def _find_needs_mask(self) -> bool:
        """Return whether padding is masked. Under ZeRO-3 collective."""
        return needs_mask(self.model, self.routers)

    def _kept(self, rows: int) -> Kept:
        decisions = () if self.routers is None else self.routers.decisions().values()
        if not decisions:
            return Kept(kept=torch.zeros(0, rows), units=torch.zeros(0, rows))
        kept = [(decision.keep * decision.unit_mask).sum(1) for decision in decisions]
        units = [decision.unit_mask.sum(1, dtype=torch.float32) for decision in decisions]
        both = torch.stack([torch.stack(kept), torch.stack(units)]).cpu()
        return Kept(kept=both[0], units=both[1])


class StageRunner(LocalRunner):
    """One stage of a model. All stages of a replica take the same batches, one after the other: a
    stage goes on to the next while those above are at the last one."""

    def __init__(
        self, staged: StagedModel, routers: Routers | None, *, share: int, shares: int
    ) -> None:
        self._staged = staged
        super().__init__(staged.model, routers, share=share, shares=shares)
        self._links = staged.links
        self.answers = staged.layer_range.is_last

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, stop: "StopRows", **options: Any
    ) -> tuple[Tensor, list[Kept]]:
        """Return (ids [B, T + new], what each call kept); every stage chooses the same tokens."""
        self._links.shares_logits = True
        try:
            return super().generate(input_ids, attention_mask, stop, **options)
        finally:
            self._links.shares_logits = False

    def _find_needs_mask(self) -> bool:
        return self._staged.needs_mask


class StopRows(StoppingCriteria):
    """Ends a row at a stop string or an end token, whatever the other rows of its batch do."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], prompt: int, ends: set[int]) -> None:
        self._tokenizer, self._prompt, self._ends = tokenizer, prompt, ends
        self._stops = [text for text in stops if text]
        # The same string may be made of other tokens than the tokenizer would make it of.
        lengths = [len(tokenizer.encode(s, add_special_tokens=False)) + 2 for s in self._stops]
        self._look_back = max(lengths, default=1)

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Return bool [B]: the rows that end with their last token."""
        recent = input_ids[:, self._prompt :][:, -self._look_back :]
        done = [self._is_end(row) for row in recent.tolist()]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)

    def length(self, new: Sequence[int]) -> int:
        """Return how many of a row's new tokens there are up to its end."""
        for count in range(1, len(new)):
            if self._is_end(new[max(count - self._look_back, 0) : count]):
                return count
        return len(new)

    def _is_end(self, recent: Sequence[int]) -> bool:
        text = self._tokenizer.decode(recent)
        return recent[-1] in self._ends or any(stop in text for stop in self._stops)
