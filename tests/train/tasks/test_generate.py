"""Generation: the distance, the critic, noise, the step of two updates, and that it learns."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from scipy import linalg, stats
from torch import Tensor, nn
from torch.nn import functional as F

from meshuffle.data import AugmentConfig, Batch, Preprocess
from meshuffle.data.base import Data
from meshuffle.dist.exchange import make_exchange
from meshuffle.errors import ConfigError, ModelError, RunError
from meshuffle.models import create_model
from meshuffle.parallel.batch_norm import synchronise_batch_norm
from meshuffle.parallel.data_parallel import DataParallel, Mode
from meshuffle.parallel.draws import draw_key
from meshuffle.train.config import TrainConfig
from meshuffle.train.evaluate import evaluate
from meshuffle.train.fid import (
    critic_settings,
    frechet_distance,
    make_critic,
    random_critic,
)
from meshuffle.train.gan import BETAS, Gan, GanStep
from meshuffle.train.optim import average, build_optimizer, freeze
from meshuffle.train.tasks import make_task
from meshuffle.train.tasks.generate import Generate, sheet
from meshuffle.train.weights import Card, load_matching, save_weights
from tests.ranks import run_ranks

SIZE, WIDTH, NOISE = 8, 4, 6
PREPROCESS = Preprocess(crop=SIZE, resize=SIZE, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def card(**more: Any) -> Card:
    knobs = {"width": WIDTH, "noise": NOISE}
    values = {"model": "shufflenet_v2_x1_0", "classes": ("a",), "preprocess": PREPROCESS}
    return Card(**{**values, "task": "generate", "knobs": knobs, **more})


def task(**more: Any) -> Generate:
    made = make_task(card(**more))
    assert isinstance(made, Generate)
    return made


def gan(**more: Any) -> Gan:
    made = task(**more).network(0)
    assert isinstance(made, Gan)
    return made


def photos(num: int, seed: int = 0, size: int = SIZE) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, 3, size, size), generator=generator, dtype=torch.uint8)


# ---- the Fréchet distance ---------------------------------------------------------------------


def by_sqrtm(a: NDArray[Any], b: NDArray[Any]) -> float:
    """As it is usually written."""
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(cov_a @ cov_b).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root))


@pytest.mark.parametrize(("num", "features"), [(50, 2), (200, 10), (400, 64)])
def test_the_distance_is_the_textbooks(num: int, features: int) -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(num, features)) @ rng.normal(size=(features, features))
    b = 0.5 + rng.normal(size=(num + 7, features)) @ rng.normal(size=(features, features))
    assert frechet_distance(a, b) == pytest.approx(by_sqrtm(a, b), rel=1e-8)


def test_the_distance_of_one_feature() -> None:
    """(μ₁ − μ₂)² + (σ₁ − σ₂)²."""
    a, b = np.array([[0.0], [2.0]]), np.array([[10.0], [10.0], [16.0]])
    expected = (1 - 12) ** 2 + (np.std([0, 2], ddof=1) - np.std([10, 10, 16], ddof=1)) ** 2
    assert frechet_distance(a, b) == pytest.approx(expected)


@settings(max_examples=30)
@given(st.integers(0, 1 << 16), st.integers(2, 40), st.integers(1, 20))
def test_the_distance_is_one(seed: int, num: int, features: int) -> None:
    """Symmetric, zero of the same, the same in turned and shifted features; also of few images."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(num, features)), 3 * rng.normal(size=(num + 1, features)) + 1
    found = frechet_distance(a, b)
    assert found >= 0
    scale = 1e-6 * (1 + float((a**2).sum() + (b**2).sum()))  # roots of noise where it is singular
    assert frechet_distance(b, a) == pytest.approx(found, abs=scale)
    assert frechet_distance(a, a) == pytest.approx(0, abs=scale)
    turn = np.linalg.qr(rng.normal(size=(features, features)))[0]
    assert frechet_distance(a @ turn + 5, b @ turn + 5) == pytest.approx(found, abs=scale)


