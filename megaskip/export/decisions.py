"""How far the decisions of routers on a 4-bit base are from those on its 16-bit one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaskip.checkpoint.routers import load_routers
from megaskip.config import ModelConfig
from megaskip.data.demo import DEMO_DATA
from megaskip.data.tokenizer import read_tokenizer
from megaskip.errors import ConfigError
from megaskip.extras import MissingExtraError
from megaskip.parallel.loading.source import resolve_source
from megaskip.parallel.loading.whole import load_whole

_TEXTS = 16
_TOKENS = 64
"""Of each text, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions4Bit:
    """What of the decisions is the same, over some texts and all routed layers."""

    same: int
    decisions: int
    distance: float
    """Mean absolute difference of logits, in standard deviations of the 16-bit base's."""
    texts: str
    """What is decided about."""

    def __str__(self) -> str:
        share = 100 * self.same / max(self.decisions, 1)
        return (
            f"{share:.1f} % of {self.decisions} decisions on {self.texts} are those of the "
            f"16-bit base (logits differ by {self.distance:.2f} of their spread)"
        )


@torch.no_grad()
def compare_with_4_bit(base: Path, routers: Path) -> Decisions4Bit:
    """Run routers on a base model in 4 bit and as it is stored, on the CPU, and compare what they
    decide about the first rows of the demo's text.

    Raises MissingExtraError without bitsandbytes.
    """
    texts, described = _texts(base)
    plain, packed = (_run(base, routers, kind, texts) for kind in ("dtype", "nf4"))
    logits = torch.cat([logit for logit, _ in plain])
    others = torch.cat([logit for logit, _ in packed])
    same = sum(int((a == b).sum()) for (_, a), (_, b) in zip(plain, packed, strict=True))
    return Decisions4Bit(
        same=same,
        decisions=sum(keep.numel() for _, keep in plain),
        distance=float((logits - others).abs().mean() / logits.std().clamp(min=1e-9)),
        texts=described,
    )


def _run(
    base: Path, routers: Path, base_dtype: str, texts: list[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Return (logits, kept) of each text and routed layer, flattened."""
    source = resolve_source(ModelConfig(model=str(base), base_dtype=base_dtype))
    model: Any = load_whole(source, torch.device("cpu")).eval()
    attached = load_routers(model, routers)
    made = []
    for ids in texts:
        model(input_ids=ids, use_cache=False)
        made += [
            (decision.logit.flatten().float(), (decision.keep > 0.5).flatten())
            for _, decision in sorted(attached.decisions().items())
        ]
    return made


def _texts(base: Path) -> tuple[list[Tensor], str]:
    """Return token ids [1, T] of each text, and what they are: any ones without a tokenizer."""
    try:
        tokenizer = read_tokenizer(base, trust_remote_code=False)
    except (ConfigError, MissingExtraError):
        counted = [torch.arange(1 + n, 33 + n)[None] for n in range(_TEXTS)]
        return counted, f"{_TEXTS} rows of token numbers that are no text (no tokenizer is here)"
    lines = DEMO_DATA.read_text(encoding="utf-8").splitlines()[:_TEXTS]
    texts = [torch.tensor([tokenizer(line)["input_ids"][:_TOKENS]]) for line in lines]
    return texts, f"{_TEXTS} texts"
