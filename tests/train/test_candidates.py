"""`--plan auto`: which plans are timed, and that the fastest is taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest

from meshuffle.config import TrainConfig
from meshuffle.data import Preprocess
from meshuffle.errors import MeshuffleError
from meshuffle.planner.plan import Plan
from meshuffle.tasks.card import Card
from meshuffle.train import candidates
from meshuffle.train.candidates import candidate_plans, choose, fastest_plan, time_plans
from meshuffle.train.state import model_knobs
from tests.conftest import SMALL


@pytest.mark.parametrize(
    ("batch", "cores", "gpus", "expected"),
    [
        (64, 1, 0, ["dp=1,threads=1"]),
        (64, 2, 0, ["dp=1,threads=2", "dp=2,threads=1", "dp=1,threads=1"]),
        (1, 8, 0, ["dp=1,threads=8", "dp=1,threads=1"]),
        (3, 8, 0, ["dp=1,threads=8", "dp=2,threads=4", "dp=1,threads=1"]),
        (64, 8, 1, ["dp=1"]),
        (64, 8, 4, ["dp=1", "dp=4"]),
        (2, 8, 4, ["dp=1"]),
    ],
)
def test_plans_worth_timing(batch: int, cores: int, gpus: int, expected: list[str]) -> None:
    found = candidate_plans(batch, cores, gpus)
    assert [str(plan) for plan in found] == expected
    assert all(plan.num_ranks <= batch for plan in found)


def settings(batch: int = 4, **knobs: str) -> TrainConfig:
    return TrainConfig(
        data="digits",
        model="shufflenet_v2_x0_5",
        knobs={**SMALL, **knobs},
        batch=batch,
        input_size=32,
        lr=0.1,
        weight_decay=0.0,
        epochs=1,
        crop_scale=0.0,
        flip=0.0,
        affine_degrees=0.0,
        affine_translate=0.0,
        affine_scale=0.0,
        trivial_augment=False,
        erasing=0.0,
        mixup=0.0,
        cutmix=0.0,
        repeats=1,
    )


CARD = Card("shufflenet_v2_x0_5", tuple("0123456789"), Preprocess.imagenet(32))


def card_of(config: TrainConfig) -> Card:
    return dataclasses.replace(CARD, model=config.model, knobs=model_knobs(config))


def test_the_fastest_is_taken_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(config: TrainConfig, card: Card, plans: list[Plan]) -> Mapping[str, float]:
        return {str(plan): 10.0 + plan.dp - 5 * (plan.dp == 2) for plan in plans}

    monkeypatch.setattr(candidates, "time_plans", timed)
    plan, lines = fastest_plan(settings(), CARD, 2, 0)
    assert plan == Plan(dp=2, threads=1)
    assert plan.predicted_step_ms == 7.0
    assert lines == [
        "plan dp=2,threads=1: the fastest here "
        "(dp=1,threads=2 11 ms, dp=2,threads=1 7 ms, dp=1,threads=1 11 ms a step)"
    ]


def test_one_candidate_needs_no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "time_plans", None)
    plan, lines = fastest_plan(settings(), CARD, 1, 0)
    assert plan == Plan(dp=1, threads=1)
    assert "the only candidate" in lines[0]
    on_cpu = dataclasses.replace(settings(), device="cpu")
    assert fastest_plan(on_cpu, CARD, 1, 8)[0] == Plan(dp=1, threads=1)


@pytest.mark.usefixtures("real_torchrun")
def test_candidates_are_timed_for_real() -> None:
    """Two plans, with knobs that need the input's size, in ranks of their own."""
    config = dataclasses.replace(settings(kernel_size="auto"), accumulate=2, dropout=0.1)
    plans = [Plan(dp=1, threads=1), Plan(dp=2, threads=1)]
    times = time_plans(config, card_of(config), plans)
    assert list(times) == ["dp=1,threads=1", "dp=2,threads=1"]
    assert all(0 < ms < 60_000 for ms in times.values())


@pytest.mark.slow
def test_what_fails_there_is_one_line() -> None:
    with pytest.raises(MeshuffleError, match="has no knob `colour`") as error:
        config = settings(colour="red")
        time_plans(config, card_of(config), [Plan(dp=2, threads=1)])
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


def test_fewer_cores_decide_where_times_are_equal() -> None:
    assert choose({"dp=2,threads=1": 100.0, "dp=1,threads=1": 104.9})[0] == "dp=1,threads=1"
    found = choose({"dp=2,threads=1": 100.0, "dp=1,threads=1": 106.0})
    assert found == ("dp=2,threads=1", "the fastest here")
    assert choose({"dp=1,threads=2": 104.0, "dp=2,threads=1": 100.0})[0] == "dp=2,threads=1"
    assert choose({"dp=2": 100.0, "dp=1": 99.0}) == ("dp=1", "the fastest here")
