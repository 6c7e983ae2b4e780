"""One number per image, or several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from meshuffle.config import TrainConfig
from meshuffle.data import Data
from meshuffle.tasks.base import LoadNetwork, Metric, Rows, Task


class Regress(Task):
    """Squared error of standardised targets, averaged over the T targets of a sample.

    The network's outputs are in standard deviations from the mean of the training targets; both
    stand in the card, and predictions, metrics and exported files are in the targets' own units.
    """

    name = "regress"
    metrics = (Metric("r2", "R²", "", 4), Metric("mae", "mean error", "", 4, lower=True))
    answers = "targets"
    outputs = "values"
    defaults: ClassVar[Mapping[str, Any]] = {
        "optimizer": "adamw",
        "lr": 0.001,
        "label_smoothing": 0.0,
    }
    """At a classifier's rate SGD diverges: a squared error has no bound on its gradient."""

    @classmethod
    def settings(cls, config: TrainConfig, data: Data, load: LoadNetwork) -> dict[str, Any]:
        """Return mean and standard deviation of each training target."""
        kept = super().settings(config, data, load)
        if "train" in data.splits:
            source = data.splits["train"]
            values = np.stack([source.target(i) for i in range(len(source))]).astype(np.float64)
            deviation = values.std(0)
            kept["mean"] = values.mean(0).tolist()
            kept["std"] = np.where(deviation > 0, deviation, 1.0).tolist()
        return kept

    def deployed(self, network: nn.Module) -> nn.Module:
        """Return the network with its outputs in the targets' units."""
        known = self.card.settings
        return _Scaled(network, torch.tensor(known["mean"]), torch.tensor(known["std"]))

    def _standardised(self, targets: Tensor, like: Tensor) -> Tensor:
        known = self.card.settings
        mean, std = like.new_tensor(known["mean"]), like.new_tensor(known["std"])
        return (targets.to(like.dtype) - mean) / std

    def _losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        outputs = outputs if outputs.dtype == torch.float64 else outputs.float()
        return F.mse_loss(outputs, self._standardised(targets, outputs), reduction="none").mean(1)

    def loss_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss summed over samples; `targets`: float (N, T), in their own units."""
        return self._losses(outputs, targets).sum()

    def answer(self, outputs: Tensor) -> dict[str, Tensor]:
        """Return `values`, float32 (N, T) in the targets' units."""
        known = self.card.settings
        std, mean = outputs.new_tensor(known["std"]), outputs.new_tensor(known["mean"])
        return {"values": outputs * std + mean}

    def judge(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return `losses`, `values` as of `answer`, and `targets` like them."""
        losses = self._losses(outputs, targets)
        return {"losses": losses, **self.answer(outputs), "targets": targets.float()}

    def judge_deployed(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return what `judge` does, from values in the targets' units."""
        return self.judge(self._standardised(outputs, outputs), targets)

    def conclude(self, rows: Rows) -> dict[str, float]:
        """Return `r2`, `mae` and `rmse`, averaged over targets, and of several, those of each.

        `r2` is the share of the variance that is explained (scikit-learn's `r2_score`).
        """
        truth, predicted = rows["targets"].astype(np.float64), rows["values"].astype(np.float64)
        errors = predicted - truth
        spread = ((truth - truth.mean(0)) ** 2).sum(0)
        lost = (errors**2).sum(0)
        explained = np.where(spread > 0, 1 - lost / np.where(spread > 0, spread, 1), lost == 0)
        mae, rmse = np.abs(errors).mean(0), np.sqrt((errors**2).mean(0))
        found = {"r2": explained, "mae": mae, "rmse": rmse}
        metrics = {key: float(values.mean()) for key, values in found.items()}
        if self.num_classes > 1:
            for t, name in enumerate(self.card.classes):
                metrics |= {f"{key}_{name}": float(values[t]) for key, values in found.items()}
        return metrics

    def blank(self) -> NDArray[np.float32]:
        """Return zeros."""
        return np.zeros(self.num_classes, np.float32)

    def prediction(self, rows: Rows, i: int, size: tuple[int, int]) -> dict[str, Any]:
        """Return `values` by target, in their units."""
        values = rows["values"][i].astype(float).tolist()
        return {"values": dict(zip(self.card.classes, values, strict=True))}

    def sentence(self, prediction: Mapping[str, Any]) -> str:
        """Return for example `age 31.2, height 1.74`."""
        return ", ".join(f"{name} {value:.5g}" for name, value in prediction["values"].items())

    def truth(self, rows: Rows, i: int) -> str:
        """Return the targets of sample i."""
        values = rows["targets"][i].astype(float).tolist()
        return self.sentence({"values": dict(zip(self.card.classes, values, strict=True))})


class _Scaled(nn.Module):
    """A network whose outputs are multiplied and shifted."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return (N, T) in the targets' units."""
        return torch.addcmul(self.mean, self.network(x_NCHW), self.std)
