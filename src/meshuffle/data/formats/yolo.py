"""YOLO: data.yaml, images/ and labels/ with one text of normalised boxes per image.

(docs.ultralytics.com/datasets/detect)
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from meshuffle.data.base import Data, shortened
from meshuffle.data.entries import (
    NEED,
    SPLITS,
    Need,
    Problems,
    absent,
    assemble,
    check_names,
    existing_file,
    read_text,
    repeated,
    split_of,
    suffix,
    with_slashes,
)
from meshuffle.data.objects import BoxList, Objects, check_classes, object_source
from meshuffle.data.paired import split_folders
from meshuffle.data.scan import contents, find_folder, image_paths
from meshuffle.errors import DataError, did_you_mean
from meshuffle.files import expanded

_NAMES = "classes.txt"
_SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


def open_yolo(
    path: str, *, task: str = "classify", seed: int = 0, need: Need = NEED, strict: bool = False
) -> Data:
    """Open a data.yaml, or the folder that it lies in, or classes.txt with images/ and labels/.

    Also the obj.data of Darknet and CVAT, or a .data of another name; and a YAML that names no
    folder, beside images/.

    The YAML holds `names` (a list, or {0: name, …}) and train, val, test: folders of images,
    or texts that list them, or lists of these, relative to `path` where that is given, else
    to the YAML. The boxes of images/a/b.jpg are in labels/a/b.txt, one `class cx cy w h` a
    line, each a share of the image; of an outline `class x y x y …` the box is taken. An
    image without that file has no objects. Where val is missing, or is train again, 20 % of
    train chosen by `seed` become val. A folder that the YAML names and that does not exist is an
    error for the splits in `need`; other splits are left out.

    classify takes the class of the largest object, multilabel all of them. Boxes that reach
    out of the image are cut, and those without area are left out; `Data.ignored` names each.
    With `strict` the latter are errors. Raises `DataError`.
    """
    file = _main_file(expanded(path))
    read = _darknet if suffix(file.name) == ".data" else _parse
    tree = (_plain if file.name == _NAMES else read)(file)
    classes = _classes(file, tree)
    problems = Problems(str(file), strict=strict)
    folders = {split: _value(file, tree, names) for split, names in _SPLITS.items()}
    if folders["val"] and folders["val"] == folders["train"]:
        problems.notes.append("val is the same folder as train: part of train is set aside instead")
        folders["val"] = []
    if not any(folders.values()) and find_folder(file.parent, ["images"]):
        folders |= {split: [place] for split, place in _places(file).items()}
    if not any(folders.values()):
        raise DataError(f"{file}: names no folder of images: it needs train, val or test")
    resolved = {split: _resolved(file, tree, places) for split, places in folders.items() if places}
    objects = {}
    for split, found in resolved.items():
        gone = [place for place in found if not place.exists()]
        if gone and (split in need or not any(p.exists() for ps in resolved.values() for p in ps)):
            raise DataError(f"{file}: {split} names {gone[0]}, which does not exist")
        if gone:
            problems.notes.append(f"{split} names {gone[0]}, which does not exist: left out")
        else:
            objects[split] = _objects(file, found, classes, problems)
    _check_disjoint(objects, problems)
    problems.raise_any()
    check_classes(str(file), task, objects.get("train"), classes, problems.notes)
    splits = {
        split: object_source(task, one, classes, split, problems.notes)
        for split, one in objects.items()
    }
    layout = f"YOLO: {file.name} with {', '.join(next(filter(None, folders.values())))}"
    return assemble(path, task, classes, splits, problems, seed=seed, need=need, layout=layout)


def _main_file(path: Path) -> Path:
    """Return the YAML, or the list of names that labelImg and Label Studio write in its place."""
    if not path.is_dir():
        return existing_file(path)
    files = sorted([*path.glob("*.yaml"), *path.glob("*.yml")]) or sorted(path.glob("*.data"))
    named = [file for file in files if file.stem in ("data", "dataset")]
    if not files and (path / _NAMES).is_file() and find_folder(path, ["images"]):
        return path / _NAMES
    if len(named or files) != 1:
        names = shortened([file.name for file in files]) or "none"
        raise DataError(
            f"{path} is not recognised as YOLO: looked for one data.yaml, obj.data, or {_NAMES} "
            f"with images/; it holds {len(files)} YAML files ({names}); saw {contents(path)}"
        )
    return (named or files)[0]


def _plain(file: Path) -> Mapping[str, Any]:
    """Return what a data.yaml would say for classes.txt with images/ and labels/."""
    return {"names": _lines(file), **_places(file)}


def _darknet(file: Path) -> Mapping[str, Any]:
    """Return what a data.yaml would say for obj.data.

    Its paths begin where darknet ran, above the file, or with a data/ that CVAT does not write.
    """
    pairs = (line.partition("=") for line in _lines(file))
    tree = {key.strip(): value.strip() for key, _, value in pairs}
    names = Path(tree.get("names", "obj.names"))
    root = next((up for up in file.absolute().parents if (up / names).is_file()), None)
    names = root / names if root else file.parent / names.name
    places = {key: value for key, value in tree.items() if key in SPLITS}
    return {"path": root, "names": _lines(existing_file(names)), **places}


def _lines(file: Path) -> list[str]:
    return [line.strip() for line in read_text(file).splitlines() if line.strip()]


def _places(file: Path) -> dict[str, str]:
    """Return the folders of images beside a file that names none."""
    images = find_folder(file.parent, ["images"]) or "images"
    inner = split_folders(file.parent / images)
    return {SPLITS[name.lower()]: f"{images}/{name}" for name in inner} or {"train": images}


def _parse(file: Path) -> Mapping[str, Any]:
    try:
        yaml = import_module("yaml")
    except ImportError as error:
        raise DataError(f"{file}: reading YAML needs PyYAML: pip install pyyaml") from error
    try:
        tree = yaml.safe_load(read_text(file))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark is not None else ""
        raise DataError(f"{file}: {where}no YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(tree, dict) or "names" not in tree:
        hint = did_you_mean("names", map(str, tree)) if isinstance(tree, dict) else ""
        raise DataError(f"{file}: lacks `names`, the list of classes{hint}")
    return tree


def _classes(file: Path, tree: Mapping[str, Any]) -> tuple[str, ...]:
    names = tree["names"]
    if isinstance(names, dict):
        if set(names) != set(range(len(names))):
            raise DataError(f"{file}: the keys of names are not 0 … {len(names) - 1}")
        names = [names[i] for i in range(len(names))]
    if not isinstance(names, list) or not names:
        raise DataError(f"{file}: names is {names!r}; wanted: a list, or {{0: name, 1: name, …}}")
    if tree.get("nc", len(names)) != len(names):
        raise DataError(f"{file}: nc is {tree['nc']}, but there are {len(names)} names")
    check_names(str(file), [str(name) for name in names])
    return tuple(str(name) for name in names)


def _value(file: Path, tree: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Return the places of a split: none, one or several."""
    found: Any = next((tree[name] for name in names if tree.get(name)), [])
    places = found if isinstance(found, list) else [found]
    if not all(isinstance(place, str) for place in places):
        raise DataError(f"{file}: {names[0]} is {found!r}; wanted: a folder, or a list of folders")
    return places


