"""The service under load, against what decoding and inference alone reach, and against others.

    python benchmarks/serve_load.py [--seconds 60] [--clients 64] [--only limit,fastapi,litserve]

All take the same 500×375 JPEGs (generated; --images FOLDER for others) over loopback from the same
load generator, a process of its own, with `--clients` connections that each ask again as soon as
they are answered; the network is ShuffleNet V2 1× at 224×224 with random weights everywhere.

    ours      `meshuffle serve` with what it chooses by itself; multipart, as the others get it
    ours raw  the same, the images as bare bodies
    again     ours again, behind the limit: machines drift
    limit     processes which decode and preprocess those JPEGs in threads, as many as a replica of
              ours has, and compute them with the same backend and batch in another one, and do
              nothing else: as many as ours has replicas, or one per core, whichever is faster.
              Beside them the same load generator asks a server that answers at once, at the rate
              that ours reached: so it takes the CPU from them that it took from ours
    fastapi   torchvision + FastAPI as in the tutorials (benchmarks/servers/fastapi_plain.py)
    litserve  LitServe's plain example, and with a worker per core and batches of 8

The figures to watch: ours / limit ≥ 0.7, no errors, p99 ≤ 4 × p50, ours above fastapi and litserve.
Prints a table and appends to results/serve.csv.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import multiprocessing
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rows import append

SERVERS = Path(__file__).parent / "servers"
MODEL, SIZE, CLASSES = "shufflenet_v2_x1_0", 224, 1000
NUM_IMAGES = 32
START_S = 180


def make_images(folder: Path) -> None:
    """Write JPEGs of 500×375 pixels and about 60 kB: clouds at several scales, and edges."""
    rng = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        pixels = np.zeros((375, 500, 3))
        for cells, weight in ((4, 110), (16, 50), (64, 28), (250, 22)):
            noise = rng.random((cells, cells, 3)) * 255
            cloud = Image.fromarray(noise.astype(np.uint8)).resize((500, 375))
            pixels += np.asarray(cloud, float) * weight / 210
        x, y, side = rng.integers(20, 300), rng.integers(20, 200), rng.integers(40, 150)
        pixels[y : y + side, x : x + side] = rng.random(3) * 255
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.save(folder / f"{number:02d}.jpg", quality=90)


def make_weights(path: Path) -> None:
    from meshuffle.data import Preprocess
    from meshuffle.models import create_model
    from meshuffle.tasks.card import Card
    from meshuffle.weights import save_weights

    network = create_model(MODEL, num_classes=CLASSES, seed=0)
    card = Card(MODEL, tuple(map(str, range(CLASSES))), Preprocess.imagenet(SIZE))
    save_weights(path, network.state_dict(), card)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def wait_for(port: int, process: subprocess.Popen[Any]) -> None:
    """Return once something answers HTTP at `port`."""
    begin = time.monotonic()
    while time.monotonic() - begin < START_S:
        if process.poll() is not None:
            raise SystemExit(f"{process.args} ended with {process.returncode}")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.2)
    raise SystemExit(f"{process.args} did not start")


@contextmanager
def running(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def load(port: int, images: Path, options: argparse.Namespace, **more: object) -> dict[str, Any]:
    """Run the load generator; returns what it prints."""
    command = [sys.executable, str(SERVERS / "load.py"), str(port), "--images", str(images)]
    command += ["--clients", str(options.clients), "--seconds", str(options.seconds)]
    command += [str(part) for name, value in more.items() for part in (f"--{name}", value)]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(found.stdout))


def ours(weights: Path, images: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "meshuffle", "serve", str(weights), "--port", "0", "--json"]
    with running(command + options.serve.split()) as process:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        print(json.dumps(told), file=sys.stderr)
        port = int(told["url"].rpartition(":")[2])

        def asked(name: str, field: str = "image") -> dict[str, Any]:
            runs = f"{told['backend']} {layout_of(told)}"
            return {"server": name, "runs": runs, **load(port, images, options, field=field)}

        rows = [asked("ours")]
        if "limit" in options.only:  # the service has nothing to do meanwhile
            rows += [limit_beside(weights, images, told, rows[0], options), asked("ours again")]
        return [*rows, asked("ours raw", "")]


def limit_beside(
    weights: Path,
    images: Path,
    told: dict[str, Any],
    ours: dict[str, Any],
    options: argparse.Namespace,
) -> dict[str, Any]:
    short = argparse.Namespace(**{**vars(options), "seconds": min(10, options.seconds)})
    layouts = [told, {**told, "replicas": len(os.sched_getaffinity(0)), "threads": 1}]
    fastest = max(layouts, key=lambda one: limit(weights, images, one, 0.0, short))
    speed = limit(weights, images, fastest, ours["images_per_s"], options)
    return {"server": "limit", "images_per_s": speed, "runs": layout_of(fastest)}


def work(ends: Any, weights: Path, files: list[bytes], told: dict[str, Any], index: int) -> None:
    """Decode in threads and compute until the time is over, as a replica does, without HTTP."""
    from meshuffle.deploy.serve.backends import prepare
    from meshuffle.deploy.serve.engine import Engine
    from meshuffle.deploy.serve.upload import Upload
    from meshuffle.weights import open_weights

    backend = prepare(told["backend"].split()[0], weights, None, weights.parent, print)
    run = backend.open(told["threads"], index)
    batch = told["batch"]
    engine = Engine(open_weights(weights).card, run, max_batch=batch, max_pixels=25_000_000)
    uploads = [Upload("", content) for content in files]
    engine.answer([engine.read(upload) for upload in uploads[:batch]])
    ends.send(None)
    seconds = ends.recv()
    with ThreadPoolExecutor(max(2, len(os.sched_getaffinity(0)) // told["replicas"])) as pool:
        coming = deque(pool.submit(engine.read, upload) for upload in uploads)
        begin, num = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - begin) < seconds:
            engine.answer([coming.popleft().result() for _ in range(batch)])
            num += batch
            while len(coming) < len(uploads):
                coming.append(pool.submit(engine.read, uploads[(num + len(coming)) % len(uploads)]))
    ends.send(num / elapsed)


def limit(
    weights: Path, images: Path, told: dict[str, Any], rate: float, options: argparse.Namespace
) -> float:
    """Return images per second of decoding and inference; `rate`: of the load beside it, or 0."""
    files = [path.read_bytes() for path in sorted(images.iterdir())]
    context = multiprocessing.get_context("spawn")
    ends, workers = [], []
    for index in range(told["replicas"]):
        own, other = context.Pipe()
        worker = context.Process(target=work, args=(other, weights, files, told, index))
        worker.start()
        ends.append(own)
        workers.append(worker)
    for end in ends:
        end.recv()
    port = free_port()
    noop = subprocess.Popen([sys.executable, str(SERVERS / "noop.py"), str(port)])
    try:
        beside = None
        if rate:
            time.sleep(1)
            command = [sys.executable, str(SERVERS / "load.py"), str(port)]
            command += ["--images", str(images), "--clients", str(options.clients)]
            command += ["--seconds", str(options.seconds), "--rate", str(rate), "--field", "image"]
            beside = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            time.sleep(2)  # its warm-up
        for end in ends:
            end.send(options.seconds)
        found = sum(end.recv() for end in ends)
        if beside:
            print("load beside the limit:", beside.communicate()[0].strip(), file=sys.stderr)
    finally:
        noop.kill()
        noop.wait()
        for worker in workers:
            worker.join()
    return float(found)


def other(name: str, arguments: list[str], images: Path, options: argparse.Namespace) -> Any:
    port = free_port()
    script = SERVERS / f"{name.split()[0]}_plain.py"
    with running([sys.executable, str(script), str(port), *arguments]) as process:
        wait_for(port, process)
        return {"server": name, **load(port, images, options, field="image")}


def measure(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    images = options.images or folder / "images"
    if not options.images:
        images.mkdir()
        make_images(images)
    weights = folder / "weights.safetensors"
    make_weights(weights)
    rows = ours(weights, images, options)
    if "fastapi" in options.only:
        rows.append(other("fastapi", [], images, options))
    if "litserve" in options.only:
        if importlib.util.find_spec("litserve") is None:
            print("without litserve: pip install litserve", file=sys.stderr)
        else:
            rows.append(other("litserve", [], images, options))
            cores = str(len(os.sched_getaffinity(0)))
            rows.append(other("litserve batched", [cores, "8"], images, options))
    return rows


def layout_of(told: dict[str, Any]) -> str:
    return f"{told['replicas']}x{told['threads']} batch {told['batch']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--images", type=Path, help="a folder of JPEGs instead of generated ones")
    parser.add_argument("--serve", default="", help="further options of `meshuffle serve`")
    parser.add_argument("--only", default="limit,fastapi,litserve", help="besides ours")
    parser.add_argument("--dry", action="store_true", help="append nothing to results/")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and so end what was started
    with tempfile.TemporaryDirectory() as name:
        rows = measure(options, Path(name))
    top = next((r["images_per_s"] for r in rows if r["server"] == "limit"), float("nan"))
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M")
    table = []
    for row in rows:
        table.append(
            {
                "date": now,
                "host": f"{platform.machine()} x {len(os.sched_getaffinity(0))}",
                "server": row["server"],
                "runs": row.get("runs", ""),
                "clients": options.clients,
                "seconds": options.seconds,
                "images_per_s": round(row["images_per_s"], 1),
                "of_limit": round(row["images_per_s"] / top, 3),
                "p50_ms": round(row.get("p50_ms", float("nan")), 1),
                "p99_ms": round(row.get("p99_ms", float("nan")), 1),
                "others": json.dumps(row.get("others", {})),
                "load_cpu": round(row.get("cpu_share", float("nan")), 2),
            }
        )
    for line in table:
        print(
            f"{line['server']:17} {line['images_per_s']:8.1f} images/s  {line['of_limit']:6.1%} "
            f"of the limit  p50 {line['p50_ms']:7.1f} ms  p99 {line['p99_ms']:7.1f} ms  "
            f"other answers {line['others']}  load generator {line['load_cpu']:.0%} of a core"
        )
    if not options.dry:
        append("serve", table)


if __name__ == "__main__":
    main()
