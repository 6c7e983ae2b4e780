"""A run folder, a checkpoint and exports load that were made at 762e355, before folders moved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from meshuffle.deploy.formats import find_format
from meshuffle.infer.predict import evaluate
from meshuffle.train.api import resume
from meshuffle.weights import load_model

OLD = Path(__file__).parent / "run_762e355"


def test_the_weights_have_the_metrics_that_they_had() -> None:
    found, used = evaluate(OLD / "run")
    assert used == "digits test" and found.num_samples == 359
    assert load_model(OLD / "run")[1].metrics["top1"] == pytest.approx(81.12, abs=0.01)
    assert evaluate(OLD / "run", split="val")[0].metrics["top1"] == pytest.approx(81.12, abs=0.8)


def test_the_interrupted_run_goes_on_to_its_end(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(OLD / "run", run)
    assert not (run / "result.json").exists()
    result = resume(run)  # it was stopped in epoch 4 of 4
    assert result["metrics"]["test"]["top1"] == pytest.approx(89.42, abs=1.5)
    finished = load_model(run)[0].state_dict()
    for name, tensor in load_model(OLD / "finished.safetensors")[0].state_dict().items():
        torch.testing.assert_close(finished[name], tensor, rtol=0.05, atol=5e-3)


@pytest.mark.parametrize("name", ["onnx", "pt2"])
def test_an_export_computes_what_its_model_does(name: str) -> None:
    network, card = load_model(OLD / "finished.safetensors")
    height, width = card.preprocess.size
    x_NCHW = torch.randn((3, 3, height, width), generator=torch.Generator().manual_seed(0))
    form = find_format(name)
    outputs = form.open(OLD / f"model{form.suffix}", threads=1)(x_NCHW.numpy())
    with torch.inference_mode():
        expected = network(x_NCHW).numpy()
    assert np.allclose(outputs, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("has_start", [True, False])
def test_a_run_that_began_from_weights_is_judged_again(tmp_path: Path, has_start: bool) -> None:
    """It has averaged weights; without its copy of the first ones, those that it names serve."""
    run = tmp_path / "run"
    shutil.copytree(OLD / "from", run)
    if not has_start:
        (run / "weights" / "start.safetensors").unlink()
        text = (run / "config.toml").read_text()
        (run / "config.toml").write_text(
            text.replace('"runs/first"', f'"{OLD / "finished.safetensors"}"')
        )
    before = json.loads((run / "result.json").read_text())
    result = resume(run)
    assert result["metrics"]["test"]["top1"] == pytest.approx(
        before["splits"]["test"]["top1"], abs=0.6
    )
    assert "all epochs are done" in (run / "log.jsonl").read_text()
    compared = json.loads((run / "result.json").read_text())["compared"]
    assert bool(compared) is has_start
