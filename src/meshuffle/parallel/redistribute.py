"""Redistributions as modules: each is one visible line of the lowered code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshuffle.comm import collectives
from meshuffle.comm.primitives import select
from meshuffle.layout.layout import Samples, Shard, Window
from meshuffle.layout.redistribution import Redistribution, Value, held_indices
from meshuffle.layout.routes import routes, whole_route

Run = Callable[[Tensor, Any], Tensor]


class Redistribute(nn.Module):
    """Brings a value from one layout into another.

    Args:
        step: from which layout to which.
        value: sizes of the whole value.
        rank: this rank's number along the `tp` axis.

    Attributes:
        group: the ranks of the axis; it is needed where something is sent.
    """

    group: dist.ProcessGroup | None = None

    def __init__(self, step: Redistribution, value: Value, rank: int) -> None:
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
        if x.is_complex():  # process groups move real numbers only
            pairs = self._runs[batch](torch.view_as_real(x.resolve_conj()), self.group)
            return torch.view_as_complex(pairs.contiguous())
        return self._runs[batch](x, self.group)

    def _prepare(self, batch: int) -> Run:
        """Return the collective with its index lists for this batch."""
        rank, world, name = self.rank, self.value.world, self.step.name
        if name == "pvary":
            return collectives.pvary
        if name == "psum":
            return collectives.psum
        if name == "divide":
            return lambda x, _: collectives.divide(x, world)
        source, target = self.step.source, self.step.target
        parts = source if isinstance(source, Shard | Samples) else target
        assert isinstance(parts, Shard | Samples | Window)
        held, dim = held_indices(parts, self.value, batch), parts.dim
        if name == "take":
            return lambda x, _: select(x, dim, held[rank])
        if name == "scatter_sum":
            return lambda x, group: collectives.scatter_sum(x, dim, held, rank, group)
        if name in _WHOLE:
            run, whole = _WHOLE[name], whole_route(held, rank)
            return lambda x, group: run(x, dim, whole, group)
        assert isinstance(target, Shard | Samples | Window)
        needed = held_indices(target, self.value, batch)
        if dim == target.dim:
            route = routes(held, needed)[rank]
            return lambda x, group: collectives.exchange(x, dim, route, group)
        transposed = collectives.TransposeRoute(rank, dim, target.dim, held, needed)
        return lambda x, group: collectives.transpose(x, transposed, group)

    def extra_repr(self) -> str:
        """Say from which layout to which."""
        return f"{self.step.source} → {self.step.target}"


_WHOLE = {
    "scatter": collectives.scatter,
    "gather": collectives.gather,
    "all_gather": collectives.exchange,
}
"""The collectives between parts and the whole."""
