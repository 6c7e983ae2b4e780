"""Every task's network becomes a file of every format, or is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from meshuffle.data import Preprocess
from meshuffle.deploy import find_format
from meshuffle.deploy.api import write_file
from meshuffle.errors import ConfigError
from meshuffle.train.tasks import make_task
from meshuffle.train.weights import Card

from .networks import TINY

SIZE = 64
NAME = "shufflenet_v2_x0_5"
TASKS: list[tuple[str, dict[str, Any], str]] = [
    ("multilabel", {}, "logits"),
    ("regress", {"mean": [1.0, 2.0], "std": [2.0, 3.0]}, "values"),
    ("segment", {"head": "lraspp"}, "logits"),
    ("detect", {"head": "ssdlite"}, "boxes"),
    ("detect", {"head": "fpn"}, "boxes"),
]
QUICK = [("openvino", "regress"), ("pt2", "regress"), ("openvino", "segment")]
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
    card = make_card(task, settings, **TINY[NAME])
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


@pytest.mark.parametrize("name", ["onnx", "openvino", "executorch", "pt2"])
def test_a_generator_has_none_yet(tmp_path: Path, name: str) -> None:
    network = make_task(make_card("generate", {})).network(0)
    images = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)
    with pytest.raises(ConfigError, match=r"^export: a run of generate has no file format yet"):
        path = tmp_path / "model"
        write_file(find_format(name), network, make_card("generate", {}), path, images)
    assert list(tmp_path.iterdir()) == []
