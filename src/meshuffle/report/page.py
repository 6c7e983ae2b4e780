"""Renders the report's template, and makes its pictures.

Everything that reaches a page from outside (class names, file names, configs) is escaped by the
template, and shown as `printable` has it. The page loads nothing and runs no script; its content
security policy says so.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

_THUMB = 192  # pixels of the long side: twice what the page shows


def printable(value: object) -> str:
    r"""Return `value` as text in which characters that do not print are escapes.

    These are control characters, overrides of the writing direction, and the lone surrogates
    of a file name that is not UTF-8.

    >>> print(printable("a\u202eb"))
    a\u202eb
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(value))


def render(template: str, **values: Any) -> str:
    """Return the page that a template of this folder makes of plain data.

    Args:
        template: file name.
        values: by the names that the template uses.
    """
    pages = Environment(
        loader=PackageLoader("meshuffle.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else printable(value),
    )
    return pages.get_template(template).render(values)


def percent(share: float) -> str:
    """Return a share in 0 … 1 with one decimal, never rounded to certainty.

    >>> percent(0.875), percent(0.9999), percent(1e-9), percent(1.0)
    ('87.5 %', '>99.9 %', '<0.1 %', '100 %')
    """
    if share in (0.0, 1.0):
        return f"{100 * share:.0f} %"
    if share > 0.999:
        return ">99.9 %"
    return "<0.1 %" if share < 0.001 else f"{100 * share:.1f} %"


@dataclass(frozen=True)
class Picture:
    """A picture in two colours, as data URIs: the page follows the reader's colour scheme."""

    light: str
    dark: str
    description: str

    @classmethod
    def of(cls, light_png: bytes, dark_png: bytes, description: str) -> Picture:
        """Return the picture of two PNG files."""
        return cls(_data_uri(light_png, "png"), _data_uri(dark_png, "png"), description)


def thumbnail(image: Image.Image, side: int = _THUMB) -> str:
    """Return an image as a data URI of at most `side` pixels a side.

    Small ones grow by a whole factor without smoothing, so that single pixels can be seen.
    """
    longest = max(image.size)
    file = io.BytesIO()
    if longest <= side // 2:
        factor = side // longest
        size = (image.width * factor, image.height * factor)
        image.resize(size, Image.Resampling.NEAREST).save(file, format="PNG")
        return _data_uri(file.getvalue(), "png")
    image = image.copy()
    image.thumbnail((side, side))
    image.save(file, format="JPEG", quality=82)
    return _data_uri(file.getvalue(), "jpeg")


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
