"""Any number of labels per image."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from meshuffle.tasks.base import Metric, Rows, Task

_LIKELY = 0.5  # a label from this probability on


class MultiLabel(Task):
    """Binary cross-entropy of each class by itself, averaged over classes.

    `map` is the mean over classes of the average precision (scikit-learn's, without
    interpolation); classes without a positive image have none. `f1` is the micro-average over all
    decisions at probability 0.5.
    """

    name = "multilabel"
    metrics = (Metric("map", "mAP"), Metric("f1", "F1"))
    running = Metric("accuracy", "accuracy")
    mixes = smooths = True

    def loss_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss summed over samples; `targets`: float (N, C), 0 … 1."""
        return self._losses(outputs, targets).sum()

    def _losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        logits_NC = outputs if outputs.dtype == torch.float64 else outputs.float()
        targets = targets.to(logits_NC.dtype)
        if self.label_smoothing:
            targets = targets * (1 - self.label_smoothing) + self.label_smoothing / 2
        return F.binary_cross_entropy_with_logits(logits_NC, targets, reduction="none").mean(1)

    def score_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the share of right decisions of each sample, summed."""
        return ((outputs > 0) == (targets > _LIKELY)).double().mean(1).sum()

    def answer(self, outputs: Tensor) -> dict[str, Tensor]:
        """Return `probabilities`, float32 (N, C)."""
        return {"probabilities": outputs.sigmoid()}

    def judge(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return `losses`, `objectives`, `probabilities` as of `answer`; `targets` uint8 (N, C)."""
        plain = F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").mean(1)
        return {
            "losses": plain,
            "objectives": self._losses(outputs, targets),
            **self.answer(outputs),
            "targets": targets.to(torch.uint8),
        }

    def conclude(self, rows: Rows) -> dict[str, float]:
        """Return `map` and `f1` in percent."""
        from sklearn.exceptions import UndefinedMetricWarning  # 0.9 s and 137 MB
        from sklearn.metrics import average_precision_score

        truth, predicted = rows["targets"], rows["probabilities"] > _LIKELY
        present = truth.any(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UndefinedMetricWarning)
            precisions = [
                average_precision_score(truth[:, c], rows["probabilities"][:, c])
                for c in np.flatnonzero(present)
            ]
        hits = int((predicted & (truth == 1)).sum())
        decided = int(predicted.sum()) + int(truth.sum())
        return {
            "map": 100 * float(np.mean(precisions)) if precisions else 0.0,
            "f1": 100 * 2 * hits / decided if decided else 100.0,
        }

    def blank(self) -> NDArray[np.float32]:
        """Return no label."""
        return np.zeros(self.num_classes, np.float32)

    def prediction(self, rows: Rows, i: int, size: tuple[int, int]) -> dict[str, Any]:
        """Return `labels` from probability 0.5 on, the likeliest first; and the likeliest one."""
        probabilities = rows["probabilities"][i]
        order = np.argsort(-probabilities, kind="stable")
        every: list[dict[str, Any]] = [
            {"label": self.title(c), "probability": float(probabilities[c])} for c in order.tolist()
        ]
        likely = [entry for entry in every if entry["probability"] > _LIKELY]
        return {**every[0], "labels": likely}

    def truth(self, rows: Rows, i: int) -> str:
        """Return the labels of sample i."""
        return ", ".join(self.title(int(c)) for c in np.flatnonzero(rows["targets"][i])) or "none"

    def sentence(self, prediction: Mapping[str, Any]) -> str:
        """Return for example `person (97 %), dog (61 %)`."""
        if not prediction["labels"]:
            most = f"{prediction['label']} {100 * prediction['probability']:.0f} %"
            return f"no label (most: {most})"
        return ", ".join(
            f"{entry['label']} ({100 * entry['probability']:.0f} %)"
            for entry in prediction["labels"]
        )
