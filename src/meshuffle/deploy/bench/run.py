"""What `meshuffle bench` does: every backend in turn, round after round, on the same images.

    subject ──one file per format──▶ workers ──outputs──▶ accuracy, agreement
                                        └──rounds: latency at batch 1, images/s at the best batch

Machines drift, so backends take turns within a round and figures are medians over the rounds.
Only one computes at a time.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from meshuffle.comm.device import num_cores
from meshuffle.deploy.api import write, write_unchecked
from meshuffle.deploy.bench.backends import Backend, find_backends
from meshuffle.deploy.bench.subject import BenchSubject, open_subject
from meshuffle.deploy.bench.worker import Job, Worker
from meshuffle.deploy.formats import find_format
from meshuffle.deploy.subject import Subject
from meshuffle.errors import ConfigError, MeshuffleError, in_words
from meshuffle.weights import save_weights

BATCHES = (1, 8, 32, 64)
"""The batches of which the fastest is taken; 1 is the batch of the latency."""

AGREEMENT = 99.0
"""In percent, what `--best` asks of a backend."""

_EXAMPLES = 8  # images that a written file is checked on
_TRY_S, _LATENCY_S, _RATE_S = 0.4, 0.5, 1.0  # seconds of one measurement


@dataclass(frozen=True)
class Row:
    """What was measured of a backend.

    Attributes:
        backend: its name; `runtime`: what executes it, with its version.
        images_per_s: median over the rounds, at `batch`, the fastest; `spread`: (most − least) /
            median of them, in percent.
        latency_ms, latency_p95_ms: of one image.
        accuracy: the task's first metric on the images; None without labels.
        agreement: with eager, in percent; see `BenchSubject.agreement`.
        file_bytes: of the model's file, or files.
        load_s: until the first answer, imports included; peak_bytes: of its process's memory.
    """

    backend: str
    images_per_s: float
    batch: int
    spread: float
    latency_ms: float
    latency_p95_ms: float
    accuracy: float | None
    agreement: float
    file_bytes: int
    load_s: float
    peak_bytes: int
    threads: int
    runtime: str


@dataclass(frozen=True)
class Report:
    """What a benchmark found.

    Attributes:
        rows: those that ran, in the order of `BACKENDS`.
        missing: backend → why it did not run.
        model, images: what was measured; `metric`: what `accuracy` is.
        machine: the processor; `load`: what it was busy with before, in cores.
    """

    rows: tuple[Row, ...]
    missing: dict[str, str]
    model: str
    images: str
    metric: str
    machine: str
    load: float

    @property
    def best(self) -> Row:
        """The fastest of those that agree with eager."""
        return max(
            (row for row in self.rows if row.agreement >= AGREEMENT), key=lambda r: r.images_per_s
        )


def bench(
    target: str,
    *,
    backends: Sequence[str] = (),
    threads: int = 0,
    rounds: int = 5,
    images: int = 256,
    data: str | None = None,
    model: str | None = None,
    input_size: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Measure every backend that is installed; about ten seconds each for five rounds.

    Args:
        target: a run folder, a weights file, or the name of a model, which gets random weights.
        backends: names of `BACKENDS`; none is all. Eager is always there, to compare with.
        threads: of the CPU, for each; 0 is one per core.
        rounds, images: ≥ 1.
        data: DATA of the images; None is what the weights know, and digits for a bare model.
        model, input_size: see `open_subject`.
        say: gets lines on how far it is.

    Raises:
        ConfigError: an unknown backend, or a number below its least.
        MeshuffleError: eager itself fails.
    """
    for name, value, least in (
        ("threads", threads, 0),
        ("rounds", rounds, 1),
        ("images", images, 1),
    ):
        if value < least:
            raise ConfigError(f"--{name} (={value}) must be at least {least}")
    asked = find_backends(backends)
    threads = threads or num_cores()
    subject = open_subject(target, num=images, data=data, model=model, input_size=input_size)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    say(f"{subject.card.model} on {subject.what}, {threads} threads")
    with (
        tempfile.TemporaryDirectory(prefix="meshuffle-bench-") as name,
        contextlib.ExitStack() as stack,
    ):
        makers = _Maker(subject, Path(name), threads, model or subject.card.model)
        found: dict[str, _Entrant] = {}
        missing = {}
        for backend in asked:
            try:
                entrant = makers.enter(backend, stack)
            except MeshuffleError as error:
                if backend.name == "eager":
                    raise
                missing[backend.name] = in_words(error)
                say(f"{backend.name}: left out: {missing[backend.name]}")
                continue
            found[backend.name] = entrant
            say(f"{backend.name}: ready after {entrant.worker.load_s:.1f} s")
        _measure(list(found.values()), rounds, say)
        rows = tuple(entrant.row(threads) for entrant in found.values())
    return Report(
        rows, missing, subject.card.model, subject.what, subject.metric, _machine(), round(load, 2)
    )


