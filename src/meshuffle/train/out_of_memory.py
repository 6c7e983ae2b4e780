"""When memory runs out: find the largest batch that fits, and say it."""

from __future__ import annotations

import torch.distributed as dist

from meshuffle.comm.device import is_out_of_memory, release_memory, synchronize
from meshuffle.comm.exchange import GroupExchange
from meshuffle.comm.group import new_group
from meshuffle.data import Batch
from meshuffle.errors import OutOfMemory
from meshuffle.parallel.batch_norm import synchronise_batch_norm
from meshuffle.parallel.rank_module import RankModule
from meshuffle.train.step import Step


def out_of_memory(step: Step, batch: Batch, world: int) -> OutOfMemory:
    """Return the error that names the largest global batch that fits, found by trying.

    Called on the rank whose step failed; nothing here talks to other ranks, so that of a model
    that is split within its layers nothing is tried.
    """
    size = f"{len(batch)} images of {batch.images.shape[2]}×{batch.images.shape[3]} per rank"
    if step.ranks is not None and step.ranks.tp_world * step.ranks.pp_world > 1:
        return OutOfMemory(
            f"out of memory with {size.replace('per rank', 'per replica')}; use a smaller --batch, "
            "--accumulate 2, or a larger tp"
        )
    rank = dist.get_rank()
    alone = new_group([rank], local=True)
    exchange = GroupExchange(alone)
    if isinstance(step.model, RankModule):
        step.model.join_norms(exchange, exchange)
    else:
        synchronise_batch_norm(step.model, exchange)
    fits, fails = 0, max(1, -(-len(batch) // step.num_micro_batches))
    while fails - fits > 1:
        middle = (fits + fails) // 2
        if _fits(step, batch, middle):
            fits = middle
        else:
            fails = middle
    if not fits:
        return OutOfMemory(f"out of memory with {size}: not even 1 image fits; use a smaller model")
    return OutOfMemory(
        f"out of memory with {size}; the largest that fits is {fits}: use --batch "
        f"{fits * world}, or keep the batch and use --accumulate {-(-len(batch) // fits)}"
    )


def _fits(step: Step, batch: Batch, num: int) -> bool:
    """Whether forward and backward of `num` images fit; leaves no gradient behind."""
    step.optimizer.zero_grad(set_to_none=True)
    release_memory(step.device)
    try:
        images = batch.images[:num].to(step.device)
        x_NCHW = step.preprocess.normalise(images)
        step.task.loss_sum(step.model(x_NCHW), batch.targets[:num].to(step.device)).backward()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        step.optimizer.zero_grad(set_to_none=True)
        synchronize(step.device)
    return True
