"""Read one COCO JSON, and check everything in it that does not depend on the task."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from meshuffle.data.annotated import image_size, path_below
from meshuffle.data.entries import Problems, absent, read_text, repeated, split_of, with_slashes
from meshuffle.data.image import MAX_PIXELS
from meshuffle.data.scan import subfolders
from meshuffle.errors import DataError, ImageError

WANTED = (
    "wanted: annotations/instances_train2017.json (and val) with train2017/ beside annotations/, "
    "or one JSON of instances, which VIA and labelme can export"
)


@dataclass(frozen=True, eq=False)
class Instances:
    """One JSON with unchanged annotations; `paths` and `sizes` of the images are checked.

    `parents`: the categories that others name as their supercategory.
    """

    file: Path
    root: Path
    paths: list[str]
    sizes: NDArray[np.int32]
    owner_of: Mapping[Any, int]
    categories: Mapping[Any, str]
    parents: frozenset[str]
    annotations: Sequence[dict[str, Any]]
    problems: Problems

    def name_of(self, annotation: Mapping[str, Any]) -> str:
        """Return the name of an annotation for messages: its id and its image."""
        key = annotation.get("image_id")
        owner = self.owner_of.get(key) if isinstance(key, int | str) else None
        image = "" if owner is None else f" ({self.paths[owner]})"
        return f"annotation {annotation.get('id')}{image}"

    def known(self) -> Iterator[dict[str, Any]]:
        """Yield the annotations of known images and categories; others are problems."""
        for annotation in self.annotations:
            for key, known in (("image_id", self.owner_of), ("category_id", self.categories)):
                value = annotation.get(key)
                if not isinstance(value, int | str) or value not in known:
                    self.problems.add(f"{self.name_of(annotation)}: unknown {key} {value!r}")
                    break
            else:
                yield annotation

    def used(self) -> set[str]:
        """Return the names of the categories that have an annotation."""
        keys = (annotation.get("category_id") for annotation in self.annotations)
        known = {key for key in keys if isinstance(key, int | str)}
        return {name for key, name in self.categories.items() if key in known}


def read_instances(file: Path, split: str, *, outlines: bool, strict: bool = False) -> Instances:
    """Read a JSON, with or without the outlines, and check its images and categories.

    `strict`: see `Problems`.
    """
    tree = _parse(file, _compact if outlines else _without_outline)
    problems = Problems(str(file), strict=strict)
    images = [entry for entry in tree["images"] if _is_image_entry(entry, problems)]
    paths = [str(entry["file_name"]) for entry in images]
    for name in repeated(paths):
        problems.add(f"image {name} comes twice")
    for key in repeated(entry["id"] for entry in images):
        problems.add(f"image id {key} comes twice")
    root, paths = _image_root(file, split, with_slashes(file.parent, paths))
    for name in absent(root, paths):
        problems.add(f"image {name} is not in {root}")
    sizes = [_size(entry, path, root, problems) for entry, path in zip(images, paths, strict=True)]
    return Instances(
        file=file,
        root=root,
        paths=paths,
        sizes=np.array(sizes, dtype=np.int32).reshape(-1, 2),
        owner_of={entry["id"]: i for i, entry in enumerate(images)},
        categories=_categories(tree["categories"], problems),
        parents=frozenset(
            str(entry["supercategory"])
            for entry in tree["categories"]
            if entry.get("supercategory", entry.get("name")) != entry.get("name")
        ),
        annotations=tree["annotations"],
        problems=problems,
    )


def _parse(file: Path, hook: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    try:
        tree = json.loads(read_text(file), object_hook=hook)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file}: line {error.lineno}, column {error.colno}: {error.msg}; "
            "the file is no JSON, or is cut short"
        ) from error
    except RecursionError as error:
        raise DataError(f"{file}: nested too deeply to be a COCO file") from error
    for key in ("images", "annotations", "categories"):
        found = tree.get(key) if isinstance(tree, dict) else None
        if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
            raise DataError(f"{file}: lacks its list of {key}; {WANTED}")
    return tree


def _compact(entry: dict[str, Any]) -> dict[str, Any]:
    """Keep polygons as arrays: lists of numbers would take 20 times the memory."""
    polygons = entry.get("segmentation")
    if isinstance(polygons, list):
        entry["segmentation"] = [_numbers(polygon) for polygon in polygons]
    return entry


def _without_outline(entry: dict[str, Any]) -> dict[str, Any]:
    entry.pop("segmentation", None)
    return entry


def _numbers(polygon: Any) -> Any:
    try:
        return np.asarray(polygon, dtype=np.float32)
    except (ValueError, TypeError, OverflowError):
        return None


def _is_image_entry(entry: Mapping[str, Any], problems: Problems) -> bool:
    name = entry.get("file_name")
    good = isinstance(entry.get("id"), int | str) and isinstance(name, str) and "\0" not in name
    if not good or not name:
        problems.add(f"image {entry.get('id')!r} needs an id and a file_name; it has {name!r}")
        return False
    return True


def _size(entry: Mapping[str, Any], name: str, root: Path, problems: Problems) -> tuple[int, int]:
    """Return the annotated (width, height), or that of the file if there is none."""
    width, height = entry.get("width"), entry.get("height")
    if width is None and height is None:
        try:
            return image_size(path_below(root, name))
        except ImageError as error:
            problems.add(str(error))
    elif _is_whole(width) and _is_whole(height) and width * height <= MAX_PIXELS:
        return int(width), int(height)
    else:
        problems.add(f"image {name} has the size {width!r}×{height!r}")
    return 1, 1


def _is_whole(number: Any) -> TypeGuard[int | float]:
    return is_number(number) and number >= 1 and float(number).is_integer()


def is_number(number: Any) -> TypeGuard[int | float]:
    """Return whether `number` is a finite int or float."""
    return type(number) in (int, float) and math.isfinite(number)


def _image_root(file: Path, split: str, paths: list[str]) -> tuple[Path, list[str]]:
    """Return the folder that holds most of the images, among the usual ones for COCO, and paths.

    Where none of `paths` is there, as those of Label Studio's server, the names alone are tried.
    """
    year = file.stem.removeprefix("instances_")
    here, above = file.parent, file.parent.parent
    base = above if here.name == "annotations" else here
    folders = [base / year, base / "images" / year, base / "images" / split, base / split]
    folders += [base / "images", base / "data", base, here]
    folders += [base / name for name in subfolders(base) if split_of(name) == split]
    there = [folder for folder in dict.fromkeys(folders) if folder.is_dir()]
    held = {folder: len(paths) - len(absent(folder, paths)) for folder in there}
    best = max(there, key=held.__getitem__)
    names = [path.rpartition("/")[2] for path in paths]
    if paths and not held[best] and names != paths and not repeated(names):
        return _image_root(file, split, names)
    if paths and not held[best]:
        places = ", ".join(str(folder) for folder in there)
        raise DataError(f"{file}: none of its {len(paths)} images ({paths[0]}, …) is in {places}")
    return best, paths


def _categories(entries: Iterable[dict[str, Any]], problems: Problems) -> dict[Any, str]:
    """Return {id: name}."""
    names: dict[Any, str] = {}
    for entry in entries:
        key, name = entry.get("id"), entry.get("name")
        if not isinstance(key, int | str) or not isinstance(name, str) or not name:
            problems.add(f"category {key!r} needs an id and a name; it has {name!r}")
        elif key in names:
            problems.add(f"category id {key} comes twice")
        else:
            if entry.get("supercategory") == name in names.values():  # Roboflow's, above its class
                names = {other: title for other, title in names.items() if title != name}
            names[key] = "background" if name == "_background_" else name  # labelme's
    return names
