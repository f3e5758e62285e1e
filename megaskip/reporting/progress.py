"""Batches that show how far a pass over them is."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


class ProgressBatches(list[T]):
    """A list of batches, or of their rows; going through it draws a bar, which is gone at the
    end."""

    def __init__(self, batches: Iterable[T], desc: str, *, disable: bool | None = None) -> None:
        """`desc` stands before the bar. `disable` is tqdm's: None draws on a terminal only."""
        super().__init__(batches)
        self._desc, self._disable = desc, disable

    def __iter__(self) -> Iterator[T]:
        batches = super().__iter__()
        yield from tqdm(
            batches, desc=self._desc, total=len(self), leave=False, disable=self._disable
        )
