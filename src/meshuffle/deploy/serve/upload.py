"""From an HTTP request to the images' bytes; reading stops as soon as a limit is exceeded.

starlette's own form parser does not fit: it drops the image of a part that is cut off, turns parts
without a file name into text, and writes to the disk from 1 MB on.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from meshuffle.deploy.serve.limits import Limits, Refused

MULTIPART = "multipart/form-data"
RAW_TYPES = (
    "image/jpeg",
    "image/png",
    "image/webp",
    "image/bmp",
    "image/gif",
    "image/tiff",
    "application/octet-stream",
)
_RAW_NAME = "body"
_MAX_DIGITS = 18  # of a declared length in bytes
_SHOWN_NAME = 100  # characters of a file's name that messages and answers show


@dataclass(frozen=True)
class Upload:
    """An uploaded image file, under the client's name for it."""

    name: str
    content: bytes


async def read_upload(request: Request, limits: Limits) -> list[Upload]:
    """Return the images of a request; there is at least one.

    Raises:
        Refused: 400 malformed or empty; 413 too many bytes or images; 415 another content type.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    content_type = kind.decode("latin-1")
    if content_type and content_type not in (MULTIPART, *RAW_TYPES):
        raise Refused(
            415, f"content type {content_type[:100]!r}; send {MULTIPART} or {', '.join(RAW_TYPES)}"
        )
    if encoding := request.headers.get("content-encoding"):
        raise Refused(415, f"content encoding {encoding[:100]!r}; send the body as it is")
    chunks = _chunks(request, limits)
    if content_type == MULTIPART:
        return await _parts(chunks, options.get(b"boundary", b""), limits)
    content = b"".join([chunk async for chunk in chunks])
    if not content:
        raise Refused(400, "the body is empty; it should be an image")
    return [Upload(_RAW_NAME, content)]


async def _chunks(request: Request, limits: Limits) -> AsyncIterator[bytes]:
    """Yield the body in chunks, of at most `limits.body_bytes` in all."""
    too_large = Refused(413, f"the body is larger than {limits.body_bytes:,} bytes")
    declared = request.headers.get("content-length", "0")
    if not (declared.isascii() and declared.isdigit()):
        raise Refused(400, f"content-length {declared[:100]!r} is no number")
    if len(declared) > _MAX_DIGITS or int(declared) > limits.body_bytes:
        raise too_large
    num_bytes = 0
    try:
        async for chunk in request.stream():
            num_bytes += len(chunk)
            if num_bytes > limits.body_bytes:  # the body did not declare its length
                raise too_large
            yield chunk
    except ClientDisconnect:
        raise Refused(400, "the client left before its body was complete") from None


async def _parts(chunks: AsyncIterator[bytes], boundary: bytes, limits: Limits) -> list[Upload]:
    """Return the parts of a multipart body; each is an image, whatever the name of its field."""
    if not boundary:
        raise Refused(400, f"{MULTIPART} without a boundary")
    try:
        form = _Form(boundary, limits)
        async for chunk in chunks:
            form.parser.write(chunk)
    except FormParserError as error:
        raise Refused(400, f"malformed {MULTIPART}: {error}") from None
    if not form.is_complete:
        raise Refused(400, f"malformed {MULTIPART}: it ends before its last boundary")
    if not form.uploads:
        raise Refused(400, f"{MULTIPART} without a part; each part is an image")
    return form.uploads


class _Form:
    """Collects the parts that a MultipartParser finds."""

    def __init__(self, boundary: bytes, limits: Limits) -> None:
        self.uploads: list[Upload] = []
        self.is_complete = False
        self._max_parts = limits.images
        self._header, self._value, self._name = bytearray(), bytearray(), ""
        self._content: list[bytes] = []
        self.parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin_part,
                "on_header_field": lambda data, a, b: self._header.extend(data[a:b]),
                "on_header_value": lambda data, a, b: self._value.extend(data[a:b]),
                "on_header_end": self._end_header,
                "on_part_data": lambda data, a, b: self._content.append(data[a:b]),
                "on_part_end": self._end_part,
                "on_end": self._end_form,
            },
        )

    def _begin_part(self) -> None:
        if len(self.uploads) == self._max_parts:
            raise Refused(413, f"more than {self._max_parts} images in a request")
        self._name, self._content = "", []

    def _end_header(self) -> None:
        if bytes(self._header).lower() == b"content-disposition":
            _, options = parse_options_header(bytes(self._value))
            name = options.get(b"filename") or options.get(b"name") or b""
            self._name = name.decode("utf-8", "replace")
        self._header.clear()
        self._value.clear()

    def _end_part(self) -> None:
        name = " ".join(self._name.split())[:_SHOWN_NAME] or f"part {len(self.uploads) + 1}"
        self.uploads.append(Upload(name, b"".join(self._content)))

    def _end_form(self) -> None:
        self.is_complete = True
