"""Join the images of many requests into batches.

    ask ──▶ waiting ──batch of at most N──▶ work, in a thread of its own ──▶ answers in order

A batch starts as soon as the thread is free. It waits for more images only if some are announced
(`expect`), and never longer than the window.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """Collects items into batches, for one event loop.

    Args:
        work: maps items to as many results, in the same order; one thread calls it.
        max_batch: the most items of a batch, at least 1.
        window_s: how long an item may wait for announced ones while the thread is free.
    """

    def __init__(
        self, work: Callable[[Sequence[Item]], Sequence[Result]], *, max_batch: int, window_s: float
    ) -> None:
        self._work, self._max_batch, self._window_s = work, max_batch, window_s
        self._waiting: deque[tuple[Item, asyncio.Future[Result], float]] = deque()
        self._changed = asyncio.Event()
        self._expected = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batch")
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start to work in the running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Stop, and cancel the items that still wait."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for _, future, _ in self._waiting:
            future.cancel()
        self._thread.shutdown()

    @contextlib.contextmanager
    def expect(self) -> Iterator[None]:
        """Announce, for the length of a `with` block, that an item is on its way."""
        self._expected += 1
        try:
            yield
        finally:
            self._expected -= 1
            self._changed.set()

    async def ask(self, item: Item) -> Result:
        """Return the result of `item`; if the caller is cancelled first, nothing is computed."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        self._waiting.append((item, future, loop.time()))
        self._changed.set()
        return await future

    async def _run(self) -> None:
        while True:
            await self._until_ready()
            batch = self._next_batch()
            if batch:
                await self._answer(batch)

    async def _until_ready(self) -> None:
        """Wait for an item, and then for expected ones, within the window of the first."""
        loop = asyncio.get_running_loop()
        while True:
            self._changed.clear()
            timeout = None
            if self._waiting:
                timeout = self._waiting[0][2] + self._window_s - loop.time()
                if not self._expected or len(self._waiting) >= self._max_batch or timeout <= 0:
                    return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._changed.wait()

    def _next_batch(self) -> list[tuple[Item, asyncio.Future[Result]]]:
        batch: list[tuple[Item, asyncio.Future[Result]]] = []
        while self._waiting and len(batch) < self._max_batch:
            item, future, _ = self._waiting.popleft()
            if not future.done():  # cancelled
                batch.append((item, future))
        return batch

    async def _answer(self, batch: Sequence[tuple[Item, asyncio.Future[Result]]]) -> None:
        items = [item for item, _ in batch]
        loop = asyncio.get_running_loop()
        try:
            results = await loop.run_in_executor(self._thread, self._work, items)
        except asyncio.CancelledError:
            for _, future in batch:
                future.cancel()
            raise
        except Exception as error:  # noqa: BLE001  # every caller of the batch gets it
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), result in zip(batch, results, strict=True):
            if not future.done():
                future.set_result(result)
