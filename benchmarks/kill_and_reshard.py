"""Kill a rank of dp=2,pp=2 with -9, continue under tp=2: is it what it would have been?

    python benchmarks/kill_and_reshard.py [--seeds 0 1 2] [--epochs 8]

The images are scikit-learn's handwritten digits as a folder of PNG files. For each seed: a run
under dp=2,pp=2 loses a rank behind its first checkpoint, and continues under tp=2 (its plan.json
edited); and a run of one process, from the same seed. For the first seed there is also a run that
nobody kills, of the same plan.json and so cut in the same places, whose state of the same step
continues under tp=2: its weights must be those of the first, bit for bit. Prints a table and
appends to results/kill_and_reshard.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from meshuffle.data import open_data
from rows import append

FIRST, THEN = {"dp": 2, "pp": 2, "mb": 2}, {"tp": 2, "mb": 2}
SAVED, FIRST_PLAN = 40, "first-plan.json"
SETTINGS = (
    *("--model", "shufflenet_v2_x0_5", "--batch", "32", "--input-size", "48", "--lr", "0.1"),
    *("--flip", "0", "--crop-scale", "0", "--compile", "off", "--save-every", str(SAVED)),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        photos = write_digits(home / "digits")
        for seed in options.seeds:
            common = ["--seed", str(seed), "--epochs", str(options.epochs), *SETTINGS]
            row: dict[str, Any] = {"seed": seed, "epochs": options.epochs}
            row |= killed(photos, home / f"killed-{seed}", common)
            if seed == options.seeds[0]:
                plan = str(home / f"killed-{seed}" / FIRST_PLAN)
                twin = left_alone(photos, home / f"alone-{seed}", common, plan)
                row["equal_bits"] = same_weights(home / f"killed-{seed}", twin)
            one = home / f"one-{seed}"
            command("train", str(photos), "--plan", "dp=1,mb=2", "--out", str(one), *common)
            row["one_device_top1"], row["resumed_top1"] = top1(one), top1(home / f"killed-{seed}")
            print(row, flush=True)
            rows.append({**row, "torch": torch.__version__})
    means = [
        sum(row[key] for row in rows) / len(rows) for key in ("one_device_top1", "resumed_top1")
    ]
    print(f"test top-1, mean of {len(rows)}: one device {means[0]:.2f}, resumed {means[1]:.2f}")
    columns = ("seed", "epochs", "killed_after", "equal_bits", "one_device_top1", "resumed_top1")
    append("kill_and_reshard", rows, (*columns, "message", "torch"))
    return int(abs(means[0] - means[1]) > 1 or not rows[0]["equal_bits"])


def write_digits(root: Path) -> Path:
    for split, source in open_data("digits").splits.items():
        for i, label in enumerate(source.labels):
            folder = root / split / source.classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            source.image(i).save(folder / f"{i}.png")
    return root


def command(*arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "meshuffle", *arguments], check=True, stdout=subprocess.DEVNULL
    )


def start(photos: Path, run: Path, common: list[str], plan: str) -> subprocess.Popen[str]:
    """Start a run; return it when its first checkpoint is written."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "meshuffle", "train", str(photos)),
            *("--plan", plan, "--out", str(run), *common),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (run / "state" / f"step-{SAVED:08d}").exists():
        if process.poll() is not None:
            raise RuntimeError(process.communicate()[1])
        time.sleep(0.05)
    return process


def killed(photos: Path, run: Path, common: list[str]) -> dict[str, Any]:
    process = start(photos, run, common, ",".join(f"{k}={v}" for k, v in FIRST.items()))
    ranks = ranks_of(run)
    os.kill(ranks[2], signal.SIGKILL)
    message = process.communicate()[1].strip().splitlines()[-1].replace(str(run), "RUN")
    assert process.returncode == 1, process.returncode
    saved = max(int(path.name[5:]) for path in (run / "state").glob("step-*"))
    go_on(run)
    return {"killed_after": saved, "message": message}


def left_alone(photos: Path, run: Path, common: list[str], plan: str) -> Path:
    """Return a run that went on under the second plan from the first checkpoint of the first."""
    process = start(photos, run, common, plan)
    twin = run.with_name(f"{run.name}-twin")
    shutil.copytree(run, twin, ignore=shutil.ignore_patterns(".lock"))
    process.kill()
    process.communicate()
    go_on(twin)
    return twin


def go_on(run: Path) -> None:
    (run / "plan.json").rename(run / FIRST_PLAN)
    (run / "plan.json").write_text(json.dumps(THEN))
    command("train", "--resume", str(run))


def ranks_of(run: Path) -> dict[int, int]:
    """Return the processes of a run's ranks."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode().split("\0")
            values = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if "meshuffle.train.rank" in words and str(run) in words:
            rank = next(v for v in values if v.startswith("RANK="))
            found[int(rank.removeprefix("RANK="))] = int(folder.name)
    return found


def same_weights(one: Path, other: Path) -> bool:
    for name in ("last", "best"):
        a, b = (load_file(run / "weights" / f"{name}.safetensors") for run in (one, other))
        if a.keys() != b.keys() or not all(torch.equal(a[key], b[key]) for key in a):
            return False
    return True


def top1(run: Path) -> float:
    return float(json.loads((run / "result.json").read_text())["splits"]["test"]["top1"])


if __name__ == "__main__":
    sys.exit(main())
