"""The counter against bytes counted by hand, over both of torch's ways to a process group."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional

from meshuffle.comm.collectives import exchange, psum, pvary
from meshuffle.comm.sent_bytes import SentBytes, labelled
from meshuffle.errors import MeshuffleError
from meshuffle.layout import Shard
from meshuffle.layout.routes import routes, sent_elements
from tests.ranks import run_ranks

WORLD = 3


def collectives(group: dist.ProcessGroup) -> dict[str, Fraction]:
    """Return the bytes that this rank sends in each, of 6 numbers of 8 bytes."""
    x = torch.ones(6, dtype=torch.float64)
    whole = torch.empty(18, dtype=torch.float64)
    calls: dict[str, Any] = {
        "all_reduce": lambda: dist.all_reduce(x.clone(), group=group),
        "functional all_reduce": lambda: functional.all_reduce(x, "sum", group) + 0,
        "all_gather": lambda: dist.all_gather_into_tensor(whole, x, group=group),
        "reduce_scatter": lambda: functional.reduce_scatter_tensor(x, "sum", 0, group) + 0,
        "broadcast": lambda: dist.broadcast(x.clone(), group_src=1, group=group),
        "all_to_all": lambda: dist.all_to_all_single(
            torch.empty(9, dtype=torch.float64)[: 3 * (1 + dist.get_rank(group))],
            x,
            [1 + dist.get_rank(group)] * 3,
            [1, 2, 3],
            group=group,
        ),
    }
    found = {}
    for name, call in calls.items():
        with SentBytes() as counter:
            call()
        found[name] = counter.total
        assert sum(counter.calls.values()) == 1
    return found


def test_bytes_of_each_collective() -> None:
    ranks = run_ranks(collectives, WORLD)
    ring = Fraction(2, 3) * 48
    for rank, found in enumerate(ranks):
        assert found == {
            "all_reduce": 2 * ring,
            "functional all_reduce": 2 * ring,
            "all_gather": 2 * 48,
            "reduce_scatter": ring,
            "broadcast": ring,
            "all_to_all": 8 * (6 - (rank + 1)),
        }


def forward_and_backward(group: dist.ProcessGroup) -> tuple[Fraction, Fraction]:
    """An exchange of channels in a sharded computation, and a reduction of a gradient."""
    rank = dist.get_rank(group)
    shard = Shard.even(1, 7, WORLD)
    needs = [[6, 0, 1], [2, 3], [4, 5, 3]]
    x = torch.randn(2, len(shard.owners[rank]), 5, dtype=torch.float64, requires_grad=True)
    with SentBytes() as counter:
        y = exchange(x, 1, routes(shard.owners, needs)[rank], group)
        psum(pvary(y.square().sum(), group), group).backward()
        with labelled("parameters"):
            dist.all_reduce(torch.ones(3), group=group)
    return Fraction(counter.by_label["values"]), Fraction(counter.by_label["parameters"])


def test_a_predicted_exchange_is_a_measured_one() -> None:
    found = run_ranks(forward_and_backward, WORLD)
    crossing = sent_elements(Shard.even(1, 7, WORLD).owners, [[6, 0, 1], [2, 3], [4, 5, 3]])
    scalars = 2 * 2 * (WORLD - 1) * 8  # the all-reduce of psum forward, that of pvary backward
    assert sum(values for values, _ in found) == 2 * crossing * 2 * 5 * 8 + scalars
    assert sum(parameters for _, parameters in found) == 2 * (WORLD - 1) * 12


def nothing_moves(group: dist.ProcessGroup) -> Fraction:
    rank = dist.get_rank(group)
    shard = Shard.even(0, 4, WORLD)
    x = torch.randn(len(shard.owners[rank]), requires_grad=True)
    with SentBytes() as counter:
        backwards = [part[::-1] for part in shard.owners]
        exchange(x, 0, routes(shard.owners, backwards)[rank], group).sum().backward()
    return counter.total


def test_what_stays_on_its_rank_costs_nothing() -> None:
    assert run_ranks(nothing_moves, WORLD) == [0] * WORLD


def unknown(group: dist.ProcessGroup) -> str:
    with SentBytes(), pytest.raises(MeshuffleError) as failed:
        dist.scatter(torch.empty(1), [torch.ones(1)] * WORLD if not dist.get_rank(group) else None)
    return str(failed.value)


def test_an_unknown_collective_is_no_free_one() -> None:
    assert all("no cost is known" in text for text in run_ranks(unknown, WORLD))
