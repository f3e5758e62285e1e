"""Orders from a seed, the same on every machine and library version. Knows no data."""

import numpy as np
from numpy.typing import NDArray


def permutation(length: int, *keys: int) -> NDArray[np.int64]:
    """Return a permutation of range(length) that depends on nothing but `keys`."""
    # numpy may change the streams of its generators between versions; a resumed run must not care.
    return np.argsort(hashed(length, *keys), kind="stable")


def hashed(length: int, *keys: int) -> NDArray[np.uint64]:
    """Return `length` well-mixed 64-bit numbers; number i depends on i and `keys` only."""
    state = 0
    for key in keys:
        state = int(_mixed(np.array([(state + key) % 2**64], dtype=np.uint64))[0])
    return _mixed(np.arange(length, dtype=np.uint64) + np.uint64(state))


def hashed_one(index: int, *keys: int) -> int:
    """Return the number that `hashed` holds at `index`."""
    state = 0
    for key in (*keys, index):
        state = int(_mixed(np.array([(state + key) % 2**64], dtype=np.uint64))[0])
    return state


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014)."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))
