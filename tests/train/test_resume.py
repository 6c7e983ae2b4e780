"""A stopped and resumed run equals the uninterrupted one, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from meshuffle.cli import main
from meshuffle.config import TrainConfig, read_config
from meshuffle.errors import Interrupted, PlanError, RunError
from meshuffle.infer.predict import evaluate, predict
from meshuffle.planner.plan import read_plan
from meshuffle.train import loop
from meshuffle.train.api import resume, train
from meshuffle.train.checkpoint.checkpoint import locked
from meshuffle.train.checkpoint.intact import latest_checkpoint
from meshuffle.weights import read_weights

RICH: dict[str, Any] = {
    "epochs": 10,
    "optimizer": "adamw",
    "ema": 0.9,
    "mixup": 0.2,
    "dropout": 0.2,
    "accumulate": 2,
    "freeze": "until:conv1",
    "unfreeze_epoch": 3,
    "warmup_epochs": 1.5,
    "clip_norm": 1.0,
}


def stop_when(monkeypatch: pytest.MonkeyPatch, method: str, times: int) -> None:
    """Send this process SIGTERM when a method of the loop has been called so often."""
    original = getattr(loop.Loop, method)
    calls = 0

    def counted(self: loop.Loop, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == times:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments)

    monkeypatch.setattr(loop.Loop, method, counted)


def final_state(run: Path) -> dict[str, Tensor]:
    return latest_checkpoint(run / "state")[0]


@pytest.mark.parametrize(("method", "times"), [("_close_epoch", 5), ("_step", 9)])
def test_resume_is_exact(
    small: TrainConfig, monkeypatch: pytest.MonkeyPatch, method: str, times: int
) -> None:
    """Stopped after epoch 5 of 10, and in the middle of epoch 3 (where layers unfreeze)."""
    config = dataclasses.replace(small, **RICH)
    whole = Path(train(dataclasses.replace(config, out=f"{small.out}-whole"))["run"])
    with monkeypatch.context() as patch:
        stop_when(patch, method, times)
        with pytest.raises(Interrupted) as stopped:
            train(config)
        assert stopped.value.exit_code == 143
    run = Path(resume(Path(small.out or ""))["run"])
    expected, found = final_state(whole), final_state(run)
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different
    for name in ("best", "last"):
        a = read_weights(whole / "weights" / f"{name}.safetensors")[0]
        b = read_weights(run / "weights" / f"{name}.safetensors")[0]
        assert all(torch.equal(a[key], b[key]) for key in a)
    rows = [(path / "metrics.csv").read_text().splitlines() for path in (whole, run)]
    assert len(rows[0]) == len(rows[1]) == 11
    assert [r.split(",")[5:8] for r in rows[0]] == [r.split(",")[5:8] for r in rows[1]]


def test_another_seed_differs(small: TrainConfig) -> None:
    """Otherwise the test above would compare constants."""
    first = Path(train(dataclasses.replace(small, epochs=1))["run"])
    config = dataclasses.replace(small, epochs=1, seed=1, out=f"{small.out}-other")
    second = Path(train(config)["run"])
    a, b = final_state(first), final_state(second)
    assert not torch.equal(a["model.fc.weight"], b["model.fc.weight"])


def test_eval_and_predict_repeat_the_end_of_training(small: TrainConfig, photos: Path) -> None:
    result = train(small)
    run = Path(result["run"])
    evaluation, used = evaluate(run)
    assert used.endswith(" val")
    assert evaluation.metrics["top1"] == result["metrics"]["val"]["top1"]
    assert evaluation.metrics["loss"] == pytest.approx(result["metrics"]["val"]["loss"], 1e-4)
    images = sorted((photos / "val").rglob("*.png"))
    values = predict(run, [photos / "val"])
    hits = sum(v["label"] == p.parent.name for v, p in zip(values, images, strict=True))
    assert 100 * hits / len(images) == pytest.approx(evaluation.metrics["top1"])
    stored = json.loads((run / "result.json").read_text())
    assert stored["splits"]["val"]["top1"] == result["metrics"]["val"]["top1"]


def test_eval_takes_the_val_part_that_training_set_aside(
    small: TrainConfig, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = train(dataclasses.replace(small, data=str(photos / "train"), epochs=1))
    monkeypatch.chdir(photos)
    for data in (None, "train"):
        evaluation, used = evaluate(Path(result["run"]), data=data)
        assert used.endswith(" val")
        assert evaluation.num_samples < 13
        assert evaluation.metrics["top1"] == result["metrics"]["val"]["top1"]
    evaluation, used = evaluate(Path(result["run"]), data="val")  # another folder: all of it
    assert (used, evaluation.num_samples) == ("val", 12)


def test_resume_needs_a_run_with_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no config\.toml"):
        resume(tmp_path)


def test_a_run_in_use_is_refused(small: TrainConfig) -> None:
    run = Path(train(dataclasses.replace(small, epochs=1))["run"])
    with locked(run), pytest.raises(RunError, match="another process"):
        resume(run)


@pytest.mark.usefixtures("with_report")
def test_a_finished_run_resumes_to_the_same_result(small: TrainConfig) -> None:
    run = Path(train(small)["run"])
    before = (run / "weights" / "best.safetensors").read_bytes()
    shutil.rmtree(run / "plots", ignore_errors=True)
    resume(run)
    assert (run / "weights" / "best.safetensors").read_bytes() == before
    assert (run / "report.html").exists()


def test_a_run_continues_under_another_plan(
    small: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Down to rounding as the run that was never stopped, and from then on under that plan."""
    config = dataclasses.replace(small, ema=0.5, check_every=1)
    whole = Path(train(dataclasses.replace(config, out=f"{small.out}-whole"))["run"])
    with monkeypatch.context() as patch:
        stop_when(patch, "_step", 6)
        with pytest.raises(Interrupted):
            train(config)
    run = Path(small.out or "")
    before = [(run / name).read_bytes() for name in ("plan.json", "config.toml")]
    for plan, says in (
        ("dp=64", "64 ranks share a batch of 8"),
        ("dp=2,pp=2,mb=9", "4 images for"),
    ):
        with pytest.raises(PlanError, match=says):
            resume(run, plan=plan)
    with locked(run), pytest.raises(RunError, match="another process"):
        resume(run, plan="pp=2,mb=2,threads=1")
    assert before == [(run / name).read_bytes() for name in ("plan.json", "config.toml")]
    capsys.readouterr()
    resume(run, plan="dp=2,threads=1")
    assert "continuing under plan dp=2,threads=1 (was dp=1,threads=1)" in capsys.readouterr().out
    expected, found = final_state(whole), final_state(run)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)
    assert read_plan(run / "plan.json").dp == 2
    assert TrainConfig(**read_config(run / "config.toml")).plan == "dp=2,threads=1"
    resume(run)
    assert main(["train", "--resume", str(run), "--plan", "dp=2,threads=1"]) == 0
    assert "continuing under" not in capsys.readouterr().out
    resume(run, plan="pp=2,threads=1")
    assert "in some steps the batch norm" in capsys.readouterr().out
    assert len(read_plan(run / "plan.json").cuts) == 1
