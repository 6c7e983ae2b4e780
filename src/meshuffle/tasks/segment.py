"""A class for each pixel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from meshuffle.config import TrainConfig
from meshuffle.data import Data
from meshuffle.data.target import VOID
from meshuffle.errors import ModelError
from meshuffle.models.registry import is_foreign
from meshuffle.models.segmenter import NO_HEAD, create_segmenter, require_head
from meshuffle.tasks.base import LoadNetwork, Metric, Rows, Task
from meshuffle.tasks.mask_picture import draw_masks, mask_image

KEPT_SIDE = 96
"""Pixels of the long side of a mask that evaluation keeps for pictures."""
_NAMED = 5  # classes in a line of text


class Segment(Task):
    """Cross-entropy of each pixel, averaged over an image's pixels that count (all but 255).

    So an image weighs the same however much of it counts; one without such pixels has loss 0.
    `label_smoothing` as of `Classify`. The metrics are of all pixels of a split together: `miou`
    is the mean over classes of intersection / union, over those that are true or predicted
    anywhere.

    Shape suffixes: N images, C classes, H height, W width of the network's input.
    """

    name = "segment"
    metrics = (Metric("miou", "mIoU"), Metric("pixel_accuracy", "pixel accuracy"))
    running = Metric("pixel_accuracy", "pixel accuracy")
    dense = smooths = True
    argmax = True
    defaults: ClassVar[Mapping[str, Any]] = {"optimizer": "adamw", "lr": 0.002, "body_lr": 1.0}

    @classmethod
    def settings(cls, config: TrainConfig, data: Data, load: LoadNetwork) -> dict[str, Any]:
        """Return the head's name; a person's own model has none, unless one is given.

        Raises:
            ConfigError: no such head.
        """
        head = config.head or (NO_HEAD if is_foreign(config.model) else "lraspp")
        require_head(head)
        return {"head": head}

    @property
    def head(self) -> str:
        """The name of the head."""
        name: str = self.card.settings["head"]
        return name

    def network(self, seed: int) -> nn.Module:
        """Return the segmenter on the card's model: (N, 3, h, w) → (N, C, h, w)."""
        card, num = self.card, self.num_classes
        return create_segmenter(self.head, card.model, num, seed=seed, knobs=card.knobs)

    def check_outputs(self, outputs: Tensor, name: str) -> None:
        """Refuse a model without a head of ours whose outputs are not (2, C, h, w)."""
        if outputs.ndim != 4:
            shape = "×".join(map(str, outputs.shape))
            raise ModelError(
                f"{name} returns {shape} for 2 images; segment needs a map for each of "
                f"{self.num_classes} classes; --head lraspp makes them from the features of a "
                "classifier"
            )
        super().check_outputs(outputs[:, :, 0, 0], name)

    def loss_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each image, summed; `targets`: uint8 (N, h, w), 255 counts nothing."""
        return _losses(outputs, targets, self.label_smoothing).sum()

    def score_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the share of right pixels of each image, summed; 0 where none counts."""
        right_N = (classes_in(outputs) == targets).sum((1, 2))
        return (right_N.double() / _num_counted(targets)).sum()

    def answering(self, network: nn.Module) -> nn.Module:
        """Return what says of each pixel its class alone: uint8 (N, h, w)."""
        return Classes(network)

    def answer(self, outputs: Tensor) -> dict[str, Tensor]:
        """Return `mask` uint8 (N, h, w), and `shares` float32 (N, C), each class's of all pixels.

        Args:
            outputs: logits (N, C, h, w), or `mask` itself.
        """
        masks_NHW = outputs if outputs.ndim == 3 else classes_in(outputs)
        counts_NC = count_classes(masks_NHW, self.num_classes)
        return {"mask": masks_NHW, "shares": counts_NC.float() / masks_NHW[0].numel()}

    def judge(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return what metrics, words and pictures need: `shares` as of `answer`, and more.

        `losses` are the cross-entropy in nats, `objectives` the same with label smoothing;
        `areas` int64 (N, 3, C) the pixels of each class that are both predicted and true,
        predicted, true; `mask` uint8 (N, h', w') is of at most 96 × 96 pixels.
        """
        rows = self.answer(outputs)
        return {
            "losses": _losses(outputs, targets, 0.0),
            "objectives": _losses(outputs, targets, self.label_smoothing),
            "areas": areas(rows["mask"], targets, self.num_classes),
            "shares": rows["shares"],
            "mask": reduced(rows["mask"], KEPT_SIDE),
        }

    def conclude(self, rows: Rows) -> dict[str, float]:
        """Return `miou` and `pixel_accuracy` in percent; 0 where no pixel counts."""
        both_C, predicted_C, true_C = rows["areas"].sum(0, dtype=np.int64)
        union_C = predicted_C + true_C - both_C
        present = union_C > 0
        iou = both_C[present] / union_C[present]
        counted = int(true_C.sum())
        return {
            "miou": 100 * float(iou.mean()) if len(iou) else 0.0,
            "pixel_accuracy": 100 * int(both_C.sum()) / counted if counted else 0.0,
        }

    def blank(self) -> NDArray[np.uint8]:
        """Return a mask in which nothing counts."""
        height, width = self.card.preprocess.size
        return np.full((height, width), VOID, np.uint8)

    def prediction(self, rows: Rows, i: int, size: tuple[int, int]) -> dict[str, Any]:
        """Return `shares`: percent of the image by class, of those seen, the largest first."""
        return {"shares": self._told(rows["shares"][i])}

    def _told(self, shares: NDArray[Any]) -> dict[str, float]:
        order = np.argsort(-shares, kind="stable").tolist()
        return {self.title(c): round(100 * float(shares[c]), 4) for c in order if shares[c] > 0}

    def sentence(self, prediction: Mapping[str, Any]) -> str:
        """Return for example `road 61.2 %, sky 20.1 %, car 3.0 % and 2 more`."""
        shares = list(prediction["shares"].items())
        more = f" and {len(shares) - _NAMED} more" if len(shares) > _NAMED else ""
        return ", ".join(f"{name} {share:.1f} %" for name, share in shares[:_NAMED]) + more

    def truth(self, rows: Rows, i: int) -> str:
        """Return the same of the truth, in percent of the pixels that count."""
        true_C = rows["areas"][i, 2]
        if not true_C.sum():
            return ""
        return self.sentence({"shares": self._told(true_C / true_C.sum())})

    def mask(self, rows: Rows, i: int, size: tuple[int, int]) -> Image.Image:
        """Return the predicted mask as an image of mode P; its pixel values are the classes.

        Args:
            rows: of `answer`; that of `judge` is coarse.
            size: (width, height) of the image in pixels.
        """
        return mask_image(rows["mask"][i], size)

    def picture(
        self, image: Image.Image, rows: Rows, i: int, truth: NDArray[np.uint8] | None = None
    ) -> Image.Image:
        """Return the image under the predicted mask, beside it under the true one, and a legend."""
        masks = [("predicted", rows["mask"][i])]
        if truth is not None:
            masks.append(("true", truth))
        return draw_masks(image, masks, self._titles())

    def frame(self, image: Image.Image, rows: Rows, i: int) -> Image.Image:
        """Return the frame under the predicted mask, above a legend of all classes."""
        masks = [("predicted", rows["mask"][i])]
        return draw_masks(image, masks, self._titles(), range(self.num_classes))

    def _titles(self) -> list[str]:
        return [self.title(c) for c in range(self.num_classes)]


class Classes(nn.Module):
    """A network, and of its logits (N, C, h, w) the class of each pixel: uint8 (N, h, w)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return the mask of each image (N, 3, h, w)."""
        return classes_in(self.network(x_NCHW))


def classes_in(logits_NCHW: Tensor) -> Tensor:
    """Return the likeliest class of each pixel, uint8 (N, H, W)."""
    return logits_NCHW.argmax(1).to(torch.uint8)


def areas(masks_NHW: Tensor, targets_NHW: Tensor, num_classes: int) -> Tensor:
    """Return the pixels of each class that are both, predicted, true: int64 (N, 3, C).

    Args:
        masks_NHW, targets_NHW: uint8; pixels whose target is 255 count nowhere.
    """
    void = targets_NHW == VOID
    both = masks_NHW.masked_fill(masks_NHW != targets_NHW, VOID)
    counted = (both, masks_NHW.masked_fill(void, VOID), targets_NHW)
    return torch.stack([count_classes(x, num_classes) for x in counted], dim=1)


def count_classes(masks_NHW: Tensor, num_classes: int) -> Tensor:
    """Return the pixels of each class in each uint8 mask, int64 (N, C)."""
    counts = [mask_HW.flatten().bincount(minlength=256) for mask_HW in masks_NHW]
    return torch.stack(counts)[:, :num_classes]


def reduced(masks_NHW: Tensor, side: int) -> Tensor:
    """Return masks whose long side has at most `side` pixels, by nearest ones."""
    height, width = masks_NHW.shape[1:]
    scale = max(1.0, max(height, width) / side)
    rows, columns = (
        ((torch.arange(max(1, round(n / scale))) + 0.5) * n / max(1, round(n / scale))).long()
        for n in (height, width)
    )
    return masks_NHW[:, rows][:, :, columns]


def _losses(outputs: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Return the loss of each image, (N,).

    Made of `gather`, as torch's own loss of maps does not repeat bit for bit on GPUs.
    """
    logits_NCHW = outputs if outputs.dtype == torch.float64 else outputs.float()
    counts_NHW = targets != VOID
    labels_N1HW = targets.long().masked_fill(~counts_NHW, 0)[:, None]
    logs_NCHW = logits_NCHW.log_softmax(1)
    losses_NHW = -logs_NCHW.gather(1, labels_N1HW)[:, 0]
    if smoothing:
        losses_NHW = (1 - smoothing) * losses_NHW - smoothing * logs_NCHW.mean(1)
    return (losses_NHW * counts_NHW).sum((1, 2)) / _num_counted(targets)


def _num_counted(targets_NHW: Tensor) -> Tensor:
    """Return how many pixels count in each image, at least 1, (N,)."""
    return (targets_NHW != VOID).sum((1, 2)).clamp_min(1)
