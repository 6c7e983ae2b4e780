"""One process of a service: it gets connections from the supervisor and answers their requests.

    supervisor ──`connection` with a socket, `stop`──▶ replica
               ◀──`up`, `ready`, `count TAKEN CLOSED`── (connections since the last report)

The fork server loads this file once for all replicas. Modules that read the environment are
imported later.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import formatdate
from typing import TYPE_CHECKING

import torch
from uvicorn.config import Config
from uvicorn.server import ServerState

from meshuffle.deploy.serve.backends import Backend
from meshuffle.deploy.serve.engine import Engine, View
from meshuffle.deploy.serve.limits import Limits
from meshuffle.deploy.serve.protocol import Connection, Patience
from meshuffle.errors import in_words
from meshuffle.tasks.card import Card

if TYPE_CHECKING:
    from meshuffle.deploy.serve.service import Service

CONNECTION, STOP = b"connection", b"stop"
UP, READY, COUNT = b"up", b"ready", b"count"
MESSAGE_BYTES = 64
METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
GRACE_S = 1.0
"""The seconds for which a connection without a request is kept when the service stops."""
_KEEP_ALIVE_S = 30


@dataclass(frozen=True)
class Recipe:
    """Everything that a replica is made from, as plain data.

    Attributes:
        card: card of the weights, as JSON.
        runs_on: description of the backend.
        threads: CPU threads of the backend.
        readers: number of threads that decode images.
        max_batch, window_s: see `Batcher`.
        max_requests: the most requests in progress in one replica.
        metrics: folder that the replicas share.
    """

    backend: Backend
    card: str
    runs_on: str
    threads: int
    readers: int
    max_batch: int
    window_s: float
    limits: Limits
    max_requests: int
    metrics: str
    token: str | None = None


def main(recipe: Recipe, index: int, channel: socket.socket) -> None:
    """Serve as replica number `index` until the supervisor says stop, or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the supervisor decides
    os.environ[METRICS_FOLDER] = recipe.metrics
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    allow_handles()
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(Replica(recipe, index, channel).run())
    except Exception as error:  # noqa: BLE001  # the supervisor acts on the exit code
        print(f"replica {index + 1}: {in_words(error)}", file=sys.stderr)  # noqa: T201
        sys.exit(1)


def allow_handles() -> None:
    """Let this process open as many files and sockets as the system allows."""
    with contextlib.suppress(ValueError, OSError):
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


class Replica:
    """The event loop's side of a replica."""

    def __init__(self, recipe: Recipe, index: int, channel: socket.socket) -> None:
        self._recipe, self._index, self._channel = recipe, index, channel
        self._stop = asyncio.Event()
        self._state = ServerState()
        self._num_taken = self._num_closed = 0
        self._unreported: list[socket.socket] = []
        self._opening: set[asyncio.Task[object]] = set()

    async def run(self) -> None:
        """Serve HTTP at once and predictions once the model is loaded; then end in order."""
        from meshuffle.deploy.serve.app import About, build_app

        card = Card.from_json(self._recipe.card)
        self._service = self._new_service()
        app = build_app(self._service, About(card, self._recipe.runs_on), self._recipe.token)
        self._config = http_config(app)
        self._loop = asyncio.get_running_loop()
        self._loop.add_signal_handler(signal.SIGTERM, self._stop.set)
        self._channel.setblocking(False)
        self._loop.add_reader(self._channel, self._take_message)
        self._channel.send(UP)
        clock = self._loop.create_task(self._tick())
        engine = await asyncio.to_thread(self._new_engine, card)
        self._service.begin(engine)
        self._channel.send(READY)
        await self._stop.wait()
        await self._drain()
        clock.cancel()
        await self._service.end()

    def _new_service(self) -> Service:
        from meshuffle.deploy.serve.metrics import Metrics
        from meshuffle.deploy.serve.service import Service

        recipe = self._recipe
        return Service(
            recipe.limits,
            Metrics(),
            max_requests=recipe.max_requests,
            readers=recipe.readers,
            max_batch=recipe.max_batch,
            window_s=recipe.window_s,
        )

    def _new_engine(self, card: Card) -> Engine:
        recipe = self._recipe
        engine = Engine(
            card,
            recipe.backend.open(recipe.threads, self._index),
            max_batch=recipe.max_batch,
            max_pixels=recipe.limits.pixels,
            takes_pixels=recipe.backend.takes_pixels,
        )
        blank = View(torch.zeros((3, *card.preprocess.size), dtype=torch.uint8), (1, 1))
        for num in {1, recipe.max_batch}:
            engine.answer([blank] * num)  # the first call plans and allocates
        return engine

    def _take_message(self) -> None:
        """Take the next message; an empty one means that the supervisor has ended."""
        try:
            message, handles, _, _ = socket.recv_fds(self._channel, MESSAGE_BYTES, 1)
        except BlockingIOError:
            return
        except OSError:
            message, handles = b"", []
        if message == CONNECTION and handles:
            self._num_taken += 1
            self._unreported.append(socket.socket(fileno=handles[0]))
            self._report_counts()
        elif message == CONNECTION:  # this process may open no more files
            self._num_taken += 1
            self._close()
        elif message in (b"", STOP):
            self._loop.remove_reader(self._channel)
            self._stop.set()

    def _open(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        made = self._loop.connect_accepted_socket(self._new_connection, connection)
        task = self._loop.create_task(made)
        self._opening.add(task)
        task.add_done_callback(self._opened)

    def _opened(self, task: asyncio.Task[object]) -> None:
        self._opening.discard(task)
        if task.exception() is not None:  # the client has left already
            self._close()

    def _new_connection(self) -> Connection:
        limits = self._recipe.limits
        connection = Connection(
            self._config,
            self._state,
            {},
            _loop=self._loop,
            patience=Patience(limits.seconds, limits.body_bytes),
            closed=self._close,
        )
        connection.last = self._stop.is_set()
        return connection

    def _close(self) -> None:
        self._num_closed += 1
        self._report_counts()

    def _report_counts(self) -> None:
        """Report, and only then read new connections: nobody else may get what is half read."""
        if self._num_taken or self._num_closed:
            with contextlib.suppress(OSError):  # it is reported later, or the supervisor has ended
                self._channel.send(b"%s %d %d" % (COUNT, self._num_taken, self._num_closed))
                self._num_taken = self._num_closed = 0
                while self._unreported:
                    self._open(self._unreported.pop(0))

    async def _tick(self) -> None:
        while True:
            self._state.default_headers = [(b"date", formatdate(usegmt=True).encode())]
            self._report_counts()
            await asyncio.sleep(1)

    async def _drain(self) -> None:
        """Answer the open requests; clients have `GRACE_S` to send one that they had begun."""
        self._service.state = "stopping"
        connections = self._state.connections
        for connection in connections:
            connection.last = True  # type: ignore[union-attr]
        began = self._loop.time()
        while connections or self._unreported or self._opening or self._state.tasks:
            waited = self._loop.time() - began
            for connection in list(connections):
                if waited > GRACE_S and connection.is_waiting:  # type: ignore[union-attr]
                    connection.transport.close()
            if waited > GRACE_S + self._recipe.limits.seconds:
                return
            await asyncio.sleep(0.02)


def http_config(app: object) -> Config:
    """Return uvicorn's configuration for an application."""
    config = Config(
        app,  # type: ignore[arg-type]
        interface="asgi3",
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
    )
    config.load()
    return config
