"""Conversions between layouts, as modules: each is one visible line of the lowered code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function

from meshuffle.dist import collectives
from meshuffle.layout.convert import Step, Value, owners_of
from meshuffle.layout.layout import (
    Layout,
    Partial,
    Replicate,
    Samples,
    Shard,
    Varying,
    Window,
    samples_owners,
)
from meshuffle.layout.transfer import routes
from meshuffle.parallel.ranks import Ranks

Run = Callable[[Tensor, dist.ProcessGroup], Tensor]


class Move(nn.Module):
    """Brings a value from one layout into another.

    Args:
        step: which.
        value: the sizes of the whole.
        rank: of this one along the `tp` axis.
    """

    ranks: Ranks

    def __init__(self, step: Step, value: Value, rank: int) -> None:
        super().__init__()
        self.step, self.value, self.rank = step, value, rank
        self._runs: dict[int, Run] = {}

    def forward(self, x: Tensor, batch: int) -> Tensor:
        """Return this rank's value in the new layout.

        Args:
            x: this rank's value.
            batch: samples of the step, on all ranks of the axis together.
        """
        if batch not in self._runs:
            self._runs[batch] = self._prepare(batch)
        return self._runs[batch](x, self.ranks.tp)

    def _prepare(self, batch: int) -> Run:
        """Return the collective with its index lists for this batch."""
        source, target = self.step.source, self.step.target
        if isinstance(source, Replicate):
            return self._from_whole(target, batch)
        if isinstance(source, Partial):
            return self._from_terms(target, batch)
        assert isinstance(source, Shard | Samples)
        held, dim, rank = self._indices(source, batch), source.dim, self.rank
        if isinstance(target, Replicate | Varying):
            whole = tuple(range(sum(map(len, held))))
            route = routes(held, [whole] * len(held))[rank]
            run = collectives.gather if isinstance(target, Replicate) else collectives.exchange
            return lambda x, group: run(x, dim, route, group)
        assert isinstance(target, Shard | Samples | Window)
        needed = self._indices(target, batch)
        if dim == target.dim:
            route = routes(held, needed)[rank]
            return lambda x, group: collectives.exchange(x, dim, route, group)
        turn = collectives.Turn(rank, dim, target.dim, held, needed)
        return lambda x, group: collectives.transpose(x, turn, group)

    def _from_whole(self, target: Layout, batch: int) -> Run:
        if isinstance(target, Varying):
            return collectives.pvary
        if isinstance(target, Partial):
            world = self.value.world
            return lambda x, _: _Share.apply(x, world)
        assert isinstance(target, Shard | Samples)
        held, dim = self._indices(target, batch), target.dim
        whole = tuple(range(sum(map(len, held))))
        route = routes(held, [whole] * len(held))[self.rank]
        return lambda x, group: collectives.scatter(x, dim, route, group)

    def _from_terms(self, target: Layout, batch: int) -> Run:
        if isinstance(target, Replicate):
            return collectives.psum
        assert isinstance(target, Shard | Samples)
        held, dim, rank = self._indices(target, batch), target.dim, self.rank
        return lambda x, group: collectives.scatter_sum(x, dim, held, rank, group)

    def _indices(self, layout: Shard | Samples | Window, batch: int) -> tuple[tuple[int, ...], ...]:
        if not isinstance(layout, Samples):
            return owners_of(layout, self.value)
        rows = self.value.shape[layout.dim] // self.value.batch
        return samples_owners(rows * batch, batch, self.value.world)

    def extra_repr(self) -> str:
        """Say from which layout to which."""
        return f"{self.step.source} → {self.step.target}"


class _Share(Function):
    """A term of a sum that is `x`: every rank's x / world; the sum's gradient is that of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, world: int) -> Tensor:
        return x / world

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def name_of(step: Step) -> str:
    """Return what the lowered code calls a conversion."""
    source, target = step.source, step.target
    if isinstance(source, Replicate):
        return {Varying: "pvary", Partial: "share"}.get(type(target), "scatter")
    if isinstance(source, Partial):
        return "psum" if isinstance(target, Replicate) else "scatter_sum"
    if isinstance(target, Replicate):
        return "gather"
    if isinstance(target, Varying):
        return "all_gather"
    if isinstance(target, Window):
        return "halo"
    return "exchange" if getattr(source, "dim", 0) == getattr(target, "dim", 0) else "transpose"


def take_samples(x: Tensor, dim: int, rank: int, world: int, batch: int) -> Tensor:
    """Return a rank's samples of a whole tensor."""
    rows = x.shape[dim] // max(1, batch)
    first = rank * (batch // world) + min(rank, batch % world)
    return x.narrow(dim, first * rows, num_samples(rank, world, batch) * rows)


def num_samples(rank: int, world: int, batch: int) -> int:
    """Return how many of `batch` samples a rank has."""
    return batch // world + int(rank < batch % world)


def share_of(count: int, batch: int) -> float:
    """Return `count` as a fraction of `batch`, which may be empty."""
    return count / max(1, batch)


def take(x: Tensor, dim: int, index: tuple[int, ...]) -> Tensor:
    """Return some indices of a dim."""
    first = index[0] if index else 0
    if index == tuple(range(first, first + len(index))):
        return x.narrow(dim, first, len(index))
    return x.index_select(dim, torch.tensor(index, device=x.device))
