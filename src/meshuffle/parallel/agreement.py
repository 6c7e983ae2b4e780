"""Whether all ranks are about to run the same program: asked once, before they communicate."""

from __future__ import annotations

import hashlib
from types import FunctionType
from typing import Any

import torch.distributed as dist

from meshuffle.errors import RankFailed
from meshuffle.parallel.module import Parallel
from meshuffle.parallel.rank_module import RankModule
from meshuffle.parallel.ranks import Ranks
from meshuffle.planner.schedules import Schedule


def require_agreement(module: RankModule, schedule: Schedule, ranks: Ranks) -> None:
    """Compare what the ranks of a mesh have chosen; all of them call it.

    A rank with another version of the model or of a library would otherwise wait for ever, or
    add what does not belong together.

    Raises:
        RankFailed: names two ranks that differ, and the first op in which they do.
    """
    lines = _choices(module, schedule)
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    for group in (ranks.tp, ranks.dp, ranks.pp):
        if len(set(_gathered(digest, group))) > 1:
            _name_difference(_gathered(lines, group), dist.get_process_group_ranks(group))


def _choices(module: RankModule, schedule: Schedule) -> list[str]:
    """Return the schedule, the cuts, and each op with its layouts, a line each."""
    if not isinstance(module, Parallel):
        return ["the model as it is written"]
    assignment = module.assignment
    ops = []
    for call in assignment.program.calls:
        choice = assignment.choices.get(call.node.name)
        layouts = (choice.inputs, choice.output, choice.split) if choice else ()
        node = call.node
        target = node.target.__name__ if isinstance(node.target, FunctionType) else node.target
        ops.append(f"{node} = {target}{node.args} {node.kwargs or ''} in the layouts {layouts}")
    return [f"the schedule {schedule.orders}", f"the cuts {module.cuts}", *ops]


def _gathered(value: Any, group: dist.ProcessGroup) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def _name_difference(lines_of_ranks: list[list[str]], numbers: list[int]) -> None:
    first = lines_of_ranks[0]
    other = next(i for i, lines in enumerate(lines_of_ranks) if lines != first)
    theirs = lines_of_ranks[other]
    place = next(
        (i for i, (a, b) in enumerate(zip(first, theirs, strict=False)) if a != b),
        min(len(first), len(theirs)),
    )
    has = [lines[place] if place < len(lines) else "no more ops" for lines in (first, theirs)]
    raise RankFailed(
        f"rank {numbers[other]} would run another program than rank {numbers[0]}: it has "
        f"{has[1]}, where that has {has[0]}; do both have the same model, and the same versions "
        "of torch and meshuffle?"
    )
