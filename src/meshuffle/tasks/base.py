"""What a model learns: head, loss, metrics, words and picture. Each task is a file of this folder.

    card ──network──▶ module ──outputs [N, …]──▶ loss_sum                 while it trains
                                       ├──▶ judge ──▶ rows of N samples ──▶ conclude: metrics
                                       └──▶ answer ─▶ rows of N samples ──▶ prediction, picture

A target is one tensor per sample, whatever the task; see `meshuffle.data`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from meshuffle.config import TrainConfig
from meshuffle.data import Data
from meshuffle.data.base import shortened
from meshuffle.errors import ConfigError, ModelError, PlanError
from meshuffle.models import create_model
from meshuffle.models.outputs import with_main_output
from meshuffle.planner.plan import Plan
from meshuffle.tasks.box_picture import enlarged, write_title
from meshuffle.tasks.card import Card

Rows = Mapping[str, NDArray[Any]]
"""By name a column with a row for each sample."""

LoadNetwork = Callable[[Path, Card | None], tuple[nn.Module, Card]]
"""How a task opens the model of another weights file: `weights.load_or_build`."""


@dataclass(frozen=True)
class Metric:
    """A number that says how good a model is.

    `key`: in JSON and CSV; `label`: for people; `unit`: behind the number; `lower`: the lower
    the better.
    """

    key: str
    label: str
    unit: str = "%"
    digits: int = 2
    lower: bool = False

    def text(self, value: float) -> str:
        """Return for example `top-1 97.50 %`."""
        return f"{self.label} {self.number(value)}"

    def number(self, value: float) -> str:
        """Return for example `97.50 %`."""
        return f"{value:.{self.digits}f} {self.unit}".rstrip()


class Task:
    """The base of all tasks; built from the card that travels with the weights.

    Attributes:
        name: of `--task`.
        metrics: those that are shown; by the first one the best epoch is chosen.
        running: what is shown while an epoch trains, from `score_sum`; None is the loss alone.
        dense: a target has places in it, which move with the pixels.
        mixes: mixup and cutmix make sense; `weighs_classes`: so do weights of classes;
            `smooths`: so does label smoothing.
        splits: the plans it knows besides dp.
        defaults: settings to begin from, where none are given and it is not what fits a classifier.
        built: what the network is, for people, where it is not the card's model alone.
        answers: what the card's `classes` are, for people.
        outputs: name of the outputs in an exported file; `argmax`: the largest along dim 1 is the
            answer.
        label_smoothing: see `Classify`.
        load: opens other weights, where `network` needs them.
    """

    name: ClassVar[str]
    metrics: ClassVar[tuple[Metric, ...]]
    running: ClassVar[Metric | None] = None
    dense: ClassVar[bool] = False
    mixes: ClassVar[bool] = False
    weighs_classes: ClassVar[bool] = False
    smooths: ClassVar[bool] = False
    splits: ClassVar[tuple[str, ...]] = ("tp", "pp")
    defaults: ClassVar[Mapping[str, Any]] = {}
    built: ClassVar[str] = ""
    answers: ClassVar[str] = "classes"
    outputs: ClassVar[str] = "logits"
    argmax: ClassVar[bool] = False

    def __init__(
        self, card: Card, *, label_smoothing: float = 0.0, load: LoadNetwork | None = None
    ) -> None:
        self.card, self.label_smoothing, self.load = card, label_smoothing, load

    @property
    def num_classes(self) -> int:
        """C, the classes, or of a regression the targets."""
        return len(self.card.classes)

    def title(self, index: int) -> str:
        """Return the readable name of a class, where one is known."""
        name = self.card.classes[index]
        return self.card.titles.get(name, name)

    @classmethod
    def settings(cls, config: TrainConfig, data: Data, load: LoadNetwork) -> dict[str, Any]:
        """Return what the task must remember beside the weights, as plain JSON data."""
        if config.head is not None:
            raise ConfigError(f"--head {config.head}: {cls.name} has no choice of heads")
        return {}

    @classmethod
    def check_plan(cls, plan: Plan) -> None:
        """Refuse a plan that splits the model along an axis that the task does not support.

        Raises:
            PlanError: names the axis and those that it supports.
        """
        for axis, size in (("tp", plan.tp), ("pp", plan.pp)):
            if size > 1 and axis not in cls.splits:
                known = ", ".join(("dp", *cls.splits))
                raise PlanError(f"plan {plan}: --task {cls.name} knows {known}, not {axis}")

    @classmethod
    def metrics_text(cls, metrics: Mapping[str, float]) -> str:
        """Return the metrics for people, for example `top-1 97.50 %, top-5 99.90 %`."""
        shown = (m for m in cls.metrics if metrics.get(m.key) is not None)
        return ", ".join(metric.text(metrics[metric.key]) for metric in shown)

    def network(self, seed: int) -> nn.Module:
        """Return the module with random weights: images (N, 3, h, w) → outputs (N, …).

        Here it is the card's model with an output per class or target.
        """
        card = self.card
        model = create_model(card.model, num_classes=self.num_classes, seed=seed, **card.knobs)
        return with_main_output(model) if ":" in card.model else model

    def check_outputs(self, outputs: Tensor, name: str) -> None:
        """Refuse a model whose outputs for two images are not (2, C) with C classes or targets.

        Args:
            name: of the model, as the user gave it.

        Raises:
            ModelError: says how many there are, and how to change that.
        """
        num, kind = self.num_classes, self.answers
        if outputs.shape == (2, num):
            return
        shape = "×".join(map(str, outputs.shape))
        if outputs.ndim != 2:
            raise ModelError(f"{name} returns {shape} for 2 images; {self.name} needs 2×{num}")
        raise ModelError(
            f"{name} has {outputs.shape[1]} outputs for {num} {kind} "
            f"({shortened(self.card.classes)}); let the function take num_classes and use it"
        )

    def deployed(self, network: nn.Module) -> nn.Module:
        """Return what an exported file computes: the network, and what users need behind it."""
        return network

    def deployed_inputs(self, num: int) -> Tensor | None:
        """Return `num` inputs of the `deployed` network where they are no images, else None."""
        return None

    def loss_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss summed over the N ≥ 1 samples, a scalar.

        The loss of a sample depends on that sample alone, so that any split of a batch adds up.
        """
        raise NotImplementedError

    def score_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the running metric summed over samples, as a share 0 … 1 where it has `%`."""
        return torch.zeros((), device=outputs.device)

    def answering(self, network: nn.Module) -> nn.Module:
        """Return a module that computes what `answer` needs: the network, or less than it says."""
        return network

    def answer(self, outputs: Tensor) -> dict[str, Tensor]:
        """Return what a prediction is made from, N rows each.

        Args:
            outputs: of the network, float32 on the CPU, or of `answering` it.
        """
        raise NotImplementedError

    def judge(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return what evaluation keeps of each sample, N rows each: `losses` and others.

        Among them are those of `answer`, of maps and images a coarse view.

        Args:
            outputs: float32 on the CPU. targets: of the same samples.
        """
        raise NotImplementedError

    def judge_deployed(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return what `judge` does, from outputs of the `deployed` network."""
        return self.judge(outputs, targets)

    def require(self) -> None:
        """Raise where something is not installed that the metrics need."""

    def conclude(self, rows: Rows) -> dict[str, float]:
        """Return the metrics of all samples by key; shares in percent.

        Args:
            rows: of `judge`, joined; where dims differed between batches, padded with −1.
        """
        raise NotImplementedError

    def score(self, metrics: Mapping[str, float]) -> float:
        """Return the first metric, negated where less is better; no finite one is the worst."""
        first = self.metrics[0]
        value = metrics.get(first.key, float("nan"))
        if not math.isfinite(value):
            return -sys.float_info.max
        return -value if first.lower else value

    def is_chance(self, score: float, best: float, num: int) -> bool:
        """Whether a score is below the best one by no more than chance; here, not at all.

        Args:
            num: samples of the split.
        """
        return score >= best

    def blank(self) -> NDArray[Any]:
        """Return the target of a sample of which nothing is known."""
        raise NotImplementedError

    def prediction(self, rows: Rows, i: int, size: tuple[int, int]) -> dict[str, Any]:
        """Return what `predict --json` says of sample i.

        Args:
            rows: of `answer` or `judge`.
            size: (width, height) of its image in pixels.
        """
        raise NotImplementedError

    def sentence(self, prediction: Mapping[str, Any]) -> str:
        """Return a prediction as a line for people."""
        raise NotImplementedError

    def mask(self, rows: Rows, i: int, size: tuple[int, int]) -> Image.Image | None:
        """Return the answer as an image of its own, pixel values being classes, where it is one."""
        return None

    def truth(self, rows: Rows, i: int) -> str:
        """Return what is true of sample i in a line; empty where a line cannot say it."""
        return ""

    def picture(self, image: Image.Image, rows: Rows, i: int, truth: Any = None) -> Image.Image:
        """Return the image with the prediction of sample i drawn, and the truth where known."""
        return image

    def frame(self, image: Image.Image, rows: Rows, i: int) -> Image.Image:
        """Return the picture of a video's frame: its size is the same whatever was predicted."""
        shown = self.picture(enlarged(image), rows, i)
        write_title(shown, self.sentence(self.prediction(rows, i, image.size)))
        return shown