def test_the_distance_of_single_images_is_that_of_their_features() -> None:
    assert frechet_distance(np.array([[1.0, 2.0]]), np.array([[4.0, 6.0]])) == pytest.approx(25)


# ---- the critic -------------------------------------------------------------------------------


def test_the_random_critic_sees_something() -> None:
    critic = random_critic(PREPROCESS)
    with torch.no_grad():
        features = critic(PREPROCESS.normalise(photos(20, size=32)))
    assert features.shape == (20, 64)
    assert (features.std(0) > 1e-3).float().mean() > 0.9
    again = random_critic(PREPROCESS).state_dict()
    assert all(torch.equal(again[name], value) for name, value in critic.state_dict().items())


def test_nothing_of_the_critic_is_trained() -> None:
    model = gan()
    assert not list(model.critic.parameters()) and list(model.critic.buffers())
    freeze(model, "none")
    before = {k: v.clone() for k, v in model.critic.state_dict().items()}
    model.train()
    assert model.training and not any(m.training for m in model.critic.modules())
    assert all(torch.equal(model.critic.state_dict()[k], v) for k, v in before.items())


@pytest.mark.parametrize(
    "other",
    [
        Preprocess(crop=SIZE, resize=SIZE),
        Preprocess(crop=SIZE, resize=SIZE, channels="BGR", mean=(0.1, 0.2, 0.3)),
        Preprocess(crop=SIZE, resize=SIZE, channels="BGR", scale=1.0, mean=(0,) * 3, std=(1,) * 3),
    ],
)
def test_features_do_not_depend_on_how_images_are_normalised(other: Preprocess) -> None:
    images = photos(4)
    expected = random_critic(PREPROCESS)(PREPROCESS.normalise(images))
    found = random_critic(other)(other.normalise(images))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def saved_classifier(path: Path) -> nn.Module:
    knobs: dict[str, Any] = {"width": 0.25, "depths": [1, 1, 1], "head_channels": 24}
    network = create_model("shufflenet_v2_x0_5", num_classes=3, seed=5, **knobs).eval()
    own = Preprocess(crop=32, resize=36, mean=(0.2, 0.3, 0.4), std=(0.3, 0.3, 0.2))
    saved = Card("shufflenet_v2_x0_5", ("a", "b", "c"), own, knobs=knobs)
    save_weights(path, network.state_dict(), saved)
    return network


def test_the_critic_of_a_run_has_its_pooled_features(tmp_path: Path) -> None:
    path = tmp_path / "best.safetensors"
    network = saved_classifier(path)
    kept = critic_settings(str(path))
    assert kept["run"] == str(path)
    seen: list[Tensor] = []
    network.get_submodule("fc").register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    images = photos(4, size=32)
    own = Preprocess(crop=32, resize=36, mean=(0.2, 0.3, 0.4), std=(0.3, 0.3, 0.2))
    network(own.normalise(images))
    found = make_critic(kept, PREPROCESS)(PREPROCESS.normalise(images))
    torch.testing.assert_close(found, seen[0], rtol=1e-3, atol=1e-5)


def test_a_run_outlives_its_critics_files(tmp_path: Path) -> None:
    path = tmp_path / "best.safetensors"
    saved_classifier(path)
    settings = {"features": critic_settings(str(path))}
    model = gan(settings=settings)
    path.unlink()
    again = gan(settings=settings)
    assert load_matching(again, model.state_dict()) == ([], [], [])
    images = PREPROCESS.normalise(photos(2))
    torch.testing.assert_close(again.critic(images), model.critic(images))


def test_a_critic_of_another_task_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "gan.safetensors"
    save_weights(path, gan().state_dict(), card())
    with pytest.raises(ConfigError, match=r"--knobs.features .*: a generate model"):
        critic_settings(str(path))
    with pytest.raises(RunError, match="no such"):
        critic_settings(str(tmp_path / "nothing"))