def _resolved(file: Path, tree: Mapping[str, Any], places: Sequence[str]) -> list[Path]:
    """Return where `places` are: relative to `path`, else to the YAML; the latter if nowhere.

    A `path` of another machine, CVAT's data/, and Roboflow's `../train/images` or
    `Project-2/train/images` beside the YAML occur, and `C:\\all\\of\\a\\path\\images\\train`.
    """
    here = file.parent
    found = []
    for place in (name.replace("\\", "/") for name in places):
        tried = [here / str(tree.get("path") or ".") / place, here / place]
        parts = [part for part in place.split("/") if part]
        while parts[1:] and split_of(parts.pop(0)) is None:
            tried.append(here.joinpath(*parts))
        found.append(next((path for path in tried if path.exists()), tried[-1]))
    return found


def _images(found: Path) -> Iterator[str]:
    """Yield the paths of the images, from folders in the order of the names' bytes."""
    if found.is_dir():
        yield from (os.path.join(found, path) for path in image_paths(found))  # noqa: PTH118
    elif suffix(found.name) == ".txt":
        yield from _listed(found)
    else:
        raise DataError(f"{found} is neither a folder of images nor a text that lists them")


def _listed(found: Path) -> list[str]:
    """Return the images of a list; they are below it, without CVAT's data/, or below a parent."""
    lines = _lines(found)
    here, *above = found.absolute().parents
    bare = [line.replace("\\", "/").removeprefix("data/") for line in lines]
    for folder, names in [(here, lines), (here, bare), *((up, lines) for up in above)]:
        paths = with_slashes(folder, names)
        if len(absent(folder, paths)) < len(paths):
            return [str(folder / path) for path in paths]
    return [str(here / line) for line in lines]


