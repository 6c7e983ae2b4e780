"""From a model and a plan to what one rank runs, where layers are split or stages are cut.

schedule ──▶ capture ──▶ layouts ──▶ cuts ──▶ one rank's code ──▶ its groups ──▶ its pipeline
             └────────────── parallel.module ──────────────┘
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from meshuffle.layout.mixing import refuse_mixing
from meshuffle.parallel.module import Costs, Parallel
from meshuffle.parallel.pipeline import Pipeline
from meshuffle.parallel.ranks import Ranks
from meshuffle.planner.costs import estimated
from meshuffle.planner.plan import Plan
from meshuffle.planner.schedules import make_schedule


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
) -> Parallel:
    """Return this rank's part of `model`, which communicates in the groups of `ranks`.

    Args:
        model: whole, in the mode that it is first run in; it is not changed.
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
            can be split.
    """
    num = num_micro_batches or plan.num_micro_batches
    schedule = make_schedule(plan.pp_kind, plan.pp, num)
    tp_rank, pp_rank = (ranks.tp_rank, ranks.pp_rank) if ranks else (0, 0)
    part = Parallel(
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
    if plan.dp * num > 1 and not allow_inexact:
        refuse_mixing(part.assignment.program.graph, type(model).__name__, str(plan))
    if ranks is not None:
        part.bind(ranks)
        if plan.pp > 1 or always_pipeline:
            Pipeline(part, ranks, schedule)
    return part
