"""Preprocessing inside the file: uint8 images of any size to the network's outputs.

Pillow's antialiased resize is linear along each side, so a side is one matrix, made in the graph
from the image's size: entry (i, j) is the weight of pixel j in output i. Crop, black edges and the
cut of long strips only move the indices. As in Pillow, widths come first (but Pillow 13 at times
begins with the heights: a level of 256 apart), the levels are rounded after each side, and all sums
are of whole numbers, so that every runtime gets the same ones.

Shape suffixes: N batch, H and W of the image, h and w of the network's input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from meshuffle.data.preprocess import MAX_ASPECT, Preprocess, to_tensor
from meshuffle.deploy.subject import BATCH_SIZES, Subject
from meshuffle.errors import ConfigError


def with_preprocessing(
    subject: Subject, images: Sequence[Image.Image], *, any_size: bool
) -> Subject:
    """Return `subject` with its preprocessing inside, checked on `images`.

    Args:
        images: RGB, as they are in the data; at least one. A batch is one of them, shifted.
        any_size: the size of the images is open; else it is that to which they are resized.

    Raises:
        ConfigError: preprocessing that has no graph.
    """
    preprocess = subject.card.preprocess
    preprocessed = partial(Preprocessed, preprocess=preprocess)
    if not any_size:
        images = [image.resize(own_size(preprocess)[::-1]) for image in images]
    batches, views = [], []
    for i, num in enumerate(BATCH_SIZES):
        shifted = _shifted(images[i % len(images)], num)
        batches.append(torch.stack([to_tensor(image).permute(1, 2, 0) for image in shifted]))
        views.append(preprocess.normalise(torch.stack(list(map(preprocess.to_uint8, shifted)))))
    return subject.with_preprocessing(preprocessed, batches, views, any_size=any_size)


def own_size(preprocess: Preprocess) -> tuple[int, int]:
    """Return (height, width) of the images that a file of fixed size takes.

    They need no resizing: a square of the short side where images are cropped, else the crop.
    """
    if preprocess.fit == "stretch" or preprocess.resize is None:
        return preprocess.size
    return preprocess.resize, preprocess.resize


def _shifted(image: Image.Image, num: int) -> list[Image.Image]:
    pixels = np.asarray(image)
    steps = [i * image.width // num for i in range(num)]
    return [Image.fromarray(np.roll(pixels, step, axis=1)) for step in steps]


class Preprocessed(nn.Module):
    """`Preprocess.framed` and `normalise` in front of a network.

    Args:
        network: float32 [N, 3, h, w], normalised, to outputs.
        preprocess: antialiased, bilinear or bicubic.

    Raises:
        ConfigError: another interpolation.
    """

    factor: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, preprocess: Preprocess) -> None:
        super().__init__()
        if preprocess.interpolation not in _FILTERS:
            raise ConfigError(
                f"--with-preprocessing: interpolation {preprocess.interpolation} has no graph; "
                f"known are {', '.join(_FILTERS)}"
            )
        self.network, self.preprocess = network, preprocess
        factor, shift = preprocess.affine()
        self.register_buffer("factor", factor[:, None, None])
        self.register_buffer("shift", shift[:, None, None])

    def forward(self, images_NHW3: Tensor) -> Tensor:
        """Return the outputs for uint8 RGB images of one size, [N, H, W, 3]."""
        x_N3hw = self.framed(images_NHW3)
        if self.preprocess.channels == "BGR":
            x_N3hw = torch.cat((x_N3hw[:, 2:3], x_N3hw[:, 1:2], x_N3hw[:, 0:1]), dim=1)
        outputs: Tensor = self.network(x_N3hw * self.factor + self.shift)
        return outputs

    def framed(self, images_NHW3: Tensor) -> Tensor:
        """Return whole levels 0 … 255 as float32 [N, 3, h, w], channels still RGB."""
        x_N3HW = images_NHW3.permute(0, 3, 1, 2).to(torch.float32)
        rows_H, columns_W = (torch.arange(x_N3HW.shape[dim]) for dim in (2, 3))
        height, width = self.preprocess.size
        x_N3Hw = _resampled(x_N3HW, self._matrix(columns_W, rows_H, width))
        x_N3wH = x_N3Hw.transpose(2, 3)
        return _resampled(x_N3wH, self._matrix(rows_H, columns_W, height)).transpose(2, 3)

    def _matrix(self, own_K: Tensor, other_L: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Return the weights [size, K] of one side's K pixels, whose indices `own_K` are.

        All places are whole numbers, doubled where they lie between pixels: exact in float32.
        """
        known = self.preprocess
        own, other = own_K[-1:] + 1, other_L[-1:] + 1
        first, resized = torch.zeros_like(own), own
        out = torch.arange(size)
        if known.fit == "stretch":
            resized = torch.full_like(own, size)
        else:
            if known.resize is not None:
                first, own, resized = _resized(own, other, known.resize)
            out = out + _crop_from(resized - size)
        kernel = _FILTERS[known.interpolation]
        pixel_1K = (own_K - first)[None]
        out_s1 = out[:, None]
        apart = (2 * pixel_1K + 1) * resized - (2 * out_s1 + 1) * own
        unit = (2 * torch.maximum(own, resized)).to(torch.float32)
        weights_sK = kernel(apart.to(torch.float32), unit)
        inside = (pixel_1K >= 0) & (pixel_1K < own) & (out_s1 >= 0) & (out_s1 < resized)
        return _whole(weights_sK * inside.to(torch.float32))


