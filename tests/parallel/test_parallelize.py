"""A split model is an ordinary module: it trains, accumulates, evaluates, compiles and copies."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshuffle import parallelize
from meshuffle.errors import ModelError, PlanError
from meshuffle.parallel.module import Parallel
from tests.ranks import run_ranks

BATCH = 6


class Net(nn.Module):
    """Convolutions with batch norm, a shared weight, dropout, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12))
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)
        self.second.weight = self.first.weight
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(12, 5)
        self.scale = torch.linspace(0.5, 1.5, 12, dtype=torch.float64)  # no parameter, no buffer

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.stem(x).relu_()).mean((2, 3)) * self.scale
        return self.head(self.dropout(self.second(self.first(x).tanh())))


def make() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Net().double()
    draws = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, 3, 8, 8, dtype=torch.float64, generator=draws)
    return model, x, torch.randint(5, (BATCH,), generator=draws)


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Accumulate two backward passes; the loss is a mean over x."""
    model.zero_grad()
    for part_x, part_y in ((x, y), (2 * x, y)):
        nn.functional.cross_entropy(model(part_x), part_y).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def without_dropout(model: nn.Module) -> nn.Module:
    model.dropout.p = 0.0  # type: ignore[union-attr]
    return model


def use_as_a_module(group: dist.ProcessGroup, plan: str) -> list[str]:
    """Return what went wrong."""
    wrong: list[str] = []

    def same(what: str, found: Tensor, expected: Tensor) -> None:
        if found.shape != expected.shape or not torch.allclose(found, expected, atol=1e-11):
            wrong.append(what)

    plain, x, y = make()
    without_dropout(plain)
    model = parallelize(without_dropout(make()[0]), example=x, plan=plan)
    if set(model.state_dict()) != set(plain.state_dict()):
        wrong.append(f"names {set(model.state_dict()) ^ set(plain.state_dict())}")
    expected = gradients(plain, x, y)
    for name, grad in gradients(model, x, y).items():
        same(f"gradient of {name}", grad, model.part_of(name, expected[name]))
    for name, buffer in plain.named_buffers():
        same(f"buffer {name}", dict(model.named_buffers())[name], model.part_of(name, buffer))
    same("another batch size", model(x[:3]), plain(x[:3]))
    plain.eval(), model.eval()
    same("eval", model(x), plain(x))
    copied = copy.deepcopy(model)
    for p in copied.parameters():
        p.data.zero_()
    same("a copy shares nothing", model(x), plain(x))
    plain.train(), model.train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    same("compiled", compiled(x), plain(x))
    if "self.tp." not in model.code or model.summary().count("FLOPs") != 1:
        wrong.append("printout")
    return wrong


@pytest.mark.parametrize("plan", ["tp=2:channel", "tp=2:spatial", "tp=2:batch"])
def test_a_split_model_is_a_module(plan: str) -> None:
    assert run_ranks(use_as_a_module, 2, plan) == [[], []]


def average_over_replicas(group: dist.ProcessGroup) -> list[str]:
    plain, x, y = make()
    expected = gradients(without_dropout(plain), x, y)
    rank = dist.get_rank(group) // 2
    half = slice(3 * rank, 3 * rank + 3)
    model = parallelize(without_dropout(make()[0]), example=x[:3], plan="dp=2,tp=2:channel")
    found = gradients(model, x[half], y[half])
    return [
        name
        for name, grad in found.items()
        if not torch.allclose(grad, model.part_of(name, expected[name]), atol=1e-11)
    ]


def test_gradients_are_averaged_over_replicas() -> None:
    assert run_ranks(average_over_replicas, 4) == [[]] * 4


def masks_are_new(group: dist.ProcessGroup) -> list[Tensor]:
    """Return what two forward passes in train mode and one in eval mode give."""
    model, x, _ = make()
    split = parallelize(model, example=x, plan="tp=2:channel")
    return [split(x).detach(), split(x).detach(), split.eval()(x).detach()]


def test_each_forward_draws_new_masks_and_all_ranks_the_same() -> None:
    (first, second, judged), other = run_ranks(masks_are_new, 2)
    assert not torch.allclose(first, second) and not torch.allclose(first, judged)
    for own, theirs in zip((first, second, judged), other, strict=True):
        torch.testing.assert_close(own, theirs)


def mean_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets)


def two_steps(group: dist.ProcessGroup, plan: str) -> dict[str, Tensor]:
    """Return losses, whole gradients that were added up, and the weights behind an update."""
    plan_rank = dist.get_rank(group) if plan.startswith("dp=2") else 0
    model, x, y = make()
    half = slice(3 * plan_rank, 3 * plan_rank + 3) if plan.startswith("dp=2") else slice(None)
    split = parallelize(model, example=x, plan=plan)
    optimizer = torch.optim.SGD(split.parameters(), 0.5)
    found: dict[str, Tensor] = {}
    for i in (0, 1):
        found[f"loss {i}"] = split.forward_backward(x[half], y[half], mean_loss)
    gradients = {f"{name}": p.grad for name, p in split.named_parameters() if p.grad is not None}
    found |= {f"gradient {name}": split.whole(name, grad) for name, grad in gradients.items()}
    optimizer.step()
    found |= {f"state {name}": value for name, value in split.whole_state_dict().items()}
    split.load_whole({k.removeprefix("state "): v for k, v in found.items() if "state" in k})
    return found


def test_one_line_trains_under_every_plan() -> None:
    """Masks, losses, added gradients and weights are the same, split or cut, in 4 micro-batches."""
    plans = ("tp=2:channel,mb=4", "pp=2,mb=4", "pp=2:zero-bubble,mb=4")
    split, *others = (run_ranks(two_steps, 2, plan) for plan in plans)
    for pipeline in others:
        first, last = pipeline
        assert first.keys() | last.keys() == split[0].keys()
        for rank in pipeline:
            for name, value in rank.items():
                torch.testing.assert_close(value, split[0][name], msg=lambda m, n=name: f"{n}: {m}")
    replicas = run_ranks(two_steps, 2, "dp=2")
    whole = run_ranks(two_steps, 1, "dp=1")[0]
    for rank in replicas:
        for name, value in rank.items():
            torch.testing.assert_close(value, whole[name], msg=lambda m, n=name: f"{n}: {m}")


class Unsplittable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(0).cumsum(1)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def bad_input(group: dist.ProcessGroup) -> list[str]:
    x = torch.randn(4, 3)
    told = []
    for model, plan, kind in (
        (nn.Linear(3, 3), "tp=3", PlanError),
        (nn.Linear(3, 3), "pp=2:zbv,mb=4", PlanError),
        (nn.Linear(3, 3), "dp=2:shard", PlanError),
        (nn.Linear(3, 3), "tp=2:width", PlanError),
        (Unsplittable(), "tp=2", PlanError),
        (Branching(), "tp=2", ModelError),
    ):
        try:
            parallelize(model, example=x, plan=plan)
            told.append("nothing")
        except kind as error:
            told.append(str(error))
    return told


def test_what_cannot_be_split_says_why() -> None:
    first, second = run_ranks(bad_input, 2)
    assert first == second
    launched, pipeline, sharded, width, nothing, branch = first
    assert "2 ranks were launched" in launched and "can be cut in 0 places" in pipeline
    assert "parallelize replicates; use dp=2" in sharded
    assert "channel, spatial, batch" in width and "no op of this model can be split" in nothing
    assert "torch.export cannot capture Branching" in branch


def test_lowering_needs_no_ranks() -> None:
    model, x, _ = make()
    parts = [Parallel(model, (x,), 3, rank, prefer="channel") for rank in range(3)]
    sizes = [sum(p.numel() for p in part.parameters()) for part in parts]
    whole = sum(p.numel() for p in model.parameters())
    assert whole <= sum(sizes) <= 1.2 * whole and max(sizes) < 0.5 * whole
    sent = [[(s.name, s.forward, s.backward) for s in part.stage_codes[0].sent] for part in parts]
    assert sent[0] == sent[1] == sent[2]


class Named(nn.Module):
    """Its parts have the names of what `Parallel` has too."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        self.pipeline, self.whole = nn.Linear(8, 8), nn.Linear(8, 2)
        self.device = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.whole(self.pipeline(self.stages(x)) * self.device)


def test_parts_may_have_any_name() -> None:
    model, x = Named(), torch.randn(4, 4)
    split = Parallel(model, (x,), 1, 0)
    other = copy.deepcopy(split)
    for found in (split, other):
        assert torch.equal(found(x), model(x))
        assert sorted(found.state_dict()) == sorted(model.state_dict())
    for parameter in other.parameters():
        parameter.detach().zero_()
    assert torch.equal(split(x), model(x)) and not other(x).any()
