"""A load generator for HTTP servers that take images: closed loop, keep-alive, cheap in CPU.

    python benchmarks/servers/load.py PORT --images FOLDER [--clients 64] [--seconds 10] [--rate R]

Each client sends a request, reads the whole answer, and sends the next one; with --rate all
together keep that many requests per second. Prints one line of JSON. A connection that the server
closes is opened again, and counted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import sys
import time
from collections import Counter
from pathlib import Path

WARMUP_S = 2.0
BOUNDARY = b"meshuffle-load"


class Client(asyncio.Protocol):
    """One connection that asks again and again."""

    def __init__(self, load: Load, number: int) -> None:
        self.load, self.number, self.count = load, number, 0
        self.answer = bytearray()
        self.needed = self.status = 0
        self.started = 0.0
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        self.ask()

    def ask(self) -> None:
        assert self.transport is not None
        requests = self.load.requests
        self.answer.clear()
        self.needed = 0
        self.started = time.perf_counter()
        self.transport.write(requests[(self.number * 7 + self.count) % len(requests)])
        self.count += 1

    def data_received(self, data: bytes) -> None:
        self.answer += data
        if not self.needed:
            end = self.answer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(self.answer[:end]).lower()
            self.status = int(head[9:12])
            place = head.find(b"content-length:")
            length = int(head[place + 15 :].split(b"\r\n", 1)[0]) if place >= 0 else 0
            self.needed = end + 4 + length
        if len(self.answer) >= self.needed:
            self.load.note(self.status, self.started, bytes(self.answer))
            self.load.next(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.load.over:
            self.load.counts["connections lost"] += 1
            self.load.spawn(self.number)


class Load:
    """All clients, and what they saw."""

    def __init__(self, port: int, requests: list[bytes], clients: int, rate: float) -> None:
        self.port, self.requests, self.clients, self.rate = port, requests, clients, rate
        self.counts: Counter[str] = Counter()
        self.latencies: list[float] = []
        self.begin = float("inf")
        self.over = False
        self.tasks: set[asyncio.Task[object]] = set()
        self.due = 0.0

    def note(self, status: int, started: float, answer: bytes) -> None:
        if time.perf_counter() >= self.begin and not self.over:
            self.counts[str(status)] += 1
            if status == 200:
                self.latencies.append(time.perf_counter() - started)
            elif self.counts[str(status)] == 1:
                print(answer[-300:], file=sys.stderr)

    def next(self, client: Client) -> None:
        if self.over:
            return
        if not self.rate:
            client.ask()
            return
        self.due = max(self.due + 1 / self.rate, time.perf_counter())
        asyncio.get_running_loop().call_later(self.due - time.perf_counter(), client.ask)

    def spawn(self, number: int) -> None:
        loop = asyncio.get_running_loop()
        task = loop.create_task(
            loop.create_connection(lambda: Client(self, number), "127.0.0.1", self.port)
        )
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def run(self, seconds: float) -> dict[str, object]:
        for number in range(self.clients):
            self.spawn(number)
        await asyncio.sleep(WARMUP_S)
        self.begin, before = time.perf_counter(), cpu_s()
        await asyncio.sleep(seconds)
        elapsed = time.perf_counter() - self.begin
        self.over = True
        ordered = sorted(self.latencies) or [float("nan")]
        return {
            "images_per_s": len(self.latencies) / elapsed,
            "p50_ms": 1000 * ordered[len(ordered) // 2],
            "p99_ms": 1000 * ordered[int(len(ordered) * 0.99)],
            "num": len(self.latencies),
            "others": {k: v for k, v in self.counts.items() if k != "200"},
            "cpu_share": (cpu_s() - before) / elapsed,
        }


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def request_of(image: bytes, field: str) -> bytes:
    """Return a whole request: multipart with one image, or the raw bytes where `field` is empty."""
    kind, body = b"image/jpeg", image
    if field:
        kind = b"multipart/form-data; boundary=" + BOUNDARY
        body = (
            b"--%s\r\nContent-Disposition: form-data; name=%s; filename=a.jpg\r\n"
            b"Content-Type: image/jpeg\r\n\r\n%s\r\n--%s--\r\n"
            % (BOUNDARY, field.encode(), image, BOUNDARY)
        )
    return (
        b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: %s\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (kind, len(body), body)
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--field", default="")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rate", type=float, default=0)
    options = parser.parse_args()
    images = [path.read_bytes() for path in sorted(options.images.iterdir())]
    requests = [request_of(image, options.field) for image in images]
    load = Load(options.port, requests, options.clients, options.rate)
    import uvloop

    print(json.dumps(uvloop.run(load.run(options.seconds))))


if __name__ == "__main__":
    main()
