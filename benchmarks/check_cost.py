"""What comparing the ranks' parameters costs (`--check-every`), beside a step.

    torchrun --nproc-per-node 2 benchmarks/check_cost.py [--model NAME] [--plan TEXT] …

Trains a short epoch of digits with a comparison after every step and times both. Prints a line and
appends it to results/check_cost.csv; `cost_percent` is that of a comparison every 100 steps.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from meshuffle.config import TrainConfig
from meshuffle.report import report
from meshuffle.train.api import train
from meshuffle.train.consistency import Consistency
from meshuffle.train.loop import Loop
from rows import append

EVERY = 100
WARM_STEPS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="shufflenet_v2_x1_0")
    parser.add_argument("--plan", default="dp=2")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--input-size", type=int, default=48)
    options = parser.parse_args()
    steps, checks = timed(Loop, "_step"), timed(Consistency, "after_step")
    report.write_report = lambda *_, **__: Path()  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / f"run-{os.environ['RANK']}")
        fixed: dict[str, Any] = {"data": "digits", "epochs": 1, "compile": "off", "workers": 0}
        train(TrainConfig(check_every=1, out=out, **fixed, **vars(options)))
    if os.environ["RANK"] == "0":
        write({**vars(options), **figures(steps[WARM_STEPS:], checks[WARM_STEPS:])})


def timed(owner: type, name: str) -> list[float]:
    """Let a method note how long it takes, seconds; returns the list of it."""
    original: Callable[..., Any] = getattr(owner, name)
    found: list[float] = []

    def measured(*arguments: Any) -> Any:
        began = time.perf_counter()
        result = original(*arguments)
        found.append(time.perf_counter() - began)
        return result

    setattr(owner, name, measured)
    return found


def figures(steps: list[float], checks: list[float]) -> dict[str, Any]:
    alone = [step - check for step, check in zip(steps, checks, strict=True)]
    step_ms, check_ms = (1000 * statistics.median(times) for times in (alone, checks))
    return {
        "step_ms": round(step_ms, 1),
        "check_ms": round(check_ms, 2),
        "cost_percent": round(100 * check_ms / (EVERY * step_ms), 4),
        "steps": len(steps),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 2),
    }


def write(row: dict[str, Any]) -> None:
    print(*row.values())
    append("check_cost", [row])


if __name__ == "__main__":
    main()
