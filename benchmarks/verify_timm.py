"""A small model of each family of timm under two plans; families that cannot be captured are named.

    python benchmarks/verify_timm.py [FAMILY…]

Writes results/verify_timm.csv, a row per model and plan, as they come; what is there is not run
again, unless it failed for another reason than its capture. The model of a family is the one with
the fewest parameters among the names that sound small, for the smallest images that it takes and,
of a transformer whose input is fixed, of two blocks.
"""

from __future__ import annotations

import csv
import re
import sys
import time
import warnings
from typing import Any

import timm
import torch

import small_timm
import verify_zoo  # its ranks are forks, and a model is captured once
from meshuffle.verify.api import verify
from verify_zoo import RESULTS as ZOO

PLANS = ("tp=2", "tp=2:channel")
RESULTS = ZOO.with_name("verify_timm.csv")
COLUMNS = (
    *(
        "family",
        "model",
        "knobs",
        "plan",
        "input",
        "passed",
        "worst_relative_error",
        "worst_tensor",
    ),
    *("sharded_flops_fraction", "busiest_over_mean", "parameter_bytes_fraction"),
    *("sent_bytes_predicted", "sent_bytes_measured", "first_diverging", "error", "timm", "torch"),
)
_SMALL = re.compile(r"test_|atto|femto|pico|nano|xxs|xx_small|tiny|_xs|x_small|mini|small|_s\d*\b|"
                    r"18|14|0_?5|035|050|_b0|a0|_m0|_t0|_e\b")  # fmt: skip
_MOST_TRIED = 6


def smallest(family: str) -> str | None:
    """Return the model of a family with the fewest parameters, of those that sound small."""
    names = sorted(timm.list_models(module=family), key=lambda n: (not _SMALL.search(n), len(n)))
    sizes = {}
    for name in names[:_MOST_TRIED]:
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = timm.create_model(name)
            sizes[name] = sum(p.numel() for p in model.parameters())
        except (RuntimeError, NotImplementedError):  # not made for the meta device
            sizes.setdefault(name, 1 << 40)
    return min(sizes, key=sizes.__getitem__) if sizes else None


def main() -> int:
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    if RESULTS.exists():
        with RESULTS.open(newline="") as file:
            rows = {(r["family"], r["plan"]): dict(r) for r in csv.DictReader(file)}
    for family in sys.argv[1:] or timm.list_modules():
        done = [rows.get((family, plan)) for plan in PLANS]
        if all(r and (r["passed"] == "True" or r["error"]) for r in done):
            continue
        name = smallest(family)
        if name is None:
            continue
        for plan, row in zip(PLANS, check(family, name), strict=True):
            rows[family, plan] = row
            told = "passed" if row["passed"] else row["error"] or row["first_diverging"]
            print(f"{family:<22} {name:<28} {plan:<14} {told}", flush=True)
        write(list(rows.values()))
    return 0


def check(family: str, name: str) -> list[dict[str, Any]]:
    told = {"family": family, "model": name, "timm": timm.__version__, "torch": torch.__version__}
    try:
        knobs, side = verify_zoo.in_fork(small_timm.smallest_input)(name)
    except RuntimeError as error:
        return [{**told, "plan": plan, "passed": False, "error": str(error)} for plan in PLANS]
    told |= {"input": f"3x{side}x{side}", "knobs": " ".join(f"{k}={v}" for k, v in knobs.items())}
    cases = [(f"small_timm:{name}", plan, told["input"]) for plan in PLANS]
    verdicts = verify(cases, batch=4, timeout_s=300)
    verify_zoo.forget()
    return [{**v.to_dict(), **told, "plan": v.plan} for v in verdicts]


def write(rows: list[dict[str, Any]]) -> None:
    temporary = RESULTS.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: (row["family"], row["plan"])))
    temporary.replace(RESULTS)


if __name__ == "__main__":
    torch.set_num_threads(1)
    began = time.perf_counter()
    code = main()
    print(f"{time.perf_counter() - began:.0f} s")
    raise SystemExit(code)
