"""Routes bring every rank what it needs, and nothing else crosses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshuffle.comm.collectives import Route
from meshuffle.layout import Shard
from meshuffle.layout.routes import routes, sent_elements


@st.composite
def situations(draw: st.DrawFn) -> tuple[Shard, list[list[int]]]:
    """Any partition over 1 to 4 ranks, uneven and empty parts too, and any needs."""
    size, world = draw(st.integers(0, 12)), draw(st.integers(1, 4))
    order = draw(st.permutations(range(size)))
    holders = draw(st.lists(st.integers(0, world - 1), min_size=size, max_size=size))
    parts = [tuple(i for i, h in zip(order, holders, strict=True) if h == r) for r in range(world)]
    needs = [
        draw(st.lists(st.integers(0, size - 1), unique=True)) if size else [] for _ in range(world)
    ]
    return Shard(0, tuple(parts)), needs


def deliver(values: list[list[int]], found: list[Route]) -> list[list[int]]:
    """Do by hand what all ranks' exchange does."""
    sent = [[part[i] for i in route.send_index] for part, route in zip(values, found, strict=True)]
    outputs = []
    for rank, route in enumerate(found):
        arrived = []
        for sender, other in enumerate(found):
            start = sum(other.send_splits[:rank])
            piece = sent[sender][start : start + other.send_splits[rank]]
            assert len(piece) == route.receive_splits[sender]
            if sender == rank:
                assert not piece and route.before == len(arrived)
                piece = [values[rank][i] for i in route.kept_index]
            arrived += piece
        assert route.communicates or len(arrived) == len(route.kept_index)
        outputs.append([arrived[i] for i in route.receive_index])
    return outputs


@given(situations())
def test_every_rank_gets_what_it_needs(situation: tuple[Shard, list[list[int]]]) -> None:
    shard, needs = situation
    found = routes(shard.owners, needs)
    assert deliver([list(part) for part in shard.owners], found) == needs


@given(situations())
def test_only_what_is_lacking_crosses_once(situation: tuple[Shard, list[list[int]]]) -> None:
    shard, needs = situation
    lacking = sum(
        len(set(need) - set(held)) for need, held in zip(needs, shard.owners, strict=True)
    )
    assert sent_elements(shard.owners, needs) == lacking
    assert {route.communicates for route in routes(shard.owners, needs)} == {lacking > 0}


@given(st.integers(1, 4), st.integers(1, 4))
def test_a_shuffle_with_a_group_per_rank_keeps_one_gth(groups: int, per_pair: int) -> None:
    """The channel shuffle as an all-to-all: a rank keeps one g-th of its channels."""
    size = groups * groups * per_pair
    shard = Shard.even(1, size, groups)
    shuffled = [(j % groups) * (size // groups) + j // groups for j in range(size)]
    needs = [[shuffled[j] for j in part] for part in shard.owners]
    assert sent_elements(shard.owners, needs) == size - size // groups


def test_what_nobody_holds() -> None:
    with pytest.raises(ValueError, match="rank 1 needs"):
        routes(((0, 1), (2,)), [[0], [3]])
    with pytest.raises(ValueError, match="rank 0 needs"):
        routes(((0, 1), (2,)), [[0, 0], []])


@given(st.integers(0, 20), st.integers(1, 6))
def test_even_parts(size: int, world: int) -> None:
    shard = Shard.even(2, size, world)
    lengths = [len(part) for part in shard.owners]
    assert (shard.size, shard.world) == (size, world)
    assert max(lengths) - min(lengths) <= 1
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize("owners", [((0, 1), (1,)), ((0,), (2,)), ((-1, 0),)])
def test_owners_that_are_no_partition(owners: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="not a partition"):
        Shard(0, owners)


def test_a_shard_prints_readably() -> None:
    assert str(Shard(1, ((0, 1, 2, 6), (3, 4), (5,)))) == "dim 1: 0-2 6 | 3-4 | 5"
