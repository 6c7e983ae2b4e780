"""The tasks by name: one file each."""

from __future__ import annotations

from collections.abc import Mapping

from meshuffle.errors import ConfigError, did_you_mean
from meshuffle.tasks.base import LoadNetwork, Task
from meshuffle.tasks.card import Card
from meshuffle.tasks.classify import Classify
from meshuffle.tasks.detect import Detect
from meshuffle.tasks.generate import Generate
from meshuffle.tasks.multilabel import MultiLabel
from meshuffle.tasks.regress import Regress
from meshuffle.tasks.segment import Segment

TASKS: Mapping[str, type[Task]] = {
    task.name: task for task in (Classify, MultiLabel, Regress, Detect, Segment, Generate)
}


def find_task(name: str) -> type[Task]:
    """Return the class of a task.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in TASKS:
        raise ConfigError(f"--task {name}: no such task{did_you_mean(name, TASKS)}")
    return TASKS[name]


def make_task(card: Card, *, label_smoothing: float = 0.0, load: LoadNetwork | None = None) -> Task:
    """Return the task of a card; `load` is needed where its network is to be built."""
    return find_task(card.task)(card, label_smoothing=label_smoothing, load=load)
