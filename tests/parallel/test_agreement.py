"""Ranks that would run different programs say so before they communicate."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshuffle.errors import RankFailed
from meshuffle.parallel import module as parallel_module
from meshuffle.parallel.build import build
from meshuffle.parallel.ranks import join
from meshuffle.planner.plan import parse_plan
from tests.ranks import run_ranks


class Net(nn.Module):
    def __init__(self, *, newer: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.newer = nn.Linear(8, 8), nn.Linear(8, 8), newer

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x.relu() if not self.newer else x.tanh())


def what_is_said(group: dist.ProcessGroup, plan: str, fault: str) -> str:
    chosen, is_other = parse_plan(plan), dist.get_rank(group) == 1
    ranks = join(chosen, torch.device("cpu"))
    model = Net(newer=is_other and fault == "model")
    if is_other and fault == "layouts":
        assign = parallel_module.assign
        parallel_module.assign = lambda *given, **named: assign(
            *given, **named | {"prefer": "batch"}
        )
    if is_other and fault == "cuts":
        chosen = dataclasses.replace(chosen, cuts=("linear_1",))
    try:
        build(model.train(), (torch.zeros(4, 8),), chosen, ranks, torch.device("cpu"))
    except RankFailed as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("plan", "fault", "says"),
    [
        (
            "dp=2",
            "model",
            "another program than rank 0: it has tanh = aten.tanh.default(linear,)",
        ),
        (
            "tp=2:channel",
            "layouts",
            "it has linear = aten.linear.default(x, p_first_weight, p_first_bias)",
        ),
        ("pp=2,mb=1", "cuts", "it has the cuts ('linear_1',), where that has the cuts"),
        ("dp=2", "", ""),
        ("tp=2", "", ""),
    ],
)
def test_ranks_that_differ_are_named(plan: str, fault: str, says: str) -> None:
    for said in run_ranks(what_is_said, 2, plan, fault):
        assert says in said and bool(said) == bool(fault), said
