"""Detectors: a backbone, and a head that predicts class and box for each anchor.

    (N, 3, h, w) ──Features──▶ maps ──extras or pyramid──▶ maps ──heads──▶ (N, A, K + 4)

An anchor is a box that the head starts from; their number A depends only on the size of the input.
The last dim holds K class logits and 4 deltas, which `coder` and the anchor turn into a box. All
boxes here are x1, y1, x2, y2 as shares of the image's width and height.

Shape suffixes: N images, A anchors, K logits, C classes, H height, W width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from meshuffle.errors import ConfigError
from meshuffle.models.features import Features, build_on, find_named
from meshuffle.models.layers import conv_bn, depthwise

Size = tuple[int, int]
_MULTIPLE = 32  # pixels; the largest stride of a backbone: its maps are then h/stride × w/stride


class Detector(nn.Module):
    """The base of the detectors.

    Attributes:
        head_names: modules on top of the backbone, whose parameters are `features.body.*`.
        coder: converts between boxes and deltas.
        background: 1 if logit 0 is the background and the classes follow (softmax), so that
            K = C + 1; 0 if each class has a sigmoid and K = C.
    """

    head_names: ClassVar[tuple[str, ...]]
    coder: ClassVar[BoxCoder]
    background: ClassVar[int]

    @classmethod
    def anchors(cls, size: Size) -> Tensor:
        """Return the anchors of an input of `size` (h, w), float32 (A, 4); see `anchors_for`."""
        raise NotImplementedError

    @classmethod
    def scores(cls, logits_AK: Tensor) -> Tensor:
        """Return the probability of each class, (…, A, C) of logits (…, A, K)."""
        return logits_AK.softmax(-1)[..., 1:] if cls.background else logits_AK.sigmoid()


class SSDLite(Detector):
    """Two maps of the backbone (strides 16 and 32), four smaller ones behind them, separable heads.

    Sizes, anchors and initialisation as in torchvision's ssdlite320: at 320 pixels the maps have
    20, 10, 5, 3, 2 and 1 pixels a side, with 6 anchors each, A = 3234; where a map has 1 pixel, so
    have those behind it. Sources: arXiv 1512.02325 (SSD), 1801.04381 section 6.2 (SSDLite).

    Args:
        backbone: see `Features`.
        num_classes: C; there are K = C + 1 logits, the background first.
    """

    head_names = ("extras", "class_heads", "box_heads")
    coder = BoxCoder(weights=(10.0, 10.0, 5.0, 5.0))
    background = 1

    _STRIDES = (16, 32)
    _EXTRA_CHANNELS = (512, 256, 256, 128)
    _RATIOS = (2, 3)  # each also upright; and two squares
    _SCALES = (0.2, 0.95)  # of the first and the last map, as shares of the image
    _NUM_ANCHORS = 2 + 2 * len(_RATIOS)

    def __init__(self, backbone: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.features = Features(backbone, self._STRIDES)
        channels = [*self.features.channels, *self._EXTRA_CHANNELS]
        first = len(self._STRIDES) - 1
        self.extras = nn.ModuleList(
            _shrinking(channels[i], channels[i + 1]) for i in range(first, len(channels) - 1)
        )
        num_logits = self._NUM_ANCHORS * (num_classes + 1)
        self.class_heads = nn.ModuleList(_separable(c, num_logits) for c in channels)
        self.box_heads = nn.ModuleList(_separable(c, self._NUM_ANCHORS * 4) for c in channels)
        for name in self.head_names:
            _initialise(self.get_submodule(name), std=0.03)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return (N, A, C + 5) of images (N, 3, h, w)."""
        maps: list[Tensor] = self.features(x_NCHW)
        for extra in self.extras:
            maps.append(extra(maps[-1]))
        heads = zip(maps, self.class_heads, self.box_heads, strict=True)
        outputs = [(logits(x), deltas(x)) for x, logits, deltas in heads]
        return _per_anchor(outputs, self._NUM_ANCHORS)

    @classmethod
    def anchors(cls, size: Size) -> Tensor:
        """Return the default boxes, float32 (A, 4)."""
        num_maps = len(cls._STRIDES) + len(cls._EXTRA_CHANNELS)
        ratios = [list(cls._RATIOS)] * num_maps
        maker = DefaultBoxGenerator(ratios, min_ratio=cls._SCALES[0], max_ratio=cls._SCALES[1])
        return _anchor_shares(maker, size, _map_sizes(size, cls._STRIDES, len(cls._EXTRA_CHANNELS)))


