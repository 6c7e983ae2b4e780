import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from meshuffle.data.shapes import (
    ShapeList,
    area_of,
    check_runs,
    decode_runs,
    fill_polygon,
    fill_runs,
)
from meshuffle.data.target import VOID


def runs_of(mask: np.ndarray) -> np.ndarray:
    """Run lengths down the columns, beginning with zeros."""
    flat = np.concatenate([[0], mask.T.ravel(), [2]])
    changes = np.flatnonzero(np.diff(flat) != 0)
    lengths = np.diff(changes, prepend=0)
    return lengths.astype(np.int64)


def compressed(runs: np.ndarray) -> str:
    """COCO's text of run lengths, written from its description."""
    text = ""
    for i, run in enumerate(runs.tolist()):
        number = run - (runs[i - 2].item() if i > 2 else 0)
        more = True
        while more:
            group, number = number & 31, number >> 5
            more = number != (-1 if group & 16 else 0)
            text += chr(48 + group + (32 if more else 0))
    return text


masks = arrays(
    np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40)), elements=st.integers(0, 1)
)


@given(masks, st.integers(1, 254))
def test_runs_there_and_back(mask, value):
    runs = runs_of(mask)
    decoded = decode_runs(compressed(runs))
    assert decoded.tolist() == runs.tolist()
    check_runs(decoded, mask.shape[1], mask.shape[0])
    drawn = np.zeros_like(mask)
    fill_runs(drawn, decoded, value)
    np.testing.assert_array_equal(drawn, mask * value)
    assert area_of(decoded) == mask.sum()


@given(st.lists(st.integers(0, 10**8), min_size=1, max_size=20))
def test_large_numbers_survive_the_text(numbers):
    runs = np.array(numbers)
    assert decode_runs(compressed(runs)).tolist() == numbers


@given(masks)
def test_the_text_is_what_faster_coco_eval_writes(mask):
    core = pytest.importorskip("faster_coco_eval.core.mask", reason="not installed")
    encoded = core.encode(np.asfortranarray(mask))
    assert decode_runs(encoded["counts"].decode()).tolist() == runs_of(mask).tolist()


@given(st.text(max_size=20))
def test_any_text_is_decoded_or_refused(text):
    try:
        decode_runs(text)
    except ValueError as error:
        assert "run lengths" in str(error)


@pytest.mark.parametrize("text", ["", "0P", "!", "0é", "o" * 30 + "0"])
def test_text_that_is_none(text):
    with pytest.raises(ValueError, match="run lengths"):
        decode_runs(text)


def test_runs_must_fill_the_image():
    with pytest.raises(ValueError, match="cover 11 pixels, not 4×3"):
        check_runs(np.array([5, 6]), 4, 3)
    with pytest.raises(ValueError, match="cover 12"):
        check_runs(np.array([14, -2]), 4, 3)


whole = st.integers(-5, 25)


@given(whole, whole, whole, whole, st.booleans())
def test_a_rectangle_is_its_pixels(x1, y1, x2, y2, backwards):
    corners = [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
    points = np.array(corners[::-1] if backwards else corners, dtype=np.float32).ravel()
    drawn = np.zeros((17, 20), np.uint8)
    fill_polygon(drawn, points, 7)
    expected = np.zeros_like(drawn)
    left, right, top, bottom = (
        max(v, 0) for v in (min(x1, x2), max(x1, x2), min(y1, y2), max(y1, y2))
    )
    expected[top:bottom, left:right] = 7
    np.testing.assert_array_equal(drawn, expected)
    assert area_of(points) == abs(x2 - x1) * abs(y2 - y1)


@given(masks)
def test_the_outline_of_a_staircase_is_its_pixels(mask):
    """A polygon around columns of different heights, drawn and read as runs, is the mask."""
    heights = mask.sum(axis=0).astype(int)
    steps = [(x + dx, int(h)) for x, h in enumerate(heights) for dx in (0, 1)]
    points = np.array([(0, 0), *steps, (len(heights), 0)], dtype=np.float32).ravel()
    expected = (np.arange(mask.shape[0])[:, None] < heights).astype(np.uint8)
    drawn = np.zeros_like(mask)
    fill_polygon(drawn, points, 1)
    np.testing.assert_array_equal(drawn, expected)
    again = np.zeros_like(mask)
    fill_runs(again, decode_runs(compressed(runs_of(drawn))), 1)
    np.testing.assert_array_equal(again, expected)


@given(st.integers(0, 10**6))
def test_area_of_a_star(seed):
    """The pixels drawn are the polygon's area, up to its border."""
    rng = np.random.default_rng(seed)
    angles = np.sort(rng.uniform(0, 2 * np.pi, 12))
    radii = rng.uniform(20, 60, 12)
    points = np.stack([80 + radii * np.cos(angles), 80 + radii * np.sin(angles)], axis=1)
    drawn = np.zeros((160, 160), np.uint8)
    fill_polygon(drawn, points.astype(np.float32).ravel(), 1)
    border = np.hypot(*(points - np.roll(points, 1, axis=0)).T).sum()
    assert abs(int(drawn.sum()) - area_of(points.astype(np.float32).ravel())) <= border / 2


def test_one_polygon_crossing_itself_is_drawn_by_the_even_odd_rule():
    drawn = np.zeros((4, 4), np.uint8)
    twice = np.array([0, 0, 4, 0, 4, 4, 0, 4] * 2, dtype=np.float32)
    fill_polygon(drawn, twice, 1)
    assert not drawn.any()


def square(left: int, top: int, side: int) -> np.ndarray:
    corners = [left, top, left + side, top, left + side, top + side, left, top + side]
    return np.array(corners, dtype=np.float32)


def test_order_of_drawing():
    """What counts nothing lies below, and the smaller object on top."""
    shapes = ShapeList()
    shapes.add(1, 2, 4.0, [square(1, 1, 2)])
    shapes.add(1, 1, 16.0, [square(0, 0, 4)])
    shapes.add(1, VOID, 1.0, [runs_of(np.ones((6, 5), np.uint8))])
    shapes.add(0, 3, 2.0, [square(0, 0, 1), square(2, 2, 1)])
    masks = shapes.finish(np.array([[3, 3], [5, 6], [2, 1]], dtype=np.int32))
    assert masks[0].tolist() == [[3, 0, 0], [0, 0, 0], [0, 0, 3]]
    assert masks[1].tolist() == [
        [1, 1, 1, 1, 255],
        [1, 2, 2, 1, 255],
        [1, 2, 2, 1, 255],
        [1, 1, 1, 1, 255],
        [255] * 5,
        [255] * 5,
    ]
    assert masks[2].tolist() == [[0, 0]] and masks[2].dtype == np.uint8
