"""Choose the best epoch, stop early, and warn of implausible validation losses."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

from meshuffle.train.state import Progress

_FAR = 100.0  # times training's loss


def is_better(
    score: float,
    loss: float,
    kept: tuple[float, float] | None,
    best: float,
    as_good: Callable[[float, float], bool],
) -> bool:
    """Whether an epoch beats the kept one on the validation split.

    Among epochs whose scores differ from the best by chance alone, the lowest loss wins: the best
    of many such scores is chance too. The loss is the one that training minimises;
    without its label smoothing it would be lowest in an epoch that is not yet trained to the end.

    Args:
        score, loss: of the epoch; of the scores the higher is the better.
        kept: the same of the kept epoch, or None before the first.
        best: the best score of all epochs up to this one.
        as_good: whether a score is below the best by no more than chance; the task knows.
    """
    if kept is None:
        return True
    kept_score, kept_loss = kept
    if not as_good(kept_score, best):
        return score > kept_score
    return as_good(score, best) and loss < kept_loss


def update_best(
    progress: Progress, score: float, loss: float, as_good: Callable[[float, float], bool]
) -> bool:
    """Note the epoch that `progress` has finished as the best, if it is; returns whether it is.

    Args:
        score, loss, as_good: see `is_better`; a loss that is no number is the largest.
    """
    loss = loss if math.isfinite(loss) else sys.float_info.max
    progress.highest_score = max(progress.highest_score, score)
    kept = (progress.best_score, progress.best_loss) if progress.best_epoch else None
    better = is_better(score, loss, kept, progress.highest_score, as_good)
    if better:
        progress.best_score, progress.best_loss = score, loss
        progress.best_epoch = progress.epoch
    return better


def is_out_of_patience(epoch: int, best_epoch: int, patience: int) -> bool:
    """Whether early stopping ends training: `patience` epochs without a better one; 0 is never."""
    return patience > 0 and epoch - best_epoch >= patience


def implausible_loss(train_loss: float, val_loss: float, num_images: int) -> str | None:
    """Return a warning about a validation loss that is no number, or far above training's.

    Args:
        num_images: how many a batch norm sees at a time.
    """
    if val_loss <= _FAR * max(1.0, train_loss):  # not so of nan
        return None
    return (
        f"the validation loss is {val_loss:.3g} where training's is {train_loss:.3g}: as a rule, "
        f"running statistics of batch norms that come from too few values ({num_images} images at "
        "a time); give more (--batch, a smaller mb=), or larger ones (--input-size)"
    )
