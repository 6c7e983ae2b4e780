from __future__ import annotations

import pytest

from meshuffle.train.loop import is_better


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
    assert is_better(top1, loss, kept, num) is better
