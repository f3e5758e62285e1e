"""A tokenised row, alone or packed with others. Knows no tokenizer, file or tensor."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megaskip.labels import IGNORED

"""Label of a token without loss, as in transformers."""


class AnyRow(Protocol):
    """What a batch is made of: one sample, or several that do not see each other."""

    @property
    def segments(self) -> "tuple[Row, ...]": ...

    @property
    def packed(self) -> bool: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Row:
    """One tokenised sample, at most seq_length long."""

    input_ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    """Which tokens the model learns to predict; never the first, which nothing predicts."""
    prompt_length: int
    """Tokens of the prompt, as generation would feed it; 0 when there is none, as in plain text.
    Never more than there are before the first supervised token."""
    source: int
    """Index of the --data entry that the sample came from."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """Labels as transformers wants them: not shifted, IGNORED where there is no loss."""
        return np.where(self.supervised, self.input_ids, IGNORED).astype(np.int64)

    def num_pooled(self, prompt_tokens: int) -> int:
        """Return how many leading tokens a sequence router with pool=prompt reads: the prompt, or
        `prompt_tokens` where there is none."""
        return min(self.prompt_length or prompt_tokens, len(self))

    @property
    def segments(self) -> "tuple[Row, ...]":
        return (self,)

    @property
    def packed(self) -> bool:
        return False

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PackedRow:
    """Whole samples side by side in one row."""

    segments: tuple[Row, ...]

    @property
    def packed(self) -> bool:
        return True

    def __len__(self) -> int:
        return sum(map(len, self.segments))
