"""Module objects as models: for notebooks, where a network has no name that can be imported."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

from torch import nn

from meshuffle.errors import ModelError

PREFIX = "object"
_given: dict[str, nn.Module] = {}


@contextlib.contextmanager
def given(model: nn.Module | str | None) -> Iterator[str | None]:
    """Yield the name under which `create_model` copies `model`, for the length of a `with` block.

    Args:
        model: a module, which gets the name `object:CLASS`; a name or None is yielded as it is.
    """
    if not isinstance(model, nn.Module):
        yield model
        return
    name = f"{PREFIX}:{type(model).__name__}"
    _given[name] = model
    try:
        yield name
    finally:
        del _given[name]


def copy_given(name: str) -> nn.Module:
    """Return a copy of the module object of this name, in train mode, with its own weights.

    Raises:
        ModelError: no module object was passed.
    """
    if name not in _given:
        class_name = name.partition(":")[2]
        raise ModelError(
            f"the model is a {class_name} object of a program; pass model=OBJECT there"
        )
    return copy.deepcopy(_given[name]).train()
