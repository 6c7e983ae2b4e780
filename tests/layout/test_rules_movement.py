"""Ops that move data: what each rank gets is where it says, whatever lay where before."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from meshuffle.graph.runtime_ops import reorder
from meshuffle.layout import Shard
from meshuffle.layout.reshape import groups, reshaped
from meshuffle.models.permutation import channel_permutation
from tests.layout.harness import Apply, check, few, ok

aten = torch.ops.aten


def ids(*sizes: int) -> Tensor:
    return torch.arange(math.prod(sizes), dtype=torch.float64).view(sizes)


@pytest.mark.parametrize(
    ("function", "op", "sizes", "dims"),
    [
        (lambda x: x.chunk(2, 1), aten.chunk, (4, 8, 5), (0, 1, 2)),
        (lambda x: x.chunk(3, 1), aten.chunk, (4, 8, 5), (0, 1, 2)),
        (lambda x: x.split([2, 3, 3], 1), aten.split_with_sizes, (4, 8, 5), (0, 1, 2)),
        (lambda x: x.split(3, -2), aten.split, (4, 8, 5), (0, 1, 2)),
        (lambda x: x.permute(1, 0, 2).chunk(2), aten.chunk, (4, 6, 5), (0, 1, 2)),
        (lambda x: x.narrow(1, 2, 4), aten.narrow, (4, 8, 5), (0, 2)),
        (lambda x: x[:, 2], aten.select, (4, 8, 5), (0, 1)),
        (lambda x: x[0], aten.select, (4, 8, 5), (0, 1)),
        (lambda x: x[..., -1], aten.select, (4, 8, 5), (0, 1)),
        (lambda x: x.unbind(1), aten.unbind, (4, 3, 5), (0, 1)),
        (lambda x: x.permute(2, 0, 1).unbind(0), aten.unbind, (4, 6, 3), (0, 1)),
        (lambda x: torch.cat([x, x * 2], 1), aten.cat, (4, 6, 5), (0, 1, 2)),
        (lambda x: torch.cat([x, x], -1), aten.cat, (4, 6, 5), (0, 1, 2)),
        (lambda x: torch.cat([x, x], 0), aten.cat, (4, 6, 5), (1, 2)),
        (lambda x: torch.cat([x, x[:, :3], x], 1), aten.cat, (4, 6, 5), (0, 1, 2)),
        (lambda x: torch.stack([x, x * 2, x], 1), aten.stack, (4, 6, 5), (0, 2, 3)),
        (lambda x: torch.stack([x, x * 2], -1), aten.stack, (4, 6, 5), (0, 1, 2)),
        (lambda x: x.permute(0, 3, 1, 2), aten.permute, (4, 6, 5, 3), (0, 1, 2, 3)),
        (lambda x: x.permute(2, 0, 3, 1, 4), aten.permute, (4, 5, 3, 2, 4), (0, 1, 2, 3, 4)),
        (lambda x: x.transpose(0, -1), aten.transpose, (4, 6, 5), (0, 1, 2)),
        (lambda x: x.mT, aten.mT, (4, 6, 5), (0, 1, 2)),
        (lambda x: x.t(), aten.t, (4, 6), (0, 1)),
        (lambda x: x.T, aten.numpy_T, (4, 6), (0, 1)),
        (lambda x: x.movedim(1, -1), aten.movedim, (4, 6, 5), (0, 1, 2)),
        (lambda x: x[:, :, None].expand(-1, -1, 5), aten.expand, (4, 6), (0, 1, 2)),
        (lambda x: x[None].expand(3, -1, -1), aten.expand, (4, 6), (0, 1, 2)),
        (lambda x: x[:, :1].expand_as(x), aten.expand_as, (4, 6, 5), (0, 1, 2)),
        (lambda x: x.view(x.shape[0], -1), aten.view, (4, 6, 5), (0, 1)),
        (lambda x: x.view(-1), aten.view, (4, 6, 5), (0,)),
        (lambda x: x.flatten(0, 1), aten.flatten, (4, 6, 5), (0, 1)),
        (lambda x: x.unflatten(1, (2, -1)), aten.unflatten, (4, 8, 5), (0, 1, 2, 3)),
        (lambda x: x.squeeze(), aten.squeeze, (4, 6, 1), (0, 1)),
        (lambda x: x[:, None], aten.unsqueeze, (4, 6, 5), (0, 2, 3)),
        (lambda x: x.reshape(x.shape[0], 5, 3, 2, 4), aten.reshape, (4, 5, 24), (0, 1, 2, 3, 4)),
        (lambda x: x.permute(0, 2, 1).reshape(-1, 6), aten.reshape, (4, 6, 5), (0, 1)),
        (lambda x: x.transpose(0, 1).reshape(-1, 7), aten.reshape, (4, 6, 7), (1,)),
        (lambda x: x.flip(1), aten.flip, (4, 6, 5), (0, 2)),
    ],
)
@pytest.mark.parametrize("world", [2, 3])
def test_moves(function: Any, op: Any, sizes: Any, dims: tuple[int, ...], world: int) -> None:
    for other_batch in (0, 7):
        checked = check(Apply(function), ids(*sizes), op=op, world=world, other_batch=other_batch)
        ok(checked, *(dims if world == 2 else ()))


@given(
    st.integers(-9, 9) | st.none(),
    st.integers(-9, 9) | st.none(),
    st.integers(1, 3),
    st.integers(2, 3),
    st.integers(0, 99),
)
@few(20)
def test_slices(start: Any, stop: Any, step: int, world: int, seed: int) -> None:
    if len(range(8)[start:stop:step]) == 0:
        return
    model = Apply(lambda x: x[:, start:stop:step] * 1)
    found = check(model, ids(4, 8, 3), op=aten.slice, world=world, seed=seed)
    ok(found, 0)


@pytest.mark.parametrize(
    ("function", "op", "held"),
    [
        (lambda x, p: x + p[: x.shape[0]], aten.slice, ids(9, 6)),
        (lambda x, p: x + p[: x.shape[0]].expand(-1, 6), aten.expand, ids(9, 1)),
        (lambda x, p: torch.cat([p.expand(x.shape[0], -1), x], 1), aten.expand, ids(1, 3)),
    ],
)
def test_sizes_that_follow_the_batch(function: Any, op: Any, held: Tensor) -> None:
    """Position embeddings cut to the batch; a class token for each sample."""
    for other_batch in (0, 7):
        checked = check(Apply(function, held), ids(4, 6), op=op, other_batch=other_batch)
        assert not checked.faults, checked.faults


def test_the_size_of_another_tensor() -> None:
    ok(check(Apply(lambda x, y: x.view_as(y)), ids(4, 6, 5), ids(4, 30), op=aten.view_as), 0, 1)


def test_a_view_as_another_dtype_is_no_reshape() -> None:
    model = Apply(lambda x: x.view(torch.int64))
    assert not check(model, ids(4, 6), op=aten.view).faults


def test_an_embedding_and_a_table() -> None:
    x = torch.randint(0, 11, (4, 5))
    ok(check(nn.Embedding(11, 6), x, op=aten.embedding), 0, 1, 2)
    model = Apply(lambda x, t: t[x.long()], ids(11, 6))
    ok(check(model, x.double(), op=aten.index), 2)
    model = Apply(lambda x, i: x[i], torch.tensor([2, 0, 1]))
    ok(check(model, ids(4, 5, 6), op=aten.index), 1, 2)


@pytest.mark.parametrize("kind", ["paper", "inverse"])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_a_shuffle_renames_what_ranks_have(kind: str, world: int) -> None:
    index = channel_permutation(kind, 12, 3)
    rows = 3 if kind == "paper" else 4

    def shuffle(x: Tensor) -> Tensor:
        viewed = x.view(x.shape[0], rows, 12 // rows, *x.shape[2:])
        return viewed.transpose(1, 2).reshape(x.shape)

    checked = ok(check(Apply(shuffle), ids(4, 12, 3, 4), op=reorder, world=world), 0, 1)
    renamed = [c for c in checked.passed if isinstance(c.output, Shard) and c.output.dim == 1]
    for choice in renamed:
        (before,) = choice.inputs
        assert isinstance(before, Shard) and isinstance(choice.output, Shard)
        for held, now in zip(before.owners, choice.output.owners, strict=True):
            assert tuple(index[j] for j in now) == held


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two factorings of one number of elements."""
    primes = draw(st.lists(st.sampled_from([2, 2, 3]), min_size=1, max_size=5))

    def cut() -> tuple[int, ...]:
        sizes: list[int] = []
        for prime in primes:
            if sizes and draw(st.booleans()):
                sizes[-1] *= prime
            else:
                sizes.append(prime)
        for _ in range(draw(st.integers(0, 2))):
            sizes.insert(draw(st.integers(0, len(sizes))), 1)
        return tuple(sizes)

    return cut(), cut()