# ---- noise ------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(0, (1 << 63) - 1), st.lists(st.integers(0, 4), min_size=1, max_size=4))
def test_ranks_draw_their_parts_of_the_same_noise(key: int, sizes: list[int]) -> None:
    model, starts = SMALL_GAN, np.cumsum([0, *sizes]).tolist()
    parts = [model.noise(key, num, 1, first) for num, first in zip(sizes, starts, strict=False)]
    assert torch.equal(torch.cat(parts), model.noise(key, sum(sizes), 1))


def test_noise_is_normal_and_its_draws_differ() -> None:
    draws = [SMALL_GAN.noise(key, 4000, draw) for key in (1, 2) for draw in (0, 1)]
    for z in draws:
        assert z.dtype == torch.float32
        assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-3
    numbers = torch.stack([z.flatten() for z in draws])
    assert (torch.corrcoef(numbers) - torch.eye(4)).abs().max() < 0.03


def test_the_noise_of_an_image_is_its_own() -> None:
    """It knows neither the batch nor how images are normalised, and a byte changes all of it."""
    images = photos(5)
    z = SMALL_GAN.noise_for(PREPROCESS.normalise(images))
    assert torch.equal(SMALL_GAN.noise_for(PREPROCESS.normalise(images[3:4]))[0], z[3])
    channels_last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(SMALL_GAN.noise_for(PREPROCESS.normalise(channels_last)), z)
    images[3, 0, 0, 0] ^= 1
    other = SMALL_GAN.noise_for(PREPROCESS.normalise(images))
    assert not (other[3] == z[3]).any() and torch.equal(other[:3], z[:3])


def test_made_images_are_normalised_as_real_ones() -> None:
    made = SMALL_GAN.make(SMALL_GAN.noise(0, 3))
    pixels = SMALL_GAN.to_bytes(made)
    assert pixels.min() >= 0 and pixels.max() <= 255
    torch.testing.assert_close(
        PREPROCESS.normalise(pixels.to(torch.uint8)), made, rtol=0, atol=0.6 / 255 / 0.2
    )


# ---- the step ---------------------------------------------------------------------------------


def make_step(
    group: dist.ProcessGroup, mode: Mode = "replicate", optimizer: str = "sgd", **more: Any
) -> GanStep:
    model = gan().double().train()
    synchronise_batch_norm(model, make_exchange(group, torch.device("cpu"), True))
    config = TrainConfig(optimizer=optimizer, lr=0.1, weight_decay=0.01)  # type: ignore[arg-type]
    return GanStep(
        model=model,
        forward=model,
        optimizer=build_optimizer(model, config),
        parallel=DataParallel(model, group, mode),
        task=task(),
        preprocess=PREPROCESS,
        augment=AugmentConfig(),
        device=torch.device("cpu"),
        channels_last=False,
        **more,
    )


def make_batch(start: int, stop: int, num: int = 7) -> Batch:
    ids = torch.arange(start, stop)
    return Batch(photos(num)[start:stop], torch.zeros_like(ids), ids, ids, ids - start, [])


def train(step: GanStep, bounds: list[tuple[int, int]], lr: float = 0.05) -> dict[str, Tensor]:
    """Two steps on micro-batches of samples start … stop, of 7 each; the state and the sums."""
    sums = torch.zeros(3, dtype=torch.float64)
    for i in range(2):
        micro = [make_batch(*bound) for bound in bounds]
        draws = [(draw_key(3, i, m), start) for m, (start, _) in enumerate(bounds)]
        sums += step.run(micro, [7] * len(bounds), lr, draws)
    return {**{k: v.clone() for k, v in step.model.state_dict().items()}, "sums": sums}


