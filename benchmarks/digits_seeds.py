"""Five training seeds of the digits recipe, on the fixed test split; run once per recipe.

    python benchmarks/digits_seeds.py [--plan dp=1,threads=1] [--seeds 0 1 2 3 4]

Appends a row per seed to results/digits_seeds.csv, with versions. The split has a seed of its own
and is the same for all.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rows import append

ROOT = Path(__file__).parents[1]


def train(seed: int, plan: str, folder: str) -> dict[str, Any]:
    recipe = ROOT / "recipes" / "digits.toml"
    command = [sys.executable, "-m", "meshuffle", "train", "digits", "--config", str(recipe)]
    command += ["--seed", str(seed), "--plan", plan, "--out", f"{folder}/{seed}", "--json"]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(found.stdout)


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", default="auto")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            result = train(seed, options.plan, folder)
            row = {
                "date": datetime.date.today().isoformat(),
                "seed": seed,
                "test_top1": round(result["metrics"]["test"]["top1"], 2),
                "val_top1": round(result["metrics"]["val"]["top1"], 2),
                "step_ms": round(result["measured_step_ms"], 1),
                "plan": options.plan,
                "torch": torch.__version__,
            }
            rows.append(row)
            print(row, flush=True)
    append("digits_seeds", rows)
    values = [row["test_top1"] for row in rows]
    print(f"test top-1: mean {statistics.mean(values):.2f} %, lowest {min(values):.2f} %")


if __name__ == "__main__":
    main()
