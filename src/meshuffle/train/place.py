"""Where a rank stands in a run, and its part of a model that is split within its layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshuffle.dist.exchange import make_exchange
from meshuffle.dist.group import RankEnv
from meshuffle.parallel.module import Parallel
from meshuffle.parallel.ranks import Ranks, join
from meshuffle.planner.plan import Plan
from meshuffle.train.config import TrainConfig
from meshuffle.train.optim import keep_frozen


@dataclass(frozen=True)
class Place:
    """One of the `tp` ranks that compute one of the `dp` replicas; all see the same samples."""

    dp_rank: int = 0
    dp: int = 1
    tp_rank: int = 0
    tp: int = 1

    @property
    def speaks(self) -> bool:
        """True on the one rank of a replica whose samples are counted."""
        return self.tp_rank == 0


def place_of(plan: Plan, env: RankEnv) -> Place:
    """Return the place of a rank; those of a replica are neighbours."""
    return Place(env.rank // plan.tp, plan.dp, env.rank % plan.tp, plan.tp)


def join_ranks(plan: Plan, env: RankEnv, device: torch.device) -> Ranks | None:
    """Return the groups of the mesh where models are split; every rank calls it."""
    if plan.tp == 1:
        return None
    one_host = env.local_world >= env.world
    return join(plan, device, lambda group: make_exchange(group, device, one_host))


def example_of(model: nn.Module, config: TrainConfig, plan: Plan) -> Tensor:
    """Return a replica's micro-batch of the usual size, without memory."""
    assert config.batch is not None and config.input_size is not None
    num, size = config.batch // plan.dp // config.accumulate, config.input_size
    dtype = next(model.parameters()).dtype
    return torch.empty(max(2, num), 3, size, size, dtype=dtype, device="meta")


def split_model(
    model: nn.Module,
    frozen: list[str],
    config: TrainConfig,
    plan: Plan,
    device: torch.device,
    rank: int = 0,
) -> Parallel:
    """Return the part of `model` of a rank of the `tp` axis.

    Args:
        model: whole; it stays whole, with frozen modules in eval mode for good.
        frozen: modules that keep their batch statistics.

    Raises:
        ModelError: the model cannot be captured; PlanError: nothing of it can be split.
    """
    keep_frozen(model, frozen)
    example = example_of(model, config, plan)
    return Parallel(
        model.train(), (example,), plan.tp, rank, prefer=plan.tp_kind, dp=plan.dp, device=device
    )


def describe_split(model: Parallel, config: TrainConfig, plan: Plan) -> str:
    """Return one line: what is split, what each rank keeps, what a step sends."""
    sent = sum(s.forward + s.backward for code in model.codes for s in code.sent)
    sent *= plan.dp * config.accumulate
    sent += sum(code.reduced_bytes for code in model.codes) * plan.dp
    split = 100 * model.assignment.sharded_fraction()
    return (
        f"plan {plan}: {split:.3g} % of the FLOPs are split, {100 * kept_share(model):.3g} % of "
        f"the parameters on each rank, {sent / 1e6:.3g} MB sent a step within replicas"
    )


def kept_share(model: Parallel) -> float:
    """Return the part of the parameters' elements that a rank keeps."""
    kept = whole = 0.0
    for name, parameter in model.named_parameters():
        shard = model.shards.get(name)
        kept += parameter.numel()
        length = parameter.shape[shard.dim] if shard else 1
        rest = parameter.numel() // length if length else 0
        whole += rest * shard.size if shard else parameter.numel()
    return kept / max(1.0, whole)


def common_positions(positions: Tensor, place: Place, control: dist.ProcessGroup) -> Tensor:
    """Return the positions of samples that all ranks of this replica could read.

    A file may vanish after one rank has read it. Every rank of every replica calls this.
    """
    lists: list[list[int]] = [[] for _ in range(dist.get_world_size(control))]
    dist.all_gather_object(lists, positions.tolist(), group=control)
    first = place.dp_rank * place.tp
    own = set(lists[first]).intersection(*lists[first : first + place.tp])
    return torch.tensor([position in own for position in positions.tolist()], dtype=torch.bool)
