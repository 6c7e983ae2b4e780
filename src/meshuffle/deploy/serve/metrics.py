"""The metrics of a service over all replicas, in Prometheus' text format.

Replicas share a folder, which prometheus_client looks up in `PROMETHEUS_MULTIPROC_DIR` when it is
imported; therefore nothing imports this file before the variable is set.
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
    """The counters of one replica, and the text of all replicas."""

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
            "Time from a request's first byte to its answer.",
            ("path",),
            buckets=_SECONDS,
            **_at(own),
        )
        self.images = Counter("meshuffle_images", "Predicted images.", **_at(own))
        self.batch_images = Histogram(
            "meshuffle_batch_images", "Images in a batch.", buckets=_SIZES, **_at(own)
        )
        self.batch_seconds = Histogram(
            "meshuffle_batch_seconds", "Time to compute a batch.", buckets=_SECONDS, **_at(own)
        )
        self.read_seconds = Histogram(
            "meshuffle_read_seconds",
            "Time to decode and resize an image.",
            buckets=_SECONDS,
            **_at(own),
        )
        self.in_flight = Gauge(
            "meshuffle_requests_in_flight",
            "Requests for predictions in progress.",
            multiprocess_mode="livesum",
            **_at(own),
        )

    def text(self) -> bytes:
        """Return the metrics of all replicas, or of this process if there is no shared folder."""
        if FOLDER not in os.environ:
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        return generate_latest(registry)


def _at(registry: CollectorRegistry) -> dict[str, Any]:
    return {"registry": registry}
