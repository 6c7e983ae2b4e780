"""Tiny models of each task, and ways to ask a service: in this process, or a real one."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from meshuffle.data import Preprocess, decode_image
from meshuffle.deploy.formats.base import Run
from meshuffle.deploy.serve.app import About, build_app
from meshuffle.deploy.serve.backends import Backend
from meshuffle.deploy.serve.engine import Engine
from meshuffle.deploy.serve.limits import Limits
from meshuffle.deploy.serve.metrics import Metrics
from meshuffle.deploy.serve.service import Service
from meshuffle.tasks import make_task
from meshuffle.tasks.card import Card
from meshuffle.weights import open_weights, save_weights

KNOBS = {"width": 0.25, "depths": [1, 1, 1], "head_channels": 32}
MODEL = "shufflenet_v2_x0_5"
CLASSES = ("ant", "bee", "wasp", "蟻", "\udcff", "fly")
SETTINGS = {"detect": {"head": "ssdlite"}, "segment": {"head": "lraspp"}}
SETTINGS["regress"] = {"mean": [3.0] * 6, "std": [2.0] * 6}  # type: ignore[dict-item]
LIVELY = 20.0  # factor on the last weights: random ones would say next to nothing
LAST = {"detect": ("class_heads",), "segment": ("classifier",)}
LAST |= dict.fromkeys(("classify", "multilabel", "regress"), ("fc",))


def make_weights(path: Path, task: str = "classify", size: int = 64) -> Path:
    """Write random weights that have opinions."""
    fit = "stretch" if task in SETTINGS and task != "regress" else "crop"
    preprocess = Preprocess(crop=size, resize=None if fit == "stretch" else size, fit=fit)
    card = Card(
        MODEL, CLASSES, preprocess, task=task, settings=SETTINGS.get(task, {}), knobs=dict(KNOBS)
    )
    network = make_task(card).network(seed=0).train()
    views = [preprocess.to_uint8(decode_image(content)) for content in photos().values()]
    with torch.no_grad():
        for _ in range(20):  # batch norms see what is real; by default a signal dies out
            network(preprocess.normalise(torch.stack(views)))
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1 and name.startswith(LAST[task]):
                parameter *= LIVELY
    save_weights(path, network.state_dict(), card)
    return path


def photos() -> dict[str, bytes]:
    """Return two real photos, and small pictures in every format."""
    china, flower = (Image.fromarray(pixels) for pixels in load_sample_images().images)
    small = flower.resize((90, 60))
    return {
        "china.jpg": encoded(china, "JPEG"),
        "flower.png": encoded(flower.resize((200, 130)), "PNG"),
        "small.webp": encoded(small, "WEBP"),
        "small.bmp": encoded(small, "BMP"),
        "small.gif": encoded(small, "GIF"),
        "grey.png": encoded(small.convert("L"), "PNG"),
    }


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def red(width: int = 40, height: int = 30) -> bytes:
    return encoded(Image.new("RGB", (width, height), "red"), "PNG")


def many_scans(num: int) -> bytes:
    """Return a progressive JPEG with a scan repeated, which costs time and hardly any bytes."""
    content = encoded(Image.new("RGB", (64, 64), "red"), "JPEG", progressive=True)
    begin = content.rindex(b"\xff\xda")
    return content[:-2] + content[begin:-2] * num + content[-2:]


@contextlib.asynccontextmanager
async def service_of(
    weights: Path,
    *,
    limits: Limits = Limits(),  # noqa: B008
    token: str | None = None,
    run: Run | None = None,
    begin: bool = True,
    **options: Any,
) -> AsyncIterator[tuple[httpx.AsyncClient, Service]]:
    """Yield a client of a service in this process; `run` replaces the network."""
    card = open_weights(weights).card
    settings = {"max_requests": limits.requests, "readers": 2, "max_batch": 4, "window_s": 0.002}
    service = Service(limits, Metrics(), **{**settings, **options})
    run = run or Backend("torch", str(weights)).open(1)
    engine = Engine(card, run, max_batch=4, max_pixels=limits.pixels)
    if begin:
        service.begin(engine)
    app = build_app(service, About(card), token)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client, service
    await service.end()


def with_service(
    weights: Path,
    work: Callable[[httpx.AsyncClient, Service], Coroutine[Any, Any, None]],
    **options: Any,
) -> None:
    """Run `work` with a client of a service in this process."""

    async def run() -> None:
        async with service_of(weights, **options) as (client, service):
            await work(client, service)

    asyncio.run(run())


def error_of(answer: httpx.Response, status: int) -> str:
    """Return the message of an error, whose form is the one that all have."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    value = answer.json()
    assert value.keys() == {"error"} and value["error"].keys() == {"status", "message"}
    assert value["error"]["status"] == status
    message: str = value["error"]["message"]
    assert "\n" not in message and "Traceback" not in message
    return message


class Served:
    """A service in processes of its own."""

    def __init__(self, process: subprocess.Popen[str], told: dict[str, Any]) -> None:
        self.process, self.told = process, told
        self.url: str = told["url"]
        self.port = int(self.url.rpartition(":")[2])

    def replicas(self) -> list[int]:
        """Return the replicas' process ids: the children of our child, the fork server."""
        return self.descendants(2)

    def ranks(self) -> list[int]:
        """Return the process ids of ranks but the first: of each replica's fork server."""
        return self.descendants(4)

    def descendants(self, generation: int) -> list[int]:
        """Return the process ids of children (1), grandchildren (2), …"""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            pid = int(entry.name)
            with contextlib.suppress(OSError):
                for _ in range(generation):
                    pid = parent_of(pid)
                if pid == self.process.pid:
                    found.append(int(entry.name))
        return sorted(found)

    def stop(self) -> tuple[int, str]:
        """Send SIGTERM, unless it has ended; returns the exit code and what was said."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        _, err = self.process.communicate(timeout=60)
        return self.process.returncode, err


def parent_of(pid: int) -> int:
    stat = Path(f"/proc/{pid}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[1])


def rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def served(weights: Path, *arguments: str) -> Iterator[Served]:
    """Yield a real service on a free port, once it is ready; torch on one thread, not measured."""
    command = [sys.executable, "-m", "meshuffle", "serve", str(weights), "--port", "0", "--json"]
    command += ["--backend", "torch", "--batch", "4", "--threads", "1", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert line, process.stderr.read()
        yield Served(process, json.loads(line))
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until `condition` holds."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < seconds, "it never came to be"
        time.sleep(0.05)


def noise(num_bytes: int, seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(num_bytes)
