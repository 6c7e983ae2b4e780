"""Training views of images; each depends only on the image and on its draw.

torchvision's v2 transforms take their random numbers from torch's CPU generator. It is seeded by
the draw of each sample and restored afterwards, so that a view does not depend on workers, ranks,
order or resume point, and the caller's random state is unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from meshuffle.data.base import Data
from meshuffle.data.preprocess import Preprocess, to_tensor
from meshuffle.errors import ConfigError

_Step = Callable[[Any], Any]
_MANY = 10_000  # with this many training photos, stronger augmentation helps


@dataclass(frozen=True)
class AugmentConfig:
    """The augmentation of training images; the default does nothing.

    `random_resized_crop`: smallest part of the area, in (0, 1]; None takes the evaluation
    geometry. `flip`: probability of a mirror image. `affine_degrees`: rotation in ± degrees;
    `affine_translate`: shift in ± parts of the side, 0 … 1; `affine_scale`: zoom by
    1 ± this, 0 … 1. `trivial_augment`: one random operation (arXiv 2103.10158).
    `random_erasing`: probability (1708.04896). `mixup` (1710.09412) and `cutmix`
    (1905.04899): alpha of the Beta distribution, 0 is off; both on: each pair takes one of
    them by chance. `repeats`: copies of an image per batch. Raises `ConfigError`.
    """

    random_resized_crop: float | None = None
    flip: float = 0.0
    affine_degrees: float = 0.0
    affine_translate: float = 0.0
    affine_scale: float = 0.0
    trivial_augment: bool = False
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    repeats: int = 1

    def __post_init__(self) -> None:
        for name in ("flip", "affine_translate", "random_erasing"):
            _check(name, getattr(self, name), 0, 1)
        _check("affine_scale", self.affine_scale, 0, 0.99)
        _check("affine_degrees", self.affine_degrees, 0, 180)
        _check("mixup", self.mixup, 0, 1000)
        _check("cutmix", self.cutmix, 0, 1000)
        _check("repeats", self.repeats, 1, 1000)
        if self.random_resized_crop is not None:
            _check("random_resized_crop", self.random_resized_crop, 1e-3, 1)

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs; then ranks must take pairs (`unit=2`)."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def affine(self) -> bool:
        """Whether any affine motion is on."""
        return max(self.affine_degrees, self.affine_translate, self.affine_scale) > 0


def augmentation_for(data: Data) -> AugmentConfig:
    """Return defaults by the kind of images: no flips for digits, crops for photos."""
    if data.task in ("detect", "segment"):
        return AugmentConfig(random_resized_crop=0.5, flip=0.5)
    if data.style == "symbols":
        return AugmentConfig(affine_degrees=10, affine_translate=0.1, affine_scale=0.1)
    if data.style == "thumbnails":
        return AugmentConfig(flip=0.5, affine_translate=0.125)
    train = data.splits.get("train")
    if train is not None and len(train) >= _MANY:
        return AugmentConfig(
            random_resized_crop=0.08, flip=0.5, trivial_augment=True, random_erasing=0.1
        )
    return AugmentConfig(random_resized_crop=0.35, flip=0.5)


class TrainTransform:
    """Callable (RGB image, draw) → uint8 [3, h, w]; `size` is (h, w). Can be pickled."""

    def __init__(self, config: AugmentConfig, preprocess: Preprocess) -> None:
        self.size = preprocess.size
        self._steps = _steps(config, preprocess)

    def __call__(self, image: Image.Image, draw: int) -> Tensor:
        """Return the training view of an RGB image that `draw` selects."""
        view: Any = image
        with seeded(draw):
            for step in self._steps:
                view = step(view)
        return view

    def pair(self, image: Image.Image, target: Any, draw: int) -> tuple[Tensor, Tensor]:
        """Return the view, and the target, which is the same for every view."""
        return self(image, draw), torch.as_tensor(target)


class EvalTransform:
    """Callable (RGB image, draw) → uint8 [3, h, w] that ignores the draw."""

    def __init__(self, preprocess: Preprocess) -> None:
        self.size = preprocess.size
        self._preprocess = preprocess

    def __call__(self, image: Image.Image, draw: int) -> Tensor:
        """Return the evaluation view of an RGB image."""
        return self._preprocess.to_uint8(image)

    def pair(self, image: Image.Image, target: Any, draw: int) -> tuple[Tensor, Tensor]:
        """Return the view and the target."""
        return self(image, draw), torch.as_tensor(target)


@contextmanager
def seeded(draw: int) -> Iterator[None]:
    """Seed torch's CPU generator by `draw` inside, and restore its state afterwards.

    `torch.manual_seed` would also reset the generators of the accelerators.
    """
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(draw)
    try:
        yield
    finally:
        generator.set_state(state)


def _steps(config: AugmentConfig, preprocess: Preprocess) -> list[_Step]:
    """Return geometry and colour steps on PIL images, which are cheaper, then those on bytes."""
    steps: list[_Step] = [_framing(config, preprocess)]
    if config.flip:
        steps.append(_Sometimes(config.flip, _mirror))
    if config.affine:
        steps.append(_Direct(_affine(config)))
    if config.trivial_augment:
        steps.append(v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR))
    steps.append(to_tensor)
    if config.random_erasing:
        steps.append(v2.RandomErasing(config.random_erasing, value=preprocess.mean_bytes))
    return steps


def _framing(config: AugmentConfig, preprocess: Preprocess) -> _Step:
    if config.random_resized_crop is None:
        return preprocess.framed
    scale = (config.random_resized_crop, 1.0)
    crop = v2.RandomResizedCrop(preprocess.size, scale=scale, interpolation=preprocess.mode)
    return _Direct(crop)


def _affine(config: AugmentConfig) -> v2.Transform:
    return v2.RandomAffine(
        degrees=config.affine_degrees,
        translate=(config.affine_translate, config.affine_translate),
        scale=(1 - config.affine_scale, 1 + config.affine_scale),
        interpolation=InterpolationMode.BILINEAR,
    )


@dataclass(frozen=True)
class _Direct:
    """A v2 transform of one image, without v2's search of nested inputs (0.1 ms a sample)."""

    transform: v2.Transform

    def __call__(self, image: Image.Image) -> Image.Image:
        return self.transform.transform(image, self.transform.make_params([image]))


@dataclass(frozen=True)
class _Sometimes:
    probability: float
    step: _Step

    def __call__(self, image: Image.Image) -> Image.Image:
        return self.step(image) if torch.rand(()).item() < self.probability else image


def _mirror(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{name} (={value}) must be in {low} … {high}")
