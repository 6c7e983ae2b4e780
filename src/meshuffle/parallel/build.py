"""From a model and a plan to what one rank runs: the one way there, for all plans.

schedule ──▶ capture ──▶ layouts ──▶ cuts ──▶ one rank's code ──▶ its groups ──▶ its pipeline
             └────────────── parallel.module ──────────────┘
             └─ where that loses something, dp=N: parallel.replica
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from meshuffle.errors import ModelError
from meshuffle.layout.mixing import refuse_mixing
from meshuffle.parallel.agreement import require_agreement
from meshuffle.parallel.module import Costs, Parallel
from meshuffle.parallel.pipeline import Pipeline
from meshuffle.parallel.rank_module import RankModule
from meshuffle.parallel.ranks import Ranks
from meshuffle.parallel.replica import Replica
from meshuffle.planner.costs import estimated
from meshuffle.planner.plan import Plan
from meshuffle.planner.schedules import Schedule, make_schedule


def build(
    model: nn.Module,
    example: tuple[Tensor, ...],
    plan: Plan,
    ranks: Ranks | None,
    device: torch.device,
    *,
    num_micro_batches: int | None = None,
    costs: Costs = estimated,
    always_pipeline: bool = False,
    allow_inexact: bool = False,
) -> RankModule:
    """Return this rank's part of `model`, which communicates in the groups of `ranks`.

    Under plain dp=N it is the captured program too. A model that cannot be captured, or that does
    what no program holds, or whose program fixes its batch, then runs as it is written.

    Args:
        model: whole, in the mode that it is first run in; it is not changed, but where it runs as
            it is written.
        example: inputs of a replica's micro-batch; only shapes and dtypes count.
        plan: how the model is split.
        ranks: the mesh that this rank has joined. None lowers the first rank's part, which then
            can be counted and printed but not run.
        device: where this rank computes.
        num_micro_batches: micro-batches of a step; None takes the plan's.
        costs: seconds of each call, by name, for choosing cuts where the plan has none.
        always_pipeline: run the model by a pipeline even where it has a single stage, so that a
            step can be cut into micro-batches.
        allow_inexact: do not ask whether the model mixes samples that the plan computes apart.

    Raises:
        ModelError: the model cannot be captured, or mixes such samples; PlanError: nothing of it
            can be split; RankFailed: another rank would run another program.
    """
    num = num_micro_batches or plan.num_micro_batches
    schedule = make_schedule(plan.pp_kind, plan.pp, num)
    module: RankModule
    try:
        module = part = _captured(model, example, plan, ranks, device, schedule, costs)
    except ModelError as error:
        if plan.is_split:
            raise
        module = Replica(model, device, str(error).rpartition("; ")[0] or str(error))  # no advice
    else:
        graph = part.assignment.program.graph
        if plan.dp * num > 1 and not allow_inexact:
            refuse_mixing(graph, type(model).__name__, str(plan))
        if graph.symbol is None and not plan.is_split:
            module = Replica(model, device, "its program fixes the batch")
    if ranks is not None:
        module.bind(ranks)
        require_agreement(module, schedule, ranks)
        if plan.pp > 1 or always_pipeline:
            Pipeline(module, ranks, schedule)
    return module


def _captured(
    model: nn.Module,
    example: tuple[Tensor, ...],
    plan: Plan,
    ranks: Ranks | None,
    device: torch.device,
    schedule: Schedule,
    costs: Costs,
) -> Parallel:
    tp_rank, pp_rank = (ranks.tp_rank, ranks.pp_rank) if ranks else (0, 0)
    return Parallel(
        model,
        example,
        plan.tp,
        tp_rank,
        prefer=plan.tp_kind,
        dp=plan.dp,
        device=device,
        num_stages=schedule.num_stages,
        stages=schedule.stages_of(pp_rank),
        costs=costs,
        cuts=plan.cuts,
    )
