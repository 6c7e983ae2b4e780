"""Collectives that differentiate, for values inside one model.

The gradient convention: the gradient of a value that all ranks hold is, again, whole on all
ranks. So each collective has the backward that keeps it so:

    collective   a rank's input → output                  backward
    psum         a term of a sum → the sum                nothing
    pvary        the whole → the whole, used in part      sum over ranks
    divide       the whole → a term of a sum              nothing
    gather       its part → the whole                     its part of the gradient
    exchange     its part → the part that it needs next   each element's gradients return, summed
    scatter      the whole → its part                     gather of the parts
    scatter_sum  a term of a sum → its part of the sum    gather of the parts
    transpose    its part of a dim → a part of another    each element's gradients return, summed

(torch's own functional all-reduce and all-gather sum in both directions, which would count such
a gradient once per rank.) They are functional collectives underneath, so a module that calls
them prints, exports and compiles. A result may be a view of the input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from meshuffle.comm.primitives import (
    Parts,
    added,
    all_reduce,
    all_to_all,
    flat,
    in_order,
    inserted,
    same,
    select,
    summed,
    swap,
    unselect,
)


@dataclass(frozen=True)
class Route:
    """One rank's part in an exchange along one dim; made by `layout.routes.routes`.

    What the rank holds itself is not sent; among what arrives it is in the ranks' order, behind
    `before` elements of the ranks in front.

    Attributes:
        size: elements that the rank holds.
        kept_index: local positions of those that it needs itself.
        send_index: local positions that it sends to others, one receiver after the other.
        send_splits: how many to each rank, none to itself.
        receive_splits: how many from each rank, none from itself.
        before: how many from the ranks in front of it.
        receive_index: output position j is the element `receive_index[j]` of what arrives.
        own_index: output positions of what the rank holds itself, in the order of its memory.
        communicates: whether any rank sends anything to another; the same on all ranks.
    """

    size: int
    kept_index: tuple[int, ...]
    send_index: tuple[int, ...]
    send_splits: tuple[int, ...]
    receive_splits: tuple[int, ...]
    before: int
    receive_index: tuple[int, ...]
    own_index: tuple[int, ...]
    communicates: bool


@dataclass(frozen=True)
class TransposeRoute:
    """One rank's part in a `transpose`: every rank has the same but for `rank`.

    Attributes:
        rank: whose part it is.
        from_dim: the dim that is in parts before, and whole afterwards.
        to_dim: the dim that is whole before, and in parts afterwards.
        owners: for each rank the indices along `from_dim` that it holds; a partition.
        needs: for each rank the indices along `to_dim` that it shall hold next, in that order.
            Some may be needed on several ranks, as in a halo, or on none.
    """

    rank: int
    from_dim: int
    to_dim: int
    owners: Parts
    needs: Parts

    def __post_init__(self) -> None:
        """Require two dims, a partition, and of each rank to need an index once."""
        held = sorted(flat(self.owners))
        if (
            not 0 <= self.rank < len(self.owners) == len(self.needs)
            or min(self.from_dim, self.to_dim) < 0
            or self.from_dim == self.to_dim
            or held != list(range(len(held)))
            or any(len(set(need)) < len(need) or min(need, default=0) < 0 for need in self.needs)
        ):
            raise ValueError(f"not a route from one dim's parts to another's: {self!r}")


def psum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the sum of all ranks' `x`; the gradient passes as it is."""
    return _Linear.apply(x, all_reduce, _identity, group)


