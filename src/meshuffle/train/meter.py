"""The running sums of an epoch: what the loop shows while it trains."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from meshuffle.comm.device import synchronize
from meshuffle.comm.exchange import Exchange
from meshuffle.errors import MeshuffleError
from meshuffle.tasks.base import Task
from meshuffle.train.state import TrainState
from meshuffle.train.step import sum_over_ranks
from meshuffle.train.watch import Watch

_SHOW_EVERY_S = 0.5


class Meter:
    """Sums of an epoch; shown now and then, over all ranks."""

    def __init__(self, state: TrainState, watch: Watch) -> None:
        self._state, self._watch = state, watch
        self._pending: Any = None
        self._num_pending, self._lr = 0, 0.0
        self._shown = time.perf_counter()
        self._every = 1
        self.wait_s = self.seconds = 0.0

    def add(self, sums: Any, lr: float, exchange: Exchange) -> None:
        """Add a step's sums; every so many steps, show what has come together."""
        self._pending = sums if self._pending is None else self._pending + sums
        self._num_pending, self._lr = self._num_pending + 1, lr
        if self._num_pending >= self._every:
            self.show(exchange)

    def show(self, exchange: Exchange) -> None:
        """Sum over the ranks, add to the run's progress, and tell the watch."""
        if not self._num_pending:
            return
        synchronize(self._state.step.device)
        now = time.perf_counter()
        seconds, self._shown = now - self._shown, now
        main_seconds = seconds if exchange.rank == 0 else 0.0
        counts = float(self._state.step.has_loss)  # several ranks of a replica have these sums
        own = [counts * value for value in self._pending.tolist()]
        *sums, seconds = sum_over_ranks([*own, main_seconds], exchange)
        progress = self._state.progress
        if not math.isfinite(sums[0]):
            raise MeshuffleError(
                f"the loss is {sums[0]} at step {progress.step}: start again with a lower --lr "
                f"(now {self._lr:.3g}), a longer --warmup-epochs, or --clip-norm 1"
            )
        progress.sums = [a + b for a, b in zip(progress.sums, sums, strict=True)]
        progress.seconds += seconds
        progress.epoch_seconds += seconds
        self.seconds += seconds
        step_ms = 1000 * seconds / self._num_pending
        progress.step_ms = [*progress.step_ms[-199:], round(step_ms, 3)]
        values: dict[str, float] = {"step": progress.step, "epoch": progress.epoch + 1}
        values |= running_means(self._state.step.task, sums)
        values |= {"lr": self._lr, "images_per_s": round(sums[2] / max(seconds, 1e-9), 2)}
        self._watch.step(values, self._num_pending)
        self._every = max(1, round(1000 * _SHOW_EVERY_S / max(step_ms, 1e-3)))
        self._pending, self._num_pending = None, 0

    def epoch_row(self, lr: float, seconds: float, metrics: Mapping[str, float]) -> dict[str, Any]:
        """Return the row of `metrics.csv` for the epoch that is finished.

        Args:
            metrics: of the validation split.
        """
        progress = self._state.progress
        means = running_means(self._state.step.task, progress.sums)
        return {
            "epoch": progress.epoch,
            "step": progress.step,
            "lr": float(f"{lr:.6g}"),
            "images_per_s": round(progress.sums[2] / max(seconds, 1e-9), 2),
            "data_wait": round(self.wait_s / max(self.seconds, 1e-9), 4),
            "seconds": round(seconds, 3),
            **{f"train_{key}": value for key, value in means.items()},
            **{f"val_{key}": value for key, value in metrics.items()},
        }


def running_means(task: Task, sums: Sequence[float]) -> dict[str, float]:
    """Return the mean loss and, where the task has one, its running metric.

    Args:
        sums: [loss sum, score sum, samples].
    """
    loss, score, samples = sums
    means = {"loss": loss / max(1.0, samples)}
    if task.running is not None:
        factor = 100 if task.running.unit == "%" else 1
        means[task.running.key] = factor * score / max(1.0, samples)
    return means
