"""The pages for people: one to try the model, one that shows what OpenAPI says.

Both are complete: a browser fetches nothing else, and the policy lets it run nothing else.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from jinja2 import ChainableUndefined, Environment, PackageLoader
from starlette.responses import HTMLResponse

_HEADERS = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
_TEMPLATES = Environment(
    loader=PackageLoader("meshuffle.deploy", "serve"), autoescape=True, undefined=ChainableUndefined
)


@functools.cache
def start_page() -> HTMLResponse:
    """Return the page on which a person tries the model."""
    return _page(files(__package__).joinpath("page.html").read_text("utf-8"))


def api_page(openapi: Mapping[str, Any]) -> HTMLResponse:
    """Return an OpenAPI document as a page to read."""
    return _page(_TEMPLATES.get_template("api.html").render(openapi))


def _page(text: str) -> HTMLResponse:
    """Return HTML that may run its own scripts and styles, and nothing from elsewhere."""
    allowed = " ".join(f"{tag}-src {_digests(tag, text)};" for tag in ("script", "style"))
    policy = (
        f"default-src 'none'; {allowed} img-src 'self' blob: data:; connect-src 'self'; "
        "media-src blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )
    return HTMLResponse(text, headers={**_HEADERS, "content-security-policy": policy})


def _digests(tag: str, text: str) -> str:
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(part.encode()).digest()) for part in found]
    return " ".join(f"'sha256-{digest.decode()}'" for digest in digests) or "'none'"
