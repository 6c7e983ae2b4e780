"""Segmentation: losses and areas add up, metrics are those of others, and it learns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import accuracy_score, jaccard_score
from torch import Tensor
from torch.nn import functional as F

from meshuffle.config import TrainConfig
from meshuffle.data import Preprocess
from meshuffle.data.base import Data
from meshuffle.errors import ConfigError
from meshuffle.tasks import make_task
from meshuffle.tasks.card import Card
from meshuffle.tasks.mask_picture import covered, draw_masks, mask_image, palette
from meshuffle.tasks.segment import Segment, areas, count_classes, reduced
from meshuffle.weights import load_or_build

SMALL = {"width": 0.25, "depths": [1, 1, 2], "head_channels": 64}
VOID = 255


def card(num_classes: int = 4, size: int = 64, **more: Any) -> Card:
    return Card(
        "shufflenet_v2_x0_5",
        tuple(f"c{i}" for i in range(num_classes)),
        Preprocess(crop=size, resize=None, fit="stretch"),
        task="segment",
        settings={"head": "lraspp"},
        knobs=SMALL,
        titles={"c1": "road"},
        **more,
    )


def task(num_classes: int = 4, smoothing: float = 0.0) -> Segment:
    made = make_task(card(num_classes), label_smoothing=smoothing)
    assert isinstance(made, Segment)
    return made


def case(seed: int, num: int, num_classes: int, side: int = 9) -> tuple[Tensor, Tensor]:
    """Logits float64 and targets; some pixels, and all of some images, count nothing."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num, num_classes, side, side + 2)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64)
    targets = torch.randint(num_classes, (num, side, side + 2), generator=generator)
    chances = torch.rand(targets.shape, generator=generator)
    targets[chances < torch.rand(num, 1, 1, generator=generator)] = VOID
    if num > 2:
        targets[1] = VOID
    return logits, targets.to(torch.uint8)


def rows_of(judged: dict[str, Tensor]) -> dict[str, NDArray[Any]]:
    return {name: column.numpy() for name, column in judged.items()}


# ---- the loss and the areas -------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_torchs_cross_entropy_of_an_image(smoothing: float) -> None:
    logits, targets = case(0, 5, 3)
    expected = torch.zeros((), dtype=torch.float64)
    for x, t in zip(logits, targets, strict=True):
        if bool((t != VOID).any()):
            expected += F.cross_entropy(
                x[None], t[None].long(), ignore_index=VOID, label_smoothing=smoothing
            )
    torch.testing.assert_close(task(3, smoothing).loss_sum(logits, targets), expected)


@settings(max_examples=40)
@given(
    st.integers(0, 1 << 16), st.lists(st.integers(1, 3), min_size=1, max_size=4), st.integers(2, 6)
)
def test_a_batch_is_the_sum_of_any_partition(seed: int, sizes: list[int], classes: int) -> None:
    """Loss, gradient, running metric, areas and metrics; void pixels have no gradient."""
    logits, targets = case(seed, sum(sizes), classes)
    judge = task(classes, 0.1)
    whole = logits.clone().requires_grad_()
    loss = judge.loss_sum(whole, targets)
    loss.backward()
    parts = logits.clone().requires_grad_()
    pairs = list(zip(parts.split(sizes), targets.split(sizes), strict=True))
    found = torch.stack([judge.loss_sum(*pair) for pair in pairs]).sum()
    found.backward()
    torch.testing.assert_close(found, loss)
    torch.testing.assert_close(parts.grad, whole.grad)
    assert whole.grad is not None
    assert not whole.grad.permute(0, 2, 3, 1)[targets == VOID].any()
    scores = sum(float(judge.score_sum(*pair)) for pair in pairs)
    assert scores == pytest.approx(float(judge.score_sum(logits, targets)))
    pieces = [rows_of(judge.judge(x.detach().float(), t)) for x, t in pairs]
    joined = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    at_once = rows_of(judge.judge(logits.float(), targets))
    for name, column in at_once.items():
        np.testing.assert_allclose(joined[name], column, rtol=1e-5, atol=1e-7, err_msg=name)
    assert judge.conclude(joined) == pytest.approx(judge.conclude(at_once))
    assert at_once["losses"].sum() == pytest.approx(
        float(task(classes).loss_sum(logits, targets)), rel=1e-5
    )


def test_an_image_without_a_counted_pixel_counts_nothing() -> None:
    logits, targets = case(1, 3, 3)
    alone = logits[1:2].clone().requires_grad_()
    loss = task(3).loss_sum(alone, targets[1:2])
    loss.backward()
    assert float(loss.detach()) == 0 and alone.grad is not None and not alone.grad.any()
    assert float(task(3).score_sum(logits[1:2], targets[1:2])) == 0
    rows = rows_of(task(3).judge(logits[1:2].float(), targets[1:2]))
    assert task(3).conclude(rows) == {"miou": 0.0, "pixel_accuracy": 0.0}
    assert task(3).truth(rows, 0) == ""
    assert sum(task(3).prediction(rows, 0, (10, 10))["shares"].values()) == pytest.approx(
        100, abs=0.01
    )


