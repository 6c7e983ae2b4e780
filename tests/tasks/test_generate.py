"""Generation: evaluation, words and pictures, settings, and that it learns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

from meshuffle.config import TrainConfig
from meshuffle.data import Batch, augmentation_for
from meshuffle.data.base import Data
from meshuffle.errors import ConfigError, ModelError
from meshuffle.infer.evaluation import evaluate_batches
from meshuffle.parallel.random_masks import draw_key
from meshuffle.tasks.gan import Gan
from meshuffle.tasks.generate import Generate, sheet
from meshuffle.train.defaults import resolve
from meshuffle.train.optimiser import average
from meshuffle.train.state import augment_values
from meshuffle.weights import load_or_build, save_weights
from tests.tasks.gans import (
    PREPROCESS,
    SIZE,
    card,
    gan,
    make_batch,
    make_step,
    photos,
    saved_classifier,
    task,
)


def evaluated(model: Gan, sizes: list[int], **more: Any) -> Any:
    num = sum(sizes)
    starts = np.cumsum([0, *sizes]).tolist()
    batches = [make_batch(a, a + n, num) for a, n in zip(starts, sizes, strict=False)]
    judge = task(**more)
    return evaluate_batches(model, batches, judge, PREPROCESS, torch.device("cpu"))


def test_evaluation_does_not_depend_on_the_batches() -> None:
    model = gan().eval()
    found, expected = evaluated(model, [3, 5, 1]), evaluated(model, [9])
    assert found.num_samples == 9 and found.metrics.keys() == {"fid", "told_apart", "loss"}
    for name, column in expected.rows.items():
        np.testing.assert_allclose(found.rows[name], column, rtol=1e-4, atol=1e-4, err_msg=name)
    assert found.rows["samples"].shape == (9, 3, SIZE, SIZE)
    assert found.metrics["fid"] > 0
    assert task().score(found.metrics) == -found.metrics["fid"]


def test_training_mode_is_the_discriminator() -> None:
    model = gan()
    logits = model(PREPROCESS.normalise(photos(3)))
    assert logits.shape == (3, 1)
    loss = task().loss_sum(logits, torch.zeros(3))
    assert loss.item() == pytest.approx((1 - logits).clamp_min(0).sum().item())


def test_the_average_is_judged_alike() -> None:
    """The averaged networks are what the loop evaluates with --ema."""
    model = gan()
    averaged = average(model, 0.5)
    assert isinstance(averaged.module, Gan)
    averaged.update_parameters(model)
    assert evaluated(averaged.module, [4]).num_samples == 4
    for name, buffer in averaged.module.critic.named_buffers():
        assert torch.equal(buffer, model.critic.get_buffer(name)), name


def test_the_logits_of_an_average_are_as_large_as_ever(alone: None) -> None:
    """Its spectral norm is that of the averaged weights, however far they have moved."""
    assert dist.group.WORLD is not None
    step = make_step(dist.group.WORLD, optimizer="adam")
    averaged = average(gan().double(), 0.8)
    for i in range(30):
        step.run([make_batch(0, 7)], [7], 0.01, [(draw_key(0, i), 0)])
        averaged.update_parameters(step.model)
    for module in averaged.module.discriminator.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            largest = torch.linalg.matrix_norm(module.eval().weight.flatten(1), ord=2)
            assert 0.9 < float(largest.detach()) < 1.3


def test_large_samples_are_kept_small_and_those_of_an_answer_whole() -> None:
    preprocess = replace(PREPROCESS, crop=(64, 64))
    model = gan(preprocess=preprocess).eval()
    judge = task(preprocess=preprocess)
    with torch.no_grad():
        outputs = model(preprocess.normalise(photos(2, size=64)))
    small = judge.judge(outputs, torch.zeros(2))["samples"]
    whole = judge.answer(outputs)["samples"]
    assert small.shape == (2, 3, 32, 32) and whole.shape == (2, 3, 64, 64)
    assert torch.equal(small, whole[:, :, 1::2, 1::2])


def test_words_and_pictures() -> None:
    rows = evaluated(gan().eval(), [5]).rows
    told = task().prediction(rows, 0, (8, 8))
    assert told.keys() == {"realness"}
    assert task().sentence({"realness": 0.831}) == "realness +0.83"
    shown = task().picture(Image.new("RGB", (8, 8)), rows, 3)
    assert shown.mode == "RGB" and max(shown.size) >= 300
    assert task().blank().dtype == np.int64


def test_samples_follow_the_seed_and_leave_the_model_as_it_was() -> None:
    model = gan()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first, second, other = (np.array(task().sample(model, 9, seed)) for seed in (1, 1, 2))
    assert (first == second).all() and (first != other).any()
    assert model.training
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_a_sheet_holds_every_image() -> None:
    images = np.arange(7, dtype=np.uint8).repeat(3 * 500 * 500).reshape(7, 3, 500, 500)
    found = np.array(sheet(images))
    assert set(np.unique(found)) == {*range(7), 255}
    assert found.shape == (3 * 502 + 2, 3 * 502 + 2, 3)


def test_nothing_changes_the_images_unless_asked_for() -> None:
    """A GAN learns whatever it is shown: the digits' small turns, or the photos' crops, too."""
    for style in ("symbols", "thumbnails", "photos"):
        data = replace(DATA, style=style)
        augment = augment_values(augmentation_for(data))
        config, _ = resolve(TrainConfig(), 100, 32, augment, task_defaults=Generate.defaults)
        assert config.optimizer == "adam" and config.lr == 0.0007
        off = {"affine_degrees", "affine_translate", "affine_scale", "crop_scale", "erasing"}
        assert not any(getattr(config, name) for name in {*off, "trivial_augment", "mixup"})
    given = TrainConfig(crop_scale=0.5)
    config, _ = resolve(given, 100, 32, augment, task_defaults=Generate.defaults)
    assert config.crop_scale == 0.5


DATA = Data("x", ("a",), {}, input_size=32, task="generate")


def test_settings(tmp_path: Path) -> None:
    assert (
        Generate.settings(TrainConfig(knobs={"width": "8", "noise": "16"}), DATA, load_or_build)
        == {}
    )
    path = tmp_path / "best.safetensors"
    saved_classifier(path)
    kept = Generate.settings(TrainConfig(knobs={"features": str(path)}), DATA, load_or_build)
    assert kept["features"]["run"] == str(path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            TrainConfig(input_size=28),
            "28×28 pixels: a generator doubles from 4; set --input-size 32",
        ),
        (TrainConfig(input_size=224), "set --input-size 256"),
        (TrainConfig(head="lraspp"), "generate has no choice of heads"),
        (TrainConfig(model="shufflenet_v2_x0_5"), "--model shufflenet_v2_x0_5: generate has two"),
        (TrainConfig(knobs={"widht": "8"}), "--knobs.widht: .*; did you mean 'width'"),
        (TrainConfig(dropout=0.2), "--dropout 0.2: generate has none"),
        (TrainConfig(freeze="backbone"), "--freeze backbone: generate trains all"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_settings_without_a_meaning_are_refused(config: TrainConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Generate.settings(config, DATA, load_or_build)


def test_knobs_of_a_wrong_kind_are_refused() -> None:
    with pytest.raises(ModelError, match="width and noise are whole numbers"):
        task(knobs={"width": "wide"}).network(0)
    with pytest.raises(ModelError, match="width"):
        task(knobs={"width": 7}).network(0)


def test_a_seed_gives_the_weights() -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first, second, other = (task().network(seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert not [name for name in first if name.startswith("critic") and "factor" in name]


def test_weights_travel(tmp_path: Path) -> None:
    from meshuffle.weights import load_model

    model = gan()
    save_weights(tmp_path / "gan.safetensors", model.state_dict(), card())
    loaded, _ = load_model(tmp_path / "gan.safetensors")
    x = PREPROCESS.normalise(photos(2))
    torch.testing.assert_close(loaded(x), model.eval()(x))


def test_it_learns_two_kinds_of_images(alone: None) -> None:
    """Red ones and blue ones, of any brightness: it makes both, and nothing green."""
    assert dist.group.WORLD is not None
    rng, num = np.random.default_rng(0), 400
    pixels = rng.integers(15, 30, (num, 3, SIZE, SIZE), dtype=np.uint8)
    pixels[: num // 2, 0] += rng.integers(150, 220, (num // 2, 1, 1), dtype=np.uint8)
    pixels[num // 2 :, 2] += rng.integers(150, 220, (num // 2, 1, 1), dtype=np.uint8)
    images, ids = torch.from_numpy(pixels), torch.arange(num)
    step = make_step(dist.group.WORLD, optimizer="adam")
    step.model.float()
    every = Batch(images, torch.zeros_like(ids), ids, ids, ids, [])
    before = evaluate_batches(step.model, [every], task(), PREPROCESS, step.device)
    for i in range(120):
        order = torch.from_numpy(rng.permutation(num)[:32])
        batch = Batch(images[order], torch.zeros(32), order, order, torch.arange(32), [])
        step.run([batch], [32], 0.002, [(draw_key(0, i), 0)])
    after = evaluate_batches(step.model, [every], task(), PREPROCESS, step.device)
    assert after.metrics["fid"] < 0.5 * before.metrics["fid"]
    red, green, blue = after.rows["samples"].mean((2, 3)).T
    assert 0.2 < (red > blue).mean() < 0.8
    assert green.mean() < 60 and np.abs(red - blue).mean() > 60
