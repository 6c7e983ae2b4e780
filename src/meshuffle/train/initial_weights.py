"""What a run takes from the weights of `--from`: model, classes, and the tensors that fit."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from meshuffle.config import TrainConfig
from meshuffle.data import Preprocess
from meshuffle.data.base import shortened
from meshuffle.errors import ConfigError
from meshuffle.models import classifier_of
from meshuffle.models.features import BACKBONE, backbone_prefix
from meshuffle.tasks.card import Card
from meshuffle.weights import load_matching, open_weights, require_repeated

START = Path("weights") / "start.safetensors"
"""Where a run keeps the weights that it began with: the file of `--from` may be gone later."""


@dataclass(frozen=True)
class InitialWeights:
    """The weights of `--from`, opened once.

    Attributes:
        target: as the user gave it.
        path: of the file.
        tensors: under the keys of their model.
        card: what they are; made from the keys where the file has none.
        remarks: lines about what else is in the file, and what was left out.
    """

    target: str
    path: Path
    tensors: dict[str, Tensor]
    card: Card
    remarks: tuple[str, ...] = ()

    def adopt(self, config: TrainConfig, asked: str | None) -> TrainConfig:
        """Return `config` with the model, knobs and head of the weights, unless it asks for others.

        Args:
            asked: the model that the user named, or None.
        """
        if asked not in (None, self.card.model):
            return config
        require_repeated(self.card.model, asked)
        knobs = {k: v if isinstance(v, str) else json.dumps(v) for k, v in self.card.knobs.items()}
        if config.dropout is not None:
            knobs.pop("dropout", None)
        own_head = self.card.settings.get("head") if self.card.task == config.task else None
        return dataclasses.replace(
            config,
            model=self.card.model,
            knobs={**knobs, **config.knobs},
            head=config.head or own_head,
        )

    def needs_new_head(self, task: str, classes: tuple[str, ...]) -> bool:
        """Whether the weights have no outputs for what these data ask."""
        if self.card.task != task:
            return True
        if not self.card.named:
            return len(self.card.classes) != len(classes)
        return not set(self.card.classes) & set(classes)

    def inherit(self, card: Card) -> Card:
        """Return the card of a run that begins from these weights.

        Args:
            card: what it would be without them.
        """
        classes = _classes_of(self.card, card.classes, card.task)
        scale = {k: v for k, v in self.card.settings.items() if k in ("mean", "std")}
        return dataclasses.replace(
            card,
            classes=classes,
            settings={**card.settings, **(scale if classes == self.card.classes else {})},
            preprocess=_inherited(card.preprocess, self.card),
            titles={**self.card.titles, **card.titles},
            source=self.card.source,
            learned=self.card.data,
        )

    def copy_into(self, model: nn.Module, card: Card) -> list[str]:
        """Copy the tensors that fit; return lines that list what was copied and what was not.

        Raises:
            ConfigError: no tensor fits.
        """
        tensors = _under_own_names(model, dict(self.tensors))
        about = _fit_classifier(model, tensors, self.card, card)
        missing, unexpected, reshaped = load_matching(model, tensors)
        num_loaded = len(tensors) - len(unexpected) - len(reshaped)
        if not num_loaded:
            raise ConfigError(
                f"--from {self.target}: none of its {len(tensors)} tensors fits the model"
            )
        whose = f": {self.card.source}" if self.card.source else ""
        lines = [f"loaded {num_loaded} of {len(tensors)} tensors from {self.path}{whose}"]
        lines += [*(f"  {remark}" for remark in self.remarks), *about]
        for what, names in (("new", missing), ("left out", unexpected), ("other shape", reshaped)):
            if names:
                lines.append(f"  {what}: {', '.join(names[:6])}{' …' if len(names) > 6 else ''}")
        return lines


def open_initial_weights(config: TrainConfig, asked: str | None) -> InitialWeights | None:
    """Open the weights of `--from`, or return None where the run begins from nothing.

    Args:
        asked: the model that the user named, or None; see `open_weights`.
    """
    if not config.from_:
        return None
    opened = open_weights(Path(config.from_), asked)
    return InitialWeights(config.from_, opened.path, opened.tensors, opened.card, opened.remarks)


def _classes_of(known: Card, classes: tuple[str, ...], task: str) -> tuple[str, ...]:
    """Return the classes of a run that goes on from weights, on data with `classes`.

    Those that the weights know keep their index, and new ones come behind; where they know none of
    the data's, it is another question, and they have no place.
    """
    new = [name for name in classes if name not in set(known.classes)]
    is_another = len(new) == len(classes) or not known.named or known.task != task
    return classes if is_another else (*known.classes, *new)


def _inherited(preprocess: Preprocess, known: Card) -> Preprocess:
    """Return the numbers that the weights of `--from` were trained with, at this run's size."""
    geometry = {name: getattr(preprocess, name) for name in ("crop", "resize", "fit")}
    return dataclasses.replace(known.preprocess, **geometry)


def _under_own_names(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a classifier under the names of a model around it, or the reverse."""
    is_within = any(name.startswith(BACKBONE) for name in tensors)
    if backbone_prefix(model) and not is_within:
        return {BACKBONE + name: tensor for name, tensor in tensors.items()}
    if is_within and not backbone_prefix(model):
        return {name.removeprefix(BACKBONE): tensor for name, tensor in tensors.items()}
    return tensors


def _fit_classifier(
    model: nn.Module, tensors: dict[str, Tensor], known: Card, card: Card
) -> list[str]:
    """Make the tensors of the classifier those of the run's classes; return a line about it.

    Outputs of classes that both know are kept, new ones begin as `model` has them, and of another
    question nothing is kept.
    """
    num, own = len(known.classes), model.state_dict()
    heads = tuple(f"{name}." for name in classifier_of(model))
    keys = [
        key for key in tensors.keys() & own.keys() if key.startswith(heads) and tensors[key].ndim
    ]
    outputs = [key for key in keys if len(tensors[key]) == num]
    if known.task != card.task:
        for key in keys:
            del tensors[key]
        return [f"  a new head: the weights have learned to {known.task}"]
    if not known.named:
        taken = num == len(card.classes) and outputs
        return [f"  output i is taken for class i of {num}: the weights name none"] if taken else []
    if known.classes == card.classes:
        return []
    if card.classes[:num] != known.classes:
        for key in outputs:
            del tensors[key]
        return ["  a new classifier: the weights know none of these classes"]
    for key in outputs:
        tensors[key] = torch.cat((tensors[key], own[key][num:].to(tensors[key])))
    if not outputs:
        return []
    new = card.classes[num:]
    return [f"  {num} classes keep their outputs; new ones: {shortened(new)}"] if new else []
