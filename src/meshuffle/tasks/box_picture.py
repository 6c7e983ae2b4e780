"""An image with boxes, names and scores drawn into it, to be read when it is shown small."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

SHOWN = 400  # pixels of the long side at which it is to be legible
_LINE, _TEXT, _DASH = 2.5, 13, 6  # pixels there

# Okabe and Ito's colours, which colour-blind people can tell apart, the strongest first.
_COLOURS = ("#56b4e9", "#e69f00", "#009e73", "#f0e442", "#d55e00", "#cc79a7", "#0072b2")
_ON_DARK = ("#0072b2", "#009e73", "#d55e00")


def enlarged(image: Image.Image) -> Image.Image:
    """Return a copy, a small one grown by a whole factor, so that a text fits."""
    factor = max(1, SHOWN // max(image.size))
    size = (image.width * factor, image.height * factor)
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST)


def write_title(image: Image.Image, text: str, size: int | None = None) -> None:
    """Write into the upper left corner, on a ground of its own.

    Args:
        size: of the letters in pixels; None is what is legible.
    """
    size = size or max(8, round(_TEXT * max(image.size) / SHOWN))
    draw, font = ImageDraw.Draw(image), font_of(size)
    draw.rectangle(draw.textbbox((size // 2, size // 4), text, font=font), fill="black")
    draw.text((size // 2, size // 4), text, fill="white", font=font)


def draw_boxes(
    image: Image.Image,
    found: Sequence[Mapping[str, Any]],
    colours: Sequence[int],
    truth: NDArray[np.float32] | None = None,
) -> None:
    """Draw into `image`: the truth thin and dashed white, what was found in colour, with a tag.

    Args:
        found: `label`, `score` (0 … 1) and `box` (x1, y1, x2, y2 in pixels), the best first.
        colours: of each, any number; the class.
        truth: (M, 4) in pixels.
    """
    draw = ImageDraw.Draw(image)
    scale = max(image.size) / SHOWN
    line = max(1, round(_LINE * scale))
    for entry, colour in reversed(list(zip(found, colours, strict=True))):
        draw.rectangle(_ordered(entry["box"]), outline=_colour(colour), width=line)
    for box in [] if truth is None else truth.tolist():
        _dashed(draw, box, max(1, round(_DASH * scale)), max(1, line // 2))
    font = font_of(max(8, round(_TEXT * scale)))
    for entry, colour in reversed(list(zip(found, colours, strict=True))):
        _tag(draw, entry, _colour(colour), font, image.size)


def _tag(
    draw: ImageDraw.ImageDraw,
    entry: Mapping[str, Any],
    colour: str,
    font: ImageFont.FreeTypeFont,
    size: tuple[int, int],
) -> None:
    """Write the name and the score on a ground of their own: above the box, where there is room."""
    text = f"{entry['label']} {100 * entry['score']:.0f}"
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    margin = max(1, round(font.size / 6))
    width, height = right + 2 * margin, bottom - top + 2 * margin
    x = max(0, min(entry["box"][0], size[0] - width))
    y = entry["box"][1] - height
    y = max(0, min(entry["box"][1] if y < 0 else y, size[1] - height))
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    ink = "white" if colour in _ON_DARK else "black"
    draw.text((x + margin - left, y + margin - top), text, fill=ink, font=font)


def _dashed(draw: ImageDraw.ImageDraw, box: Sequence[float], dash: int, width: int) -> None:
    """Draw a white dashed rectangle, black between the dashes: it shows on any ground."""
    x1, y1, x2, y2 = _ordered(box)
    draw.rectangle((x1, y1, x2, y2), outline="black", width=width)
    for y in (y1, y2):
        for x in np.arange(x1, x2, 2 * dash).tolist():
            draw.line((x, y, min(x + dash, x2), y), fill="white", width=width)
    for x in (x1, x2):
        for y in np.arange(y1, y2, 2 * dash).tolist():
            draw.line((x, y, x, min(y + dash, y2)), fill="white", width=width)


def _ordered(box: Sequence[float]) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = box
    return x1, y1, max(x1, x2), max(y1, y2)


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


@functools.lru_cache(maxsize=64)
def font_of(size: int) -> ImageFont.FreeTypeFont:
    """Return matplotlib's DejaVu Sans: it has Greek, Cyrillic and more, which PIL's own lacks."""
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(path, size)
