"""A 4-layer GPT-2 with dropout on characters, dp=2,tp=2,pp=2 against one device.

    python benchmarks/gpt2_hybrid.py tinyshakespeare.txt [--plan dp=2,tp=2,pp=2,mb=4]

Two comparisons: float64, three steps of SGD with momentum, the largest relative difference of the
weights; float32, 200 steps of AdamW, the loss of each twentieth step. One device accumulates the
same micro-batches and so draws the same dropout masks. Prints a table and appends to
results/gpt2_hybrid.csv.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import gpt2
from text import batches

import meshuffle
from meshuffle.comm.group import rank_env
from meshuffle.comm.launch import end_with_parent, torchrun
from meshuffle.planner.plan import Plan, parse_plan
from rows import append

BATCH, LENGTH, LAYERS = 16, gpt2.LENGTH, 4
EXACT_STEPS, STEPS, TOLD = 3, 200, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--plan", default="dp=2,tp=2,pp=2,mb=4")
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    plan = parse_plan(options.plan)
    if options.into is not None:
        end_with_parent()
        train(options.text, plan, options.into)
        return
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for each in (Plan(mb=plan.num_micro_batches), plan):
            into = Path(folder) / f"{each.num_ranks}.pt"
            arguments = [str(options.text), "--plan", str(each), "--into", str(into)]
            os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
            torchrun("gpt2_hybrid", arguments, each.num_ranks, threads=1)
            found.append(torch.load(into, weights_only=True))
    report(options.plan, *found)


def train(path: Path, plan: Plan, into: Path) -> None:
    """Train as one rank; the main one saves losses and weights."""
    text = torch.tensor(list(path.read_bytes()), dtype=torch.int64)
    example, _ = next(batches(text, BATCH // plan.dp, LENGTH, 1))
    found: dict[str, Any] = {}
    for dtype, steps in ((torch.float64, EXACT_STEPS), (torch.float32, STEPS)):
        whole = gpt2.make(LAYERS).to(dtype)
        torch.manual_seed(1)
        model = meshuffle.parallelize(whole, example=example, plan=plan)
        exact = dtype == torch.float64
        optimizer = (
            torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            if exact
            else torch.optim.AdamW(model.parameters(), lr=1e-3)
        )
        losses = []
        for x, y in batches(text, BATCH, LENGTH, steps):
            optimizer.zero_grad()
            own = [of_replica(z, plan) for z in (x, y)]
            losses.append(float(model.forward_backward(*own, gpt2.loss_of)))
            optimizer.step()
        weights = model.whole_state_dict()
        found[str(dtype)] = {"losses": losses, "weights": weights if exact else {}}
    env = rank_env()
    if env is None or env.is_main:
        torch.save(found, into)
    dist.barrier()


def of_replica(x: Tensor, plan: Plan) -> Tensor:
    """Return a replica's samples: micro-batch i of one device is that of all replicas together."""
    world = dist.get_world_size()
    rank = dist.get_rank() // plan.tp % plan.dp if world > 1 else 0
    return x.unflatten(0, (plan.num_micro_batches, plan.dp, -1))[:, rank].flatten(0, 1)


def report(plan: str, one: dict[str, Any], many: dict[str, Any]) -> None:
    exact, rows = str(torch.float64), []
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    worst = max(
        float((many[exact]["weights"][name] - w).norm() / w.norm().clamp_min(1e-30))
        for name, w in one[exact]["weights"].items()
        if w.is_floating_point()
    )
    print(f"float64, {EXACT_STEPS} steps: weights differ by at most {worst:.1e}")
    rows.append({"plan": plan, "dtype": "float64", "step": EXACT_STEPS, "worst_weight": worst})
    single = str(torch.float32)
    for step in (1, *range(TOLD, STEPS + 1, TOLD)):
        a, b = (each[single]["losses"][step - 1] for each in (one, many))
        print(f"float32, step {step:3d}: one device {a:.5f}, {plan} {b:.5f}, {b / a - 1:+.2e}")
        rows.append(
            {"plan": plan, "dtype": "float32", "step": step, "one_device": a, "under_plan": b}
        )
    columns = ("plan", "dtype", "step", "worst_weight", "one_device", "under_plan", *versions)
    append("gpt2_hybrid", [{**row, **versions} for row in rows], columns)


if __name__ == "__main__":
    main()
