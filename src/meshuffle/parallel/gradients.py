"""Gradients of a split model after backward: sums over the ranks that each had a part of one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshuffle.dist.sent_bytes import labelled
from meshuffle.parallel.module import Parallel
from meshuffle.parallel.ranks import Ranks


@torch.no_grad()
def sum_gradients(module: Parallel, ranks: Ranks, *, average: bool = False) -> None:
    """Add up gradients in flat buffers: over replicas, and over all ranks where each has a term.

    Args:
        module: behind its backward pass; a parameter without a gradient counts as zero.
        ranks: the mesh.
        average: divide by the number of replicas, for a loss that is a mean over each one's batch.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    terms = [p for name, p in named if name in module.partial]
    whole = [p for name, p in named if name not in module.partial]
    with labelled("parameters"):
        _sum(terms, ranks.every)
        _sum(whole, ranks.dp)
    if average and ranks.dp_world > 1:
        for _, parameter in named:
            if parameter.grad is not None:
                parameter.grad /= ranks.dp_world


def _sum(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
    if dist.get_world_size(group) == 1:
        return
    by_kind: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for parameter in parameters:
        by_kind.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for same in by_kind.values():
        pieces = [_gradient(p).reshape(-1) for p in same]
        flat = torch.cat(pieces)
        dist.all_reduce(flat, group=group)
        for parameter, piece in zip(same, flat.split([len(p) for p in pieces]), strict=True):
            parameter.grad = piece.view_as(parameter)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
