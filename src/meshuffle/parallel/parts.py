"""A tensor and the parts of it that the ranks of the `tp` axis keep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from meshuffle.comm import collectives
from meshuffle.layout.layout import Shard
from meshuffle.layout.routes import whole_route


def take_part(whole: Tensor, shard: Shard, rank: int) -> Tensor:
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
    route = whole_route(shard.owners, dist.get_rank(group))
    return collectives.gather(part, shard.dim, route, group).contiguous()


def gather_named(
    tensors: Mapping[str, Tensor], group: dist.ProcessGroup, *, everywhere: bool
) -> dict[str, Tensor]:
    """Return the tensors of all ranks of a group; where several have a name, the first's tensor.

    Args:
        tensors: this rank's tensors, whole, by name.
        group: the ranks; all of them call this.
        everywhere: return them on every rank. Otherwise the group's first rank gets them, and the
            others get their own.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    entries_of_ranks: list[Any] = [None] * world
    own = [(name, tuple(x.shape), x.dtype) for name, x in tensors.items()]
    dist.all_gather_object(entries_of_ranks, own, group=group)
    gathered = dict(tensors)
    seen: set[str] = set()
    device = next(iter(tensors.values())).device if tensors else torch.device("cpu")
    for holder, entries in enumerate(entries_of_ranks):
        for name, shape, dtype in entries:
            if name in seen:
                continue
            seen.add(name)
            if holder == rank:
                whole = tensors[name].contiguous()
            else:
                whole = torch.empty(shape, dtype=dtype, device=device)
            if everywhere:
                dist.broadcast(whole, group=group, group_src=holder)
            elif holder and rank == holder:
                dist.send(whole, group=group, group_dst=0)
            elif holder and rank == 0:
                dist.recv(whole, group=group, group_src=holder)
            if everywhere or rank == 0:
                gathered[name] = whole
    return gathered
