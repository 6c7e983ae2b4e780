"""Boxes and masks go where their pixels go."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from meshuffle.data import AugmentConfig, Preprocess, build_eval_transform, build_train_transform
from meshuffle.data.target import Boxes
from meshuffle.errors import ConfigError

VIEW = Preprocess(crop=(48, 64), resize=None, fit="stretch", interpolation="nearest")


def rectangle(width: int, height: int, box: tuple[int, int, int, int]) -> tuple[Image.Image, Boxes]:
    """A black image with one white rectangle, and its box."""
    pixels = np.zeros((height, width, 3), np.uint8)
    x1, y1, x2, y2 = box
    pixels[y1:y2, x1:x2] = 255
    xyxy = np.array([box], np.float32)
    return Image.fromarray(pixels), Boxes(xyxy, np.array([4]))


SIDES = st.tuples(st.integers(40, 120), st.integers(40, 120))
INSIDE = st.tuples(*[st.floats(0, 1)] * 4)


def box_in(size: tuple[int, int], shares: tuple[float, ...]) -> tuple[int, int, int, int]:
    """A box of at least 20 pixels a side."""
    width, height = size
    x1, y1 = int(shares[0] * (width - 20)), int(shares[1] * (height - 20))
    return (
        x1,
        y1,
        x1 + 20 + int(shares[2] * (width - x1 - 20)),
        y1 + 20 + int(shares[3] * (height - y1 - 20)),
    )


@given(size=SIDES, shares=INSIDE, draw=st.integers(0, 2**62))
@settings(max_examples=60, deadline=None)
def test_a_box_is_where_its_pixels_are(
    size: tuple[int, int], shares: tuple[float, ...], draw: int
) -> None:
    image, boxes = rectangle(*size, box_in(size, shares))
    config = AugmentConfig(random_resized_crop=0.3, flip=0.5)
    for transform in (
        build_eval_transform(VIEW, dense=True),
        build_train_transform(config, VIEW, dense=True),
    ):
        view, target = transform.pair(image, boxes, draw)
        assert view.shape == (3, 48, 64) and view.dtype == torch.uint8
        assert target.dtype == torch.float32
        if not len(target):
            continue  # its centre is outside the part
        assert target.shape == (1, 5) and target[0, 0] == 4
        white = view[0].numpy() > 127
        rows, columns = np.flatnonzero(white.any(1)), np.flatnonzero(white.any(0))
        found = [columns[0] / 64, rows[0] / 48, (columns[-1] + 1) / 64, (rows[-1] + 1) / 48]
        assert target[0, 1:].tolist() == pytest.approx(found, abs=1.1 / 48)


@given(size=SIDES, shares=INSIDE, draw=st.integers(0, 2**62))
@settings(max_examples=40, deadline=None)
def test_a_mask_is_where_its_pixels_are(
    size: tuple[int, int], shares: tuple[float, ...], draw: int
) -> None:
    image, _ = rectangle(*size, box_in(size, shares))
    mask = (np.array(image)[..., 0] > 127).astype(np.uint8) * 7
    config = AugmentConfig(random_resized_crop=0.3, flip=0.5)
    view, target = build_train_transform(config, VIEW, dense=True).pair(image, mask, draw)
    assert target.shape == (48, 64) and target.dtype == torch.uint8
    assert torch.equal(target == 7, view[0] > 127)


def test_the_view_is_a_function_of_the_draw() -> None:
    image, boxes = rectangle(90, 70, (10, 10, 50, 60))
    transform = build_train_transform(AugmentConfig(flip=0.5), VIEW, dense=True)
    views = [transform.pair(image, boxes, draw) for draw in (1, 2, 3, 4, 5, 6, 1)]
    assert torch.equal(views[0][0], views[-1][0]) and torch.equal(views[0][1], views[-1][1])
    assert len({tuple(target[0].tolist()) for _, target in views}) == 2  # mirrored and not


def test_an_image_without_boxes_and_pixels_alone() -> None:
    image, _ = rectangle(60, 60, (0, 0, 30, 30))
    none = Boxes(np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    _, target = build_eval_transform(VIEW, dense=True).pair(image, none, 0)
    assert target.shape == (0, 5)
    with pytest.raises(ConfigError, match=r"affine_degrees .*boxes and masks take crop_scale"):
        build_train_transform(AugmentConfig(affine_degrees=3), VIEW, dense=True)
