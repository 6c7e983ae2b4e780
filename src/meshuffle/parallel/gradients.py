"""Gradients of a split model after backward: sums over the ranks that each had a part of one."""

from __future__ import annotations

import torch
import torch.distributed as dist

from meshuffle.comm.sent_bytes import labelled
from meshuffle.parallel.data_parallel import fill_buckets
from meshuffle.parallel.rank_module import RankModule
from meshuffle.parallel.ranks import Ranks


@torch.no_grad()
def sum_gradients(module: RankModule, ranks: Ranks, *, average: bool = False) -> None:
    """Add up gradients in flat buffers: over replicas, and over all ranks where each has a term.

    Args:
        module: behind its backward pass.
        ranks: the mesh.
        average: divide by the number of replicas, for a loss that is a mean over each one's batch.
    """
    with labelled("parameters"):
        for bucket in fill_buckets(module, ranks.dp, module.summed_over_tp, ranks.every):
            dist.all_reduce(bucket.pack(), group=bucket.group)
            bucket.unpack()
    if average and ranks.dp_world > 1:
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter.grad /= ranks.dp_world
