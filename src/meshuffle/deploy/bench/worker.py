"""One backend in a process of its own, so that its memory can be measured; it computes on request.

parent ──Job──▶ worker: opens the model ──Opened──▶
       ──Task: outputs of all images, or time──▶ ──answer──▶   … until the pipe closes
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshuffle.deploy.bench.backends import Backend
from meshuffle.deploy.formats import find_format
from meshuffle.deploy.formats.base import Run
from meshuffle.errors import MeshuffleError, in_words

_BATCH = 32  # of the images whose outputs are compared


@dataclass(frozen=True)
class Job:
    """The model that a worker opens, and its images.

    Attributes:
        path: the model's file; a weights file for PyTorch.
        images: a .npy file of float32 [N, 3, H, W].
        threads: CPU threads.
        model: see `load_model`.
    """

    backend: Backend
    path: Path
    images: Path
    threads: int
    model: str | None = None


class Worker:
    """The parent's end of a worker.

    Raises:
        MeshuffleError: the backend failed, or its process died.
    """

    def __init__(self, job: Job) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = job.backend.name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(job, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.load_s: float = self._answer()

    def outputs(self, path: Path) -> None:
        """Write the outputs of all images to `path`, a .npy file."""
        self._ask("outputs", path)

    def time(self, batch: int, seconds: float) -> list[float]:
        """Call the model with `batch` images for about `seconds`; return the ms of each call."""
        times: list[float] = self._ask("time", batch, seconds)
        return times

    def peak_bytes(self) -> int:
        """Return the peak memory of the process; 0 if the system does not report it."""
        peak: int = self._ask("peak_bytes")
        return peak

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()

    def _ask(self, *question: Any) -> Any:
        try:
            self._pipe.send(question)
        except OSError:
            raise self._death() from None
        return self._answer()

    def _answer(self) -> Any:
        try:
            fine, answer = self._pipe.recv()
        except (EOFError, OSError):
            raise self._death() from None
        if not fine:
            raise MeshuffleError(f"{self.name}: {answer}")
        return answer

    def _death(self) -> MeshuffleError:
        self._process.join(5)
        return MeshuffleError(f"{self.name}: its process died (exit {self._process.exitcode})")


def _work(job: Job, pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    if "MESHUFFLE_DEBUG" not in os.environ:  # runtimes print notes on the machine's devices
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    images = np.load(job.images, mmap_mode="r")
    bench: _Bench | None = None

    def begin() -> float:
        nonlocal bench
        started = time.perf_counter()
        bench = _Bench(_open(job), images)
        bench.run(images[:1])
        return time.perf_counter() - started

    if not _tell(pipe, begin):
        return
    while True:
        try:
            name, *values = pipe.recv()
        except (EOFError, OSError):
            return
        if not _tell(pipe, partial(getattr(bench, name), *values)):
            return


def _tell(pipe: Connection, act: Callable[[], Any]) -> bool:
    try:
        answer = (True, act())
    except Exception as error:  # noqa: BLE001  # the parent reports it in one line
        answer = (False, in_words(error))
    pipe.send(answer)
    return answer[0]


@dataclass
class _Bench:
    run: Run
    images: NDArray[np.float32]

    def outputs(self, path: Path) -> None:
        parts = [self.run(self.batch(_BATCH, at)) for at in range(0, len(self.images), _BATCH)]
        np.save(path, np.concatenate(parts))

    def time(self, batch: int, seconds: float) -> list[float]:
        times: list[float] = []
        end = time.perf_counter() + seconds
        place = 0
        while not times or time.perf_counter() < end:
            x_NCHW = self.batch(batch, place, full=True)
            place += batch
            started = time.perf_counter()
            self.run(x_NCHW)
            times.append(1e3 * (time.perf_counter() - started))
        return times

    def batch(self, size: int, at: int, *, full: bool = False) -> NDArray[np.float32]:
        """Return images `at` … `at + size`; with `full`, the first follow again after the last."""
        if not full:
            return np.array(self.images[at : at + size])
        return self.images[np.arange(at, at + size) % len(self.images)]

    def peak_bytes(self) -> int:
        try:
            status = Path("/proc/self/status").read_text()
        except OSError:
            return 0
        found = re.search(r"VmHWM:\s*(\d+) kB", status)
        return 1024 * int(found[1]) if found else 0


def _open(job: Job) -> Run:
    if job.backend.format is not None:
        return find_format(job.backend.format).open(job.path, job.threads, job.backend.precision)
    os.environ["OMP_NUM_THREADS"] = str(job.threads)
    import torch

    from meshuffle.weights import load_model

    torch.set_num_threads(job.threads)
    network, _ = load_model(job.path, job.model)
    forward: Callable[[torch.Tensor], torch.Tensor] = network
    if job.backend.compiled:
        forward = torch.compile(network)

    @torch.inference_mode()
    def run(x_NCHW: NDArray[Any]) -> NDArray[np.float32]:
        outputs: NDArray[np.float32] = forward(torch.from_numpy(x_NCHW)).numpy()
        return outputs

    return run
