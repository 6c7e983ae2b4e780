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
    task_defaults: Mapping[str, Any] = types.MappingProxyType({}),
    new_head: bool = False,
) -> TrainConfig:
    """Replace every None by a default for `num_train` images.

    Epochs fall from 100 (500 images or fewer) to 20 (100,000) and are 100 from 500,000 on, where
    training usually starts from random weights. The batch is the square root of the number of
    images, as a power of two, 16 … 256. SGD's learning rate is the paper's 0.5 at batch 1024
    (arXiv 1807.11164), scaled by the batch to the power 0.75 (a linear scale is too low for small
    batches, the square root unstable); Adam's and AdamW's are 0.001 and 0.002 at batch 256, scaled
    by the square root.

    With `from_`, the body trains at a tenth of the rate. A new head trains alone in the first
    epoch, because the gradients of an untrained head distort the body's features (arXiv
    2202.10054). In batches below 32 images such a body keeps its batch norms as they are: their
    statistics are better estimates than those of so few images.

    Args:
        num_train: images of the training split.
        input_size: suggested by the data, pixels.
        augment: the data's defaults by field name.
        task_defaults: the task's own, which override those above; their `lr` belongs to their
            optimiser and a batch of 16.
        new_head: whether the initial weights have no head for these data.
    """
    batch = config.batch or min(256, max(16, 2 ** round(math.log2(num_train) / 2)))
    epochs = config.epochs or default_epochs(num_train)
    optimizer = config.optimizer or task_defaults.get("optimizer", "sgd")
    rates = {"sgd": 0.5 * (batch / 1024) ** 0.75}
    rates |= {"adam": 0.001 * (batch / 256) ** 0.5, "adamw": 0.002 * (batch / 256) ** 0.5}
    decays = {"sgd": 4e-5, "adam": 0.0, "adamw": 0.05}
    alone = new_head and epochs > 2 and config.freeze is None and not config.unfreeze_epoch
    chosen: dict[str, Any] = {
        "freeze": "backbone" if alone else "none",
        "unfreeze_epoch": 2 if alone else 0,
        "body_lr": 0.1 if config.from_ else 1.0,
        "batch": batch,
        "epochs": epochs,
        "input_size": input_size,
        "optimizer": optimizer,
        "lr": float(f"{rates[optimizer]:.3g}"),
        "weight_decay": decays[optimizer],
        "warmup_epochs": round(min(5.0, 0.1 * epochs), 2),
        "clip_norm": 0.0,
        "label_smoothing": 0.1,
        **augment,
    }
    chosen |= {key: value for key, value in task_defaults.items() if key not in ("optimizer", "lr")}
    if "lr" in task_defaults and optimizer == task_defaults.get("optimizer"):
        chosen["lr"] = float(f"{task_defaults['lr'] * (batch / 16) ** 0.5:.3g}")
    body_lr = chosen["body_lr"] if config.body_lr is None else config.body_lr
    chosen["freeze_norm"] = bool(config.from_) and batch < _FEW and body_lr <= _GENTLE
    missing = {k: v for k, v in chosen.items() if getattr(config, k) is None}
    return check(dataclasses.replace(config, **missing))


_FEW, _GENTLE = 32, 0.1  # images of a batch; rate of a body that frozen norms do not blow up


def default_epochs(num_train: int) -> int:
    """Return the number of epochs where none is given; see `resolve`."""
    if num_train >= 500_000:
        return 100
    return max(20, min(100, round(100 * (500 / max(num_train, 500)) ** 0.3)))
