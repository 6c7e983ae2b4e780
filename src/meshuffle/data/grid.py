"""A picture of a data set: one row per class, a few images of it, and its name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from meshuffle.data.base import Data, ImageSource
from meshuffle.errors import DataError, ImageError
from meshuffle.files import replaced

_CELL, _GAP, _NAME = 96, 4, 140  # pixels
_NUM_COLUMNS, _MAX_ROWS = 8, 20


def draw_grid(data: Data, path: Path) -> None:
    """Save a PNG with up to 8 images of each of the first 20 classes; broken ones left out.

    Taken from train, or from the first split there is. `DataError` if it cannot be written.
    """
    source = data.splits.get("train") or next(iter(data.splits.values()))
    rows = data.classes[:_MAX_ROWS]
    width = _NAME + _NUM_COLUMNS * (_CELL + _GAP) + _GAP
    canvas = Image.new("RGB", (width, len(rows) * (_CELL + _GAP) + _GAP), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default()
    for row, name in enumerate(rows):
        top = _GAP + row * (_CELL + _GAP)
        pen.text((_GAP, top + _CELL // 2), _printable(data.titles.get(name, name)), "black", font)
        for column, image in enumerate(_examples(source, row)):
            left = _NAME + column * (_CELL + _GAP)
            canvas.paste(_fitted(image), (left, top))
    try:
        with replaced(path) as temporary:
            canvas.save(temporary, format="PNG")
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error


def _examples(source: ImageSource, label: int) -> list[Image.Image]:
    members = np.flatnonzero(source.labels == label)
    images: list[Image.Image] = []
    for index in members[:: max(1, len(members) // _NUM_COLUMNS)].tolist():
        try:
            images.append(source.image(index))
        except ImageError:
            continue  # `check` lists it by name
        if len(images) == _NUM_COLUMNS:
            break
    return images


def _fitted(image: Image.Image) -> Image.Image:
    """Scale up or down into the cell without distortion; single pixels stay visible."""
    method = Image.Resampling.NEAREST if max(image.size) < _CELL else Image.Resampling.BILINEAR
    return ImageOps.pad(image, (_CELL, _CELL), method, color="white")


def _printable(name: str) -> str:
    """Pillow's built-in font may hold no more than ASCII."""
    return name.encode("ascii", "replace").decode()[:22]
