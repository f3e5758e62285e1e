"""Batches that show how far a pass over them is."""

from collections.abc import Callable, Iterable, Iterator

from tqdm import tqdm

from megaskip.data import Batch


class ProgressBatches(list[Batch | None]):
    """A list of batches; going through it draws a bar, which is gone at the end."""

    def __init__(
        self,
        batches: Iterable[Batch | None],
        desc: str,
        *,
        disable: bool | None = None,
        before_each: Callable[[], object] = lambda: None,
    ) -> None:
        """`disable` is tqdm's: None draws on a terminal only; `before_each` is called before every
        batch."""
        super().__init__(batches)
        self._desc, self._disable, self._before_each = desc, disable, before_each

    def __iter__(self) -> Iterator[Batch | None]:
        passed = super().__iter__()
        bar = tqdm(passed, desc=self._desc, total=len(self), leave=False, disable=self._disable)
        for batch in bar:
            self._before_each()
            yield batch
