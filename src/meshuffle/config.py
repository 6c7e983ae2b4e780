"""Every setting of a training run: one dataclass, its TOML form, and where each value came from.

A value of None means "chosen from the data and the machine"; `resolve` replaces every None, so
that `--config RUN/config.toml` repeats a run. No torch here: `--help` reads this file.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from meshuffle.errors import ConfigError, did_you_mean

Origin = Literal["default", "chosen", "file", "flag"]
TaskName = Literal["classify", "multilabel", "regress", "detect", "segment", "generate"]


_LONGEST_S = 1e9  # more overflows in the libraries that wait


def _option(text: str, group: str = "Run") -> Parameter:
    return Parameter(help=text, group=group, negative=())


@dataclass(frozen=True)
class TrainConfig:
    """The settings of one run, grouped as `meshuffle train --help` shows them."""

    data: Annotated[str, Parameter(parse=False)] = ""
    model: Annotated[str, _option("Model name; see `meshuffle models`.")] = "shufflenet_v2_x1_0"
    knobs: Annotated[
        dict[str, str], _option("Knobs of the model, for example --knobs.kernel_size auto.")
    ] = field(default_factory=dict)
    task: Annotated[TaskName, _option("What the model learns.")] = "classify"
    head: Annotated[
        str | None,
        _option(
            "Head of the task. detect: ssdlite (default) or fpn; segment: lraspp (default), "
            "deeplabv3, or none (default of your own model): the model returns the maps."
        ),
    ] = None
    plan: Annotated[str, _option("Plan text such as dp=2, auto, or a plan.json file.")] = "auto"
    from_: Annotated[
        str | None,
        Parameter(
            name="--from",
            help="Start from the weights of a run, a weights file, or torchvision:NAME.",
        ),
    ] = None
    epochs: Annotated[int | None, _option("Passes over the training images.")] = None
    batch: Annotated[int | None, _option("Global batch size, over all ranks.")] = None
    input_size: Annotated[int | None, _option("Side of the square input, pixels.")] = None
    seed: Annotated[int, _option("Seed of weights, order, augmentation and dropout.")] = 0
    deterministic: Annotated[
        bool, _option("Use deterministic algorithms only; fail where there are none.")
    ] = False
    allow_inexact: Annotated[
        bool, _option("Train under a plan that computes something else than one device would.")
    ] = False

    optimizer: Annotated[
        Literal["sgd", "adam", "adamw"] | None,
        _option(
            "Default: adamw for segment and regress, adam for generate, else sgd.", "Optimiser"
        ),
    ] = None
    lr: Annotated[float | None, _option("Peak learning rate.", "Optimiser")] = None
    momentum: Annotated[float, _option("Nesterov momentum of SGD.", "Optimiser")] = 0.9
    weight_decay: Annotated[
        float | None, _option("Weight decay; norms and biases have none.", "Optimiser")
    ] = None
    schedule: Annotated[
        Literal["cosine", "linear", "step", "constant"],
        _option("Schedule of the learning rate.", "Optimiser"),
    ] = "cosine"
    step_epochs: Annotated[
        tuple[int, ...], _option("Epochs at which --schedule step lowers the rate.", "Optimiser")
    ] = ()
    step_factor: Annotated[
        float, _option("Factor on the rate at each of --step-epochs.", "Optimiser")
    ] = 0.1
    warmup_epochs: Annotated[
        float | None, _option("Epochs of linear warm-up; may be a fraction.", "Optimiser")
    ] = None
    clip_norm: Annotated[
        float | None, _option("Clip the gradient to this global norm; 0 is off.", "Optimiser")
    ] = None
    accumulate: Annotated[
        int, _option("Micro-batches per step; batch norm sees one at a time.", "Optimiser")
    ] = 1
    ema: Annotated[
        float,
        _option("Decay per step of the averaged weights, smaller at first; 0 is off.", "Optimiser"),
    ] = 0.0
    early_stop: Annotated[
        int, _option("Stop after this many epochs without a better one; 0 is off.", "Optimiser")
    ] = 0

    label_smoothing: Annotated[
        float | None,
        _option("Label smoothing, 0 … 1; default 0.1 where there are classes.", "Regularisation"),
    ] = None
    class_weights: Annotated[
        Literal["none", "balanced"],
        _option("balanced gives rare classes more weight in the loss.", "Regularisation"),
    ] = "none"
    dropout: Annotated[
        float | None, _option("Dropout in front of the classifier, 0 … 1.", "Regularisation")
    ] = None
    freeze: Annotated[
        str | None,
        _option("Layers to freeze: none, backbone, or until:LAYER (inclusive).", "Fine-tuning"),
    ] = None
    unfreeze_epoch: Annotated[
        int | None,
        _option("Train everything from this epoch on (from 1); 0 is never.", "Fine-tuning"),
    ] = None
    freeze_norm: Annotated[
        bool | None,
        Parameter(help="Keep the body's batch norms as they are.", group="Fine-tuning"),
    ] = None
    body_lr: Annotated[
        float | None, _option("Factor on --lr for all layers but the head.", "Fine-tuning")
    ] = None
    layer_decay: Annotated[
        float, _option("Factor on the rate per layer away from the head, 0 … 1.", "Fine-tuning")
    ] = 1.0
    crop_scale: Annotated[
        float | None,
        _option("Smallest area of a random resized crop, 0 … 1; 0 is off.", "Augmentation"),
    ] = None
    flip: Annotated[float | None, _option("Probability of mirroring.", "Augmentation")] = None
    affine_degrees: Annotated[
        float | None, _option("Random rotation, ± degrees.", "Augmentation")
    ] = None
    affine_translate: Annotated[
        float | None, _option("Random shift, ± fraction of the side.", "Augmentation")
    ] = None
    affine_scale: Annotated[float | None, _option("Random zoom, 1 ± this.", "Augmentation")] = None
    trivial_augment: Annotated[
        bool | None,
        Parameter(help="TrivialAugment: one random operation per image.", group="Augmentation"),
    ] = None
    erasing: Annotated[float | None, _option("Probability of random erasing.", "Augmentation")] = (
        None
    )
    mixup: Annotated[float | None, _option("Alpha of mixup; 0 is off.", "Augmentation")] = None
    cutmix: Annotated[float | None, _option("Alpha of cutmix; 0 is off.", "Augmentation")] = None
    repeats: Annotated[int | None, _option("Copies of each image per batch.", "Augmentation")] = (
        None
    )

    device: Annotated[
        Literal["auto", "cpu", "cuda", "mps"], _option("Device to train on.", "Machine")
    ] = "auto"
    precision: Annotated[
        Literal["float32", "bf16"], _option("Precision; bf16 uses autocast.", "Machine")
    ] = "float32"
    channels_last: Annotated[
        bool | None,
        Parameter(
            help="Channels-last memory; default: where the model computes the same.",
            group="Machine",
        ),
    ] = None
    compile: Annotated[
        Literal["auto", "on", "off"],
        _option("Use torch.compile; auto: where it saves time.", "Machine"),
    ] = "auto"
    workers: Annotated[int | None, _option("Loader processes per rank.", "Machine")] = None
    timeout: Annotated[float, _option("Seconds that ranks wait for a silent rank.", "Machine")] = (
        1800.0
    )
    strict: Annotated[bool, _option("Stop at the first bad image or annotation.", "Machine")] = (
        False
    )
    save_every: Annotated[
        str, _option("Checkpoint interval: 10m (minutes) or 500 (steps).", "Machine")
    ] = "10m"
    check_every: Annotated[
        int, _option("Steps between comparisons of the ranks' parameters; 0 is off.", "Machine")
    ] = 100
    trace: Annotated[bool, _option("Write five steps of all ranks to trace.json.", "Machine")] = (
        False
    )
    out: Annotated[str | None, _option("Run folder; default runs/MODEL-DATA-N.", "Machine")] = None


FIELDS: Mapping[str, dataclasses.Field[Any]] = {f.name: f for f in dataclasses.fields(TrainConfig)}


def config_key(name: str) -> str:
    """Return the field's name in a file or a flag: `from_` is written `from`."""
    return name.rstrip("_")


