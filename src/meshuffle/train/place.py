"""Where a rank stands in a run, and its part of a model that is split within its layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshuffle.comm.exchange import make_exchange
from meshuffle.comm.group import RankEnv
from meshuffle.config import TrainConfig
from meshuffle.layout.program import Program
from meshuffle.parallel.code import sent_across_cuts
from meshuffle.parallel.module import Parallel
from meshuffle.parallel.pipeline import Pipeline
from meshuffle.parallel.ranks import Ranks, join
from meshuffle.planner.costs import measured
from meshuffle.planner.plan import Plan
from meshuffle.planner.schedules import Schedule, bubble, make_schedule
from meshuffle.train.optimiser import keep_frozen


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
    def speaks(self) -> bool:
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
    """Return the place of a rank; `tp` ranks are neighbours, stages furthest apart."""
    rest, tp_rank = divmod(env.rank, plan.tp)
    pp_rank, dp_rank = divmod(rest, plan.dp)
    return Place(dp_rank, plan.dp, tp_rank, plan.tp, pp_rank, plan.pp)


def join_ranks(plan: Plan, env: RankEnv, device: torch.device) -> Ranks | None:
    """Return the groups of the mesh where models are split; every rank calls it."""
    if plan.tp == plan.pp == 1:
        return None
    one_host = env.local_world >= env.world
    return join(plan, device, lambda group: make_exchange(group, device, one_host))


def num_micro_batches(config: TrainConfig, plan: Plan) -> int:
    """Return the micro-batches of a step: the plan's, or those of `--accumulate`."""
    return plan.num_micro_batches if plan.pp > 1 or plan.mb else config.accumulate


def schedule_of(config: TrainConfig, plan: Plan) -> Schedule:
    """Return the order of stages and micro-batches.

    Raises:
        PlanError: the schedule cannot do with this number of micro-batches.
    """
    return make_schedule(plan.pp_kind, plan.pp, num_micro_batches(config, plan))


def example_of(model: nn.Module, config: TrainConfig, plan: Plan) -> Tensor:
    """Return a replica's micro-batch of the usual size, without memory."""
    assert config.batch is not None and config.input_size is not None
    num, size = config.batch // plan.dp // num_micro_batches(config, plan), config.input_size
    dtype = next(model.parameters()).dtype
    return torch.empty(max(2, num), 3, size, size, dtype=dtype, device="meta")


def split_model(
    model: nn.Module,
    frozen: list[str],
    config: TrainConfig,
    plan: Plan,
    device: torch.device,
    ranks: Ranks | None = None,
) -> Parallel:
    """Return the part of `model` of a rank.

    Args:
        model: whole; it stays whole, with frozen modules in eval mode for good.
        frozen: modules that keep their batch statistics.
        ranks: where it will run; None only tries whether it can be split so.

    Raises:
        ModelError: the model cannot be captured; PlanError: nothing of it can be split.
    """
    keep_frozen(model, frozen)
    example, schedule = example_of(model, config, plan), schedule_of(config, plan)
    split = Parallel(
        model.train(),
        (example,),
        plan.tp,
        ranks.tp_rank if ranks else 0,
        prefer=plan.tp_kind,
        dp=plan.dp,
        device=device,
        num_stages=schedule.num_stages,
        stages=schedule.stages_of(ranks.pp_rank if ranks else 0),
        costs=lambda program: (_measured_by_first if ranks else measured)(program, device),
        cuts=plan.cuts,
    )
    if ranks is not None:
        split.bind(ranks)
        if plan.pp > 1:
            Pipeline(split, ranks, schedule)
    return split


def _measured_by_first(program: Program, device: torch.device) -> dict[str, float]:
    """Return what rank 0 measured while the others waited: all must cut in the same places."""
    told = [measured(program, device) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(told, src=0)
    assert told[0] is not None
    return told[0]


def describe_split(model: Parallel, config: TrainConfig, plan: Plan) -> list[str]:
    """Return lines: what is split, what each rank keeps, what a step sends."""
    sent = sum(s.forward + s.backward for code in model.codes for s in code.sent)
    num = num_micro_batches(config, plan)
    sent *= plan.dp * num
    sent += sum(code.reduced_bytes for code in model.codes) * plan.dp
    split = 100 * model.assignment.sharded_fraction()
    parts = [f"{100 * model.kept_share:.3g} % of the parameters on the first rank"]
    if plan.tp > 1:
        parts.insert(0, f"{split:.3g} % of the FLOPs are split")
        parts.append(f"{sent / 1e6:.3g} MB sent a step within replicas")
    lines = [f"plan {plan}: {', '.join(parts)}"]
    if plan.pp > 1:
        schedule = schedule_of(config, plan)
        program, size = model.assignment.program, model.assignment.program.batch
        crossing = sent_across_cuts(model.codes, program, schedule, size) * plan.dp * num
        lines.append(
            f"pipeline: {model.num_stages} stages, {num} micro-batches of {size * plan.dp} images, "
            f"{crossing / 1e6:.3g} MB a step across cuts; "
            f"{100 * bubble(schedule):.3g} % of the time is bubble if the stages are even. "
            "Batch norm sees one micro-batch at a time"
        )
    return lines