def _label_file(image: str) -> str:
    """Return labels/….txt for the last images/… of a path; else the text beside the image."""
    found = re.fullmatch(r"(.*/)images(/.*)", f"/{image}", re.IGNORECASE | re.DOTALL)
    path = f"{found[1]}labels{found[2]}"[1:] if found else image
    return os.path.splitext(path)[0] + ".txt"  # noqa: PTH122


def _objects(
    file: Path, places: Sequence[Path], classes: Sequence[str], problems: Problems
) -> Objects:
    root = file.parent.absolute()
    paths = [os.path.relpath(path, root) for place in places for path in _images(place)]
    boxes, names, bare = BoxList(), [], 0
    for owner, path in enumerate(paths):
        labels = _label_file(path)
        if not (root / path).is_file():
            problems.add(f"{path}: no such image")
        elif not (root / labels).is_file():
            bare += 1
        else:
            for name, label, box in _boxes(root, labels, len(classes), problems):
                boxes.add(owner, label, box)
                names.append(name)
    if bare and bare == len(paths):
        raise DataError(f"{file}: none of {bare} images has its text of boxes, such as {labels}")
    if bare:
        problems.notes.append(f"{bare} images in {places[0]} have no text: without objects")
    return boxes.finish(root, paths, None, problems, names.__getitem__)


def _boxes(
    root: Path, path: str, num_classes: int, problems: Problems
) -> Iterator[tuple[str, int, Sequence[float]]]:
    """Yield (what to call it, class, box) for each line of a text that is right."""
    for number, line in enumerate(read_text(root / path).splitlines(), 1):
        try:
            if words := line.split():
                label, *box = _box(words, num_classes)
                yield f"{path}, line {number}", int(label), box
        except ValueError as error:
            problems.add(f"{path}, line {number}: {error}")


def _box(words: Sequence[str], num_classes: int) -> tuple[float, float, float, float, float]:
    """Return (class, left, top, right, bottom) of one line; raises `ValueError`."""
    try:
        label, *numbers = map(float, words)
    except ValueError:
        raise ValueError(f"{' '.join(words)!r} are not all numbers") from None
    if not label.is_integer() or not 0 <= label < num_classes:
        raise ValueError(f"class {words[0]} is unknown; there are 0 … {num_classes - 1}")
    if len(numbers) == 4:
        x, y, width, height = numbers
        return label, x - width / 2, y - height / 2, x + width / 2, y + height / 2
    if len(numbers) < 6 or len(numbers) % 2:
        raise ValueError(f"has {len(words)} numbers; wanted: class cx cy w h, or an outline")
    return label, min(numbers[::2]), min(numbers[1::2]), max(numbers[::2]), max(numbers[1::2])


def _check_disjoint(objects: Mapping[str, Objects], problems: Problems) -> None:
    for split, one in objects.items():
        for path in repeated(one.paths):
            problems.add(f"{path} comes twice in {split}")
    for path in repeated(path for one in objects.values() for path in dict.fromkeys(one.paths)):
        problems.add(f"{path} is in two splits")
