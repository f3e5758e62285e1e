"""Does it still write what the dense model writes? Greedy continuations, compared token by token.

Multiple choice hides a model that can no longer write; this does not. Shapes: B prompts, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megaskip.data import Batch
from megaskip.errors import ConfigError
from megaskip.routing import RouterSet
from megaskip.study.baselines import Policy
from megaskip.study.scoring import Numbers

_PROMPT_TOKENS = 32
"""Of a row, from which the dense model and the others go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """One value a prompt."""

    same: Numbers
    """Share of the dense model's greedy tokens that are also the most likely ones here, given the
    dense model's text so far."""
    likelihood: Numbers
    """Mean log-likelihood, nats a token, that the dense model gives to what is written here."""


class Continuations:
    """The dense model's greedy continuations of some prompts, and what others are beside them."""

    def __init__(
        self, model: Any, routers: RouterSet, batches: Sequence[Batch], *, count: int, tokens: int
    ) -> None:
        """Continue the first 32 tokens of `count` rows of `batches` by `tokens` tokens. Raises
        ConfigError where no row has as many."""
        self._model, self._tokens = model, tokens
        ends = getattr(model.generation_config, "eos_token_id", None)
        self._ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        self.prompts = _prompts(batches, count)
        with routers.disabled():
            self._dense = self._continue(self.prompts)

    @torch.no_grad()
    def compare(self, routers: RouterSet, policy: Policy | None) -> Agreement:
        """Return how alike the routed model writes; the routers decide without a policy."""
        first = self.prompts.shape[1]
        decided = {} if policy is None else policy(range(len(self.prompts)))
        with routers.override(decided):
            written = self._continue(self.prompts)
            predicted = self._predictions(routers, self._dense)[0]
        with routers.disabled():
            likelihood = self._predictions(routers, written)[1]
        same = (predicted == self._dense[:, first:]).double().mean(1)
        return Agreement(same=same.cpu().numpy(), likelihood=likelihood.double().cpu().numpy())

    def _continue(self, prompts: Tensor) -> Tensor:
        written: Tensor = self._model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=self._tokens,
            min_new_tokens=self._tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return written

    def _predictions(self, routers: RouterSet, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return (most likely tokens [B, T] where continuations stand, mean log-likelihood [B] of
        those that do stand there)."""
        first = self.prompts.shape[1]
        real = torch.ones_like(text, dtype=torch.bool)
        prompt = real & (torch.arange(text.shape[1], device=text.device) < first)
        routers.set_batch(real, prompt)
        logits = self._model(text, use_cache=False).logits[:, first - 1 : -1].float()
        logits[..., self._ends] = -torch.inf  # continuations do not end
        chosen = logits.log_softmax(-1).gather(2, text[:, first:].unsqueeze(-1)).squeeze(-1)
        return logits.argmax(-1), chosen.mean(1)


def _prompts(batches: Sequence[Batch], count: int) -> Tensor:
    """Return the first tokens of rows that have enough, int64 [B, 32], from all over `batches`."""
    rows = [
        ids[:_PROMPT_TOKENS]
        for batch in batches
        for ids, real in zip(batch.input_ids, batch.token_mask, strict=True)
        if int(real.sum()) >= _PROMPT_TOKENS
    ]
    if not rows:
        raise ConfigError(
            f"--continuations: no row to measure on has the {_PROMPT_TOKENS} tokens of a prompt; "
            "raise --seq_length, or give longer --eval_data"
        )
    chosen = np.linspace(0, len(rows) - 1, num=min(count, len(rows))).astype(int)
    return torch.stack([rows[index] for index in chosen])
