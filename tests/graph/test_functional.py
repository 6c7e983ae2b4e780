"""The functional program computes what the model does, and a shuffle is one reorder in it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import shufflenet_v2_x0_5
from torchvision.models.shufflenetv2 import channel_shuffle

from meshuffle.graph.node import is_in_place
from meshuffle.graph.runtime_ops import reorder
from meshuffle.layout.program import Program
from meshuffle.models import create_model
from meshuffle.models.permutation import ChannelShuffle, channel_permutation
from tests.layout.harness import Apply, captured, run_program, whole_tensors


def r(*sizes: int) -> Tensor:
    return torch.randn(sizes, dtype=torch.float64)


def program_of(model: nn.Module, x: Tensor, train: bool = True) -> Program:
    """Return the program; it computes what the model does, buffers too."""
    program = captured(model, [x], 2, train)
    tensors = {name: t.clone() for name, t in whole_tensors(program, model).items()}
    found = run_program(program, tensors, [x.clone()])
    model = copy.deepcopy(model)
    expected = model(x.clone())
    values = [found[node] for node in program.outputs()]
    for value, whole in zip(values, [expected], strict=True):
        torch.testing.assert_close(value, whole, rtol=1e-12, atol=1e-12)
    buffers = dict(model.named_buffers())
    for name in tensors.keys() & buffers.keys():
        torch.testing.assert_close(tensors[name], buffers[name])
    return program


def calls(program: Program) -> list[str]:
    return [str(call.node.target) for call in program.calls]


def relu_of_a_sum(x: Tensor) -> Tensor:
    y = x * 2
    return torch.relu_(y.clone() + y) + y


def aliased_residual(x: Tensor) -> Tensor:
    y = x * 2
    kept = y
    y = torch.relu_(y)
    return y + kept


def one_after_another(x: Tensor) -> Tensor:
    y = x * 2
    y.relu_()
    y.mul_(3)
    return y.sum(1)


def relu_of_a_view(x: Tensor) -> Tensor:
    y = (x * 2).view(-1, 3)
    y.relu_()
    return y * 2


@pytest.mark.parametrize("given", [(), (0.5,), (0.25,)])
def test_a_default_that_only_the_op_in_place_has(given: tuple[float, ...]) -> None:
    model = Apply(lambda x: x * torch.empty_like(x).bernoulli_(*given))
    program = captured(model, [r(4, 6)], 2, True)
    (found,) = (call for call in program.calls if "bernoulli" in str(call.node.target))
    assert found["p"] == (given or (0.5,))[0]


@pytest.mark.parametrize(
    "function", [relu_of_a_sum, aliased_residual, one_after_another, relu_of_a_view]
)
def test_in_place_ops_are_rebound(function: Callable[[Tensor], Tensor]) -> None:
    program = program_of(Apply(function), r(4, 6))
    assert not program.pinned
    assert not any(is_in_place(call.node) for call in program.calls)


def slices_filled(x: Tensor) -> Tensor:
    out = torch.zeros(x.shape[0], 4, dtype=x.dtype)
    out[:, :2] = x[:, :2]
    out[:, 2:] = x[:, 2:4] * 2
    return out


def read_through_an_older_view(x: Tensor) -> Tensor:
    y = x * 2
    view = y.view(-1)
    y.relu_()
    return view + 1


def read_through_the_base(x: Tensor) -> Tensor:
    y = x * 2
    y[:, :3].zero_()
    return y


def changed_pieces(x: Tensor) -> Tensor:
    y = x * 1
    first, _ = y.chunk(2, 1)
    first.relu_()
    return y + 1


def part_of_the_input(x: Tensor) -> Tensor:
    x[:, 2:4] = 7.0
    return x * 2


@pytest.mark.parametrize(
    "function",
    [
        slices_filled,
        read_through_an_older_view,
        read_through_the_base,
        changed_pieces,
        part_of_the_input,
    ],
)
def test_memory_that_older_values_show_is_pinned(function: Callable[[Tensor], Tensor]) -> None:
    program = program_of(Apply(function), r(4, 6))
    changed = [call.node.name for call in program.calls if is_in_place(call.node)]
    assert changed and program.pinned >= set(changed)


class Counting(nn.Module):
    """Updates buffers: whole, in part, and by a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.seen, self.mean = nn.Buffer(r(3)), nn.Buffer(r(4, 2)), nn.Buffer(r(6))

    def forward(self, x: Tensor) -> Tensor:
        self.steps.add_(1)
        self.seen[1].add_(x.mean())
        self.mean.copy_(0.9 * self.mean + 0.1 * x.mean(0))
        return x * self.steps.sum() + self.seen.sum() - self.mean


def test_buffers_are_updated_in_place() -> None:
    program = program_of(Counting(), r(4, 6))
    assert [name for name in calls(program) if "_." in name] == [
        *("aten.add_.Tensor", "aten.add_.Tensor", "aten.copy_.default")
    ]


def shuffles(program: Program) -> list[tuple[int, tuple[int, ...]]]:
    """Return dim and index of each reorder."""
    return [(c["dim"], c["index"]) for c in program.calls if c.node.target is reorder]


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (ChannelShuffle(12, 3), "paper"),
        (ChannelShuffle(12, 3, "inverse"), "inverse"),
        (Apply(lambda x: channel_shuffle(x, 3)), "paper"),
        (nn.ChannelShuffle(3), "paper"),
    ],
)
def test_a_channel_shuffle_is_one_reorder(model: nn.Module, kind: str) -> None:
    program = program_of(nn.Sequential(nn.ReLU(), model, nn.ReLU()), r(4, 12, 3, 2))
    assert shuffles(program) == [(1, channel_permutation(kind, 12, 3))]
    assert len(program.calls) == 3


def test_a_shuffle_and_its_inverse_are_nothing() -> None:
    model = nn.Sequential(nn.ChannelShuffle(3), nn.ReLU(), nn.ChannelShuffle(4))
    first, second = shuffles(program_of(model, r(4, 12, 3, 2)))
    assert [first[1][j] for j in second[1]] == list(range(12))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.view(x.shape[0], 3, 4, -1).transpose(1, 2).flatten(2),  # not the shape before
        lambda x: x.transpose(1, 2).reshape(x.shape),  # mixes two dims
        lambda x: x.transpose(0, 1).reshape(x.shape),  # mixes samples
        lambda x: x.view(x.shape[0], 12, -1).view(x.shape),  # moves nothing
    ],
)
def test_what_is_no_shuffle(function: Callable[[Tensor], Tensor]) -> None:
    assert not shuffles(program_of(Apply(function), r(4, 12, 3)))


def test_samples_are_never_reordered() -> None:
    """With 2 samples a transpose of (2, B) would look like a reorder of the batch."""

    def interleave(x: Tensor) -> Tensor:
        return x.view(2, -1, 3, 4).transpose(0, 1).reshape(-1, 3, 4)

    assert all(dim != 0 for dim, _ in shuffles(program_of(Apply(interleave), r(8, 3, 4))))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("make", "num_shuffles"),
    [
        (lambda: create_model("shufflenet_v1_x0_5_g3", num_classes=3, seed=0), 16),
        # Joins and shuffles in one, by stack and flatten.
        (lambda: create_model("shufflenet_v2_x0_5", num_classes=3, seed=0), 0),
        (lambda: shufflenet_v2_x0_5(num_classes=3), 16),
    ],
)
def test_shufflenets(make: Any, num_shuffles: int, train: bool) -> None:
    program = program_of(make(), r(4, 3, 64, 64), train)
    assert len(shuffles(program)) == num_shuffles
    assert not program.pinned
