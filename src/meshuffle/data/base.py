"""The interface of a data set: named splits of RGB images with labels and targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from meshuffle.data.seeds import hash64
from meshuffle.data.target import remap
from meshuffle.errors import DataError

Style = Literal["symbols", "thumbnails", "photos"]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ImageSource(Protocol):
    """One split: N images with their targets; labels are indices into `classes`."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names, in the order of the labels."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """One label per image, int64 [N]; tasks without classes use it for even splits."""

    @property
    def in_memory(self) -> bool:
        """Whether `image` reads no file, so that worker processes do not help."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> Image.Image:
        """Return image `index` in mode RGB; raises `ImageError`."""

    def target(self, index: int) -> Any:
        """Return the target of image `index`; its type depends on the task."""

    def name(self, index: int) -> str:
        """Return the name of image `index` for messages: a path, or `digits[17]`."""

    def content(self, index: int) -> bytes:
        """Return the bytes of the file or of the pixels, to find exact duplicates."""


@dataclass(frozen=True)
class Data:
    """A data set: its splits, and defaults for its images.

    Attributes:
        spec: the text that opened it.
        splits: sources by name: train, val, test.
        input_size: the suggested crop in pixels.
        style: symbols (digits, whose mirror images mean something else), thumbnails (small
            pictures) or photos; it selects the default augmentation and geometry.
        mean, std: of each RGB channel on the scale 0 … 1.
        titles: readable names of classes, if known.
        ignored: files that were left out, and corrections of annotations.
        task: the task that the targets are for.
        layout: how the files lie, in words.
        notices: decisions about the content that a person should know.
    """

    spec: str
    classes: tuple[str, ...]
    splits: Mapping[str, ImageSource]
    input_size: int = 224
    style: Style = "photos"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    titles: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    task: str = "classify"
    layout: str = ""
    notices: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class ArraySource:
    """A split in memory; `pixels` is uint8 [N, H, W] grey or [N, H, W, 3] RGB."""

    title: str
    classes: tuple[str, ...]
    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    in_memory: bool = True

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """Return image `index` in mode RGB."""
        return Image.fromarray(self.pixels[index]).convert("RGB")

    def target(self, index: int) -> int:
        """Return the label."""
        return int(self.labels[index])

    def name(self, index: int) -> str:
        """Return for example `digits[17]`."""
        return f"{self.title}[{index}]"

    def content(self, index: int) -> bytes:
        """Return the pixels of image `index` as bytes."""
        return self.pixels[index].tobytes()


@dataclass(frozen=True, eq=False)
class View:
    """Some images of another source, in the given order and perhaps with other labels."""

    source: ImageSource
    indices: NDArray[np.int64]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    lookup: NDArray[np.int64] | None = None
    """The new index of each class of the source, if the classes differ."""

    @property
    def in_memory(self) -> bool:
        """Whether the underlying source is in memory."""
        return self.source.in_memory

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, index: int) -> Image.Image:
        """Return image `index` of the view in mode RGB; raises `ImageError`."""
        return self.source.image(int(self.indices[index]))

    def target(self, index: int) -> Any:
        """Return the target in the view's classes."""
        target = self.source.target(int(self.indices[index]))
        if isinstance(target, int):
            return int(self.labels[index])
        if self.lookup is None:
            return target
        return remap(target, self.lookup, len(self.classes))

    def name(self, index: int) -> str:
        """Return the name that the image has in the underlying source."""
        return self.source.name(int(self.indices[index]))

    def content(self, index: int) -> bytes:
        """Return the bytes that the underlying source gives."""
        return self.source.content(int(self.indices[index]))


def subset(source: ImageSource, indices: NDArray[np.int64]) -> View:
    """Return the images `indices` of `source` as a source of their own."""
    return View(source, indices, source.labels[indices], source.classes)


def stratified_split(
    labels: NDArray[np.int64], fraction: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return sorted indices (rest, part): `part` holds `fraction` of every class.

    The count of each class is rounded, but at least one of its images stays in the rest, and at
    least one goes to the part if it has two or more. The result depends only on the labels, the
    fraction and the seed.
    """
    keys = hash64(seed, np.arange(len(labels)))
    part = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(round(len(members) * fraction), 1), len(members) - 1)
        part[members[np.argsort(keys[members], kind="stable")[:count]]] = True
    return np.flatnonzero(~part), np.flatnonzero(part)


def split_off_val(source: ImageSource, fraction: float, seed: int) -> dict[str, ImageSource]:
    """Return `{"train": …, "val": …}`, with a stratified `fraction` of `source` in val."""
    rest, part = stratified_split(source.labels, fraction, seed)
    return {"train": subset(source, rest), "val": subset(source, part)}


def relabel(data: Data, classes: Sequence[str]) -> Data:
    """Return `data` with labels that are indices into `classes`, for example a model's.

    Raises `DataError` naming the classes of `data` that `classes` lacks.
    """
    if missing := [name for name in data.classes if name not in set(classes)]:
        raise DataError(
            f"{data.spec}: {len(missing)} of {len(data.classes)} classes are unknown to the "
            f"model: {shortened(missing)}; it knows {shortened(classes)}"
        )
    if data.task == "regress" and set(classes) != set(data.classes):
        raise DataError(
            f"{data.spec} has the targets {shortened(data.classes)}; the model's are "
            f"{shortened(classes)}: they must be the same"
        )
    order = {name: label for label, name in enumerate(classes)}
    lookup = np.array([order[name] for name in data.classes], dtype=np.int64)
    splits = {key: _relabelled(source, lookup, classes) for key, source in data.splits.items()}
    return replace(data, classes=tuple(classes), splits=splits)


def _relabelled(source: ImageSource, lookup: NDArray[np.int64], classes: Sequence[str]) -> View:
    return View(source, np.arange(len(source)), lookup[source.labels], tuple(classes), lookup)


def shortened(names: Sequence[str], limit: int = 5) -> str:
    """Return the first `limit` names joined by commas, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
