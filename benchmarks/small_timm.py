"""timm's models as small as they can be made, for ranks to build by name: `small_timm:NAME`."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import timm
import torch
from torch import nn

_SIZES = (64, 96, 128, 160, 224, 256)
_AT_LEAST = {"inception_v4": 160}
"""With smaller images its last maps have one pixel: a batch norm over four numbers is chaotic."""


def __getattr__(name: str) -> Callable[[], nn.Module]:
    if name.startswith("_") or not timm.is_model(name):
        raise AttributeError(name)
    return functools.partial(make, name)


def make(name: str) -> nn.Module:
    knobs, _ = smallest_input(name)
    return timm.create_model(name, **knobs)


@functools.cache
def smallest_input(name: str) -> tuple[dict[str, Any], int]:
    """Return the knobs and the side of the smallest images with which a model runs.

    Raises:
        RuntimeError: with none.
    """
    why: Exception | None = None
    for knobs, size in _candidates(name):
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                timm.create_model(name, **knobs).eval()(torch.zeros(1, 3, size, size))
            return knobs, size
        except Exception as error:  # noqa: BLE001  # whatever timm says about a size
            why = error
    raise RuntimeError(f"timm:{name} runs with no size that was tried: {why}")


def _is_large(name: str) -> bool:
    """Tell whether a model has more than 100 million parameters; two blocks do as well then."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                return sum(p.numel() for p in timm.create_model(name).parameters()) > 1e8
        except (RuntimeError, NotImplementedError):  # not made for the meta device
            return False


def _candidates(name: str) -> Iterator[tuple[dict[str, Any], int]]:
    config = timm.get_pretrained_cfg(name)
    native = config.input_size[-1] if config is not None else 224
    if config is not None and not config.fixed_input_size:
        for knobs in ({"depth": 2}, {}) if _is_large(name) else ({},):
            sizes = (s for s in _SIZES if _AT_LEAST.get(name, 0) <= s < native)
            yield from ((knobs, size) for size in sizes)
    else:
        for size in (s for s in _SIZES if s < native):
            yield {"img_size": size, "depth": 2}, size
            yield {"img_size": size}, size
    yield {}, native
