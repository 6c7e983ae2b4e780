"""A pipeline as its users call it; that it computes what one device does is tested by verify."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshuffle.comm.group import new_group
from meshuffle.parallel.module import Parallel
from meshuffle.parallel.pipeline import Pipeline
from meshuffle.parallel.ranks import join
from meshuffle.planner.plan import parse_plan
from meshuffle.planner.schedules import make_schedule
from tests.ranks import run_ranks


class Gated(nn.Module):
    """Its last layers are scaled by a table that no way from their input leads past."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.table, self.head = nn.Embedding(1, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate = torch.sigmoid(self.table.weight)
        return self.head(self.layers(x) * gate), gate.sum() + x.new_zeros(())


def make() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Gated().double().train(), torch.randn(7, 6, dtype=torch.float64)


def loss_of(result: Any) -> Tensor:
    outputs, gate = result
    return outputs.square().sum() + 3 * gate


def run(group: dist.ProcessGroup, text: str, edge_groups: bool) -> dict[str, Any]:
    plan = parse_plan(text)
    ranks = join(plan, torch.device("cpu"))
    schedule = make_schedule(plan.pp_kind, plan.pp, plan.num_micro_batches)
    model, x = make()
    stages = schedule.stages_of(ranks.pp_rank)
    split = Parallel(model, (x[:2],), 1, 0, num_stages=schedule.num_stages, stages=stages)
    pipeline = Pipeline(split.bind(ranks), ranks, schedule, edge_groups=edge_groups)
    parts = x.tensor_split(plan.num_micro_batches)
    sizes = [len(part) for part in parts]
    pipeline.train(sizes, lambda i: (parts[i],), lambda _, result: loss_of(result))
    gradients = {name: p.grad.clone() for name, p in split.named_parameters()}
    pipeline.train(sizes[:1], lambda i: (parts[i],), lambda _, result: loss_of(result))
    again = {name: p.grad for name, p in split.named_parameters()}
    split.eval()
    return {"gradients": gradients, "again": again, "outputs": split(x)}


@pytest.mark.parametrize(
    ("text", "edge_groups"), [("pp=2:zero-bubble,mb=4", True), ("pp=2,mb=3", False)]
)
def test_gradients_fewer_micro_batches_and_whole_outputs(text: str, edge_groups: bool) -> None:
    found = run_ranks(run, 2, text, edge_groups)
    model, x = make()
    parts = x.tensor_split(parse_plan(text).num_micro_batches)
    for kind in ("gradients", "again"):
        for part in parts if kind == "gradients" else parts[:1]:
            loss_of(model(part)).backward()
        for rank in found:
            for name, grad in rank[kind].items():
                torch.testing.assert_close(grad, model.get_parameter(name).grad)
        names = [name for rank in found for name in rank[kind]]
        assert set(names) == {name for name, _ in model.named_parameters()}
    for rank in found:
        torch.testing.assert_close(rank["outputs"], model.eval()(x))


class Half(nn.Module):
    """Half of what `second` makes is used: a view, and where it is cut, the result of a stage."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x).tanh())[:, :4].tanh())


class Saved(nn.Module):
    """The layer `third` keeps its input, which is a result of its own stage, for its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8)
        self.third, self.fourth = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x).tanh()).tanh()
        return self.fourth(y + self.third(y))


CUTS = {Half: ("tanh", "tanh_1", "linear_2"), Saved: ("linear_1", "add", "linear_3")}


def make_of(kind: type[nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return kind().double().train(), torch.randn(8, 6, dtype=torch.float64)


def run_cut(group: dist.ProcessGroup, kind: type[nn.Module]) -> dict[str, Tensor]:
    ranks, schedule = join(parse_plan("pp=2"), torch.device("cpu")), make_schedule("zbv", 2, 4)
    (model, x), stages = make_of(kind), schedule.stages_of(ranks.pp_rank)
    cuts = CUTS[kind]
    split = Parallel(model, (x[:2],), 1, 0, num_stages=4, stages=stages, cuts=cuts)
    assert split.cuts == cuts
    pipeline, parts = Pipeline(split.bind(ranks), ranks, schedule), x.chunk(4)
    pipeline.train([2] * 4, lambda i: (parts[i],), lambda _, result: result.square().sum())
    return {name: p.grad.clone() for name, p in split.named_parameters()}


@pytest.mark.parametrize("kind", CUTS)
def test_a_stage_whose_results_torch_may_not_detach_in_place(kind: type[nn.Module]) -> None:
    found = run_ranks(run_cut, 2, kind)
    model, x = make_of(kind)
    model(x).square().sum().backward()
    for name, grad in (pair for rank in found for pair in rank.items()):
        torch.testing.assert_close(grad, model.get_parameter(name).grad)


class Tied(nn.Module):
    """Its first and last layers share their weights; what lies between has nothing of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.third.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x).tanh()).tanh())


def run_tied(group: dist.ProcessGroup, edge_groups: bool) -> tuple[list[Tensor], float]:
    ranks, schedule = join(parse_plan("pp=3"), torch.device("cpu")), make_schedule("1f1b", 3, 3)
    (model, x), stages = make_of(Tied), schedule.stages_of(ranks.pp_rank)
    cuts = ("linear_1", "linear_2")
    split = Parallel(model, (x[:2],), 1, 0, num_stages=3, stages=stages, cuts=cuts)
    pipeline = Pipeline(split.bind(ranks), ranks, schedule, edge_groups=edge_groups)
    parts = x.tensor_split(3)
    sizes = [len(part) for part in parts]
    pipeline.train(sizes, lambda i: (parts[i],), lambda _, result: result.square().sum())
    pipeline.sum_tied()
    shared = [p.grad for name, p in split.named_parameters() if p is not None and "weight" in name]
    later = torch.ones(())
    dist.all_reduce(later, group=new_group())  # the middle rank has no part in what is tied
    return [grad for grad in shared if grad is not None], float(later)


@pytest.mark.parametrize("edge_groups", [True, False])
def test_groups_are_made_by_all_ranks_so_that_later_ones_meet(edge_groups: bool) -> None:
    found = run_ranks(run_tied, 3, edge_groups)
    model, x = make_of(Tied)
    model(x).square().sum().backward()
    assert [later for _, later in found] == [3.0, 3.0, 3.0]
    for (gradients, _), layer in zip(found, ("first", "second", "third"), strict=True):
        (grad,) = gradients
        torch.testing.assert_close(grad, model.get_submodule(layer).weight.grad)
