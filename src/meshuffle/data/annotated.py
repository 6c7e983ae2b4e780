"""Image files with targets of any task, in flat arrays; most formats open as such a source.

COCO with 118,000 images and 860,000 boxes takes about ten arrays, which forks share and spawned
workers receive quickly. Masks are decoded on request.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from meshuffle.data.image import BROKEN, EXIF_ORIENTATION, FORMATS, MAX_PIXELS, decode_image
from meshuffle.data.scan import PathTable
from meshuffle.data.target import Boxes
from meshuffle.errors import ImageError

_ROTATIONS = (5, 6, 7, 8)
_SHOWN_IDS = 8
_MASKS = ("PNG", "GIF", "BMP", "TIFF")
NUM_IDS = 256
"""The label ids that a mask of bytes can hold."""


Colours = Mapping[tuple[int, int, int], int]
"""The label id of each colour of a mask."""


class Targets(Protocol):
    """One target per image of a split."""

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True, eq=False)
class AnnotatedSource:
    """Image files below `root`, with `targets` of any task.

    Attributes:
        root: folder that `paths` are relative to; "" if they are used as they are.
        labels: see `ImageSource`, int64 [N].
        sizes: annotated (width, height), int32 [N, 2]. An image of another size is an
            `ImageError`, because its target would not match its content.
    """

    root: Path | str
    paths: PathTable
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    targets: Targets
    sizes: NDArray[np.int32] | None = None
    in_memory: bool = False

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> Image.Image:
        """Decode file `index` to RGB; raises `ImageError`."""
        image = decode_image(self.name(index))
        if self.sizes is not None and image.size != tuple(self.sizes[index].tolist()):
            raise ImageError(
                f"{self.name(index)}: {_size_text(image.size)}, but annotated as "
                f"{_size_text(self.sizes[index])}"
            )
        return image

    def target(self, index: int) -> Any:
        """Return the target of image `index`; raises `ImageError` for a broken mask."""
        return self.targets[index]

    def name(self, index: int) -> str:
        """Return the path of file `index`."""
        return path_below(self.root, self.paths[index])

    def content(self, index: int) -> bytes:
        """Return the bytes of file `index`; raises `ImageError`."""
        try:
            return Path(self.name(index)).read_bytes()
        except OSError as error:
            raise ImageError(f"{self.name(index)}: cannot be read: {error.strerror}") from error


@dataclass(frozen=True, eq=False)
class LabelTargets:
    """One class per image; `values` is int64 [N]."""

    values: NDArray[np.int64]

    def __getitem__(self, index: int) -> int:
        return int(self.values[index])


@dataclass(frozen=True, eq=False)
class RowTargets:
    """One vector per image; `values` is [N, C] of 0 and 1, or [N, T] of numbers."""

    values: NDArray[Any]

    def __getitem__(self, index: int) -> NDArray[np.float32]:
        return self.values[index].astype(np.float32)


@dataclass(frozen=True, eq=False)
class BoxTargets:
    """The boxes of all images in a row; image i has those from offsets[i] to offsets[i+1].

    Attributes:
        xyxy: float32 [M, 4], in pixels; or, if `files` is given, as shares of the image's width
            and height, which are then read from the headers of those files.
        labels: class of each box, int64 [M].
        offsets: int64 [N + 1].
    """

    xyxy: NDArray[np.float32]
    labels: NDArray[np.int64]
    offsets: NDArray[np.int64]
    files: tuple[Path, PathTable] | None = None

    def __getitem__(self, index: int) -> Boxes:
        here = slice(self.offsets[index], self.offsets[index + 1])
        xyxy = self.xyxy[here].copy()
        if self.files is not None and len(xyxy):
            root, paths = self.files
            width, height = image_size(path_below(root, paths[index]))
            xyxy *= np.array([width, height, width, height], dtype=np.float32)
        return Boxes(xyxy, self.labels[here].copy())


@dataclass(frozen=True, eq=False)
class MaskTargets:
    """Mask files below `root`, one for each of `images`.

    Attributes:
        colours: see `read_ids`.
        table: the class of each label id, int16 [257], the last one of all ids beyond 255; 255
            for ids that do not count, −1 for ids that are not declared.
    """

    root: Path
    images: PathTable
    masks: PathTable
    table: NDArray[np.int16]
    colours: Colours | None = None

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        name = path_below(self.root, self.masks[index])
        ids = read_ids(name, self.colours)
        size = image_size(path_below(self.root, self.images[index]))
        if ids.shape != size[::-1]:
            raise ImageError(
                f"{name}: {_size_text(ids.shape[::-1])}, but its image {self.images[index]} is "
                f"{_size_text(size)}"
            )
        classes = self.table[bounded(ids)]
        unknown = classes < 0
        if unknown.any():
            found = ", ".join(map(str, np.unique(ids[unknown])[:_SHOWN_IDS].tolist()))
            raise ImageError(f"{name}: unknown label ids {found} in {unknown.mean():.1%} of it")
        return classes.astype(np.uint8)


def unlabelled(paths: Sequence[str], classes: tuple[str, ...]) -> AnnotatedSource:
    """Return image files without annotations as a source; its labels and targets are 0."""
    table = PathTable([os.fsencode(path) for path in paths])
    labels = np.zeros(len(paths), dtype=np.int64)
    return AnnotatedSource("", table, labels, classes, LabelTargets(labels))


def path_below(root: Path | str, path: str) -> str:
    """Return `root/path` as text."""
    return os.path.join(root, path)  # noqa: PTH118


def image_size(path: str) -> tuple[int, int]:
    """Return (width, height) of the upright image, from its header; raises `ImageError`."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            return (height, width) if _is_rotated(image) else (width, height)
    except (*BROKEN, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from error


def _is_rotated(image: Image.Image) -> bool:
    """Avoid asking for the EXIF of a PNG without any: Pillow would decode the whole image."""
    if image.format == "PNG" and not any("exif" in str(k) or "xmp" in str(k) for k in image.info):
        return False
    return image.getexif().get(EXIF_ORIENTATION) in _ROTATIONS


def bounded(ids: NDArray[Any]) -> NDArray[Any]:
    """Return `ids` with 256 in place of every id that is no byte."""
    return np.where((ids < 0) | (ids >= NUM_IDS), NUM_IDS, ids)


def read_ids(path: str, colours: Colours | None = None) -> NDArray[Any]:
    """Return the label ids of a mask, uint8, uint16 or int32 [H, W]; raises `ImageError`.

    `colours`: the ids of the colours that a file beside the masks declares.

    The ids of a PNG (or GIF, BMP, TIFF) with a palette are its indices; those of a grey one are
    its values, also if grey is stored as three equal channels.
    """
    try:
        with Image.open(path, formats=_MASKS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(
                    f"{path}: {_size_text(image.size)} is more than {MAX_PIXELS:,} pixels"
                )
            ids = np.asarray(image.convert("RGB") if colours else image)
            mode = image.mode
    except (*BROKEN, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from error
    if ids.ndim == 2:
        return ids.astype(np.uint8) if ids.dtype == bool else ids
    if colours:
        return _ids_of(path, ids, colours)
    pixels = ids[..., : {"LA": 1, "RGBA": 3}.get(mode, 3)]
    if (pixels != pixels[..., :1]).any():
        raise ImageError(f"{path}: holds colours ({mode}); a mask has one label id per pixel")
    return pixels[..., 0]


def has_colours(path: str) -> bool:
    """Return whether a mask is stored as red, green and blue."""
    try:
        with Image.open(path, formats=_MASKS) as image:
            return image.mode in ("RGB", "RGBA")
    except (*BROKEN, Image.DecompressionBombError):  # it is reported when the mask is read
        return False


def _ids_of(path: str, pixels: NDArray[np.uint8], colours: Colours) -> NDArray[np.uint8]:
    red, green, blue = np.moveaxis(pixels.astype(np.int32), 2, 0)
    found, where = np.unique(red << 16 | green << 8 | blue, return_inverse=True)
    known = {r << 16 | g << 8 | b: i for (r, g, b), i in colours.items()}
    if unknown := [key for key in found.tolist() if key not in known]:
        colour = [unknown[0] >> 16, unknown[0] >> 8 & 255, unknown[0] & 255]
        raise ImageError(f"{path}: holds the colour {colour}, which is of no class")
    ids = np.array([known[key] for key in found.tolist()], dtype=np.uint8)
    return ids[where].reshape(pixels.shape[:2])


def _unreadable(path: str, error: Exception) -> ImageError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return ImageError(f"{path}: cannot be read: {reason or type(error).__name__}")


def _size_text(size: Any) -> str:
    width, height = size
    return f"{width}×{height}"
