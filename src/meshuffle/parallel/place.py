"""Where a rank stands on the mesh of a plan, and the groups and threads that it gets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from meshuffle.comm.device import num_cores
from meshuffle.comm.exchange import Exchange, make_exchange
from meshuffle.comm.group import RankEnv
from meshuffle.parallel.ranks import Ranks, join
from meshuffle.planner.plan import Plan


@dataclass(frozen=True)
class Place:
    """A rank's place on the mesh; the `pp`·`tp` ranks of a replica all see the same samples."""

    dp_rank: int = 0
    dp: int = 1
    tp_rank: int = 0
    tp: int = 1
    pp_rank: int = 0
    pp: int = 1

    @property
    def is_output_rank(self) -> bool:
        """True on the one rank of a replica whose results are counted."""
        return self.tp_rank == 0 and self.pp_rank == 0

    @property
    def is_split(self) -> bool:
        """True where a replica has several ranks."""
        return self.tp * self.pp > 1

    def replica(self, dp_rank: int | None = None) -> list[int]:
        """Return the ranks of a replica, this one's by default, in the world."""
        own = self.dp_rank if dp_rank is None else dp_rank
        rows = [(stage * self.dp + own) * self.tp for stage in range(self.pp)]
        return [row + rank for row in rows for rank in range(self.tp)]


def place_of(plan: Plan, env: RankEnv) -> Place:
    """Return the place of a rank on the mesh (pp, dp, tp); `tp` ranks are neighbours."""
    rest, tp_rank = divmod(env.rank, plan.tp)
    pp_rank, dp_rank = divmod(rest, plan.dp)
    return Place(dp_rank, plan.dp, tp_rank, plan.tp, pp_rank, plan.pp)


def join_ranks(
    plan: Plan, env: RankEnv, device: torch.device, mesh: DeviceMesh | None = None
) -> Ranks | None:
    """Return the groups of the mesh, None for a plan of one rank; every rank calls it.

    Args:
        mesh: of the plan, where it has fewer ranks than were launched; its ranks call this.
    """
    if plan.num_ranks == 1:
        return None
    one_host = env.local_world >= env.world

    def exchange(group: dist.ProcessGroup) -> Exchange:
        return make_exchange(group, device, one_host)

    return Ranks(mesh, exchange) if mesh is not None else join(plan, device, exchange)


def threads_per_rank(plan: Plan, local_world: int | None = None) -> int:
    """Return the plan's threads, or an even share of this host's cores, at least 1."""
    return plan.threads or max(1, num_cores() // (local_world or plan.num_ranks))
