"""Cuts: the slowest stage is as fast as any cut makes it, and skip connections cross."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from meshuffle.errors import PlanError
from meshuffle.graph import capture
from meshuffle.layout.program import Program
from meshuffle.planner.costs import estimated, measured
from meshuffle.planner.cut import choose_cuts, crossing_bytes, cuts_at, cuts_like


class Skips(nn.Module):
    """A skip over two layers, one over the whole model, a batch norm that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))
        self.norm, self.again = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = self.again(self.layers[0](x))
        b = F.dropout(self.again(self.layers[1](a)), training=self.training)
        left, right = self.layers[2](b).chunk(2, 1)
        c = torch.cat([right, left], 1) + a
        return self.head((self.norm(self.layers[3](c)) + x).mean((2, 3)))


@functools.cache
def program(*, train: bool = True) -> Program:
    return Program(capture(Skips(), torch.empty(2, 4, 8, 8), train=train), 2, 1)


def stage_times(costs: dict[str, float], cuts: tuple[int, ...]) -> list[float]:
    times = [costs.get(call.node.name, 0.0) for call in program().calls]
    bounds = itertools.pairwise([0, *cuts, len(times)])
    return [sum(times[first:last]) for first, last in bounds]


@given(st.integers(2, 4), st.lists(st.integers(0, 20), min_size=40, max_size=40))
def test_no_other_cuts_make_the_slowest_stage_faster(num: int, times: list[int]) -> None:
    names = [call.node.name for call in program().calls]
    costs = {name: float(time) for name, time in zip(names, times, strict=False)}
    crossing = crossing_bytes(program())
    places = [i + 1 for i, size in enumerate(crossing) if size is not None]
    slowest = {c: max(stage_times(costs, c)) for c in itertools.combinations(places, num - 1)}
    found = choose_cuts(program(), costs, num)
    assert found in slowest
    best = min(slowest.values())
    assert slowest[found] <= 1.02 * best + 1e-9
    sent = {c: sum(crossing[i - 1] or 0 for i in c) for c in slowest}
    assert sent[found] == min(sent[c] for c in slowest if slowest[c] <= 1.02 * best + 1e-9)


def test_skips_cross_and_what_belongs_together_stays() -> None:
    calls = [call.node for call in program().calls]
    live = [[node.name for node in nodes] for nodes in program().live_behind()]
    crossing = crossing_bytes(program())
    names = [node.name for node in calls]
    assert all("x" in values for values in live[: names.index("add_1")])
    assert live[names.index("add_1")] == ["add_1"]
    first, second = (i for i, node in enumerate(calls) if "batch_norm" in node.name and i < 6)
    assert crossing[first:second] == [None] * (second - first)  # one buffer, updated twice
    chunk = names.index("chunk")
    assert crossing[chunk] is None and crossing[-1] is None
    behind = names.index("conv2d_3")
    assert crossing[behind] == 4 * 2 * 4 * 8 * 8 * 2  # x and the convolution's result


@pytest.mark.parametrize("num", [2, 3, 4])
def test_eval_mode_keeps_each_parameter_where_it_is(num: int) -> None:
    cuts = choose_cuts(program(), estimated(program()), num)
    stages: dict[str, set[int]] = {}
    for stage, (first, last) in enumerate(itertools.pairwise([0, *cuts, len(program().calls)])):
        for call in program().calls[first:last]:
            for source in call.inputs:
                if source.name in program().graph.names:
                    stages.setdefault(program().graph.names[source.name], set()).add(stage)
    other = program(train=False)
    again = cuts_like(other, {name: frozenset(found) for name, found in stages.items()}, num)
    assert len(again) == num - 1
    for stage, (first, last) in enumerate(itertools.pairwise([0, *again, len(other.calls)])):
        for call in other.calls[first:last]:
            names = {other.graph.names.get(source.name) for source in call.inputs} & set(stages)
            assert all(stage in stages[name] for name in names)


def test_eval_mode_where_stages_have_no_parameters() -> None:
    other, crossing = program(train=False), crossing_bytes(program(train=False))
    names = {"layers.2.weight": 2, "head.weight": 5}
    stages = {name: frozenset([stage]) for name, stage in names.items()}
    cuts = cuts_like(other, stages, 6)
    assert list(cuts) == sorted(set(cuts)) and len(cuts) == 5
    assert all(crossing[place - 1] is not None for place in cuts)
    for i, call in enumerate(other.calls):
        for name in {other.graph.names.get(source.name) for source in call.inputs} & set(names):
            assert sum(place <= i for place in cuts) == names[name]


def test_eval_mode_that_uses_parameters_in_another_order() -> None:
    stages = {"layers.2.weight": frozenset([1]), "layers.3.weight": frozenset([0])}
    with pytest.raises(PlanError, match="conv2d_3 would be in another stage"):
        cuts_like(program(train=False), stages, 2)


def test_cuts_by_name_and_those_that_do_not_fit() -> None:
    names = [call.node.name for call in program().calls]
    places = choose_cuts(program(), estimated(program()), 3)
    assert cuts_at(program(), [names[i] for i in places]) == places
    assert cuts_at(program(), [names[i] for i in reversed(places)]) is None
    assert cuts_at(program(), ["no_such_value"]) is None
    behind_chunk = names[names.index("chunk") + 1]
    assert cuts_at(program(), [behind_chunk]) is None


def test_more_stages_than_places() -> None:
    with pytest.raises(PlanError, match=r"99 pipeline stages: .* use at most \d+"):
        choose_cuts(program(), {}, 99)


def test_costs_have_every_call() -> None:
    names = {call.node.name for call in program().calls}
    for costs in (estimated(program()), measured(program(), torch.device("cpu"))):
        assert names <= set(costs)
        assert all(seconds >= 0 for seconds in costs.values())
    convs = [estimated(program())[name] for name in names if name.startswith("conv2d")]
    assert min(convs) > 0
