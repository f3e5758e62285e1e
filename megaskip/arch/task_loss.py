"""The task loss of a decoder without vocabulary-sized logits held whole. Knows heads, not routers.

Shapes: B rows, T tokens, D hidden, N supervised tokens, V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from megaskip.arch.decoder import find_decoder
from megaskip.arch.elsewhere import run_from
from megaskip.errors import UnsupportedModelError
from megaskip.labels import IGNORED


class TaskLoss(nn.Module):
    """Sums the cross-entropy of the supervised tokens of a batch. The module that engines call and
    shard."""

    def __init__(self, model: nn.Module, *, chunk_tokens: int) -> None:
        super().__init__()
        self.model = model
        self.head = head_loss(model, chunk_tokens)
        self.needs_mask = True
        """Whether padding must be masked for the real tokens to stay what they are (padding.py)."""
        self.first_layer = 0
        """The lowest layer that runs; those below are left out (prefix.py)."""
        self.takes_lengths = False
        """Whether attention tells samples of packed rows apart by their lengths (packing.py)."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        labels: Tensor,
        *,
        entering: Tensor | None = None,
        predicting: Tensor | None = None,
        targets: Tensor | None = None,
        lengths: Mapping[str, Any] | None = None,
        teacher: Tensor | None = None,
        share: float = 0.0,
        states_only: bool = False,
        each: bool = False,
    ) -> Tensor:
        """Return the float32 sum over supervised tokens; `labels` [B, T] are not shifted, IGNORED
        has no loss. Rows are padded on the right; `attention_mask` [B, T] marks the real tokens.
        `predicting` int64 [N] are the places in [B * T] whose states predict a label; without it
        they are looked for, which waits for the device; `targets` int64 [N] are those labels, where
        they are not all in `labels`. `entering` [B, T, D] are the hidden states
        in front of the lowest layer that runs, where that is not the first one. `lengths` are
        those of packed rows (Batch.lengths).

        With `states_only` return the hidden states [N, D] that predict them instead. Given back as
        `teacher`, they predict `share` of each label. With `each` return the loss of each of them,
        float32 [N], in the order of `labels[:, 1:]`; without gradient.
        """
        hidden_states = self.hidden_states(
            input_ids, attention_mask, position_ids, entering, lengths
        )
        if states_only:
            return predicting_states(hidden_states, labels, predicting)
        if targets is not None and predicting is not None:
            states = predicting_states(hidden_states, labels, predicting)
            loss: Tensor = self.head(states, targets, teacher, share, each=each)
            return loss
        return self.head.of_batch(
            hidden_states, labels, teacher, share, predicting=predicting, each=each
        )

    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        entering: Tensor | None = None,
        lengths: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Return the decoder's hidden states [B, T, D] after its final norm; arguments as in
        `forward`."""
        decoder = find_decoder(self.model).decoder
        mask = attention_mask if self.needs_mask else None
        call: dict[str, Any] = {"attention_mask": mask, "position_ids": position_ids}
        call |= {"use_cache": False}
        call |= lengths or {} if self.takes_lengths else {}
        assert (entering is None) == (self.first_layer == 0), "left-out layers need their states"
        if entering is not None:
            return run_from(decoder, self.first_layer, entering, **call)
        output: Tensor = decoder(input_ids=input_ids, **call)[0]
        return output


def head_loss(model: nn.Module, chunk_tokens: int) -> "HeadLoss":
    """Return the loss behind a model's decoder; raises UnsupportedModelError for other heads than
    nn.Linear."""
    parts = find_decoder(model)
    if not isinstance(parts.head, nn.Linear):
        raise UnsupportedModelError(
            f"{parts.model_type}: its output embedding is {type(parts.head).__name__}, "
            "expected nn.Linear"
        )
    return HeadLoss(parts.head, _logit_transform(model.config), chunk_tokens)


def predicting_states(
    hidden_states: Tensor, labels: Tensor, predicting: Tensor | None = None
) -> Tensor:
    """Return the hidden states [N, D], of [B, T, D], that predict the supervised tokens of `labels`
    [B, T]; `predicting` int64 [N] says where in [B * T] they are, if known."""
    if predicting is None:
        return hidden_states[:, :-1][labels[:, 1:] != IGNORED]
    return hidden_states.flatten(0, 1).index_select(0, predicting)


class HeadLoss(nn.Module):
    """Output embedding and cross-entropy, a chunk of tokens at a time. One ZeRO-3 leaf: gathered
    once."""

    def __init__(
        self, head: nn.Linear, transform: Callable[[Tensor], Tensor], chunk_tokens: int
    ) -> None:
        super().__init__()
        self.linear = head
        self._transform = transform
        self._chunk_tokens = chunk_tokens

    def of_batch(
        self,
        hidden_states: Tensor,
        labels: Tensor,
        teacher: Tensor | None = None,
        share: float = 0.0,
        *,
        predicting: Tensor | None = None,
        each: bool = False,
    ) -> Tensor:
        """Return the summed loss, float32 [], of hidden states [B, T, D] and labels int64 [B, T],
        not shifted; IGNORED has no loss. `predicting` as in TaskLoss, the others as in
        `forward`."""
        states = predicting_states(hidden_states, labels, predicting)
        if predicting is None:
            targets = labels[:, 1:][labels[:, 1:] != IGNORED]
        else:
            targets = labels.flatten().index_select(0, predicting + 1)
        return self(states, targets, teacher, share, each=each)

    def forward(
        self,
        hidden_states: Tensor,
        targets: Tensor,
        teacher: Tensor | None = None,
        share: float = 0.0,
        *,
        each: bool = False,
    ) -> Tensor:
        """Return the summed loss, float32 [], of hidden states [N, D] and targets int64 [N].

        `share` of each target is what the hidden states `teacher` [N, D] predict. With `each`
        return the losses one by one, float32 [N], without gradient.
        """
        if each:
            return self._each(hidden_states, targets)
        return _ChunkedCrossEntropy.apply(
            hidden_states,
            self.linear.weight,
            self.linear.bias,
            targets,
            self._transform,
            self._chunk_tokens,
            teacher,
            share,
        )

    @torch.no_grad()
    def _each(self, hidden_states: Tensor, targets: Tensor) -> Tensor:
        losses = [hidden_states.new_zeros(0, dtype=torch.float32)]
        for start in range(0, len(targets), self._chunk_tokens):
            chunk = slice(start, start + self._chunk_tokens)
            logits = self._transform(self.linear(hidden_states[chunk]).float())
            losses.append(nn.functional.cross_entropy(logits, targets[chunk], reduction="none"))
        return torch.cat(losses)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy whose gradient is taken in the forward pass, chunk by chunk.

    Logits live only for their chunk and are not computed again, and a frozen head needs its weight
    once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: Callable[[Tensor], Tensor],
        chunk_tokens: int,
        teacher: Tensor | None,
        share: float,
    ) -> Tensor:
        learns_hidden, learns_weight, learns_bias = ctx.needs_input_grad[:3]
        total = torch.zeros((), dtype=torch.float32, device=hidden_states.device)
        hidden_grad = torch.empty_like(hidden_states) if learns_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if learns_weight else None
        bias_grad = None
        if bias is not None and learns_bias:
            bias_grad = torch.zeros_like(bias, dtype=torch.float32)
        for start in range(0, hidden_states.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            hidden = hidden_states[chunk]
            logits = nn.functional.linear(hidden, weight, bias)
            expected = targets[chunk]
            if teacher is not None:
                teacher_logits = nn.functional.linear(teacher[chunk], weight, bias)
                expected = _mixed(expected, transform(teacher_logits.float()), share)
            loss, logits_grad = _loss_and_gradient(
                logits, expected, transform, any(ctx.needs_input_grad[:3])
            )
            total += loss
            if hidden_grad is not None:
                hidden_grad[chunk] = logits_grad @ weight
            if weight_grad is not None:
                weight_grad += (logits_grad.t() @ hidden).float()
            if bias_grad is not None:
                bias_grad += logits_grad.float().sum(0)
        ctx.save_for_backward(hidden_grad, weight_grad, bias_grad)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad, bias_grad = ctx.saved_tensors
        return (
            None if hidden_grad is None else hidden_grad * grad.to(hidden_grad.dtype),
            None if weight_grad is None else (weight_grad * grad).to(ctx.weight_dtype),
            None if bias_grad is None else (bias_grad * grad).to(ctx.weight_dtype),
            *[None] * 5,
        )


def _mixed(targets: Tensor, teacher_logits: Tensor, share: float) -> Tensor:
    """Return targets as probabilities [n, V], `share` of them those of `teacher_logits` [n, V]."""
    mixed = teacher_logits.softmax(-1) * share
    return mixed.scatter_add_(1, targets[:, None], torch.full_like(mixed[:, :1], 1 - share))


def _loss_and_gradient(
    logits: Tensor, targets: Tensor, transform: Callable[[Tensor], Tensor], learns: bool
) -> tuple[Tensor, Tensor]:
    """Return the summed loss of logits [n, V] and its gradient, in the logits' dtype (empty if not
    `learns`)."""
    with torch.set_grad_enabled(learns):
        logits = logits.detach().requires_grad_(learns)
        loss = nn.functional.cross_entropy(transform(logits.float()), targets, reduction="sum")
    return loss.detach(), torch.autograd.grad(loss, logits)[0] if learns else logits


def _logit_transform(config: Any) -> Callable[[Tensor], Tensor]:
    """Return what a family does to its logits after the output embedding; verified by
    verify_task_loss."""
    config = config.get_text_config(decoder=True)
    cap = getattr(config, "final_logit_softcapping", None)
    divisor = getattr(config, "logits_scaling", None) or 1.0
    factor = getattr(config, "logit_scale", None) or 1.0

    def transform(logits: Tensor) -> Tensor:
        if divisor != 1.0 or factor != 1.0:
            logits = logits * (factor / divisor)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return transform


@torch.no_grad()
def verify_task_loss(loss: TaskLoss) -> None:
    """Raise UnsupportedModelError unless the loss is that of the model's own logits on a few
    tokens.

    Under ZeRO-3 collective: every rank calls it.
    """
    model: Any = loss.model
    device = next(model.parameters()).device
    ids = torch.arange(1, 9, device=device).unsqueeze(0)
    own = loss(ids, None, torch.arange(8, device=device).unsqueeze(0), ids)
    logits = model(input_ids=ids, use_cache=False).logits.float()
    theirs = nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
    tolerance = 1e-3 if next(model.parameters()).dtype == torch.float32 else 5e-2
    # Written so that NaN fails too.
    if not abs(float(own - theirs)) <= tolerance * max(1.0, abs(float(theirs))):
        raise UnsupportedModelError(
            f"{model.config.model_type}: the loss from hidden states and output embedding is "
            f"{float(own):.4f}, from the model's own logits {float(theirs):.4f}; it does something "
            "to its logits that megaskip/arch/task_loss.py does not know"
        )
