"""Ctrl-C and SIGTERM become a flag that the loop reads between steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class StopRequest:
    """`number` is the signal that asked for an end, or 0."""

    number: int = 0


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Catch SIGINT and SIGTERM for the length of a `with` block; a third one kills at once.

    Only the main thread of a process may catch signals; in another none is caught.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    seen = 0

    def note(number: int, _: object) -> None:
        nonlocal seen
        seen += 1
        request.number = request.number or number
        if seen > 2:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
