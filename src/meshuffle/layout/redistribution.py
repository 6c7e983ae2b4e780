"""How a value is redistributed from one layout to another, and the bytes that this costs.

    from \\ to    Replicate   Varying     Partial   Shard, Samples   Window
    Replicate                pvary       divide    scatter          (by Varying)
    Varying                                        take             take
    Partial      psum        (by psum)             scatter_sum      (by Shard)
    Shard,       gather      all-gather            exchange,        halo
    Samples                                        transpose

Bytes are those of the ring and direct algorithms, summed over ranks: `forward` for the value,
`backward` for its gradient. `divide` makes of a whole value x the terms x / world of a sum.
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
from meshuffle.layout.routes import sent_elements


@dataclass(frozen=True)
class Value:
    """What the cost of a redistribution depends on.

    Attributes:
        shape: sizes of the whole value.
        itemsize: bytes of an element.
        has_grad: whether a gradient flows into the value.
        batch: samples of the step.
        world: ranks of the `tp` axis.
    """

    shape: tuple[int, ...]
    itemsize: int
    has_grad: bool
    batch: int
    world: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole value."""
        return math.prod(self.shape) * self.itemsize


@dataclass(frozen=True)
class Redistribution:
    """One collective that leads from one layout to another, and the bytes that it sends."""

    source: Layout
    target: Layout
    forward: int = 0
    backward: int = 0

    @property
    def sent_bytes(self) -> int:
        """Forward and backward together."""
        return self.forward + self.backward

    @property
    def name(self) -> str:
        """The name in the table of this module and in the lowered code."""
        return name_of(self.source, self.target) or "nothing"


def held_indices(
    layout: Shard | Samples | Window, value: Value, batch: int | None = None
) -> Owners:
    """Return the indices that each rank has of `layout.dim`, where a step has `batch` samples."""
    if isinstance(layout, Samples):
        size, batch = value.shape[layout.dim], value.batch if batch is None else batch
        return samples_owners(size // max(1, value.batch) * batch, batch, value.world)
    return layout.owners if isinstance(layout, Shard) else layout.needs


def cheapest_path(
    value: Value, available: Collection[Layout], target: Layout
) -> tuple[Redistribution, ...] | None:
    """Return the redistributions that lead to `target` at the lowest cost, at most two.

    Args:
        available: the layouts in which the value exists; the path is empty where `target` is one.

    Returns:
        None where nothing leads there.
    """
    if target in available:
        return ()
    middles: list[Layout] = [Replicate(), Varying()]
    if isinstance(target, Window) and value.shape[target.dim] >= value.world:
        middles.append(Shard.even(target.dim, value.shape[target.dim], value.world))
    direct = (_direct(value, source, target) for source in available)
    paths: list[tuple[Redistribution, ...]] = [(one,) for one in direct if one]
    for middle, source in itertools.product(middles, available):
        first = _direct(value, source, middle)
        second = _direct(value, middle, target)
        if first and second:
            paths.append((first, second))
    return min(paths, key=lambda path: (sum(s.sent_bytes for s in path), len(path)), default=None)


@functools.lru_cache(maxsize=65536)
def _direct(value: Value, source: Layout, target: Layout) -> Redistribution | None:
    """Return the one collective that leads from `source` to `target`, or None."""
    name, ring = name_of(source, target), (value.world - 1) * value.num_bytes
    if name is None:
        return None
    if name in _RINGS:
        forward, backward = (ring * times for times in _RINGS[name])
    else:
        forward = backward = _moved_bytes(value, source, target)  # type: ignore[arg-type]
    return Redistribution(source, target, forward, int(value.has_grad) * backward)


_RINGS = {
    "take": (0, 0),
    "divide": (0, 0),
    "pvary": (0, 2),
    "scatter": (0, 1),
    "psum": (2, 0),
    "scatter_sum": (1, 1),
    "gather": (1, 0),
    "all_gather": (1, 1),
}
"""How many times the whole value travels round a ring of the ranks, forward and backward."""


def name_of(source: Layout, target: Layout) -> str | None:
    """Return the name of the one collective from `source` to `target`; None if there is none."""
    match source, target:
        case _ if source == target:
            return None
        case Replicate(), Varying():
            return "pvary"
        case Replicate(), Partial():
            return "divide"
        case Replicate(), Shard() | Samples():
            return "scatter"
        case Varying(), Shard() | Samples() | Window():
            return "take"
        case Partial(), Replicate():
            return "psum"
        case Partial(), Shard() | Samples():
            return "scatter_sum"
        case Shard() | Samples(), Replicate():
            return "gather"
        case Shard() | Samples(), Varying():
            return "all_gather"
        case Shard() | Samples(), Window():
            return "halo"
        case Shard() | Samples(), Shard() | Samples():
            return "exchange" if source.dim == target.dim else "transpose"
    return None


def _moved_bytes(value: Value, source: Shard | Samples, target: Shard | Samples | Window) -> int:
    held, needed = held_indices(source, value), held_indices(target, value)
    if source.dim == target.dim:
        row_bytes = value.num_bytes // max(1, value.shape[source.dim])
        return sent_elements(held, needed) * row_bytes
    rest = value.num_bytes // max(1, value.shape[source.dim] * value.shape[target.dim])
    crossing = sum(len(h) for h in held) * sum(len(n) for n in needed)
    crossing -= sum(len(h) * len(n) for h, n in zip(held, needed, strict=True))
    return crossing * rest
