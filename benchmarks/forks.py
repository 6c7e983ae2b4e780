"""Ranks as forks of this process, which keep what it has imported and computed."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable

import torch

_GRACE_S = 2  # for the others' own words


def run_forked(
    num_ranks: int, work: Callable[[int], None], failed: Callable[[int, BaseException], None]
) -> bool:
    """Do `work(rank)` in each rank, all of which find each other; return whether all did it.

    Args:
        failed: called in a rank whose work raised.
    """
    children = set()
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    for rank in range(num_ranks):
        child = os.fork()
        if child == 0:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
            try:
                torch.set_num_threads(1)
                work(rank)
            except BaseException as error:  # noqa: BLE001  # a fork must end here
                failed(rank, error)
                os._exit(1)
            os._exit(0)
        children.add(child)
    return _wait(children)


def _wait(left: set[int]) -> bool:
    all_did = True
    while left:
        child, status = os.wait()
        left.discard(child)
        if status and all_did:
            all_did = False
            time.sleep(_GRACE_S)
            for other in left:
                os.kill(other, signal.SIGKILL)
    return all_did
