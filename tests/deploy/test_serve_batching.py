"""Batches lose nothing, mix nothing up, and go on after errors and cancellations."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from meshuffle.deploy.serve.batching import Batcher


class Doubler:
    """Doubles numbers, and remembers the batches."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.batches: list[list[int]] = []
        self.seconds = seconds

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        time.sleep(self.seconds)
        if any(item < 0 for item in items):
            raise ValueError("negative")
        return [2 * item for item in items]


@settings(max_examples=30)
@given(
    delays=st.lists(st.sampled_from([0.0, 0.0, 0.001, 0.004]), min_size=1, max_size=30),
    cancelled=st.sets(st.integers(0, 29)),
    max_batch=st.integers(1, 5),
    window_s=st.sampled_from([0.0, 0.002]),
)
def test_each_gets_its_own_answer(
    delays: list[float], cancelled: set[int], max_batch: int, window_s: float
) -> None:
    work = Doubler(0.0005)

    async def run() -> list[int | BaseException]:
        batcher = Batcher(work, max_batch=max_batch, window_s=window_s)
        batcher.start()

        async def ask(number: int, delay: float) -> int:
            with batcher.expect():
                await asyncio.sleep(delay)
            return await batcher.ask(number)

        tasks = [asyncio.create_task(ask(i, delay)) for i, delay in enumerate(delays)]
        await asyncio.sleep(0.001)
        for number in cancelled & set(range(len(tasks))):
            tasks[number].cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        await batcher.stop()
        return found

    for number, value in enumerate(asyncio.run(run())):
        gone = isinstance(value, asyncio.CancelledError) and number in cancelled
        assert value == 2 * number or gone
    assert all(1 <= len(batch) <= max_batch for batch in work.batches)
    computed = [item for batch in work.batches for item in batch]
    assert len(computed) == len(set(computed))


def test_they_are_taken_in_order_and_together_while_the_thread_is_busy() -> None:
    work = Doubler(0.02)

    async def run() -> None:
        batcher = Batcher(work, max_batch=4, window_s=0.0)
        batcher.start()
        first = asyncio.create_task(batcher.ask(0))
        await asyncio.sleep(0.005)
        await asyncio.gather(*(batcher.ask(i) for i in range(1, 10)))
        await first
        await batcher.stop()

    asyncio.run(run())
    assert work.batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9]]


def test_an_image_alone_does_not_wait() -> None:
    async def run() -> None:
        batcher = Batcher(Doubler(), max_batch=8, window_s=30.0)
        batcher.start()
        async with asyncio.timeout(20):
            with batcher.expect():
                pass
            assert await batcher.ask(1) == 2
        await batcher.stop()

    asyncio.run(run())


def test_expected_ones_are_waited_for_but_not_beyond_the_window() -> None:
    work = Doubler()

    async def run() -> None:
        batcher = Batcher(work, max_batch=8, window_s=0.3)
        batcher.start()
        with batcher.expect():  # never comes
            asked = [asyncio.create_task(batcher.ask(i)) for i in range(2)]
            await asyncio.gather(*asked)
        await batcher.stop()

    asyncio.run(run())
    assert work.batches == [[0, 1]]


def test_an_error_reaches_those_of_its_batch_and_no_other() -> None:
    async def run() -> None:
        batcher = Batcher(Doubler(), max_batch=1, window_s=0.0)
        batcher.start()
        found = await asyncio.gather(*map(batcher.ask, (1, -1, 2)), return_exceptions=True)
        assert found[0] == 2 and found[2] == 4
        assert isinstance(found[1], ValueError)
        await batcher.stop()

    asyncio.run(run())


def test_what_is_cancelled_while_it_waits_is_not_computed() -> None:
    gate, work = threading.Event(), Doubler()

    def blocked(items: Sequence[int]) -> list[int]:
        gate.wait(10)
        return work(items)

    async def run() -> None:
        batcher = Batcher(blocked, max_batch=1, window_s=0.0)
        batcher.start()
        tasks = [asyncio.create_task(batcher.ask(i)) for i in range(3)]
        await asyncio.sleep(0.05)
        tasks[1].cancel()
        gate.set()
        assert await tasks[2] == 4
        await batcher.stop()

    asyncio.run(run())
    assert work.batches == [[0], [2]]


def test_stopping_cancels_what_waits() -> None:
    async def run() -> None:
        batcher = Batcher(Doubler(0.05), max_batch=1, window_s=0.0)
        batcher.start()
        tasks = [asyncio.create_task(batcher.ask(i)) for i in range(3)]
        await asyncio.sleep(0.01)
        await batcher.stop()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(value, asyncio.CancelledError) for value in found)

    asyncio.run(run())
