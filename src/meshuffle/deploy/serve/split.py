"""A replica of several ranks: processes that compute a network together.

    the replica, rank 0 ──images as uint8, over a pipe──▶ the other ranks
    each rank: its part of the network, by collectives ──▶ rank 0: what `Task.answer` takes

A pipe carries the images, not a broadcast, because ranks may wait for hours until a request comes.
"""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import multiprocessing.util
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from meshuffle.comm.forking import fork_server
from meshuffle.comm.group import RankEnv, process_group
from meshuffle.deploy.formats.base import Run
from meshuffle.errors import in_words
from meshuffle.infer.split import Normalised, own_part
from meshuffle.planner.plan import parse_plan
from meshuffle.tasks import make_task
from meshuffle.weights import load_model

ToRun = Callable[[nn.Module, torch.device], Run]


@dataclass(frozen=True)
class Member:
    """One rank of a replica, as plain data.

    Attributes:
        source, model, plan: see `Backend`.
        device: `cpu` or `cuda:INDEX`.
        port: TCP port at which rank 0 waits for the others.
    """

    source: str
    model: str | None
    plan: str
    rank: int
    device: str
    threads: int
    port: int

    def join(self, to_run: ToRun, stack: contextlib.ExitStack) -> Run:
        """Join the other ranks and return the function that computes this rank's part.

        Closing `stack` leaves the group.
        """
        torch.set_num_threads(self.threads)
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port)}
        plan, device = parse_plan(self.plan), torch.device(self.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        world = plan.num_ranks
        env = RankEnv(self.rank, world, self.rank, world)
        network, card = load_model(Path(self.source), self.model, mapped=True)
        stack.enter_context(process_group(env, device))
        network = Normalised(make_task(card).answering(network), card.preprocess)
        example = torch.empty(2, 3, *card.preprocess.size, dtype=torch.uint8, device="meta")
        return to_run(own_part(network, example, plan, env, device), device)


class SplitNetwork:
    """Executes the network as rank 0, with other ranks that it starts.

    If one of them ends, this process ends too, because it cannot answer alone.

    Raises:
        MeshuffleError: this rank could not start.
    """

    def __init__(self, members: list[Member], to_run: ToRun) -> None:
        context = fork_server(__name__)  # a fork has no fork server yet
        self._ends: list[Connection] = []
        others: list[BaseProcess] = []
        for member in members[1:]:
            end, child = context.Pipe()
            other = context.Process(target=_follow, args=(child, member, to_run), daemon=True)
            other.start()
            child.close()
            self._ends.append(end)
            others.append(other)
        leaving = threading.Event()
        # multiprocessing then ends the others
        multiprocessing.util.Finalize(None, leaving.set, exitpriority=0)
        threading.Thread(target=_end_with, args=(others, leaving), daemon=True).start()
        self._joined = contextlib.ExitStack()
        try:
            self._run = members[0].join(to_run, self._joined)
        except BaseException:
            leaving.set()
            for one in others:
                one.terminate()
            raise

    def __call__(self, x: NDArray[np.uint8]) -> NDArray[Any]:
        """Return what `Task.answer` takes, for uint8 images (N, h, w, 3)."""
        for end in self._ends:
            end.send(x)
        return self._run(x)


def _end_with(others: list[BaseProcess], leaving: threading.Event) -> None:
    """Wait until one of the other ranks ends, then end this process."""
    multiprocessing.connection.wait([other.sentinel for other in others])
    if leaving.is_set():
        return
    rank, code = next((i, o.exitcode) for i, o in enumerate(others, 1) if o.exitcode is not None)
    print(f"rank {rank} of a replica ended with exit code {code}", file=sys.stderr)  # noqa: T201
    os._exit(1)


def _follow(end: Connection, member: Member, to_run: ToRun) -> None:
    """Compute with rank 0 until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.ExitStack() as stack:
        try:
            run = member.join(to_run, stack)
        except Exception as error:  # noqa: BLE001  # rank 0 acts on the exit code
            print(f"rank {member.rank}: {in_words(error)}", file=sys.stderr)  # noqa: T201
            sys.exit(1)
        with contextlib.suppress(EOFError, OSError):
            while True:
                run(end.recv())


def members_of(
    source: str, model: str | None, plan: str, *, threads: int, index: int, num_gpus: int
) -> list[Member]:
    """Return the ranks of replica `index`, on the CPU if `num_gpus` is 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    world = parse_plan(plan).num_ranks
    gpus = [(index * world + rank) % num_gpus if num_gpus else None for rank in range(world)]
    devices = ["cpu" if gpu is None else f"cuda:{gpu}" for gpu in gpus]
    return [
        Member(source, model, plan, rank, device, threads, port)
        for rank, device in enumerate(devices)
    ]
