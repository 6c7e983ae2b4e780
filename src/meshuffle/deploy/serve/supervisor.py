"""The process that accepts connections and keeps the replicas running that answer them.

Each connection goes to the replica that has the fewest. (If replicas accepted from one socket
themselves, the kernel would decide which one wakes up, and one could get all connections.) A
connection is kept here until a replica confirms it, so that another can get it if the replica dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import signal
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess

from prometheus_client.multiprocess import mark_process_dead

from meshuffle.deploy.serve import replica as child
from meshuffle.deploy.serve.replica import GRACE_S, MESSAGE_BYTES, Recipe
from meshuffle.deploy.serve.starting import NO_ROOM, PAUSE_S, Refuser
from meshuffle.errors import RankFailed

_MAX_CONNECTIONS = 1000  # per replica; further ones wait in the kernel
_MAX_UNCONFIRMED = 100  # per replica; its channel has room for about 270 messages
_ACCEPTED_AT_ONCE = 64
_TRIES = 3  # after so many failed starts in a row the service gives up
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.5, 30.0  # until a replica that ended starts again
_HEALTHY_S = 60.0  # a replica that was ready for so long starts again after the first delay
_LAST_S = 3.0  # a replica that takes longer than its limits and this to end is killed


@dataclass(eq=False)
class _Replica:
    index: int
    process: BaseProcess
    channel: socket.socket
    is_up: bool = False
    is_ready: bool = False
    ready_at: float = 0.0
    num_open: int = 0
    sent: deque[socket.socket] = field(default_factory=deque)  # not confirmed yet


class Supervisor:
    """Runs a service on a listening socket.

    Args:
        say: called with a line about each event.
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
        self._delays: dict[int, float] = {}  # seconds before the latest restart, by index
        self._listening = self._reported_ready = self._said_no_room = False
        self._pause: asyncio.TimerHandle | None = None  # accepts nothing until then
        self._stop, self._changed = asyncio.Event(), asyncio.Event()
        self._num_failed = 0
        self._failure: RankFailed | None = None

    async def run(self) -> None:
        """Serve until SIGINT or SIGTERM; then answer the accepted connections.

        Raises:
            RankFailed: replicas fail at their start.
        """
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            self._loop.add_signal_handler(number, self._request_stop)
        self._listener.setblocking(False)
        child.allow_handles()  # for connections that no replica has confirmed yet
        self._refuser = Refuser(self._recipe.limits)
        try:
            for index in range(self._num_replicas):
                self._start(index)
            self._update_listening()
            await self._stop.wait()
            await self._drain()
        finally:
            for one in self._replicas.values():
                one.process.kill()
                one.process.join()
        if self._failure:
            raise self._failure

    def _start(self, index: int) -> None:
        if self._stop.is_set():
            return
        own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        process = self._new_process(index, other)
        other.close()
        own.setblocking(False)
        one = self._replicas[index] = _Replica(index, process, own)
        self._loop.add_reader(own, self._take_message, one)
        self._loop.add_reader(process.sentinel, self._replace_ended, one)

    def _new_process(self, index: int, channel: socket.socket) -> BaseProcess:
        context = multiprocessing.get_context("forkserver")
        process = context.Process(
            target=child.main, args=(self._recipe, index, channel), name=f"replica {index + 1}"
        )
        process.start()
        return process

    def _take_message(self, one: _Replica) -> bool:
        """Take the next message of a replica; return whether there may be more."""
        try:
            word, *numbers = one.channel.recv(MESSAGE_BYTES).split(b" ")
        except BlockingIOError:
            return False
        except OSError:
            word, numbers = b"", []
        if word == child.UP:
            one.is_up = True
        elif word == child.READY:
            one.is_ready, one.ready_at, self._num_failed = True, self._loop.time(), 0
            self._report_ready()
        elif word == child.COUNT:
            num_taken, num_closed = map(int, numbers)
            one.num_open -= num_closed
            for _ in range(num_taken):
                one.sent.popleft().close()
            self._end_pause()
        elif not word:
            self._loop.remove_reader(one.channel)
            one.is_up = False
        self._update_listening()
        return bool(word)

    def _report_ready(self) -> None:
        are_ready = [one.is_ready for one in self._replicas.values()]
        if not self._reported_ready and all(are_ready) and len(are_ready) == self._num_replicas:
            self._reported_ready = True
            self._ready()

    def _replace_ended(self, one: _Replica) -> None:
        """Clean up after a replica that ended, and start another one unless the service stops."""
        del self._replicas[one.index]
        self._loop.remove_reader(one.process.sentinel)
        while self._take_message(one):  # what it confirmed is half read: no other may get it
            pass
        self._loop.remove_reader(one.channel)
        one.channel.close()
        one.process.join()
        mark_process_dead(one.process.pid, self._recipe.metrics)
        self._changed.set()
        for connection in one.sent:
            self._hand_on(connection)
        if self._stop.is_set():
            return
        code = one.process.exitcode or 0
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        self._num_failed += not one.is_ready
        if self._num_failed == _TRIES:
            self._failure = RankFailed(f"replicas fail at their start: the last one {how}")
            self._stop.set()
            return
        delay = self._next_delay(one)
        self._say(f"replica {one.index + 1} {how}; it starts again in {delay:g} s")
        self._loop.call_later(delay, self._start, one.index)
        self._update_listening()

    def _next_delay(self, one: _Replica) -> float:
        """Return the seconds until a replica starts again: longer if it keeps ending."""
        was_healthy = one.is_ready and self._loop.time() - one.ready_at >= _HEALTHY_S
        before = 0.0 if was_healthy else self._delays.get(one.index, 0.0)
        delay = min(max(_FIRST_DELAY_S, 2 * before), _LONGEST_DELAY_S)
        self._delays[one.index] = delay
        return delay

    def _update_listening(self) -> None:
        """Accept connections only while something can take one."""
        should = self._can_take() and not (self._stop.is_set() or self._pause)
        if should and not self._listening:
            self._loop.add_reader(self._listener, self._accept)
        elif self._listening and not should:
            self._loop.remove_reader(self._listener)
        self._listening = should

    def _can_take(self) -> bool:
        """Return whether a replica has room; without any replica, the refuser takes connections."""
        is_any_up = any(one.is_up for one in self._replicas.values())
        return self._least_busy() is not None or not is_any_up

    def _least_busy(self) -> _Replica | None:
        """Return the replica for the next connection, preferably one that is ready."""
        free = [
            one
            for one in self._replicas.values()
            if one.is_up and one.num_open < _MAX_CONNECTIONS and len(one.sent) < _MAX_UNCONFIRMED
        ]
        return min(free, key=lambda one: (not one.is_ready, one.num_open), default=None)

    def _accept(self) -> bool:
        """Hand on the waiting connections; return whether none is left."""
        for _ in range(_ACCEPTED_AT_ONCE):
            if not self._can_take():
                break
            try:
                connection, _ = self._listener.accept()
            except OSError as error:  # none is left, the client has left, or there is no room
                if error.errno in NO_ROOM:
                    self._begin_pause(error)
                return True
            self._hand_on(connection)
        self._update_listening()
        return False

    def _begin_pause(self, error: OSError) -> None:
        """Accept nothing until a connection closes or the pause is over; others wait meanwhile."""
        if not self._said_no_room:
            self._say(f"cannot accept more connections ({error.strerror}); raise ulimit -n")
        self._said_no_room = True
        self._end_pause()
        self._pause = self._loop.call_later(PAUSE_S, self._end_pause)
        self._update_listening()

    def _end_pause(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
            self._update_listening()

    def _hand_on(self, connection: socket.socket) -> None:
        """Give a connection to a replica, or answer 503 if no replica takes it."""
        while (one := self._least_busy()) is not None:
            try:
                socket.send_fds(one.channel, [child.CONNECTION], [connection.fileno()])
            except OSError:  # the replica is ending
                one.is_up = False
                continue
            one.num_open += 1
            one.sent.append(connection)
            return
        self._refuser.take(connection)

    def _request_stop(self) -> None:
        if self._stop.is_set():  # a second time
            for one in self._replicas.values():
                one.process.kill()
            return
        num_open = sum(one.num_open for one in self._replicas.values())
        self._say(f"stopping; {num_open} connections are open")
        self._stop.set()

    async def _drain(self) -> None:
        """Hand on the connections that the kernel has accepted, and let the replicas end."""
        self._update_listening()
        while self._least_busy() is not None and not self._accept():
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
        await self._refuser.close()
