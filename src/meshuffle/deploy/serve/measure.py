"""Measure how fast the network runs here: alone, and in several processes at once."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from numpy.typing import NDArray

from meshuffle.comm.launch import end_with_parent
from meshuffle.deploy.formats.base import Run
from meshuffle.deploy.serve.backends import Backend
from meshuffle.errors import MeshuffleError, in_words

BATCHES = (1, 4, 16)
GPU_BATCHES = (1, 16, 64)
_SECONDS = 0.5
_NEARLY = 0.95
_TIMEOUT_S = 120

Size = tuple[int, int]
Way = TypeVar("Way")


@dataclass(frozen=True)
class Layout:
    """A number of replicas, each of `ranks` ranks with `threads` threads.

    `images_per_s` is the sum over the replicas; 0 means not measured.
    """

    replicas: int
    threads: int
    images_per_s: float = 0.0
    ranks: int = 1

    def __str__(self) -> str:
        threads = "thread" if self.threads == 1 else "threads"
        ranks = f"{self.ranks} ranks × " if self.ranks > 1 else ""
        return f"{self.replicas} × {ranks}{self.threads} {threads}"


@dataclass(frozen=True)
class Choice:
    """The chosen way to run a service; `speeds`: images/s of one replica, by backend."""

    backend: Backend
    layout: Layout
    batch: int
    speeds: dict[str, float]
    layouts: list[Layout]


def images_per_s(run: Run, x: NDArray[Any], seconds: float) -> float:
    """Return the images per second of `run` when it computes the batch `x` repeatedly."""
    started, num, elapsed = time.perf_counter(), 0, 0.0
    while elapsed < seconds or not num:
        run(x)
        num += len(x)
        elapsed = time.perf_counter() - started
    return num / elapsed


def nearly_fastest(speeds: Mapping[Way, float]) -> list[Way]:
    """Return the ways whose speed is at least 95 % of the highest."""
    highest = max(speeds.values())
    return [way for way, speed in speeds.items() if speed >= _NEARLY * highest]


def best_batch(found: dict[int, float]) -> int:
    """Return the smallest batch that is nearly as fast as the fastest one."""
    return min(nearly_fastest(found))


def layouts(cores: int, num_gpus: int, ranks: int = 1) -> list[Layout]:
    """Return the layouts worth measuring: a GPU per rank, or groups of 1, 2, 4 … cores."""
    if num_gpus:
        return [Layout(max(1, num_gpus // ranks), max(1, cores // num_gpus), ranks=ranks)]
    groups = max(1, cores // ranks)  # with fewer cores than ranks, these share them
    threads = [1 << i for i in range(groups.bit_length()) if 1 << i <= groups]
    return [Layout(groups // t, t, ranks=ranks) for t in threads]


def best_layout(found: list[Layout]) -> Layout:
    """Return the layout with most replicas among those that are nearly as fast as the fastest.

    More replicas also share the decoding and the HTTP between more processes.
    """
    near = nearly_fastest({layout: layout.images_per_s for layout in found})
    return max(near, key=lambda layout: layout.replicas)


def measured(
    backend: Backend, layout: Layout, batches: Sequence[int], size: Size, seconds: float = _SECONDS
) -> dict[int, float]:
    """Return images per second by batch size, summed over replicas that run at the same time.

    Raises:
        MeshuffleError: a process failed or ended, for example for lack of memory.
    """
    context = multiprocessing.get_context("forkserver")
    ends, workers = [], []
    try:
        for i in range(layout.replicas):
            end, child = context.Pipe()
            arguments = (child, backend, layout.threads, i, tuple(batches), size, seconds)
            worker = context.Process(target=_work, args=arguments)
            worker.start()
            child.close()
            ends.append(end)
            workers.append(worker)
        for end in ends:
            _received(end, layout)
        for end in ends:
            end.send("start")
        found = [_received(end, layout) for end in ends]
        return {batch: sum(one[batch] for one in found) for batch in batches}
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def _received(end: Connection, layout: Layout) -> dict[int, float]:
    with suppress(EOFError, OSError):
        if end.poll(_TIMEOUT_S):
            answer = end.recv()
            if isinstance(answer, dict):
                return answer
            raise MeshuffleError(str(answer))
    raise MeshuffleError(f"a replica of {layout} ended while it was measured; try fewer")


def _work(
    end: Connection,
    backend: Backend,
    threads: int,
    index: int,
    batches: Sequence[int],
    size: Size,
    seconds: float,
) -> None:
    """Open the backend, wait until all have, and measure."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    try:
        run = backend.open(threads, index)
        inputs = {batch: backend.blank(batch, size) for batch in batches}
        for x in inputs.values():
            run(x)  # the first call plans and allocates
        end.send({})
        end.recv()
        end.send({batch: images_per_s(run, x, seconds) for batch, x in inputs.items()})
    except Exception as error:  # noqa: BLE001  # the parent reports it
        end.send(in_words(error))
