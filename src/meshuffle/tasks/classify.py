"""One label per image."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from meshuffle.config import TrainConfig
from meshuffle.data import Data
from meshuffle.errors import ModelError
from meshuffle.tasks.base import LoadNetwork, Metric, Rows, Task

TOP = 5


class Classify(Task):
    """Cross-entropy on one label per image; top-1 and top-5.

    `label_smoothing` is the share of the target that is spread over all classes (arXiv
    1512.00567). With `--class-weights balanced` a sample of class c counts N / (C·N_c) times, N_c
    of the N training samples being of that class.
    """

    name = "classify"
    metrics = (Metric("top1", "top-1"), Metric("top5", "top-5"))
    running = Metric("top1", "top-1")
    mixes = weighs_classes = smooths = True
    argmax = True

    @classmethod
    def settings(cls, config: TrainConfig, data: Data, load: LoadNetwork) -> dict[str, Any]:
        """Return the classes' weights, where they are asked for."""
        kept = super().settings(config, data, load)
        if config.class_weights == "balanced" and "train" in data.splits:
            counts = np.bincount(data.splits["train"].labels, minlength=len(data.classes))
            weights = counts.sum() / (len(counts) * np.maximum(counts, 1))
            kept["class_weights"] = dict(zip(data.classes, weights.round(6).tolist(), strict=True))
        return kept

    def loss_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy summed over samples.

        `targets`: labels int64 (N,), or soft labels (N, C) after mixup or cutmix.
        """
        logits_NC = outputs if outputs.dtype == torch.float64 else outputs.float()
        return F.cross_entropy(
            logits_NC,
            targets if targets.ndim == 1 else targets.to(logits_NC.dtype),
            weight=self._weights(logits_NC),
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )

    def _weights(self, like: Tensor) -> Tensor | None:
        known = self.card.settings.get("class_weights")
        if not known:
            return None
        return like.new_tensor([known.get(name, 1.0) for name in self.card.classes])

    def score_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return how many samples have their likeliest target as the likeliest output."""
        labels = targets.argmax(1) if targets.ndim == 2 else targets
        return (outputs.argmax(1) == labels).sum()

    def answer(self, outputs: Tensor) -> dict[str, Tensor]:
        """Return `top_classes` int64 (N, K), the likeliest K = min(5, C); `top_probabilities`.

        Raises `ModelError` for maps: weights without a card are taken for a classifier's.
        """
        if outputs.ndim != 2:
            shape = "×".join(map(str, outputs.shape[1:]))
            raise ModelError(f"the model gives {shape} numbers for an image, not one per class")
        probabilities, classes = outputs.softmax(1).topk(min(TOP, outputs.shape[1]))
        return {"top_classes": classes, "top_probabilities": probabilities}

    def judge(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the rows of `answer`, `labels`, `losses` and `objectives`.

        `losses` are the cross-entropy in nats, `objectives` what training minimises, label
        smoothing and class weights included.
        """
        losses = F.cross_entropy(outputs, targets, reduction="none")
        objectives = F.cross_entropy(
            outputs,
            targets,
            weight=self._weights(outputs),
            reduction="none",
            label_smoothing=self.label_smoothing,
        )
        return {
            "labels": targets,
            "losses": losses,
            "objectives": objectives,
            **self.answer(outputs),
        }

    def conclude(self, rows: Rows) -> dict[str, float]:
        """Return `top1` and, from 6 classes on, `top5` in percent."""
        hits = rows["top_classes"] == rows["labels"][:, None]
        metrics = {"top1": 100.0 * float(hits[:, 0].mean())}
        if self.num_classes > TOP:
            metrics["top5"] = 100.0 * float(hits.any(1).mean())
        return metrics

    def is_chance(self, score: float, best: float, num: int) -> bool:
        """Whether top-1 is below the best by no more than its standard error."""
        return is_chance(score, best, num)

    def blank(self) -> NDArray[np.int64]:
        """Return label 0."""
        return np.zeros((), np.int64)

    def prediction(self, rows: Rows, i: int, size: tuple[int, int]) -> dict[str, Any]:
        """Return the likeliest class, by its title where it has one; `top`: the likeliest five."""
        names = [self.card.classes[c] for c in rows["top_classes"][i].tolist()]
        probabilities = rows["top_probabilities"][i].tolist()
        top = [
            {"label": self.card.titles.get(name, name), "probability": probability}
            for name, probability in zip(names, probabilities, strict=True)
        ]
        return {**top[0], "top": top}

    def sentence(self, prediction: Mapping[str, Any]) -> str:
        """Return for example `bee (97.1 %)`."""
        return f"{prediction['label']} ({100 * prediction['probability']:.1f} %)"


def is_chance(top1: float, highest: float, num: int) -> bool:
    """Whether `top1` of `num` images is below `highest` by no more than its standard error.

    That is at least one image: 0.7 points of 143, 0.2 of 50,000.
    """
    share = (highest / 100 * num + 1) / (num + 2)  # Laplace's, so that 100 % has an error too
    standard_error = 100 * math.sqrt(share * (1 - share) / max(1, num))
    one_image = 100.5 / max(1, num)  # and a little, for rounding
    return highest - top1 <= max(standard_error, one_image)
