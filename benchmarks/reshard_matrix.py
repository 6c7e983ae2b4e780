"""A checkpoint written under one plan goes on under any other: 8 plans × 8 others, and one process.

    python benchmarks/reshard_matrix.py

Every run trains the same model on the same micro-batches in float64: AdamW, averaged weights,
dropout, clipped gradients. Three steps under the first plan, a checkpoint; three more under the
second. Parameters, buffers, the optimiser's moments and averages must then equal those of six steps
of one process that nobody interrupted, by DESIGN section 4.1; and `weights/last.safetensors` of the
first plan those of the plain model after three. Writes results/reshard_matrix.csv.

Micro-batches have 12 and 11 images, of which each replica takes its share, so that batch norm sees
the same ones under every plan. Ranks are forks of this process, which has captured the model.
"""

from __future__ import annotations

import csv
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forks import run_forked
from meshuffle.comm.group import RankEnv, process_group
from meshuffle.config import TrainConfig
from meshuffle.data import AugmentConfig, Batch, Preprocess, shard_bounds
from meshuffle.errors import in_words
from meshuffle.parallel.random_masks import draw_key
from meshuffle.planner.plan import parse_plan
from meshuffle.tasks.card import Card
from meshuffle.train import state as train_state
from meshuffle.train.checkpoint.intact import agree_on_checkpoint
from meshuffle.train.checkpoint.saver import Saver
from meshuffle.train.defaults import resolve
from meshuffle.train.state import TrainState, augment_values, build_state, model_knobs, new_model
from meshuffle.verify.compare import Judgement, Norm, judge
from meshuffle.weights import read_weights
from verify_zoo import capture_once

SOURCES = (
    *("dp=1", "dp=2", "dp=3:shard", "tp=2:channel", "tp=2:spatial", "dp=2,tp=2"),
    *("pp=2", "tp=2,pp=2"),
)
TARGETS = (
    *("dp=4", "tp=2", "tp=3", "tp=2:batch", "dp=2,tp=2:spatial"),
    *("pp=4", "dp=2:shard,pp=2:gpipe", "tp=2,pp=2:interleaved-1f1b"),
    "one process",
)
ONE = "dp=1"
STEPS, MICRO, SIZE, CLASSES = 3, (12, 11), 32, 5
LR = 0.01
CONFIG: dict[str, Any] = {
    "data": "-",
    "batch": 24,
    "epochs": 1,
    "optimizer": "adamw",
    "ema": 0.9,
    "dropout": 0.2,
    "clip_norm": 1.0,
    "knobs": {"width": "0.25", "depths": "[1, 1, 1]", "head_channels": "32"},
}
CPU = torch.device("cpu")
RESULTS = Path(__file__).parents[1] / "results" / "reshard_matrix.csv"


