import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshuffle.data.target import VOID, Boxes, remap


@st.composite
def lookups(draw) -> tuple[np.ndarray, int]:
    """Where each of C classes goes among as many or more."""
    num_old = draw(st.integers(1, 12))
    num_new = draw(st.integers(num_old, 20))
    order = draw(st.permutations(range(num_new)))
    return np.array(order[:num_old]), num_new


@given(lookups(), st.data())
def test_every_kind_of_target_says_the_same_in_other_classes(made, data):
    lookup, num_new = made
    old = np.array(data.draw(st.lists(st.integers(0, len(lookup) - 1), min_size=1, max_size=9)))

    assert [remap(int(label), lookup, num_new) for label in old] == lookup[old].tolist()

    boxes = remap(Boxes(np.zeros((len(old), 4), np.float32), old), lookup, num_new)
    assert boxes.labels.tolist() == lookup[old].tolist() and boxes.labels.dtype == np.int64

    vector = np.zeros(len(lookup), dtype=np.float32)
    vector[old] = 1
    wider = remap(vector, lookup, num_new)
    assert wider.dtype == np.float32 and wider.shape == (num_new,)
    assert set(np.flatnonzero(wider)) == set(lookup[old])

    mask = np.append(old, VOID).astype(np.uint8)[None]
    moved = remap(mask, lookup, num_new)
    assert moved.dtype == np.uint8 and moved.tolist() == [[*lookup[old].tolist(), VOID]]


@given(lookups())
def test_there_and_back(made):
    lookup, num_new = made
    back = np.full(num_new, 0)
    back[lookup] = np.arange(len(lookup))
    mask = np.arange(len(lookup), dtype=np.uint8)[None]
    there = remap(mask, lookup, num_new)
    assert (back[there] == mask).all()
    # the inverse of a permutation is a lookup too
    order = np.argsort(np.argsort(lookup))
    np.testing.assert_array_equal(
        remap(remap(mask, order, len(order)), np.argsort(order), len(order)), mask
    )


def test_a_mask_holds_255_classes():
    with pytest.raises(ValueError, match="class 255 does not fit"):
        remap(np.zeros((1, 1), np.uint8), np.array([255]), 300)


def test_no_box_at_all():
    none = Boxes(np.empty((0, 4), np.float32), np.empty(0, np.int64))
    assert len(remap(none, np.array([3]), 4)) == 0
    assert len(pickle.loads(pickle.dumps(none))) == 0
