"""How even the stages of a pipeline are: each stage's forward and backward, timed alone.

    python benchmarks/stage_balance.py [NAME…] [--pp 4] [--batch 4]

A cut balances times of single calls; here whole stages are timed, in turn, with inputs of the
sizes that cross. Prints a table and appends to results/stage_balance.csv. The figure is the slowest
stage over the mean, of the medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from meshuffle.models import create_model
from meshuffle.parallel.module import Parallel
from meshuffle.planner.costs import estimated, measured
from rows import append

NAMES = ("torchvision:resnet50", "torchvision:shufflenet_v2_x2_0", "torchvision:vit_b_16")
ROUNDS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--pp", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args()
    rows = []
    for name in options.names:
        for how in ("measured", "estimated"):
            rows.append(balance(name, options.pp, options.batch, how))
            print(*rows[-1].values(), flush=True)
    append("stage_balance", rows)


def balance(name: str, pp: int, batch: int, how: str) -> dict[str, Any]:
    model, x = create_model(name).train(), torch.randn(batch, 3, 224, 224)
    cpu = torch.device("cpu")
    whole = Parallel(
        model,
        (x,),
        1,
        0,
        num_stages=pp,
        stages=range(pp),
        costs=estimated if how == "estimated" else lambda program: measured(program, cpu),
    )
    given, inputs = [[x]], [x]
    for stage in range(pp - 1):
        with torch.no_grad():
            inputs = list(whole.run_stage(stage, *([batch] if stage else []), *inputs))
        given.append(inputs)
    times: list[list[float]] = [[] for _ in range(pp)]
    for _ in range(ROUNDS):
        for stage in range(pp):
            times[stage].append(timed(whole, stage, given[stage], batch))
    medians = [statistics.median(of_stage[1:]) for of_stage in times]
    return {
        "model": name,
        "pp": pp,
        "batch": batch,
        "costs": how,
        "stage_ms": " ".join(f"{1000 * seconds:.1f}" for seconds in medians),
        "slowest_over_mean": round(max(medians) * pp / sum(medians), 3),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
    }


def timed(whole: Parallel, stage: int, inputs: list[Tensor], batch: int) -> float:
    own = [x.detach().requires_grad_(stage > 0 and x.is_floating_point()) for x in inputs]
    began = time.perf_counter()
    result = whole.run_stage(stage, *([batch] if stage else []), *own)
    outputs = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor) and x.requires_grad]
    torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
    return time.perf_counter() - began


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main()
