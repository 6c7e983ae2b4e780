"""A service whose replicas are several ranks: `serve --plan`."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from meshuffle.cli import main
from meshuffle.deploy.serve.backends import Backend
from meshuffle.deploy.serve.measure import Layout, layouts, measured
from meshuffle.errors import RunError
from tests.deploy.serving import Served, make_weights, photos, served, until

RANKS = 2


def answer_of(service: Served) -> list[dict[str, Any]]:
    files = [("image", (name, content)) for name, content in photos().items()]
    answer = httpx.post(service.url + "/predict", files=files, timeout=60)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["predictions"])


def close(one: Any, other: Any) -> bool:
    """Whether two answers agree; numbers to 1e-4."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(close, one, other))
    return one == pytest.approx(other, abs=1e-4) if isinstance(one, float) else one == other


@pytest.mark.parametrize(
    ("task", "plan"),
    [
        ("classify", "tp=2:channel"),
        pytest.param("classify", "pp=2", marks=pytest.mark.slow),
        pytest.param("segment", "tp=2:spatial", marks=pytest.mark.slow),
    ],
)
def test_the_answers_are_those_of_one_process(task: str, plan: str, tmp_path: Path) -> None:
    weights = make_weights(tmp_path / "w.safetensors", task)
    with served(weights, "--replicas", "1") as service:
        expected = answer_of(service)
    with served(weights, "--replicas", "1", "--plan", plan) as service:
        assert service.told["ranks"] == RANKS
        assert service.told["backend"] == f"torch, dp=1,{plan}"
        assert close(answer_of(service), expected)
        assert len(service.replicas()) == len(service.ranks()) == 1
        code, said = service.stop()
    assert code == 0 and "Traceback" not in said and "exit code" not in said


def test_a_rank_that_is_killed_takes_its_replica_along_and_both_come_back(tmp_path: Path) -> None:
    weights = make_weights(tmp_path / "w.safetensors")
    with served(weights, "--replicas", "1", "--plan", "tp=2") as service:
        expected = answer_of(service)
        for victims in (service.ranks, service.replicas):
            before = service.ranks() + service.replicas()
            os.kill(victims()[0], signal.SIGKILL)
            until(lambda: not set(service.ranks() + service.replicas()) & set(before))  # noqa: B023
            until(lambda: is_ready(service))
            assert close(answer_of(service), expected)
        code, said = service.stop()
    assert code == 0 and "rank 1 of a replica ended with exit code -9" in said


def is_ready(service: Served) -> bool:
    try:
        return httpx.get(service.url + "/ready").status_code == 200
    except httpx.HTTPError:
        return False


def test_it_is_measured(tmp_path: Path) -> None:
    weights = make_weights(tmp_path / "w.safetensors")
    backend = Backend("torch", str(weights), plan="tp=2")
    found = measured(backend, Layout(1, 1, ranks=RANKS), (1, 3), (64, 64), seconds=0.05)
    assert found.keys() == {1, 3} and all(speed > 0 for speed in found.values())


def test_the_layouts() -> None:
    def of(*arguments: int) -> list[tuple[int, int]]:
        return [(one.replicas, one.threads) for one in layouts(*arguments)]

    assert of(8, 0, 2) == [(4, 1), (2, 2), (1, 4)]
    assert of(2, 0, 4) == [(1, 1)]
    assert of(8, 4, 2) == [(2, 2)]
    assert str(layouts(8, 0, 2)[0]) == "4 × 2 ranks × 1 thread"


def test_plans_that_cannot_be_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = make_weights(tmp_path / "w.safetensors")

    def fails(*arguments: str) -> str:
        assert main(["serve", str(weights), *arguments]) in (2, 3)
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "--replicas and --threads instead of dp" in fails("--plan", "dp=2,tp=2")
    assert "--replicas and --threads instead of dp" in fails("--plan", "threads=2")
    assert "leave out --plan" in fails("--plan", "tp=2", "--backend", "onnx")
    assert "tp" in fails("--plan", "tp=x")


def test_weights_that_are_gone_are_named(tmp_path: Path) -> None:
    backend = Backend("torch", str(tmp_path / "gone.safetensors"), plan="tp=2")
    with pytest.raises(RunError, match=r"gone\.safetensors"):
        backend.open(1)
