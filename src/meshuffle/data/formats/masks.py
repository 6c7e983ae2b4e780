"""Segmentation as pairs of files: images/ and masks/, a PNG with one label id per pixel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meshuffle.data.annotated import (
    NUM_IDS,
    AnnotatedSource,
    Colours,
    MaskTargets,
    has_colours,
    path_below,
)
from meshuffle.data.base import Data, shortened
from meshuffle.data.entries import Problems, assemble, check_names, read_text, split_options
from meshuffle.data.formats.mask_files import count_ids, find_pairs, read_colours
from meshuffle.data.objects import note_unused, path_table
from meshuffle.data.scan import existing_folder
from meshuffle.data.target import VOID
from meshuffle.errors import DataError

_NOT_A_CLASS = -1
_MANY = 50  # ids: VOC and CamVid have fewer
_COLOURS = "label_colors.txt"
_BLACK = (0, 0, 0)
_OBJECTS = ("background", "thing")


def open_masks(path: str, *, seed: int = 0, need: Sequence[str] = ("train", "val")) -> Data:
    """Open images/{train,val,test} and masks/{train,val,test}, both flat, or a similar layout.

    Also: train/images/ with train/masks/, CamVid's train/ with trainannot/, and x.jpg with
    x_mask.png or x_label.png beside it.

    The mask of images/train/a.jpg is masks/train/a.png: grey, or with a palette, whose index
    is the label id. Id 255 counts nothing, and so does the one of `PATH?void=ID`. Names come
    from classes.txt where it is there: one a line, from id 0 on, `#` comments, and perhaps
    `void: ID`. Masks in colours need CamVid's label_colors.txt; what is black and not named there
    is the background. Otherwise all masks are read, and the ids found are the classes: "class 0",
    …, or what Roboflow's _classes.csv calls them. Masks of 0 and 255 only have two classes,
    background and thing; with `PATH?instances=1` each id but 0 is an object, a thing. Where val is
    missing, or there are no splits, 20 % of train chosen by `seed` become val.

    Raises `DataError`, also for a class without a pixel in train. A mask of another size than its
    image, or with an id that has no name, is an `ImageError` when it is read.
    """
    path, options = split_options(path, ["void", "instances"])
    if options.get("instances", "1") != "1":
        raise DataError(f"{path}?instances={options['instances']}: write ?instances=1, or nothing")
    root = existing_folder(path)
    void = None if "void" not in options else _id(options["void"], f"{path}?void=")
    problems = Problems(str(root))
    layout, pairs = find_pairs(root, need, problems)
    problems.raise_any()
    names, void = _names(root, void)
    main = "train" if "train" in pairs else next(iter(pairs))
    colours: Colours | None = None
    if names is None and pairs[main].masks and has_colours(path_below(root, pairs[main].masks[0])):
        names, colours = _coloured(root / _COLOURS)
    enough = () if names is None or not need or "val" not in pairs else range(len(names))
    counts = {
        split: count_ids(root, pair.masks, [i for i in enough if i != void], colours)
        for split, pair in pairs.items()
        if split == main or not enough
    }
    is_binary = _binary(counts[main], names, void) and "instances" not in options
    if is_binary or "instances" in options:
        table, classes = _table(None, void), _two(root, names)
    else:
        ids = _ids(root, names, counts.values(), void)
        if colours and names and names[0] == _OBJECTS[0] and not counts[main][:, 0].any():
            ids.remove(0)
        table = _table(ids, void)
        titles = _titles(root) if names is None else dict(enumerate(names))
        classes = tuple(titles.get(i, f"class {i}") for i in ids)
    if is_binary:
        zero, other = classes
        problems.notices.append(f"masks hold 0 and 255 only: 0 is {zero}, and 255 is {other}")
    pixels = {split: _per_class(count, table, len(classes)) for split, count in counts.items()}
    if "train" in pixels and not need:
        note_unused(np.flatnonzero(pixels["train"].sum(axis=0)), classes, problems.notes)
    splits = {}
    for split, pair in pairs.items():
        images = path_table(pair.images)
        labels = np.zeros(len(images), dtype=np.int64)
        if not enough:
            labels = pixels[split].argmax(axis=1)
        targets = MaskTargets(root, images, path_table(pair.masks), table, colours)
        splits[split] = AnnotatedSource(root, images, labels, classes, targets)
    shown = pixels["train"] > 0 if "train" in pixels else None
    layout = f"masks: {layout}"
    return assemble(
        path, "segment", classes, splits, problems, seed=seed, need=need, layout=layout, shown=shown
    )


def _id(text: str, where: str) -> int:
    if not text.strip().isdecimal() or int(text) >= NUM_IDS:
        raise DataError(f"{where}: {text.strip()!r} is no label id: 0 … {NUM_IDS - 1}")
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


def _titles(root: Path) -> dict[int, str]:
    """Return the names of ids in a _classes.csv, which Roboflow writes beside the images."""
    lines = [line for file in root.glob("*/_classes.csv") for line in read_text(file).splitlines()]
    rows = (line.partition(",") for line in lines)
    return {int(key): name.strip() for key, _, name in rows if key.strip().isdecimal()}


def _coloured(file: Path) -> tuple[list[str] | None, Colours | None]:
    """Return the names and colours of the classes where they are declared, the black one first."""
    if not file.is_file():
        return None, None
    names, colours = read_colours(file)
    if colours is None or _BLACK in colours:
        return names, colours
    return [_OBJECTS[0], *names], {_BLACK: 0, **{key: i + 1 for key, i in colours.items()}}


def _binary(counts: NDArray[np.int64], names: Sequence[str] | None, void: int | None) -> bool:
    """Return whether the masks hold 0 and 255 alone, and 255 may be a class."""
    ids = np.flatnonzero(counts.any(axis=0)).tolist()
    return ids == [0, VOID] and void is None and (names is None or len(names) == 2)


def _ids(
    root: Path,
    names: Sequence[str] | None,
    counts: Iterable[NDArray[np.int64]],
    void: int | None,
) -> list[int]:
    """Return the ids that are classes, in their order."""
    ids = list(range(len(names or ())))
    if names is None:
        pixels = np.sum([count[:, :NUM_IDS].sum(axis=0) for count in counts], axis=0)
        ids = np.flatnonzero(pixels).tolist()
        if void is None and len(ids) > _MANY and pixels[VOID] > pixels[1:VOID].sum():
            what = f"black and white with {len(ids) - 2} greys between"
            raise DataError(f"{root}: its masks are {what}; save them with 0 and 255 alone")
    ids = [i for i in ids if i not in (VOID, void)]
    if len(ids) < 2:
        raise DataError(
            f"{root}: its masks have {len(ids)} classes (ids {shortened([str(i) for i in ids])}); "
            "segmentation needs two or more"
        )
    return ids


def _table(ids: Sequence[int] | None, void: int | None) -> NDArray[np.int16]:
    """Return `MaskTargets.table`; without `ids`, every id but 0 is class 1."""
    table = np.full(NUM_IDS + 1, _NOT_A_CLASS if ids is not None else 1, dtype=np.int16)
    if ids is None:
        table[0] = 0
    else:
        table[VOID] = VOID
        table[ids] = np.arange(len(ids))
    if void is not None:
        table[void] = VOID
    return table


def _two(root: Path, names: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of the classes of masks that tell objects from the rest."""
    if names is not None and len(names) != len(_OBJECTS):
        raise DataError(
            f"{root / 'classes.txt'}: {len(names)} classes; ?instances=1 makes two: "
            f"{' and '.join(_OBJECTS)}"
        )
    return tuple(names or _OBJECTS)


def _per_class(
    counts: NDArray[np.int64], table: NDArray[np.int16], num_classes: int
) -> NDArray[np.int64]:
    """Return the pixels of each class, int64 [N, C], from those of each id."""
    pixels = np.zeros((len(counts), num_classes), dtype=np.int64)
    for i, label in enumerate(table.tolist()):
        if label not in (_NOT_A_CLASS, VOID):
            pixels[:, label] += counts[:, i]
    return pixels
