"""The boxes of one split of COCO, VOC or YOLO, and the sources made from them."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meshuffle.data.annotated import AnnotatedSource, BoxTargets, LabelTargets, RowTargets, Targets
from meshuffle.data.base import shortened
from meshuffle.data.entries import Problems, check_filled, lacking
from meshuffle.data.scan import PathTable
from meshuffle.errors import DataError


@dataclass(frozen=True, eq=False)
class Objects:
    """Images of one split and their boxes; those of image i are offsets[i] … offsets[i+1].

    `xyxy`: float32 [M, 4], pixels; without `sizes` (int32 [N, 2]: width, height) they are
    shares of the image's width and height.
    """

    root: Path
    paths: Sequence[str]
    xyxy: NDArray[np.float32]
    labels: NDArray[np.int64]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int32] | None = None

    @property
    def owners(self) -> NDArray[np.int64]:
        """The image of each box, int64 [M]."""
        return np.repeat(np.arange(len(self.paths)), np.diff(self.offsets))

    @property
    def areas(self) -> NDArray[np.float64]:
        """The area of each box, float64 [M]; comparable within an image."""
        left, top, right, bottom = self.xyxy.astype(np.float64).T
        return (right - left) * (bottom - top)

    def heaviest(self, num_classes: int) -> NDArray[np.int64]:
        """Return the class with most area in each image; see the function of this name."""
        return heaviest(self.owners, self.labels, self.areas, len(self.paths), num_classes)


class BoxList:
    """Collects boxes in any order, then sorts them by image."""

    def __init__(self) -> None:
        self._numbers = array("d")
        self._labels = array("q")
        self._owners = array("q")

    def add(self, owner: int, label: int, xyxy: Sequence[float]) -> None:
        """Add a box of image `owner`: left, top, right, bottom."""
        self._numbers.extend(xyxy)
        self._labels.append(label)
        self._owners.append(owner)

    def finish(
        self,
        root: Path,
        paths: Sequence[str],
        sizes: NDArray[np.int32] | None,
        problems: Problems,
        name: Callable[[int], str],
    ) -> Objects:
        """Return the checked boxes; `name(m)` is the name of the m-th added box for messages."""
        owners = np.array(self._owners, dtype=np.int64)
        numbers = np.array(self._numbers, dtype=np.float64).reshape(-1, 4)
        xyxy, good = _checked(numbers, None if sizes is None else sizes[owners], problems, name)
        order = np.argsort(owners[good], kind="stable")
        counts = np.bincount(owners[good], minlength=len(paths))
        return Objects(
            root,
            paths,
            xyxy[good][order],
            np.array(self._labels, dtype=np.int64)[good][order],
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            sizes,
        )


def _checked(
    xyxy: NDArray[np.float64],
    sizes: NDArray[np.int32] | None,
    problems: Problems,
    name: Callable[[int], str],
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return the boxes cut to their images, and a mask of the good ones.

    A box that reaches out by more than a pixel (or 1/500 of the image), which is more than
    rounding, is noted. One that is not finite or without area is a problem, and so is one outside
    its image; more than a tenth of these are an error, because the coordinates are then wrong.
    """
    far = np.ones((len(xyxy), 2)) if sizes is None else sizes.astype(np.float64)
    slack = 0.002 if sizes is None else 1.0
    limits = np.concatenate([far, far], axis=1)
    finite = np.isfinite(xyxy).all(axis=1)
    left, top, right, bottom = xyxy.T
    inside = (left < far[:, 0]) & (top < far[:, 1]) & (right > 0) & (bottom > 0)
    cut = np.clip(np.nan_to_num(xyxy), 0, limits).astype(np.float32)
    empty = finite & ((right <= left) | (bottom <= top))
    empty |= finite & inside & ((cut[:, 2] <= cut[:, 0]) | (cut[:, 3] <= cut[:, 1]))
    good: NDArray[np.bool_] = finite & ~empty & inside
    moved = good & ((xyxy < -slack) | (xyxy > limits + slack)).any(axis=1)
    for m in np.flatnonzero(~finite).tolist():
        problems.add(f"{name(m)}: box {_text(xyxy[m])} is not finite")
    for m in np.flatnonzero(empty).tolist():
        problems.add_empty(f"{name(m)}: box {_text(xyxy[m])} has no area")
    outside = np.flatnonzero(finite & ~empty & ~inside)
    add = problems.add if 10 * len(outside) > len(xyxy) else problems.add_empty
    for m in outside.tolist():
        add(f"{name(m)}: box {_text(xyxy[m])} lies outside its image{_of(limits[m])}")
    for m in np.flatnonzero(moved).tolist():
        problems.notes.append(
            f"{name(m)}: box {_text(xyxy[m])} reaches out of its image{_of(limits[m])}: cut"
        )
    return cut, good


