"""Pascal VOC: one XML per image, lists of the splits, and masks for some images.

(host.robots.ox.ac.uk/pascal/VOC, development kit of 2012)
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from meshuffle.data.annotated import NUM_IDS, AnnotatedSource, MaskTargets, image_size
from meshuffle.data.base import Data, shortened
from meshuffle.data.entries import (
    Problems,
    absent,
    assemble,
    check_names,
    image_names,
    only_split,
    read_text,
    repeated,
    stem,
)
from meshuffle.data.objects import BoxList, Objects, check_classes, object_source, path_table
from meshuffle.data.scan import existing_folder, subfolders
from meshuffle.data.target import VOID
from meshuffle.errors import DataError, ImageError

BACKGROUND = "background"
OFFICIAL = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
_LISTS = {"train": ("train", "trainval"), "val": ("val",), "test": ("test",)}
_MASKS = "SegmentationClass"


@dataclass(frozen=True)
class _Annotation:
    """One XML. `boxes`: (class, left, top, right, bottom); `difficult`: how many more."""

    size: tuple[int, int]
    boxes: Sequence[tuple[str, float, float, float, float]] = ()
    difficult: int = 0


@dataclass(frozen=True, eq=False)
class _Split:
    """The images of a split, checked: paths below the root, and their annotations."""

    stems: Sequence[str]
    paths: Sequence[str]
    annotations: Sequence[_Annotation]


def open_voc(
    path: str,
    *,
    task: str = "classify",
    seed: int = 0,
    need: Sequence[str] = ("train", "val"),
    strict: bool = False,
) -> Data:
    """Open a folder with Annotations/, JPEGImages/ and, where there are any, ImageSets/.

    Splits are ImageSets/Main/{train,val,test}.txt (for segment Segmentation/ instead of
    Main/ where it is there); trainval.txt is train where train.txt is missing. Where val is
    missing, or there are no lists, 20 % of train chosen by `seed` become val. Classes are
    sorted by name.

    Objects that are `difficult` are left out, and counted in `Data.ignored`. classify takes
    the class of the largest object, multilabel all of them. segment reads
    SegmentationClass/*.png: palette index k is class k (class_names.txt where it is there,
    else VOC's own 20, else the sorted names), 0 the background, 255 counts nothing. Boxes
    are VOC's: pixels count from 1, and the last one belongs to the box. One without area is
    left out and named in `Data.ignored`; with `strict` it is an error. Raises `DataError`.
    """
    root = existing_folder(path)
    _check_layout(root, task)
    problems = Problems(str(root), strict=strict)
    lists = _lists(root, task, need, problems)
    _check_disjoint(lists, problems)
    splits = {split: _read_split(root, stems, task, problems) for split, stems in lists.items()}
    make = _mask_sources if task == "segment" else _box_sources
    classes, sources = make(root, task, splits, problems)
    return assemble(path, task, classes, sources, seed=seed, need=need, ignored=problems.notes)


def _check_layout(root: Path, task: str) -> None:
    folders = ["JPEGImages", _MASKS if task == "segment" else "Annotations"]
    if missing := [name for name in folders if not (root / name).is_dir()]:
        inner = [name for name in subfolders(root) if (root / name / "JPEGImages").is_dir()]
        hint = f"; did you mean {root / inner[0]}?" if inner else ""
        raise DataError(f"{root} has no {' and no '.join(missing)} folder, as VOC has it{hint}")


def _lists(root: Path, task: str, need: Sequence[str], problems: Problems) -> dict[str, list[str]]:
    """Return {split: names of its images without extension}."""
    folder = root / "ImageSets" / "Main"
    if task == "segment" and (root / "ImageSets" / "Segmentation").is_dir():
        folder = root / "ImageSets" / "Segmentation"
    found: dict[str, list[str]] = {}
    for split, names in _LISTS.items():
        for file in (folder / f"{name}.txt" for name in names):
            if split not in found and file.is_file():
                lines = read_text(file).splitlines()
                found[split] = [line.split()[0] for line in lines if line.strip()]
    if not found:
        annotated = _MASKS if task == "segment" else "Annotations"
        every = sorted((stem(p.name) for p in (root / annotated).iterdir()), key=os.fsencode)
        return {only_split(need): [name for name in every if name and not name.startswith(".")]}
    if "test" in found and "test" not in need and not _annotated(root, task, found["test"]):
        problems.notes.append("test.txt: its images have no annotations: left out")
        del found["test"]
    return found


def _annotated(root: Path, task: str, stems: Sequence[str]) -> bool:
    pattern = f"{_MASKS}/%s.png" if task == "segment" else "Annotations/%s.xml"
    paths = [pattern % name for name in stems]
    return len(absent(root, paths)) < len(paths)


def _check_disjoint(lists: Mapping[str, Sequence[str]], problems: Problems) -> None:
    for split, stems in lists.items():
        for name in repeated(stems):
            problems.add(f"{split}.txt: {name} comes twice")
    every = [name for stems in lists.values() for name in dict.fromkeys(stems)]
    for name in repeated(every):
        splits = [f"{split}.txt" for split, stems in lists.items() if name in set(stems)]
        problems.add(f"{' and '.join(splits)} both list {name}")


def _read_split(root: Path, stems: Sequence[str], task: str, problems: Problems) -> _Split:
    images = {stem(name): f"JPEGImages/{name}" for name in image_names(root / "JPEGImages")}
    kept, annotations = [], []
    for name in stems:
        if name not in images:
            problems.add(f"JPEGImages has no image {name}")
        elif (found := _read(root, name, images[name], task, problems)) is not None:
            kept.append(name)
            annotations.append(found)
    return _Split(kept, [images[name] for name in kept], annotations)


def _read(root: Path, name: str, image: str, task: str, problems: Problems) -> _Annotation | None:
    """Return what Annotations/NAME.xml says; None where that is a problem."""
    file = root / "Annotations" / f"{name}.xml"
    if task == "segment" and not file.is_file():
        return _Annotation((0, 0))
    try:
        return _parsed(_tree(file), root / image)
    except (OSError, ValueError, ImageError) as error:
        problems.add(f"Annotations/{name}.xml: {getattr(error, 'strerror', None) or error}")
    return None


class _NoDoctype(ElementTree.TreeBuilder):
    """Refuses what could declare entities that grow without bound."""

    def doctype(self, *_: Any) -> None:
        raise ValueError("has a DOCTYPE, which no annotation needs and which is not read")


def _tree(file: Path) -> ElementTree.Element:
    parser = ElementTree.XMLParser(target=_NoDoctype())
    try:
        return ElementTree.fromstring(file.read_bytes(), parser)
    except ElementTree.ParseError as error:
        line, column = error.position
        raise ValueError(f"line {line}, column {column}: no XML, or cut short") from error


def _parsed(tree: ElementTree.Element, image: Path) -> _Annotation:
    boxes, difficult = [], 0
    for i, entry in enumerate(tree.iter("object"), 1):
        name = (entry.findtext("name") or "").strip()
        box = entry.find("bndbox")
        if not name or box is None:
            raise ValueError(f"object {i} lacks its {'name' if not name else 'bndbox'}")
        if (entry.findtext("difficult") or "0").strip() == "1":
            difficult += 1
            continue
        corners = [_number(box, key, i) for key in ("xmin", "ymin", "xmax", "ymax")]
        boxes.append((name, corners[0] - 1, corners[1] - 1, corners[2], corners[3]))
    size = [tree.findtext(f"size/{key}") or "0" for key in ("width", "height")]
    if not all(text.strip().isdecimal() and int(text) > 0 for text in size):
        return _Annotation(image_size(str(image)), boxes, difficult)
    return _Annotation((int(size[0]), int(size[1])), boxes, difficult)


def _number(box: ElementTree.Element, key: str, i: int) -> float:
    text = box.findtext(key)
    try:
        return float(text or "")
    except ValueError:
        raise ValueError(f"object {i}: {key} is {text!r}, not a number") from None


def _objects(root: Path, split: _Split, label_of: Mapping[str, int], problems: Problems) -> Objects:
    boxes, names = BoxList(), []
    for owner, annotation in enumerate(split.annotations):
        for i, (name, *corners) in enumerate(annotation.boxes, 1):
            if name in label_of:
                boxes.add(owner, label_of[name], corners)
                names.append(f"Annotations/{split.stems[owner]}.xml: object {i} ({name})")
    sizes = np.array([a.size for a in split.annotations], dtype=np.int32).reshape(-1, 2)
    return boxes.finish(root, split.paths, sizes, problems, names.__getitem__)


def _names(splits: Mapping[str, _Split]) -> list[str]:
    annotations = [one for split in splits.values() for one in split.annotations]
    return sorted({box[0] for one in annotations for box in one.boxes}, key=os.fsencode)


def _box_sources(
    root: Path, task: str, splits: Mapping[str, _Split], problems: Problems
) -> tuple[tuple[str, ...], dict[str, AnnotatedSource]]:
    classes = tuple(_names(splits))
    label_of = {name: label for label, name in enumerate(classes)}
    objects = {key: _objects(root, split, label_of, problems) for key, split in splits.items()}
    problems.raise_any()
    if not classes:
        raise DataError(f"{root}: its annotations hold no object")
    check_classes(str(root), task, objects.get("train"), classes, problems.notes)
    annotations = [one for split in splits.values() for one in split.annotations]
    if difficult := sum(one.difficult for one in annotations):
        problems.notes.append(f"{difficult} difficult objects left out")
    return classes, {
        key: object_source(task, one, classes, key, problems.notes) for key, one in objects.items()
    }


def _mask_sources(
    root: Path, task: str, splits: Mapping[str, _Split], problems: Problems
) -> tuple[tuple[str, ...], dict[str, AnnotatedSource]]:
    """Return the sources of segment; `task` is that."""
    masks = {key: [f"{_MASKS}/{s}.png" for s in split.stems] for key, split in splits.items()}
    for path in absent(root, [path for paths in masks.values() for path in paths]):
        problems.add(f"{path} is missing")
    problems.raise_any()
    classes = _mask_classes(root, _names(splits))
    table = np.full(NUM_IDS + 1, -1, dtype=np.int16)
    table[: len(classes)] = np.arange(len(classes))
    table[VOID] = VOID
    label_of = {name: label for label, name in enumerate(classes)}
    sources = {}
    for key, split in splits.items():
        labels = _objects(root, split, label_of, Problems(str(root))).heaviest(len(classes))
        images = path_table(split.paths)
        targets = MaskTargets(root, images, path_table(masks[key]), table)
        sources[key] = AnnotatedSource(root, images, labels, classes, targets)
    return classes, sources


def _mask_classes(root: Path, names: Sequence[str]) -> tuple[str, ...]:
    """Return the class of each palette index."""
    file = root / "class_names.txt"
    if file.is_file():
        lines = [line.strip() for line in read_text(file).splitlines()]
        classes = [line for line in lines if line and line != "__ignore__"]
    elif names:
        classes = [BACKGROUND, *(OFFICIAL if set(names) <= set(OFFICIAL) else names)]
    else:
        raise DataError(f"{root}: no class_names.txt and no object in Annotations/ names a class")
    check_names(str(file if file.is_file() else root), classes)
    if len(classes) > VOID:
        raise DataError(f"{root}: {shortened(classes)}: a mask holds at most {VOID} classes")
    return tuple(classes)
