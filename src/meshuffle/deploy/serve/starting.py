"""Answers of a service none of whose replicas answers yet: 503, and 200 to /health."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

from uvicorn.server import ServerState

from meshuffle.deploy.serve.limits import Limits
from meshuffle.deploy.serve.protocol import Connection, Patience
from meshuffle.deploy.serve.replica import GRACE_S, http_config

NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
"""Errors of `accept` when this process or system may open no more files."""
PAUSE_S = 0.5
"""The seconds without room until a service accepts again."""
_RETRY_AFTER_S = 5


class Refuser:
    """Answers one request per connection, in the running event loop."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._config, self._state = http_config(self._answer), ServerState()
        self._opening: set[asyncio.Task[Any]] = set()

    def take(self, connection: socket.socket) -> None:
        """Answer the request that comes over a connection, and close it."""
        connection.setblocking(False)
        loop = asyncio.get_running_loop()
        made = loop.connect_accepted_socket(self._new_connection, connection)
        task = loop.create_task(made)
        self._opening.add(task)
        task.add_done_callback(self._opened)

    async def close(self) -> None:
        """Answer for at most `GRACE_S` what has been taken, then close all connections."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GRACE_S):
                while self._opening or self._state.connections:
                    await asyncio.sleep(0.02)
        for connection in list(self._state.connections):
            connection.transport.abort()

    def _opened(self, task: asyncio.Task[Any]) -> None:
        self._opening.discard(task)
        if not task.cancelled():
            task.exception()  # the client has left already

    def _new_connection(self) -> Connection:
        patience = Patience(self._limits.seconds, self._limits.body_bytes)
        made = Connection(self._config, self._state, {}, patience=patience, closed=lambda: None)
        made.last = True
        return made

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        """Read the body, because clients that are still sending it would not see the answer."""
        num_bytes, message = 0, {"more_body": True}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._limits.seconds):
                while message.get("more_body") and num_bytes <= self._limits.body_bytes:
                    message = await receive()
                    num_bytes += len(message.get("body", b""))
        status, value = 503, {"error": {"status": 503, "message": "the service is starting"}}
        if scope["path"] == "/health":
            status, value = 200, {"status": "ok"}  # type: ignore[dict-item]
        content = json.dumps(value).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(content)),
        ]
        if status == 503:
            headers.append((b"retry-after", b"%d" % _RETRY_AFTER_S))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})


@contextlib.contextmanager
def refusing(listener: socket.socket, limits: Limits) -> Iterator[None]:
    """Answer 503 from another thread during a `with` block; `listener` stays open after it."""
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()
    thread = threading.Thread(
        target=loop.run_until_complete, args=(_refuse(listener, limits, stop),), daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


async def _refuse(listener: socket.socket, limits: Limits, stop: asyncio.Event) -> None:
    loop, refuser = asyncio.get_running_loop(), Refuser(limits)

    def accept() -> None:
        try:
            refuser.take(listener.accept()[0])
        except OSError as error:  # the client has left, or there is no room
            if error.errno in NO_ROOM:
                loop.remove_reader(listener)
                loop.call_later(PAUSE_S, listen)

    def listen() -> None:
        if not stop.is_set():
            loop.add_reader(listener, accept)

    listener.setblocking(False)
    listen()
    await stop.wait()
    loop.remove_reader(listener)
    await refuser.close()
