"""A run that begins from another's weights: classes keep their outputs, new ones come behind."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from meshuffle.config import TrainConfig
from meshuffle.data import open_data
from meshuffle.errors import ConfigError
from meshuffle.infer.predict import evaluate
from meshuffle.models import create_model
from meshuffle.report.record import read_record
from meshuffle.tasks.card import Card
from meshuffle.train.api import resume, train
from meshuffle.train.initial_weights import open_initial_weights
from meshuffle.train.resolve import resolve_run
from meshuffle.train.state import build_model, make_card
from meshuffle.weights import load_model, read_weights


@pytest.fixture
def first(one_epoch: Path, tmp_path: Path) -> Path:
    """A run that is the test's own."""
    return Path(shutil.copytree(one_epoch, tmp_path / "first"))


def with_classes(photos: Path, root: Path, **folders: str) -> Path:
    """Return photos as other classes: `folders` says which of ours each is."""
    for split in ("train", "val"):
        for name, ours in folders.items():
            shutil.copytree(photos / split / ours, root / split / name)
    return root


def begin(config: TrainConfig) -> tuple[Card, Any, list[str]]:
    """Return the card and the model of a run as it begins, and what it says of the weights."""
    start = open_initial_weights(config, config.model)
    card = make_card(config, open_data(config.data), start)
    model, _, lines = build_model(config, card, start)
    return card, model, lines


def test_new_classes_come_behind_the_old_ones(
    first: Path, small: TrainConfig, photos: Path, tmp_path: Path
) -> None:
    data = with_classes(photos, tmp_path / "more", green="blue", red="red")
    config = dataclasses.replace(small, data=str(data), from_=str(first), epochs=1)
    card, model, lines = begin(config)
    assert card.classes == ("blue", "red", "green")
    old, _ = read_weights(first / "weights" / "best.safetensors")
    assert torch.equal(model.fc.weight[:2], old["fc.weight"]) and len(model.fc.weight) == 3
    assert torch.equal(model.conv1[0].weight, old["conv1.0.weight"])
    assert any("2 classes keep their outputs; new ones: green" in line for line in lines)

    run = Path(train(dataclasses.replace(config, out=str(tmp_path / "second")))["run"])
    assert load_model(run)[1].classes == ("blue", "red", "green")
    found, _ = evaluate(run)
    assert sorted(set(found.rows["labels"].tolist())) == [1, 2]  # red keeps its index
    found, _ = evaluate(run, data=str(photos))
    assert sorted(set(found.rows["labels"].tolist())) == [0, 1]


