"""The samples that a rank sees at each step, computed from integers without a process group.

The global order of an epoch is a permutation keyed by (seed, epoch). It does not depend on the
number of ranks: a rank takes its contiguous part of every global batch, so that together the ranks
see each sample exactly once, and one process sees the same global batches.

Repeated augmentation (`repeats` > 1; Hoffer et al., "Augment your batch", 2020, and Berman
et al., "MultiGrain", 2019): a global batch of B holds B / repeats distinct images, each
`repeats` times with draws of their own, and an epoch keeps its number of steps, so that it
visits num_samples // repeats distinct images, other ones each epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from meshuffle.data.seeds import draw63, shuffled
from meshuffle.errors import ConfigError

_ORDER, _DRAW = 1, 2  # separate the two uses of one (seed, epoch)


class SampleKey(NamedTuple):
    """One sample of one epoch. `draw`: 0 … 2⁶³ − 1, the seed of its augmentation."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    draw: int


def shard_bounds(num: int, world: int, unit: int = 1) -> list[tuple[int, int]]:
    """Return (start, stop) per rank: contiguous parts of 0 … `num` in multiples of `unit`.

    Parts differ by at most one unit; only the last part that is not empty may end in an
    incomplete unit. With `unit=2` a pair (2k, 2k + 1) never straddles two ranks.

    >>> shard_bounds(5, 2), shard_bounds(5, 2, unit=2)
    ([(0, 3), (3, 5)], [(0, 4), (4, 5)])
    """
    return list(pairwise(_edge(num, world, unit, rank) for rank in range(world + 1)))


def _edge(num: int, parts: int, unit: int, part: int) -> int:
    """Return where part `part` of 0 … `num` begins."""
    base, extra = divmod(-(-num // unit), parts)
    return min(num, unit * (part * base + min(part, extra)))


@dataclass(frozen=True)
class EpochSampler:
    """The batches of every epoch, for one rank.

    `num_samples` ≥ 0 images; `batch_size` ≥ 1 is the largest global batch, a multiple of
    `repeats`: an epoch is cut evenly, 196 images at 16 into batches of 15 and 16, never 4;
    `rank` in 0 … `world` − 1; `shuffle=False` keeps the order 0, 1, 2, …; `unit`: ranks take
    multiples of it (2 for mixup pairs). Raises `ConfigError` for values out of range.
    """

    num_samples: int
    batch_size: int
    rank: int = 0
    world: int = 1
    seed: int = 0
    shuffle: bool = True
    repeats: int = 1
    unit: int = 1

    def __post_init__(self) -> None:
        if min(self.batch_size, self.repeats, self.unit, self.world) < 1 or self.num_samples < 0:
            raise ConfigError(f"{self} needs positive sizes")
        if not 0 <= self.rank < self.world:
            raise ConfigError(f"rank (={self.rank}) must be in 0 … {self.world - 1}")
        if self.batch_size % self.repeats:
            raise ConfigError(
                f"batch size (={self.batch_size}) must be divisible by repeats (={self.repeats})"
            )

    @property
    def num_distinct(self) -> int:
        """Distinct images that one epoch visits."""
        return min(self.num_samples, max(1, self.num_samples // self.repeats))

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of one epoch: the fewest that hold all its images."""
        return -(-self.num_distinct * self.repeats // self.batch_size)

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[list[SampleKey]]:
        """Yield this rank's part, possibly empty, of each global batch from `start_step` on."""
        order = self._order(epoch)
        for step in range(start_step, self.steps_per_epoch):
            keys = self._global_batch(order, epoch, step)
            start, stop = shard_bounds(len(keys), self.world, self.unit)[self.rank]
            yield keys[start:stop]

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if not self.shuffle:
            return np.arange(self.num_samples)
        return shuffled(self.num_samples, _ORDER, self.seed, epoch)

    def _positions(self, step: int) -> range:
        """An even part of the epoch: batch norm over a short last batch would be noise."""
        unit = 1 if self.batch_size // self.repeats % self.unit else self.unit
        num, steps = self.num_distinct, self.steps_per_epoch
        return range(_edge(num, steps, unit, step), _edge(num, steps, unit, step + 1))

    def _global_batch(self, order: NDArray[np.int64], epoch: int, step: int) -> list[SampleKey]:
        """One copy of all images after the other, so that a mixup pair mixes two images."""
        distinct = order[self._positions(step)]
        indices = np.tile(distinct, self.repeats)
        copies = np.repeat(np.arange(self.repeats), len(distinct))
        draws = draw63(_DRAW, self.seed, epoch, indices, copies)
        return [SampleKey(*pair) for pair in zip(indices.tolist(), draws.tolist(), strict=True)]