def check(config: TrainConfig) -> TrainConfig:
    """Return `config` if every value is in its range.

    Raises:
        ConfigError: names the setting, its value and its range.
    """
    at_least = {"epochs": 1, "batch": 1, "input_size": 8, "accumulate": 1, "repeats": 1}
    at_least |= {"workers": 0, "unfreeze_epoch": 0, "early_stop": 0, "warmup_epochs": 0}
    at_least |= {"check_every": 0, "timeout": 1}
    at_least |= {"body_lr": 0, "weight_decay": 0, "clip_norm": 0, "lr": 0, "seed": 0}
    for name, least in at_least.items():
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    for name, value in vars(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be a finite number")
    if config.timeout > _LONGEST_S:
        raise ConfigError(f"--timeout {config.timeout:g}: must be at most {_LONGEST_S:g} seconds")
    for name in ("label_smoothing", "dropout", "ema", "momentum", "step_factor"):
        value = getattr(config, name)
        if value is not None and not 0 <= value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be in 0 … 1 (1 excluded)")
    if not 0 < config.layer_decay <= 1:
        raise ConfigError(f"--layer-decay {config.layer_decay}: must be above 0 and at most 1")
    save_interval(config.save_every)
    _check_freeze(config)
    if config.schedule == "step" and not config.step_epochs:
        raise ConfigError("--schedule step needs --step-epochs, for example --step-epochs 30 60")
    if config.schedule != "step" and config.step_epochs:
        raise ConfigError(f"--step-epochs has no effect with --schedule {config.schedule}")
    return config


def _check_freeze(config: TrainConfig) -> None:
    choice = config.freeze or "none"
    if choice not in ("none", "backbone") and not choice.startswith("until:"):
        hint = did_you_mean(choice, ("none", "backbone"))
        raise ConfigError(f"--freeze {choice}: none, backbone or until:LAYER{hint}")
    if config.unfreeze_epoch and choice == "none":
        raise ConfigError("--unfreeze-epoch has no effect without --freeze")


def save_interval(text: str) -> tuple[float, int]:
    """Return (seconds, steps) between checkpoints; the other one is infinite or 0.

    >>> save_interval("10m"), save_interval("500")
    ((600.0, 0), (inf, 500))
    """
    try:
        if text.endswith("m"):
            minutes = float(text[:-1])
            if 0 < minutes < float("inf"):
                return 60 * minutes, 0
        elif int(text) > 0:
            return float("inf"), int(text)
    except ValueError:
        pass
    raise ConfigError(f"--save-every {text}: write minutes as 10m, or a number of steps as 500")


def read_config(path: Path) -> dict[str, Any]:
    """Return the values of a TOML file, by field name.

    Raises:
        ConfigError: no file, no TOML, an unknown key, or a value of the wrong type.
    """
    try:
        # The path of the data may hold bytes that are not UTF-8; see `files.write_text`.
        values = tomllib.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
    except OSError as error:
        raise ConfigError(f"config {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"config {path}: not TOML ({error})") from None
    known = {config_key(name): name for name in FIELDS}
    result = {}
    for key, value in values.items():
        plain = key.replace("-", "_")
        if plain not in known:
            raise ConfigError(f"config {path}: unknown key '{key}'{did_you_mean(plain, known)}")
        result[known[plain]] = _typed(value, known[plain], f"config {path}: {key}")
    return result


@functools.cache
def _type_hints() -> dict[str, Any]:
    return typing.get_type_hints(TrainConfig)


def _typed(value: Any, name: str, where: str) -> Any:
    """Return `value` as the field's type, or raise ConfigError."""
    hint = _type_hints()[name]
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    choices = typing.get_args(hint) if is_union else (hint,)
    for choice in choices:
        origin = typing.get_origin(choice) or choice
        if origin is Literal and value in typing.get_args(choice):
            return value
        if origin is tuple and isinstance(value, list) and all(type(v) is int for v in value):
            return tuple(value)
        if origin is dict and isinstance(value, dict):
            return {key: v if isinstance(v, str) else json.dumps(v) for key, v in value.items()}
        if origin is float and type(value) in (int, float):
            return float(value)
        if origin in (int, str, bool) and type(value) is origin:
            return value
    names = " or ".join(getattr(c, "__name__", str(c)) for c in choices if c is not type(None))
    raise ConfigError(f"{where} = {value!r}: expected {names}")


def to_toml(
    config: TrainConfig,
    origins: Mapping[str, Origin],
    reasons: Mapping[str, str] = types.MappingProxyType({}),
) -> str:
    """Return the TOML text of `config`: in each line's comment the value's origin, and its reason.

    Args:
        reasons: why a chosen value was chosen, by field name.
    """
    lines = ["# The resolved settings of this run; `meshuffle train --config` repeats it."]
    tables = []
    for name in FIELDS:
        value = getattr(config, name)
        origin = ": ".join(filter(None, (origins.get(name, "default"), reasons.get(name))))
        if isinstance(value, dict):
            tables += [f"\n[{name}]  # {origin}", *(f"{k} = {_toml(v)}" for k, v in value.items())]
        elif value is None:
            lines.append(f"# {config_key(name)} is not set  # {origin}")
        else:
            lines.append(f"{config_key(name)} = {_toml(value)}  # {origin}")
    return "\n".join(lines + tables) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def parse_knobs(knobs: Mapping[str, str]) -> dict[str, Any]:
    """Return the knobs' values: JSON where the text is JSON, else the text.

    >>> parse_knobs({"groups": "3", "kernel_size": "auto", "depths": "[4, 8, 4]"})
    {'groups': 3, 'kernel_size': 'auto', 'depths': [4, 8, 4]}
    """

    def value(text: str) -> Any:
        try:
            return json.loads(text)
        except ValueError:
            return text

    return {name: value(text) for name, text in knobs.items()}
