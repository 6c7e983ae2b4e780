"""This rank's place on the mesh, and the groups that its collectives run in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from meshuffle.comm.exchange import Exchange, GroupExchange, make_exchange
from meshuffle.errors import PlanError
from meshuffle.parallel.random_masks import DrawState
from meshuffle.planner.plan import Plan


class Ranks:
    """The mesh (pp, dp, tp) as seen from one rank; `tp` ranks are neighbours.

    A copy of a module keeps its ranks, so this copies as itself.

    Attributes:
        mesh: DeviceMesh with the axes `pp`, `dp` and `tp`.
        tp, dp, pp: process groups of an axis.
        every: process group of all ranks of one pipeline stage, over `dp` and `tp`.
        draw_state: the state that random numbers depend on.
        over_tp, over_dp: exchanges by which batch norm joins statistics, over both axes and over
            `dp` alone.
        in_replica: for small vectors over the ranks of one replica, `tp` and `pp`.

    Args:
        exchange: makes an exchange of a group; where bytes are counted, one that is seen at c10d.
    """

    def __init__(
        self, mesh: DeviceMesh, exchange: Callable[[dist.ProcessGroup], Exchange] = GroupExchange
    ) -> None:
        self.mesh = mesh
        self.tp, self.dp = mesh.get_group("tp"), mesh.get_group("dp")
        self.pp = mesh.get_group("pp")
        self.tp_rank, self.tp_world = dist.get_rank(self.tp), dist.get_world_size(self.tp)
        self.dp_rank, self.dp_world = dist.get_rank(self.dp), dist.get_world_size(self.dp)
        self.pp_rank, self.pp_world = dist.get_rank(self.pp), dist.get_world_size(self.pp)
        every = self.dp
        if self.tp_world > 1:
            every = mesh["dp", "tp"]._flatten("stage").get_group()
        self.every: dist.ProcessGroup = every
        self.over_dp = exchange(self.dp)
        self.over_tp = exchange(every) if self.tp_world > 1 else self.over_dp
        replica = mesh["pp", "tp"]._flatten("replica").get_group() if self.pp_world > 1 else self.tp
        self.in_replica = exchange(replica)
        self.draw_state = DrawState()

    @functools.cached_property
    def on_host(self) -> tuple[Exchange, Exchange]:
        """`over_tp` and `over_dp` between ranks of one host; all ranks ask for it at once."""
        cpu = torch.device("cpu")
        over_dp = make_exchange(self.dp, cpu, True)
        return make_exchange(self.every, cpu, True) if self.tp_world > 1 else over_dp, over_dp

    @property
    def is_first(self) -> bool:
        """True on the one rank of each replica whose results are counted."""
        return self.tp_rank == 0 and self.pp_rank == 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        """Return itself: process groups are not copied."""
        return self


def join(
    plan: Plan,
    device: torch.device,
    exchange: Callable[[dist.ProcessGroup], Exchange] = GroupExchange,
) -> Ranks:
    """Return the ranks of `plan`, in the process group that is open.

    Args:
        exchange: see `Ranks`.

    Raises:
        PlanError: the group has another number of ranks.
    """
    world = dist.get_world_size()
    if plan.num_ranks != world:
        raise PlanError(
            f"plan {plan} is for {plan.num_ranks} ranks, but {world} ranks were launched; "
            f"use torchrun --nproc-per-node {plan.num_ranks}"
        )
    return Ranks(make_mesh(plan, device), exchange)


def make_mesh(plan: Plan, device: torch.device) -> DeviceMesh:
    """Return the mesh of a plan on the first ranks of the group; all ranks of that call it."""
    ranks = torch.arange(plan.num_ranks).view(plan.pp, plan.dp, plan.tp)
    return DeviceMesh(device.type, ranks, mesh_dim_names=("pp", "dp", "tp"))
