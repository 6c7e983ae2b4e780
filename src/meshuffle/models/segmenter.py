"""Segmenters: a backbone, and a head that predicts the class of each pixel.

    (N, 3, h, w) ──dilate, Features──▶ maps ──head──▶ (N, C, h/8, w/8) ──bilinear──▶ (N, C, h, w)

The backbone's last stage is dilated, so that its map has stride 16; see `dilate`. The heads are
torchvision's.

Shape suffixes: N images, C classes, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.segmentation.deeplabv3 import ASPPPooling, DeepLabHead
from torchvision.models.segmentation.lraspp import LRASPPHead

from meshuffle.models.dilation import dilate
from meshuffle.models.features import Features, build_on, find_named
from meshuffle.models.outputs import with_main_output
from meshuffle.models.registry import create_model

HEADS: Mapping[str, tuple[int, ...]] = {"lraspp": (8, 16), "deeplabv3": (16,)}
"""The heads by name, with the strides of the maps that they take."""

NO_HEAD = "none"
"""In place of a head's name: the model returns the maps of the classes itself, as a U-Net does."""

_INNER_CHANNELS = 128  # of LR-ASPP
_RATES = (6, 12, 18)  # of DeepLabv3's holes at output stride 16 (arXiv 1706.05587, section 4)


class Segmenter(nn.Module):
    """One logit per class and pixel, upsampled bilinearly to the input.

    "lraspp": the map of stride 16, gated by its own means, on top of the map of stride 8; light
    (arXiv 1905.02244, section 6.4). "deeplabv3": four convolutions of the map of stride 16, three
    of them with holes, and its mean (arXiv 1706.05587); 256 channels, several times as heavy as a
    small backbone.

    Args:
        model: any classifier that `dilate` and `Features` take; it is changed in place. Its
            parameters are `features.body.*`.
        num_classes: C.
        head: see `HEADS`.

    Raises:
        ConfigError: the head is unknown.
        ModelError: see `dilate` and `Features`.
    """

    head_names = ("classifier",)

    def __init__(self, model: nn.Module, num_classes: int, head: str = "lraspp") -> None:
        super().__init__()
        strides = require_head(head)
        dilate(model)
        self.features = Features(model, strides)
        channels = self.features.channels
        self.classifier: nn.Module
        if head == "lraspp":
            self.classifier = LRASPPHead(*channels, num_classes, _INNER_CHANNELS)
        else:
            self.classifier = DeepLabHead(*channels, num_classes, _RATES)
            for module in self.classifier.modules():
                if isinstance(module, ASPPPooling):
                    module.__class__ = _Pooling

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return logits (N, C, h, w) of images (N, 3, h, w)."""
        maps = self.features(x_NCHW)
        given = {"low": maps[0], "high": maps[1]} if len(maps) == 2 else maps[0]
        logits_NCHW: Tensor = self.classifier(given)
        return F.interpolate(logits_NCHW, x_NCHW.shape[2:], mode="bilinear", align_corners=False)


class _Pooling(ASPPPooling):
    """ASPP's image pooling, which also trains on a batch of one image.

    Its batch norm sees one value per channel then, which torch refuses; the same image twice has
    the mean and the variance, 0, that one image has.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean of x (N, C, H, W) through a convolution, at its size."""
        pool, convolution, norm, act = self
        y_NC11 = convolution(pool(x))
        if norm.training and type(norm) is nn.BatchNorm2d and y_NC11.shape[0] == 1:
            y_NC11 = norm(y_NC11.repeat(2, 1, 1, 1))[:1]
        else:
            y_NC11 = norm(y_NC11)
        return F.interpolate(act(y_NC11), x.shape[2:], mode="bilinear", align_corners=False)


def require_head(name: str) -> tuple[int, ...]:
    """Return the strides of the maps that a head takes.

    Raises:
        ConfigError: no head has this name.
    """
    return find_named({**HEADS, NO_HEAD: ()}, name, "segment")


def create_segmenter(
    head: str, model: str, num_classes: int, *, seed: int, knobs: Mapping[str, Any] | None = None
) -> nn.Module:
    """Return the segmenter on the registry's `model`, with random weights, in training mode.

    Args:
        head: see `HEADS` and `NO_HEAD`.
        model, knobs: see `create_model`.
        num_classes: C.
        seed: the same one gives the same weights; the global random state stays as it was.

    Raises:
        ConfigError: the head is unknown.
        ModelError: the model is unknown or does not fit.
    """
    require_head(head)
    if head == NO_HEAD:
        own = create_model(model, num_classes=num_classes, seed=seed, **(knobs or {}))
        own = with_main_output(own)
        own.register_forward_hook(_to_input_size)
        return own
    return build_on(lambda body: Segmenter(body, num_classes, head), model, seed=seed, knobs=knobs)


def _to_input_size(_: nn.Module, inputs: tuple[Tensor], maps_NCHW: Tensor) -> Tensor:
    size = inputs[0].shape[2:]
    if maps_NCHW.ndim != 4 or maps_NCHW.shape[2:] == size:
        return maps_NCHW
    return F.interpolate(maps_NCHW, size, mode="bilinear", align_corners=False)
