"""The subject of a benchmark: a network, real images for it, and their targets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from meshuffle.data import ImageSource, Preprocess, eval_loader, open_data, subset
from meshuffle.deploy.int8 import NUM_IMAGES
from meshuffle.errors import ConfigError, DataError
from meshuffle.infer.evaluation import joined
from meshuffle.infer.images import open_split
from meshuffle.tasks import make_task
from meshuffle.tasks.card import Card
from meshuffle.weights import build_model, load_model, split_key

_BATCH = 32
_SIZE = 224
_AGREES = 0.01
"""For outputs that are not classes: the largest ‖a − b‖ / ‖b‖ that counts as agreement."""


@dataclass(frozen=True)
class BenchSubject:
    """A network, and the images that all backends get.

    Attributes:
        network: in eval mode on the CPU; with random weights if only a model was named.
        card: card of the network.
        what: description of the images.
        x_NCHW: the images normalised, float32 [N, 3, H, W].
        views_NCHW: the same images, uint8.
        train: images to calibrate eight-bit files on; None takes the same ones.
        targets: targets of the images, one tensor per batch; None if they are unknown.
    """

    network: nn.Module
    card: Card
    what: str
    x_NCHW: NDArray[np.float32]
    views_NCHW: Tensor
    train: ImageSource | None
    targets: list[Tensor] | None

    @property
    def metric(self) -> str:
        """The name of the metric that `accuracy` returns."""
        return make_task(self.card).metrics[0].label

    def inputs(self, batch: int = 1) -> Iterator[NDArray[np.float32]]:
        """Yield the images to calibrate on; see `Calibration`."""
        views_NCHW = self.views_NCHW
        if self.train is not None:
            views_NCHW, _ = _images(self.train, self.card, NUM_IMAGES)
        for images_NCHW in views_NCHW.split(batch):
            yield self.card.preprocess.normalise(images_NCHW).contiguous().numpy()

    def accuracy(self, outputs: NDArray[np.float32]) -> float | None:
        """Return the task's first metric of the outputs for all images; None without targets."""
        if self.targets is None:
            return None
        task = make_task(self.card)
        parts = torch.from_numpy(outputs).split([len(t) for t in self.targets])
        judged = [task.judge(x, t) for x, t in zip(parts, self.targets, strict=True)]
        rows = joined([{k: v.numpy() for k, v in part.items()} for part in judged])
        return task.conclude(rows)[task.metrics[0].key]

    def agreement(self, outputs: NDArray[Any], reference: NDArray[Any]) -> float:
        """Return the percentage of images whose outputs agree with the reference's.

        Classes (of images or pixels) agree if the most probable one is the same; other outputs
        agree if they differ by at most 1 % of the reference's norm.
        """
        if make_task(self.card).argmax:
            return 100 * float((outputs.argmax(1) == reference.argmax(1)).mean())
        a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (outputs, reference))
        apart = np.linalg.norm(a - b, axis=1)
        return 100 * float((apart <= _AGREES * np.linalg.norm(b, axis=1)).mean())


def open_subject(
    target: str, *, num: int, data: str | None, model: str | None, input_size: int | None
) -> BenchSubject:
    """Return the subject that `target` names: weights if such a path exists, else a model.

    Args:
        num: number of images, ≥ 1, spread evenly over the split.
        data: DATA of the images; None is that of the weights, or digits for a bare model.
        model: see `load_model`.
        input_size: side of a bare model's input in pixels; None is 224.

    Raises:
        ModelError: there is no such model.
        ConfigError: an input size is given for weights, which have their own.
        DataError: no image can be read.
    """
    path = Path(target)
    is_file = split_key(path)[0].exists()
    if is_file:
        if input_size is not None:
            raise ConfigError(f"--input-size {input_size}: {target} brings its own; leave it out")
        network, card = load_model(path, model)
        task = make_task(card)
        task.require()
        if task.deployed_inputs(1) is not None:
            raise ConfigError(
                f"{target}: a {card.task} model takes no images, so bench cannot run it"
            )
        source, what, card = open_split(data, None, card)
    else:
        preprocess = Preprocess.imagenet(input_size or _SIZE)
        card = Card(target, tuple(map(str, range(1000))), preprocess, source="random weights")
        network = build_model(card, target)
        splits = open_data(data or "digits", need=()).splits
        source, what = list(splits.values())[-1], f"{data or 'digits'}, random weights"
    views_NCHW, targets = _images(source, card, num)
    return BenchSubject(
        network=network.eval(),
        card=card,
        what=f"{len(views_NCHW)} images of {what}",
        x_NCHW=card.preprocess.normalise(views_NCHW).contiguous().numpy(),
        views_NCHW=views_NCHW,
        train=_train(data, card) if is_file else None,
        targets=targets if is_file else None,
    )


def _train(data: str | None, card: Card) -> ImageSource | None:
    """Return the training images; None for data that have only a test split."""
    try:
        return open_split(data, "train", card)[0]
    except DataError:
        return None


def _images(source: ImageSource, card: Card, num: int) -> tuple[Tensor, list[Tensor]]:
    """Return up to `num` readable images, spread evenly, and their targets by batches."""
    picks = np.linspace(0, len(source) - 1, min(num, len(source))).round().astype(np.int64)
    dense = make_task(card).dense
    batches = list(
        eval_loader(subset(source, picks), card.preprocess, batch_size=_BATCH, dense=dense)
    )
    read = [batch for batch in batches if len(batch)]
    if not read:
        raise DataError(f"none of {len(picks)} images can be read; give --data DATA")
    return torch.cat([batch.images for batch in read]), [batch.targets for batch in read]
