"""Eight-bit files: real images to calibrate on, and the accuracy that the file loses.

Calibration runs a few hundred training images through the network, to learn the range of each
tensor (post-training quantisation). The task's first metric on the whole validation split, before
and after, decides whether the file is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from meshuffle.data import ImageSource, auto_workers, eval_loader
from meshuffle.deploy.formats.base import Run
from meshuffle.deploy.parity import Change
from meshuffle.deploy.subject import Subject
from meshuffle.errors import ConfigError, DataError, ImageError, ParityError
from meshuffle.infer.evaluation import joined
from meshuffle.infer.images import open_split
from meshuffle.tasks import make_task
from meshuffle.tasks.base import Metric

NUM_IMAGES = 300
"""The number of training images to calibrate on."""

_BATCH = 32


class Int8:
    """The calibration of an eight-bit file, and the judgement of it.

    Args:
        subject: the exported model.
        data: DATA with a train and a val split; None is the training data of the weights.
        max_drop: points that the file may lose, ≥ 0; see `points_lost`.
        num_images: the most images to calibrate on, ≥ 1.

    Raises:
        ConfigError: a value is out of range.
        DataError: a split is missing, or has no readable image.
    """

    def __init__(
        self,
        subject: Subject,
        data: str | None,
        *,
        max_drop: float = 1.0,
        num_images: int = NUM_IMAGES,
    ) -> None:
        if not max_drop >= 0 or num_images < 1:
            raise ConfigError(f"--max-drop (={max_drop}) must be at least 0 points")
        self.subject, self.max_drop = subject, max_drop
        self.task = make_task(subject.card)
        self.task.require()
        train, what, _ = open_split(data, "train", subject.card)
        self.images_NCHW = _evenly(train, subject, num_images, what)
        self.judged, self.what, _ = open_split(data, "val", subject.card)

    def inputs(self, batch: int = 1) -> Iterator[NDArray[np.float32]]:
        """Yield the calibration images as inputs of the network, float32 [batch, 3, H, W]."""
        for images_NCHW in self.images_NCHW.split(batch):
            yield self.subject.card.preprocess.normalise(images_NCHW).contiguous().numpy()

    @cached_property
    def before(self) -> float:
        """The metric of the model on the validation split."""
        return self._metric(module_run(self.subject.module))

    def judge(self, run: Run, name: str) -> Change:
        """Return how much worse the file is that `run` executes; `name` is its format.

        Raises:
            ParityError: the file loses more than `max_drop` points.
        """
        metric = self.task.metrics[0]
        before, after = self.before, self._metric(run)
        points, num = points_lost(metric, before, after), len(self.judged)
        text = f"{metric.text(before)} → {metric.number(after)} on {num} images of {self.what}"
        if not points <= self.max_drop:
            raise ParityError(
                f"{name} in int8 loses too much: {text}, {points:.2f} points; --max-drop "
                f"(={self.max_drop:g}) is the limit. Nothing was written"
            )
        return Change(metric.key, before, after, points, num, text)

    def _metric(self, run: Run) -> float:
        preprocess, pieces = self.subject.card.preprocess, []
        read = partial(eval_loader, self.judged, preprocess, batch_size=_BATCH)
        for batch in read(num_workers=auto_workers(self.judged), dense=self.task.dense):
            if len(batch):
                x = preprocess.normalise(batch.images).contiguous().numpy()
                rows = self.task.judge_deployed(torch.from_numpy(run(x)), batch.targets)
                pieces.append({name: column.numpy() for name, column in rows.items()})
        if not pieces:
            raise DataError(f"{self.what}: no readable image to judge int8 on")
        return self.task.conclude(joined(pieces))[self.task.metrics[0].key]


def module_run(module: nn.Module) -> Run:
    """Return the function that executes a module in PyTorch."""

    @torch.inference_mode()
    def run(x: NDArray[Any]) -> NDArray[np.float32]:
        outputs: NDArray[np.float32] = module(torch.from_numpy(x)).numpy()
        return outputs

    return run


def points_lost(metric: Metric, before: float, after: float) -> float:
    """Return how much worse `after` is: in percentage points, or else in percent of `before`.

    It is negative if `after` is better.
    """
    lost = after - before if metric.lower else before - after
    return lost if metric.unit == "%" else 100 * lost / max(abs(before), 1e-12)


def _evenly(source: ImageSource, subject: Subject, num: int, what: str) -> Tensor:
    """Return readable images, evenly spread over a split, in the evaluation view."""
    views = []
    for index in np.linspace(0, len(source) - 1, min(num, len(source))).round().astype(int):
        try:
            views.append(subject.card.preprocess.to_uint8(source.image(int(index))))
        except ImageError:
            continue
    if not views:
        raise DataError(f"{what}: no readable image to calibrate int8 on")
    return torch.stack(views)
