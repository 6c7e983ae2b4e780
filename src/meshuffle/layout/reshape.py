"""Which layout a sharded tensor has after a reshape, where each rank can reshape its part alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import torch

from meshuffle.layout.layout import Owners, Shard

Sizes = tuple[int, ...]


def groups(before: Sizes, after: Sizes) -> Iterator[tuple[range, range]]:
    """Yield the smallest runs of dims of equal products, from the front.

    >>> list(groups((6, 35), (2, 3, 5, 7)))
    [(range(0, 1), range(0, 2)), (range(1, 2), range(2, 4))]
    """
    i = j = 0
    while i < len(before) or j < len(after):
        first, second = i, j
        left = right = 1
        if i < len(before):
            left, i = before[i], i + 1
        if j < len(after):
            right, j = after[j], j + 1
        while left != right:
            if left < right:
                left, i = left * before[i], i + 1
            else:
                right, j = right * after[j], j + 1
        # Dims of size 1 belong to the run before them.
        while i < len(before) and before[i] == 1 and (j == len(after) or after[j] != 1):
            i += 1
        while j < len(after) and after[j] == 1 and (i == len(before) or before[i] != 1):
            j += 1
        yield range(first, i), range(second, j)


@functools.lru_cache(maxsize=4096)
def reshaped(layout: Shard, before: Sizes, after: Sizes) -> tuple[Shard, ...]:
    """Return how the result may lie, as seen by a rank that reshapes only what it has.

    Several dims of the result can be meant where the others have size 1. Empty where the parts of
    the ranks are no blocks of any dim of the result.

    Args:
        layout: the layout before the reshape.
        before, after: sizes of the whole tensor, of equal products.
    """
    if math.prod(before) == 0:
        return ()
    old, new = next(pair for pair in groups(before, after) if layout.dim in pair[0])
    sizes_old, sizes_new = [before[d] for d in old], [after[d] for d in new]
    ids = torch.arange(math.prod(sizes_old))
    parts = [
        ids.view(sizes_old)
        .index_select(layout.dim - old.start, torch.tensor(part, dtype=torch.int64))
        .reshape(-1)
        for part in layout.owners
    ]
    owners_by_dim = (_as_blocks(parts, sizes_new, d) for d in range(len(new)))
    return tuple(
        Shard(new.start + d, owners) for d, owners in enumerate(owners_by_dim) if owners is not None
    )


def _as_blocks(parts: Sequence[torch.Tensor], sizes: Sequence[int], dim: int) -> Owners | None:
    """Return which indices of `dim` the parts are, if each is all of some indices, in order."""
    whole = torch.arange(math.prod(sizes)).view(sizes)
    stride, per_index = math.prod(sizes[dim + 1 :]), math.prod(sizes) // sizes[dim]
    owners = []
    for part in parts:
        num, rest = divmod(len(part), per_index)
        if rest or not num:
            return None
        local = [num if d == dim else size for d, size in enumerate(sizes)]
        blocks = part.view(local)
        first = blocks.movedim(dim, 0).reshape(num, -1)[:, 0]
        index = first // stride % sizes[dim]
        if not torch.equal(blocks, whole.index_select(dim, index)):
            return None
        owners.append(tuple(index.tolist()))
    return tuple(owners)