def _text(box: NDArray[np.float64]) -> str:
    return "[" + ", ".join(f"{number:.6g}" for number in box) + "]"


def _of(limits: NDArray[np.float64]) -> str:
    width, height = limits[:2]
    return "" if (width, height) == (1, 1) else f" ({width:.0f}×{height:.0f})"


def largest(objects: Objects) -> NDArray[np.int64]:
    """Return the class of each image's largest object, int64 [N]; −1 if it has none."""
    labels = np.full(len(objects.paths), -1, dtype=np.int64)
    order = np.lexsort((objects.areas, objects.owners))
    labels[objects.owners[order]] = objects.labels[
        order
    ]  # the last value written for an image stays
    return labels


def heaviest(
    owners: NDArray[np.int64],
    labels: NDArray[np.int64],
    areas: NDArray[np.float64],
    num_images: int,
    num_classes: int,
) -> NDArray[np.int64]:
    """Return the class with most area in each image, int64 [N]; 0 if it has no object."""
    found = np.zeros(num_images, dtype=np.int64)
    keys, where = np.unique(owners * num_classes + labels, return_inverse=True)
    sums = np.bincount(where, weights=areas, minlength=len(keys))
    images, classes = np.divmod(keys[np.argsort(sums, kind="stable")], num_classes)
    found[images.astype(np.int64)] = classes
    return found


def classes_present(objects: Objects, num_classes: int) -> NDArray[np.uint8]:
    """Return which classes each image shows, uint8 [N, C] of 0/1."""
    rows = np.zeros((len(objects.paths), num_classes), dtype=np.uint8)
    rows[objects.owners, objects.labels] = 1
    return rows


def object_source(
    task: str, objects: Objects, classes: tuple[str, ...], where: str, notes: list[str]
) -> AnnotatedSource:
    """Return the source for detect, classify (by the largest object), multilabel or generate.

    `where`: the split, or its file, for a note on images that show nothing.
    """
    targets: Targets
    labels = objects.heaviest(len(classes))
    if task == "classify":
        labels = largest(objects)
        if bare := int((labels < 0).sum()):
            notes.append(f"{where}: {bare} images show no object: left out")
        objects, labels = _labelled(objects, labels)
        targets = LabelTargets(labels)
    elif task == "generate":
        labels = np.zeros_like(labels)
        targets = LabelTargets(labels)
    elif task == "multilabel":
        targets = RowTargets(classes_present(objects, len(classes)))
    else:
        files = None if objects.sizes is not None else (objects.root, path_table(objects.paths))
        targets = BoxTargets(objects.xyxy, objects.labels, objects.offsets, files)
    paths = path_table(objects.paths)
    return AnnotatedSource(objects.root, paths, labels, classes, targets, objects.sizes)


def path_table(paths: Sequence[str]) -> PathTable:
    """Return `paths` in one block of bytes."""
    return PathTable([path.encode("utf-8", "surrogateescape") for path in paths])


def _labelled(objects: Objects, labels: NDArray[np.int64]) -> tuple[Objects, NDArray[np.int64]]:
    """Return the images with a label; their boxes are not kept in order."""
    kept = np.flatnonzero(labels >= 0)
    sizes = None if objects.sizes is None else objects.sizes[kept]
    paths = [objects.paths[i] for i in kept.tolist()]
    return replace(objects, paths=paths, sizes=sizes), labels[kept]


def check_classes(
    where: str, task: str, train: Objects | None, classes: Sequence[str], notes: list[str]
) -> None:
    """Note the classes that train has no object of, or raise `DataError` for a classifier.

    For a classifier, a class that is never the largest object of an image is noted.
    """
    if train is None or task == "generate":
        return
    if not len(train.labels):
        raise DataError(f"{where}: train has no object; {task} needs annotated images")
    if task == "classify":
        check_filled(where, train.labels, classes, "object")
        if small := lacking(largest(train), classes):
            notes.append(f"no image of train has {shortened(small)} as its largest object")
    note_unused(train.labels, classes, notes)


def note_unused(labels: NDArray[np.int64], classes: Sequence[str], notes: list[str]) -> None:
    """Note the classes that train has no object of."""
    if missing := lacking(labels, classes):
        notes.append(f"train has no object of {shortened(missing)}")
