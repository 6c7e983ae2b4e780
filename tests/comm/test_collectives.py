"""Values and gradients of the collectives are those of one process that holds everything."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from meshuffle.comm.collectives import (
    TransposeRoute,
    divide,
    exchange,
    gather,
    psum,
    pvary,
    scatter,
    scatter_sum,
    transpose,
)
from meshuffle.layout import Shard
from meshuffle.layout.routes import routes
from tests.ranks import run_ranks

WORLD, NUM_CASES = 3, 25


def case(number: int) -> tuple[Shard, list[list[int]], Tensor, list[Tensor]]:
    """The same on all ranks: who holds what, who needs what, the values, and a use of each."""
    generator = torch.Generator().manual_seed(number)
    dim, size = number % 3, 5 + number % 4
    holders = torch.randint(0, WORLD, (size,), generator=generator).tolist()
    order = torch.randperm(size, generator=generator).tolist()
    shard = Shard(dim, tuple(tuple(i for i in order if holders[i] == r) for r in range(WORLD)))
    needs = [
        torch.randperm(size, generator=generator)[: 1 + (number + r) % size].tolist()
        for r in range(WORLD)
    ]
    shape = [4, 3, 2]
    shape[dim] = size
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    uses = [
        torch.randn(x.index_select(dim, torch.tensor(need)).shape, generator=generator).double()
        for need in needs
    ]
    return shard, needs, x, uses


def part_of(x: Tensor, shard: Shard, rank: int) -> Tensor:
    index = torch.tensor(shard.owners[rank], dtype=torch.int64)
    return x.index_select(shard.dim, index).contiguous()


def exchanges(group: dist.ProcessGroup) -> list[str]:
    """Return what was wrong."""
    rank, faults = dist.get_rank(group), []
    for number in range(NUM_CASES):
        shard, needs, x, uses = case(number)
        whole = x.clone().requires_grad_()
        wanted = [whole.index_select(shard.dim, torch.tensor(need)) for need in needs]
        sum((w.square() * use).sum() for w, use in zip(wanted, uses, strict=True)).backward()
        own = part_of(x, shard, rank).requires_grad_()
        route = routes(shard.owners, needs)[rank]
        found = exchange(own, shard.dim, route, group)
        (found.square() * uses[rank]).sum().backward()
        if not torch.equal(found, wanted[rank]):
            faults.append(f"{number}: value")
        expected = part_of(whole.grad, shard, rank)
        if not torch.allclose(own.grad, expected, rtol=1e-12, atol=1e-12):
            faults.append(f"{number}: gradient")
    return faults


def test_exchange() -> None:
    assert run_ranks(exchanges, WORLD) == [[]] * WORLD


def gathers(group: dist.ProcessGroup) -> list[str]:
    rank, faults = dist.get_rank(group), []
    for number in range(NUM_CASES):
        shard, _, x, _ = case(number)
        everything = [list(range(shard.size))] * WORLD
        whole = x.clone().requires_grad_()
        whole.pow(3).sum().backward()
        own = part_of(x, shard, rank).requires_grad_()
        found = gather(own, shard.dim, routes(shard.owners, everything)[rank], group)
        found.pow(3).sum().backward()  # the same on all ranks, so its gradient is whole on each
        if not torch.equal(found, x):
            faults.append(f"{number}: value")
        if not torch.equal(own.grad, part_of(whole.grad, shard, rank)):
            faults.append(f"{number}: gradient")
    return faults


def test_gather() -> None:
    assert run_ranks(gathers, WORLD) == [[]] * WORLD


def column_then_row(group: dist.ProcessGroup) -> dict[str, Any]:
    """Two linear layers in parts: pvary in front, psum behind, as Megatron has it."""
    rank = dist.get_rank(group)
    generator = torch.Generator().manual_seed(0)
    x, a, b = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((4, 5), (6, 5), (3, 6))
    )
    part = slice(2 * rank, 2 * rank + 2)
    (torch.relu(x @ a.T) @ b.T).square().sum().backward()
    expected = [x.grad, a.grad[part], b.grad[:, part]]
    own = [t.detach().clone().requires_grad_() for t in (x, a[part], b[:, part])]
    psum(torch.relu(pvary(own[0], group) @ own[1].T) @ own[2].T, group).square().sum().backward()
    return {"close": [torch.allclose(o.grad, e) for o, e in zip(own, expected, strict=True)]}


def test_psum_and_pvary() -> None:
    assert run_ranks(column_then_row, WORLD) == [{"close": [True] * 3}] * WORLD


def summed_twice(group: dist.ProcessGroup) -> bool:
    """The planted fault: a sum whose backward sums again counts a gradient once per rank."""
    import torch.distributed.nn.functional as torchs_own

    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    torchs_own.all_reduce(x, group=group).square().sum().backward()
    y = torch.ones(2, dtype=torch.float64, requires_grad=True)
    psum(y, group).square().sum().backward()
    return torch.equal(x.grad, WORLD * y.grad)


def test_torchs_own_all_reduce_has_another_convention() -> None:
    assert all(run_ranks(summed_twice, WORLD))


def compiled(group: dist.ProcessGroup) -> bool:
    shard, needs, x, _ = case(4)
    rank = dist.get_rank(group)
    route = routes(shard.owners, needs)[rank]

    everything = routes(shard.owners, [list(range(shard.size))] * WORLD)[rank]
    other = (shard.dim + 1) % 3
    turned = tuple(tuple(range(x.shape[other]))[r::WORLD] for r in range(WORLD))
    turn = TransposeRoute(rank, shard.dim, other, shard.owners, turned)

    def compute(whole: Tensor) -> Tensor:
        own = part_of(pvary(whole, group), shard, rank)
        value = psum(exchange(own, shard.dim, route, group).square().sum(), group)
        again = gather(scatter(whole, shard.dim, everything, group), shard.dim, everything, group)
        term = scatter_sum(divide(again, WORLD), shard.dim, shard.owners, rank, group)
        return value + psum(transpose(term, turn, group).pow(3).sum(), group)

    results = []
    for function in (compute, torch.compile(compute, backend="aot_eager", fullgraph=True)):
        whole = x.clone().requires_grad_()
        value = function(whole)
        value.backward()
        results.append((value.detach(), whole.grad))
    (a, grad_a), (b, grad_b) = results
    return torch.allclose(a, b) and torch.allclose(grad_a, grad_b)


def test_they_compile_into_one_graph() -> None:
    assert all(run_ranks(compiled, WORLD))


def formats(group: dist.ProcessGroup) -> list[bool]:
    """Return of two halos, of one image and of three, whether they stay channels-last."""
    rank, owners = dist.get_rank(group), tuple(tuple(range(4 * r, 4 * r + 4)) for r in range(WORLD))
    needs = [range(max(0, 4 * r - 1), min(4 * WORLD, 4 * r + 5)) for r in range(WORLD)]
    route = routes(owners, [tuple(need) for need in needs])[rank]
    found = []
    for num in (1, 3):
        x = torch.randn(num, 5, 4, 6).contiguous(memory_format=torch.channels_last)
        halo = pvary(exchange(x, 2, route, group), group)
        dense = torch.empty_like(halo, memory_format=torch.channels_last)
        found.append(halo.stride() == dense.stride())
    return found


def test_what_is_received_lies_as_what_is_kept() -> None:
    assert run_ranks(formats, WORLD) == [[True, True]] * WORLD
