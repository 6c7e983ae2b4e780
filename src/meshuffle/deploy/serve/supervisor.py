"""The process that accepts connections, and keeps the replicas that answer them.

Each connection goes to the replica that has the fewest. (Replicas that accept from one socket
themselves share the load as the kernel happens to wake them: one may have all connections.) Until
a replica says that it has taken one, it is kept here, for another where the replica dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess

from prometheus_client.multiprocess import mark_process_dead

from meshuffle.deploy.serve import replica as child
from meshuffle.deploy.serve.replica import GRACE_S, MESSAGE_BYTES, Recipe
from meshuffle.errors import RankFailed

_MAX_CONNECTIONS = 1000  # of a replica; further ones wait in the kernel
_ACCEPTED_AT_ONCE = 64
_TRIES = 3  # starts in a row that fail, before the service gives up
_LAST_S = 3.0  # that a replica gets beyond its limits to end, before it is killed


@dataclass(eq=False)
class _Replica:
    index: int
    process: BaseProcess
    channel: socket.socket
    is_up: bool = False
    is_ready: bool = False
    num_open: int = 0
    sent: deque[socket.socket] = field(default_factory=deque)  # and not taken yet
    started: float = field(default_factory=time.monotonic)


class Supervisor:
    """Runs a service on a listening socket.

    Args:
        say: called with a line about what happens.
        ready: called once, when all replicas take requests.
    """

    def __init__(
        self,
        listener: socket.socket,
        recipe: Recipe,
        num_replicas: int,
        *,
        say: Callable[[str], None],
        ready: Callable[[], None],
    ) -> None:
        self._listener, self._recipe, self._num_replicas = listener, recipe, num_replicas
        self._say, self._ready = say, ready
        self._replicas: dict[int, _Replica] = {}
        self._listening = self._told_ready = False
        self._stop, self._changed = asyncio.Event(), asyncio.Event()
        self._num_failed = 0
        self._failure: RankFailed | None = None

    async def run(self) -> None:
        """Serve until SIGINT or SIGTERM; then what was accepted is answered.

        Raises:
            RankFailed: replicas end as they start.
        """
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            self._loop.add_signal_handler(number, self._asked_to_stop)
        self._listener.setblocking(False)
        child.allow_handles()  # of its own, connections that no replica has taken yet
        try:
            for index in range(self._num_replicas):
                self._start(index)
            await self._stop.wait()
            await self._drain()
        finally:
            for one in self._replicas.values():
                one.process.kill()
                one.process.join()
        if self._failure:
            raise self._failure

    def _start(self, index: int) -> None:
        context = multiprocessing.get_context("forkserver")
        own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        process = context.Process(
            target=child.main, args=(self._recipe, index, other), name=f"replica {index + 1}"
        )
        process.start()
        other.close()
        own.setblocking(False)
        one = self._replicas[index] = _Replica(index, process, own)
        self._loop.add_reader(own, self._hear, one)
        self._loop.add_reader(process.sentinel, self._gone, one)

    def _hear(self, one: _Replica) -> None:
        """Take the next message of a replica."""
        try:
            word, *numbers = one.channel.recv(MESSAGE_BYTES).split(b" ")
        except BlockingIOError:
            return
        except OSError:
            word, numbers = b"", []
        if word == child.UP:
            one.is_up = True
        elif word == child.READY:
            one.is_ready, self._num_failed = True, 0
            self._tell_ready()
        elif word == child.COUNT:
            num_taken, num_closed = map(int, numbers)
            one.num_open -= num_closed
            for _ in range(num_taken):
                one.sent.popleft().close()
        elif not word:
            self._loop.remove_reader(one.channel)
            one.is_up = False
        self._listen()

    def _tell_ready(self) -> None:
        are_ready = [one.is_ready for one in self._replicas.values()]
        if not self._told_ready and all(are_ready) and len(are_ready) == self._num_replicas:
            self._told_ready = True
            self._ready()

    def _gone(self, one: _Replica) -> None:
        """A replica has ended: clear up, and start another where it should not have."""
        self._loop.remove_reader(one.process.sentinel)
        self._loop.remove_reader(one.channel)
        one.channel.close()
        one.process.join()
        mark_process_dead(one.process.pid, self._recipe.metrics)
        del self._replicas[one.index]
        self._changed.set()
        for connection in one.sent:
            self._hand_on(connection)
        if self._stop.is_set():
            return
        code = one.process.exitcode or 0
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        self._num_failed += not one.is_ready
        if self._num_failed == _TRIES:
            self._failure = RankFailed(f"replicas end as they start: the last one {how}")
            self._stop.set()
            return
        self._say(f"replica {one.index + 1} {how}; another one takes its place")
        self._start(one.index)

    def _listen(self) -> None:
        """Accept while there is a replica to take a connection; else let them wait."""
        should = self._next() is not None and not self._stop.is_set()
        if should and not self._listening:
            self._loop.add_reader(self._listener, self._accept)
        elif self._listening and not should:
            self._loop.remove_reader(self._listener)
        self._listening = should

    def _next(self) -> _Replica | None:
        """Return the replica for the next connection: one that is ready, before others."""
        free = [
            one for one in self._replicas.values() if one.is_up and one.num_open < _MAX_CONNECTIONS
        ]
        return min(free, key=lambda one: (not one.is_ready, one.num_open), default=None)

    def _accept(self) -> bool:
        """Hand on what waits; returns whether all of it was taken."""
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                connection, _ = self._listener.accept()
            except OSError:  # none is left, it has gone, or there are no handles
                return True
            self._hand_on(connection)
        self._listen()
        return False

    def _hand_on(self, connection: socket.socket) -> None:
        """Give a connection to a replica; where none takes it, it is closed."""
        while (one := self._next()) is not None:
            try:
                socket.send_fds(one.channel, [child.CONNECTION], [connection.fileno()])
            except OSError:  # it is ending
                one.is_up = False
                continue
            one.num_open += 1
            one.sent.append(connection)
            return
        connection.close()

    def _asked_to_stop(self) -> None:
        if self._stop.is_set():  # a second time
            for one in self._replicas.values():
                one.process.kill()
            return
        num_open = sum(one.num_open for one in self._replicas.values())
        self._say(f"stopping; {num_open} connections are open")
        self._stop.set()

    async def _drain(self) -> None:
        """Hand on what the kernel has accepted, and let the replicas end."""
        self._listen()
        while self._next() is not None and not self._accept():
            pass
        self._listener.close()
        for one in self._replicas.values():
            with contextlib.suppress(OSError):
                one.channel.send(child.STOP)
        seconds = GRACE_S + self._recipe.limits.seconds + _LAST_S
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._replicas:
                    self._changed.clear()
                    await self._changed.wait()
