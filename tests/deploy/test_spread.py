"""`predict --plan auto`: as many replicas as are fastest, where there is enough to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshuffle.deploy import spread
from meshuffle.deploy.serve.measure import Layout
from meshuffle.deploy.spread import WORTH_IMAGES, spread_over
from tests.deploy.serving import make_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_weights(tmp_path_factory.mktemp("weights") / "small.safetensors")


def test_few_images_are_not_worth_a_measurement(tmp_path: Path) -> None:
    said: list[str] = []
    plan = spread_over(tmp_path / "not looked at", None, WORTH_IMAGES - 1, 64, said.append)
    assert str(plan) == "dp=1" and not said


def test_many_are_measured(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "num_cores", lambda: 2)
    said: list[str] = []
    plan = spread_over(weights, None, WORTH_IMAGES, 64, said.append)
    assert plan.num_ranks * (plan.threads or 0) == 2
    assert "2 × 1 thread" in said[-1] and "1 × 2 threads" in said[-1]


def test_replicas_are_no_more_than_the_batch(weights: Path) -> None:
    assert spread_over(weights, None, WORTH_IMAGES, 1, lambda line: None).dp == 1


def test_under_a_launcher_its_ranks_are_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in {"RANK": 0, "WORLD_SIZE": 3, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 3}.items():
        monkeypatch.setenv(key, str(value))
    assert str(spread_over(tmp_path, None, 1, 64, lambda line: None)) == "dp=3"


@pytest.mark.parametrize(
    ("one", "two", "best"), [(90.0, 100.0, 2), (98.0, 100.0, 1), (100.0, 90.0, 1)]
)
def test_what_is_as_good_as_equal_starts_fewer_processes(
    one: float, two: float, best: int, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(_: object, layout: Layout, batches: tuple[int], *__: object) -> dict[int, float]:
        return {batches[0]: {1: one, 2: two}[layout.replicas]}

    monkeypatch.setattr(spread, "num_cores", lambda: 2)
    monkeypatch.setattr(spread, "measured", measured)
    monkeypatch.setattr(spread, "fork_server", lambda name: None)
    assert spread_over(weights, None, WORTH_IMAGES, 64, lambda line: None).dp == best
