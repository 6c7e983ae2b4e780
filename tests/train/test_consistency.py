"""Ranks that no longer hold the same are found, named, and stopped before anything is saved."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from meshuffle.config import TrainConfig, check
from meshuffle.errors import ConfigError, MeshuffleError
from meshuffle.parallel.place import Place
from meshuffle.report import report
from meshuffle.train import consistency, rank
from meshuffle.train.checkpoint.intact import latest_checkpoint
from meshuffle.train.consistency import fingerprint, members
from meshuffle.train.run import prepare
from tests.conftest import SMALL
from tests.ranks import as_launched, run_ranks

WORDS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16}
MODELS = {"tied": f"{__name__}:make_tied"}


class Tied(nn.Module):
    """Its convolution `mix` works at both ends, so that two stages have it."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem, self.mix = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 1)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.fc = nn.BatchNorm2d(8), nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.mix(self.stem(x)))
        x = F.relu(self.b(F.relu(self.norm(self.a(x)))))
        return self.fc(F.relu(self.mix(x)).mean((2, 3)))


def make_tied(num_classes: int) -> nn.Module:
    return Tied(num_classes)


def flip(tensor: Tensor, index: int = 0, bit: int = 0) -> None:
    """Turn over one bit of one element."""
    flat = tensor.data.as_strided((tensor.numel(),), (1,))  # in whatever order it lies
    words = flat.view(WORDS.get(tensor.dtype, tensor.dtype))
    mask = torch.ones((), dtype=words.dtype) << bit
    words[index] ^= mask


@settings(suppress_health_check=[HealthCheck.filter_too_much])  # of floats that float16 lacks
@given(st.sampled_from(list(WORDS)), st.integers(1, 40), st.integers(0, 63), st.data())
def test_one_bit_changes_the_fingerprint(
    dtype: torch.dtype, size: int, bit: int, data: st.DataObject
) -> None:
    values = data.draw(st.lists(st.floats(width=16), min_size=size, max_size=size))
    x = torch.tensor(values, dtype=dtype)
    y = x.clone()
    flip(y, data.draw(st.integers(0, size - 1)), bit % (8 * dtype.itemsize))
    assert fingerprint(x) != fingerprint(y)
    assert fingerprint(x) == fingerprint(x.clone())


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=2, max_size=9), st.data())
def test_two_exchanged_elements_change_it(values: list[int], data: st.DataObject) -> None:
    i, j = data.draw(st.lists(st.integers(0, len(values) - 1), min_size=2, max_size=2))
    x = torch.tensor(values)
    y = x.clone()
    y[i], y[j] = x[j], x[i]
    assert (fingerprint(x) == fingerprint(y)) == torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64])
def test_two_bits_in_two_elements_do_not_cancel(dtype: torch.dtype) -> None:
    """The sign of two float64 did, while an element was one number of 64 bits."""
    x = torch.arange(6).to(dtype)
    for bit in range(8 * dtype.itemsize):
        for i, j in ((0, 1), (2, 5), (0, 4)):
            y = x.clone()
            flip(y, i, bit)
            flip(y, j, bit)
            assert fingerprint(x) != fingerprint(y), (i, j, bit)


def test_signs_of_zero_and_kinds_of_nan_count() -> None:
    zeros, nans = torch.zeros(3), torch.full((3,), torch.nan)
    other = nans.clone()
    flip(other, 1)
    assert other.isnan().all()
    assert fingerprint(zeros) != fingerprint(-zeros)
    assert fingerprint(nans) != fingerprint(other)


@pytest.mark.parametrize("index", [0, consistency._BLOCK - 1, consistency._BLOCK, -1])
def test_all_blocks_and_no_strides_count(index: int) -> None:
    x = torch.zeros(2 * consistency._BLOCK + 8).view(2, 2, 1, -1)
    y = x.contiguous(memory_format=torch.channels_last)
    assert fingerprint(x) == fingerprint(y)
    flip(x, index)
    assert fingerprint(x) != fingerprint(y)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.complex64, torch.complex128])
def test_other_types_and_empty_tensors(dtype: torch.dtype) -> None:
    x = torch.zeros(5, dtype=dtype)
    y = x.clone()
    y[3] = 1
    assert fingerprint(x) != fingerprint(y)
    assert fingerprint(x[:0]) == 0


def test_who_must_agree() -> None:
    place = Place(dp=2, tp=2, pp=2)
    assert members((None, (0,)), place) == [0, 1, 2, 3]
    assert members((1, (1,)), place) == [5, 7]
    assert members((None, (0, 1)), place) == list(range(8))


# Runs

Fault = tuple[int, str, int]
"""The rank whose tensor (a parameter or buffer, or `step`) changes by a bit, and in which step."""


def train_broken(
    group: dist.ProcessGroup, runs: list[tuple[str, Fault | None]]
) -> list[str | None]:
    """Train each run folder as one rank; returns what stopped it, or None."""
    as_launched(group)
    report.write_report = lambda *_, **__: None  # type: ignore[assignment]  # seconds each
    texts: list[str | None] = []
    for run, fault in runs:
        with pytest.MonkeyPatch.context() as patch:
            if fault is not None and fault[0] == dist.get_rank(group):
                plant(patch, fault)
            try:
                rank.train_rank(Path(run))
                texts.append(None)
            except MeshuffleError as error:
                texts.append(str(error))
                assert error.exit_code == 1
    return texts


