"""The supervisor, with replicas that these tests play: who gets a connection, what a death does."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Coroutine
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

import pytest

from meshuffle.deploy.serve import supervisor
from meshuffle.deploy.serve.backends import Backend
from meshuffle.deploy.serve.limits import Limits
from meshuffle.deploy.serve.replica import COUNT, MESSAGE_BYTES, READY, UP, Recipe
from meshuffle.deploy.serve.supervisor import Supervisor


class FakeReplica:
    """A replica's end of the channel, and its process."""

    pid = 1 << 22  # above what Linux gives
    exitcode: int | None = None

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel.dup()
        self._channel.settimeout(5)
        self.sentinel, self._life = os.pipe()
        for word in (UP, READY):
            self.send(word)

    def send(self, message: bytes) -> None:
        self._channel.send(message)

    def take(self) -> socket.socket:
        _, handles, _, _ = socket.recv_fds(self._channel, MESSAGE_BYTES, 1)
        return socket.socket(fileno=handles[0])

    def die(self) -> None:
        self.exitcode = -9
        self._channel.close()
        os.close(self._life)

    def kill(self) -> None:
        if self.exitcode is None:
            self.die()

    def join(self) -> None:
        os.close(self.sentinel)


class Played(Supervisor):
    """A supervisor whose replicas are fakes, the newest last."""

    fakes: list[FakeReplica]

    def _new_process(self, index: int, channel: socket.socket) -> BaseProcess:
        self.fakes.append(FakeReplica(channel))
        return cast(BaseProcess, self.fakes[-1])


def play(
    tmp_path: Path,
    scene: Callable[[Played, Callable[[], socket.socket]], Coroutine[Any, Any, None]],
    *,
    replicas: int = 2,
    listener: type[socket.socket] = socket.socket,
) -> list[str]:
    """Run `scene` with a supervisor and a function that connects; return what was said."""
    said: list[str] = []
    clients: list[socket.socket] = []

    async def run() -> None:
        with listener() as bound:
            bound.bind(("127.0.0.1", 0))
            bound.listen(1024)
            address = bound.getsockname()
            ready = asyncio.Event()
            backend = Backend("torch", "none")
            recipe = Recipe(backend, "{}", "", 1, 2, 1, 0.0, Limits(), 1, str(tmp_path))
            played = Played(bound, recipe, replicas, say=said.append, ready=ready.set)
            played.fakes = []

            def connect() -> socket.socket:
                client = socket.create_connection(address, timeout=10)
                client.setblocking(False)
                clients.append(client)
                return client

            served = asyncio.create_task(played.run())
            await asyncio.wait_for(ready.wait(), 10)
            try:
                await scene(played, connect)
            finally:
                played._request_stop()
                for fake in played.fakes:
                    fake.kill()
                await asyncio.wait_for(served, 10)

    try:
        asyncio.run(run())
    finally:
        for client in clients:
            client.close()
    return said


async def reads(client: socket.socket) -> bytes:
    return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(client, 100), 10)


def test_a_death_closes_what_was_taken_and_hands_on_the_rest(tmp_path: Path) -> None:
    """The supervisor has not read the counts yet; another replica would get half a request."""

    async def scene(played: Played, connect: Callable[[], socket.socket]) -> None:
        first, second = played.fakes
        clients = [connect() for _ in range(6)]
        await asyncio.sleep(0.2)
        taken = [first.take() for _ in range(2)]  # of three
        for connection in taken:
            first.send(b"%s 1 0" % COUNT)
            connection.close()
        for connection in (second.take() for _ in range(3)):
            second.send(b"%s 1 1" % COUNT)
            connection.close()
        first.die()
        await asyncio.sleep(0.2)
        heir = second.take()
        heir.send(b"answer")
        heir.close()
        second.send(b"%s 1 1" % COUNT)
        assert sorted([await reads(client) for client in clients]) == [b""] * 5 + [b"answer"]

    play(tmp_path, scene)


def test_a_replica_that_reads_no_messages_gets_no_more_connections(tmp_path: Path) -> None:
    """A full channel must not count as the end of a replica: it would never get another one."""

    async def scene(played: Played, connect: Callable[[], socket.socket]) -> None:
        (only,) = played.fakes
        for _ in range(400):
            connect()
            await asyncio.sleep(0)
        await asyncio.sleep(0.2)
        for _ in range(400):
            only.take().close()
            only.send(b"%s 1 1" % COUNT)
            await asyncio.sleep(0)

    play(tmp_path, scene, replicas=1)


class Full(socket.socket):
    """A listening socket of a process that may open no more files."""

    num_asked = 0

    def accept(self) -> Any:
        Full.num_asked += 1
        raise OSError(24, "Too many open files")


def test_without_handles_it_waits_before_it_accepts_again(tmp_path: Path) -> None:
    async def scene(played: Played, connect: Callable[[], socket.socket]) -> None:
        connect()
        await asyncio.sleep(0.3)
        assert Full.num_asked == 1
        played.fakes[0].send(b"%s 0 1" % COUNT)  # a connection has closed
        await asyncio.sleep(0.1)
        assert Full.num_asked == 2
        await asyncio.sleep(1)
        assert 3 <= Full.num_asked <= 4  # it tries again by itself

    said = play(tmp_path, scene, listener=Full)
    assert sum("open files" in line for line in said) == 1


def test_a_replica_that_dies_again_and_again_waits_longer_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "_FIRST_DELAY_S", 0.1)
    monkeypatch.setattr(supervisor, "_LONGEST_DELAY_S", 0.3)

    async def die(played: Played) -> None:
        played.fakes[-1].die()
        num = len(played.fakes)
        while len(played.fakes) == num:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)  # it is ready

    async def scene(played: Played, connect: Callable[[], socket.socket]) -> None:
        for _ in range(4):
            await asyncio.wait_for(die(played), 5)
        monkeypatch.setattr(supervisor, "_HEALTHY_S", 0.0)
        await asyncio.wait_for(die(played), 5)

    *said, _ = play(tmp_path, scene, replicas=1)
    how = "replica 1 was killed by signal 9; it starts again in"
    assert said == [f"{how} {delay} s" for delay in (0.1, 0.2, 0.3, 0.3, 0.1)]


def test_without_any_replica_requests_get_503_at_once(tmp_path: Path) -> None:
    async def scene(played: Played, connect: Callable[[], socket.socket]) -> None:
        clients = [connect()]
        await asyncio.sleep(0.1)
        played.fakes[0].die()  # it has not taken the first one
        await asyncio.sleep(0.1)
        for client in (*clients, connect()):
            client.sendall(b"GET /ready HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await reads(client)).startswith(b"HTTP/1.1 503 ")

    play(tmp_path, scene, replicas=1)