@given(reshapes(), st.data())
@few(200)
def test_reshaped_parts_are_where_it_says(
    sizes: tuple[tuple[int, ...], tuple[int, ...]], data: st.DataObject
) -> None:
    before, after = sizes
    dim = data.draw(st.integers(0, len(before) - 1))
    world = data.draw(st.integers(1, 3))
    order = data.draw(st.permutations(range(before[dim])))
    holders = [data.draw(st.integers(0, world - 1)) for _ in order]
    owners = tuple(
        tuple(i for i, h in zip(order, holders, strict=True) if h == r) for r in range(world)
    )
    whole = ids(*before)
    for found in reshaped(Shard(dim, owners), before, after):
        for held, now in zip(owners, found.owners, strict=True):
            local = whole.index_select(dim, torch.tensor(held, dtype=torch.int64))
            sizes_now = [len(now) if d == found.dim else size for d, size in enumerate(after)]
            expected = ids(*after).index_select(found.dim, torch.tensor(now))
            assert torch.equal(local.reshape(sizes_now), expected)


@given(reshapes(), st.integers(1, 3))
def test_even_outer_parts_survive(
    sizes: tuple[tuple[int, ...], tuple[int, ...]], world: int
) -> None:
    """Where a dim stays, alone, so does any split of it; and there and back is the same."""
    before, after = sizes
    for old, new in groups(before, after):
        assert math.prod(before[d] for d in old) == math.prod(after[d] for d in new)
        if len(old) == len(new) == 1 and before[old[0]] >= world:
            layout = Shard.even(old[0], before[old[0]], world)
            assert Shard.even(new[0], after[new[0]], world) in reshaped(layout, before, after)
