"""The card that travels with weights: which model they belong to, its classes and preprocessing."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from meshuffle.data import Preprocess
from meshuffle.errors import DataError


@dataclass(frozen=True)
class Card:
    """What the tensors of a weights file are.

    Attributes:
        model: the registry's name; `knobs`: what it was built with besides `num_classes`.
        task: its name; `settings`: what it remembers beside the weights, plain data.
        classes: names in the order of the outputs; `titles`: readable names, where known.
        preprocess: from an image to the input.
        data: the text of the DATA argument that it was trained on.
        learned: the DATA of the weights that it began from.
        source: who published the weights, or the ones that training began with.
        named: False where `classes` are numbers or ImageNet's: the file has no class list.
        channels_last: the memory format of images and weights in which it trained.
        epoch: finished epochs; `metrics`: those of the validation split at that point.
    """

    model: str
    classes: tuple[str, ...]
    preprocess: Preprocess
    task: str = "classify"
    settings: dict[str, Any] = field(default_factory=dict)
    knobs: dict[str, Any] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    data: str = ""
    learned: str = ""
    source: str = ""
    named: bool = True
    channels_last: bool = True
    epoch: int = 0
    metrics: dict[str, float] = field(default_factory=dict)

    def data_or(self, given: str | None) -> str:
        """Return the DATA that is given, or that the weights were trained on.

        Raises:
            DataError: neither.
        """
        if not (given or self.data):
            raise DataError("these weights do not say what they were trained on; give --data DATA")
        return given or self.data

    def to_json(self) -> str:
        """Return the card as one line of JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return json.dumps({**values, "preprocess": self.preprocess.to_dict()})

    @classmethod
    def from_json(cls, text: str) -> Card:
        """Return the card that `to_json` wrote; keys of a later version are left out."""
        known = {f.name for f in dataclasses.fields(cls)}
        values = {k: v for k, v in json.loads(text).items() if k in known}
        values["preprocess"] = Preprocess.from_dict(values["preprocess"])
        return cls(**{**values, "classes": tuple(values["classes"])})
