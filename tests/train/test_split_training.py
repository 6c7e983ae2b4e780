"""A run under any plan is the run of one process: curves, weights, checkpoints (float64)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from meshuffle.config import TrainConfig
from meshuffle.data import Preprocess
from meshuffle.data.annotated import AnnotatedSource
from meshuffle.errors import ImageError
from meshuffle.files import write_json
from meshuffle.planner.plan import parse_plan
from meshuffle.report import report
from meshuffle.train import rank, state
from meshuffle.train.checkpoint.intact import latest_checkpoint
from meshuffle.train.run import prepare
from meshuffle.weights import load_model, read_weights
from tests.conftest import SMALL
from tests.ranks import as_launched, run_ranks

EPOCHS = 3
pytestmark = pytest.mark.timeout(900)  # one fixture makes twelve runs; other work may be beside
# 26 images in batches of 5: the last has one, so that a replica has none. The clip acts.
SIMPLE: dict[str, Any] = {"batch": 5, "ema": 0.9, "clip_norm": 0.05}
RICH: dict[str, Any] = {
    "batch": 8,
    "optimizer": "adamw",
    "ema": 0.9,
    "mixup": 0.2,
    "dropout": 0.2,
    "accumulate": 2,
    "freeze": "until:conv1",
    "unfreeze_epoch": 2,
    "clip_norm": 1.0,
}
# Batch norm is frozen, so that micro-batches are the whole batch; a stage has nothing to train.
FROZEN: dict[str, Any] = {"batch": 8, "ema": 0.9, "freeze": "backbone", "clip_norm": 0.05}
SETTINGS = {"simple": SIMPLE, "rich": RICH, "frozen": FROZEN}
SHARDED = "dp=2:shard,tp=2:channel"
SIMPLE_PLANS = ("dp=1", "dp=2", "tp=2:channel", "tp=2:spatial", "dp=2,tp=2", SHARDED)
RICH_PLANS = ("dp=1", "tp=2:channel", "pp=2,mb=2", "tp=2:channel,pp=2,mb=2")
FROZEN_PLANS = ("dp=1", "pp=2,mb=2")
PLANS = {"simple": SIMPLE_PLANS, "rich": RICH_PLANS, "frozen": FROZEN_PLANS}
NAMES = tuple(f"{settings} {plan}" for settings, plans in PLANS.items() for plan in plans)
MATRIX = ("dp=1", "dp=2", "tp=2:channel", "dp=2,tp=2")
WAYS = [(f"simple {a}", b) for a in MATRIX for b in MATRIX]
WAYS += [(f"rich {a}", b) for a in ("dp=1", "tp=2:channel") for b in ("dp=1", "tp=2:channel")]
WAYS += [(f"rich {RICH_PLANS[-1]}", "tp=2:channel,mb=2"), ("rich dp=1", RICH_PLANS[-1])]
QUICK_WAYS = [
    ("simple tp=2:channel", "dp=1"),
    ("simple tp=2:channel", "tp=2:channel"),
    ("simple dp=2,tp=2", SHARDED),
    (f"simple {SHARDED}", "tp=2:channel"),
    (f"simple {SHARDED}", SHARDED),
    ("rich dp=1", "tp=2:channel"),
    ("rich dp=1", "pp=2,mb=2"),
    ("rich pp=2,mb=2", "pp=2,mb=2"),
    ("rich pp=2,mb=2", "tp=2:channel,mb=2"),
]


def train_all(group: dist.ProcessGroup, runs: list[str], blind: Sequence[int] = ()) -> None:
    """Train each run folder as one rank, in float64; images 3 and 20 cannot be read by some.

    Args:
        blind: the ranks that cannot.
    """
    as_launched(group)
    create, normalise = state.new_model, Preprocess.normalise
    state.new_model = lambda *a, **k: create(*a, **k).double()  # type: ignore[attr-defined]
    Preprocess.normalise = lambda self, x: normalise(self, x).double()  # type: ignore[method-assign]
    report.write_report = lambda *_, **__: None  # type: ignore[assignment]  # seconds each
    if dist.get_rank(group) in blind:
        AnnotatedSource.image = unreadable(AnnotatedSource.image)  # type: ignore[method-assign]
    for run in runs:
        rank.train_rank(Path(run))


def unreadable(image: Callable[..., Any]) -> Callable[..., Any]:
    def read(self: Any, index: int) -> Any:
        if index in (3, 20):
            raise ImageError(f"image {index}: gone")
        return image(self, index)

    return read


def train(runs: dict[Path, str]) -> None:
    """Train run folders under their plans, all of one number of ranks in one launch."""
    by_ranks: dict[int, list[str]] = {}
    for run, plan in runs.items():
        by_ranks.setdefault(parse_plan(plan).num_ranks, []).append(str(run))
    for num_ranks, folders in by_ranks.items():
        run_ranks(train_all, num_ranks, folders)


@pytest.fixture(scope="module")
def finished(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same runs under several plans, by `SETTINGS PLAN`; each keeps a checkpoint on its way."""
    home = tmp_path_factory.mktemp("finished")
    runs = {name: new_run(photos, name, home / name) for name in NAMES}
    train({run: name.split()[1] for name, run in runs.items()})
    return runs


