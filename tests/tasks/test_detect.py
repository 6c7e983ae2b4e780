"""Detection: losses against torchvision's, mAP against faster-coco-eval on a COCO file."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_iou

from meshuffle.config import TrainConfig
from meshuffle.data import Preprocess
from meshuffle.data.target import Boxes
from meshuffle.errors import ConfigError
from meshuffle.models.detector import HEADS, anchors_for
from meshuffle.tasks import find_task, make_task
from meshuffle.tasks.card import Card
from meshuffle.tasks.detect import Detect
from meshuffle.weights import load_or_build

NAMES = ("RBC", "WBC", "platelet")
SIDE = 64
OBJECTS = (  # of 3 images: class, then a box in pixels of a view of 64; the last two overlap
    ((0, 4, 6, 30, 40), (2, 35, 20, 60, 62), (1, 36, 22, 62, 60)),
    ((1, 0, 0, 64, 64),),
    ((2, 50, 3, 58, 12), (0, 10, 30, 44, 58)),
)
both_heads = pytest.mark.parametrize("head", HEADS)


def task_of(head: str, side: int = SIDE, **changes: Any) -> Detect:
    shape = Preprocess(crop=side, resize=None, fit="stretch")
    kept = {"head": head}
    card = Card("shufflenet_v2_x0_5", NAMES, shape, task="detect", settings=kept, **changes)
    task = make_task(card)
    assert isinstance(task, Detect)
    return task


def targets_of(images: tuple[Any, ...], most: int = 4) -> Tensor:
    targets = torch.full((len(images), most, 5), -1.0)
    for i, objects in enumerate(images):
        for m, (label, *box) in enumerate(objects):
            targets[i, m] = torch.tensor([label, *(value / SIDE for value in box)])
    return targets


def outputs_of(head: str, num: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    num_logits = len(NAMES) + HEADS[head].background
    return torch.randn(
        num, len(anchors_for(head, (SIDE, SIDE))), num_logits + 4, generator=generator
    )


class _Backbone(nn.Module):
    out_channels = 8


def torchvision_loss(head: str, outputs: Tensor, objects: tuple[Any, ...]) -> float:
    """Return torchvision's loss of one image, by its own objects, in pixels."""
    anchors = anchors_for(head, (SIDE, SIDE)) * SIDE
    boxes = torch.tensor([box for _, *box in objects], dtype=torch.float32)
    labels = torch.tensor([label for label, *_ in objects]) + HEADS[head].background
    targets = [{"boxes": boxes, "labels": labels}]
    said = {"cls_logits": outputs[None, :, :-4], "bbox_regression": outputs[None, :, -4:]}
    if head == "fpn":
        model = RetinaNet(_Backbone(), len(NAMES))
        return float(sum(model.compute_loss(targets, said, [anchors]).values()))
    maker = DefaultBoxGenerator([[2, 3]] * 6)
    model = SSD(_Backbone(), maker, (SIDE, SIDE), len(NAMES) + 1, head=nn.Identity())
    matches = [model.proposal_matcher(box_iou(boxes, anchors))]
    return float(sum(model.compute_loss(targets, said, [anchors], matches).values()))


@both_heads
@pytest.mark.parametrize("objects", OBJECTS)
def test_the_loss_of_an_image_is_torchvisions(head: str, objects: tuple[Any, ...]) -> None:
    outputs = outputs_of(head, 1)
    found = float(task_of(head).loss_sum(outputs, targets_of((objects,))))
    assert found == pytest.approx(torchvision_loss(head, outputs[0], objects), rel=1e-5)


@both_heads
@given(cuts=st.lists(st.booleans(), min_size=5, max_size=5), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_a_batch_is_the_sum_of_any_parts(head: str, cuts: list[bool], seed: int) -> None:
    task, outputs = task_of(head), outputs_of(head, 6, seed).double()
    targets = targets_of((*OBJECTS, (), *OBJECTS[:2]))
    edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), 6]
    parts = [slice(a, b) for a, b in pairwise(edges)]
    parts_sum = sum(float(task.loss_sum(outputs[part], targets[part])) for part in parts)
    assert float(task.loss_sum(outputs, targets)) == pytest.approx(parts_sum, rel=1e-9)


