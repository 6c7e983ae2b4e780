"""Writes files in a thread of its own, so that training waits only for the copy of its state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from torch import Tensor


class Saver:
    """One thread that writes what it is given, one job at a time.

    A job that fails raises its error in the loop: in the next `check`, `copy`, `submit` or `wait`.
    Used as a `with` block, which ends when the last job has.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saver")
        self._job: Future[None] | None = None

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return copies in main memory; the optimiser changes the tensors in place.

        Waits for the job before, so that there is one copy at a time.
        """
        self.wait()
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}

    def submit(self, job: Callable[[], None]) -> None:
        """Let the thread do `job`, after the one before; the job must own what it reads."""
        self.wait()
        self._job = self._pool.submit(job)

    def check(self) -> None:
        """Raise the error of a job that has failed; never waits."""
        if self._job is not None and self._job.done():
            self.wait()

    def wait(self) -> None:
        """Return when nothing is left to write; raises the error of a job that has failed."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def __enter__(self) -> Saver:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Wait for the last job; its error counts where there is no other."""
        self._pool.shutdown(wait=True)
        if error is None:
            self.wait()
