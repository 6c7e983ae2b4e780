"""Counter-based random numbers: a 64-bit hash of (seed, epoch, index, …), with no state.

Everything random in the data path (splits, the order of an epoch, the draw of each sample) is a
hash of plain integers. It depends neither on the machine, the number of ranks and the version of
numpy, nor on how many numbers were drawn before a resume. The hash is splitmix64
(Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1


def hash64(*parts: int | NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return one 64-bit hash for each element of the integers `parts`, broadcast together.

    >>> hash64(0, 3).shape, hash64(0, np.arange(5)).shape
    ((1,), (5,))
    """
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        state = _mix(state + _GAMMA + _words(part))
    return state


def draw63(*parts: int | NDArray[np.int64]) -> NDArray[np.int64]:
    """Return hashes of `parts` in 0 … 2⁶³ − 1, which any random generator takes as a seed."""
    return (hash64(*parts) >> np.uint64(1)).astype(np.int64)


def shuffled(num: int, *key: int) -> NDArray[np.int64]:
    """Return a permutation of 0 … `num` − 1 that is keyed by `key` alone."""
    return np.argsort(hash64(*key, np.arange(num)), kind="stable").astype(np.int64)


def _words(part: int | NDArray[np.int64]) -> NDArray[np.uint64]:
    if isinstance(part, np.ndarray):
        return part.astype(np.uint64)
    return np.array([int(part) & _MASK], dtype=np.uint64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
