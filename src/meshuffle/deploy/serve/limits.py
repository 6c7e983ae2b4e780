"""The limits of a service, and the exception that refuses a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from meshuffle.errors import ConfigError

MAX_SCANS = 100
"""The most scans of a JPEG. Cameras write 1, progressive encoders about 10; a file with thousands
takes hours to decode, whatever its size."""


@dataclass(frozen=True)
class Limits:
    """The limits of a service; beyond each, a request gets the HTTP status in parentheses.

    Attributes:
        body_bytes: size of a request's body (413).
        pixels: width × height of an image, read from its header before it is decoded (413).
        images: number of images in a request (413).
        requests: number of requests in progress at the same time, over all replicas (429).
        seconds: time from a request's first byte to its answer (504).

    Raises:
        ConfigError: a limit is not above 0.
    """

    body_bytes: int = 16_000_000
    pixels: int = 25_000_000
    images: int = 32
    requests: int = 128
    seconds: float = 10.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ConfigError(f"limits: {name} (={value}) must be above 0")

    def __str__(self) -> str:
        return (
            f"body {self.body_bytes / 1e6:g} MB, {self.pixels / 1e6:g} megapixels, "
            f"{self.images} images per request, {self.requests} requests at once, "
            f"{self.seconds:g} s"
        )


class Refused(Exception):
    """A request that is refused; it is answered by a JSON error.

    Attributes:
        status: HTTP status.
        message: one line for the client.
        headers: additional HTTP headers.
    """

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, dict(headers or {})
