"""A rank's part of a model that is split, with the settings of a training run."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshuffle.config import TrainConfig
from meshuffle.graph import capture
from meshuffle.layout.mixing import refuse_mixing
from meshuffle.layout.program import Program
from meshuffle.layout.traffic import sent_across_cuts
from meshuffle.parallel.build import build
from meshuffle.parallel.module import Parallel
from meshuffle.parallel.rank_module import RankModule
from meshuffle.parallel.ranks import Ranks
from meshuffle.parallel.replica import Replica
from meshuffle.planner.costs import measured
from meshuffle.planner.plan import Plan
from meshuffle.planner.schedules import Schedule, bubble, make_schedule
from meshuffle.train.optimiser import keep_frozen


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
) -> RankModule:
    """Return the part of `model` of a rank.

    Args:
        model: whole; it stays whole, with frozen modules in eval mode for good.
        frozen: modules that keep their batch statistics.
        ranks: where it will run; None only tries whether it can be split so, and exactly.

    Raises:
        ModelError: the model cannot be captured; PlanError: nothing of it can be split.
    """
    keep_frozen(model, frozen)
    example = example_of(model, config, plan)
    return build(
        model.train(),
        (example,),
        plan,
        ranks,
        device,
        num_micro_batches=num_micro_batches(config, plan),
        costs=lambda program: (_measured_by_first if ranks else measured)(program, device),
        allow_inexact=config.allow_inexact or ranks is not None,  # the launcher has asked
    )


def refuse_inexact(model: nn.Module, frozen: list[str], config: TrainConfig, plan: Plan) -> None:
    """Refuse replicas of a model that mixes the samples of a batch.

    Raises:
        ModelError: it does; CaptureError: there is no telling.
    """
    keep_frozen(model, frozen)
    example = torch.empty_like(example_of(model, config, plan), device="cpu")
    refuse_mixing(capture(model.train(), example), config.model, str(plan))


def _measured_by_first(program: Program, device: torch.device) -> dict[str, float]:
    """Return what rank 0 measured while the others waited: all must cut in the same places."""
    seconds = [measured(program, device) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(seconds, src=0)
    assert seconds[0] is not None
    return seconds[0]


def describe_split(model: nn.Module, config: TrainConfig, plan: Plan) -> list[str]:
    """Return lines: what is split, what each rank keeps, what a step sends; what is not equal."""
    if isinstance(model, Replica):
        return [
            f"plan {plan}: {config.model} runs as it is written, since {model.why}; random numbers "
            "other than those of nn.Dropout are each rank's own"
        ]
    if not isinstance(model, Parallel) or not plan.is_split:
        return []
    sent = sum(s.forward + s.backward for code in model.stage_codes for s in code.sent)
    num = num_micro_batches(config, plan)
    sent *= plan.dp * num
    sent += sum(code.reduced_bytes for code in model.stage_codes) * plan.dp
    split = 100 * model.assignment.sharded_fraction()
    parts = [f"{100 * model.kept_fraction:.3g} % of the parameters on the first rank"]
    if plan.tp > 1:
        parts.insert(0, f"{split:.3g} % of the FLOPs are split")
        parts.append(f"{sent / 1e6:.3g} MB sent a step within replicas")
    lines = [f"plan {plan}: {', '.join(parts)}"]
    if plan.pp > 1:
        schedule = schedule_of(config, plan)
        program, size = model.assignment.program, model.assignment.program.batch
        crossing = (
            sent_across_cuts(model.stage_codes, schedule.ranks, program, size) * plan.dp * num
        )
        lines.append(
            f"pipeline: {model.num_stages} stages, {num} micro-batches of {size * plan.dp} images, "
            f"{crossing / 1e6:.3g} MB a step across cuts; "
            f"{100 * bubble(schedule):.3g} % of the time is bubble if the stages are even. "
            "Batch norm sees one micro-batch at a time"
        )
    return lines
