"""The ways in which a tensor can lie over ranks: plain data, compared by value.

Every value has one; a gradient lies as its value does, with two exceptions that come in pairs:

    layout      a rank's value                  its gradient
    Replicate   the whole                       the whole
    Varying     the whole, used in part         a term of a sum
    Partial     a term of a sum                 the whole
    Shard       its indices of one dim          the same indices
    Samples     its samples of the batch        the same samples
    Window      what it needs of one dim,       the same; an index that is on
                some of it on other ranks too   several ranks is summed
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self

Owners = tuple[tuple[int, ...], ...]
"""For each rank the global indices along one dim that it holds, in the order of its memory."""


@dataclass(frozen=True)
class Replicate:
    """The whole tensor on every rank."""

    def __str__(self) -> str:
        return "whole"


@dataclass(frozen=True)
class Partial:
    """On every rank a term of the whole shape; the tensor is their sum."""

    def __str__(self) -> str:
        return "terms of a sum"


@dataclass(frozen=True)
class Varying:
    """The whole tensor on every rank; each computes another part of what follows."""

    def __str__(self) -> str:
        return "whole, varying"


@dataclass(frozen=True)
class Samples:
    """Along `dim`, which holds the batch, each rank has contiguous samples, as even as can be.

    How many is known when the model runs. A dim may hold several rows per sample, side by side.
    """

    dim: int

    def on(self, dim: int) -> Samples:
        """Return the same split of another dim, as after a transpose."""
        return Samples(dim)

    def __str__(self) -> str:
        return f"dim {self.dim}: samples"


@dataclass(frozen=True)
class Window:
    """Along `dim` each rank has the indices that it needs; no value is made so, only read."""

    dim: int
    needs: Owners

    def __str__(self) -> str:
        return f"dim {self.dim}: " + " | ".join(_ranges(part) for part in self.needs)


@dataclass(frozen=True)
class Shard:
    """Along `dim` each rank holds the indices that `owners` lists for it.

    Parts may be uneven, empty, and not contiguous; no index is on two ranks.

    Args:
        dim: tensor dimension, from 0.
        owners: see `Owners`.
    """

    dim: int
    owners: Owners
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Require a partition of 0 … size − 1."""
        if self.dim < 0 or not _is_partition(self.owners):
            raise ValueError(f"not a partition along a dim: {self!r}")
        object.__setattr__(self, "_hash", hash((self.dim, self.owners)))

    def __hash__(self) -> int:
        """Return a number that is computed once: layouts are compared a lot."""
        return self._hash

    @classmethod
    def even(cls, dim: int, size: int, world: int) -> Self:
        """Return contiguous parts of `size` whose lengths differ by at most 1, longer first.

        >>> Shard.even(1, 5, 2).owners
        ((0, 1, 2), (3, 4))
        """
        return cls.blocks(dim, [even_size(rank, world, size) for rank in range(world)])

    @classmethod
    def blocks(cls, dim: int, lengths: Sequence[int]) -> Self:
        """Return contiguous parts of the given lengths."""
        return cls(dim, _blocks(tuple(lengths)))

    @property
    def size(self) -> int:
        """Length of the whole along `dim`."""
        return sum(len(part) for part in self.owners)

    @property
    def world(self) -> int:
        """Number of ranks."""
        return len(self.owners)

    def on(self, dim: int) -> Self:
        """Return the same parts along another dim, as after a transpose."""
        return type(self)(dim, self.owners)

    def __str__(self) -> str:
        parts = " | ".join(_ranges(part) for part in self.owners)
        return f"dim {self.dim}: {parts}"


def even_size(rank: int, world: int, size: int) -> int:
    """Return a rank's length of contiguous parts that differ by at most 1, longer first."""
    return size // world + int(rank < size % world)


@functools.lru_cache(maxsize=4096)
def _is_partition(owners: Owners) -> bool:
    held = sorted(index for part in owners for index in part)
    return held == list(range(len(held)))


@functools.lru_cache(maxsize=4096)
def _blocks(lengths: tuple[int, ...]) -> Owners:
    stops = list(itertools.accumulate(lengths))
    return tuple(tuple(range(b - n, b)) for b, n in zip(stops, lengths, strict=True))


Layout = Replicate | Varying | Partial | Shard | Samples | Window
Split = Shard | Samples
"""Layouts in which every rank has a part of its own."""


def unique(layouts: Iterable[Layout | None]) -> Iterator[Layout]:
    """Yield each layout once; leave Nones out."""
    seen = set()
    for layout in layouts:
        if layout is not None and layout not in seen:
            seen.add(layout)
            yield layout


def splits(layouts: Iterable[Layout | tuple[Layout, ...] | None]) -> Iterator[Split]:
    """Yield those that give each rank a part of its own, each once.

    A tuple, which has the layouts of several results, counts one by one.
    """
    each = (one for entry in layouts for one in (entry if isinstance(entry, tuple) else (entry,)))
    for layout in unique(each):
        if isinstance(layout, Shard | Samples):
            yield layout


def samples_owners(size: int, batch: int, world: int) -> Owners:
    """Return who holds which index of a dim of `size` that holds `batch` samples, as `Samples`."""
    rows = size // max(1, batch)
    return Shard.blocks(0, [rows * even_size(rank, world, batch) for rank in range(world)]).owners


def _ranges(indices: Sequence[int], most: int = 4) -> str:
    """Write indices as ranges, and how many more there are.

    >>> _ranges([0, 1, 2, 7, 5, 6])
    '0-2 7 5-6'
    """
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    more = [f"… ({len(indices)})"] if len(texts) > most else []
    return " ".join([*texts[:most], *more])
