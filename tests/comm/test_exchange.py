from __future__ import annotations

import os
import subprocess
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from meshuffle.comm.exchange import GroupExchange, SharedExchange, make_exchange
from meshuffle.comm.group import set_patience
from meshuffle.errors import RankFailed
from tests.ranks import run_ranks

NUM_ROUNDS = 300


def compare(group: dist.ProcessGroup) -> tuple[bool, Tensor]:
    """Both kinds gather the same, many times over, with sizes and dtypes that change."""
    rank = dist.get_rank(group)
    shared, plain = SharedExchange(group), GroupExchange(group)
    generator = torch.Generator().manual_seed(rank)
    same, total = True, torch.zeros(1, dtype=torch.float64)
    for number in range(NUM_ROUNDS):
        dtype = (torch.float64, torch.float32, torch.int64)[number % 3]
        vector = (100 * torch.rand(1 + number % 17, generator=generator)).to(dtype)
        a = shared.all_gather(vector)
        if number % 10 == 0:
            same = same and torch.equal(a, plain.all_gather(vector))
        total += shared.all_sum(vector.double()).sum()
    return same, total


def test_shared_memory_gathers_what_the_group_gathers() -> None:
    found = run_ranks(compare, 3)
    assert all(same for same, _ in found)
    assert len({float(total) for _, total in found}) == 1


def stay_away(group: dist.ProcessGroup) -> str:
    exchange = SharedExchange(group)
    if dist.get_rank(group) == 1:
        return ""
    set_patience(0.3)
    with pytest.raises(RankFailed) as failed:
        exchange.all_gather(torch.zeros(1))
    set_patience(60)  # for the end of the test
    return str(failed.value)


def test_a_rank_that_stays_away_is_named() -> None:
    assert "rank 1 of 2 did not answer rank 0" in run_ranks(stay_away, 2)[0]


def test_one_rank_needs_no_shared_memory(alone: None) -> None:
    group: Any = dist.group.WORLD
    exchange = make_exchange(group, torch.device("cpu"), one_host=True)
    assert isinstance(exchange, GroupExchange)
    assert exchange.all_sum(torch.tensor([3.0])).tolist() == [3.0]


def leave(group: dist.ProcessGroup) -> str:
    """Rank 1 hands its place to a process that ends, and that nobody waits for: a zombie."""
    exchange = SharedExchange(group)
    if dist.get_rank(group) == 1:
        return ""
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    exchange._counters[8 + 1] = child.pid
    with pytest.raises(RankFailed) as failed:
        exchange.all_gather(torch.zeros(1))
    child.wait()
    return str(failed.value)


def test_a_rank_that_has_died_is_named() -> None:
    assert run_ranks(leave, 2)[0] == "rank 1 of 2 has died"


def too_much(group: dist.ProcessGroup) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        SharedExchange(group).all_gather(torch.zeros(1 << 20))


def test_a_vector_that_is_no_small_one() -> None:
    run_ranks(too_much, 2)
