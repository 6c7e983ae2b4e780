"""The pages for people: one to try the model, one that shows what OpenAPI says.

Both are whole in themselves: a browser fetches nothing else, and is told to run nothing else.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from typing import Any

from starlette.responses import HTMLResponse

_HEADERS = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
_STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem }
code, pre { font-size: 14px; background: #8882; border-radius: 4px; padding: .1em .3em }
pre { padding: .8em; overflow-x: auto }
h2 { border-top: 1px solid #8884; padding-top: 1rem; margin-top: 2rem }
table { border-collapse: collapse }
td { padding: .2rem 1.2rem .2rem 0; vertical-align: top }
"""


@functools.cache
def start_page() -> HTMLResponse:
    """Return the page on which a person tries the model."""
    return _page(files(__package__).joinpath("page.html").read_text("utf-8"))


def api_page(openapi: Mapping[str, Any]) -> HTMLResponse:
    """Return an OpenAPI document as a page to read."""
    parts = [
        _operation(method.upper(), path, operation)
        for path, methods in openapi["paths"].items()
        for method, operation in methods.items()
    ]
    info = openapi["info"]
    return _page(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(info["title"])} API'
        '</title><link rel="icon" href="data:,">'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1>"
        f"<p>{escape(info.get('description', ''))}. For programs: "
        '<a href="openapi.json">openapi.json</a>; to try it: <a href=".">the start page</a>.</p>'
        "<pre>curl -H 'Content-Type: image/jpeg' --data-binary @photo.jpg "
        "HOST/predict\ncurl -F image=@one.jpg -F image=@two.png HOST/predict</pre>"
        f"{''.join(parts)}</html>"
    )


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> str:
    body = operation.get("requestBody", {}).get("content", {})
    rows = [("body", kind, "") for kind in body]
    for parameter in operation.get("parameters", ()):
        kind = parameter["schema"].get("type", "")
        rows.append(
            (f"{parameter['in']} {parameter['name']}", kind, parameter.get("description", ""))
        )
    for status, answer in operation["responses"].items():
        kinds = " ".join(_schema_name(content) for content in answer.get("content", {}).values())
        rows.append((status, kinds, answer.get("description", "")))
    table = "".join(
        f"<tr><td><code>{escape(a)}</code><td>{escape(b)}<td>{escape(c)}" for a, b, c in rows
    )
    lock = "<p>Needs the bearer token.</p>" if operation.get("security") else ""
    return (
        f"<h2><code>{method} {escape(path)}</code></h2><p>{escape(operation.get('summary', ''))}. "
        f"{escape(operation.get('description', ''))}</p>{lock}<table>{table}</table>"
    )


def _schema_name(content: Mapping[str, Any]) -> str:
    schema = content.get("schema", {})
    return str(schema.get("$ref", "").rpartition("/")[2] or schema.get("type", ""))


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
