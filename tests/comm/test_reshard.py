"""scatter, scatter_sum, transpose: values, gradients, bytes of one process with everything."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from meshuffle.comm.collectives import TransposeRoute, scatter, scatter_sum, transpose
from meshuffle.comm.sent_bytes import SentBytes
from meshuffle.layout import Shard
from meshuffle.layout.routes import routes
from tests.ranks import run_ranks

Parts = tuple[tuple[int, ...], ...]
Bytes = dict[str, tuple[Fraction, Fraction]]


class Case(NamedTuple):
    """The same on all ranks: parts of `from_dim` of a tensor, and what is needed of `to_dim`."""

    name: str
    shape: tuple[int, ...]
    from_dim: int
    to_dim: int
    owners: Parts
    needs: Parts

    def random(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.shape, generator=generator, dtype=torch.float64)


def cases(world: int) -> Iterator[Case]:
    channels, rows = Shard.even(1, 2 * world, world).owners, Shard.even(2, 7, world).owners
    yield Case("contiguous", (3, 2 * world, 7, 2), 1, 2, channels, rows)
    halos = tuple(tuple(range(max(part[0] - 2, 0), min(part[-1] + 2, 7))) for part in rows)
    yield Case("halos", (3, 2 * world, 7, 2), 1, 2, channels, halos)
    yield Case(
        "part of the rows", (2, 7, 9), 1, 2, rows, tuple((r + 1, r + 2) for r in range(world))
    )
    backwards = rows[::-1]
    yield Case("uneven, last rank first", (7, 4, 5), 0, 1, backwards, ((2,),) * world)
    dealt = tuple(tuple(range(rank, 8, world)) for rank in range(world))
    yield Case("dealt out", (8, 8), 1, 0, dealt, dealt)
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        holders = torch.randint(0, world, (6,), generator=generator).tolist()
        order = torch.randperm(6, generator=generator).tolist()
        owners = tuple(tuple(i for i in order if holders[i] == r) for r in range(world))
        needs = tuple(
            tuple(torch.randperm(5, generator=generator)[: 1 + (seed + r) % 5].tolist())
            for r in range(world)
        )
        from_dim, to_dim = (seed % 3, (seed + 1 + seed // 3) % 3)
        shape = [2, 2, 2]
        shape[from_dim], shape[to_dim] = 6, 5
        yield Case(f"random {seed}", tuple(shape), from_dim, to_dim, owners, needs)


def pick(x: Tensor, dim: int, index: tuple[int, ...]) -> Tensor:
    return x.index_select(dim, torch.tensor(index, dtype=torch.int64))


def loss(x: Tensor, rank: int = 0) -> Tensor:
    """Weigh the elements and the ranks differently."""
    return (x.pow(3) * torch.arange(1 + rank, 1 + rank + x.numel()).view(x.shape)).sum()


def measured(
    collective: Callable[[Tensor], Tensor], x: Tensor, rank: int
) -> tuple[Tensor, tuple[Fraction, Fraction]]:
    """Return what comes out, and the bytes sent forward and in the backward of `loss`."""
    with SentBytes() as forward:
        found = collective(x)
    with SentBytes() as backward:
        loss(found, rank).backward()
    return found, (forward.total, backward.total)


def scattered(case: Case, group: dist.ProcessGroup, faults: list[str]) -> tuple[Fraction, Fraction]:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    whole = case.random(0).requires_grad_()
    wanted = [pick(whole, case.from_dim, part) for part in case.owners]
    sum(loss(part, r) for r, part in enumerate(wanted)).backward()
    everything = [range(case.shape[case.from_dim])] * world
    route = routes(case.owners, everything)[rank]
    x = case.random(0).requires_grad_()
    found, sent = measured(lambda x: scatter(x, case.from_dim, route, group), x, rank)
    if not torch.equal(found, wanted[rank]):
        faults.append(f"scatter, {case.name}: value")
    if not torch.equal(x.grad, whole.grad):
        faults.append(f"scatter, {case.name}: gradient")
    return sent


def summed(case: Case, group: dist.ProcessGroup, faults: list[str]) -> tuple[Fraction, Fraction]:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    terms = [case.random(r).requires_grad_() for r in range(world)]
    wanted = [pick(sum(terms[1:], terms[0]), case.from_dim, part) for part in case.owners]
    sum(loss(part, r) for r, part in enumerate(wanted)).backward()
    x = case.random(rank).requires_grad_()
    found, sent = measured(
        lambda x: scatter_sum(x, case.from_dim, case.owners, rank, group), x, rank
    )
    if not torch.equal(found, wanted[rank]):
        faults.append(f"scatter_sum, {case.name}: value")
    if not torch.equal(x.grad, terms[rank].grad):
        faults.append(f"scatter_sum, {case.name}: gradient")
    return sent


def turned(case: Case, group: dist.ProcessGroup, faults: list[str]) -> tuple[Fraction, Fraction]:
    rank = dist.get_rank(group)
    whole = case.random(0).requires_grad_()
    wanted = [pick(whole, case.to_dim, need) for need in case.needs]
    sum(loss(part, r) for r, part in enumerate(wanted)).backward()
    x = pick(case.random(0), case.from_dim, case.owners[rank]).requires_grad_()
    transposed = TransposeRoute(rank, case.from_dim, case.to_dim, case.owners, case.needs)
    found, sent = measured(lambda x: transpose(x, transposed, group), x, rank)
    if not torch.equal(found, wanted[rank]):
        faults.append(f"transpose, {case.name}: value")
    expected = pick(whole.grad, case.from_dim, case.owners[rank])
    if not torch.allclose(x.grad, expected, rtol=1e-12, atol=1e-12):
        faults.append(f"transpose, {case.name}: gradient")
    return sent


def compiled(group: dist.ProcessGroup, faults: list[str]) -> None:
    """All three in one graph: whole → its part → a part of another dim → a part of a sum."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    *_, case = cases(world)
    everything = [range(case.shape[case.from_dim])] * world
    route = routes(case.owners, everything)[rank]
    transposed = TransposeRoute(rank, case.from_dim, case.to_dim, case.owners, ((4, 1, 0),) * world)

    def compute(x: Tensor) -> Tensor:
        own = scatter(x * x, case.from_dim, route, group)
        term = transpose(own.sin(), transposed, group) * (1 + rank)
        return scatter_sum(term, case.from_dim, case.owners, rank, group)

    results = []
    for function in (compute, torch.compile(compute, backend="aot_eager", fullgraph=True)):
        x = case.random(1).requires_grad_()
        value = function(x)
        loss(value, rank).backward()
        results.append((value.detach(), x.grad))
    if not all(torch.allclose(a, b) for a, b in zip(*results, strict=True)):
        faults.append("compiled is not eager")


