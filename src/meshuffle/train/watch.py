"""What a person sees of a run while it goes, and the records that stay.

The main rank writes `metrics.csv` (a row per epoch), `log.jsonl` (steps and events) and
TensorBoard event files, and shows a progress bar, or plain lines where there is no terminal.
"""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from meshuffle.files import finite, write_text
from meshuffle.report.record import loss_text
from meshuffle.tasks.base import Task

_PLAIN_EVERY_S = 20.0


def columns(task: Task) -> tuple[str, ...]:
    """Return the columns of `metrics.csv`."""
    running = (f"train_{task.running.key}",) if task.running else ()
    judged = tuple(f"val_{metric.key}" for metric in task.metrics)
    return (
        *("epoch", "step", "lr", "train_loss", *running),
        *("val_loss", *judged, "images_per_s", "data_wait", "seconds"),
    )


class Watch(Protocol):
    """What the loop tells; every rank has one, and only the main rank's does anything."""

    def event(self, text: str) -> None:
        """Say one line."""

    def begin_epoch(self, epoch: int, num_epochs: int, num_steps: int, done: int) -> None:
        """Start a bar of `num_steps` steps, `done` of which are done."""

    def step(self, values: Mapping[str, float], advance: int) -> None:
        """Record a step's values: step, epoch, loss, the running metric, lr, images_per_s."""

    def end_epoch(self, row: Mapping[str, Any]) -> None:
        """Record an epoch's row of `columns`; what has no column is left out."""


class SilentWatch:
    """The watch of the ranks that do not print."""

    def event(self, text: str) -> None:
        """Do nothing."""

    def begin_epoch(self, epoch: int, num_epochs: int, num_steps: int, done: int) -> None:
        """Do nothing."""

    def step(self, values: Mapping[str, float], advance: int) -> None:
        """Do nothing."""

    def end_epoch(self, row: Mapping[str, Any]) -> None:
        """Do nothing."""


class RunWatch:
    """The main rank's watch; made by `watch_run`."""

    def __init__(self, run: Path, task: Task, console: Console, log: Any, board: Any) -> None:
        self._metrics, self._learns = run / "metrics.csv", task
        self._console, self._log, self._board = console, log, board
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[values]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._epoch_text, self._last_plain = "", time.monotonic()

    def event(self, text: str) -> None:
        """Say one line and record it."""
        self._record({"kind": "event", "text": text})
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def begin_epoch(self, epoch: int, num_epochs: int, num_steps: int, done: int) -> None:
        """Show an empty bar, or one that is partly done."""
        self._epoch_text = f"{epoch}/{num_epochs}"
        if self._console.is_terminal:
            self._bar.start()
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(
                "", total=num_steps, completed=done, epoch=self._epoch_text, values=""
            )

    def step(self, values: Mapping[str, float], advance: int) -> None:
        """Record values and move the bar; without a terminal, a line now and then."""
        self._record({"kind": "step", **values})
        for key in ("loss", "lr", "images_per_s"):
            self._board.add_scalar(f"train/{key}", values[key], int(values["step"]))
        parts = [f"loss {loss_text(values['loss'])}"]
        if (running := self._learns.running) is not None:
            parts.append(f"{running.label} {values[running.key]:5.1f} {running.unit}")
        text = "  ".join([*parts, f"{values['images_per_s']:.0f} images/s"])
        if self._task is not None:
            self._bar.update(self._task, advance=advance, values=text)
        elif time.monotonic() - self._last_plain > _PLAIN_EVERY_S:
            self._last_plain = time.monotonic()
            self._console.print(f"epoch {self._epoch_text} step {values['step']:.0f}  {text}")

    def end_epoch(self, row: Mapping[str, Any]) -> None:
        """Write the row and say it in one line."""
        with self._metrics.open("a", newline="") as file:
            names = columns(self._learns)
            csv.DictWriter(file, names, restval="", extrasaction="ignore").writerow(row)
        for key in names[2:]:
            if row.get(key, "") != "":
                self._board.add_scalar(f"epoch/{key}", row[key], int(row["step"]))
        self._board.flush()
        self.event(_epoch_line(self._epoch_text, row, self._learns))

    def _record(self, values: Mapping[str, Any]) -> None:
        self._log.write(json.dumps(finite({**values, "time": round(time.time(), 3)})) + "\n")

    def close(self) -> None:
        """Take the bar away."""
        self._bar.stop()


def _epoch_line(epoch: str, row: Mapping[str, Any], task: Task) -> str:
    parts = [f"epoch {epoch}  loss {loss_text(row['train_loss'])}"]
    if task.running is not None:
        parts[0] += f"  {task.running.text(row[f'train_{task.running.key}'])}"
    first = task.metrics[0]
    if (value := row.get(f"val_{first.key}", "")) != "":
        parts.append(f"val loss {loss_text(row['val_loss'])}  val {first.text(value)}")
    parts.append(f"{row['images_per_s']:.0f} images/s  {row['seconds']:.1f} s")
    if row["data_wait"] > 0.1:
        parts.append(f"waited for data {100 * row['data_wait']:.0f} % of the time")
    return "  |  ".join(parts)


@contextmanager
def watch_run(
    run: Path, task: Task, *, first_step: int, first_epoch: int, quiet: bool
) -> Iterator[RunWatch]:
    """Open the records of a run; rows from `first_epoch` on are about to be made again.

    Args:
        quiet: print to standard error, which leaves standard output to `--json`.
    """
    from torch.utils.tensorboard import SummaryWriter

    console = Console(stderr=quiet)
    _keep_rows(run / "metrics.csv", columns(task), first_epoch)
    board = SummaryWriter(str(run / "tensorboard"), purge_step=first_step or None)
    with (run / "log.jsonl").open("a", buffering=1) as log:
        watch = RunWatch(run, task, console, log, board)
        try:
            yield watch
        finally:
            watch.close()
            board.close()


def _keep_rows(path: Path, names: tuple[str, ...], first_epoch: int) -> None:
    """Write the header, and keep the rows of the epochs before `first_epoch` (from 1)."""
    rows: list[dict[str, str]] = []
    if path.exists():
        with path.open(newline="") as file:
            read = csv.DictReader(line.replace("\0", "") for line in file)
            whole = [row for row in read if row["epoch"].isdigit()]  # a kill leaves half a row
            rows = [row for row in whole if int(row["epoch"]) < first_epoch]
    lines = [",".join(names)] + [",".join(row.get(c) or "" for c in names) for row in rows]
    write_text(path, "\n".join(lines) + "\n")


def environment() -> dict[str, Any]:
    """Return versions, host and processor, for `env.json`."""
    import platform
    import shlex
    import sys
    from importlib.metadata import version

    import torch
    import torchvision

    from meshuffle.comm.device import describe, num_cores, pick_device

    return {
        "meshuffle": version("meshuffle"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "platform": platform.platform(),
        "device": describe(pick_device()),
        "cores": num_cores(),
        "command": shlex.join(sys.argv),
        "launcher": next(
            (k for k in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID") if k in os.environ), ""
        ),
    }