def test_half_precision_is_summed_in_float32() -> None:
    logits, targets = case(2, 2, 3)
    loss = task(3).loss_sum(logits.to(torch.bfloat16), targets)
    assert loss.dtype == torch.float32


# ---- the metrics ------------------------------------------------------------------------------


def masks(seed: int, num_classes: int, num: int = 3) -> tuple[Tensor, Tensor]:
    """Predicted and true, each without its last class."""
    generator = torch.Generator().manual_seed(seed)
    predicted = torch.randint(num_classes - 1, (num, 8, 7), generator=generator)
    true = torch.randint(num_classes - 1, (num, 8, 7), generator=generator)
    true[torch.rand(true.shape, generator=generator) < 0.2] = VOID
    return predicted.to(torch.uint8), true.to(torch.uint8)


def concluded(predicted: Tensor, true: Tensor, num_classes: int) -> dict[str, float]:
    rows = {"areas": areas(predicted, true, num_classes).numpy()}
    return task(num_classes).conclude(rows)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_classes", [3, 7, 150])
def test_metrics_are_scikit_learns(seed: int, num_classes: int) -> None:
    predicted, true = masks(seed, num_classes)
    counted = true != VOID
    x, y = predicted[counted].numpy(), true[counted].numpy()
    labels = sorted(set(x.tolist()) | set(y.tolist()))
    found = concluded(predicted, true, num_classes)
    assert found["miou"] == pytest.approx(100 * jaccard_score(y, x, average="macro", labels=labels))
    assert found["pixel_accuracy"] == pytest.approx(100 * accuracy_score(y, x))


def test_metrics_by_hand() -> None:
    """Class 3 is nowhere and does not count; class 2 is only predicted, and does."""
    predicted = torch.tensor([[[0, 0, 1, 2]]], dtype=torch.uint8)
    true = torch.tensor([[[0, 1, 1, VOID]]], dtype=torch.uint8)
    assert areas(predicted, true, 4).tolist() == [[[1, 1, 0, 0], [2, 1, 0, 0], [1, 2, 0, 0]]]
    found = concluded(predicted, true, 4)
    assert found == pytest.approx({"miou": 50.0, "pixel_accuracy": 200 / 3})
    true[..., 3] = 0
    found = concluded(predicted, true, 4)
    assert found["miou"] == pytest.approx(100 * (1 / 3 + 1 / 2 + 0) / 3)