@both_heads
def test_the_order_and_the_padding_of_objects_count_nothing(head: str) -> None:
    task, outputs = task_of(head), outputs_of(head, 1).double()
    wanted = float(task.loss_sum(outputs, targets_of(OBJECTS[2:], 2)))
    assert float(task.loss_sum(outputs, targets_of(OBJECTS[2:], 7))) == pytest.approx(wanted)
    assert float(task.loss_sum(outputs, targets_of(OBJECTS[2:], 3).flip(1))) == pytest.approx(
        wanted
    )


@both_heads
def test_an_object_without_area_counts_nothing(head: str) -> None:
    task, outputs = task_of(head), outputs_of(head, 1)
    flat = ((0, 5, 5, 5, 9), *OBJECTS[0])
    loss = float(task.loss_sum(outputs, targets_of((flat,))))
    assert loss == pytest.approx(float(task.loss_sum(outputs, targets_of(OBJECTS[:1]))))


@both_heads
def test_an_image_without_objects_is_all_background(head: str) -> None:
    task = task_of(head)
    outputs = outputs_of(head, 1).requires_grad_()
    for targets in (targets_of(((),)), torch.zeros(1, 0, 5)):
        (gradient,) = torch.autograd.grad(task.loss_sum(outputs, targets), outputs)
        assert (gradient[..., -4:] == 0).all()
        moved = gradient[0, :, :-4].abs().sum(1) > 0
        assert int(moved.sum()) == (3 if head == "ssdlite" else len(moved))
        own = gradient[0, moved, HEADS[head].background : -4]
        assert (own > 0).all()  # less of every class
    assert float(task.judge(outputs.detach(), targets)["losses"]) > 0


@both_heads
def test_no_image_has_loss_0_and_a_gradient(head: str) -> None:
    outputs = outputs_of(head, 2)[:0].requires_grad_()
    loss = task_of(head).loss_sum(outputs, targets_of(()))
    loss.backward()
    assert loss.shape == ()
    assert float(loss.detach()) == 0
    assert outputs.grad is not None


@both_heads
def test_the_loss_is_judged_as_it_is_trained_and_in_float32(head: str) -> None:
    task, outputs, targets = task_of(head), outputs_of(head, 3), targets_of(OBJECTS)
    rows = task.judge(outputs, targets)
    assert rows["losses"].dtype == rows["boxes"].dtype == rows["truth"].dtype == torch.float32
    assert float(rows["losses"].sum()) == pytest.approx(float(task.loss_sum(outputs, targets)))
    half = task.loss_sum(outputs.bfloat16(), targets)
    assert half.dtype == torch.float32
    assert float(half) == pytest.approx(float(rows["losses"].sum()), rel=0.02)
    assert float(task.score_sum(outputs, targets)) == 0


def rows_of(found: list[list[tuple[float, ...]]], truth: tuple[Any, ...]) -> dict[str, Any]:
    """Return rows of `judge`; boxes (class, score, x1, y1, x2, y2) in pixels of 64."""
    most = max((len(boxes) for boxes in found), default=0)
    boxes = np.full((len(found), most, 6), -1, np.float32)
    for i, entries in enumerate(found):
        for d, (label, score, *box) in enumerate(entries):
            boxes[i, d] = (*(value / SIDE for value in box), score, label)
    return {"boxes": boxes, "truth": targets_of(truth).numpy()}


def test_perfect_boxes_have_map_100() -> None:
    found = [[(label, 0.9, *box) for label, *box in objects] for objects in OBJECTS]
    metrics = task_of("fpn").conclude(rows_of(found, OBJECTS))
    assert metrics == pytest.approx({"map": 100, "map50": 100, "map75": 100})
    assert list(metrics) == [metric.key for metric in Detect.metrics]


def test_boxes_shifted_to_an_iou_of_064_count_up_to_060() -> None:
    # Of 0.50, 0.55 … 0.95 three are reached: a shift by d of a box 50 wide is (50 − d) / (50 + d).
    truth = (((0, 4, 4, 54, 54),), ((1, 4, 4, 54, 54),))
    found = [[(label, 0.9, 15, 4, 65, 54)] for label in (0, 1)]
    metrics = task_of("fpn").conclude(rows_of(found, truth))
    assert metrics == pytest.approx({"map": 30, "map50": 100, "map75": 0})


