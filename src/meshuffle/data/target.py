"""The target of one image, and its translation to other class indices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

VOID = 255
"""The value of a mask's pixels that do not count."""


@dataclass(frozen=True, eq=False)
class Boxes:
    """The objects of one image. `xyxy`: float32 [M, 4], pixels; `labels`: int64 [M].

    A box is left, top, right, bottom on the pixel grid, where the image is 0 … width and
    0 … height; M may be 0.
    """

    xyxy: NDArray[np.float32]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


def remap(target: Any, lookup: NDArray[np.int64], num_classes: int) -> Any:
    """Return `target` in other classes: class i becomes class `lookup[i]`.

    `target`: a label, `Boxes`, a vector float32 [C] with one entry per class, or a mask
    uint8 [H, W], in which 255 stays 255. `lookup`: int64 [C], each below `num_classes` and
    no two alike. A vector becomes float32 [num_classes], 0 for the classes that are new.
    Raises `ValueError` where a class of a mask would not fit below 255.

    >>> remap(np.array([1, 0], dtype=np.float32), np.array([2, 0]), 3)
    array([0., 0., 1.], dtype=float32)
    """
    if isinstance(target, Boxes):
        return Boxes(target.xyxy, lookup[target.labels])
    if not isinstance(target, np.ndarray):
        return int(lookup[target])
    if target.ndim == 1:
        wider = np.zeros(num_classes, dtype=target.dtype)
        wider[lookup] = target
        return wider
    return _mask_lookup(lookup)[target]


def _mask_lookup(lookup: NDArray[np.int64]) -> NDArray[np.uint8]:
    if len(lookup) and lookup.max() >= VOID:
        raise ValueError(f"class {lookup.max()} does not fit into a mask: at most {VOID} classes")
    table = np.full(256, VOID, dtype=np.uint8)
    table[: len(lookup)] = lookup
    return table