def plant(patch: pytest.MonkeyPatch, fault: Fault) -> None:
    original: Callable[..., Any] = consistency.Consistency.after_step

    def after_step(self: consistency.Consistency) -> None:
        state, (_, name, step) = self._state, fault
        if state.progress.step == step and name == "step":
            state.progress.step += 1
        elif state.progress.step == step:
            flip(consistency.replicated(state)[name][1])
        original(self)

    patch.setattr(consistency.Consistency, "after_step", after_step)


def new_run(photos: Path, plan: str, out: Path, **changes: Any) -> Path:
    is_tied = "pp" in plan
    values: dict[str, Any] = {"epochs": 2, "batch": 8, "save_every": "3", "check_every": 1}
    config = TrainConfig(
        data=str(photos),
        model=MODELS["tied"] if is_tied else "shufflenet_v2_x0_5",
        knobs={} if is_tied else SMALL,
        plan=plan,
        input_size=32,
        workers=0,
        compile="off",
        out=str(out),
        **values | changes,
    )
    return prepare(config, {}).run


FAULTS: dict[str, tuple[str, Fault, dict[str, Any]]] = {
    "parameter": ("dp=2", (1, "fc.weight", 5), {}),
    "buffer": ("dp=2", (0, "conv1.1.running_var", 5), {}),
    "average": ("dp=2", (1, "ema.fc.weight", 5), {"ema": 0.9}),
    "steps": ("dp=2", (1, "step", 5), {}),
    "central": ("dp=2:central", (1, "conv1.0.weight", 5), {}),
    "before a checkpoint": ("dp=2", (1, "fc.bias", 5), {"check_every": 1000}),
    "over tp": ("tp=2:batch", (1, "fc.weight", 5), {}),
}
FAULTS_OF_4: dict[str, tuple[str, Fault, dict[str, Any]]] = {
    "of a stage": ("dp=2,pp=2,mb=2", (3, "fc.weight", 5), {}),
    "tied": ("dp=2,pp=2,mb=2", (2, "mix.weight", 5), {}),
    "of a part": ("dp=2,tp=2:channel", (3, "stage3.0.branch2.3.weight", 5), {}),
}
# The runs above are healthy too until their fifth step; and those of test_split_training.
HEALTHY = ("tp=2:spatial",)
HEALTHY_OF_4 = ("tp=2:channel,pp=2:zbv,mb=4",)


def run_name(world: int, number: int) -> str:
    return f"{world}-{number}"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stopped")


@pytest.fixture(scope="module")
def stopped(photos: Path, home: Path) -> dict[str, list[str | None]]:
    """What stopped each rank, by fault; `healthy PLAN` has none."""
    found = {}
    for world, faults, plans in ((2, FAULTS, HEALTHY), (4, FAULTS_OF_4, HEALTHY_OF_4)):
        cases: dict[str, tuple[str, Fault | None, dict[str, Any]]] = {
            f"{world}: {name}": fault for name, fault in faults.items()
        }
        cases |= {f"healthy {plan}": (plan, None, {}) for plan in plans}
        runs = []
        for i, (plan, fault, changes) in enumerate(cases.values()):
            runs.append((str(new_run(photos, plan, home / run_name(world, i), **changes)), fault))
        rows = run_ranks(train_broken, world, runs)
        found |= dict(zip(cases, zip(*rows, strict=True), strict=True))
    return found


@pytest.mark.parametrize("plan", [*HEALTHY, *HEALTHY_OF_4])
def test_healthy_ranks_agree_bit_for_bit(stopped: dict[str, list[str | None]], plan: str) -> None:
    assert set(stopped[f"healthy {plan}"]) == {None}


def text_of(stopped: dict[str, list[str | None]], name: str) -> str:
    first, *others = stopped[name]
    assert first is not None
    assert set(others) == {first}
    return first


@pytest.mark.parametrize("name", FAULTS)
def test_two_ranks_that_differ(stopped: dict[str, list[str | None]], home: Path, name: str) -> None:
    _, (_, tensor, _), _ = FAULTS[name]
    what = "the number of steps done" if tensor == "step" else tensor
    text, run = text_of(stopped, f"2: {name}"), home / run_name(2, list(FAULTS).index(name))
    at = 6 if name == "before a checkpoint" else 5
    assert f"found after step {at}: {what} of rank 1 differs from that of rank 0" in text
    assert "continue from step 3, the last checkpoint, with: meshuffle train --resume" in text
    assert text.endswith(str(run))
    assert latest_checkpoint(run / "state")[1]["step"] == 3


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("of a stage", "fc.weight of rank 3 differs from that of rank 2"),
        ("tied", "mix.weight of rank 2 differs from that of ranks 0, 1, 3"),
        ("of a part", "stage3.0.branch2.3.weight of rank 3 differs from that of rank 1"),
    ],
)
def test_some_of_four_ranks(stopped: dict[str, list[str | None]], name: str, says: str) -> None:
    assert says in text_of(stopped, f"4: {name}")


def test_a_stopped_run_continues(stopped: dict[str, list[str | None]], home: Path) -> None:
    run = home / run_name(2, list(FAULTS).index("parameter"))
    text_of(stopped, "2: parameter")
    assert run_ranks(train_broken, 2, [(str(run), None)]) == [[None], [None]]
    assert latest_checkpoint(run / "state")[1]["step"] == 8


def test_the_setting(small: TrainConfig) -> None:
    off = dataclasses.replace(small, check_every=0)
    assert check(off) == off
    with pytest.raises(ConfigError, match="--check-every -1: must be at least 0"):
        check(dataclasses.replace(small, check_every=-1))
