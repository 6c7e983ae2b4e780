"""A model that is large: how much of it each rank of a plan keeps in memory.

    python benchmarks/big_model.py [--model torchvision:vit_h_14] [--size 518] [PLAN …]

Writes random weights and lets `meshuffle predict` classify one photo with one process and under
each plan. Prints and appends to results/big_model.csv: the MB of the largest process at its peak,
those that are more than an empty one has (Python, PyTorch and us), and the seconds of the command.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from memory import empty_mb, watched
from meshuffle.data import Preprocess
from meshuffle.tasks.card import Card
from meshuffle.weights import build_model, save_weights
from rows import append


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="torchvision:vit_h_14")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("plans", nargs="*", default=["pp=2", "pp=4", "tp=2:channel"])
    asked = parser.parse_args()
    empty = empty_mb()
    rows, answers = [], []
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        Image.fromarray(load_sample_images().images[0]).save(home / "photo.png")
        classes = tuple(f"class{i}" for i in range(1000))
        card = Card(asked.model, classes, Preprocess(crop=asked.size))
        weights = home / "w.safetensors"
        save_weights(weights, build_model(card).state_dict(), card)
        for plan in ("dp=1", *asked.plans):
            command = [sys.executable, "-m", "meshuffle", "predict", str(home / "w.safetensors")]
            said, seconds, peak = watched(
                [*command, str(home / "photo.png"), "--plan", plan, "--json"]
            )
            answers.append(json.loads(said)[0]["label"])
            rows.append(
                {
                    "model": asked.model, "weights_mb": weights.stat().st_size // 10**6,
                    "plan": plan, "peak_mb": peak, "above_empty_mb": peak - empty,
                    "seconds": seconds, "torch": torch.__version__,
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
    print(f"answers: {answers}")
    append("big_model", rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
