"""Eight-bit files: what they cost is measured on the validation split, and too much is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from meshuffle.cli import main
from meshuffle.data import Preprocess, open_data
from meshuffle.deploy.api import export, write
from meshuffle.deploy.formats import find_format
from meshuffle.deploy.formats.base import Format, Precision, Run
from meshuffle.deploy.int8 import Int8, points_lost
from meshuffle.deploy.preprocessed import Preprocessed, with_preprocessing
from meshuffle.deploy.subject import Subject
from meshuffle.errors import ConfigError, ParityError
from meshuffle.models import create_model
from meshuffle.models.detections import Decoded, best_boxes, detections
from meshuffle.models.detector import anchors_for, create_detector
from meshuffle.tasks import make_task
from meshuffle.tasks.base import Metric
from meshuffle.tasks.card import Card
from meshuffle.weights import save_weights
from tests.deploy.networks import TINY

PREPROCESS = Preprocess(crop=32, resize=32)
CARD = Card(model="small", classes=tuple(map(str, range(10))), preprocess=PREPROCESS, data="digits")


@cache
def make_subject() -> Subject:
    """A linear classifier of digits, solved by least squares."""
    source = open_data("digits").splits["train"]
    views = torch.stack([PREPROCESS.to_uint8(source.image(i)) for i in range(len(source))])
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(512, 10))
    torch.manual_seed(0)
    nn.init.normal_(network[0].weight)
    with torch.no_grad():
        x = network[:3](PREPROCESS.normalise(views))
        x = torch.cat((x, torch.ones(len(x), 1)), 1).double()
        y = 8 * nn.functional.one_hot(torch.from_numpy(source.labels), 10).double() - 4
        solved = torch.linalg.solve(x.T @ x + 50 * torch.eye(513).double(), x.T @ y).float()
        network[3].weight.copy_(solved[:-1].T)
        network[3].bias.copy_(solved[-1])
    return Subject(network, CARD, views[:8])


@pytest.fixture(scope="module")
def int8() -> Int8:
    return Int8(make_subject(), None, num_images=40, max_drop=5)


FORMATS = ["onnx", "openvino", pytest.param("executorch", marks=pytest.mark.slow)]


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_of_eight_bits_says_what_it_costs(tmp_path: Path, int8: Int8, name: str) -> None:
    form, subject = find_format(name), make_subject()
    plain = write(form, subject, tmp_path / f"model{form.suffix}")
    path = tmp_path / f"model.int8{form.suffix}"
    parity = write(form, subject, path, int8=int8)
    change = parity.change
    assert change is not None
    assert change.metric == "top1" and change.num_images == 143
    assert change.before > 85 and change.points == pytest.approx(change.before - change.after)
    assert change.points <= 5
    assert str(parity).endswith(
        f"; int8: top-1 {change.before:.2f} % → {change.after:.2f} % on 143 images of digits val"
    )
    assert parity.max_relative_error > 1e-4  # it is not the float file
    assert parity.max_abs_error > plain.max_abs_error
    assert Card.from_json(form.metadata(path)["meshuffle"]) == CARD


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_loses_too_much_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, int8: Int8, name: str
) -> None:
    form, fired = find_format(name), []
    path = tmp_path / f"model.int8{form.suffix}"
    path.write_bytes(b"the old file")
    load = type(form).load

    def faulty(self: Format, path: Path, threads: int, precision: Precision) -> Run:
        run = load(self, path, threads, precision)
        fired.append(name)

        def first_two_swapped(x: NDArray[Any]) -> NDArray[np.float32]:
            return run(x)[:, [1, 0, *range(2, 10)]]

        return first_two_swapped

    monkeypatch.setattr(type(form), "load", faulty)
    with pytest.raises(ParityError) as caught:
        write(form, make_subject(), path, int8=int8)
    assert fired
    assert str(caught.value).startswith(f"{name} in int8 loses too much: top-1 {int8.before:.2f} %")
    assert "points; --max-drop (=5) is the limit. Nothing was written" in str(caught.value)
    assert path.read_bytes() == b"the old file"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", FORMATS)
def test_preprocessing_goes_in_front_of_eight_bits(tmp_path: Path, int8: Int8, name: str) -> None:
    form, whole = find_format(name), make_whole(find_format(name))
    path = tmp_path / f"model.int8{form.suffix}"
    parity = write(form, whole, path, int8=int8)
    assert parity.input.startswith("uint8 [batch, ")
    assert parity.change is not None and parity.change.points <= 5
    assert parity.max_relative_error > 1e-4  # the network has eight bits
    assert parity.image_relative_error is not None and parity.image_relative_error < 1e-4
    assert form.metadata(path)["input"] == whole.input


def make_whole(form: Format) -> Subject:
    source = open_data("digits").splits["test"]
    images = [source.image(i).resize((40 + i, 32)) for i in range(5)]
    return with_preprocessing(make_subject(), images, any_size=form.any_size)


@pytest.mark.parametrize("name", FORMATS)
def test_other_preprocessing_in_front_of_eight_bits_is_refused(
    tmp_path: Path, int8: Int8, name: str
) -> None:
    form = find_format(name)
    whole, path = make_whole(form), tmp_path / f"model.int8{form.suffix}"
    wrong = dataclasses.replace(PREPROCESS, mean=(2.0, 2.0, 2.0))
    whole._preprocessed = lambda network: Preprocessed(network, wrong)
    with pytest.raises(ParityError, match="preprocessing disagrees with Pillow"):
        write(form, whole, path, int8=int8)
    assert not list(tmp_path.iterdir())


def test_calibration_images_come_from_the_whole_training_split(int8: Int8) -> None:
    source = open_data("digits").splits["train"]
    ends = torch.stack([PREPROCESS.to_uint8(source.image(i)) for i in (0, len(source) - 1)])
    assert torch.equal(int8.images_NCHW[[0, -1]], ends)
    assert [x.shape for x in int8.inputs(25)] == [(25, 3, 32, 32), (15, 3, 32, 32)]


@pytest.mark.parametrize(
    ("metric", "before", "after", "points"),
    [
        (Metric("top1", "top-1"), 90.0, 88.5, 1.5),
        (Metric("r2", "R²", ""), 0.5, 0.49, 2.0),
        (Metric("fid", "FID", "", lower=True), 50.0, 51.0, 2.0),
        (Metric("top1", "top-1"), 90.0, 91.0, -1.0),
    ],
)
def test_points(metric: Metric, before: float, after: float, points: float) -> None:
    assert points_lost(metric, before, after) == pytest.approx(points)


@pytest.mark.parametrize(
    ("ask", "line"),
    [
        (lambda: find_format("pt2").require(int8=True), "--int8: pt2 is not supported; use onnx"),
        (lambda: find_format("litert").require(int8=True), "--int8: litert is not supported"),
        (lambda: export(Path("x"), max_drop=2.0), "--max-drop 2 needs --int8"),
        (lambda: Int8(make_subject(), None, max_drop=-1), r"--max-drop \(=-1\) must be"),
        (lambda: Int8(make_subject(), None, max_drop=math.nan), r"--max-drop \(=nan\) must be"),
    ],
)
def test_what_makes_no_sense_is_refused(ask: Callable[[], object], line: str) -> None:
    with pytest.raises(ConfigError, match=f"^{line}"):
        ask()


def test_values_are_judged_in_their_units() -> None:
    card = Card(
        model="small",
        classes=("a", "b"),
        preprocess=PREPROCESS,
        task="regress",
        settings={"mean": [5.0, 7.0], "std": [2.0, 3.0]},
    )
    task, outputs, targets = make_task(card), torch.randn(6, 2), torch.randn(6, 2)
    values = outputs * torch.tensor([2.0, 3.0]) + torch.tensor([5.0, 7.0])
    judged, deployed = task.judge(outputs, targets), task.judge_deployed(values, targets)
    for key, column in judged.items():
        torch.testing.assert_close(deployed[key], column)


@pytest.mark.parametrize("head", ["ssdlite", "fpn"])
def test_boxes_of_a_file_are_those_of_the_detector(head: str) -> None:
    knobs = TINY["shufflenet_v2_x0_5"]
    network = create_detector(head, "shufflenet_v2_x0_5", 2, seed=0, knobs=knobs).eval()
    anchors, x_NCHW = anchors_for(head, (64, 64)), torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        expected = detections(head, network(x_NCHW), anchors)
        found = best_boxes(Decoded(network, head, anchors)(x_NCHW))
    torch.testing.assert_close(found, expected)


def test_the_command_says_both_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    knobs = TINY["shufflenet_v2_x0_5"]
    network = create_model("shufflenet_v2_x0_5", num_classes=10, seed=0, **knobs)
    card = Card("shufflenet_v2_x0_5", CARD.classes, PREPROCESS, knobs=knobs, data="digits")
    weights = tmp_path / "best.safetensors"
    save_weights(weights, network.state_dict(), card)
    asked = ["export", str(weights), "--to", "onnx", "--int8", "--max-drop", "100", "--json"]
    assert main(asked) == 0
    said = json.loads(capsys.readouterr().out)["onnx"]
    assert said["file"] == str(tmp_path / "export" / "model.int8.onnx")
    assert Path(said["file"]).stat().st_size == said["file_bytes"]
    assert {"metric", "before", "after", "points", "num_images"} <= set(said["change"])
    assert main(["export", str(weights), "--to", "pt2", "--int8"]) == 2
    assert capsys.readouterr().err.startswith("error: --int8: pt2 is not supported")
