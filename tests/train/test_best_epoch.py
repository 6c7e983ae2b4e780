"""Which epoch is kept as the best."""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshuffle.tasks.classify import is_chance
from meshuffle.train.best_epoch import implausible_loss, is_better


@pytest.mark.parametrize(
    ("top1", "loss", "kept", "num", "better"),
    [
        (10.0, 9.9, None, 143, True),  # the first epoch is the best so far
        (100.0, 0.2, (99.3, 0.1), 143, False),  # one image of 143 is chance
        (99.3, 0.1, (100.0, 0.2), 143, True),
        (97.0, 0.1, (100.0, 0.2), 143, False),  # four images are not
        (100.0, 0.2, (97.0, 0.1), 143, True),
        (70.1, 1.3, (70.0, 1.2), 50_000, False),
        (70.3, 1.3, (70.0, 1.2), 50_000, True),
        (0.0, 1.0, (0.0, 2.0), 4, True),
        (50.0, 1.0, (50.0, 1.0), 4, False),  # equal in all: the earlier stays
    ],
)
def test_top1_decides_beyond_its_standard_error_and_loss_within(
    top1: float, loss: float, kept: tuple[float, float] | None, num: int, better: bool
) -> None:
    highest = max(top1, kept[0] if kept else 0.0)
    assert is_better(top1, loss, kept, highest, partial(is_chance, num=num)) is better


EPOCH = st.tuples(st.integers(0, 359), st.floats(0, 10))


@given(st.lists(EPOCH, min_size=1, max_size=30))
def test_the_kept_epoch_is_never_far_below_the_highest(epochs: list[tuple[int, float]]) -> None:
    """Not even where top-1 creeps up by less than its error at a time while the loss rises."""
    kept, highest = None, 0.0
    for right, loss in epochs:
        top1 = 100 * right / 359
        highest = max(highest, top1)
        if is_better(top1, loss, kept, highest, partial(is_chance, num=359)):
            kept = (top1, loss)
        assert kept is not None
        assert is_chance(kept[0], highest, 359)


@pytest.mark.parametrize("val_loss", [float("nan"), float("inf"), 3.8e20])
def test_a_validation_loss_beyond_belief_is_told(val_loss: float) -> None:
    warning = implausible_loss(3.2, val_loss, 2)
    assert warning is not None and "2 images at a time" in warning and "--batch" in warning


def test_an_ordinary_one_is_not() -> None:
    assert implausible_loss(3.2, 4.0, 2) is None
    assert implausible_loss(1e-4, 9.0, 2) is None
