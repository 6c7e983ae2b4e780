"""One replica's service: admits requests, reads their images, and has them answered in batches."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

from meshuffle.deploy.serve.batching import Batcher
from meshuffle.deploy.serve.engine import Engine, Told, View
from meshuffle.deploy.serve.limits import Limits, Refused
from meshuffle.deploy.serve.metrics import Metrics
from meshuffle.deploy.serve.upload import Upload

State = Literal["starting", "ready", "stopping"]
Value = TypeVar("Value")


class Service:
    """What stands between HTTP and the engine.

    Args:
        max_requests: of this replica, at the same time; the rest is refused.
        readers: threads that decode.
        max_batch, window_s: see `Batcher`.

    Attributes:
        state: `starting` until `begin` has an engine, `stopping` from `end` on.
    """

    def __init__(
        self,
        limits: Limits,
        metrics: Metrics,
        *,
        max_requests: int,
        readers: int,
        max_batch: int,
        window_s: float,
    ) -> None:
        self.limits, self.metrics, self._max_requests = limits, metrics, max_requests
        self.state: State = "starting"
        self._engine: Engine | None = None
        self._readers = ThreadPoolExecutor(readers, thread_name_prefix="read")
        self._batcher = Batcher(self._answer, max_batch=max_batch, window_s=window_s)
        self._num_requests = 0

    def begin(self, engine: Engine) -> None:
        """Be ready, in the running event loop."""
        self._engine = engine
        self._batcher.start()
        self.state = "ready"

    async def end(self) -> None:
        """Stop; requests should have been answered before."""
        self.state = "stopping"
        await self._batcher.stop()
        self._readers.shutdown(cancel_futures=True)

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """Count a request for the length of a `with` block.

        Raises:
            Refused: 503 before there is a model; 429 where there are as many as may be.
        """
        if self._engine is None:
            raise Refused(503, "the service is starting", {"retry-after": "5"})
        if self._num_requests >= self._max_requests:
            raise Refused(429, "too many requests at once", {"retry-after": "1"})
        self._num_requests += 1
        self.metrics.in_flight.inc()
        try:
            yield
        finally:
            self._num_requests -= 1
            self.metrics.in_flight.dec()

    async def predict(self, uploads: Sequence[Upload], *, mask: bool) -> list[dict[str, Any]]:
        """Return what the task predicts of each image; of several that fail the first is told.

        Args:
            mask: add the mask, where the task has one.
        """
        if len(uploads) == 1:
            return [await self._one(uploads[0], mask)]
        asked = (self._one(upload, mask) for upload in uploads)
        found = await asyncio.gather(*asked, return_exceptions=True)
        for value in found:
            if isinstance(value, BaseException):
                raise value
        return [value for value in found if isinstance(value, dict)]

    async def _one(self, upload: Upload, mask: bool) -> dict[str, Any]:
        with self._batcher.expect():
            view = await self._in_thread(self._read, upload)
        told = await self._batcher.ask(view)
        self.metrics.images.inc()
        prediction = {"file": upload.name, **told.prediction}
        if mask:
            assert self._engine is not None
            drawn = await self._in_thread(self._engine.mask, told)
            prediction |= {} if drawn is None else {"mask": drawn}
        return prediction

    async def _in_thread(self, work: Callable[..., Value], *arguments: object) -> Value:
        return await asyncio.get_running_loop().run_in_executor(self._readers, work, *arguments)

    def _read(self, upload: Upload) -> View:
        assert self._engine is not None
        started = time.perf_counter()
        view = self._engine.read(upload)
        self.metrics.read_seconds.observe(time.perf_counter() - started)
        return view

    def _answer(self, views: Sequence[View]) -> list[Told]:
        assert self._engine is not None
        started = time.perf_counter()
        told = self._engine.answer(views)
        self.metrics.batch_seconds.observe(time.perf_counter() - started)
        self.metrics.batch_images.observe(len(views))
        return told
