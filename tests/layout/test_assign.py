"""The search finds the assignment that sends the fewest bytes, and with it what people found."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meshuffle.errors import PlanError
from meshuffle.graph import capture
from meshuffle.layout import Partial, Samples, Shard, assign
from meshuffle.layout.assign import Assignment, _Search
from meshuffle.layout.program import Program
from meshuffle.models import create_model
from meshuffle.parallel.code import StageCode
from meshuffle.parallel.lower import lower

aten = torch.ops.aten


def sent_bytes(code: StageCode) -> int:
    """Return what a step sends, by the lowered code: independent of what the search adds up."""
    return sum(s.forward + s.backward for s in code.sent) + code.reduced_bytes


def every_assignment(model: nn.Module, x: Tensor, world: int) -> tuple[list[int], int]:
    """Return the bytes of all combinations of choices, and of the one that is found."""
    graph = capture(model, x)
    found = sent_bytes(lower(assign(graph, world), 0))
    search = _Search(Program(graph, x.shape[0], world), None, {})
    search.run()
    choices = {c.node.name: search._choices(c) for c in search.program.calls}
    names = [name for name, options in choices.items() if options]
    sent = []
    for combination in itertools.product(*(choices[name] for name in names)):
        taken = dict(zip(names, combination, strict=True))
        sent.append(sent_bytes(lower(Assignment(search.program, taken), 0)))
    return sent, found


@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        (nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 8)), (8, 16)),
        (nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 64)), (64, 64)),
        (nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 4, 1)), (4, 4, 6, 6)),
        (
            nn.Sequential(nn.Conv2d(8, 8, 1, groups=4), nn.ChannelShuffle(4), nn.ReLU()),
            (4, 8, 3, 3),
        ),
        (nn.Sequential(nn.Conv2d(4, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), (4, 4, 4, 4)),
    ],
)
def test_no_combination_of_choices_sends_less(model: nn.Module, sizes: tuple[int, ...]) -> None:
    sent, found = every_assignment(model, torch.randn(sizes), 2)
    assert len(sent) >= 18
    assert found == min(sent) < max(sent)


def choices_of(assignment: Assignment, packet: Any) -> list[Any]:
    """Return the choices of all calls of an op."""
    calls = assignment.program.calls
    found = [c.node.name for c in calls if getattr(c.node.target, "_overloadpacket", 0) is packet]
    return [assignment.choices[name] for name in found]


def names_of(code: StageCode) -> Counter[str]:
    """Return how many of each conversion there are that sends something."""
    sent = [s.name for s in code.sent if s.forward + s.backward]
    return Counter(name.rstrip("0123456789").rstrip("_") for name in sent)


@pytest.mark.parametrize("world", [2, 4])
def test_megatrons_pair(world: int) -> None:
    """Column, then row: nothing is sent between the layers, one all-reduce behind them."""
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    assignment = assign(capture(model, torch.randn(4, 64)), world)
    first, second = choices_of(assignment, aten.linear)
    assert isinstance(first.output, Shard) and first.output.dim == 1
    assert isinstance(second.output, Partial) and second.split == first.output
    assert names_of(lower(assignment, 0)) == {"psum": 1}


def test_samples_where_they_are_many() -> None:
    """The same layers: with many samples it is cheaper to send the gradients."""
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    assignment = assign(capture(model, torch.randn(4096, 64)), 2)
    assert all(isinstance(c.output, Samples) for c in choices_of(assignment, aten.linear))


class Attention(nn.Module):
    """Self-attention of four heads, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(2, (4, 16)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_heads_of_attention() -> None:
    assignment = assign(capture(Attention(), torch.randn(2, 8, 64)), 2, prefer="channel")
    (choice,) = choices_of(assignment, aten.scaled_dot_product_attention)
    assert choice.output == Shard(1, ((0, 1), (2, 3)))
    assert names_of(lower(assignment, 0)) == {"psum": 1}


def test_what_cannot_be_split() -> None:
    graph = capture(nn.Linear(3, 3), torch.randn(2, 3))
    with pytest.raises(PlanError, match="tp=8"):
        assign(graph, 8)


UNITS = 16
STAGE_CHANGES = {0, 4, 12}


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_shufflenet_v1_exchanges_the_bottleneck(tp: int) -> None:
    """DESIGN section 3.1: one exchange per unit, 1 / (8 · tp) of two all-reduces of its output."""
    batch, itemsize = 8, 4
    with torch.device("meta"):
        model = create_model("shufflenet_v1_x1_0_g8")
    graph = capture(model, torch.empty(batch, 3, 64, 64, device="meta"))
    assignment = assign(graph, tp, batch=batch, prefer="channel")
    code = lower(assignment, 0)
    assert assignment.sharded_fraction() == 1 and assignment.imbalance() == 1
    assert code.reduced_bytes == 0
    # The first dense convolution reads all of the stem; the classifier's terms are summed.
    names = names_of(code)
    assert (names["all_gather"], names["psum"], names["gather"]) == (1, 1, 0)
    modules = {op.name: op.module for op in graph.ops(batch)}
    in_units: dict[int, int] = {}
    for sent in code.sent:
        path = modules[sent.value].split(".")
        if "branch_main_1" in path:
            unit = int(path[1])
            assert unit not in in_units, f"two exchanges in unit {unit}"
            in_units[unit] = sent.forward + sent.backward
    assert set(in_units) == set(range(1, UNITS))  # the first unit's shuffle is free
    for unit, sent_in_unit in in_units.items():
        if unit not in STAGE_CHANGES:
            channels, size = (384, 8) if unit < 4 else (768, 4) if unit < 12 else (1536, 2)
            output = batch * channels * size * size * itemsize
            two_all_reduces = 2 * 2 * (tp - 1) * output
            assert sent_in_unit * 8 * tp == two_all_reduces
    relayouts = [s for s in code.sent if s.name.startswith("exchange") and s.value[:3] == "cat"]
    # A unit adopts the groups that a concat leaves it with, where those are whole.
    assert len(relayouts) == {2: 1, 4: 2, 8: 3}[tp]


class Upsampled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.conv(x), scale_factor=16, mode="bilinear").argmax(1).byte()


@pytest.mark.parametrize(("size", "is_split"), [(64, True), (8, False)])
def test_a_large_value_is_not_computed_whole_to_send_a_small_one(size: int, is_split: bool) -> None:
    graph = capture(Upsampled(), torch.randn(2, 3, size, size))
    found = assign(graph, 2, prefer="spatial").choices
    (name,) = (name for name in found if name.startswith("upsample"))
    assert (found[name].split is not None) == is_split


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x * 2)


def test_what_is_in_front_of_a_window_is_split_evenly() -> None:
    graph = capture(Normalised(), torch.randn(2, 3, 512, 512))
    found = assign(graph, 2, prefer="spatial").choices
    (name,) = (name for name in found if name.startswith("mul"))
    assert found[name].output == Shard.even(2, 512, 2)