def test_a_class_that_is_missed_halves_the_mean() -> None:
    truth = (((0, 4, 4, 54, 54),), ((1, 4, 4, 54, 54),))
    metrics = task_of("fpn").conclude(rows_of([[(0, 0.9, 4, 4, 54, 54)], []], truth))
    assert metrics == pytest.approx({"map": 50, "map50": 50, "map75": 50})


def test_nothing_found_or_nothing_there_is_0() -> None:
    zero = {"map": 0.0, "map50": 0.0, "map75": 0.0}
    assert task_of("fpn").conclude(rows_of([[], [], []], OBJECTS)) == zero
    assert task_of("fpn").conclude(rows_of([[(0, 0.9, 4, 4, 54, 54)], []], ((), ()))) == zero


def test_map_is_that_of_a_coco_file_in_pixels_of_its_images(tmp_path: Path) -> None:
    coco = pytest.importorskip("faster_coco_eval", reason="an extra")
    rng = np.random.default_rng(5)
    width, height, num = 640, 480, 12
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    truth = np.full((num, 6, 5), -1, np.float32)
    boxes = np.full((num, 9, 6), -1, np.float32)
    for i in range(num):
        for m in range(rng.integers(0, 7)):
            label, (x, y), (w, h) = (
                rng.integers(3),
                rng.integers(0, 300, 2),
                rng.integers(20, 180, 2),
            )
            box = np.array([x, y, x + w, y + h], np.float64)
            truth[i, m] = (label, *(box / (width, height, width, height)))
            entry = {"image_id": 50 + i, "category_id": int(label) + 7, "iscrowd": 0}
            entry |= {"id": len(annotations) + 1, "area": float(w * h)}
            annotations.append({**entry, "bbox": [float(x), float(y), float(w), float(h)]})
            near = box + rng.normal(0, 9, 4)
            score = float(rng.uniform(0.05, 1))
            said = int(label) if rng.uniform() < 0.8 else int(rng.integers(3))
            boxes[i, m] = (*(near / (width, height, width, height)), score, said)
            size = [near[2] - near[0], near[3] - near[1]]
            result = {"image_id": 50 + i, "category_id": said + 7, "score": score}
            results.append({**result, "bbox": [near[0], near[1], *size]})
    images = [{"id": 50 + i, "width": width, "height": height} for i in range(num)]
    categories = [{"id": 7 + c, "name": name} for c, name in enumerate(NAMES)]
    content = {"images": images, "categories": categories, "annotations": annotations}
    (tmp_path / "truth.json").write_text(json.dumps(content))
    (tmp_path / "found.json").write_text(json.dumps(results))
    known = coco.COCO(str(tmp_path / "truth.json"))
    judge = coco.COCOeval_faster(known, known.loadRes(str(tmp_path / "found.json")), "bbox")
    judge.run()
    metrics = task_of("fpn").conclude({"boxes": boxes, "truth": truth})
    assert 5 < metrics["map"] < 95
    assert list(metrics.values()) == pytest.approx([100 * value for value in judge.stats[:3]])


DATA: Any = SimpleNamespace(
    task="detect", input_size=320, style="photos", mean=(0.5,) * 3, std=(0.2,) * 3
)


def test_the_settings_name_the_head() -> None:
    assert find_task("detect") is Detect
    assert Detect.settings(TrainConfig(task="detect"), DATA, load_or_build) == {"head": "ssdlite"}
    assert Detect.settings(TrainConfig(task="detect", head="fpn"), DATA, load_or_build) == {
        "head": "fpn"
    }
    with pytest.raises(ConfigError, match="--head lraspp: detect knows ssdlite and fpn"):
        Detect.settings(TrainConfig(task="detect", head="lraspp"), DATA, load_or_build)
    with pytest.raises(ConfigError, match="300×300 pixels: detectors take multiples of 32"):
        Detect.settings(TrainConfig(task="detect", input_size=300), DATA, load_or_build)


def test_without_faster_coco_eval_a_run_does_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'meshuffle\[detect\]'"):
        Detect.settings(TrainConfig(task="detect"), DATA, load_or_build)
    # Pictures of which nothing is known need no metric.
    assert task_of("fpn").conclude(rows_of([[]], ((),)))["map"] == 0


