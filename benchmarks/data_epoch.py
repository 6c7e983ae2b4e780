"""One epoch over many JPEG files: does memory stay, and does training wait for its data?

    python benchmarks/data_epoch.py [--images 100000] [--model shufflenet_v2_x1_0] [--size 224]

Makes the images (256×256, ten classes, about 12 kB each) in a temporary folder, trains one epoch
on them by `meshuffle train`, and samples the memory of all its processes. Prints and appends to
results/data_epoch.csv: memory in the last tenth of the epoch over that in the first, and the share
of the time that training waited for data. Aims: 1.05 and 0.05.
"""

from __future__ import annotations

import argparse
import csv
import io
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from memory import descendants, memory_of
from rows import append

_CLASSES, _EVERY_S = 10, 2.0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--model", default="shufflenet_v2_x1_0")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--plan", default="dp=1")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        make_images(home / "photos", asked.images)
        run = home / "run"
        samples = train(home / "photos", run, asked)
        with (run / "metrics.csv").open(newline="") as file:
            epoch = next(csv.DictReader(file))
    tenth = max(1, len(samples) // 10)
    first, last = middle(samples[:tenth]), middle(samples[-tenth:])
    print("MB by process, in ten parts of the epoch:")
    for i in range(10):
        print(" ", [round(size / 1e6) for size in middle(samples[i * tenth :][:tenth])])
    row = {
        "images": asked.images, "model": asked.model, "size": asked.size, "plan": asked.plan,
        "images_per_s": epoch["images_per_s"], "data_wait": epoch["data_wait"],
        "first_tenth_mb": round(sum(first) / 1e6), "last_tenth_mb": round(sum(last) / 1e6),
        "ratio": round(sum(last) / sum(first), 4),
        "seconds": epoch["seconds"], "torch": torch.__version__,
    }  # fmt: skip
    print(row)
    append("data_epoch", [row])
    return 0


def middle(samples: list[list[int]]) -> list[float]:
    """Return the median of each process, the main one first."""
    return [statistics.median(column) for column in zip_longest(*samples, fillvalue=0)]


def make_images(root: Path, num: int) -> None:
    """Write `num` JPEGs to train/ and a few to val/, of ten classes that colours tell apart."""
    for split in ("train", "val"):
        for label in range(_CLASSES):
            (root / split / str(label)).mkdir(parents=True)

    def write(i: int) -> None:
        rng = np.random.default_rng(i)
        label = i % _CLASSES
        small = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        small[..., label % 3] = small[..., label % 3] // 2 + 12 * label
        file = io.BytesIO()
        Image.fromarray(small).resize((256, 256), Image.Resampling.BICUBIC).save(file, "JPEG")
        split = "train" if i < num else "val"
        (root / split / str(label) / f"{i}.jpg").write_bytes(file.getvalue())

    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(write, range(num + 200), chunksize=500):
            pass


def train(data: Path, run: Path, asked: argparse.Namespace) -> list[list[int]]:
    """Train one epoch; returns the bytes of each process, every two seconds of the steps."""
    command = [
        sys.executable, "-m", "meshuffle", "train", str(data), "--model", asked.model,
        "--epochs", "1", "--input-size", str(asked.size), "--plan", asked.plan,
        "--compile", "off", "--out", str(run),
    ]  # fmt: skip
    process = subprocess.Popen(command)
    samples: list[list[int]] = []
    done = threading.Event()

    def watch() -> None:
        log = run / "log.jsonl"
        while not done.wait(_EVERY_S):
            if log.exists() and '"kind": "step"' in log.read_text().rstrip().rpartition("\n")[2]:
                samples.append([memory_of(pid) for pid in (process.pid, *descendants(process.pid))])

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    done.set()
    watcher.join()
    if code:
        raise RuntimeError(f"train ended with {code}")
    return samples


if __name__ == "__main__":
    began = time.perf_counter()
    code = main()
    print(f"{time.perf_counter() - began:.0f} s")
    raise SystemExit(code)
