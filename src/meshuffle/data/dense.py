"""Views of images with dense targets: boxes, or a label per pixel.

The whole image is stretched to the network's input; training takes a random part of it and mirrors
it at random. The target is transformed with the pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from meshuffle.data.augment import AugmentConfig, EvalTransform, TrainTransform, seeded
from meshuffle.data.preprocess import Preprocess, to_tensor
from meshuffle.data.target import Boxes
from meshuffle.errors import ConfigError

Window = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the image
_KNOWN = ("random_resized_crop", "flip", "repeats")


class DenseEvalTransform(EvalTransform):
    """The whole image in the evaluation view, and its target; ignores the draw."""

    def pair(self, image: Image.Image, target: Any, draw: int) -> tuple[Tensor, Tensor]:
        """Return uint8 [3, h, w] and the target in the view; see `target_in`."""
        return self(image, draw), target_in(target, image.size, (0, 0, *image.size), self.size)


class DenseTrainTransform(TrainTransform):
    """A random part of the image, mirrored at random, and its target; the draw decides both.

    Raises:
        ConfigError: the augmentation would move the pixels without the target.
    """

    def __init__(self, config: AugmentConfig, preprocess: Preprocess) -> None:
        for name, value in vars(config).items():
            if name not in _KNOWN and value != getattr(AugmentConfig(), name):
                raise ConfigError(
                    f"augmentation {name} (={value}): boxes and masks take crop_scale, flip and "
                    "repeats; leave it out"
                )
        super().__init__(config, preprocess)
        self._config, self._preprocess = config, preprocess
        scale = (config.random_resized_crop or 1.0, 1.0)
        self._crop = v2.RandomResizedCrop(preprocess.size, scale=scale)

    def pair(self, image: Image.Image, target: Any, draw: int) -> tuple[Tensor, Tensor]:
        """Return uint8 [3, h, w] and the target in the view; see `target_in`."""
        window: Window = (0, 0, *image.size)
        with seeded(draw):
            if self._config.random_resized_crop is not None:
                part = self._crop.make_params([image])
                left, top = part["left"], part["top"]
                window = (left, top, left + part["width"], top + part["height"])
            mirrored = bool(torch.rand(()).item() < self._config.flip)
        height, width = self.size
        method = Image.Resampling[self._preprocess.interpolation.upper()]
        view = to_tensor(image.resize((width, height), method, box=window))
        found = target_in(target, image.size, window, self.size)
        return (view.flip(2), _mirrored(found)) if mirrored else (view, found)


def build_train_transform(
    config: AugmentConfig, preprocess: Preprocess, *, dense: bool = False
) -> TrainTransform:
    """Return the transform of a training image, a function of the image and its draw.

    Args:
        dense: whether its target is dense.
    """
    return (DenseTrainTransform if dense else TrainTransform)(config, preprocess)


def build_eval_transform(preprocess: Preprocess, *, dense: bool = False) -> EvalTransform:
    """Return the transform of an image in evaluation; see `build_train_transform`."""
    return (DenseEvalTransform if dense else EvalTransform)(preprocess)


def target_in(
    target: Boxes | NDArray[np.uint8], image: tuple[int, int], window: Window, size: tuple[int, int]
) -> Tensor:
    """Return the target of a part of an image.

    Boxes become float32 [M, 5]: class and x1, y1, x2, y2 as shares of the part. Those whose centre
    lies in the part are kept, and clipped (like SSD's crops, arXiv 1512.02325). A mask becomes
    uint8 [h, w] of its nearest pixels.

    Args:
        image: (width, height) of the image in pixels.
        window: the part.
        size: (h, w) of the view.
    """
    left, top, right, bottom = window
    if isinstance(target, Boxes):
        extent = np.array([right - left, bottom - top] * 2, dtype=np.float32)
        boxes = (target.xyxy - np.array([left, top] * 2, dtype=np.float32)) / extent
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        inside = ((centres >= 0) & (centres <= 1)).all(1)
        rows = np.concatenate((target.labels[:, None], boxes.clip(0, 1)), 1)[inside]
        return torch.from_numpy(rows.astype(np.float32))
    height, width = size
    mask = Image.fromarray(target).resize((width, height), Image.Resampling.NEAREST, box=window)
    return torch.from_numpy(np.array(mask))


def _mirrored(target: Tensor) -> Tensor:
    if target.dtype == torch.uint8:
        return target.flip(1)
    label, x1, y1, x2, y2 = target.unbind(1)
    return torch.stack((label, 1 - x2, y1, 1 - x1, y2), 1)
