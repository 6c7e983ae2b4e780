"""`meshuffle bench`: measure every backend in turn, for several rounds, on the same images.

    subject ──one file per format──▶ workers ──outputs──▶ accuracy, agreement
                                        └──rounds: latency at batch 1, images/s at the best batch

The speed of a machine drifts, so backends take turns within a round, and figures are medians over
the rounds. Only one backend computes at a time.
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
"""The batch sizes that are tried for the highest rate; the latency is measured with 1."""

AGREEMENT = 99.0
"""The agreement with eager, in percent, that `--best` requires."""

_EXAMPLES = 8  # images that check a written file
_TRY_S, _LATENCY_S, _RATE_S = 0.4, 0.5, 1.0  # seconds of one measurement


@dataclass(frozen=True)
class Row:
    """The measurements of a backend.

    Attributes:
        backend: name of the backend.
        images_per_s: median of the rounds, at the fastest batch size.
        batch: that batch size.
        spread: (highest − lowest) / median of `images_per_s` over the rounds, in percent.
        latency_ms, latency_p95_ms: median and 95th percentile of the time for one image.
        accuracy: the task's first metric on the images; None without labels.
        agreement: agreement with eager in percent; see `BenchSubject.agreement`.
        file_bytes: size of the model's files.
        load_s: seconds until the first answer, including imports.
        peak_bytes: peak memory of its process.
        threads: CPU threads.
        runtime: name and version of the runtime.
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
    """The results of a benchmark.

    Attributes:
        rows: the backends that ran, in the order of `BACKENDS`.
        missing: the reason why a backend did not run, by its name.
        model, images: descriptions of the model and of the images.
        metric: name of the metric in `Row.accuracy`.
        machine: name of the processor.
        load: number of busy cores before the benchmark.
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
        """The fastest of the backends that agree with eager."""
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
        backends: names of `BACKENDS`; none means all. Eager always runs, for the comparison.
        threads: CPU threads of each backend; 0 is one per core.
        rounds, images: ≥ 1.
        data: DATA of the images; None is that of the weights, or digits for a bare model.
        model, input_size: see `open_subject`.
        say: called with lines about the progress.

    Raises:
        ConfigError: a backend is unknown, or a number is below its minimum.
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
        opener = _Opener(subject, Path(name), threads, model or subject.card.model)
        found: dict[str, _Entrant] = {}
        missing = {}
        for backend in asked:
            try:
                entrant = opener.enter(backend, stack)
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
    """A backend that takes part, and its measurements."""

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


class _Opener:
    """Writes the files of the backends, and opens them."""

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
        """Return the backend with its model open and its outputs judged."""
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
