"""The images that weights are judged on: a split, with labels that are the model's outputs."""

from __future__ import annotations

import dataclasses
import shlex

from meshuffle.data import ImageSource, open_data, relabel
from meshuffle.data.base import Data
from meshuffle.data.source import absolute_data
from meshuffle.errors import DataError
from meshuffle.tasks.card import Card

_UNNAMED = ", which name no classes: output i is taken for the data's i-th"


def open_split(data: str | None, split: str | None, card: Card) -> tuple[ImageSource, str, Card]:
    """Return images with labels that are the model's outputs, what they are called, and the card.

    Args:
        data: DATA; None is the one that the weights were trained on.
        split: None is test where the data has one, else val.

    Raises:
        DataError: no such data or split, or classes that the weights do not know.
    """
    opened, card = _opened(data, card)
    is_whole = split is None and opened.splits.keys() == {"train"}  # not the train of a run
    split = split or _last_split(opened)
    if split not in opened.splits:
        raise DataError(f"{opened.spec} has no {split} split; it has {', '.join(opened.splits)}")
    what = opened.spec if is_whole else f"{opened.spec} {split}"
    if not card.data:  # no run of ours
        what += f" by {card.source}{'' if card.named else _UNNAMED}"
    return opened.splits[split], what, card


def _opened(data: str | None, card: Card) -> tuple[Data, Card]:
    """Return the data, with labels that are the model's outputs, and the card."""
    opened = open_data(card.data_or(data), task=card.task, need=())
    own = data is None or absolute_data(data) == card.data
    if own and "train" in opened.splits and "val" not in opened.splits:
        # the part that training set aside
        opened = open_data(card.data, task=card.task, need=("train", "val"))
    if not card.named and not set(opened.classes) <= set(card.classes):
        return opened, _named_by(opened, card)
    return relabel(opened, card.classes), dataclasses.replace(card, named=True)


def _named_by(data: Data, card: Card) -> Card:
    """Return the card with the classes of `data`, in their order, for weights that name none."""
    if len(data.classes) != len(card.classes):
        raise DataError(
            f"{data.spec} has {len(data.classes)} classes and the weights, {card.source}, have "
            f"{len(card.classes)} outputs; train a new classifier: meshuffle train "
            f"{shlex.quote(data.spec)} --from WEIGHTS"
        )
    return dataclasses.replace(card, classes=data.classes, titles=dict(data.titles))


def _last_split(data: Data) -> str:
    return next((s for s in ("test", "val", "train") if s in data.splits), "val")
