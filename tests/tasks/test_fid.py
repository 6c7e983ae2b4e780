"""The Fréchet distance is the textbook's, and the critic sees what it should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import linalg
from torch import Tensor

from meshuffle.data import Preprocess
from meshuffle.errors import ConfigError, RunError
from meshuffle.tasks.fid import critic_settings, frechet_distance, make_critic, random_critic
from meshuffle.train.optimiser import freeze
from meshuffle.weights import load_matching, load_or_build, save_weights
from tests.tasks.gans import PREPROCESS, SIZE, card, gan, photos, saved_classifier


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
    assert features.shape == (20, 32)
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


def test_the_critic_of_a_run_has_its_pooled_features(tmp_path: Path) -> None:
    path = tmp_path / "best.safetensors"
    network = saved_classifier(path)
    kept = critic_settings(str(path), load_or_build)
    assert kept["run"] == str(path)
    seen: list[Tensor] = []
    network.get_submodule("fc").register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    images = photos(4, size=32)
    own = Preprocess(crop=32, resize=36, mean=(0.2, 0.3, 0.4), std=(0.3, 0.3, 0.2))
    network(own.normalise(images))
    found = make_critic(kept, PREPROCESS, load_or_build)(PREPROCESS.normalise(images))
    torch.testing.assert_close(found, seen[0], rtol=1e-3, atol=1e-5)


def test_a_run_outlives_its_critics_files(tmp_path: Path) -> None:
    path = tmp_path / "best.safetensors"
    saved_classifier(path)
    settings = {"features": critic_settings(str(path), load_or_build)}
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
        critic_settings(str(path), load_or_build)
    with pytest.raises(RunError, match="no such"):
        critic_settings(str(tmp_path / "nothing"), load_or_build)