def test_areas_of_many_pixels_do_not_overflow() -> None:
    rows = {"areas": np.full((4, 3, 2), 1 << 60, dtype=np.int64) // 4}
    assert task(2).conclude(rows)["miou"] == 100


def test_the_task_decides_by_miou() -> None:
    metrics = {"miou": 40.0, "pixel_accuracy": 90.0}
    assert task().score(metrics) == 40.0
    assert [m.key for m in Segment.metrics] == ["miou", "pixel_accuracy"]
    assert Segment.running is not None and Segment.running.key == "pixel_accuracy"


# ---- rows, words and pictures -----------------------------------------------------------------


def test_kept_masks_are_small_and_those_of_an_answer_whole() -> None:
    logits = torch.randn(2, 3, 240, 320)
    targets = torch.zeros(2, 240, 320, dtype=torch.uint8)
    judged, answer = task(3).judge(logits, targets), task(3).answer(logits)
    assert judged["mask"].shape == (2, 72, 96)
    assert answer["mask"].dtype == torch.uint8
    assert torch.equal(answer["mask"].long(), logits.argmax(1))
    assert torch.equal(answer["shares"], judged["shares"])


def test_a_network_may_answer_with_masks() -> None:
    logits = torch.randn(2, 3, 24, 32)
    masks = task(3).answering(torch.nn.Identity())(logits)
    found, expected = task(3).answer(masks), task(3).answer(logits)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_reduced_masks_keep_the_middle_of_each_block() -> None:
    mask = torch.arange(6).repeat_interleave(3).to(torch.uint8)[None, None].expand(2, 18, 18)
    assert reduced(mask, 6)[0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert reduced(mask, 18).data_ptr() != 0 and torch.equal(reduced(mask, 18), mask)
    assert reduced(torch.zeros(1, 2, 400, dtype=torch.uint8), 96).shape == (1, 1, 96)


def test_counts_are_per_image() -> None:
    mask = torch.tensor([[[0, 2], [2, VOID]], [[1, 1], [1, 1]]], dtype=torch.uint8)
    assert count_classes(mask, 3).tolist() == [[1, 0, 2], [0, 4, 0]]


def test_words() -> None:
    logits = torch.full((1, 4, 2, 5), -1.0)
    logits[:, 1] = 0.0
    logits[0, 2, 0, :3] = 1.0
    targets = torch.full((1, 2, 5), 3, dtype=torch.uint8)
    rows = rows_of(task().judge(logits, targets))
    told = task().prediction(rows, 0, (50, 20))
    assert told == {"shares": {"road": 70.0, "c2": 30.0}}
    assert task().sentence(told) == "road 70.0 %, c2 30.0 %"
    assert task().truth(rows, 0) == "c3 100.0 %"
    many = {"shares": {f"c{i}": 10.0 for i in range(7)}}
    assert task().sentence(many).endswith("c4 10.0 % and 2 more")


def test_the_blank_target_fits_the_network() -> None:
    blank = task().blank()
    assert blank.shape == (64, 64) and blank.dtype == np.uint8 and (blank == VOID).all()


def test_the_mask_of_a_prediction_has_the_images_size_and_a_palette() -> None:
    logits = torch.zeros(1, 4, 64, 64)
    logits[:, 2, :, 32:] = 1
    mask = task().mask(rows_of(task().answer(logits)), 0, (200, 100))
    assert mask.mode == "P" and mask.size == (200, 100)
    pixels = np.array(mask)
    assert (pixels[:, :100] == 0).all() and (pixels[:, 100:] == 2).all()
    assert mask.convert("RGB").getpixel((150, 50)) == tuple(palette()[2].tolist())


def test_the_palette_tells_classes_apart() -> None:
    colours = palette().astype(int)
    assert colours.shape == (256, 3)
    assert len({tuple(c) for c in colours[:VOID].tolist()}) == VOID
    distances = np.abs(colours[:24, None] - colours[None, :24]).max(2) + 255 * np.eye(24, dtype=int)
    assert distances.min() > 30


def test_a_mask_covers_an_image_and_leaves_void_bare() -> None:
    image = Image.new("RGB", (40, 20), (10, 20, 30))
    mask = np.zeros((2, 4), np.uint8)
    mask[:, 2:] = VOID
    pixels = np.array(covered(image, mask))
    assert (pixels[:, 20:] == (10, 20, 30)).all()
    assert (pixels[:, :20] > (10, 20, 30)).all()


@pytest.mark.parametrize(("size", "grown"), [((50, 40), (400, 640)), ((40, 50), (640, 400))])
def test_a_picture_shows_both_masks_and_the_names(
    size: tuple[int, int], grown: tuple[int, int]
) -> None:
    image = Image.new("RGB", size, (10, 20, 30))
    rows = rows_of(task().answer(torch.randn(1, 4, 64, 64)))
    truth = np.full(size[::-1], VOID, np.uint8)
    shown = task().picture(image, rows, 0, truth)
    assert shown.width == grown[0] and grown[1] < shown.height < grown[1] + 120
    alone = task().picture(image, rows, 0)
    assert alone.width == size[0] * 8 and alone.height > size[1] * 8
    assert image.size == size


def test_the_legend_ends_somewhere() -> None:
    mask = np.arange(40, dtype=np.uint8)[None].repeat(40, 0)
    names = [f"a class with a long name {i}" for i in range(40)]
    sheet = draw_masks(Image.new("RGB", (400, 400)), [("predicted", mask)], names)
    assert 400 < sheet.height < 800


def test_a_mask_image_keeps_every_class() -> None:
    mask = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert (np.array(mask_image(mask, (16, 16))) == mask).all()


# ---- settings, network and training -----------------------------------------------------------


def test_settings() -> None:
    data = Data("x", ("a", "b"), {}, task="segment")
    assert Segment.settings(TrainConfig(), data, load_or_build) == {"head": "lraspp"}
    assert Segment.settings(TrainConfig(head="deeplabv3"), data, load_or_build) == {
        "head": "deeplabv3"
    }
    with pytest.raises(ConfigError, match="--head fpn: segment knows lraspp and deeplabv3"):
        Segment.settings(TrainConfig(head="fpn"), data, load_or_build)


def shapes(num: int, size: int = 64) -> tuple[Tensor, Tensor]:
    """Squares and discs of any colour on noise, and their masks: 0 ground, 1 square, 2 disc."""
    rng = np.random.default_rng(0)
    images = rng.normal(0, 0.3, (num, 3, size, size)).astype(np.float32)
    targets = np.zeros((num, size, size), np.uint8)
    ys, xs = np.mgrid[:size, :size]
    for i in range(num):
        for label in (1, 2):
            y, x = rng.integers(14, size - 14), label * size // 2 - size // 4
            near = np.abs(np.stack((ys - y, xs - x)))
            inside = near.max(0) < 11 if label == 1 else np.hypot(*near) < 13
            images[i][:, inside] += rng.uniform(0.5, 2, (3, 1)) * rng.choice([-1, 1])
            targets[i][inside] = label
    return torch.from_numpy(images), torch.from_numpy(targets)


def test_it_learns_four_images_by_heart() -> None:
    learner = task(3)
    model, (images, targets) = learner.network(0), shapes(4)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        loss = learner.loss_sum(model(images), targets) / len(images)
        loss.backward()
        optimizer.step()
    model.eval()
    for module in model.modules():  # the statistics of the last weights, not of all before
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train().momentum = None
            module.reset_running_stats()
    with torch.no_grad():
        model(images)
        rows = rows_of(learner.judge(model.eval()(images), targets))
    found = learner.conclude(rows)
    assert found["miou"] > 85 and found["pixel_accuracy"] > 95, found
    assert rows["losses"].mean() < 0.15
