"""Boxes around objects, each with a class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from meshuffle.config import TrainConfig
from meshuffle.data import Data
from meshuffle.data.preprocess import Preprocess
from meshuffle.data.target import Boxes
from meshuffle.models.detections import Decoded, best_boxes, detections
from meshuffle.models.detector import anchors_for, create_detector
from meshuffle.tasks.base import LoadNetwork, Metric, Rows, Task
from meshuffle.tasks.box_loss import detection_losses
from meshuffle.tasks.box_map import mean_average_precision, require
from meshuffle.tasks.box_picture import draw_boxes, enlarged

SHOWN_SCORE = 0.3
"""Boxes are reported and drawn from this score on; the metrics look at all from 0.05 on."""


class Detect(Task):
    """A class and a box for each object; COCO's mAP.

    The network gives for each of A anchors K logits and 4 deltas, (N, A, K + 4);
    `detections` turns them into boxes, and `tasks/box_loss.py` has the losses.
    """

    name = "detect"
    metrics = (
        Metric("map", "mAP"),
        Metric("map50", "mAP at IoU 0.5"),
        Metric("map75", "mAP at IoU 0.75"),
    )
    dense = True
    defaults: ClassVar[Mapping[str, Any]] = {
        "label_smoothing": 0.0,
        "body_lr": 1.0,
        "crop_scale": 1.0,  # smaller views cost 3 to 6 points of mAP where epochs are few
    }
    outputs = "boxes"

    @classmethod
    def settings(cls, config: TrainConfig, data: Data, load: LoadNetwork) -> dict[str, Any]:
        """Return the head's name.

        Raises:
            ConfigError: no such head, an input size that is no multiple of 32, or
                faster-coco-eval is not installed.
        """
        require()
        head = config.head or "ssdlite"
        anchors_for(head, Preprocess.for_data(data, config.input_size).size)
        return {"head": head}

    @property
    def head(self) -> str:
        """The name of the head."""
        name: str = self.card.settings["head"]
        return name

    @property
    def _anchors(self) -> Tensor:
        return anchors_for(self.head, self.card.preprocess.size)

    def network(self, seed: int) -> nn.Module:
        """Return the detector on the card's model: (N, 3, h, w) → (N, A, K + 4)."""
        card = self.card
        return create_detector(self.head, card.model, self.num_classes, seed=seed, knobs=card.knobs)

    def check_outputs(self, outputs: Tensor, name: str) -> None:
        """Accept all: the head is made here."""

    def deployed(self, network: nn.Module) -> nn.Module:
        """Return the network with its outputs as boxes and scores; see `Decoded`."""
        return Decoded(network, self.head, self._anchors)

    def require(self) -> None:
        """Raise `ConfigError` where faster-coco-eval is not installed."""
        require()

    def _losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        outputs = outputs if outputs.dtype == torch.float64 else outputs.float()
        return detection_losses(self.head, outputs, targets, self._anchors)

    def loss_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each image, summed; see `detection_losses`.

        `targets`: float (N, M, 5), class, x1, y1, x2, y2 (0 … 1 of the view); rows of −1 are
        padding.
        """
        return self._losses(outputs, targets).sum()

    def answer(self, outputs: Tensor) -> dict[str, Tensor]:
        """Return `boxes` (N, D, 6); see `detections`."""
        return {"boxes": detections(self.head, outputs, self._anchors)}

    def judge(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return `losses`, `boxes` as of `answer`, and `truth`, the targets."""
        losses = self._losses(outputs, targets).float()
        return {"losses": losses, **self.answer(outputs), "truth": targets.float()}

    def judge_deployed(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return `boxes` and `truth` as `judge` does, from boxes and scores (N, A, 4 + C)."""
        return {"boxes": best_boxes(outputs), "truth": targets.float()}

    def conclude(self, rows: Rows) -> dict[str, float]:
        """Return `map`, `map50` and `map75` in percent; see `mean_average_precision`."""
        return mean_average_precision(rows["boxes"], rows["truth"], self.num_classes)

    def blank(self) -> NDArray[np.float32]:
        """Return no object."""
        return np.zeros((0, 5), np.float32)

    def prediction(self, rows: Rows, i: int, size: tuple[int, int]) -> dict[str, Any]:
        """Return `boxes`, the best first: `label`, `score` and `box` in pixels of the image."""
        found = _shown(rows, i)
        boxes = found[:, :4].astype(np.float64) * (*size, *size)
        return {
            "boxes": [
                {"label": self.title(int(row[5])), "score": float(row[4]), "box": box}
                for row, box in zip(found, boxes.round(2).tolist(), strict=True)
            ]
        }

    def sentence(self, prediction: Mapping[str, Any]) -> str:
        """Return for example `3 RBC (best 98 %), 1 WBC (91 %)`."""
        scores: dict[str, list[float]] = {}
        for entry in prediction["boxes"]:
            scores.setdefault(entry["label"], []).append(entry["score"])
        parts = [
            f"{len(of)} {label} ({'best ' if len(of) > 1 else ''}{100 * max(of):.0f} %)"
            for label, of in scores.items()
        ]
        return ", ".join(parts) or "no object"

    def truth(self, rows: Rows, i: int) -> str:
        """Return for example `3 RBC, 1 WBC`."""
        labels = rows["truth"][i, :, 0]
        counts = Counter(self.title(c) for c in labels[labels >= 0].astype(int).tolist())
        return ", ".join(f"{count} {label}" for label, count in counts.most_common()) or "no object"

    def picture(
        self, image: Image.Image, rows: Rows, i: int, truth: Boxes | None = None
    ) -> Image.Image:
        """Return the image, a small one enlarged, with boxes; the truth dashed."""
        shown = enlarged(image)
        found = self.prediction(rows, i, shown.size)["boxes"]
        known = None if truth is None else truth.xyxy * (shown.width / image.width)
        draw_boxes(shown, found, _shown(rows, i)[:, 5].astype(int).tolist(), known)
        return shown


def _shown(rows: Rows, i: int) -> NDArray[np.float32]:
    """Return the boxes of sample i that are worth showing, (D, 6), the best first."""
    boxes: NDArray[np.float32] = rows["boxes"][i]
    return boxes[boxes[:, 4] >= SHOWN_SCORE]
