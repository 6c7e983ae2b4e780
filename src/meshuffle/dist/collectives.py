"""Collectives that differentiate, for values inside one model.

The gradient convention: the gradient of a value that all ranks hold is, again, whole on all
ranks. So each collective has the backward that keeps it so:

    collective   a rank's input → output                  backward
    psum         a term of a sum → the sum                nothing
    pvary        the whole → the whole, used in part      sum over ranks
    gather       its part → the whole                     its part of the gradient
    exchange     its part → the part that it needs next   each element's gradients return, summed

(torch's own functional all-reduce and all-gather sum in both directions, which would count such
a gradient once per rank.) They are functional collectives underneath, so a module that calls
them prints, exports and compiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.distributed import _functional_collectives as functional


@dataclass(frozen=True)
class Route:
    """One rank's part in an exchange along one dim; made by `layout.transfer.routes`.

    Attributes:
        size: elements that the rank holds.
        send_index: local positions that it sends, one receiver after the other.
        send_splits: how many to each rank.
        receive_splits: how many from each rank.
        receive_index: output position j is the received element `receive_index[j]`.
        moves: whether any rank sends anything to another; the same on all ranks.
    """

    size: int
    send_index: tuple[int, ...]
    send_splits: tuple[int, ...]
    receive_splits: tuple[int, ...]
    receive_index: tuple[int, ...]
    moves: bool


def psum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the sum of all ranks' `x`; the gradient passes as it is."""
    return _Psum.apply(x, group)


def pvary(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return `x`, which all ranks hold and each uses in its own way; gradients are summed."""
    return _Pvary.apply(x, group)


def gather(x: Tensor, dim: int, route: Route, group: dist.ProcessGroup) -> Tensor:
    """Return the whole, on all ranks, of which `x` is this rank's part along `dim`.

    Args:
        route: one that needs every element on every rank.
    """
    return _Gather.apply(x, dim, route, group)


def exchange(x: Tensor, dim: int, route: Route, group: dist.ProcessGroup) -> Tensor:
    """Return what this rank needs of all ranks' parts along `dim`.

    Where the route stays on each rank it is an `index_select`, and nothing is sent.
    """
    return _Exchange.apply(x, dim, route, group)


class _Psum(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Pvary(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, ctx.group), None


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, route: Route, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.route, ctx.rank = dim, route, dist.get_rank(group)
        return _send(x, dim, route, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dim, route, rank = ctx.dim, ctx.route, ctx.rank
        received = _unselect(grad, dim, route.receive_index, len(route.receive_index))
        first = sum(route.receive_splits[:rank])
        own = received.narrow(dim, first, route.receive_splits[rank])
        kept = route.send_index[_part(route.send_splits, rank)]
        return _unselect(own, dim, kept, route.size), None, None, None


class _Exchange(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, route: Route, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.route, ctx.group = dim, route, group
        return _send(x, dim, route, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dim, route = ctx.dim, ctx.route
        received = _unselect(grad, dim, route.receive_index, len(route.receive_index))
        if route.moves:
            received = _all_to_all(
                received, dim, route.receive_splits, route.send_splits, ctx.group
            )
        return _unselect(received, dim, route.send_index, route.size), None, None, None


def _send(x: Tensor, dim: int, route: Route, group: dist.ProcessGroup) -> Tensor:
    if x.shape[dim] != route.size:
        raise ValueError(f"dim {dim} of {tuple(x.shape)} must be {route.size}, as its route says")
    sent = _select(x, dim, route.send_index)
    if route.moves:
        sent = _all_to_all(sent, dim, route.send_splits, route.receive_splits, group)
    return _select(sent, dim, route.receive_index)


def _all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return functional.wait_tensor(functional.all_reduce(x.contiguous(), "sum", group))


def _all_to_all(
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


def _select(x: Tensor, dim: int, index: tuple[int, ...]) -> Tensor:
    if index == tuple(range(x.shape[dim])):
        return x.view_as(x)
    return x.index_select(dim, torch.tensor(index, dtype=torch.int64, device=x.device))


def _unselect(grad: Tensor, dim: int, index: tuple[int, ...], size: int) -> Tensor:
    """Return the gradient of `_select`'s input of `size` elements: a sum where one went twice."""
    if index == tuple(range(size)):
        return grad
    shape = list(grad.shape)
    shape[dim] = size
    positions = torch.tensor(index, dtype=torch.int64, device=grad.device)
    return grad.new_zeros(shape).index_add(dim, positions, grad)


def _part(splits: tuple[int, ...], rank: int) -> slice:
    return slice(sum(splits[:rank]), sum(splits[: rank + 1]))
