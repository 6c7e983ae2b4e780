"""Decode one image file to RGB, or raise an error that says in one line why it cannot be used.

    bytes ──header──▶ pixel limit ──decode──▶ EXIF orientation ──▶ 8-bit RGB

16-bit grey values are scaled (65535 → 255), never clipped. Transparency is composited on white.
CMYK and palettes are converted. An animation is reduced to its first frame. A TIFF of several
pages, of fractions, or of numbers beyond 65535 is refused: eight bits would not show it.
"""

from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import (
    BmpImagePlugin,  # noqa: F401  (importing a plugin registers its format)
    GifImagePlugin,  # noqa: F401
    Image,
    JpegImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    TiffImagePlugin,  # noqa: F401
    WebPImagePlugin,  # noqa: F401
)

from meshuffle.errors import ImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
)
MAX_PIXELS = 89_478_485  # Pillow's own threshold of suspicion: 256 MiB as RGB

# What Pillow's parsers raise on broken files. Tests fuzz every format against this list.
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
)
_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF", b"BM", b"GIF8", b"II*\0", b"MM\0*")
EXIF_ORIENTATION = 0x0112
POINTER = b"version https://git-lfs"
IS_POINTER = "a Git LFS pointer; fetch the file itself with: git lfs pull"
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_filters_lock = threading.Lock()


def decode_image(
    path_or_bytes: Path | str | bytes, *, max_pixels: int = MAX_PIXELS, name: str | None = None
) -> Image.Image:
    """Return the image as a PIL image in mode RGB, upright and with 8 bits per channel.

    `path_or_bytes`: a file, or its content. `max_pixels`: width × height above which the
    image is refused from its header, before any pixel is decoded; 1 … 178,956,970 (above
    that Pillow itself refuses).
    `name`: the name of the image in an error; by default its path.

    Raises `ImageError`, one line with the name and a `kind`, when the file is missing, unreadable,
    empty, truncated, not an image of a known format, or too large.
    """
    if isinstance(path_or_bytes, bytes):
        label = name or f"image of {len(path_or_bytes)} bytes"
        return _decode(io.BytesIO(path_or_bytes), len(path_or_bytes), label, max_pixels)
    path = Path(path_or_bytes)
    label = name or str(path)
    try:
        with path.open("rb") as file:
            return _decode(file, path.stat().st_size, label, max_pixels)
    except OSError as error:
        raise ImageError(f"{label}: cannot be read: {error.strerror or error}") from error


def _decode(file: BinaryIO, num_bytes: int, label: str, max_pixels: int) -> Image.Image:
    if num_bytes == 0:
        raise ImageError(f"{label}: empty file (0 bytes)")
    try:
        image = _open(file)
    except Image.DecompressionBombError as error:
        raise ImageError(f"{label}: {_one_line(error)}", "large") from error
    except BROKEN as error:
        raise _unopened(file, label) from error
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"{label}: {width}×{height} = {width * height:,} pixels, "
            f"more than the limit of {max_pixels:,}",
            "large",
        )
    try:
        if image.format == "TIFF":
            with _no_warnings():
                _check_tiff(image, label)
                image.load()
        image.load()
        return _to_rgb(_upright(image))
    except BROKEN as error:
        raise ImageError(f"{label}: broken or truncated: {_one_line(error)}") from error


def _open(file: BinaryIO) -> Image.Image:
    with _no_warnings():
        return Image.open(file, formats=FORMATS)


def _check_tiff(image: Image.Image, label: str) -> None:
    """Raise `ImageError` for what eight bits do not show."""
    if (pages := getattr(image, "n_frames", 1)) > 1:
        raise ImageError(f"{label}: a TIFF of {pages} pages; save each as an image of its own")
    if image.mode == "F" or (image.mode == "I" and np.asarray(image).max() > 65535):
        raise ImageError(f"{label}: a TIFF of mode {image.mode}; save it with 8 or 16 bits")


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Hide Pillow's warnings; under a lock, because `catch_warnings` is not thread-safe."""
    with _filters_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; a broken EXIF block is ignored."""
    try:
        with _no_warnings():
            orientation = image.getexif().get(EXIF_ORIENTATION)
    except BROKEN:
        return image
    method = _TRANSPOSE.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):
        return _from_16_bit(image)
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, _to_rgba(image)).convert("RGB")
    return image.convert("RGB")


def _to_rgba(image: Image.Image) -> Image.Image:
    with _no_warnings():
        return image.convert("RGBA")


def _from_16_bit(image: Image.Image) -> Image.Image:
    values = np.array(image, dtype=np.float32)  # float32 is exact enough for 16 bits
    np.clip(values, 0, 65535, out=values)
    np.divide(values, 257, out=values)
    return Image.fromarray(np.rint(values, out=values).astype(np.uint8)).convert("RGB")


def _unopened(file: BinaryIO, label: str) -> ImageError:
    """Return the error for a file that Pillow does not open."""
    file.seek(0)
    start = file.read(len(POINTER))
    if start == POINTER:
        return ImageError(f"{label}: {IS_POINTER}")
    return ImageError(
        f"{label}: not a JPEG, PNG, WebP, BMP, GIF or TIFF image, or its header is broken "
        f"(begins with {repr(start[:12])[1:]})",
        "broken" if start.startswith(_STARTS) else "unknown",
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
