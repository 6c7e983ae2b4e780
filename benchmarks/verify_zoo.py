"""Every torchvision classifier under five plans: does it compute what one device computes?

    python benchmarks/verify_zoo.py [NAME…] [--plan tp=2:channel] [--again]
    python benchmarks/verify_zoo.py [NAME…] [--again] --pipelines | --schedules

Writes results/verify_zoo.csv, a row per model and plan, as they come; rows that passed are not run
again, unless --again is given. With --pipelines twenty models under pipelines, with micro-batches
of unequal size, to results/verify_pipelines.csv; with --schedules three models under all seven
schedules, there too. Inputs are small and the check is that of DESIGN section 4.1 in float64.

The share of FLOPs that runs split, the busiest rank's FLOPs over the mean, and the parameters that
a rank keeps are of the model's native input, where nothing needs to be computed.

Ranks are forks of this process, which has captured the model already: on two cores that halves the
time. Transformers of a fixed input are built for a smaller one.
"""

from __future__ import annotations

import argparse
import csv
import gc
import os
import pickle
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch.nn import Parameter

import small_models
from forks import run_forked
from meshuffle.comm.device import num_cores
from meshuffle.errors import MeshuffleError, RankFailed, in_words
from meshuffle.graph import Graph, capture
from meshuffle.layout import assign
from meshuffle.models import create_model
from meshuffle.parallel import module as parallel_module
from meshuffle.parallel.lower import lower
from meshuffle.planner.plan import SCHEDULES, parse_plan
from meshuffle.verify import api, reference
from meshuffle.verify.api import verify
from meshuffle.verify.job import build_model, make_inputs
from meshuffle.verify.rank import Run, work_through
from meshuffle.verify.trace import trace

