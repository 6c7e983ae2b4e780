"""FLOPs of the captured Graph against torch's FlopCounterMode, on torchvision's classifiers.

    python benchmarks/flops_zoo.py [NAME…]

Without names: all 80. Writes results/flops_zoo.csv; exits with 1 where a model differs or cannot
be captured. The counter runs the model on the meta device, so nothing is computed.
"""

from __future__ import annotations

import csv
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch.utils.flop_counter import FlopCounterMode

from meshuffle.errors import MeshuffleError
from meshuffle.graph import capture
from meshuffle.models import create_model

NATIVE = ("vit_", "maxvit")  # their constructors fix the size
SIZE, NATIVE_SIZE, INCEPTION_SIZE = 96, 224, 128


def row_of(name: str) -> dict[str, Any]:
    """Capture one model and count it both ways."""
    model = create_model(f"torchvision:{name}").to("meta").train()
    size = NATIVE_SIZE if name.startswith(NATIVE) else SIZE
    size = INCEPTION_SIZE if name == "inception_v3" else size
    x = torch.empty(2, 3, size, size, device="meta")
    row: dict[str, Any] = {"model": name, "input": size}
    began = time.perf_counter()
    try:
        graph = capture(model, x)
    except MeshuffleError as error:
        return row | {"error": str(error)}
    row["capture_s"] = round(time.perf_counter() - began, 2)
    ops = graph.ops()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return row | {
        "symbolic_batch": graph.symbol is not None,
        "ops": len(ops),
        "graph_flops": sum(op.flops for op in ops),
        "counter_flops": counter.get_total_flops(),
        "error": "",
    }


def main() -> int:
    names = sys.argv[1:] or torchvision.models.list_models(module=torchvision.models)
    rows = []
    for name in names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            row = row_of(name)
        row["equal"] = row.get("graph_flops", 0) == row.get("counter_flops", -1)
        row |= {"torch": torch.__version__, "torchvision": torchvision.__version__}
        rows.append(row)
        print(f"{name:<22} {'equal' if row['equal'] else 'DIFFERENT'}  {row}", flush=True)
    if not sys.argv[1:]:
        path = Path(__file__).parents[1] / "results" / "flops_zoo.csv"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, max(rows, key=len))
            writer.writeheader()
            writer.writerows(rows)
    print(f"{sum(row['equal'] for row in rows)} of {len(rows)} equal")
    return int(not all(row["equal"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
