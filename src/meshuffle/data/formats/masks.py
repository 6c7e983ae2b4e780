"""Segmentation as pairs of files: images/ and masks/, a PNG with one label id per pixel."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meshuffle.data.annotated import AnnotatedSource, MaskTargets, path_below, read_ids
from meshuffle.data.base import Data, shortened
from meshuffle.data.entries import (
    SPLITS,
    Problems,
    assemble,
    check_names,
    image_names,
    only_split,
    read_text,
    repeated,
    split_options,
    stem,
    suffix,
)
from meshuffle.data.objects import note_unused, path_table
from meshuffle.data.scan import existing_folder, subfolders
from meshuffle.data.target import VOID
from meshuffle.errors import DataError, ImageError

_NUM_IDS = 256
_NOT_A_CLASS = -1


@dataclass(frozen=True)
class _Pairs:
    """The images of a split and their masks, in the same order; paths below the root."""

    images: Sequence[str]
    masks: Sequence[str]


def open_masks(path: str, *, seed: int = 0, need: Sequence[str] = ("train", "val")) -> Data:
    """Open images/{train,val,test} and masks/{train,val,test}, or both flat.

    The mask of images/train/a.jpg is masks/train/a.png: grey, or with a palette, whose index
    is the label id. Id 255 counts nothing, and so does the one of `PATH?void=ID`. Names come
    from classes.txt where it is there: one a line, from id 0 on, `#` comments, and perhaps
    `void: ID`. Otherwise all masks are read, and the ids found are the classes: "class 0", …;
    where these are 0 and 255 only, 255 is a class. Where val is missing, or there are no
    splits, 20 % of train chosen by `seed` become val.

    Raises `DataError`. A mask of another size than its image, or with an id that has no
    name, is an `ImageError` when it is read.
    """
    path, options = split_options(path, ["void"])
    root = existing_folder(path)
    void = None if "void" not in options else _id(options["void"], f"{path}?void=")
    problems = Problems(str(root))
    pairs = _pairs(root, need, problems)
    problems.raise_any()
    names, void = _names(root, void)
    scan = names is None or not need or "val" not in pairs
    counts = {split: _count_ids(root, pair.masks) for split, pair in pairs.items() if scan}
    table = _table(root, names, counts.values(), void)
    classes = _classes(names, table)
    splits = {}
    for split, pair in pairs.items():
        labels = np.zeros(len(pair.images), dtype=np.int64)
        if split in counts:
            pixels = _per_class(counts[split], table, len(classes))
            labels = pixels.argmax(axis=1)
            if split == "train":
                note_unused(pixels.sum(axis=0).nonzero()[0], classes, problems.notes)
        images = path_table(pair.images)
        targets = MaskTargets(root, images, path_table(pair.masks), table)
        splits[split] = AnnotatedSource(root, images, labels, classes, targets)
    return assemble(path, "segment", classes, splits, seed=seed, need=need, ignored=problems.notes)


def _pairs(root: Path, need: Sequence[str], problems: Problems) -> dict[str, _Pairs]:
    for name in ("images", "masks"):
        if not (root / name).is_dir():
            raise DataError(
                f"{root} has no {name}/; wanted: images/ and masks/, with train/ and "
                "val/ in both, or flat"
            )
    folders = [name for name in subfolders(root / "images") if name in SPLITS]
    if not folders:
        return {only_split(need): _pair(root, "", problems)}
    for split in repeated(SPLITS[name] for name in folders):
        raise DataError(f"{root / 'images'} has two folders for {split}: keep one of them")
    return {SPLITS[name]: _pair(root, f"/{name}", problems) for name in folders}


def _pair(root: Path, folder: str, problems: Problems) -> _Pairs:
    images = image_names(root / f"images{folder}")
    masks = {stem(name): name for name in image_names(root / f"masks{folder}")
             if suffix(name) == ".png"}  # fmt: skip
    for name in repeated(map(stem, images)):
        problems.add(f"images{folder}/{name} comes twice, with two extensions")
    for name in images:
        if stem(name) not in masks:
            problems.add(f"images{folder}/{name} has no mask masks{folder}/{stem(name)}.png")
    stems = set(map(stem, images))
    problems.notes += [
        f"masks{folder}/{name}: no image" for key, name in masks.items() if key not in stems
    ]
    kept = [name for name in images if stem(name) in masks]
    return _Pairs(
        [f"images{folder}/{name}" for name in kept],
        [f"masks{folder}/{masks[stem(name)]}" for name in kept],
    )


def _id(text: str, where: str) -> int:
    if not text.strip().isdecimal() or int(text) >= _NUM_IDS:
        raise DataError(f"{where}: {text.strip()!r} is no label id: 0 … {_NUM_IDS - 1}")
    return int(text)


def _names(root: Path, void: int | None) -> tuple[list[str] | None, int | None]:
    """Return the names in classes.txt, by id, and the void id that it or the caller names."""
    file = root / "classes.txt"
    if not file.is_file():
        return None, void
    names = []
    for line in read_text(file).splitlines():
        text = line.partition("#")[0].strip()
        if text.startswith("void:"):
            void = _id(text.removeprefix("void:"), str(file)) if void is None else void
        elif text:
            names.append(text)
    check_names(str(file), names)
    if len(names) > VOID:
        raise DataError(f"{file}: {len(names)} classes; a mask holds at most {VOID}")
    return names, void


def _count_ids(root: Path, masks: Sequence[str]) -> NDArray[np.int64]:
    """Return how many pixels of each id every mask has, int64 [N, 256]; broken masks none."""
    counts = np.zeros((len(masks), _NUM_IDS), dtype=np.int64)

    def count(i: int) -> None:
        try:
            ids = read_ids(path_below(root, masks[i]))
        except ImageError:  # it is reported when the mask is read
            return
        counts[i] = np.bincount(ids[ids < _NUM_IDS].ravel(), minlength=_NUM_IDS)

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        list(pool.map(count, range(len(masks))))
    return counts


def _table(
    root: Path,
    names: Sequence[str] | None,
    counts: Iterable[NDArray[np.int64]],
    void: int | None,
) -> NDArray[np.int16]:
    """Return the class of each id, int16 [256]; see `MaskTargets.table`."""
    if names is not None:
        ids = list(range(len(names)))
    else:
        ids = np.flatnonzero(sum(count.sum(axis=0) for count in counts)).tolist()
    if names is not None or void == VOID or ids != [0, VOID]:
        ids = [i for i in ids if i not in (VOID, void)]
    if len(ids) < 2:
        raise DataError(
            f"{root}: its masks have {len(ids)} classes (ids {shortened([str(i) for i in ids])}); "
            "segmentation needs two or more"
        )
    table = np.full(_NUM_IDS, _NOT_A_CLASS, dtype=np.int16)
    table[VOID] = VOID
    if void is not None:
        table[void] = VOID
    table[ids] = np.arange(len(ids))
    return table


def _classes(names: Sequence[str] | None, table: NDArray[np.int16]) -> tuple[str, ...]:
    ids = [i for i, label in enumerate(table.tolist()) if label not in (_NOT_A_CLASS, VOID)]
    return tuple(f"class {i}" if names is None else names[i] for i in ids)


def _per_class(
    counts: NDArray[np.int64], table: NDArray[np.int16], num_classes: int
) -> NDArray[np.int64]:
    """Return the pixels of each class, int64 [N, C], from those of each id."""
    pixels = np.zeros((len(counts), num_classes), dtype=np.int64)
    for i, label in enumerate(table.tolist()):
        if label not in (_NOT_A_CLASS, VOID):
            pixels[:, label] += counts[:, i]
    return pixels
