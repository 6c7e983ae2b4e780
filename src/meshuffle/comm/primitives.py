"""What the collectives do to tensors, without their gradients: select, send, put together.

Where indices are a run, a `narrow` selects them: no copy, and no index tensor on the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as functional

Parts = tuple[tuple[int, ...], ...]
"""For each rank indices along one dim, in the order of its memory."""


def flat(parts: Parts) -> tuple[int, ...]:
    """Return all ranks' indices, one rank after the other."""
    return tuple(index for part in parts for index in part)


def all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the sum over ranks."""
    return functional.wait_tensor(functional.all_reduce(x.contiguous(), "sum", group))


def all_to_all(
    x: Tensor,
    dim: int,
    send_splits: tuple[int, ...],
    receive_splits: tuple[int, ...],
    group: dist.ProcessGroup,
) -> Tensor:
    """Send consecutive pieces of `dim` to the ranks, in their order."""
    received = functional.all_to_all_single(
        x.movedim(dim, 0).contiguous(), list(receive_splits), list(send_splits), group
    )
    return functional.wait_tensor(received).movedim(0, dim)


def swap(
    x: Tensor, dim: int, parts: Parts, shapes: Sequence[Sequence[int]], group: dist.ProcessGroup
) -> list[Tensor]:
    """Send `parts[r]` of `dim` to rank r; return the block from each, in the ranks' order.

    Args:
        x: its blocks travel flat, `dim` outermost, so those that arrive may differ in any dim.
        shapes: sizes of the block that arrives from each rank.
    """
    pieces = _pieces(x, dim, parts)
    row, received = math.prod(pieces.shape[1:]), pieces.view(-1)
    sizes = [math.prod(shape) for shape in shapes]
    if len(parts) > 1:
        sent_sizes = [len(part) * row for part in parts]
        received = functional.all_to_all_single(received, sizes, sent_sizes, group)
        received = functional.wait_tensor(received)
    blocks = []
    for piece, shape in zip(received.split(sizes), shapes, strict=True):
        others = list(shape)
        first = others.pop(dim)
        blocks.append(piece.view(first, *others).movedim(0, dim))
    return blocks


def _pieces(x: Tensor, dim: int, parts: Parts) -> Tensor:
    """Return the parts one after the other, contiguous, with `dim` moved to the front."""
    rows, index = x.movedim(dim, 0), flat(parts)
    if not is_run(index) and all(is_run(part) for part in parts):
        return torch.cat([select(rows, 0, part) for part in parts]).contiguous()
    return select(rows, 0, index).contiguous()


def in_order(blocks: list[Tensor], dim: int, owners: Parts) -> Tensor:
    """Return the ranks' parts of `dim` as the whole."""
    arrived = {index: i for i, index in enumerate(flat(owners))}
    return select(torch.cat(blocks, dim), dim, tuple(arrived[i] for i in range(len(arrived))))


def summed(blocks: list[Tensor], dim: int, needs: Parts, size: int) -> Tensor:
    """Return the gradient of what went to the ranks as `needs`, added in the ranks' order."""
    if flat(needs) == tuple(range(size)):
        return torch.cat(blocks, dim)
    shape = list(blocks[0].shape)
    shape[dim] = size
    total = blocks[0].new_zeros(shape)
    for block, need in zip(blocks, needs, strict=True):
        if is_run(need):
            total.narrow(dim, need[0], len(need)).add_(block)
        else:
            total.index_add_(dim, _tensor(need, block), block)
    return total


def select(x: Tensor, dim: int, index: tuple[int, ...]) -> Tensor:
    """Return the elements at `index`; a view where it can be."""
    if index == tuple(range(x.shape[dim])):
        return same(x)
    if is_run(index):
        return x.narrow(dim, index[0], len(index))
    return x.index_select(dim, _tensor(index, x))


def same(x: Tensor) -> Tensor:
    """Return another tensor of the same memory, with the same strides.

    A `view` of one image, N = 1, has another stride of N, and is not taken for channels-last.
    """
    return torch.ops.aten.alias.default(x)


def unselect(grad: Tensor, dim: int, index: tuple[int, ...], size: int) -> Tensor:
    """Return the gradient of `select`'s input of `size` elements: a sum where one went twice."""
    if index == tuple(range(size)):
        return grad
    shape = list(grad.shape)
    shape[dim] = size
    return added(grad.new_zeros(shape), dim, index, grad)


def added(total: Tensor, dim: int, index: tuple[int, ...], x: Tensor) -> Tensor:
    """Return `total` with the elements of `x` added at `index` of `dim`."""
    return total.index_add(dim, _tensor(index, x), x) if index else total


def inserted(own: Tensor, others: Tensor, dim: int, before: int) -> Tensor:
    """Return `others` with `own` behind its first `before` elements of `dim`, laid out as `own`."""
    size = others.shape[dim]
    if not size:
        return own
    shape = [*own.shape[:dim], own.shape[dim] + size, *own.shape[dim + 1 :]]
    is_last = own.ndim == 4 and own.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if is_last else torch.contiguous_format
    whole = torch.empty(shape, dtype=own.dtype, device=own.device, memory_format=layout)
    first, last = others.split([before, size - before], dim)
    return torch.cat([first, own, last], dim, out=whole)


def _tensor(index: tuple[int, ...], x: Tensor) -> Tensor:
    return torch.tensor(index, dtype=torch.int64, device=x.device)


def is_run(index: tuple[int, ...]) -> bool:
    """Tell whether indices are consecutive, and not none."""
    return bool(index) and index == tuple(range(index[0], index[0] + len(index)))
