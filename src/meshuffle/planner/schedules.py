"""Pipeline schedules: the order in which each rank works through stages and micro-batches.

GPipe and 1F1B are written here; the orders of the others are those of torch.distributed.pipelining,
whose classes get stages that only know their place. No process group, no
tensor: an order is plain data.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal, NamedTuple

from torch import nn
from torch.distributed.pipelining import schedules as theirs

from meshuffle.errors import PlanError

Work = Literal["F", "B", "I", "W"]


class Action(NamedTuple):
    """One piece of work of a rank.

    Attributes:
        stage: number in the whole pipeline.
        work: `F` forward, `B` backward, `I` backward to the stage's inputs, `W` to its weights.
        micro_batch: number.
    """

    stage: int
    work: Work
    micro_batch: int

    def __str__(self) -> str:
        """As in the papers' figures: `2F0`."""
        return f"{self.stage}{self.work}{self.micro_batch}"


@dataclass(frozen=True)
class Schedule:
    """Who does what, and when.

    Attributes:
        orders: for each rank of the `pp` axis its actions, in order.
        ranks: for each stage the rank that holds it.
    """

    orders: tuple[tuple[Action, ...], ...]
    ranks: tuple[int, ...]

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline; some schedules give each rank two."""
        return len(self.ranks)

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a step."""
        return 1 + max(action.micro_batch for action in self.orders[0])

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Return the stages that a rank holds, in order."""
        return tuple(stage for stage, holder in enumerate(self.ranks) if holder == rank)

    def split_backwards(self, micro_batch: int) -> frozenset[int]:
        """Return the stages that go back through a micro-batch in two parts, `I` and `W`."""
        actions = (action for order in self.orders for action in order)
        return frozenset(a.stage for a in actions if a.work == "I" and a.micro_batch == micro_batch)


_THEIRS = {
    "interleaved-1f1b": theirs.ScheduleInterleaved1F1B,
    "looped-bfs": theirs.ScheduleLoopedBFS,
    "zero-bubble": theirs.ScheduleInterleavedZeroBubble,
    "zbv": theirs.ScheduleZBVZeroBubble,
    "dualpipev": theirs.ScheduleDualPipeV,
}
_V_SHAPED = ("zbv", "dualpipev")
DEFAULT = "1f1b"


@functools.lru_cache(maxsize=64)
def make_schedule(kind: str | None, pp: int, num_micro_batches: int) -> Schedule:
    """Return a schedule by its name in a plan text; None is 1F1B.

    Sources: GPipe arXiv 1811.06965, 1F1B 1806.03377, interleaved 2104.04473, looped BFS 2211.05953,
    zero bubble 2401.10241, ZBV 2405.15362, DualPipeV from DeepSeek's repository.

    Raises:
        PlanError: the schedule cannot do with so few ranks, or this number of micro-batches.
    """
    kind = kind or DEFAULT
    if kind == "gpipe":
        return all_forward_all_backward(tuple(range(pp)), num_micro_batches)
    if kind == "1f1b" or pp == 1:
        orders = [_one_forward_one_backward(rank, pp, num_micro_batches) for rank in range(pp)]
        return Schedule(tuple(orders), tuple(range(pp)))
    back = reversed(range(pp)) if kind in _V_SHAPED else range(pp)
    ranks = (*range(pp), *back)
    try:
        return Schedule(_their_orders(kind, pp, ranks, num_micro_batches), ranks)
    except ValueError as error:
        text = str(error).rstrip(".")
        raise PlanError(
            f"plan pp={pp}:{kind},mb={num_micro_batches}: {text}; give another mb, or pp={pp}:1f1b"
        ) from None


def all_forward_all_backward(ranks: tuple[int, ...], num_micro_batches: int) -> Schedule:
    """Return GPipe's order, which fits any number of micro-batches.

    Args:
        ranks: the rank that holds each stage.
    """
    orders, numbers = [], range(num_micro_batches)
    for rank in range(max(ranks) + 1):
        own = [stage for stage, holder in enumerate(ranks) if holder == rank]
        forward = [Action(stage, "F", i) for stage in own for i in numbers]
        backward = [Action(stage, "B", i) for stage in reversed(own) for i in numbers]
        orders.append((*forward, *backward))
    return Schedule(tuple(orders), ranks)


def _one_forward_one_backward(rank: int, pp: int, num: int) -> tuple[Action, ...]:
    warm = min(num, pp - rank)
    order = [Action(rank, "F", i) for i in range(warm)]
    for i in range(num):
        order.append(Action(rank, "B", i))
        if i + warm < num:
            order.append(Action(rank, "F", i + warm))
    return tuple(order)


def _their_orders(
    kind: str, pp: int, ranks: tuple[int, ...], num: int
) -> tuple[tuple[Action, ...], ...]:
    stages = [
        SimpleNamespace(
            num_stages=len(ranks),
            group_size=pp,
            group_rank=ranks[stage],
            stage_index=stage,
            is_first=stage == 0,
            is_last=stage == len(ranks) - 1,
            has_backward=True,
            submod=nn.Identity(),
        )
        for stage in range(len(ranks))
    ]
    own = [stage for stage in stages if stage.group_rank == 0]
    made = _THEIRS[kind](own, num, loss_fn=lambda *_: None)
    orders = []
    for rank in range(pp):
        text = " ".join(str(action) for action in made.pipeline_order[rank] if action is not None)
        parts = re.findall(r"(\d+)([FBIW])(\d+)", text)
        orders.append(tuple(Action(int(s), work, int(i)) for s, work, i in parts))
    return tuple(orders)


def timed(schedule: Schedule, *, backward: float = 2.0) -> dict[Action, tuple[float, float]]:
    """Return (begin, end) of each action, in forwards of a stage, where all stages take the same.

    Args:
        backward: time of a whole backward, in forwards; `I` and `W` take half of it each.

    Raises:
        PlanError: the schedule waits for itself.
    """
    cost = {"F": 1.0, "B": backward, "I": backward / 2, "W": backward / 2}
    done: dict[Action, tuple[float, float]] = {}
    clock, place = [0.0] * len(schedule.orders), [0] * len(schedule.orders)
    left = sum(map(len, schedule.orders))
    while left:
        before = left
        for rank, order in enumerate(schedule.orders):
            while place[rank] < len(order):
                action = order[place[rank]]
                needed = needs(action, schedule.num_stages)
                if not all(any(n in done for n in alternatives) for alternatives in needed):
                    break
                ready = [done[n][1] for alternatives in needed for n in alternatives if n in done]
                begin = max([clock[rank], *ready])
                clock[rank] = begin + cost[action.work]
                done[action] = begin, clock[rank]
                place[rank] += 1
                left -= 1
        if left == before:
            stuck = ", ".join(
                str(o[p]) for o, p in zip(schedule.orders, place, strict=True) if p < len(o)
            )
            raise PlanError(f"this schedule waits for itself at {stuck}")
    return done


def bubble(schedule: Schedule, *, backward: float = 2.0) -> float:
    """Return the share of the ranks' time in which they wait, under what `timed` supposes."""
    times = timed(schedule, backward=backward).values()
    busy = sum(end - begin for begin, end in times)
    return 1 - busy / (max(end for _, end in times) * len(schedule.orders))


def needs(action: Action, num_stages: int) -> list[tuple[Action, ...]]:
    """Return what must be done before: for each need, the actions any of which fulfils it."""
    stage, work, i = action
    if work == "F":
        return [(Action(stage - 1, "F", i),)] if stage else []
    if work == "W":
        return [(Action(stage, "I", i),)]
    forward: list[tuple[Action, ...]] = [(Action(stage, "F", i),)]
    if stage + 1 < num_stages:
        forward.append((Action(stage + 1, "B", i), Action(stage + 1, "I", i)))
    return forward
