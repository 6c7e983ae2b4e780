"""What a rank keeps, and what ShuffleNet V1 sends, when channels are split; nothing is computed.

    python benchmarks/split_sizes.py

Two tables. Parameters of the rank that keeps most, over 1 / tp of the model's. And ShuffleNet V1 1×
with 8 groups: bytes that its units outside the stage changes send in a step, forward and backward,
over all ranks, against two ring all-reduces (one each way) of the units' outputs. Appends to
results/split_sizes.csv and results/shufflenet_v1_bytes.csv.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Parameter

from meshuffle.graph import Graph, capture
from meshuffle.layout import assign
from meshuffle.models import create_model
from meshuffle.parallel.code import StageCode
from meshuffle.parallel.lower import lower
from rows import append

BATCH, SIZE = 32, 224
KEPT = (
    *(("shufflenet_v1_x1_0_g8", tp) for tp in (2, 4, 8)),
    *((f"torchvision:{name}", tp) for name in ("resnet50", "vgg16") for tp in (2, 3)),
)


def captured(name: str) -> Graph:
    model = create_model(name).to("meta").train()
    return capture(model, torch.empty(BATCH, 3, SIZE, SIZE, device="meta"))


def kept(name: str, graph: Graph, tp: int) -> dict[str, Any]:
    assignment = assign(graph, tp, batch=BATCH, prefer="channel")
    code = lower(assignment, 0)
    whole = {n: p.numel() for n, p in graph.program.state_dict.items() if isinstance(p, Parameter)}
    ranks = [sum(part(code, n, count, rank) for n, count in whole.items()) for rank in range(tp)]
    return {
        "model": name,
        "tp": tp,
        "parameters": sum(whole.values()),
        "largest_rank": round(max(ranks)),
        "over_even_share": round(max(ranks) * tp / sum(whole.values()), 4),
        "sharded_flops": round(assignment.sharded_fraction(), 4),
        "busiest_over_mean": round(assignment.imbalance(), 4),
    }


def part(code: StageCode, name: str, count: int, rank: int) -> float:
    shard = code.stored.get(name)
    return count if shard is None else count * len(shard.owners[rank]) / shard.size


def sent(graph: Graph, tp: int) -> dict[str, Any]:
    assignment = assign(graph, tp, batch=BATCH, prefer="channel")
    code = lower(assignment, 0)
    ops = {op.name: op for op in graph.ops(BATCH)}
    by_kind: dict[str, int] = {}
    for one in code.sent:
        kind = one.name.rstrip("_0123456789")
        by_kind[kind] = by_kind.get(kind, 0) + one.forward + one.backward
    changes = {0, 4, 12}  # the first unit of each stage halves the map
    units: dict[int, int] = {}
    for one in code.sent:
        path = ops[one.value].module.split(".")
        if "branch_main_1" in path and int(path[1]) not in changes:
            units[int(path[1])] = units.get(int(path[1]), 0) + one.forward + one.backward
    outputs = {
        int(op.module.split(".")[1]): op.written_bytes
        for op in ops.values()
        if op.module.startswith("features.") and op.target.startswith("aten.relu")
    }
    reduced = sum(2 * 2 * (tp - 1) * outputs[unit] for unit in range(16) if unit not in changes)
    return {
        "tp": tp,
        "exchanges": sum(one.name.startswith("exchange") for one in code.sent),
        "units_bytes": sum(units.values()),
        "two_all_reduces_bytes": reduced,
        "ratio": f"1/{reduced / max(1, sum(units.values())):g}",
        **{f"{kind}_bytes": by_kind.get(kind, 0) for kind in ("exchange", "all_gather", "psum")},
        "all_bytes": sum(by_kind.values()),
    }


def write(name: str, rows: list[dict[str, Any]]) -> None:
    rows = [{**row, "torch": torch.__version__} for row in rows]
    append(name, rows)
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))


def main() -> None:
    graphs = {name: captured(name) for name, _ in KEPT}
    write("split_sizes", [kept(name, graphs[name], tp) for name, tp in KEPT])
    graph = graphs["shufflenet_v1_x1_0_g8"]
    write("shufflenet_v1_bytes", [sent(graph, tp) for tp in (2, 4, 8)])


if __name__ == "__main__":
    main()