def new_run(photos: Path, name: str, out: Path, **changes: Any) -> Path:
    settings, plan = name.split()
    values: dict[str, Any] = {
        "epochs": EPOCHS,
        "save_every": "9" if settings == "simple" else "6",  # in the middle of the second epoch
        **SETTINGS[settings],
        **({"accumulate": 1} if "mb=" in plan else {}),  # the plan says it
        **changes,
    }
    config = TrainConfig(
        data=str(photos),
        model="shufflenet_v2_x0_5",
        knobs=SMALL,
        plan=plan,
        input_size=32,
        workers=0,
        compile="off",
        out=str(out),
        **values,
    )
    return prepare(config, {}).run


def continue_under(
    finished: dict[str, Path], ways: Iterable[tuple[str, str]], folder: Path
) -> dict[tuple[str, str], Path]:
    """Continue copies of runs from their middle, each under a plan."""
    runs = {}
    for source, plan in ways:
        run = folder / f"{source} {plan}"
        shutil.copytree(finished[source], run)
        _, last = sorted((run / "state").glob("step-*"))
        shutil.rmtree(last)
        if source.split()[1] != plan:
            write_json(run / "plan.json", parse_plan(plan).to_dict())
        runs[source, plan] = run
    train({run: plan for (_, plan), run in runs.items()})
    return runs


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return max ‖a−b‖ / (‖b‖ + 0.01·S·√numel) over each kind, of DESIGN section 4.1."""
    assert found.keys() == expected.keys()
    errors = [0.0]
    for kind in ("model.", "optim.", "ema."):
        of_kind = {k: v.double() for k, v in expected.items() if k.startswith(kind)}
        total = sum(float(v.square().sum()) for v in of_kind.values())
        scale = (total / max(1, sum(v.numel() for v in of_kind.values()))) ** 0.5
        for name, value in of_kind.items():
            assert found[name].isfinite().all(), name
            size = value.norm() + 0.01 * scale * value.numel() ** 0.5
            errors.append(float((found[name] - value).norm() / size))
    return max(errors)


def curve(run: Path) -> list[list[float]]:
    """Return loss and top-1 of train and val of each epoch."""
    head, *rows = (line.split(",") for line in (run / "metrics.csv").read_text().splitlines())
    columns = [head.index(k) for k in ("train_loss", "train_top1", "val_loss", "val_top1")]
    return [[float(row[k]) for k in columns] for row in rows]


def same_curve(found: Path, expected: Path) -> None:
    assert len(curve(expected)) == EPOCHS
    for row, expected_row in zip(curve(found), curve(expected), strict=True):
        assert row[0] == pytest.approx(expected_row[0], rel=1e-9)
        assert row == pytest.approx(expected_row, rel=1e-6)  # val is judged in float32


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("dp=1")])
def test_curves_and_weights_are_those_of_one_process(finished: dict[str, Path], name: str) -> None:
    found, expected = finished[name], finished[f"{name.split()[0]} dp=1"]
    same_curve(found, expected)
    tensors = [latest_checkpoint(run / "state")[0] for run in (found, expected)]
    assert worst(*tensors) < 1e-8


@pytest.mark.parametrize("name", NAMES)
def test_the_best_weights_are_the_plain_models(finished: dict[str, Path], name: str) -> None:
    model, _ = load_model(finished[name])
    tensors, card = read_weights(finished[name] / "weights" / "best.safetensors")
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    assert {key: tensor.shape for key, tensor in tensors.items()} == shapes
    assert card is not None
    assert card.metrics["top1"] == curve(finished[name])[card.epoch - 1][3]


def check_continued(finished: dict[str, Path], found: Path, source: str, plan: str) -> None:
    expected = finished[f"{source.split()[0]} dp=1"]
    same_curve(found, expected)
    tensors, meta = latest_checkpoint(found / "state")
    assert meta["step"] == latest_checkpoint(expected / "state")[1]["step"]
    assert worst(tensors, latest_checkpoint(expected / "state")[0]) < 1e-8
    if source.split()[1] == plan:
        own = latest_checkpoint(finished[source] / "state")[0]
        assert all(torch.equal(tensors[name], own[name]) for name in own)


@pytest.fixture(scope="module")
def continued(
    finished: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Path]:
    return continue_under(finished, QUICK_WAYS, tmp_path_factory.mktemp("continued"))


@pytest.mark.parametrize(("source", "plan"), QUICK_WAYS)
def test_a_checkpoint_continues_under_another_plan(
    finished: dict[str, Path], continued: dict[tuple[str, str], Path], source: str, plan: str
) -> None:
    check_continued(finished, continued[source, plan], source, plan)


@pytest.mark.slow
def test_a_checkpoint_continues_under_any_plan(finished: dict[str, Path], tmp_path: Path) -> None:
    ways = [way for way in WAYS if way not in QUICK_WAYS]
    for (source, plan), run in continue_under(finished, ways, tmp_path).items():
        check_continued(finished, run, source, plan)


def test_an_image_that_one_rank_cannot_read(photos: Path, tmp_path: Path) -> None:
    """The first rank of a replica reads for all: what it lacks leaves on all of them."""
    found, expected = (
        new_run(photos, f"rich {plan}", tmp_path / plan, epochs=1, unfreeze_epoch=0)
        for plan in ("tp=2:channel", "dp=1")
    )
    run_ranks(train_all, 2, [str(found)], (0,))
    run_ranks(train_all, 1, [str(expected)], (0,))
    tensors, meta = latest_checkpoint(found / "state")
    expected_tensors, expected_meta = latest_checkpoint(expected / "state")
    assert worst(tensors, expected_tensors) < 1e-8
    assert meta["skipped"] == expected_meta["skipped"] == ["image 20: gone", "image 3: gone"]
