"""Every task's network becomes a file of every format."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from meshuffle.data import Preprocess
from meshuffle.deploy.api import export, write_file
from meshuffle.deploy.formats import find_format
from meshuffle.errors import ConfigError
from meshuffle.tasks import make_task
from meshuffle.tasks.card import Card
from meshuffle.weights import save_weights
from tests.deploy.networks import TINY

SIZE = 64
NAME = "shufflenet_v2_x0_5"
TASKS: list[tuple[str, dict[str, Any], str]] = [
    ("multilabel", {}, "logits"),
    ("regress", {"mean": [1.0, 2.0], "std": [2.0, 3.0]}, "values"),
    ("segment", {"head": "lraspp"}, "logits"),
    ("detect", {"head": "ssdlite"}, "boxes"),
    ("detect", {"head": "fpn"}, "boxes"),
    ("generate", {}, "images"),
]
GAN = {"width": 8, "noise": 6}
QUICK = [("openvino", "regress"), ("pt2", "regress"), ("openvino", "segment"), ("pt2", "generate")]
PREPROCESS = Preprocess(crop=SIZE, resize=None, fit="stretch")


def make_card(task: str, settings: dict[str, Any], **knobs: Any) -> Card:
    return Card(NAME, ("a", "b"), PREPROCESS, task=task, settings=settings, knobs=knobs)


CASES = [
    pytest.param(form, *case, marks=[] if (form, case[0]) in QUICK else [pytest.mark.slow])
    for form in ("onnx", "openvino", "executorch", "pt2")
    for case in TASKS
]


@pytest.mark.parametrize(("name", "task", "settings", "outputs"), CASES)
def test_a_task_has_a_file(
    tmp_path: Path, name: str, task: str, settings: dict[str, Any], outputs: str
) -> None:
    card = make_card(task, settings, **(GAN if task == "generate" else TINY[NAME]))
    assert make_task(card).outputs == outputs
    network = make_task(card).network(0)
    images = torch.randint(0, 256, (8, 3, SIZE, SIZE), dtype=torch.uint8)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        network.train()(PREPROCESS.normalise(images))
    form = find_format(name)
    path = tmp_path / f"model{form.suffix}"
    assert write_file(form, network, card, path, images).max_relative_error < 1e-4
    assert form.metadata(path)["meshuffle"] == card.to_json()


@pytest.mark.parametrize("channels", ["RGB", "BGR"])
def test_the_file_of_a_gan_makes_what_it_samples(tmp_path: Path, channels: str) -> None:
    preprocess = dataclasses.replace(PREPROCESS, channels=channels)
    card = dataclasses.replace(make_card("generate", {}, **GAN), preprocess=preprocess)
    network = make_task(card).network(0).eval()
    images = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)
    write_file(find_format("onnx"), network, card, tmp_path / "model.onnx", images)
    z_NZ = torch.randn(3, GAN["noise"])
    with torch.no_grad():
        expected = network.to_bytes(network.make(z_NZ)).numpy()
    found = find_format("onnx").open(tmp_path / "model.onnx")(z_NZ.numpy())
    assert found.shape == (3, 3, SIZE, SIZE) and np.ptp(found) > 10
    assert np.abs(found - expected).max() < 0.51  # the file's are not rounded


@pytest.mark.parametrize("option", ["int8", "preprocessing"])
def test_what_takes_no_images_has_no_options_about_them(tmp_path: Path, option: str) -> None:
    card = dataclasses.replace(make_card("generate", {}, **GAN), data="digits")
    weights = tmp_path / "best.safetensors"
    save_weights(weights, make_task(card).network(0).state_dict(), card)
    with pytest.raises(ConfigError, match=f"^--(with-)?{option}: what generate exports takes no"):
        export(weights, **{option: True})
