"""One replica's service: it admits requests, reads their images and predicts them in batches."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

from meshuffle.deploy.serve.batching import Batcher
from meshuffle.deploy.serve.engine import Answer, Engine, View
from meshuffle.deploy.serve.limits import Limits, Refused
from meshuffle.deploy.serve.metrics import Metrics
from meshuffle.deploy.serve.upload import Upload

State = Literal["starting", "ready", "stopping"]
Value = TypeVar("Value")


class Service:
    """The part between HTTP and the engine.

    Args:
        max_requests: the most requests in progress in this replica; others are refused.
        readers: number of threads that decode images.
        max_batch, window_s: see `Batcher`.

    Attributes:
        state: `starting` until `begin` gets an engine, `stopping` once the service ends.
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
        """Take requests from now on, in the running event loop."""
        self._engine = engine
        self._batcher.start()
        self.state = "ready"

    async def end(self) -> None:
        """Stop; the requests should be answered by then."""
        self.state = "stopping"
        await self._batcher.stop()
        self._readers.shutdown(cancel_futures=True)

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """Count a request for the length of a `with` block.

        Raises:
            Refused: 503 before the model is loaded; 429 at the limit of requests.
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
        """Return the prediction for each image, or raise the error of the first that fails.

        Args:
            mask: add the mask, if the task has one.
        """
        if len(uploads) == 1:
            return [await self._predict_one(uploads[0], mask)]
        asked = (self._predict_one(upload, mask) for upload in uploads)
        found = await asyncio.gather(*asked, return_exceptions=True)
        for value in found:
            if isinstance(value, BaseException):
                raise value
        return [value for value in found if isinstance(value, dict)]

    async def _predict_one(self, upload: Upload, mask: bool) -> dict[str, Any]:
        with self._batcher.expect():
            view = await self._in_thread(self._read, upload)
        answer = await self._batcher.ask(view)
        self.metrics.images.inc()
        prediction = {"file": upload.name, **answer.prediction}
        if mask:
            assert self._engine is not None
            drawn = await self._in_thread(self._engine.mask, answer)
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

    def _answer(self, views: Sequence[View]) -> list[Answer]:
        assert self._engine is not None
        started = time.perf_counter()
        answers = self._engine.answer(views)
        self.metrics.batch_seconds.observe(time.perf_counter() - started)
        self.metrics.batch_images.observe(len(views))
        return answers
