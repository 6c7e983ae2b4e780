"""The tasks by name: one file each, imported when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING

from meshuffle.errors import ConfigError, did_you_mean
from meshuffle.tasks.base import Task

if TYPE_CHECKING:
    from meshuffle.weights import Card

TASKS: Mapping[str, str] = {
    "classify": "Classify",
    "multilabel": "MultiLabel",
    "regress": "Regress",
    "detect": "Detect",
    "segment": "Segment",
    "generate": "Generate",
}
"""Name, which is also that of the module, and its class."""


def find_task(name: str) -> type[Task]:
    """Return the class of a task.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in TASKS:
        raise ConfigError(f"--task {name}: no such task{did_you_mean(name, TASKS)}")
    task: type[Task] = getattr(import_module(f"{__name__}.{name}"), TASKS[name])
    return task


def make_task(card: Card, *, label_smoothing: float = 0.0) -> Task:
    """Return the task of a card."""
    return find_task(card.task)(card, label_smoothing=label_smoothing)
