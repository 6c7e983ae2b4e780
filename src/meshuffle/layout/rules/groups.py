"""Blocks of indices that an op keeps together: groups of channels, the rows of a pixel shuffle."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

from torch.fx import Node

from meshuffle.layout.layout import Owners, Shard
from meshuffle.layout.rule import Local, Query


def blocks(
    call: Query, x: Node, dim: int, num: int, sizes: tuple[int, int]
) -> Iterator[tuple[Shard, Shard]]:
    """Yield how an input and the result may lie where `num` blocks stay whole, in any order.

    `sizes` are the indices of a block along `dim`, in the input and in the result.
    """
    known = [_blocks_of(layout, dim, sizes[1]) for layout in call.wanted]
    known += [_blocks_of(layout, dim, sizes[0]) for layout in call.arriving[x]]
    even = call.even(dim, num)
    for owners in dict.fromkeys([*known, even.owners if even else None]):
        if owners is not None and sum(map(len, owners)) == num:
            yield Shard(dim, _indices(owners, sizes[0])), Shard(dim, _indices(owners, sizes[1]))


def own_number(argument: str, counts: Sequence[int]) -> Local:
    """Return what calls the op with another number of groups, `counts[rank]`, on each rank."""
    return lambda emit: emit.again(**{argument: counts[emit.rank]})


def _blocks_of(layout: Any, dim: int, size: int) -> Owners | None:
    """Return the blocks of `size` indices that each rank has, if it has whole ones."""
    if not isinstance(layout, Shard) or layout.dim != dim:
        return None
    owners = tuple(tuple(i // size for i in part[::size]) for part in layout.owners)
    return owners if all(owners) and _indices(owners, size) == layout.owners else None


@functools.lru_cache(maxsize=4096)
def _indices(owners: Owners, size: int) -> Owners:
    return tuple(tuple(b * size + i for b in part for i in range(size)) for part in owners)
