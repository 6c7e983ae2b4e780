"""Conversions: which exist, and that they are said to send what brute force counts."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meshuffle.layout.layout import Layout, Partial, Replicate, Samples, Shard, Varying, Window
from meshuffle.layout.redistribution import Redistribution, Value, cheapest_path, held_indices
from tests.layout.harness import few


@st.composite
def values(draw: st.DrawFn) -> Value:
    """A batch of 1 to 5 samples in dim 0, perhaps several rows each, over 2 to 4 ranks."""
    world = draw(st.integers(2, 4))
    batch = draw(st.integers(world, world + 2))
    shape = (batch * draw(st.integers(1, 2)), draw(st.integers(4, 7)), draw(st.integers(4, 5)))
    return Value(shape, draw(st.sampled_from([4, 8])), draw(st.booleans()), batch, world)


@st.composite
def parts(draw: st.DrawFn, value: Value, kinds: str) -> Layout:
    """Samples, Shard or Window: each rank has something."""
    kind = draw(st.sampled_from(kinds.split()))
    if kind == "samples":
        return Samples(0)
    dim = draw(st.integers(1, 2))
    size, world = value.shape[dim], value.world
    if kind == "window":
        starts = [draw(st.integers(0, size - 1)) for _ in range(world)]
        needs = [range(start, draw(st.integers(start + 1, size))) for start in starts]
        return Window(dim, tuple(map(tuple, needs)))
    order = draw(st.permutations(range(size)))
    ends = sorted(draw(st.sets(st.integers(1, size - 1), min_size=world - 1, max_size=world - 1)))
    bounds = [0, *ends, size]
    return Shard(dim, tuple(tuple(order[a:b]) for a, b in itertools.pairwise(bounds)))


def elements(layout: Layout, value: Value) -> list[set[int]]:
    """Return for each rank which elements of the whole it has."""
    ids = torch.arange(math.prod(value.shape)).view(value.shape)
    if isinstance(layout, Shard | Samples | Window):
        indices = [torch.tensor(part) for part in held_indices(layout, value)]
        return [set(ids.index_select(layout.dim, i).flatten().tolist()) for i in indices]
    return [set(ids.flatten().tolist())] * value.world


def lacking_bytes(value: Value, source: Layout, target: Layout) -> int:
    pairs = zip(elements(source, value), elements(target, value), strict=True)
    return sum(len(needed - held) for held, needed in pairs) * value.itemsize


@given(st.data())
@few(150)
def test_what_a_rank_lacks_is_what_is_sent(data: st.DataObject) -> None:
    """Gather, exchange, transpose and halo: each element crosses once to each who lacks it."""
    value = data.draw(values())
    source = data.draw(parts(value, "samples shard"))
    target = data.draw(parts(value, "samples shard window") | st.sampled_from([Replicate()]))
    path = cheapest_path(value, [source], target)
    assert path is not None
    lacking = lacking_bytes(value, source, target)
    assert sum(step.forward for step in path) == lacking
    if not isinstance(target, Replicate) and len(path) == 1:
        assert path[0].backward == value.has_grad * lacking


@given(st.data())
@few(40)
def test_a_whole_is_cut_for_nothing(data: st.DataObject) -> None:
    """… in the forward pass; then its gradient is put together: one all-gather or all-reduce."""
    value = data.draw(values())
    target = data.draw(parts(value, "samples shard window"))
    whole = value.has_grad * (value.world - 1) * value.num_bytes
    (step, *rest) = cheapest_path(value, [Replicate()], target) or ()
    expected = 2 * whole if isinstance(target, Window) else whole
    assert step.forward == 0 and sum(s.sent_bytes for s in (step, *rest)) <= expected
    path = cheapest_path(value, [Varying()], target)
    assert path == (Redistribution(Varying(), target),)


def test_terms_of_a_sum() -> None:
    """Ring: reduce-scatter and all-gather send (world − 1) · bytes each, all-reduce both."""
    value = Value((6, 4), 4, True, 6, 3)
    size = 2 * 6 * 4 * 4
    assert cheapest_path(value, [Partial()], Replicate()) == (
        Redistribution(Partial(), Replicate(), 2 * size),
    )
    even = Shard.even(1, 4, 3)
    assert cheapest_path(value, [Partial()], even) == (Redistribution(Partial(), even, size, size),)
    assert cheapest_path(value, [Replicate()], Partial()) == (
        Redistribution(Replicate(), Partial()),
    )
    (step,) = cheapest_path(value, [Replicate()], Varying()) or ()
    assert (step.forward, step.backward) == (0, 2 * size)
    (step,) = cheapest_path(value, [even], Varying()) or ()
    assert (step.forward, step.backward) == (size, size)


SOURCES = [Replicate(), Partial(), Shard(1, ((2, 0), (1, 3))), Samples(0)]
TARGETS = [
    *(Replicate(), Varying(), Shard(1, ((0,), (3, 1, 2))), Shard.even(2, 5, 2), Samples(0)),
    Window(2, ((0, 1, 2, 3), (2, 3, 4))),
]


@pytest.mark.parametrize("source", SOURCES, ids=str)
@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("has_grad", [False, True])
def test_every_pair_is_connected(source: Layout, target: Layout, has_grad: bool) -> None:
    value = Value((4, 4, 5), 8, has_grad, 4, 2)
    path = cheapest_path(value, [source], target)
    assert path is not None and len(path) <= 2
    assert (path == ()) == (source == target)
    for step, following in itertools.pairwise(path):
        assert step.target == following.source


@given(st.data())
@few(40)
def test_the_cheapest_of_several_sources(data: st.DataObject) -> None:
    value = data.draw(values())
    several = [data.draw(parts(value, "samples shard")) for _ in range(3)] + [Partial()]
    target = data.draw(parts(value, "samples shard window"))

    def sent(sources: list[Layout]) -> int:
        return sum(step.sent_bytes for step in cheapest_path(value, sources, target) or ())

    assert sent(several) == min(sent([source]) for source in several)
