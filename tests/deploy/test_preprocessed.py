"""Preprocessing inside the file is Pillow's, level by level, at any size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from meshuffle.data import Preprocess
from meshuffle.deploy import preprocessed as module
from meshuffle.deploy.api import write
from meshuffle.deploy.formats import find_format
from meshuffle.deploy.formats.onnx import Onnx
from meshuffle.deploy.preprocessed import Preprocessed, own_size, with_preprocessing
from meshuffle.deploy.subject import Subject
from meshuffle.errors import ConfigError, ParityError
from tests.deploy.networks import PREPROCESS, make_card, make_images, small

SIDES = st.integers(1, 90)


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def differences(image: Image.Image, preprocess: Preprocess) -> np.ndarray:
    graph = Preprocessed(nn.Identity(), preprocess)
    found = graph.framed(torch.from_numpy(np.array(image))[None])[0]
    return np.abs(found.numpy() - preprocess.to_uint8(image).numpy().astype(np.float32))


@settings(max_examples=150, deadline=None)
@given(
    size=st.tuples(SIDES, SIDES),
    crop=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    resize=st.none() | st.integers(1, 60),
)
def test_it_is_what_pillow_does(
    size: tuple[int, int], crop: tuple[int, int], resize: int | None
) -> None:
    """Crops, black edges, strips; exact unless Pillow resamples the heights first."""
    assert differences(noise(*size), Preprocess(crop=crop, resize=resize)).max() <= 1


@pytest.mark.parametrize("size", [(375, 500), (333, 500), (500, 500), (51, 67), (224, 224), (8, 8)])
def test_a_photo_is_exact(size: tuple[int, int]) -> None:
    assert differences(noise(*size), Preprocess()).max() == 0


@pytest.mark.parametrize("size", [(20, 400), (400, 20), (1, 17), (33, 2)])
def test_the_middle_of_a_strip(size: tuple[int, int]) -> None:
    assert differences(noise(*size), Preprocess(crop=24, resize=28)).max() <= 1


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (100, 31)])
def test_stretched_images(size: tuple[int, int]) -> None:
    stretch = Preprocess(crop=(48, 32), resize=None, fit="stretch")
    assert differences(noise(*size), stretch).max() <= 1


@pytest.mark.parametrize("size", [(40, 60), (63, 64), (17, 29)])
def test_bicubic_is_within_a_level(size: tuple[int, int]) -> None:
    bicubic = Preprocess(crop=24, resize=28, interpolation="bicubic")
    assert differences(noise(*size), bicubic).max() <= 1


def test_nearest_is_refused() -> None:
    with pytest.raises(ConfigError, match="interpolation nearest has no graph; known are bilinear"):
        Preprocessed(nn.Identity(), Preprocess(interpolation="nearest"))


def make_subject(*, any_size: bool = True) -> Subject:
    subject = Subject(small(), make_card(), make_images())
    images = [noise(45, 61, 1), noise(70, 38, 2), noise(32, 32, 3)]
    return with_preprocessing(subject, images, any_size=any_size)


@pytest.mark.parametrize(
    "name", ["onnx", "openvino", "pt2", pytest.param("executorch", marks=pytest.mark.slow)]
)
def test_the_file_takes_images(tmp_path: Path, name: str) -> None:
    form = find_format(name)
    subject = make_subject(any_size=form.any_size)
    path = tmp_path / f"model{form.suffix}"
    parity = write(form, subject, path)
    assert parity.max_relative_error < 1e-5
    assert parity.image_relative_error is not None and parity.image_relative_error < 1e-5
    assert parity.image_agreement == 100.0
    assert f"takes {form.metadata(path)['input']}; against Pillow and the model" in str(parity)
    sizes = [(97, 33), (20, 64)] if form.any_size else [own_size(PREPROCESS)]
    network, run = small().eval(), form.open(path)
    for height, width in sizes:
        images = [noise(height, width, seed) for seed in range(3)]
        views = torch.stack([PREPROCESS.to_uint8(image) for image in images])
        with torch.no_grad():
            expected = network(PREPROCESS.normalise(views)).numpy()
        found = run(np.stack([np.array(image) for image in images]))
        assert np.abs(found - expected).max() < 2e-3  # a level in a few pixels


@pytest.mark.parametrize(
    ("preprocess", "size"),
    [
        (Preprocess(crop=24, resize=28), (28, 28)),
        (Preprocess(crop=(24, 30), resize=None), (24, 30)),
        (Preprocess(crop=(24, 30), resize=None, fit="stretch"), (24, 30)),
    ],
)
def test_a_file_of_fixed_size_takes_what_needs_no_resizing(
    preprocess: Preprocess, size: tuple[int, int]
) -> None:
    assert own_size(preprocess) == size


def test_other_preprocessing_in_the_graph_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_crop_from", lambda surplus: surplus)
    with pytest.raises(ParityError, match="the file's preprocessing disagrees with Pillow's"):
        write(Onnx(), make_subject(), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