class _Entrant:
    """A backend that takes part, and what was measured of it."""

    def __init__(self, backend: Backend, worker: Worker, file_bytes: int, runtime: str) -> None:
        self.backend, self.worker = backend, worker
        self.file_bytes, self.runtime = file_bytes, runtime
        self.accuracy: float | None = None
        self.agreement = 100.0
        self.batch = 1
        self.latencies: list[float] = []
        self.rates: list[float] = []

    def choose_batch(self, limit: int | None) -> None:
        def rate(batch: int) -> float:
            self.worker.time(batch, 0)
            return batch / min(self.worker.time(batch, _TRY_S))

        self.batch = max((b for b in BATCHES if limit is None or b <= limit), key=rate)

    def take_turn(self) -> None:
        self.latencies += self.worker.time(1, _LATENCY_S)
        times = self.worker.time(self.batch, _RATE_S)
        self.rates.append(1e3 * self.batch * len(times) / sum(times))

    def row(self, threads: int) -> Row:
        middle = statistics.median(self.rates)
        return Row(
            backend=self.backend.name,
            images_per_s=round(middle, 1),
            batch=self.batch,
            spread=round(100 * (max(self.rates) - min(self.rates)) / middle, 1),
            latency_ms=round(statistics.median(self.latencies), 3),
            latency_p95_ms=round(float(np.quantile(self.latencies, 0.95)), 3),
            accuracy=None if self.accuracy is None else round(self.accuracy, 3),
            agreement=round(self.agreement, 2),
            file_bytes=self.file_bytes,
            load_s=round(self.worker.load_s, 2),
            peak_bytes=self.worker.peak_bytes(),
            threads=threads,
            runtime=self.runtime,
        )


class _Maker:
    """Writes the files that backends open, and opens them."""

    def __init__(self, subject: BenchSubject, folder: Path, threads: int, model: str) -> None:
        self.subject, self.folder, self.threads, self.model = subject, folder, threads, model
        self.images = folder / "images.npy"
        np.save(self.images, subject.x_NCHW)
        self.weights = folder / "weights.safetensors"
        save_weights(self.weights, subject.network.state_dict(), subject.card)
        self.exported = Subject(
            subject.network, subject.card, subject.views_NCHW[:_EXAMPLES], decoded=False
        )
        self.reference: NDArray[np.float32] | None = None

    def enter(self, backend: Backend, stack: contextlib.ExitStack) -> _Entrant:
        """Return the backend with its model open; its outputs have been judged."""
        backend.require()
        path, file_bytes, runtime = self._file(backend)
        worker = Worker(Job(backend, path, self.images, self.threads, self.model))
        stack.callback(worker.close)
        entrant = _Entrant(backend, worker, file_bytes, runtime)
        place = self.folder / f"{backend.name}.npy"
        worker.outputs(place)
        outputs = np.load(place)
        self.reference = outputs if self.reference is None else self.reference
        entrant.accuracy = self.subject.accuracy(outputs)
        entrant.agreement = self.subject.agreement(outputs, self.reference)
        form = find_format(backend.format) if backend.format else None
        entrant.choose_batch(form.max_batch if form else None)
        return entrant

    def _file(self, backend: Backend) -> tuple[Path, int, str]:
        if backend.format is None:
            return self.weights, self.weights.stat().st_size, f"torch {torch.__version__}"
        form = find_format(backend.format)
        folder = self.folder / f"{form.name}{'-int8' if backend.int8 else ''}"
        folder.mkdir(exist_ok=True)
        path = folder / f"model{form.suffix}"
        if backend.int8:
            write_unchecked(form, self.exported, path, self.subject)
        elif not path.exists():
            write(form, self.exported, path)
        return path, sum(p.stat().st_size for p in folder.iterdir()), form.runtime(path)


def _measure(entrants: list[_Entrant], rounds: int, say: Callable[[str], None]) -> None:
    for turn in range(rounds):
        for entrant in entrants:
            entrant.take_turn()
        say(f"round {turn + 1} of {rounds}")


def _machine() -> str:
    from meshuffle.comm.device import describe, pick_device

    return describe(pick_device("cpu"))
