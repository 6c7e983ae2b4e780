"""From an image to the network's input: one object, which is stored with the weights.

    PIL RGB ──to_uint8: resize, centre crop──▶ uint8 [3, h, w] ──normalise──▶ float32 NCHW

Training replaces the geometry by its augmentation and shares `normalise`; evaluation,
prediction, export and serving share both halves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from meshuffle.data.base import IMAGENET_MEAN, IMAGENET_STD, Data
from meshuffle.errors import ConfigError, did_you_mean

Interpolation = Literal["nearest", "bilinear", "bicubic"]
Triple = tuple[float, float, float]
_CROP_RATIO = 0.875  # as usual for ImageNet: short side 256 for a crop of 224
MAX_ASPECT = 16
"""Only the middle of a longer strip than so many times its width is resized."""


@dataclass(frozen=True)
class Preprocess:
    """Geometry and normalisation of the input; it compares, prints and stores as plain data.

    `crop`: (height, width) of the centre crop in pixels, or one number for a square.
    `resize`: length of the short side before the crop, or None to keep the size.
    `fit`: crop, or stretch the whole image to the size of `crop`, whatever its shape.
    `interpolation`: antialiased when it shrinks. `channels`: their order in the network's
    input. `scale`: factor on the bytes 0 … 255. `mean`, `std`: after scaling, in the order
    of `channels`. Raises `ConfigError` for values out of range.
    """

    crop: tuple[int, int] | int = 224
    resize: int | None = 256
    interpolation: Interpolation = "bilinear"
    channels: Literal["RGB", "BGR"] = "RGB"
    scale: float = 1 / 255
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    fit: Literal["crop", "stretch"] = "crop"

    def __post_init__(self) -> None:
        size = (self.crop, self.crop) if isinstance(self.crop, int) else tuple(self.crop)
        object.__setattr__(self, "crop", size)
        object.__setattr__(self, "mean", tuple(float(x) for x in self.mean))
        object.__setattr__(self, "std", tuple(float(x) for x in self.std))
        if len(size) != 2 or min(size) < 1 or (self.resize is not None and self.resize < 1):
            raise ConfigError(f"crop (={self.crop}) and resize (={self.resize}) must be ≥ 1")
        if self.interpolation not in ("nearest", "bilinear", "bicubic"):
            raise ConfigError(f"interpolation (={self.interpolation!r}) is unknown")
        if self.fit not in ("crop", "stretch"):
            raise ConfigError(f"fit (={self.fit!r}) must be crop or stretch")
        if self.channels not in ("RGB", "BGR"):
            raise ConfigError(f"channels (={self.channels!r}) must be RGB or BGR")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0 or self.scale <= 0:
            raise ConfigError(
                f"mean, std and scale (={self.scale}) must be 3, 3 and 1 numbers, std and scale > 0"
            )

    @classmethod
    def imagenet(cls, size: int = 224) -> Preprocess:
        """Return torchvision's evaluation preset: short side `size` / 0.875, then the crop."""
        return cls(crop=size, resize=round(size / _CROP_RATIO))

    @classmethod
    def authors(cls) -> Preprocess:
        """Return the input of the authors' released networks: BGR, 0 … 255, not normalised."""
        return cls(channels="BGR", scale=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)

    @classmethod
    def for_data(cls, data: Data, size: int | None = None) -> Preprocess:
        """Return the default of a data set, at its suggested size or at `size` pixels."""
        crop = size or data.input_size
        if data.task in ("detect", "segment"):
            return cls(crop=crop, resize=None, mean=data.mean, std=data.std, fit="stretch")
        resize = round(crop / _CROP_RATIO) if data.style == "photos" else crop
        return cls(crop=crop, resize=resize, mean=data.mean, std=data.std)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocess:
        """Return the object that `to_dict` wrote; `ConfigError` for an unknown key."""
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(f"unknown preprocessing key {key!r}{did_you_mean(key, known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data; lists for tuples."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the network's input."""
        assert isinstance(self.crop, tuple)
        return self.crop

    @property
    def mode(self) -> InterpolationMode:
        """The interpolation as torchvision names it."""
        return InterpolationMode(self.interpolation)

    @property
    def mean_bytes(self) -> tuple[int, int, int]:
        """The mean colour as RGB bytes, which the network sees as zero."""
        red, green, blue = (min(255, max(0, round(m / self.scale))) for m in self.mean)
        return (red, green, blue) if self.channels == "RGB" else (blue, green, red)

    def to_uint8(self, image: Image.Image) -> Tensor:
        """Return the evaluation view of an RGB image: uint8 [3, h, w], channels still RGB."""
        return to_tensor(self.framed(image))

    def framed(self, image: Image.Image) -> Image.Image:
        """Return `image` resized and centre-cropped to `size`; a smaller one gets black edges.

        With `fit="stretch"` it is only resized to `size`.
        """
        if self.fit == "stretch":
            return image.resize(self.size[::-1], Image.Resampling[self.interpolation.upper()])
        if self.resize is not None and min(image.size) != self.resize:
            image = F.resize(_middle_of_strip(image), [self.resize], interpolation=self.mode)
        if image.size == self.size[::-1]:
            return image
        return F.center_crop(image, list(self.size))

    def affine(self) -> tuple[Tensor, Tensor]:
        """Return (factor, shift), float32 [3] each, by which `normalise` maps a level."""
        std, mean = torch.tensor(self.std), torch.tensor(self.mean)
        return self.scale / std, -mean / std

    def normalise(self, images_NCHW: Tensor) -> Tensor:
        """Return uint8 RGB images as the network's float32 input, on the batch's device.

        It computes (x · scale − mean) / std as one multiply-add in place, and keeps channels-last.
        In that format it runs on rows of W·3 numbers, five times as fast as broadcasting over 3.
        """
        if self.channels == "BGR":
            images_NCHW = images_NCHW.flip(1)
        x_NCHW = images_NCHW.to(torch.float32, copy=True)
        factor, shift = (values.to(x_NCHW.device) for values in self.affine())
        if x_NCHW.is_contiguous(memory_format=torch.channels_last):
            width = x_NCHW.shape[3]
            rows = x_NCHW.permute(0, 2, 3, 1).flatten(2)  # [N, H, W·3], the same memory
            torch.addcmul(shift.repeat(width), rows, factor.repeat(width), out=rows)
        else:
            torch.addcmul(shift[:, None, None], x_NCHW, factor[:, None, None], out=x_NCHW)
        return x_NCHW


def to_tensor(image: Image.Image) -> Tensor:
    """Return an RGB image as uint8 [3, h, w]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _middle_of_strip(image: Image.Image) -> Image.Image:
    """Return the middle of a strip: 1×60000 would otherwise become 256×15,000,000 pixels."""
    width, height = image.size
    limit = MAX_ASPECT * min(width, height)
    if max(width, height) <= limit:
        return image
    left, top = max(0, (width - limit) // 2), max(0, (height - limit) // 2)
    return image.crop((left, top, min(width, left + limit), min(height, top + limit)))