def main() -> int:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        capture_once(example_model(), torch.empty(12, 3, SIZE, SIZE, dtype=torch.float64))
        launch(ONE, lambda env: reference(env, home / "reference.pt"))
        launch(ONE, lambda env: reference(env, home / "noise.pt", channels_last=False))
        for number, source in enumerate(SOURCES):
            launch(source, lambda env, n=number, plan=source: save(env, plan, home / str(n)))
        for target in TARGETS:
            plan = ONE if target == "one process" else target
            launch(plan, lambda env, plan=plan: go_on(env, plan, home))
            for number, source in enumerate(SOURCES):
                found = json.loads((home / f"{number}.json").read_text())
                rows.append({"saved_under": source, "loaded_under": target, **found})
            told = [row["passed"] for row in rows if row["loaded_under"] == target]
            print(f"{target:<28} {sum(told)} of {len(told)}", flush=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return report(rows)


def report(rows: list[dict[str, Any]]) -> int:
    pairs = [row["passed"] for row in rows if row["loaded_under"] in TARGETS[:-1]]
    rest = [row["passed"] for row in rows if row["loaded_under"] == TARGETS[-1]]
    files = [row["weights_passed"] for row in rows if row["loaded_under"] == TARGETS[-1]]
    for what, passed in (("other plans", pairs), ("one process", rest), ("weights files", files)):
        print(f"{what}: {sum(passed)} of {len(passed)}")
    worst = max(rows, key=lambda row: row["worst_relative_error"])
    print(f"worst relative error {worst['worst_relative_error']:.1e}: {worst['worst_tensor']}")
    return int(not all((*pairs, *rest, *files)))


def launch(plan: str, work: Callable[[RankEnv], None]) -> None:
    """Do `work` as each rank of `plan`, in forks of this process."""
    world = parse_plan(plan).num_ranks

    def failed(rank: int, error: BaseException) -> None:
        print(f"rank {rank}: {in_words(error)}", flush=True)

    if not run_forked(world, lambda rank: work(RankEnv(rank, world, rank, world)), failed):
        raise SystemExit(f"a rank of {plan} failed")


def settings(**changes: Any) -> TrainConfig:
    config = TrainConfig(**CONFIG, **changes)
    return resolve(config, 24, SIZE, augment_values(AugmentConfig()))


def make_card(config: TrainConfig) -> Card:
    names = tuple(map(str, range(CLASSES)))
    return Card(config.model, names, Preprocess.imagenet(SIZE), knobs=model_knobs(config))


def example_model() -> torch.nn.Module:
    config = settings()
    return new_model(config, make_card(config)).train()


def new_state(env: RankEnv, plan: str, group: Any, **changes: Any) -> TrainState:
    config = settings(**changes)
    parsed = parse_plan(f"{plan},mb={len(MICRO)}")
    return build_state(config, parsed, make_card(config), env, CPU, group)


def train_steps(state: TrainState, num: int = STEPS) -> None:
    """Do the next steps; the images depend on the step alone."""
    state.model.train()
    place, seed = state.place, state.config.seed
    for step in range(state.progress.step, state.progress.step + num):
        draw = torch.Generator().manual_seed(step)
        micro_batches, draws = [], []
        for i, size in enumerate(MICRO):
            images = torch.randint(0, 256, (size, 3, SIZE, SIZE), generator=draw).byte()
            labels = torch.randint(0, CLASSES, (size,), generator=draw)
            first, last = shard_bounds(size, place.dp)[place.dp_rank]
            none = torch.zeros(last - first, dtype=torch.int64)
            own = (images[first:last], labels[first:last], none, none, torch.arange(last - first))
            micro_batches.append(Batch(*own, skipped=[]))
            draws.append((draw_key(seed, step, i), first))
        state.step.run(micro_batches, list(MICRO), LR, draws)
        assert state.average is not None
        state.average.update_parameters(state.model)
        state.progress.step += 1


def reference(env: RankEnv, path: Path, **changes: Any) -> None:
    """Train six steps in one process; keep the tensors after three and after six."""
    with process_group(env, CPU) as group:
        state = new_state(env, ONE, group, **changes)
        kept = []
        for _ in range(2):
            train_steps(state)
            kept.append(Saver().copy(state.tensors()))
        torch.save(kept, path)


def save(env: RankEnv, plan: str, run: Path) -> None:
    with process_group(env, CPU) as group, Saver() as saver:
        state = new_state(env, plan, group)
        train_steps(state)
        state.save(run, saver, write=env.is_main)


def go_on(env: RankEnv, plan: str, home: Path) -> None:
    """Continue each checkpoint under `plan`; the main rank judges."""
    with process_group(env, CPU) as group:
        for number in range(len(SOURCES)):
            began = time.perf_counter()
            state = new_state(env, plan, group)
            found = agree_on_checkpoint(home / str(number) / "state", env, group)
            assert found.folder is not None and not found.lines
            state.restore(found.folder)
            train_steps(state)
            tensors = state.tensors()
            if env.is_main:
                row = judged(tensors, home, home / str(number) / "weights" / "last.safetensors")
                row["seconds"] = round(time.perf_counter() - began, 2)
                (home / f"{number}.json").write_text(json.dumps(row))


def judged(tensors: Mapping[str, Tensor], home: Path, weights: Path) -> dict[str, Any]:
    halfway, expected = torch.load(home / "reference.pt", weights_only=True)
    halfway_noise, noise = torch.load(home / "noise.pt", weights_only=True)
    result = compare(tensors, expected, noise)
    prefix = "ema.module."
    of_file = {f"{prefix}{k}": v for k, v in read_weights(weights)[0].items()}
    averages = [
        {k: v for k, v in whole.items() if k.startswith(prefix)}
        for whole in (halfway, halfway_noise)
    ]
    (name, worst) = result.worst()[0]
    return {
        "passed": result.passed,
        "worst_relative_error": worst,
        "worst_tensor": name,
        "num_tensors": len(result.errors),
        "num_floor_tensors": len(result.near),
        "weights_passed": compare(of_file, *averages).passed,
        "torch": torch.__version__,
    }


def compare(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], noise: Mapping[str, Tensor]
) -> Judgement:
    assert found.keys() == expected.keys()
    keys = {name: f"{kind(name)}/{name}" for name in expected}
    norms = {
        keys[n]: Norm(float(t.double().norm()), t.numel(), exact=is_count(n, t))
        for n, t in expected.items()
    }
    return judge(
        {keys[n]: float((found[n].double() - t.double()).norm()) for n, t in expected.items()},
        norms,
        {keys[n]: float((noise[n].double() - t.double()).norm()) for n, t in expected.items()},
    )


def kind(name: str) -> str:
    """Return what a tensor is measured against: all others of its kind.

    >>> kind("optim.fc.weight.exp_avg"), kind("ema.module.conv1.1.running_var")
    ('exp_avg', 'ema buffers')
    """
    first, last = name.partition(".")[0], name.rpartition(".")[2]
    if first == "optim":
        return last
    return f"{first} {'buffers' if last.startswith('running_') else 'parameters'}"


def is_count(name: str, tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or (name.startswith("optim.") and name.endswith(".step"))


def in_float64() -> None:
    normalise, new = Preprocess.normalise, train_state.new_model
    train_state.new_model = lambda *a, **k: new(*a, **k).double()
    Preprocess.normalise = lambda self, x: normalise(self, x).double()  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)  # what is to be forked must not have started threads
    in_float64()
    began = time.perf_counter()
    code = main()
    print(f"{time.perf_counter() - began:.0f} s; {RESULTS.name} has the rows")
    raise SystemExit(code)
