"""From what the user gave to settings without gaps: weights and data are opened once, here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from meshuffle.config import Origin, TrainConfig
from meshuffle.data import Data, augmentation_for, open_data
from meshuffle.data.check import require_usable
from meshuffle.errors import ConfigError
from meshuffle.tasks import find_task
from meshuffle.train.defaults import resolve
from meshuffle.train.initial_weights import InitialWeights, open_initial_weights
from meshuffle.train.state import augment_values


@dataclass(frozen=True)
class Resolved:
    """The settings of a run, with what was opened to choose them.

    Attributes:
        config: no value is None any more.
        origins: where each value came from, by field name.
        reasons: of the chosen values that have one, by field name.
        data: with its train and val splits.
        start: the weights that the run begins from, if any.
    """

    config: TrainConfig
    origins: dict[str, Origin]
    reasons: dict[str, str]
    data: Data
    start: InitialWeights | None


def resolve_run(given: TrainConfig, origins: Mapping[str, Origin]) -> Resolved:
    """Open the initial weights and the data, and choose each setting that was left open.

    Args:
        given: settings as the user gave them.
        origins: where each value came from, by field name.

    Raises:
        InputError: the data, the weights or a setting is wrong.
    """
    is_asked = origins.get("model", "default") != "default" or given.model != TrainConfig.model
    asked = given.model if is_asked else None
    start = open_initial_weights(given, asked)
    config = given if start is None else start.adopt(given, asked)
    data = open_data(config.data, task=config.task, strict=config.strict)
    require_usable(data)
    config, reasons = fill_in(config, data, start)
    full: dict[str, Origin] = {
        name: origins.get(name, "chosen" if getattr(given, name) != value else "default")
        for name, value in vars(config).items()
    }
    for name, origin in full.items():
        if origin == "chosen":
            reasons.setdefault(name, "that of the weights")
    return Resolved(config, full, reasons, data, start)


def fill_in(
    config: TrainConfig, data: Data, start: InitialWeights | None = None
) -> tuple[TrainConfig, dict[str, str]]:
    """Return `config` with every open value chosen for `data`, and the reasons by field name.

    Raises:
        ConfigError: a setting that has no meaning for the task.
    """
    augment = augment_values(augmentation_for(data))
    task = find_task(config.task)
    if (config.mixup or config.cutmix) and not task.mixes:
        raise ConfigError(f"--mixup and --cutmix: {config.task} has no labels to mix")
    if config.class_weights != "none" and not task.weighs_classes:
        raise ConfigError(f"--class-weights {config.class_weights}: {config.task} has none")
    if config.label_smoothing and not task.smooths:
        raise ConfigError(f"--label-smoothing {config.label_smoothing:g}: {config.task} has none")
    new_head = start is not None and start.needs_new_head(config.task, data.classes)
    return resolve(
        config,
        len(data.splits["train"]),
        data.input_size,
        augment,
        task_defaults=task.defaults,
        new_head=new_head,
        heavy_head=task.dense,
        why_augment=_AUGMENTED.get(data.style, "usual for photographs"),
    )


_AUGMENTED = {
    "symbols": "signs: turned and shifted, not mirrored",
    "thumbnails": "small pictures: shifted, not cropped",
}
