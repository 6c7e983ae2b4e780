"""Run a function as several ranks on this machine, for tests."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from meshuffle.comm.group import RankEnv, process_group

ROOT = Path(__file__).parents[1]
PYTHON_PATH = os.pathsep.join((str(ROOT), str(ROOT / "src")))
"""For processes that import the tests, and this checkout of the package."""


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def run_ranks(function: Callable[..., Any], world: int, *arguments: Any) -> list[Any]:
    """Return what `function(group, *arguments)` returned on each rank; picklable values.

    The ranks are forked from a process that has loaded `tests/forked.py`.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _rank,
            (world, free_port(), folder, function, arguments),
            nprocs=world,
            start_method="forkserver",
        )
        return [
            torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)
        ]


def _rank(
    rank: int,
    world: int,
    port: int,
    folder: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with process_group(RankEnv(rank, world, rank, world), torch.device("cpu"), 60) as group:
        result = function(group, *arguments)
        dist.barrier(group)
    torch.save(result, Path(folder) / f"{rank}.pt")


def as_launched(group: dist.ProcessGroup) -> None:
    """Set what torchrun sets, so that `train_rank` finds its rank; it prints to standard error."""
    own, world = str(dist.get_rank(group)), str(dist.get_world_size(group))
    os.environ |= {"RANK": own, "WORLD_SIZE": world, "LOCAL_RANK": own, "LOCAL_WORLD_SIZE": world}
    os.environ["MESHUFFLE_QUIET_STDOUT"] = "1"
