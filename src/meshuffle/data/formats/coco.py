"""COCO: one JSON of images, categories and annotations per split (cocodataset.org/#format-data)."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshuffle.data.annotated import AnnotatedSource
from meshuffle.data.base import Data, shortened
from meshuffle.data.entries import NEED, Need, Problems, assemble, check_names, only_split, split_of
from meshuffle.data.formats.coco_json import WANTED, Instances, is_number, read_instances
from meshuffle.data.formats.foreign import foreign_file
from meshuffle.data.objects import (
    BoxList,
    Objects,
    check_classes,
    heaviest,
    note_unused,
    object_source,
    path_table,
)
from meshuffle.data.scan import contents, existing_folder, subfolders
from meshuffle.data.shapes import Part, ShapeList, area_of, check_runs, decode_runs
from meshuffle.data.target import VOID
from meshuffle.errors import DataError
from meshuffle.files import expanded

BACKGROUND = "background"


def open_coco(
    path: str, *, task: str = "classify", seed: int = 0, need: Need = NEED, strict: bool = False
) -> Data:
    """Open COCO's layout, or one JSON of instances whose images lie beside it or in images/.

    `path`: a folder with annotations/instances_{train,val,test}*.json and the images in
    folders called alike (train2017/), or in images/; a folder with one JSON, or one for each
    split; or a JSON. Where val is missing, 20 % of train chosen by `seed` take its place.

    detect leaves out what is marked `iscrowd`; classify takes the class of the largest
    object and leaves out images without any; multilabel takes all classes that are there;
    segment draws polygons and run lengths, the smaller object on top, class 0 being the
    background and 255 a crowd. Boxes that reach out of their image are cut, and objects
    without area are left out; `Data.ignored` names each. With `strict` the latter are errors.
    Raises `DataError`.
    """
    files = _files(expanded(path), need)
    segment = task == "segment"
    read = {
        split: read_instances(file, split, outlines=segment, strict=strict)
        for split, file in files.items()
    }
    problems = Problems(path)
    notes = problems.notes
    classes = _classes(read, task, notes)
    splits, shown = {}, None
    for split, one in read.items():
        if not segment:
            splits[split] = _box_source(split, task, one, classes, notes)
            continue
        splits[split], shown_NC = _mask_source(split, one, classes, notes)
        shown = shown_NC if split == "train" else shown
    names = ", ".join(f"{one.file.name} with images in {one.root}" for one in read.values())
    layout = f"COCO: {names}"
    return assemble(
        path, task, classes, splits, problems, seed=seed, need=need, layout=layout, shown=shown
    )


def _files(path: Path, need: Sequence[str]) -> dict[str, Path]:
    """Return {split: JSON}."""
    if path.is_file():
        return {only_split(need): path}
    root = existing_folder(path)
    found: dict[str, Path] = {}
    for file in _instance_files(root):
        split = split_of(file.stem) or split_of(file.relative_to(root).parts[0])
        if split is None:
            continue
        if split in found:
            raise DataError(f"{root} has both {found[split].name} and {file.name} for {split}")
        found[split] = file
    if found:
        return found
    lonely = sorted([*root.glob("*.json"), *root.glob("annotations/*.json")])
    if len(lonely) != 1:
        names = shortened([file.name for file in lonely]) or "none"
        inner = [root / name for name in subfolders(root) if _instance_files(root / name)]
        hint = f"; did you mean coco:{inner[0]}?" if inner and not foreign_file(root) else ""
        raise DataError(
            f"{root} holds {len(lonely)} JSON files ({names}); {WANTED}; saw {contents(root)}{hint}"
        )
    return {only_split(need): lonely[0]}


def _instance_files(root: Path) -> list[Path]:
    """Return the JSON files that may be a split's: COCO's, or one in each split's folder.

    image_info_*.json, without annotations, counts where it is alone: Datumaro writes it as well.
    """
    named = [*root.glob("annotations/*.json"), *root.glob("*.json")]
    inner = [
        file
        for name in subfolders(root)
        if split_of(name)
        for pattern in ("_annotations*.json", "annotations/*.json")
        for file in (root / name).glob(pattern)
    ]
    plain = [file for file in named if split_of(file.stem)]
    plain = [file for file in plain if not file.stem.startswith("image_info")] or plain
    instances = [file for file in plain if file.stem.startswith("instances")]
    return sorted(instances or [f for f in plain if "_" not in f.stem] or inner or plain)


def _classes(read: Mapping[str, Instances], task: str, notes: list[str]) -> tuple[str, ...]:
    """Return the names, train's in the order of their ids; the background first in segment.

    A category without objects that others name as their supercategory is none: Roboflow writes
    the project's name that way.
    """
    first = read.get("train") or next(iter(read.values()))
    order = sorted(first.categories, key=lambda key: (isinstance(key, str), key))
    names = [first.categories[key] for key in order]
    check_names(str(first.file), names)
    if parents := first.parents & set(names):
        parents = parents.difference(*(one.used() for one in read.values()))
        names = [name for name in names if name not in parents]
        notes += [f"category {name}: only a supercategory, left out" for name in sorted(parents)]
    for one in read.values():
        if extra := sorted(set(one.categories.values()) - set(names) - parents):
            raise DataError(
                f"{one.file}: {len(extra)} categories that {first.file.name} lacks: "
                f"{shortened(extra)}; it has {shortened(names)}"
            )
    if task == "segment":
        names = [BACKGROUND, *(name for name in names if name != BACKGROUND)]
    if task == "segment" and len(names) > VOID:
        raise DataError(f"{first.file}: {len(names)} classes; a mask holds at most {VOID}")
    if not first.categories:
        first.problems.raise_any()
        raise DataError(f"{first.file}: its list of categories is empty")
    return tuple(names)


def _box_source(
    split: str, task: str, one: Instances, classes: tuple[str, ...], notes: list[str]
) -> AnnotatedSource:
    own: list[str] = []
    objects = _objects(one, classes, task, own)
    check_classes(str(one.file), task, objects if split == "train" else None, classes, own)
    notes += [f"{one.file.name}: {note}" for note in own]
    return object_source(task, objects, classes, one.file.name, notes)


def _objects(one: Instances, classes: Sequence[str], task: str, notes: list[str]) -> Objects:
    """Return the boxes of the task; a crowd is no object, but shows what it is a crowd of.

    Where no annotation has a box, each is a label of its whole image, as Datumaro writes them.
    """
    boxes, used, num_crowds = BoxList(), [], 0
    label_of = {name: label for label, name in enumerate(classes)}
    whole = task != "detect" and not any("bbox" in entry for entry in one.annotations)
    for annotation in one.known():
        if annotation.get("iscrowd") and task != "multilabel":
            num_crowds += 1
            continue
        owner = one.owner_of[annotation["image_id"]]
        box = [0, 0, *one.sizes[owner].tolist()] if whole else annotation.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
            one.problems.add(f"{one.name_of(annotation)}: bbox is {box!r}, not 4 numbers")
            continue
        left, top, width, height = box
        label = label_of[one.categories[annotation["category_id"]]]
        boxes.add(owner, label, (left, top, left + width, top + height))
        used.append(annotation)
    objects = boxes.finish(
        one.root, one.paths, one.sizes, one.problems, lambda m: one.name_of(used[m])
    )
    one.problems.raise_any()
    notes += one.problems.notes
    if num_crowds:
        notes.append(f"{num_crowds} crowds (iscrowd) left out")
    return objects


def _mask_source(
    split: str, one: Instances, classes: tuple[str, ...], notes: list[str]
) -> tuple[AnnotatedSource, NDArray[np.bool_]]:
    """Return the source of segment, and which classes each image shows, bool [N, C]."""
    shapes = ShapeList()
    owners, labels, areas = array("q"), array("q"), array("d")
    label_of = {name: label for label, name in enumerate(classes)}
    for annotation in one.known():
        if not (parts := _parts(one, annotation)):
            continue
        owner = one.owner_of[annotation["image_id"]]
        label = label_of[one.categories[annotation["category_id"]]]
        given = annotation.get("area")
        drawn = sum(map(area_of, parts))
        if not drawn:
            one.problems.add_empty(f"{one.name_of(annotation)}: its segmentation has no area")
            continue
        area = given if is_number(given) and given > 0 else drawn
        value = VOID if annotation.get("iscrowd") else label
        shapes.add(owner, value, area, parts)
        owners.append(owner)
        labels.append(label)
        areas.append(area)
    one.problems.raise_any()
    own = one.problems.notes
    if split == "train":
        note_unused(np.array([0, *labels]), classes, own)
    notes += [f"{one.file.name}: {note}" for note in own]
    main = heaviest(
        np.array(owners), np.array(labels), np.array(areas), len(one.paths), len(classes)
    )
    targets = shapes.finish(one.sizes)
    shown_NC = np.zeros((len(one.paths), len(classes)), dtype=np.bool_)
    shown_NC[:, 0] = True
    shown_NC[np.array(owners, dtype=np.int64), np.array(labels, dtype=np.int64)] = True
    paths = path_table(one.paths)
    return AnnotatedSource(one.root, paths, main, classes, targets, one.sizes), shown_NC


def _parts(one: Instances, annotation: Mapping[str, Any]) -> list[Part]:
    """Return the polygons, or the run lengths, of an object; without any it has no area."""
    found = annotation.get("segmentation")
    try:
        if isinstance(found, dict):
            return [_runs(found, *one.sizes[one.owner_of[annotation["image_id"]]].tolist())]
        polygons = [_polygon(points) for points in found or ()]
    except (ValueError, TypeError) as error:
        one.problems.add(f"{one.name_of(annotation)}: segmentation: {error}")
        return []
    parts: list[Part] = [points for points in polygons if len(points) >= 6]
    if len(parts) < max(len(polygons), 1):
        what = "has a polygon of less than 3 points" if polygons else "has no segmentation"
        one.problems.add_empty(f"{one.name_of(annotation)}: {what}")
    return parts


def _polygon(points: Any) -> Part:
    if points is None or points.ndim == 0 or points.size % 2 or not np.isfinite(points).all():
        raise ValueError("not a list of polygons, each [x, y, x, y, …]")
    flat: Part = points.reshape(-1)
    return flat


def _runs(found: Mapping[str, Any], width: int, height: int) -> Part:
    counts, size = found.get("counts"), found.get("size")
    if size != [height, width]:
        raise ValueError(f"its size {size} is not the image's, [{height}, {width}]")
    if isinstance(counts, str):
        runs = decode_runs(counts)
    elif isinstance(counts, list) and all(type(count) is int for count in counts):
        runs = np.array(counts, dtype=np.int64)
    else:
        raise ValueError("counts are neither text nor whole numbers")
    check_runs(runs, width, height)
    return runs