PLANS = ("tp=2:channel", "tp=2:spatial", "tp=2:batch", "tp=3:channel", "dp=2,tp=2")
PIPELINES = (
    *("pp=2,mb=3", "pp=4,mb=3", "dp=2,pp=2,mb=2", "tp=2,pp=2,mb=3", "dp=2,tp=2,pp=2,mb=2"),
)
BY_SCHEDULE = tuple(f"pp=2:{name},mb=4" for name in SCHEDULES)
PIPELINED = (
    *("mnasnet0_5", "mnasnet0_75", "mnasnet1_0", "mobilenet_v2", "mobilenet_v3_small"),
    *("regnet_y_400mf", "shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5"),
    *("squeezenet1_0", "squeezenet1_1", "shufflenet_v1_x1_0_g8", "mobilenet_v3_large", "resnet50"),
    *("densenet121", "inception_v3", "efficientnet_b0", "vit_b_16", "swin_t", "gpt2", "lstm"),
)
SCHEDULED = ("shufflenet_v2_x0_5", "vit_b_16", "gpt2")
BATCH, SMALL = 4, 64
NATIVE = {"inception_v3": 299, "vit_h_14": 224}
FIXED = ("maxvit",)  # its windows need 224
# At smaller sizes one device differs from itself: by 1e-5 in the third loss, 1e-3 in a parameter.
LARGER = {"inception_v3": 160, "resnet152": 128, "regnet_x_3_2gf": 128}
RESULTS = Path(__file__).parents[1] / "results" / "verify_zoo.csv"
COLUMNS = (
    *("model", "plan", "input", "passed", "worst_relative_error", "worst_tensor"),
    *("num_floor_tensors", "sent_bytes_predicted", "sent_bytes_measured", "first_diverging"),
    *("sharded_flops", "busiest_over_mean", "parameters_on_a_rank", "native_input"),
    *("seconds", "torch", "torchvision", "error"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--plan", action="append")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--at-once", type=int, default=6, help="models per launch of ranks")
    parser.add_argument("--pipelines", action="store_true")
    parser.add_argument("--schedules", action="store_true")
    options = parser.parse_args()
    names, plans = options.names or by_size(), options.plan or PLANS
    if options.pipelines or options.schedules:
        global RESULTS, BATCH
        RESULTS, BATCH = RESULTS.with_name("verify_pipelines.csv"), 10
        names = options.names or (SCHEDULED if options.schedules else PIPELINED)
        plans = options.plan or (BY_SCHEDULE if options.schedules else PIPELINES)
    rows = read_rows()
    wanted = [(name, plan) for name in names for plan in plans]
    if not options.again:
        wanted = [key for key in wanted if rows.get(key, {}).get("passed") != "True"]
    todo = list(dict.fromkeys(name for name, _ in wanted))
    for first in range(0, len(todo), options.at_once):
        some = todo[first : first + options.at_once]
        cases = [key for key in wanted if key[0] in some]
        for row in check(cases):
            rows[row["model"], row["plan"]] = row
            told = "passed" if row["passed"] else f"FAILED {row['error'] or row['first_diverging']}"
            print(f"{row['model']:<20} {row['plan']:<14} {told}", flush=True)
        write_rows(rows.values())
        forget()
    passed = [str(row["passed"]) == "True" for row in rows.values()]
    print(f"{sum(passed)} of {len(passed)} passed; {RESULTS.name} has them")
    return int(not all(passed))


WORKS = {"check": Run.check, "trace": trace}


def fork_ranks(_: str, arguments: Sequence[str], num_ranks: int, **__: Any) -> None:
    """Do what `dist.launch.torchrun` does for verify, in forks of this process."""
    folder, work = Path(arguments[0]), WORKS[arguments[1]]

    def failed(rank: int, error: BaseException) -> None:
        (folder / f"failed.{rank}").write_text(in_words(error))

    run_forked(num_ranks, lambda _: work_through(folder, work), failed)
    told = sorted(folder.glob("failed.*"))
    if told:
        raise RankFailed(told[0].read_text())


_captured: dict[Any, Graph] = {}


def capture_once(model: torch.nn.Module, example: Any, *, train: bool = True) -> Graph:
    """Capture, or return what was captured of the same model: its graph has any batch."""
    inputs = [example] if isinstance(example, torch.Tensor) else list(example)
    sizes = tuple((name, tuple(p.shape), p.dtype) for name, p in model.named_parameters())
    key = (type(model), train, hash(sizes), tuple(tuple(x.shape[1:]) for x in inputs))
    found = _captured.get(key) or _captured.get((*key, len(inputs[0])))
    if found is None:
        found = capture(model, example, train=train)
        _captured[key if found.symbol is not None else (*key, len(inputs[0]))] = found
    return found


def in_fork(function: Any) -> Any:
    """Return `function` so that a fork computes it: behind a backward pass none can be forked."""

    def run(*arguments: Any, **keywords: Any) -> Any:
        with tempfile.NamedTemporaryFile() as file:
            child = os.fork()
            if child == 0:
                try:
                    torch.set_num_threads(num_cores())
                    result: Any = function(*arguments, **keywords)
                except BaseException as error:  # noqa: BLE001  # raised again by the parent
                    result = error
                Path(file.name).write_bytes(pickle.dumps(result))
                os._exit(0)
            os.waitpid(child, 0)
            result = pickle.loads(Path(file.name).read_bytes())
        if isinstance(result, BaseException):
            raise result
        return result

    return run


def make_reference(job: Any, path: Path) -> Any:
    model = build_model(job, job.torch_dtype, filled=False)
    capture_once(model, make_inputs(job, model, job.torch_dtype))  # here, for the ranks
    del model
    return in_fork(reference.make_reference)(job, path)


def forget() -> None:
    """Forget what was captured."""
    _captured.clear()


api.torchrun = fork_ranks
api.make_reference = make_reference
api.own_difference = in_fork(reference.own_difference)
api.make_trace = in_fork(api.make_trace)
reference.capture = capture_once
parallel_module.capture = capture_once


def by_size() -> list[str]:
    """Return all classifiers, those with the fewest parameters first."""
    names = torchvision.models.list_models(module=torchvision.models)
    sizes = {
        name: torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"]
        for name in names
    }
    return sorted(names, key=sizes.__getitem__)


def small_input(name: str) -> str:
    if name in ("gpt2", "lstm"):
        return "24:int"
    fixed = 224 if name.startswith(FIXED) else LARGER.get(name, SMALL)
    size = small_models.SIZE.get(name, fixed)
    return f"3x{size}x{size}"


def model_name(name: str) -> str:
    if hasattr(small_models, name):
        return f"small_models:{name}"
    return name if name.startswith("shufflenet_v1") else f"torchvision:{name}"


def check(cases: Sequence[tuple[str, str]]) -> Iterable[dict[str, Any]]:
    """Verify some cases in as few launches as there are numbers of ranks; yield their rows."""
    inputs = {name: small_input(name) for name, _ in cases}
    verdicts = verify(
        [(model_name(name), plan, inputs[name]) for name, plan in cases],
        dtype="float64",
        batch=BATCH,
        timeout_s=600,
    )
    graphs: dict[str, Graph] = {}
    for (name, plan), verdict in zip(cases, verdicts, strict=True):
        if name not in graphs:
            graphs.clear()
            gc.collect()
            graphs[name] = native_graph(name)
        values = verdict.to_dict()
        row = {"model": name, "input": inputs[name], **native_facts(graphs[name], plan)}
        row |= {key: values[key] for key in COLUMNS if key in values and key not in row}
        row |= {"torch": torch.__version__, "torchvision": torchvision.__version__}
        yield row | {"plan": plan, "seconds": round(verdict.seconds, 1)}


def native_graph(name: str) -> Graph:
    size = NATIVE.get(name, 224)
    own = model_name(name) if name in ("gpt2", "lstm") else f"torchvision:{name}"
    own = name if name.startswith("shufflenet_v1") else own
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = create_model(own).train()
        if name in ("gpt2", "lstm"):
            return capture(model, torch.zeros(BATCH, 24, dtype=torch.int64))
        return capture(model.to("meta"), torch.empty(BATCH, 3, size, size, device="meta"))


def native_facts(graph: Graph, text: str) -> dict[str, Any]:
    """Return what a plan splits at the native input; lowering is pure and needs no ranks."""
    plan, native = parse_plan(text), graph.shape(next(graph.inputs()))[-1]
    try:
        size = max(1, BATCH // plan.dp // plan.num_micro_batches)
        assignment = assign(graph, plan.tp, batch=size, prefer=plan.tp_kind)
    except MeshuffleError as error:
        return {"native_input": native, "error": str(error)}
    stored = lower(assignment, 0).stored
    whole = {n: p.numel() for n, p in graph.program.state_dict.items() if isinstance(p, Parameter)}
    largest = max(
        sum(
            count * len(stored[name].owners[rank]) / stored[name].size if name in stored else count
            for name, count in whole.items()
        )
        for rank in range(plan.tp)
    )
    return {
        "native_input": native,
        "sharded_flops": round(assignment.sharded_fraction(), 4),
        "busiest_over_mean": round(assignment.imbalance(), 4),
        "parameters_on_a_rank": round(largest / sum(whole.values()), 4),
    }


def read_rows() -> dict[tuple[str, str], dict[str, Any]]:
    if not RESULTS.exists():
        return {}
    with RESULTS.open(newline="") as file:
        return {(row["model"], row["plan"]): dict(row) for row in csv.DictReader(file)}


def write_rows(rows: Iterable[dict[str, Any]]) -> None:
    order = {plan: i for i, plan in enumerate((*PLANS, *PIPELINES, *BY_SCHEDULE))}
    temporary = RESULTS.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: (row["model"], order.get(row["plan"], 99))))
    temporary.replace(RESULTS)


if __name__ == "__main__":
    torch.set_num_threads(1)  # what is to be forked must not have started threads
    began = time.perf_counter()
    code = main()
    print(f"{time.perf_counter() - began:.0f} s")
    raise SystemExit(code)