def by_hand(num_steps: int = 2, lr: float = 0.05) -> dict[str, Tensor]:
    """The same in plain torch: two networks, two optimisers."""
    model = gan().double().train()
    config = TrainConfig(optimizer="sgd", lr=lr, weight_decay=0.01)
    optimizers = [build_optimizer(m, config) for m in (model.discriminator, model.generator)]
    x = PREPROCESS.normalise(photos(7)).double()
    sums = torch.zeros(3, dtype=torch.float64)
    for i in range(num_steps):
        key = draw_key(3, i)
        made = model.make(model.noise(key, 7, 0)).detach()
        real_logits, made_logits = model.discriminator(x), model.discriminator(made)
        loss = F.relu(1 - real_logits).mean() + F.relu(1 + made_logits).mean()
        model.zero_grad()
        loss.backward()
        optimizers[0].step()
        right = float((real_logits > made_logits).sum())
        sums += torch.tensor([7 * float(loss.detach()), right, 7.0]).double()
        loss = -model.discriminator(model.make(model.noise(key, 7, 1))).mean()
        model.zero_grad()
        loss.backward()
        optimizers[1].step()
    return {**model.state_dict(), "sums": sums}


def same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        close = {"rtol": 100 * tolerance, "atol": tolerance}
        torch.testing.assert_close(found[name], value, **close, msg=lambda m, n=name: f"{n}: {m}")


def test_a_step_is_two_updates(alone: None) -> None:
    assert dist.group.WORLD is not None
    found, expected = train(make_step(dist.group.WORLD), [(0, 7)]), by_hand()
    for name in ("sums",):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6)
    same(found, expected, 1e-6)
    start = gan().double().state_dict()
    moved = {name.partition(".")[0] for name in start if not torch.equal(found[name], start[name])}
    assert moved == {"generator", "discriminator"}


def test_no_gradient_is_left_behind(alone: None) -> None:
    assert dist.group.WORLD is not None
    step = make_step(dist.group.WORLD)
    train(step, [(0, 7)])
    assert all(p.grad is None and p.requires_grad for p in step.model.parameters())


def test_each_phase_leaves_the_other_network_alone(alone: None) -> None:
    """Nor does the optimiser's momentum or weight decay touch it."""
    assert dist.group.WORLD is not None
    step = make_step(dist.group.WORLD, optimizer="adam")
    train(step, [(0, 7)])
    before = copy.deepcopy(dict(step.model.named_parameters()))
    step._phase("generator", lambda i: step._generate(7, 1, 0).sum(), [0], 0.1)
    changed = {
        n.partition(".")[0] for n, p in step.model.named_parameters() if p.ne(before[n]).any()
    }
    assert changed == {"generator"}
    assert {group["betas"] for group in step.optimizer.param_groups} == {BETAS}
    steps = {int(state["step"]) for state in step.optimizer.state.values()}
    assert steps == {2, 3}


def test_a_batch_without_samples_changes_nothing(alone: None) -> None:
    assert dist.group.WORLD is not None
    step = make_step(dist.group.WORLD)
    before = {k: v.clone() for k, v in step.model.state_dict().items()}
    assert step.run([make_batch(0, 0)], [0], 0.1).tolist() == [0, 0, 0]
    assert all(torch.equal(step.model.state_dict()[k], v) for k, v in before.items())


def test_micro_batches_accumulate_one_gradient(alone: None) -> None:
    """Of networks in eval mode, whose batch norm does not know the micro-batch."""
    assert dist.group.WORLD is not None
    results = []
    for bounds in ([(0, 7)], [(0, 3), (3, 3), (3, 7)]):
        step = make_step(dist.group.WORLD, num_micro_batches=len(bounds))
        step.model.generator.eval()
        step.model.discriminator.eval()
        micro = [make_batch(*bound) for bound in bounds]
        counts = [stop - start for start, stop in bounds]
        draws = [(draw_key(3, 0), start) for start, _ in bounds]  # one key, as of one batch
        sums = step.run(micro, counts, 0.05, draws)
        results.append({**step.model.state_dict(), "sums": sums})
    same(results[1], results[0])


