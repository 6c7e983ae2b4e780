"""What the hooks of `--trace` cost while they are in place, beside a step without.

    torchrun --nproc-per-node 2 benchmarks/trace_cost.py [--model NAME] [--plan TEXT] …

Trains digits; steps are traced or not in the order A B B A, so that a slow minute of a shared
machine hits both, and so does what the loop does in every second step. Prints a line and appends it
to results/trace_cost.csv: the medians and their ratio; and, where the machine's noise is larger,
what the recorded calls of a step cost on their own. A run traces 5 of its steps.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from meshuffle.config import TrainConfig
from meshuffle.data import Batch
from meshuffle.report import report
from meshuffle.train import timeline
from meshuffle.train.api import train
from meshuffle.train.loop import Loop
from meshuffle.train.spans import Spans
from rows import append

WARM_STEPS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="shufflenet_v2_x0_5")
    parser.add_argument("--plan", default="pp=2,mb=8")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--input-size", type=int, default=48)
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    plain, traced, num_calls = alternate()
    report.write_report = lambda *_, **__: Path()  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / f"run-{os.environ['RANK']}")
        fixed: dict[str, Any] = {"data": "digits", "compile": "off", "workers": 0}
        train(TrainConfig(out=out, **fixed, **vars(options)))
    if os.environ["RANK"] == "0":
        row = figures(plain[WARM_STEPS:], traced[WARM_STEPS:], statistics.median(num_calls))
        write({**vars(options), **row})


def alternate() -> tuple[list[float], list[float], list[int]]:
    """Let half of the whole steps run with hooks.

    Returns the lists of both kinds' seconds, and of how many calls were recorded.
    """
    original, times, num_calls = Loop._step, ([], []), []
    spans: list[Spans] = []

    def step(self: Loop, batch: Batch | None) -> None:
        usual = -(-(self.state.config.batch or 0) // self.state.place.dp)
        if batch is None or len(batch) < usual:
            original(self, batch)
            return
        spans.append(Spans(self.state.step.device))
        is_traced = len(spans) % 4 in (2, 3)
        began = time.perf_counter()
        if is_traced:
            timeline._place_hooks(spans[-1], self)
        original(self, batch)
        if is_traced:
            spans[-1].remove()
            num_calls.append(len(spans[-1].take()))
        times[is_traced].append(time.perf_counter() - began)

    Loop._step = step  # type: ignore[method-assign]
    return *times, num_calls


def call_us() -> float:
    """Return what one recorded call costs, in microseconds."""
    spans, number = Spans(torch.device("cpu")), 20_000
    owner = argparse.Namespace(nothing=lambda: None)
    began = time.perf_counter()
    for _ in range(number):
        owner.nothing()
    between = time.perf_counter()
    spans.hook(owner, "nothing", "compute", lambda: ("nothing", {}))
    for _ in range(number):
        owner.nothing()
    return 1e6 * (time.perf_counter() - between - (between - began)) / number


def figures(plain: list[float], traced: list[float], num_calls: float) -> dict[str, Any]:
    each_us = call_us()
    plain_ms, traced_ms = (1000 * statistics.median(times) for times in (plain, traced))
    return {
        "plain_ms": round(plain_ms, 1),
        "traced_ms": round(traced_ms, 1),
        "ratio": round(traced_ms / plain_ms, 4),
        "calls": num_calls,
        "call_us": round(each_us, 2),
        "calls_percent": round(num_calls * each_us / plain_ms / 10, 3),
        "steps": len(plain) + len(traced),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 2),
    }


def write(row: dict[str, Any]) -> None:
    print(*row.values())
    append("trace_cost", [row])


if __name__ == "__main__":
    main()
