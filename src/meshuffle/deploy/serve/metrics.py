"""What a service counts, in Prometheus' text format, over all replicas.

Replicas share a folder (`PROMETHEUS_MULTIPROC_DIR`), which prometheus_client reads when it is
imported: so nothing imports this file before the variable is set.
"""

from __future__ import annotations

import os
from typing import Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The counters of one replica, and the text of all."""

    def __init__(self) -> None:
        own = self._registry = CollectorRegistry()
        self.requests = Counter(
            "meshuffle_requests",
            "Requests by path and HTTP status.",
            ("path", "status"),
            **_at(own),
        )
        self.request_seconds = Histogram(
            "meshuffle_request_seconds",
            "From a request's first byte to its answer.",
            ("path",),
            buckets=_SECONDS,
            **_at(own),
        )
        self.images = Counter("meshuffle_images", "Images that were predicted.", **_at(own))
        self.batch_images = Histogram(
            "meshuffle_batch_images", "Images in a batch.", buckets=_SIZES, **_at(own)
        )
        self.batch_seconds = Histogram(
            "meshuffle_batch_seconds", "Computing a batch.", buckets=_SECONDS, **_at(own)
        )
        self.read_seconds = Histogram(
            "meshuffle_read_seconds",
            "Decoding and resizing an image.",
            buckets=_SECONDS,
            **_at(own),
        )
        self.in_flight = Gauge(
            "meshuffle_requests_in_flight",
            "Requests for predictions that are read, wait or are computed.",
            multiprocess_mode="livesum",
            **_at(own),
        )

    def text(self) -> bytes:
        """Return the metrics of all replicas, or of this process where there is no folder."""
        if FOLDER not in os.environ:
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        return generate_latest(registry)


def _at(registry: CollectorRegistry) -> dict[str, Any]:
    return {"registry": registry}