def test_it_needs_no_draws_to_be_timed(alone: None) -> None:
    assert dist.group.WORLD is not None
    sums = make_step(dist.group.WORLD).run([make_batch(0, 7)], [7], 0.0)
    assert sums[2] == 7 and bool(sums.isfinite().all())


def test_other_buckets_are_made_for_another_reducer(alone: None) -> None:
    assert dist.group.WORLD is not None
    step = make_step(dist.group.WORLD)
    train(step, [(0, 7)])
    step.parallel.close()
    step.parallel = DataParallel(step.model, dist.group.WORLD)
    first = step._reducers["generator"]
    train(step, [(0, 7)])
    assert step._reducers["generator"] is not first


Part = tuple[int, int]


def on_ranks(
    group: dist.ProcessGroup, cases: list[tuple[Mode, list[Part]]]
) -> list[dict[str, Tensor]]:
    """Two steps of each case on this rank's part."""
    rank = dist.get_rank(group)
    return [train(make_step(group, mode), [parts[rank]]) for mode, parts in cases]


def test_any_number_of_ranks_does_the_same(alone: None) -> None:
    """Also with uneven parts, and where a rank has no sample at all."""
    assert dist.group.WORLD is not None
    expected = train(make_step(dist.group.WORLD), [(0, 7)])
    cases: list[tuple[Mode, list[Part]]] = [
        ("replicate", [(0, 4), (4, 7)]),
        ("replicate", [(0, 7), (7, 7)]),
        ("central", [(0, 4), (4, 7)]),
        ("shard", [(0, 2), (2, 7)]),
    ]
    ranks = run_ranks(on_ranks, 2, cases)
    for first, second in zip(*ranks, strict=True):
        sums = first.pop("sums") + second.pop("sums")
        same(first, second, 1e-12)
        same({**first, "sums": sums}, expected)


# ---- the task ---------------------------------------------------------------------------------


def evaluated(model: Gan, sizes: list[int], **more: Any) -> Any:
    num = sum(sizes)
    starts = np.cumsum([0, *sizes]).tolist()
    batches = [make_batch(a, a + n, num) for a, n in zip(starts, sizes, strict=False)]
    judge = task(**more)
    return evaluate(model, batches, judge, PREPROCESS, torch.device("cpu"))


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


def test_large_samples_are_kept_small_unless_asked_for() -> None:
    preprocess = replace(PREPROCESS, crop=(64, 64))
    model = gan(preprocess=preprocess).eval()
    judge = task(preprocess=preprocess)
    with torch.no_grad():
        outputs = model(preprocess.normalise(photos(2, size=64)))
    small = judge.judge(outputs, torch.zeros(2))["samples"]
    judge.detailed = True
    whole = judge.judge(outputs, torch.zeros(2))["samples"]
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


DATA = Data("x", ("a",), {}, input_size=32, task="generate")


def test_settings(tmp_path: Path) -> None:
    assert Generate.settings(TrainConfig(knobs={"width": "8", "noise": "16"}), DATA) == {}
    path = tmp_path / "best.safetensors"
    saved_classifier(path)
    kept = Generate.settings(TrainConfig(knobs={"features": str(path)}), DATA)
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
        Generate.settings(config, DATA)


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
    from meshuffle.train.weights import load_model

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
    before = evaluate(step.model, [every], task(), PREPROCESS, step.device)
    for i in range(120):
        order = torch.from_numpy(rng.permutation(num)[:32])
        batch = Batch(images[order], torch.zeros(32), order, order, torch.arange(32), [])
        step.run([batch], [32], 0.002, [(draw_key(0, i), 0)])
    after = evaluate(step.model, [every], task(), PREPROCESS, step.device)
    assert after.metrics["fid"] < 0.5 * before.metrics["fid"]
    red, green, blue = after.rows["samples"].mean((2, 3)).T
    assert 0.2 < (red > blue).mean() < 0.8
    assert green.mean() < 60 and np.abs(red - blue).mean() > 60


SMALL_GAN = gan().eval()
