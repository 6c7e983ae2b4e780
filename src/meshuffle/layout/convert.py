"""How a value gets from one layout into another, and the bytes that this costs.

    from \\ to    Replicate   Varying     Partial   Shard, Samples   Window
    Replicate                pvary       share     scatter          (by Varying)
    Varying                                        take             take
    Partial      psum        (by psum)             scatter_sum      (by Shard)
    Shard,       gather      all-gather            exchange, transpose
    Samples

Bytes are those of the ring and direct algorithms, summed over ranks: `forward` for the value,
`backward` for its gradient.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Collection
from dataclasses import dataclass

from meshuffle.layout.layout import (
    Layout,
    Owners,
    Partial,
    Replicate,
    Samples,
    Shard,
    Varying,
    Window,
    samples_owners,
)
from meshuffle.layout.transfer import sent_elements


@dataclass(frozen=True)
class Value:
    """What the cost of a conversion depends on.

    Attributes:
        shape: of the whole.
        itemsize: bytes of an element.
        has_grad: a gradient flows into it.
        batch, world: samples of the step, and ranks of the `tp` axis.
        stored: a parameter, buffer or input: each rank can read any part of it.
    """

    shape: tuple[int, ...]
    itemsize: int
    has_grad: bool
    batch: int
    world: int
    stored: bool = False

    @property
    def num_bytes(self) -> int:
        """Of the whole."""
        return math.prod(self.shape) * self.itemsize


@dataclass(frozen=True)
class Step:
    """One conversion."""

    source: Layout
    target: Layout
    forward: int = 0
    backward: int = 0

    @property
    def sent_bytes(self) -> int:
        """Both ways together."""
        return self.forward + self.backward


def owners_of(layout: Shard | Samples | Window, value: Value) -> Owners:
    """Return the indices that each rank has of `layout.dim`."""
    if isinstance(layout, Samples):
        return samples_owners(value.shape[layout.dim], value.batch, value.world)
    return layout.owners if isinstance(layout, Shard) else layout.needs


def steps(value: Value, available: Collection[Layout], target: Layout) -> tuple[Step, ...] | None:
    """Return the cheapest way from any of the layouts that there are; empty where it is one."""
    if target in available:
        return ()
    found = [(step,) for source in available if (step := _direct(value, source, target))]
    middles: list[Layout] = [Replicate(), Varying()]
    if isinstance(target, Window) and value.shape[target.dim] >= value.world:
        middles.append(Shard.even(target.dim, value.shape[target.dim], value.world))
    ways: list[tuple[Step, ...]] = list(found)
    for middle, source in itertools.product(middles, available):
        first = _direct(value, source, middle)
        second = _direct(value, middle, target)
        if first and second:
            ways.append((first, second))
    return min(ways, key=lambda way: (sum(s.sent_bytes for s in way), len(way)), default=None)


@functools.lru_cache(maxsize=65536)
def _direct(value: Value, source: Layout, target: Layout) -> Step | None:
    """Return the one collective that leads from `source` to `target`, or None."""
    others, size = value.world - 1, value.num_bytes
    grad = int(value.has_grad)
    if source == target:
        return None
    if isinstance(source, Replicate):
        if isinstance(target, Varying):
            return Step(source, target, 0, grad * 2 * others * size)
        if isinstance(target, Partial):
            return Step(source, target)
        if isinstance(target, Shard | Samples):
            return Step(source, target, 0, grad * others * size)
        return None
    if isinstance(source, Varying):
        return Step(source, target) if isinstance(target, Shard | Samples | Window) else None
    if isinstance(source, Partial):
        if isinstance(target, Replicate):
            return Step(source, target, 2 * others * size)
        if isinstance(target, Shard | Samples):
            return Step(source, target, others * size, grad * others * size)
        return None
    if isinstance(source, Window) or isinstance(target, Partial):
        return None
    if isinstance(target, Replicate):
        return Step(source, target, others * size)
    if isinstance(target, Varying):
        return Step(source, target, others * size, grad * others * size)
    moved = _moved_bytes(value, source, target)
    return Step(source, target, moved, grad * moved)


def _moved_bytes(value: Value, source: Shard | Samples, target: Shard | Samples | Window) -> int:
    held, needed = owners_of(source, value), owners_of(target, value)
    if source.dim == target.dim:
        row_bytes = value.num_bytes // max(1, value.shape[source.dim])
        return sent_elements(held, needed) * row_bytes
    rest = value.num_bytes // max(1, value.shape[source.dim] * value.shape[target.dim])
    crossing = sum(len(h) for h in held) * sum(len(n) for n in needed)
    crossing -= sum(len(h) * len(n) for h, n in zip(held, needed, strict=True))
    return crossing * rest
