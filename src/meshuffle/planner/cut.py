"""Where a program is cut into pipeline stages: anywhere between two calls, not at module names.

Stages are consecutive calls. What a later stage reads crosses every cut on its way, a skip
connection too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import Node

from meshuffle.errors import PlanError
from meshuffle.graph.node import is_in_place, is_tensor, memory_owners
from meshuffle.layout.program import Program
from meshuffle.planner.schedules import Schedule

aten = torch.ops.aten

_SLACK = 1.02  # of the slowest stage: worth so much less crossing


def crossing_bytes(program: Program) -> list[int | None]:
    """Return the bytes that cross a cut behind each call; None where no cut can be.

    No cut can be behind the last call; between a call with several results and the calls that take
    them apart; while memory that is changed in place is known by another name too; and between two
    calls that update the same buffer.
    """
    calls = [call.node for call in program.calls]
    owners = memory_owners(calls)
    pinned = {owners.get(n, n) for n in calls if n.name in program.pinned}
    together = _updating_together(program)
    crossing: list[int | None] = []
    for i, values in enumerate(program.live_behind()):
        whole = all(is_tensor(n) and owners.get(n, n) not in pinned for n in values)
        whole = whole and not any(first <= i < last for first, last in together)
        crossing.append(sum(map(program.num_bytes, values)) if whole and values else None)
    return [*crossing[:-1], None]


def cuts_at(program: Program, names: Sequence[str]) -> tuple[int, ...] | None:
    """Return the cuts in front of the calls that make these values.

    None where the program has no such calls, or cannot be cut there. The program of a model may
    change with which of its parts are trained.
    """
    places = {call.node.name: i for i, call in enumerate(program.calls)}
    cuts = tuple(places.get(name, 0) for name in names)
    crossing = crossing_bytes(program)
    fits = list(cuts) == sorted(set(cuts)) and all(i and crossing[i - 1] for i in cuts)
    return cuts if fits else None


def _updating_together(program: Program) -> list[tuple[int, int]]:
    """Return (first, last) call of those that read a buffer or parameter which one may update."""
    nodes = list(program.fx.nodes)
    owners = memory_owners(nodes)
    changed = {owners[node] for node in nodes if is_in_place(node)}
    norms = (aten.batch_norm, aten.instance_norm)
    readers: dict[Node, list[int]] = {}
    for i, call in enumerate(program.calls):
        for owner in {owners[source] for source in call.inputs}:
            if owner.op == "placeholder":
                readers.setdefault(owner, []).append(i)
        if call.packet in norms:
            changed |= {source for source in call.inputs if not program.has_grad(source)}
    return [(places[0], places[-1]) for owner, places in readers.items() if owner in changed]


def refuse_overlap(
    program: Program, stages_of: Mapping[str, frozenset[int]], schedule: Schedule
) -> None:
    """Refuse to change a weight in a forward while the backward of the one before is to come.

    Args:
        stages_of: the stages that have each parameter, by the model's names.

    Raises:
        PlanError: the model changes a trained parameter in its forward, in such a stage.
    """
    graph, nodes = program.graph, list(program.graph.nodes())
    owners = memory_owners(nodes)
    for owner in {owners[node] for node in nodes if is_in_place(node)}:
        name = graph.names.get(owner.name, "")
        for stage in stages_of[name] if graph.is_trained(owner.name) else ():
            order = schedule.orders[schedule.ranks[stage]]
            if "FF" in "".join(action.work for action in order if action.stage == stage):
                raise PlanError(
                    f"the model changes {name} in its forward, and its pipeline stage goes forward "
                    "twice before it goes back; use mb=1"
                )


def cuts_like(
    program: Program, stages: Mapping[str, frozenset[int]], num_stages: int
) -> tuple[int, ...]:
    """Return the cuts of another program of the same model, each as late as it can be.

    Args:
        program: for example that of eval mode.
        stages: the stages that have each parameter and buffer, by the model's names.
        num_stages: how many there are; some may have no parameters.

    Raises:
        PlanError: this program uses them in another order, or has too few places to cut.
    """
    crossing = crossing_bytes(program)
    reached: list[set[int]] = []  # the stages in which a call can be, after those before it
    for i, call in enumerate(program.calls):
        names = (program.graph.names.get(source.name, "") for source in call.inputs)
        allowed = [stages[name] for name in names if name in stages]
        possible = reached[-1] if reached else {0}
        if i and crossing[i - 1] is not None:
            possible = possible | {stage + 1 for stage in possible}
        reached.append(possible.intersection(range(num_stages), *allowed))
    stage, cuts = num_stages - 1, list[int]()
    if not reached or stage not in reached[-1]:
        wrong = next((i for i, possible in enumerate(reached) if not possible), len(reached) - 1)
        raise PlanError(
            f"{num_stages} pipeline stages: eval mode cannot be cut like train mode, its "
            f"{program.calls[wrong].node.name} would be in another stage; use fewer stages"
        )
    for i in range(len(reached) - 1, 0, -1):
        if crossing[i - 1] is not None and stage - 1 in reached[i - 1]:
            cuts.append(i)
            stage -= 1
    return tuple(reversed(cuts))


def choose_cuts(program: Program, costs: Mapping[str, float], num_stages: int) -> tuple[int, ...]:
    """Return how many calls lie in front of each cut.

    The slowest stage is as fast as it can be. Among the cuts that come within 2 % of that, those
    are taken across which the fewest bytes go.

    Args:
        program: the program to cut.
        costs: seconds of each call, forward and backward, by name; see `costs`.
        num_stages: one more than cuts.

    Raises:
        PlanError: there are fewer places to cut than that.
    """
    if num_stages == 1:
        return ()
    crossing = crossing_bytes(program)
    places = [i + 1 for i, size in enumerate(crossing) if size is not None]
    if len(places) < num_stages - 1:
        raise PlanError(
            f"{num_stages} pipeline stages: this model can be cut in {len(places)} places only; "
            f"use at most {len(places) + 1}"
        )
    before = torch.tensor([costs.get(c.node.name, 0.0) for c in program.calls]).double().cumsum(0)
    ends = torch.tensor([0, *places, len(program.calls)])
    clock = torch.cat([before.new_zeros(1), before])[ends]
    sizes = torch.tensor([0.0, *(crossing[place - 1] or 0.0 for place in places), 0.0]).double()
    spans = clock[None, :] - clock[:, None]  # of a stage from place i to place j
    spans.masked_fill_(torch.ones_like(spans).tril().bool(), torch.inf)
    start = torch.full_like(clock, torch.inf)
    start[0] = 0.0
    slowest, _ = _cheapest(start, num_stages, lambda known: torch.maximum(known[:, None], spans))
    fine = torch.where(spans <= slowest * _SLACK + 1e-12, 0.0, torch.inf) + sizes[None, :]
    _, chosen = _cheapest(start, num_stages, lambda known: known[:, None] + fine)
    return tuple(int(ends[i]) for i in chosen)


def _cheapest(
    start: Tensor, num_stages: int, go_on: Callable[[Tensor], Tensor]
) -> tuple[float, list[int]]:
    """Return the least cost of a path from the first place to the last, and the stops on it.

    Args:
        start: 0 at the first place, infinite elsewhere.
        num_stages: steps of the path.
        go_on: takes the costs of being at each place, and returns those of a step from i to j.
    """
    costs, back = start, []
    for _ in range(num_stages):
        costs, came = go_on(costs).min(0)
        back.append(came)
    place, stops = len(costs) - 1, []
    for came in reversed(back[1:]):
        place = int(came[place])
        stops.append(place)
    return float(costs[-1]), stops[::-1]
