"""What a service takes, and how it refuses the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from meshuffle.errors import ConfigError

MAX_SCANS = 100
"""Of a JPEG; cameras write 1, progressive encoders about 10. A file of thousands decodes for
hours, whatever its size."""


@dataclass(frozen=True)
class Limits:
    """The limits of a service; each has its HTTP status.

    Attributes:
        body_bytes: of a request (413).
        pixels: width × height of an image, seen from its header before it is decoded (413).
        images: of a request (413).
        requests: that are read, wait or are computed at the same time, over all replicas (429).
        seconds: of a request, from its first byte to its answer (504).

    Raises:
        ConfigError: one of them is not above 0.
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
    """A request that is not answered with predictions; it becomes a JSON error.

    `status`: HTTP's; `message`: one line for the client; `headers`: further ones.
    """

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, dict(headers or {})