def all_cases(group: dist.ProcessGroup) -> tuple[list[str], dict[str, Bytes]]:
    """Return what was wrong, and this rank's bytes by case and collective."""
    faults: list[str] = []
    sent = {
        case.name: {
            "scatter": scattered(case, group, faults),
            "scatter_sum": summed(case, group, faults),
            "transpose": turned(case, group, faults),
        }
        for case in cases(dist.get_world_size(group))
    }
    compiled(group, faults)
    return faults, sent


@pytest.mark.parametrize("world", [1, 2, 3])
def test_values_gradients_and_bytes(world: int) -> None:
    ranks = run_ranks(all_cases, world)
    assert [faults for faults, _ in ranks] == [[]] * world
    for case in cases(world):
        whole = (world - 1) * math.prod(case.shape) * 8
        rest = math.prod(case.shape) // (case.shape[case.from_dim] * case.shape[case.to_dim])
        crossing = sum(
            len(case.owners[r]) * len(case.needs[t])
            for r in range(world)
            for t in range(world)
            if r != t
        )
        turn = crossing * rest * 8
        expected = {"scatter": (0, whole), "scatter_sum": (whole, whole), "transpose": (turn, turn)}
        for name, (forward, backward) in expected.items():
            assert sum(sent[case.name][name][0] for _, sent in ranks) == forward, (case, name)
            assert sum(sent[case.name][name][1] for _, sent in ranks) == backward, (case, name)


@pytest.mark.parametrize(
    "facts",
    [
        (2, 0, 1, ((0,), (1,)), ((0,), (1,))),  # a rank beyond the last
        (0, 1, 1, ((0,), (1,)), ((0,), (1,))),  # from a dim to itself
        (0, 0, -1, ((0,), (1,)), ((0,), (1,))),
        (0, 0, 1, ((0, 1), (1,)), ((0,), (1,))),  # no partition
        (0, 0, 1, ((0,), (1,)), ((0, 0), (1,))),  # twice for one rank
        (0, 0, 1, ((0,), (1,)), ((0,),)),
    ],
)
def test_what_is_no_route(facts: tuple[int, int, int, Parts, Parts]) -> None:
    with pytest.raises(ValueError, match="not a route"):
        TransposeRoute(*facts)


def test_sizes_that_do_not_fit() -> None:
    """Said before anything is sent, so no group is asked."""
    x, owners = torch.ones(3, 4), ((0,), (1,))
    route = routes(owners, [[0, 1]] * 2)[0]
    for call in (
        lambda: scatter(x, 1, route, None),
        lambda: scatter_sum(x, 1, owners, 0, None),
        lambda: transpose(x, TransposeRoute(0, 1, 0, owners, owners), None),
    ):
        with pytest.raises(ValueError, match=r"dim 1 of \(3, 4\) must be [12]"):
            call()