def _resized(own: Tensor, other: Tensor, short: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return where a side's used part begins, how long that is, and its length when resized.

    The shorter side becomes `short`; of a longer one than 16 times it, the middle is used.
    """
    least = torch.minimum(own, other)
    used = torch.where(least == short, own, torch.minimum(own, MAX_ASPECT * least))
    first = (own - used) // 2
    return first, used, used * short // least


def _crop_from(surplus: Tensor) -> Tensor:
    """Return the first index of a centre crop; negative where black edges are added.

    The half of an odd surplus is rounded to even, as `torchvision`'s `center_crop` does.
    """
    half = surplus // 2
    odd = surplus - 2 * half
    lead = half + odd * (half - 2 * (half // 2))
    return torch.where(surplus >= 0, lead, -((-surplus) // 2))


def _whole(weights_sK: Tensor) -> tuple[Tensor, Tensor]:
    """Return weights / their sum · 2²² as whole numbers, rounded: upper part · 2¹¹ + lower part.

    A long division by digits of 11, 6 and 5 bits: of whole weights, all products stay below 2²⁴
    for images of up to some 4000 pixels.
    """
    total_s1 = weights_sK.sum(1, keepdim=True)
    total_s1 = torch.where(total_s1 == 0, torch.ones_like(total_s1), total_s1)
    upper_sK, rest_sK = _divided(weights_sK * 2048, total_s1)
    middle_sK, rest_sK = _divided(rest_sK * 64, total_s1)
    lower_sK, _ = _divided(rest_sK * 64 + total_s1, 2 * total_s1)  # · 32, and half up
    return upper_sK, middle_sK * 32 + lower_sK


def _divided(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the whole quotient and the rest, also where a runtime's division is a bit off."""
    whole = (a / b).floor()
    whole = whole - (whole * b > a).to(torch.float32)
    whole = whole + ((whole + 1) * b <= a).to(torch.float32)
    return whole, a - whole * b


def _resampled(x_N3LK: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
    """Return levels with the last side resampled, [N, 3, L, s].

    A sum of products has 30 bits, float32 is exact to 24: the two parts are summed apart.
    """
    upper, lower = (x_N3LK @ part_sK.T for part_sK in weights)
    whole = (upper / 2048).floor()
    rest = (upper - whole * 2048) * 2048 + lower
    return (whole + ((rest + (1 << 21)) / (1 << 22)).floor()).clamp(0, 255)


def _bilinear(apart: Tensor, unit: Tensor) -> Tensor:
    return (unit - apart.abs()).clamp(min=0)


def _bicubic(apart: Tensor, unit: Tensor) -> Tensor:
    """Return Pillow's cubic, a = −0.5; without units, since it is no whole number anyway."""
    x = apart.abs() / unit
    near = (1.5 * x - 2.5) * x * x + 1
    far = -0.5 * (((x - 5) * x + 8) * x - 4)
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


_FILTERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bilinear": _bilinear,
    "bicubic": _bicubic,
}
