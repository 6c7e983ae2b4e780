"""An HTTP server that reads requests and answers at once: what a load generator costs alone.

python benchmarks/servers/noop.py PORT
"""

from __future__ import annotations

import asyncio
import sys

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


class Noop(asyncio.Protocol):
    def __init__(self) -> None:
        self.missing = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if not self.missing:
            end = data.index(b"\r\n\r\n")
            length = data[:end].lower().split(b"content-length:")[1].split(b"\r\n")[0]
            self.missing = int(length) + end + 4
        self.missing -= len(data)
        if not self.missing:
            self.transport.write(ANSWER)


async def main(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Noop, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    import uvloop

    uvloop.run(main(int(sys.argv[1])))
