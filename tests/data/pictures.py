"""Images for tests."""

import io

import numpy as np
from PIL import Image


def noise(seed: int = 0, size: tuple[int, int] = (12, 10)) -> Image.Image:
    """An RGB image of (width, height) with random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, format_name: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()
