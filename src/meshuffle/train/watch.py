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

from meshuffle.train.files import finite, write_text

COLUMNS = (
    *("epoch", "step", "lr", "train_loss", "train_top1"),
    *("val_loss", "val_top1", "val_top5", "images_per_s", "data_wait", "seconds"),
)
_PLAIN_EVERY_S = 20.0


class Watch(Protocol):
    """What the loop tells; every rank has one, and only the main rank's does anything."""

    def event(self, text: str) -> None:
        """Say one line."""

    def begin_epoch(self, epoch: int, num_epochs: int, num_steps: int, done: int) -> None:
        """Start a bar of `num_steps` steps, `done` of which are done."""

    def step(self, values: Mapping[str, float], advance: int) -> None:
        """Record a step's values: step, epoch, loss, top1, lr, images_per_s."""

    def end_epoch(self, row: Mapping[str, Any]) -> None:
        """Record an epoch's row of `COLUMNS`."""


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

    def __init__(self, run: Path, console: Console, log: Any, board: Any) -> None:
        self._metrics, self._console, self._log, self._board = (
            run / "metrics.csv",
            console,
            log,
            board,
        )
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
        text = (
            f"loss {values['loss']:.4f}  top-1 {values['top1']:5.1f} %  "
            f"{values['images_per_s']:.0f} images/s"
        )
        if self._task is not None:
            self._bar.update(self._task, advance=advance, values=text)
        elif time.monotonic() - self._last_plain > _PLAIN_EVERY_S:
            self._last_plain = time.monotonic()
            self._console.print(f"epoch {self._epoch_text} step {values['step']:.0f}  {text}")

    def end_epoch(self, row: Mapping[str, Any]) -> None:
        """Write the row and say it in one line."""
        with self._metrics.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS, restval="").writerow(row)
        for key in COLUMNS[2:]:
            if row.get(key, "") != "":
                self._board.add_scalar(f"epoch/{key}", row[key], int(row["step"]))
        self._board.flush()
        self.event(_epoch_line(self._epoch_text, row))

    def _record(self, values: Mapping[str, Any]) -> None:
        self._log.write(json.dumps(finite({**values, "time": round(time.time(), 3)})) + "\n")

    def close(self) -> None:
        """Take the bar away."""
        self._bar.stop()


def _epoch_line(epoch: str, row: Mapping[str, Any]) -> str:
    parts = [f"epoch {epoch}  loss {row['train_loss']:.4f}  top-1 {row['train_top1']:.2f} %"]
    if row.get("val_top1", "") != "":
        parts.append(f"val loss {row['val_loss']:.4f}  val top-1 {row['val_top1']:.2f} %")
    parts.append(f"{row['images_per_s']:.0f} images/s  {row['seconds']:.1f} s")
    if row["data_wait"] > 0.1:
        parts.append(f"waited for data {100 * row['data_wait']:.0f} % of the time")
    return "  |  ".join(parts)


@contextmanager
def watch_run(run: Path, *, first_step: int, first_epoch: int, quiet: bool) -> Iterator[RunWatch]:
    """Open the records of a run; rows from `first_epoch` on are about to be made again.

    Args:
        quiet: print to standard error, which leaves standard output to `--json`.
    """
    from torch.utils.tensorboard import SummaryWriter

    console = Console(stderr=quiet)
    _keep_rows(run / "metrics.csv", first_epoch)
    board = SummaryWriter(str(run / "tensorboard"), purge_step=first_step or None)
    with (run / "log.jsonl").open("a", buffering=1) as log:
        watch = RunWatch(run, console, log, board)
        try:
            yield watch
        finally:
            watch.close()
            board.close()


def _keep_rows(path: Path, first_epoch: int) -> None:
    """Write the header, and keep the rows of the epochs before `first_epoch` (from 1)."""
    rows: list[dict[str, str]] = []
    if path.exists():
        with path.open(newline="") as file:
            read = csv.DictReader(line.replace("\0", "") for line in file)
            whole = [row for row in read if row["epoch"].isdigit()]  # a kill leaves half a row
            rows = [row for row in whole if int(row["epoch"]) < first_epoch]
    lines = [",".join(COLUMNS)] + [",".join(row.get(c, "") for c in COLUMNS) for row in rows]
    write_text(path, "\n".join(lines) + "\n")


def environment() -> dict[str, Any]:
    """Return versions, host and processor, for `env.json`."""
    import platform
    import sys
    from importlib.metadata import version

    import torch
    import torchvision

    from meshuffle.dist.device import describe, num_cores, pick_device

    return {
        "meshuffle": version("meshuffle"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "platform": platform.platform(),
        "device": describe(pick_device()),
        "cores": num_cores(),
        "command": " ".join(sys.argv),
        "launcher": next(
            (k for k in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID") if k in os.environ), ""
        ),
    }
