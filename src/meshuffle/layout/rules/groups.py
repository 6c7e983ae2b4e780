"""Blocks of indices that an op keeps together: groups of channels, the rows of a pixel shuffle."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

from meshuffle.layout.layout import Layout, Owners, Shard
from meshuffle.layout.program import Call

Layouts = Sequence[Layout]


def blocks(
    call: Call, dim: int, num: int, sizes: tuple[int, int], wanted: Layouts, arriving: Layouts
) -> Iterator[tuple[Shard, Shard]]:
    """Yield how an input and the result may lie where `num` blocks stay whole, in any order.

    `sizes` are the indices of a block along `dim`, in the input and in the result.
    """
    found = [_blocks_of(layout, dim, sizes[1]) for layout in wanted]
    found += [_blocks_of(layout, dim, sizes[0]) for layout in arriving]
    even = call.even(dim, num)
    for owners in dict.fromkeys([*found, even.owners if even else None]):
        if owners is not None and sum(map(len, owners)) == num:
            yield Shard(dim, _indices(owners, sizes[0])), Shard(dim, _indices(owners, sizes[1]))


def _blocks_of(layout: Layout, dim: int, size: int) -> Owners | None:
    """Return the blocks of `size` indices that each rank has, if it has whole ones."""
    if not isinstance(layout, Shard) or layout.dim != dim:
        return None
    owners = tuple(tuple(i // size for i in part[::size]) for part in layout.owners)
    return owners if all(owners) and _indices(owners, size) == layout.owners else None


@functools.lru_cache(maxsize=4096)
def _indices(owners: Owners, size: int) -> Owners:
    return tuple(tuple(b * size + i for b in part for i in range(size)) for part in owners)