def test_a_run_goes_on_without_the_weights_that_it_began_with(
    first: Path, small: TrainConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(small, from_=str(first), epochs=2, out=str(tmp_path / "second"))
    run = Path(train(config)["run"])
    expected, _ = read_weights(run / "weights" / "last.safetensors")
    assert "loaded" in (run / "log.jsonl").read_text()
    again = tmp_path / "again"
    shutil.copytree(run, again)
    shutil.rmtree(again / "state")
    shutil.rmtree(first)
    resume(again)  # from its beginning: no checkpoint is left
    found, card = read_weights(again / "weights" / "last.safetensors")
    assert card is not None and card.classes == ("blue", "red")
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_of_another_question_no_output_is_kept(
    first: Path, small: TrainConfig, photos: Path, tmp_path: Path
) -> None:
    data = with_classes(photos, tmp_path / "other", night="blue", day="red")
    config = dataclasses.replace(small, data=str(data), from_=str(first))
    card, model, lines = begin(config)
    assert card.classes == ("day", "night")
    old, _ = read_weights(first / "weights" / "best.safetensors")
    assert torch.equal(model.conv1[0].weight, old["conv1.0.weight"])
    assert not torch.equal(model.fc.weight, old["fc.weight"])
    assert any("a new classifier" in line for line in lines)
    assert any("new: fc.weight, fc.bias" in line for line in lines)


def test_weights_of_another_model_fit_nowhere(
    small: TrainConfig, photos: Path, tmp_path: Path
) -> None:
    path = tmp_path / "v1.pth"
    torch.save(create_model("shufflenet_v1_x0_5_g3", num_classes=2).state_dict(), path)
    config = dataclasses.replace(small, model="timm:resnet10t", from_=str(path), knobs={})
    with pytest.raises(ConfigError, match="none of its 295 tensors fits"):
        begin(config)


def test_weights_that_name_no_classes_say_so(
    small: TrainConfig, photos: Path, tmp_path: Path
) -> None:
    path = tmp_path / "plain.pth"
    tensors = create_model("shufflenet_v2_x0_5", num_classes=2).state_dict()
    torch.save(tensors, path)
    config = dataclasses.replace(small, from_=str(path), knobs={})
    _, model, lines = begin(config)
    assert torch.equal(model.fc.weight, tensors["fc.weight"])
    assert any("output i is taken for class i of 2" in line for line in lines)


def test_a_body_trains_at_half_the_rate_from_the_first_step(
    first: Path, small: TrainConfig, photos: Path, tmp_path: Path
) -> None:
    other = with_classes(photos, tmp_path / "other", cold="blue", warm="red")
    for data in (other, photos):
        config = dataclasses.replace(small, data=str(data), from_=str(first))
        resolved = resolve_run(config, {})
        chosen = resolved.config
        assert (chosen.freeze, chosen.unfreeze_epoch, chosen.body_lr) == ("none", 0, 0.5)
        assert not chosen.freeze_norm and resolved.reasons["body_lr"]
    assert resolve_run(small, {}).config.body_lr == 1.0


@pytest.mark.parametrize(
    ("given", "frozen"),
    [
        ({}, True),
        ({"batch": 32}, False),
        ({"body_lr": 0.5}, False),
        ({"freeze_norm": False}, False),
    ],
)
def test_batch_norms_stay_in_small_batches_at_a_low_rate(
    first: Path, small: TrainConfig, given: dict[str, Any], frozen: bool
) -> None:
    config = dataclasses.replace(small, from_=str(first), **{"body_lr": 0.1, **given})
    assert resolve_run(config, {}).config.freeze_norm == frozen


@pytest.mark.usefixtures("with_report")
def test_before_and_after_on_the_new_and_the_old_images(
    first: Path, small: TrainConfig, photos: Path, tmp_path: Path
) -> None:
    data = with_classes(photos, tmp_path / "more", green="blue", red="red")
    config = dataclasses.replace(small, data=str(data), from_=str(first), out=str(tmp_path / "b"))
    run = Path(train(config)["run"])
    result = read_record(run).result
    assert [entry["data"] for entry in result["compared"]] == [str(data), str(photos)]
    assert result["compared"][0]["after"] == result["splits"]["val"]
    old, _ = evaluate(first)
    assert result["compared"][1]["before"]["top1"] == pytest.approx(old.metrics["top1"])
    report = (run / "report.html").read_text()
    assert "Before and after" in report and f"{photos} val" in report

    shutil.rmtree(data)
    shutil.copytree(photos, data)  # its classes are not those of the second run
    third = dataclasses.replace(small, from_=str(run), out=str(tmp_path / "c"), epochs=1)
    last = read_record(Path(train(third)["run"]))
    assert [entry["data"] for entry in last.result["compared"]] == [str(photos), str(data)]


@pytest.mark.parametrize("body_lr", [0.1, 1.0])
def test_the_body_joins_the_head_in_the_second_epoch(
    first: Path, small: TrainConfig, photos: Path, tmp_path: Path, body_lr: float
) -> None:
    """Also where both are in one group of the optimiser, and only the head has a momentum yet."""
    other = with_classes(photos, tmp_path / "other", cold="blue", warm="red")
    config = dataclasses.replace(small, data=str(other), from_=str(first), body_lr=body_lr)
    run = Path(train(dataclasses.replace(config, out=str(tmp_path / "second")))["run"])
    before, _ = read_weights(run / "weights" / "start.safetensors")
    after, _ = read_weights(run / "weights" / "last.safetensors")
    assert not torch.equal(before["conv1.0.weight"], after["conv1.0.weight"])