def pvary(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return `x`, which all ranks hold and each uses in its own way; gradients are summed."""
    return _Linear.apply(x, _aliased, all_reduce, group)


def divide(x: Tensor, world: int) -> Tensor:
    """Return this rank's term of a sum that is `x`, which all ranks hold: x / world."""
    return _Linear.apply(x, torch.div, _identity, world)


def gather(x: Tensor, dim: int, route: Route, group: dist.ProcessGroup) -> Tensor:
    """Return the whole, on all ranks, of which `x` is this rank's part along `dim`.

    Args:
        route: one that needs every element on every rank.
    """
    return _Linear.apply(x, _send, _own_part, dim, route, group)


def scatter(x: Tensor, dim: int, route: Route, group: dist.ProcessGroup) -> Tensor:
    """Return this rank's part along `dim` of `x`, which all ranks hold; `gather` transposed.

    Args:
        route: the route that `gather` would take: it needs every element on every rank.
    """
    return _Linear.apply(x, _own_part, _send, dim, route, group)


def exchange(x: Tensor, dim: int, route: Route, group: dist.ProcessGroup) -> Tensor:
    """Return what this rank needs of all ranks' parts along `dim`.

    Where the route stays on each rank it is an `index_select`, and nothing is sent.
    """
    return _Linear.apply(x, _send, _send_back, dim, route, group)


def scatter_sum(x: Tensor, dim: int, owners: Parts, rank: int, group: dist.ProcessGroup) -> Tensor:
    """Return this rank's part of the sum of all ranks' `x`, added in the order of the ranks.

    Args:
        dim: from 0.
        owners: for each rank the indices along `dim` that it gets; a partition.
        rank: this one.
    """
    return _Linear.apply(x, _sum_parts, _join_parts, dim, owners, rank, group)


def transpose(x: Tensor, route: TransposeRoute, group: dist.ProcessGroup) -> Tensor:
    """Return what this rank needs along one dim, whole along the other, with one all-to-all.

    Args:
        x: along `route.from_dim` what this rank owns; whole along `route.to_dim`.

    Returns:
        `route.from_dim` whole and in order; along `route.to_dim` what this rank needs.
    """
    return _Linear.apply(x, _transpose, _transpose_back, route, x.shape[route.to_dim], group)


class _Linear(Function):
    """A linear map in the forward pass, and its transpose in the backward pass.

    Both take a tensor, then the same further arguments.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Any, backward: Any, *arguments: Any) -> Tensor:
        ctx.transposed, ctx.arguments = backward, arguments
        y: Tensor = forward(x, *arguments)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rest = (None,) * (2 + len(ctx.arguments))
        return ctx.transposed(grad, *ctx.arguments), *rest


def _identity(grad: Tensor, _: Any) -> Tensor:
    return grad


def _aliased(x: Tensor, _: Any) -> Tensor:
    return same(x)


def _own_part(x: Tensor, dim: int, route: Route, _: dist.ProcessGroup) -> Tensor:
    _require_size(x, dim, len(route.receive_index))
    return select(x, dim, route.own_index)


def _send_back(grad: Tensor, dim: int, route: Route, group: dist.ProcessGroup) -> Tensor:
    num_kept, num_arrived = len(route.kept_index), len(route.receive_index)
    arrived = unselect(grad, dim, route.receive_index, num_arrived)
    sizes = [route.before, num_kept, num_arrived - route.before - num_kept]
    before, kept, after = arrived.split(sizes, dim)
    total = unselect(kept, dim, route.kept_index, route.size)
    if route.communicates:
        others = torch.cat([before, after], dim)
        back = all_to_all(others, dim, route.receive_splits, route.send_splits, group)
        total = added(total, dim, route.send_index, back)
    return total


def _sum_parts(x: Tensor, dim: int, owners: Parts, rank: int, group: dist.ProcessGroup) -> Tensor:
    _require_size(x, dim, len(flat(owners)))
    shape = _resized(x, {dim: len(owners[rank])})
    first, *others = swap(x, dim, owners, [shape] * len(owners), group)
    return sum(others, first)


def _join_parts(
    grad: Tensor, dim: int, owners: Parts, rank: int, group: dist.ProcessGroup
) -> Tensor:
    all_of_it = (tuple(range(len(owners[rank]))),) * len(owners)
    shapes = [_resized(grad, {dim: len(part)}) for part in owners]
    return in_order(swap(grad, dim, all_of_it, shapes, group), dim, owners)


def _transpose(x: Tensor, route: TransposeRoute, _: int, group: dist.ProcessGroup) -> Tensor:
    _require_size(x, route.from_dim, len(route.owners[route.rank]))
    needed = len(route.needs[route.rank])
    shapes = [
        _resized(x, {route.from_dim: len(part), route.to_dim: needed}) for part in route.owners
    ]
    parts = swap(x, route.to_dim, route.needs, shapes, group)
    return in_order(parts, route.from_dim, route.owners)


def _transpose_back(
    grad: Tensor, route: TransposeRoute, size: int, group: dist.ProcessGroup
) -> Tensor:
    owned = len(route.owners[route.rank])
    shapes = [
        _resized(grad, {route.from_dim: owned, route.to_dim: len(need)}) for need in route.needs
    ]
    parts = swap(grad, route.from_dim, route.owners, shapes, group)
    return summed(parts, route.to_dim, route.needs, size)


def _send(x: Tensor, dim: int, route: Route, group: dist.ProcessGroup) -> Tensor:
    _require_size(x, dim, route.size)
    arrived = select(x, dim, route.kept_index)
    if route.communicates:
        sent = select(x, dim, route.send_index)
        received = all_to_all(sent, dim, route.send_splits, route.receive_splits, group)
        arrived = inserted(arrived, received, dim, route.before)
    return select(arrived, dim, route.receive_index)


def _require_size(x: Tensor, dim: int, size: int) -> None:
    if x.shape[dim] != size:
        raise ValueError(f"dim {dim} of {tuple(x.shape)} must be {size}")


def _resized(x: Tensor, sizes: dict[int, int]) -> list[int]:
    return [sizes.get(dim, size) for dim, size in enumerate(x.shape)]
