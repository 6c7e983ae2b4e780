"""How a run begins from other weights: their model, their classes, and the tensors that fit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from meshuffle.config import Origin, TrainConfig
from meshuffle.data import Data, Preprocess
from meshuffle.data.base import shortened
from meshuffle.errors import ConfigError
from meshuffle.models import classifier_of
from meshuffle.models.features import BACKBONE, backbone_prefix
from meshuffle.tasks.card import Card
from meshuffle.weights import find_weights, load_matching, open_weights, require_repeated

START = Path("weights") / "start.safetensors"
"""In a run that began from other weights, what it began with: those may be gone when it goes on."""


def adopt_model(config: TrainConfig, origins: Mapping[str, Origin]) -> TrainConfig:
    """Return `config` with the model of the weights of `--from`, where it asks for no other.

    Where it asks for the same model, with the knobs that the weights want, under its own.
    """
    if not config.from_:
        return config
    given = origins.get("model", "default") != "default" or config.model != TrainConfig.model
    asked = config.model if given else None
    _, card = open_weights(Path(config.from_), asked)
    if asked not in (None, card.model):
        return config
    require_repeated(card.model, asked)
    knobs = {k: v if isinstance(v, str) else json.dumps(v) for k, v in card.knobs.items()}
    if config.dropout is not None:
        knobs.pop("dropout", None)
    head = config.head or (card.settings.get("head") if card.task == config.task else None)
    return dataclasses.replace(config, model=card.model, knobs={**knobs, **config.knobs}, head=head)


def has_new_head(config: TrainConfig, data: Data) -> bool:
    """Whether the weights of `--from` bring no outputs for what these data ask."""
    assert config.from_ is not None
    _, begun = open_weights(Path(config.from_), config.model)
    if begun.task != config.task:
        return True
    if not begun.named:
        return len(begun.classes) != len(data.classes)
    return not set(begun.classes) & set(data.classes)


def card_from(target: str, card: Card) -> Card:
    """Return the card of a run that begins from the weights `target`.

    Args:
        card: what it would be without them.
    """
    _, begun = open_weights(Path(target), card.model)
    classes = _classes_of(begun, card.classes, card.task)
    scale = {k: v for k, v in begun.settings.items() if k in ("mean", "std")}
    return dataclasses.replace(
        card,
        classes=classes,
        settings={**card.settings, **(scale if classes == begun.classes else {})},
        preprocess=_inherited(card.preprocess, begun),
        titles={**begun.titles, **card.titles},
        source=begun.source,
        learned=begun.data,
    )


def _classes_of(begun: Card, classes: tuple[str, ...], task: str) -> tuple[str, ...]:
    """Return the classes of a run that goes on from weights, on data with `classes`.

    Those that the weights know keep their index, and new ones come behind; where they know none of
    the data's, it is another question, and they have no place.
    """
    new = [name for name in classes if name not in set(begun.classes)]
    is_another = len(new) == len(classes) or not begun.named or begun.task != task
    return classes if is_another else (*begun.classes, *new)


def _inherited(preprocess: Preprocess, begun: Card) -> Preprocess:
    """Return the numbers that the weights of `--from` were trained with, at this run's size."""
    geometry = {name: getattr(preprocess, name) for name in ("crop", "resize", "fit")}
    return dataclasses.replace(begun.preprocess, **geometry)


def start_from(model: nn.Module, target: str, card: Card) -> list[str]:
    """Copy the weights that fit; return lines that list what did not."""
    path = find_weights(Path(target))
    tensors, begun = open_weights(Path(target), card.model)
    tensors = _under_own_names(model, tensors)
    about = _fit_classifier(model, tensors, begun, card)
    missing, unexpected, reshaped = load_matching(model, tensors)
    num_loaded = len(tensors) - len(unexpected) - len(reshaped)
    if not num_loaded:
        raise ConfigError(f"--from {target}: none of its {len(tensors)} tensors fits the model")
    whose = f": {begun.source}" if begun.source else ""
    lines = [f"loaded {num_loaded} of {len(tensors)} tensors from {path}{whose}", *about]
    for what, names in (("new", missing), ("left out", unexpected), ("other shape", reshaped)):
        if names:
            lines.append(f"  {what}: {', '.join(names[:6])}{' …' if len(names) > 6 else ''}")
    return lines


def _under_own_names(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a classifier under the names of a model around it, or the reverse."""
    is_within = any(name.startswith(BACKBONE) for name in tensors)
    if backbone_prefix(model) and not is_within:
        return {BACKBONE + name: tensor for name, tensor in tensors.items()}
    if is_within and not backbone_prefix(model):
        return {name.removeprefix(BACKBONE): tensor for name, tensor in tensors.items()}
    return tensors


def _fit_classifier(
    model: nn.Module, tensors: dict[str, Tensor], begun: Card, card: Card
) -> list[str]:
    """Make the tensors of the classifier those of the run's classes; return a line about it.

    Outputs of classes that both know are kept, new ones begin as `model` has them, and of another
    question nothing is kept.
    """
    num, own = len(begun.classes), model.state_dict()
    heads = tuple(f"{name}." for name in classifier_of(model))
    keys = [
        key for key in tensors.keys() & own.keys() if key.startswith(heads) and tensors[key].ndim
    ]
    outputs = [key for key in keys if len(tensors[key]) == num]
    if begun.task != card.task:
        for key in keys:
            del tensors[key]
        return [f"  a new head: the weights have learned to {begun.task}"]
    if not begun.named:
        told = num == len(card.classes) and outputs
        return [f"  output i is taken for class i of {num}: the weights name none"] if told else []
    if begun.classes == card.classes:
        return []
    if card.classes[:num] != begun.classes:
        for key in outputs:
            del tensors[key]
        return ["  a new classifier: the weights know none of these classes"]
    for key in outputs:
        tensors[key] = torch.cat((tensors[key], own[key][num:].to(tensors[key])))
    if not outputs:
        return []
    new = card.classes[num:]
    return [f"  {num} classes keep their outputs; new ones: {shortened(new)}"] if new else []
