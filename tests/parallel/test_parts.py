"""What training does with a split model besides computing: parts, copies, sums, masks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from meshuffle.layout.layout import Shard
from meshuffle.parallel.data_parallel import DataParallel
from meshuffle.parallel.module import Parallel
from meshuffle.parallel.parts import join_parts, take_part
from meshuffle.parallel.random_masks import DrawState, Dropout, KeyedDropout, draw_key, key_dropout
from meshuffle.parallel.ranks import Ranks, join
from meshuffle.planner.plan import parse_plan
from meshuffle.train import compiling
from tests.ranks import run_ranks

UNEVEN = Shard(1, ((3, 0, 4), (), (1, 2)))


def gathered(group: dist.ProcessGroup) -> list[Tensor]:
    rank = dist.get_rank(group)
    parts = [take_part(x, UNEVEN, rank) for x in wholes()]
    return [join_parts(part, UNEVEN, group) for part in parts]


def wholes() -> list[Tensor]:
    numbers = torch.arange(3 * 5 * 2 * 2, dtype=torch.float64).view(3, 5, 2, 2)
    return [numbers, numbers.contiguous(memory_format=torch.channels_last), numbers.long()]


def test_parts_join_to_the_whole() -> None:
    """Uneven, out of order, and with a rank that has none."""
    for found in run_ranks(gathered, 3):
        assert all(torch.equal(a, b) for a, b in zip(found, wholes(), strict=True))


def test_a_tensor_of_another_size_is_not_cut() -> None:
    """A checkpoint of 6 classes must not pass for one of 5."""
    with pytest.raises(RuntimeError, match=r"dim 1 of \(2, 6\) must be 5"):
        take_part(torch.zeros(2, 6), UNEVEN, 0)


class Tied(nn.Module):
    """A weight under two names, and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8, bias=False)
        self.second = nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.second(torch.relu(self.first(x))))


def split(model: nn.Module, ranks: Ranks, prefer: str | None = None) -> Parallel:
    example = torch.empty(4, 8, dtype=torch.float64)
    made = Parallel(model, (example,), ranks.tp_world, ranks.tp_rank, prefer=prefer)
    return made.bind(ranks)


def use_a_copy(group: dist.ProcessGroup, prefer: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Tied().double()
    stored = copy.deepcopy(model.state_dict())  # the split model may share memory with the model
    ranks = join(parse_plan("tp=2"), torch.device("cpu"))
    first = split(model, ranks, prefer)
    second = copy.deepcopy(first)
    with torch.no_grad():
        for tensor in first.parameters():
            tensor += 1
    second.load_whole(stored)
    with torch.inference_mode():
        output = second.eval()(torch.eye(8, dtype=torch.float64)[:5])
    whole = {name: second.whole(name, part) for name, part in second.state_dict().items()}
    return {"output": output.clone(), "whole": whole, "again": first.eval()(output.clone())}


@pytest.mark.parametrize("prefer", ["channel", "batch"])
def test_a_copy_has_parameters_of_its_own(prefer: str) -> None:
    torch.manual_seed(0)
    model = Tied().double().eval()
    x = torch.eye(8, dtype=torch.float64)[:5]
    for found in run_ranks(use_a_copy, 2, prefer):
        torch.testing.assert_close(found["output"], model(x), rtol=1e-12, atol=1e-12)
        assert found["whole"].keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(found["whole"][name], tensor)
        assert not torch.allclose(found["again"], model(found["output"]))


def compile_it(group: dist.ProcessGroup, prefer: str) -> dict[str, float]:
    """Return how far a compiled step is from an eager one."""
    ranks = join(parse_plan("tp=2"), torch.device("cpu"))
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3)]
    model = nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6 * 4 * 4, 4))
    x = torch.randn(4, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    eager = Parallel(model.double().train(), (x,), 2, ranks.tp_rank, prefer=prefer).bind(ranks)
    other = copy.deepcopy(eager)
    compiled = compiling.compiled(other)
    outputs = eager(x), compiled(x)
    errors = {"output": float((outputs[0] - outputs[1]).detach().abs().max())}
    for output in outputs:
        output.square().sum().backward()
    for (name, a), b in zip(eager.named_parameters(), other.parameters(), strict=True):
        errors[name] = float((a.grad - b.grad).norm() / (a.grad.norm() + 1e-3))  # type: ignore[operator, union-attr]
    for (name, a), b in zip(eager.named_buffers(), other.buffers(), strict=True):
        errors[name] = float((a - b).abs().max()) if a.numel() else 0.0
    return errors


@pytest.mark.slow
@pytest.mark.skipif(bool(compiling.compiler_missing()), reason=compiling.compiler_missing())
@pytest.mark.parametrize("prefer", ["channel", "spatial"])
def test_a_compiled_split_model_computes_what_eager_does(prefer: str) -> None:
    for found in run_ranks(compile_it, 2, prefer):
        assert max(found.values()) < 1e-9


def sum_terms(group: dist.ProcessGroup) -> list[Tensor]:
    """Four ranks as two replicas of two; each gradient says who it comes from."""
    ranks = join(parse_plan("dp=2,tp=2"), torch.device("cpu"))
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 1))
    parallel = DataParallel(model, ranks.dp, terms={"1.weight", "2.bias"}, every=ranks.every)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 10.0 ** dist.get_rank(group))
    if dist.get_rank(group) == 3:
        model[1].weight.grad = None  # the others' terms are its gradient
    parallel.reduce_gradients()
    return [p.grad[0].flatten()[0] for p in model.parameters()]  # type: ignore[index]


def test_terms_are_summed_over_all_ranks() -> None:
    for rank, found in enumerate(run_ranks(sum_terms, 4)):
        own = 101.0 if rank % 2 == 0 else 1010.0
        assert found == [own, own, 111.0, own, own, 1111.0]


def test_dropout_of_a_whole_model_is_that_of_a_split_one() -> None:
    """Two calls of a module are two draws; a replica's rows follow those before it."""
    state, keyed = DrawState(), key_dropout(nn.Dropout(0.3), DrawState())
    assert isinstance(keyed, KeyedDropout)
    keyed.state = state
    x = torch.ones(6, 40, dtype=torch.float64)
    state.set(draw_key(1, 2), 0, 6)
    whole = [keyed(x), keyed(x)]
    assert not torch.equal(*whole)
    for number, expected in enumerate(whole):
        split_one = Dropout(number, [6, 40], 0)
        split_one.state = state
        assert torch.equal(split_one(x, 0.3, 6), expected)
    state.set(draw_key(1, 2), 4, 2)
    assert torch.equal(keyed(x[4:]), whole[0][4:])
    assert keyed.eval()(x) is x
    share = float((whole[0] == 0).double().mean())
    assert share == pytest.approx(0.3, abs=0.1)


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_is_computed_again_gets_the_same_masks(reentrant: bool) -> None:
    """Activation checkpointing of dropout, in a model that is run as it is written."""
    state = DrawState()
    drop = key_dropout(nn.Dropout(0.5), state)
    gradients = []
    for checkpoints in (False, True):
        x = torch.ones(6, 40, dtype=torch.float64, requires_grad=True)
        state.set(draw_key(1, 2), 0, 6)
        y = x
        for _ in range(3):
            y = checkpoint(drop, y, use_reentrant=reentrant) if checkpoints else drop(y)
        (y * torch.arange(40)).sum().backward()
        gradients.append(x.grad)
    assert gradients[0].count_nonzero() > 0
    assert torch.equal(*gradients)
