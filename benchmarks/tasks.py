"""Each task on real data against a plain PyTorch script: the same module, weights, epochs, split.

    python benchmarks/tasks.py [--sets NAME…] [--seeds 0 1 2] [--shared ../shared/data]

Prints a table and appends to results/tasks.csv: the first metric of the task on the test split,
ours with default settings and `benchmarks/plain.py`. The test splits are fixed here, validation
is a fifth of the training images by Meshuffle's own rule, the same for both. What is in
results/tasks.csv for a set and a seed is not run again.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision

from rows import RESULTS, append

PLAIN = Path(__file__).with_name("plain.py")
WEIGHTS = "shufflenetv1-authors/shufflenetv1_g3_0.5x.pth.tar"
COLUMNS = (
    *("set", "task", "seed", "epochs", "metric", "ours", "plain", "ours_s", "plain_s"),
    *("torch", "torchvision"),
)


@dataclass(frozen=True)
class Set:
    """A data set: how it is laid out in a folder, and how long to train on it."""

    task: str
    metric: str
    epochs: int
    lay_out: Callable[[Path, Path], str]


def hymenoptera(shared: Path, home: Path) -> str:
    """Their val is our test."""
    for ours, theirs in (("train", "train"), ("test", "val")):
        (home / ours).symlink_to(shared / "hymenoptera" / theirs)
    return str(home)


def bccd(shared: Path, home: Path) -> str:
    """It has all three."""
    return f"voc:{shared / 'bccd'}"


def fruits(shared: Path, home: Path) -> str:
    """Every third image is our test."""
    whole = json.loads((shared / "fruits-nuts" / "trainval.json").read_text())
    (home / "annotations").mkdir()
    images = sorted(whole["images"], key=lambda image: image["file_name"])
    for split, part in (
        ("test", images[::3]),
        ("train", [e for i, e in enumerate(images) if i % 3]),
    ):
        ids = {image["id"] for image in part}
        kept = [a for a in whole["annotations"] if a["image_id"] in ids]
        text = json.dumps({**whole, "images": part, "annotations": kept})
        (home / "annotations" / f"instances_{split}.json").write_text(text)
        folder = next(p for p in (shared / "fruits-nuts").rglob("*.jpg")).parent
        (home / split).symlink_to(folder)
    return f"coco:{home}"


def camvid(shared: Path, home: Path) -> str:
    """Their val is our test."""
    for kind in ("images", "masks"):
        (home / kind).mkdir()
        for ours, theirs in (("train", "train"), ("test", "val")):
            (home / kind / ours).symlink_to(shared / "camvid" / kind / theirs)
    return f"masks:{home}?void=11"


SETS = {
    "hymenoptera": Set("classify", "top1", 15, hymenoptera),
    "bccd": Set("detect", "map", 15, bccd),
    "fruits-nuts": Set("detect", "map", 60, fruits),
    "camvid": Set("segment", "miou", 25, camvid),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared/data")
    asked = parser.parse_args()
    done = known()
    for seed in asked.seeds:
        for name in asked.sets:
            if (name, str(seed)) not in done:
                row = compare(name, seed, asked.shared.resolve())
                append("tasks", [row], COLUMNS)
                print({k: row[k] for k in COLUMNS[:9]}, flush=True)
    show()
    return 0


def known() -> set[tuple[str, str]]:
    path = RESULTS / "tasks.csv"
    if not path.exists():
        return set()
    with path.open(newline="") as file:
        return {(row["set"], row["seed"]) for row in csv.DictReader(file)}


def compare(name: str, seed: int, shared: Path) -> dict[str, Any]:
    """Train both on one set; the split `test` of each decides."""
    case, weights = SETS[name], str(shared / WEIGHTS)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / name
        home.mkdir()
        data = case.lay_out(shared, home)
        common = ["--epochs", str(case.epochs), "--seed", str(seed)]
        began = time.perf_counter()
        told = run(
            "-m", "meshuffle", "train", data, "--task", case.task, "--from", weights, "--json",
            "--plan", "dp=1", "--compile", "off", "--out", str(Path(folder) / "run"), *common,
        )  # fmt: skip
        middle = time.perf_counter()
        plain = run(str(PLAIN), case.task, data, "--weights", weights, *common)
        end = time.perf_counter()
    return {
        "set": name, "task": case.task, "seed": seed, "epochs": case.epochs,
        "metric": case.metric, "ours": round(told["metrics"]["test"][case.metric], 3),
        "plain": round(plain[case.metric], 3), "ours_s": round(middle - began),
        "plain_s": round(end - middle), "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }  # fmt: skip


def run(*command: str) -> dict[str, Any]:
    found = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    if found.returncode:
        raise RuntimeError(found.stderr[-2000:])
    told: dict[str, Any] = json.loads(found.stdout.strip().splitlines()[-1])
    return told


def show() -> None:
    """Print mean and standard error over the seeds."""
    with (RESULTS / "tasks.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    print(f"{'set':<12} {'metric':<6} {'ours':>7} {'plain':>7} {'se':>6}  seeds  ahead or equal")
    for name in dict.fromkeys(row["set"] for row in rows):
        own = [row for row in rows if row["set"] == name]
        ours, plain = ([float(row[k]) for row in own] for k in ("ours", "plain"))
        error = statistics.stdev(plain) / len(plain) ** 0.5 if len(plain) > 1 else 0.0
        reached = statistics.mean(ours) >= statistics.mean(plain) - error
        print(
            f"{name:<12} {own[0]['metric']:<6} {statistics.mean(ours):7.2f} "
            f"{statistics.mean(plain):7.2f} {error:6.2f}  {len(own):>5}  {reached}"
        )


if __name__ == "__main__":
    raise SystemExit(main())
