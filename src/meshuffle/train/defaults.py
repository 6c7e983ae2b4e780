"""The values of settings that were left open: by the number of images, the task and the weights."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any

from meshuffle.config import TrainConfig, check


def resolve(
    config: TrainConfig,
    num_train: int,
    input_size: int,
    augment: Mapping[str, Any],
    *,
    why_augment: str = "usual for such images",
    task_defaults: Mapping[str, Any] = types.MappingProxyType({}),
    new_head: bool = False,
    heavy_head: bool = False,
) -> tuple[TrainConfig, dict[str, str]]:
    """Replace every None by a default for `num_train` images; return the reasons too, by name.

    Epochs fall from 100 (500 images or fewer) to 20 (100,000) and are 100 from 500,000 on, where
    training usually starts from random weights. The batch is the square root of the number of
    images, as a power of two, 16 … 256. SGD's learning rate is the paper's 0.5 at batch 1024
    (arXiv 1807.11164), scaled by the batch to the power 0.75 (a linear scale is too low for small
    batches, the square root unstable); Adam's and AdamW's are 0.001 and 0.002 at batch 256, scaled
    by the square root.

    With `from_`, the body trains at half the rate of the head, see docs/results.md, "Defaults". A
    new head of many layers trains alone in the first epoch, because its gradients distort the
    body's features (arXiv 2202.10054). In batches below 32 images a body whose rate is low keeps
    its batch norms: their statistics are better estimates than those of so few images.

    Args:
        num_train: images of the training split.
        input_size: suggested by the data, pixels.
        augment: the data's defaults by field name. why_augment: their reason.
        task_defaults: the task's own, which override those above; their `lr` belongs to their
            optimiser and a batch of 16.
        new_head: whether the initial weights have no head for these data; heavy_head: whether it
            has more layers than a classifier's one.
    """
    epochs = config.epochs or default_epochs(num_train)
    batch = config.batch or min(256, max(16, 2 ** round(math.log2(num_train) / 2)))
    optimizer = config.optimizer or task_defaults.get("optimizer", "sgd")
    lr, why_lr = _rate(optimizer, batch, task_defaults)
    chosen: dict[str, tuple[Any, str]] = {
        "batch": (batch, f"near the square root of {num_train:,} images"),
        "epochs": (epochs, f"for {num_train:,} images; more images need fewer"),
        "input_size": (input_size, "fits the images"),
        "optimizer": (optimizer, "usual for this task"),
        "lr": (lr, why_lr),
        "weight_decay": (_DECAY[optimizer], f"usual with {optimizer}"),
        "warmup_epochs": (round(min(5.0, 0.1 * epochs), 2), "a tenth of the epochs, at most 5"),
        "clip_norm": (0.0, "off: few runs diverge at this rate"),
        "label_smoothing": (0.1, "usual where there are classes"),
        **{name: (value, why_augment) for name, value in augment.items()},
        "body_lr": (0.5, "the body's weights are good already") if config.from_ else (1.0, _WHOLE),
    }
    for name, value in task_defaults.items():
        if name not in ("optimizer", "lr"):
            chosen[name] = (value, "usual for this task")
    body_lr = chosen["body_lr"][0] if config.body_lr is None else config.body_lr
    chosen |= _frozen(config, epochs, batch, body_lr, new_head and heavy_head)
    missing = {name: choice for name, choice in chosen.items() if getattr(config, name) is None}
    values = {name: value for name, (value, _) in missing.items()}
    reasons = {name: reason for name, (_, reason) in missing.items()}
    return check(dataclasses.replace(config, **values)), reasons


_DECAY = {"sgd": 4e-5, "adam": 0.0, "adamw": 0.05}
_WHOLE = "all layers begin alike"
_FEW, _GENTLE = 32, 0.1  # images of a batch; rate of a body that frozen norms do not blow up


def default_epochs(num_train: int) -> int:
    """Return the number of epochs where none is given; see `resolve`."""
    if num_train >= 500_000:
        return 100
    return max(20, min(100, round(100 * (500 / max(num_train, 500)) ** 0.3)))


def _rate(optimizer: str, batch: int, task_defaults: Mapping[str, Any]) -> tuple[float, str]:
    """Return the learning rate for a batch, and where it comes from."""
    if "lr" in task_defaults and optimizer == task_defaults.get("optimizer"):
        base, at, power, why = task_defaults["lr"], 16, 0.5, "usual for this task"
    elif optimizer == "sgd":
        base, at, power, why = 0.5, 1024, 0.75, "arXiv 1807.11164"
    else:
        base, at, power = {"adam": 0.001, "adamw": 0.002}[optimizer], 256, 0.5
        why = f"usual with {optimizer}"
    rate = float(f"{base * (batch / at) ** power:.3g}")
    return rate, f"{base:g} × ({batch} / {at})^{power:g}, {why}"


def _frozen(
    config: TrainConfig, epochs: int, batch: int, body_lr: float, alone: bool
) -> dict[str, tuple[Any, str]]:
    """Return what stays as it is: the body in the first epoch, or its batch norms."""
    alone = alone and epochs > 2 and config.freeze is None and not config.unfreeze_epoch
    still = bool(config.from_) and batch < _FEW and body_lr <= _GENTLE
    why = "gradients of a new head of many layers would spoil the body" if alone else _WHOLE
    return {
        "freeze": ("backbone" if alone else "none", why),
        "unfreeze_epoch": (2 if alone else 0, "after the epoch of the head" if alone else "unused"),
        "freeze_norm": (still, f"its statistics are better than those of {batch} images")
        if still
        else (False, "they follow the new images"),
    }
