"""A tensor and the parts of it that the ranks of the `tp` axis keep."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from meshuffle.layout.layout import Shard


def cut_part(whole: Tensor, shard: Shard, rank: int) -> Tensor:
    """Return `rank`'s part of a whole tensor.

    Raises:
        RuntimeError: it has another size than what was split.
    """
    if whole.ndim <= shard.dim or whole.shape[shard.dim] != shard.size:
        raise RuntimeError(f"dim {shard.dim} of {tuple(whole.shape)} must be {shard.size}")
    index = torch.tensor(shard.owners[rank], dtype=torch.int64, device=whole.device)
    return whole.index_select(shard.dim, index)


def join_parts(part: Tensor, shard: Shard, group: dist.ProcessGroup) -> Tensor:
    """Return the whole tensor on every rank of `group`; uneven and empty parts are fine.

    Args:
        part: this rank's.
    """
    longest = max(map(len, shard.owners))
    first = part.movedim(shard.dim, 0)
    padded = first.new_zeros(longest, *first.shape[1:])
    padded[: len(first)] = first
    gathered = padded.new_empty(shard.world, *padded.shape)
    dist.all_gather_into_tensor(gathered.view(-1), padded.view(-1), group=group)
    whole = padded.new_empty(shard.size, *first.shape[1:])
    for owned, theirs in zip(shard.owners, gathered, strict=True):
        whole[torch.tensor(owned, dtype=torch.int64)] = theirs[: len(owned)]
    return whole.movedim(0, shard.dim).contiguous()
