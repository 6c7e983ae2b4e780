"""Masks to look at: a colour per class, an image with a mask over it, and what the colours mean."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from meshuffle.data.target import VOID
from meshuffle.tasks.box_picture import SHOWN, enlarged, font_of, write_title

Colour = tuple[int, int, int]
_OPACITY = 0.6
_TEXT = 13  # pixels where the long side is shown with `SHOWN` of them
_MAX_NAMES = 12

# Grey first, as that is often the ground; then Okabe and Ito's, which all people can tell apart.
_FIRST = ("808080", "e69f00", "56b4e9", "009e73", "f0e442", "0072b2", "d55e00", "cc79a7")


@functools.cache
def palette() -> NDArray[np.uint8]:
    """Return the colours of the classes, uint8 (256, 3); of pixels that count nothing it is black.

    Behind the first eight, each is as far from all those before it as can be (in CIELAB).
    """
    steps = np.linspace(0, 255, 9).astype(np.uint8)
    candidates = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, 3)
    chosen = [np.frombuffer(bytes.fromhex(text), np.uint8) for text in _FIRST]
    places = _lab(candidates)
    taken = _lab(np.stack([*chosen, np.zeros(3, np.uint8), np.full(3, 255, np.uint8)]))
    distances = np.linalg.norm(places[:, None] - taken, axis=2).min(1)
    while len(chosen) < VOID:
        best = int(distances.argmax())
        chosen.append(candidates[best])
        distances = np.minimum(distances, np.linalg.norm(places - places[best], axis=1))
    return np.stack([*chosen, np.zeros(3, np.uint8)])


def _lab(colours: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return sRGB colours (N, 3) in CIELAB, D65; distances there are those that people see."""
    share = colours / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    xyz = linear @ to_xyz.T / to_xyz.sum(1)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.stack(
        (116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])), axis=1
    )


def mask_image(mask: NDArray[np.uint8], size: tuple[int, int]) -> Image.Image:
    """Return a mask (h, w) as an image of mode P, whose pixel values are the classes.

    Args:
        size: (width, height) to stretch it to, by nearest pixels.
    """
    image = Image.fromarray(np.ascontiguousarray(mask)).resize(size, Image.Resampling.NEAREST)
    image.putpalette(palette().tobytes())
    return image


def covered(image: Image.Image, mask: NDArray[np.uint8]) -> Image.Image:
    """Return the image in grey with a mask (any size) over it; what counts nothing stays bare."""
    coloured = mask_image(mask, image.size)
    void = Image.fromarray(np.array(coloured) == VOID)
    grey = image.convert("L").convert("RGB")
    return Image.composite(image, Image.blend(grey, coloured.convert("RGB"), _OPACITY), void)


def draw_masks(
    image: Image.Image,
    masks: Sequence[tuple[str, NDArray[np.uint8]]],
    names: Sequence[str],
    legend_of: Sequence[int] | None = None,
) -> Image.Image:
    """Return the image with each (title, mask) over a copy, and the names of the colours below.

    A small image is enlarged. Copies are side by side, or below each other where it is wide.

    Args:
        names: of the classes.
        legend_of: the classes that the legend names; None is those in the masks.
    """
    base = enlarged(image)
    wide = len(masks) * (base.width > base.height)
    width, height = base.size
    columns, rows = (1, len(masks)) if wide else (len(masks), 1)
    size = max(8, round(_TEXT * max(columns * width, rows * height) / SHOWN))
    classes = _present([mask for _, mask in masks]) if legend_of is None else legend_of
    legend = _legend(classes, names, columns * width, size)
    sheet = Image.new("RGB", (columns * width, rows * height + legend.height), "white")
    for i, (title, mask) in enumerate(masks):
        panel = covered(base, mask)
        if len(masks) > 1:
            write_title(panel, title, size)
        sheet.paste(panel, (0, i * height) if wide else (i * width, 0))
    sheet.paste(legend, (0, rows * height))
    return sheet


def _present(masks: Sequence[NDArray[np.uint8]]) -> list[int]:
    """Return the classes in the masks, the largest first."""
    shares = sum(np.bincount(mask.ravel(), minlength=256) / mask.size for mask in masks)
    order = np.argsort(-np.asarray(shares)[:VOID], kind="stable")
    return [int(c) for c in order if np.asarray(shares)[c] > 0]


def _legend(classes: Sequence[int], names: Sequence[str], width: int, size: int) -> Image.Image:
    """Return lines of coloured squares with names, as high as it takes."""
    font, line, gap = font_of(size), round(1.5 * size), size // 2
    places: list[tuple[int, int, int, str]] = []
    x, y = gap, gap // 2
    shown = [(c, names[c] if c < len(names) else str(c)) for c in classes[:_MAX_NAMES]]
    if len(classes) > _MAX_NAMES:
        shown.append((VOID, f"and {len(classes) - _MAX_NAMES} more"))
    for c, name in shown:
        needed = size + gap + round(font.getlength(name))
        if x > gap and x + needed > width:
            x, y = gap, y + line
        places.append((x, y, c, name))
        x += needed + 2 * gap
    image = Image.new("RGB", (width, y + line), "white")
    draw = ImageDraw.Draw(image)
    for x, y, c, name in places:
        if c != VOID:
            draw.rectangle((x, y, x + size, y + size), fill=tuple(palette()[c].tolist()))
        draw.text((x + size + gap, y), name, fill="black", font=font)
    return image