def pictures(num: int) -> tuple[Tensor, Tensor]:
    """Return uint8 images [num, 3, 64, 64] of red, green and blue rectangles, and targets."""
    rng = np.random.default_rng(0)
    images = rng.integers(90, 120, (num, 3, SIDE, SIDE)).astype(np.uint8)
    objects: list[tuple[Any, ...]] = []
    for i in range(num):
        row = []
        for m in range(1 + i % 2):
            label, (w, h) = int(rng.integers(3)), rng.integers(14, 28, 2).tolist()
            x, y = int(rng.integers(0, 33 - w)) + 32 * m, int(rng.integers(0, SIDE - h))
            images[i, :, y : y + h, x : x + w] = 20
            images[i, label, y : y + h, x : x + w] = 230
            row.append((label, x, y, x + w, y + h))
        objects.append(tuple(row))
    return torch.from_numpy(images), targets_of(tuple(objects))


@pytest.mark.parametrize(("head", "lr"), [("ssdlite", 2e-3), ("fpn", 1e-3)])
def test_a_few_pictures_are_learnt_by_heart(head: str, lr: float) -> None:
    task = task_of(head)
    model, (images, targets) = task.network(0), pictures(4)
    x = task.card.preprocess.normalise(images)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for _ in range(80):
        optimizer.zero_grad()
        (task.loss_sum(model(x), targets) / len(x)).backward()
        optimizer.step()
    model.eval()
    with torch.inference_mode():
        rows = {key: value.numpy() for key, value in task.judge(model(x), targets).items()}
    assert task.conclude(rows)["map50"] > 90


FOUND = [
    [
        (0, 0.98, 4, 6, 30, 40),
        (0, 0.5, 8, 8, 31, 41),
        (2, 0.31, 35, 20, 60, 62),
        (1, 0.2, 0, 0, 9, 9),
    ]
]


def test_a_prediction_is_in_pixels_of_the_image() -> None:
    rows = rows_of(FOUND, OBJECTS[:1])
    boxes = task_of("ssdlite").prediction(rows, 0, (640, 320))["boxes"]
    assert [entry["label"] for entry in boxes] == ["RBC", "RBC", "platelet"]
    assert [entry["score"] for entry in boxes] == pytest.approx([0.98, 0.5, 0.31])
    assert boxes[0]["box"] == [40.0, 30.0, 300.0, 200.0]
    json.dumps(boxes)


def test_what_is_said_and_what_is_true() -> None:
    task, rows = task_of("ssdlite", titles={"platelet": "Plättchen"}), rows_of(FOUND, OBJECTS[:1])
    said = task.sentence(task.prediction(rows, 0, (64, 64)))
    assert said == "2 RBC (best 98 %), 1 Plättchen (31 %)"
    assert task.truth(rows, 0) == "1 RBC, 1 Plättchen, 1 WBC"
    empty = rows_of([[]], ((),))
    assert task.sentence(task.prediction(empty, 0, (64, 64))) == "no object"
    assert task.truth(empty, 0) == "no object"


@pytest.mark.parametrize("size", [(640, 480), (40, 64)])
def test_a_picture_shows_what_was_found_and_what_is_true(size: tuple[int, int]) -> None:
    task, image = task_of("ssdlite"), Image.new("RGB", size, "grey")
    rows = rows_of(FOUND, OBJECTS[:1])
    truth = Boxes(np.array([[10, 10, 30, 39]], np.float32), np.zeros(1, np.int64))
    shown = task.picture(image, rows, 0, truth)
    factor = shown.width // size[0]
    assert shown.size == (size[0] * factor, size[1] * factor)
    assert max(shown.size) > 200  # large enough for a text
    colours = {colour for _, colour in shown.getcolors(1 << 20) or []}
    assert (0x56, 0xB4, 0xE9) in colours  # class 0
    assert (255, 255, 255) in colours  # the truth
    plain = task.picture(image, rows_of([[]], ((),)), 0)
    assert len(plain.getcolors() or []) == 1
    assert image.getcolors() == [(size[0] * size[1], (128, 128, 128))]  # as it was


def test_a_box_at_the_very_edge_can_be_drawn() -> None:
    rows = rows_of([[(1, 0.9, 64, 64, 64, 64), (1, 0.9, 0, 0, 64, 64)]], ((),))
    task_of("ssdlite").picture(Image.new("L", (700, 30)), rows, 0)