class FPNDetector(Detector):
    """A feature pyramid of strides 8 … 128 under one head that all levels share: RetinaNet's.

    Lighter than torchvision's, as suits a small backbone: 96 channels for 256; with group norm in
    the head, which depends on no other image. 9 anchors per pixel, A = 19206 at 320 pixels.
    Sources: arXiv 1612.03144 (pyramid), 1708.02002 (RetinaNet).

    Args:
        backbone: see `Features`.
        num_classes: C = K.
    """

    head_names = ("pyramid", "class_tower", "class_logits", "box_tower", "box_deltas")
    coder = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))
    background = 0

    _STRIDES = (8, 16, 32)
    _NUM_EXTRA = 2
    _CHANNELS = 96
    _GROUPS = 16
    _DEPTH = 4
    _RATIOS = (0.5, 1.0, 2.0)  # height / width
    _OCTAVES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
    _SIZE = 4  # of an anchor, in strides
    _NUM_ANCHORS = len(_RATIOS) * len(_OCTAVES)
    _PRIOR = (
        0.01  # initial probability of a class, so that the background does not dominate the loss
    )

    def __init__(self, backbone: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.features = Features(backbone, self._STRIDES)
        width = self._CHANNELS
        last = LastLevelP6P7(width, width)
        self.pyramid = FeaturePyramidNetwork(list(self.features.channels), width, last)
        self.class_tower = self._tower()
        self.class_logits = nn.Conv2d(width, self._NUM_ANCHORS * num_classes, 3, padding=1)
        self.box_tower = self._tower()
        self.box_deltas = nn.Conv2d(width, self._NUM_ANCHORS * 4, 3, padding=1)
        for name in self.head_names[1:]:
            _initialise(self.get_submodule(name), std=0.01)
        nn.init.constant_(self._bias, -math.log((1 - self._PRIOR) / self._PRIOR))

    @property
    def _bias(self) -> Tensor:
        assert self.class_logits.bias is not None
        return self.class_logits.bias

    def _tower(self) -> nn.Sequential:
        layers: list[nn.Module] = []
        for _ in range(self._DEPTH):
            layers += [
                nn.Conv2d(self._CHANNELS, self._CHANNELS, 3, padding=1, bias=False),
                nn.GroupNorm(self._GROUPS, self._CHANNELS),
                nn.ReLU(inplace=True),
            ]
        return nn.Sequential(*layers)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return (N, A, C + 4) of images (N, 3, h, w)."""
        maps = {str(i): x for i, x in enumerate(self.features(x_NCHW))}
        outputs = [
            (self.class_logits(self.class_tower(x)), self.box_deltas(self.box_tower(x)))
            for x in self.pyramid(maps).values()
        ]
        return _per_anchor(outputs, self._NUM_ANCHORS)

    @classmethod
    def anchors(cls, size: Size) -> Tensor:
        """Return the anchors, float32 (A, 4)."""
        strides = [cls._STRIDES[0] * 2**i for i in range(len(cls._STRIDES) + cls._NUM_EXTRA)]
        sizes = tuple(tuple(int(cls._SIZE * s * o) for o in cls._OCTAVES) for s in strides)
        maker = AnchorGenerator(sizes, (cls._RATIOS,) * len(strides))
        return _anchor_shares(maker, size, _map_sizes(size, cls._STRIDES, cls._NUM_EXTRA))


HEADS: Mapping[str, type[Detector]] = {"ssdlite": SSDLite, "fpn": FPNDetector}
"""The detectors by the name of their head."""


def find_head(name: str) -> type[Detector]:
    """Return the detector with this head.

    Raises:
        ConfigError: no head has this name.
    """
    return find_named(HEADS, name, "detect")


def create_detector(
    head: str, model: str, num_classes: int, *, seed: int, knobs: Mapping[str, Any] | None = None
) -> Detector:
    """Return the detector on the registry's `model`, with random weights.

    Args:
        head: see `HEADS`.
        model, knobs: see `create_model`.
        num_classes: C.
        seed: the same one gives the same weights; the global random state stays as it was.

    Raises:
        ConfigError: the head is unknown.
        ModelError: the model is unknown or does not fit.
    """
    kind: Callable[[nn.Module, int], Detector] = find_head(head)
    return build_on(lambda backbone: kind(backbone, num_classes), model, seed=seed, knobs=knobs)


@functools.cache
def anchors_for(head: str, size: Size) -> Tensor:
    """Return the anchors of a head for inputs of `size` (h, w), float32 (A, 4) on the CPU.

    They may reach out of the image. They are cached.

    Raises:
        ConfigError: the head is unknown, or a side is not a multiple of 32.
    """
    with torch.inference_mode(False):  # training uses the cached tensor too
        return find_head(head).anchors(size)


def _per_anchor(outputs: list[tuple[Tensor, Tensor]], num_anchors: int) -> Tensor:
    """Join the maps' (logits, deltas), (N, anchors · K, H, W) and (N, anchors · 4, H, W).

    Anchors are ordered by map, row, column, and as they are made for a pixel.
    """
    return torch.cat(
        [torch.cat([_rows(x, num_anchors) for x in pair], 2) for pair in outputs], dim=1
    )


def _rows(x_NCHW: Tensor, num_anchors: int) -> Tensor:
    n, channels, height, width = x_NCHW.shape
    rows = x_NCHW.permute(0, 2, 3, 1)
    return rows.reshape(n, height * width * num_anchors, channels // num_anchors)


def _separable(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        depthwise(in_channels, 3, 1),
        nn.BatchNorm2d(in_channels),
        nn.ReLU6(inplace=True),
        nn.Conv2d(in_channels, out_channels, 1),
    )


def _shrinking(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return a block that halves the map, rounded up: 1×1, depthwise of stride 2, 1×1."""
    narrow = out_channels // 2
    return nn.Sequential(
        *conv_bn(in_channels, narrow),
        nn.ReLU6(inplace=True),
        depthwise(narrow, 3, 2),
        nn.BatchNorm2d(narrow),
        nn.ReLU6(inplace=True),
        *conv_bn(narrow, out_channels),
        nn.ReLU6(inplace=True),
    )


def _initialise(head: nn.Module, std: float) -> None:
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _map_sizes(size: Size, strides: tuple[int, ...], num_extra: int) -> list[Size]:
    """Return (rows, columns) of the backbone's maps and of the extra ones, each half the last."""
    if any(side < _MULTIPLE or side % _MULTIPLE for side in size):
        near = [max(_MULTIPLE, round(side / _MULTIPLE) * _MULTIPLE) for side in size]
        raise ConfigError(
            f"an input of {size[0]}×{size[1]} pixels: detectors take multiples of {_MULTIPLE}, "
            f"the nearest is {near[0]}×{near[1]}; set --input-size"
        )
    sizes = [(size[0] // stride, size[1] // stride) for stride in strides]
    for _ in range(num_extra):
        rows, columns = sizes[-1]
        sizes.append(((rows + 1) // 2, (columns + 1) // 2))
    return sizes


def _anchor_shares(maker: nn.Module, size: Size, map_sizes: list[Size]) -> Tensor:
    """Return the anchors that torchvision's `maker` gives, as shares of the image."""
    image = ImageList(torch.empty(1, 1, *size), [size])
    (anchors_A4,) = maker(image, [torch.empty(1, 1, *map_size) for map_size in map_sizes])
    height, width = size
    shares: Tensor = anchors_A4 / torch.tensor([width, height, width, height])
    return shares
