"""Outlines of objects (polygons and run lengths), which are drawn into masks on request.

A pixel belongs to a polygon when its centre lies inside, by the even-odd rule. Pillow's
`ImageDraw.polygon` draws the border besides: 20 pixels for a rectangle of 3×4, and some 5 %
too much of an object 40 pixels wide.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshuffle.data.target import VOID

Part = NDArray[np.float32] | NDArray[np.int64]
"""A polygon, float32 [2·K] of x, y, …; or int64 run lengths, of 0 and 1 in turn."""


def decode_runs(text: str) -> NDArray[np.int64]:
    """Return the run lengths in COCO's compressed form of them.

    Each number is written in groups of five bits, lowest first, as a character from `0` on
    whose sixth bit says that more follow; the last group's fifth bit is the sign. From the
    fourth number on, the difference to the last but one is written. (cocoapi, maskApi.c)

    Raises `ValueError` for text that is none.
    """
    groups = np.frombuffer(text.encode("latin-1", "replace"), dtype=np.uint8).astype(np.int64) - 48
    if not len(groups) or groups.min() < 0 or groups.max() > 63 or groups[-1] & 32:
        raise ValueError("no run lengths")
    ends = np.flatnonzero(groups & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    if (ends - starts).max() > 10:
        raise ValueError("run lengths of more than 50 bits")
    place = 5 * (np.arange(len(groups)) - np.repeat(starts, ends - starts + 1))
    numbers = np.add.reduceat((groups & 31) << place, starts)
    numbers -= (groups[ends] & 16 > 0) * (np.int64(1) << (place[ends] + 5))
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers


def check_runs(runs: NDArray[np.int64], width: int, height: int) -> None:
    """Raise `ValueError` for run lengths that do not fill the image."""
    if (runs < 0).any() or runs.sum() != width * height:
        raise ValueError(f"run lengths cover {runs.sum()} pixels, not {width}×{height}")


def area_of(part: Part) -> float:
    """Return the area in pixels; of a polygon by the shoelace formula."""
    if part.dtype == np.int64:
        return float(part[1::2].sum())
    x, y = part.astype(np.float64).reshape(-1, 2).T
    return float(abs((x * np.roll(y, -1) - y * np.roll(x, -1)).sum()) / 2)


def fill_runs(mask: NDArray[np.uint8], runs: NDArray[np.int64], value: int) -> None:
    """Write `value` where the runs, down the columns of `mask` [H, W], are of 1."""
    inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    mask[inside.reshape(mask.shape[::-1]).T] = value


def fill_polygon(mask: NDArray[np.uint8], points: NDArray[np.float32], value: int) -> None:
    """Write `value` into the pixels of `mask` [H, W] whose centre lies in the polygon.

    `points`: [2·K], x and y in turn; the part outside the mask is not drawn.
    """
    x, y = points.astype(np.float64).reshape(-1, 2).T
    height, width = mask.shape
    top, bottom = _pixels(y, height)
    left, right = _pixels(x, width)
    if bottom <= top or right <= left:
        return
    next_x, next_y = np.roll(x, -1), np.roll(y, -1)
    centres = np.arange(top, bottom) + 0.5
    edge, row = np.nonzero((y[:, None] <= centres) != (next_y[:, None] <= centres))
    share = (centres[row] - y[edge]) / (next_y[edge] - y[edge])
    crossing = x[edge] + share * (next_x[edge] - x[edge])
    column = np.clip(np.ceil(crossing - 0.5) - left, 0, right - left).astype(np.int64)
    toggles = np.zeros((bottom - top, right - left + 1), dtype=bool)
    np.logical_xor.at(toggles, (row, column), True)
    inside = np.logical_xor.accumulate(toggles[:, :-1], axis=1)
    mask[top:bottom, left:right][inside] = value


def _pixels(along: NDArray[np.float64], size: int) -> tuple[int, int]:
    """Return the pixels, first and last + 1, that the polygon can touch."""
    return max(int(np.floor(along.min())), 0), min(int(np.ceil(along.max())), size)


@dataclass(frozen=True, eq=False)
class ShapeTargets:
    """The masks of all images: image → objects → parts → numbers, each level with offsets.

    The objects of an image are in the order in which they are drawn. `sizes`: int32 [N, 2],
    width and height. A part of runs has its numbers in `runs`, a polygon in `points`.
    """

    sizes: NDArray[np.int32]
    objects: NDArray[np.int64]
    values: NDArray[np.uint8]
    parts: NDArray[np.int64]
    is_runs: NDArray[np.bool_]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    points: NDArray[np.float32]
    runs: NDArray[np.int32]

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        width, height = self.sizes[index]
        mask = np.zeros((height, width), dtype=np.uint8)
        for i in range(self.objects[index], self.objects[index + 1]):
            for part in range(self.parts[i], self.parts[i + 1]):
                here = slice(self.starts[part], self.ends[part])
                if self.is_runs[part]:
                    fill_runs(mask, self.runs[here].astype(np.int64), int(self.values[i]))
                else:
                    fill_polygon(mask, self.points[here], int(self.values[i]))
        return mask


class ShapeList:
    """Collects objects in any order; `finish` sorts them into the order of drawing."""

    def __init__(self) -> None:
        self._keys: list[tuple[int, bool, float]] = []
        self._values: list[int] = []
        self._parts: list[Sequence[Part]] = []

    def add(self, owner: int, value: int, area: float, parts: Sequence[Part]) -> None:
        """Add an object of image `owner`: its class in the mask, or 255."""
        self._keys.append((owner, value != VOID, -area))
        self._values.append(value)
        self._parts.append(parts)

    def finish(self, sizes: NDArray[np.int32]) -> ShapeTargets:
        """Return the masks; pixels that do not count are below, and smaller objects on top."""
        order = sorted(range(len(self._keys)), key=self._keys.__getitem__)
        owners = [self._keys[i][0] for i in order]
        points, runs, is_runs, counts = array("f"), array("i"), array("b"), array("q")
        for i in order:
            for part in self._parts[i]:
                of_runs = part.dtype == np.int64
                (runs if of_runs else points).frombytes(
                    part.astype(np.int32 if of_runs else np.float32).tobytes()
                )
                is_runs.append(of_runs)
                counts.append(len(part))
        of_runs_P = np.array(is_runs, dtype=bool)
        lengths_P = np.array(counts, dtype=np.int64)
        ends_P = np.where(
            of_runs_P, np.cumsum(lengths_P * of_runs_P), np.cumsum(lengths_P * ~of_runs_P)
        )
        return ShapeTargets(
            sizes=sizes,
            objects=_offsets(np.bincount(np.array(owners, dtype=np.int64), minlength=len(sizes))),
            values=np.array([self._values[i] for i in order], dtype=np.uint8),
            parts=_offsets([len(self._parts[i]) for i in order]),
            is_runs=of_runs_P,
            starts=ends_P - lengths_P,
            ends=ends_P,
            points=np.array(points, dtype=np.float32),
            runs=np.array(runs, dtype=np.int32),
        )


def _offsets(counts: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
