"""A plan that would compute something else than one device does is refused at the start."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from torch import Tensor, nn

from meshuffle.comm.group import RankEnv
from meshuffle.config import TrainConfig
from meshuffle.errors import ModelError
from meshuffle.planner.plan import Plan
from meshuffle.train import run as runs
from meshuffle.train.run import prepare


class Centred(nn.Module):
    """Takes the mean of the batch off each sample."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x - x.mean(0, keepdim=True)).flatten(1))


def config(folder: Path, plan: str) -> TrainConfig:
    return TrainConfig(
        data="digits", model=f"{__name__}:Centred", input_size=8, plan=plan, batch=8,
        epochs=1, compile="off", out=folder / "run",
    )  # fmt: skip


@pytest.mark.parametrize("plan", ["dp=2", "tp=2,mb=2"])
def test_replicas_of_a_model_that_mixes_samples_are_refused(tmp_path: Path, plan: str) -> None:
    with pytest.raises(ModelError, match=r"mixes the samples of a batch: aten.mean.dim"):
        prepare(config(tmp_path, plan), {})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("plan", ["dp=2", "tp=2,mb=2"])
def test_the_user_may_go_on_and_is_told(tmp_path: Path, plan: str) -> None:
    prepared = prepare(dataclasses.replace(config(tmp_path, plan), allow_inexact=True), {})
    assert prepared.plan.num_ranks == 2
    assert any(line.startswith("inexact: ") for line in prepared.lines)


def test_auto_takes_an_exact_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "fastest_plan", lambda *_: (Plan(dp=2, threads=1), []))
    prepared = prepare(config(tmp_path, "auto"), {})
    assert prepared.plan.dp == 1
    assert any("dp=1 in place of dp=2" in line for line in prepared.lines)


def test_ranks_that_a_launcher_started_stay_as_many(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="--allow-inexact"):
        prepare(config(tmp_path, "auto"), {}, RankEnv(0, 2, 0, 2))
