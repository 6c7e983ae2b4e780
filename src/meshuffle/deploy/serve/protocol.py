"""uvicorn's HTTP/1.1, with limits on what a client may hold open or send unasked.

uvicorn itself limits neither the bytes of a request's head, nor the seconds that it may take, nor
the bytes that are discarded after an early answer, nor the time until a client reads its answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

MAX_HEAD_BYTES = 64 << 10
_NO_HTTP = b'{"error": {"status": 400, "message": "this is no HTTP request"}}'


@dataclass(frozen=True)
class Patience:
    """The limits of a connection.

    Attributes:
        seconds: for a request's head, for the rest of a body after an early answer, and until the
            client reads more of an answer.
        ignored_bytes: for the rest of a body after an early answer.
    """

    seconds: float
    ignored_bytes: int


class Connection(HttpToolsProtocol):
    """A client's connection.

    Args:
        closed: called when the connection ends.

    Attributes:
        last: whether the current request, or else the next one, is the last.
    """

    def __init__(
        self, *args: Any, patience: Patience, closed: Callable[[], None], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._patience, self._closed, self._last = patience, closed, False
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None
        self._in_head, self._head_bytes, self._ignored_bytes = False, 0, 0

    @property
    def is_waiting(self) -> bool:
        """Whether no request is being read or answered."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def last(self) -> bool:
        """Whether the connection ends with the next answer."""
        return self._last

    @last.setter
    def last(self, value: bool) -> None:
        self._last = value
        if value and not self.is_waiting:
            self.cycle.keep_alive = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        self._reading = self._give_up_later()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers and report the end."""
        for timer in (self._reading, self._writing):
            _cancel(timer)
        super().connection_lost(exc)
        self._closed()

    def data_received(self, data: bytes) -> None:
        """Take bytes, and abort if the head becomes too long."""
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.transport.abort()

    def on_message_begin(self) -> None:
        """Start the time limit of a request's head."""
        super().on_message_begin()
        self._in_head, self._head_bytes, self._ignored_bytes = True, 0, 0
        _cancel(self._reading)
        self._reading = self._give_up_later()

    def on_headers_complete(self) -> None:
        """Stop the time limit; the application takes over."""
        super().on_headers_complete()
        self._in_head = False
        _cancel(self._reading)
        if self._last:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """Pass on a part of the body, or count it if the request is already answered."""
        super().on_body(body)
        if self.cycle.response_complete:
            self._ignored_bytes += len(body)
            if self._ignored_bytes > self._patience.ignored_bytes:
                self.transport.abort()

    def on_message_complete(self) -> None:
        """Stop the time limit of a discarded body."""
        super().on_message_complete()
        if not self._in_head:
            _cancel(self._reading)

    def on_response_complete(self) -> None:
        """Start the time limit of the rest of the body, if there is one."""
        super().on_response_complete()
        if self.cycle.response_complete and self.cycle.more_body and not self._in_head:
            _cancel(self._reading)
            self._reading = self._give_up_later()

    def pause_writing(self) -> None:
        """Start the time limit of a client that does not read its answer."""
        super().pause_writing()
        self._writing = self._give_up_later()

    def resume_writing(self) -> None:
        """Stop that time limit."""
        super().resume_writing()
        _cancel(self._writing)

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are not HTTP, in the form of all errors."""
        head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
        self.transport.write(STATUS_LINE[400] + head % len(_NO_HTTP) + _NO_HTTP)
        self.transport.close()

    def _give_up_later(self) -> asyncio.TimerHandle:
        return self.loop.call_later(self._patience.seconds, self.transport.abort)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
