"""Which epoch is the best one."""

from __future__ import annotations

import math


def is_better(
    top1: float, loss: float, kept: tuple[float, float] | None, highest: float, num: int
) -> bool:
    """Whether an epoch beats the kept one on a validation split of `num` images.

    Of the epochs whose top-1 is the highest but for its standard error, at least one image (0.7
    points of 143, 0.2 of 50,000), the one with the lowest loss is the best: the highest of many
    such top-1 is chance. The loss is the one that training minimises; without its label smoothing
    it would be lowest in an epoch that is not yet trained to the end.

    Args:
        top1, loss: of the epoch, in percent and nats.
        kept: the same of the kept epoch, or None before the first.
        highest: top-1 of all epochs up to this one.
        num: images of the split.
    """
    if kept is None:
        return True
    kept_top1, kept_loss = kept
    if not is_chance(kept_top1, highest, num):
        return top1 > kept_top1
    return is_chance(top1, highest, num) and loss < kept_loss


def is_chance(top1: float, highest: float, num: int) -> bool:
    """Whether `top1` of `num` images is below `highest` by no more than its standard error."""
    share = (highest / 100 * num + 1) / (num + 2)  # Laplace's, so that 100 % has an error too
    standard_error = 100 * math.sqrt(share * (1 - share) / max(1, num))
    one_image = 100.5 / max(1, num)  # and a little, for rounding
    return highest - top1 <= max(standard_error, one_image)
