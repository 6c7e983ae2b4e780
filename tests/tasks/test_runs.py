"""Each task from data to a report, a prediction and an exported file, on images made here."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from meshuffle.config import TrainConfig
from meshuffle.deploy.api import export
from meshuffle.errors import ConfigError, DataError, PlanError
from meshuffle.infer.predict import evaluate, predict
from meshuffle.report.record import read_record
from meshuffle.train.api import train
from meshuffle.train.resolve import resolve_run
from meshuffle.train.run import prepare
from meshuffle.weights import load_model
from tests.train.test_split_training import train as train_in_float64

NUM, SIDE = 24, 64


def pictures(root: Path) -> list[dict[str, Any]]:
    """Make images of one bright rectangle, red or green, on dark noise; say what they show."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    told = []
    for i in range(NUM):
        pixels = rng.integers(0, 60, (SIDE, SIDE, 3), dtype=np.uint8)
        colour, size = i % 2, int(rng.integers(16, 40))
        x, y = (int(v) for v in rng.integers(0, SIDE - size, 2))
        pixels[y : y + size, x : x + size, colour] = 230
        Image.fromarray(pixels).save(root / "images" / f"{i:02d}.png")
        told.append({"file": f"images/{i:02d}.png", "colour": colour, "box": (x, y, size)})
    return told


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same images in several formats; the DATA text by task."""
    root = tmp_path_factory.mktemp("made")
    told = pictures(root)
    for name, columns in (("regress", ("size", "bright")), ("multilabel", ("red", "large"))):
        with (root / f"{name}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(("image", "split", *columns))
            for i, entry in enumerate(told):
                size = entry["box"][2]
                values = (
                    (size, 100 + 3 * size)
                    if name == "regress"
                    else (1 - entry["colour"], int(size > 27))
                )
                rows.writerow((entry["file"], "val" if i % 4 == 3 else "train", *values))
    boxes = [(x, y, size, size) for x, y, size in (entry["box"] for entry in told)]
    coco = {
        "images": [
            {"id": i, "file_name": entry["file"], "width": SIDE, "height": SIDE}
            for i, entry in enumerate(told)
        ],
        "categories": [{"id": 1, "name": "red"}, {"id": 2, "name": "green"}],
        "annotations": [
            {
                "id": i, "image_id": i, "category_id": 1 + entry["colour"], "iscrowd": 0,
                "bbox": box, "area": box[2] * box[3],
                "segmentation": [[box[0], box[1], box[0] + box[2], box[1],
                                  box[0] + box[2], box[1] + box[3], box[0], box[1] + box[3]]],
            }
            for i, (entry, box) in enumerate(zip(told, boxes, strict=True))
        ],
    }  # fmt: skip
    (root / "coco.json").write_text(json.dumps(coco))
    coco_spec = f"coco:{root / 'coco.json'}"
    tables = {name: f"csv:{root / name}.csv" for name in ("regress", "multilabel")}
    return {**tables, "detect": coco_spec, "segment": coco_spec, "root": str(root)}


def settings(task: str, data: str, out: Path, **more: Any) -> TrainConfig:
    given = {
        "data": data, "task": task, "model": "shufflenet_v2_x0_5", "plan": "dp=1,threads=1",
        "epochs": 2, "batch": 6, "input_size": 64, "workers": 0, "compile": "off",
        "optimizer": "adam", "lr": 0.002, "out": str(out), **more,
    }  # fmt: skip
    return TrainConfig(**given)


TASKS = ("multilabel", "regress", "detect", "segment")
SAYS = {"multilabel": "labels", "regress": "values", "detect": "boxes", "segment": "shares"}


@pytest.mark.usefixtures("with_report")
@pytest.mark.parametrize("task", TASKS)
def test_from_data_to_a_report_and_a_file(task: str, made: dict[str, str], tmp_path: Path) -> None:
    result = train(settings(task, made[task], tmp_path / "run"))
    run = Path(result["run"])
    header = (run / "metrics.csv").read_text().splitlines()[0].split(",")
    record = read_record(run)
    first = load_model(run)[1].task
    assert first == task and record.result["task"] == task
    assert any(name.startswith("val_") and name != "val_loss" for name in header)
    assert len(record.epochs) == 2
    found, what = evaluate(run)
    assert found.task == task and found.num_samples and what.endswith("val")
    for key, value in result["metrics"]["val"].items():
        assert found.metrics[key] == pytest.approx(value, rel=1e-4, abs=1e-3), key
    images = sorted((Path(made["root"]) / "images").glob("*.png"))[:3]
    said = predict(run, images, pictures=tmp_path / "drawn")
    assert all(SAYS[task] in row and row["text"] for row in said)
    for row in said:
        with Image.open(row["picture"]) as drawn:
            assert min(drawn.size) >= 64
    report = (run / "report.html").read_text()
    assert report.count("<img") > 8 and "Largest losses" in report
    _, parity = export(run)["onnx"]
    assert parity.max_relative_error < 1e-4


@pytest.mark.parametrize("task", ["regress", "detect", "segment"])
def test_two_replicas_learn_what_one_learns(
    task: str, made: dict[str, str], tmp_path: Path
) -> None:
    """In float64: in float32 a network with maps of few pixels amplifies any other order.

    SSDLite's batch norms over maps of one pixel do even in float64, a hundred thousand times.
    """
    runs = {}
    head = {"head": "fpn"} if task == "detect" else {}
    for plan in ("dp=1,threads=1", "dp=2,threads=1"):
        more = {"plan": plan, "optimizer": "sgd", "lr": 0.01, "epochs": 1, **head}
        config = settings(task, made[task], tmp_path / plan[:4].replace("=", ""), **more)
        runs[prepare(config, {}).run] = plan
    train_in_float64(runs)
    one, two = (read_record(run).epochs[0] for run in runs)
    assert float(one["train_loss"]) == pytest.approx(float(two["train_loss"]), rel=1e-9)
    assert float(one["val_loss"]) == pytest.approx(float(two["val_loss"]), rel=1e-5)


@pytest.mark.usefixtures("with_report")
def test_a_classifier_becomes_a_detector_and_the_report_compares(
    made: dict[str, str], photos: Path, tmp_path: Path
) -> None:
    first = train(settings("classify", str(photos), tmp_path / "first", input_size=32, epochs=1))
    config = settings(
        "detect", made["detect"], tmp_path / "second", from_=first["run"], epochs=3,
        optimizer=None, lr=None,
    )  # fmt: skip
    chosen = resolve_run(config, {}).config
    assert (chosen.freeze, chosen.unfreeze_epoch, chosen.body_lr) == ("backbone", 2, 1.0)
    run = Path(train(config)["run"])
    lines = [str(event.get("text")) for event in read_record(run).events]
    assert any("the weights have learned to classify" in line for line in lines)
    assert "Before and after" in (run / "report.html").read_text()
    assert load_model(run)[1].classes == ("red", "green")


def test_what_makes_no_sense_is_said(made: dict[str, str], tmp_path: Path) -> None:
    cases = [
        (settings("detect", made["detect"], tmp_path, mixup=0.2), ConfigError, "no labels to mix"),
        (
            settings("detect", made["detect"], tmp_path, label_smoothing=0.1),
            ConfigError,
            "--label-smoothing 0.1: detect has none",
        ),
        (settings("regress", made["regress"], tmp_path, head="fpn"), ConfigError, "no choice"),
        (settings("detect", made["detect"], tmp_path, head="yolo"), ConfigError, "yolo"),
        (settings("detect", made["regress"], tmp_path), DataError, "nothing for --task detect"),
        (
            settings("segment", made["segment"], tmp_path, class_weights="balanced"),
            ConfigError,
            "has none",
        ),
        (
            settings("detect", made["detect"], tmp_path, trivial_augment=True),
            ConfigError,
            "boxes and masks take crop_scale",
        ),
    ]
    for config, kind, says in cases:
        out = tmp_path / "no"
        with pytest.raises(kind, match=says):
            train(dataclasses.replace(config, out=str(out)))
        assert not out.exists(), says


@pytest.mark.usefixtures("with_report")
def test_images_are_generated(photos: Path, tmp_path: Path) -> None:
    knobs = {"width": "16"}
    config = settings(
        "generate", str(photos), tmp_path / "run", input_size=16, knobs=knobs, optimizer=None,
        lr=None, batch=8,
    )  # fmt: skip
    config = dataclasses.replace(config, model=TrainConfig.model)
    run = Path(train(config)["run"])
    assert 'optimizer = "adam"  # chosen' in (run / "config.toml").read_text()
    assert float(read_record(run).epochs[-1]["val_fid"]) > 0
    page = (run / "report.html").read_text()
    assert "Generated images" in page and "GAN of ShuffleNet V2 units" in page
    (said,) = predict(run, [photos / "val" / "red" / "0.png"])
    assert "realness" in said
    with pytest.raises(PlanError, match="generate knows dp, not tp"):
        train(dataclasses.replace(config, plan="tp=2", out=str(tmp_path / "no")))


def test_each_task_begins_with_settings_that_suit_it(made: dict[str, str], tmp_path: Path) -> None:
    def chosen(**more: Any) -> TrainConfig:
        given = settings("segment", made["segment"], tmp_path, **more)
        return resolve_run(given, {}).config

    plain = chosen(optimizer=None, lr=None, batch=16)
    assert (plain.optimizer, plain.lr, plain.body_lr) == ("adamw", 0.002, 1.0)
    assert chosen(optimizer=None, lr=None, batch=4).lr == 0.001
    other = chosen(optimizer="sgd", lr=None, batch=16)
    assert (other.lr, other.body_lr) == (0.0221, 1.0)
    assert chosen(optimizer=None, lr=0.3, body_lr=0.5).lr == 0.3
