"""What a model learns: its loss and its running metrics. Further tasks are further files."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Classify:
    """One label per image.

    Args:
        num_classes: C, the outputs of the model.
        label_smoothing: share of the target spread over all classes (arXiv 1512.00567).
    """

    num_classes: int
    label_smoothing: float = 0.0

    def loss_sum(self, logits_NC: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy summed over samples; 0 with a gradient for no sample.

        `targets`: labels int64 (N,), or soft labels (N, C) after mixup or cutmix.
        """
        logits_NC = logits_NC if logits_NC.dtype == torch.float64 else logits_NC.float()
        return F.cross_entropy(
            logits_NC, targets, reduction="sum", label_smoothing=self.label_smoothing
        )

    @staticmethod
    def num_correct(logits_NC: Tensor, targets: Tensor) -> Tensor:
        """Return how many samples have their likeliest target as the likeliest output."""
        labels = targets.argmax(1) if targets.ndim == 2 else targets
        return (logits_NC.argmax(1) == labels).sum()


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for one step of one rank, so that dropout needs no stored random state."""
    torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + rank) % (1 << 63))
