"""Data sets that are folders: ImageFolder's layout, one flat folder of classes, ImageNet."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from meshuffle.data.annotated import AnnotatedSource, LabelTargets
from meshuffle.data.base import Data, shortened
from meshuffle.data.entries import SPLITS, Problems, assemble, check_filled, only_split, split_of
from meshuffle.data.formats.mask_files import masks_beside
from meshuffle.data.scan import (
    ClassFolders,
    PathTable,
    contents,
    count_images,
    existing_folder,
    scan_classes,
    subfolders,
)
from meshuffle.errors import DataError

_WANTED = "looked for one folder per class, or train/ and val/ with one folder per class in each"
_ELSEWHERE = (
    "other layouts need a format: csv:FILE, masks:PATH, coco:PATH, voc:PATH, yolo:PATH or hf:PATH"
)
_NO_CLASSES = {
    *SPLITS,
    *("image", "images", "img", "imgs", "jpegimages", "mask", "masks", "label", "labels"),
    *("data", "annotation", "annotations", "segmentationclass", "segmentationobject"),
}


def open_folder(path: str, *, seed: int = 0, need: Sequence[str] = ("train", "val")) -> Data:
    """Open a folder with train/, val|valid|validation/, test/, or one flat folder of classes.

    Where val is missing, a stratified 20 % of train, chosen by `seed`, takes its place; test
    never does, so that it selects nothing. A flat folder is split likewise, except where
    `need` is only `("test",)`: then all of it is the test split. With `need=()` nothing is
    required and nothing is split: a view for `check`. Raises `DataError`.
    """
    root = existing_folder(path)
    folders = _split_folders(root)
    scans = {split: scan_classes(root, name) for split, name in folders.items()}
    if not folders:
        scans = {only_split(need): scan_classes(root)}
    _check_content(root, scans)
    classes = _classes(root, scans, need)
    splits = {split: _source(root, scan, classes) for split, scan in scans.items()}
    if "train" in need and "train" in splits:
        check_filled(str(root), splits["train"].labels, classes, "image")
    problems = Problems(str(root))
    used = {name.partition("/")[0] for name in folders.values()}
    for name in subfolders(root) if "train" in folders else ():
        is_split = SPLITS.get(name.lower(), "train") not in folders
        what = "holds images but no class folders" if is_split else "is beside the splits"
        if is_split and SPLITS[name.lower()] == "val":
            raise DataError(f"{root}: {name}/ {what}, as train has them: sort or move them")
        if name not in used:
            problems.notes.append(f"{name}/ {what}: left out")
    problems.notes += [name for scan in scans.values() for name in scan.ignored]
    inner = [subfolders(root / name) for name in (() if folders else classes)]
    if len(inner) > 1 and len(inner[0]) > 1 and all(names == inner[0] for names in inner):
        problems.notices.append(
            f"all classes hold {shortened(inner[0], 3)}: if those are the classes, give one alone"
        )
    layout = f"folder: {'/, '.join(folders.values())}/ with" if folders else "folder:"
    layout = f"{layout} one folder per class"
    return assemble(
        path, "classify", classes, splits, problems, seed=seed, need=need, layout=layout
    )


def open_imagenet(path: str, *, seed: int = 0, need: Sequence[str] = ("train", "val")) -> Data:
    """Open ImageNet: train/ and val/ with one folder per synset; class names are synset ids.

    `Data.titles` holds readable names where `LOC_synset_mapping.txt` lies in the folder.
    Raises `DataError`, also when val/ is still the flat folder that the archive unpacks to.
    """
    root = existing_folder(path)
    if (root / "val").is_dir() and not subfolders(root / "val") and count_images(root / "val"):
        raise DataError(
            f"{root / 'val'} holds images but no synset folders: sort them into folders such "
            "as val/n01440764/ first (the valprep.sh script of the PyTorch examples does it)"
        )
    data = open_folder(path, seed=seed, need=need)
    return replace(data, titles=_synset_titles(root / "LOC_synset_mapping.txt"))


def _synset_titles(file: Path) -> dict[str, str]:
    if not file.is_file():
        return {}
    rows = (line.split(maxsplit=1) for line in file.read_text(encoding="utf-8").splitlines())
    return {row[0]: row[1] for row in rows if len(row) == 2}


def _split_folders(root: Path) -> dict[str, str]:
    """Return {split: folder}; a folder `train` that holds images itself is a class.

    Names such as training_set, or Kaggle's seg_train/seg_train, are splits if they hold folders
    alone and one of them is train.
    """
    found, like = dict[str, str](), dict[str, str]()
    for name in subfolders(root):
        inner, has_images = subfolders(root / name), count_images(root / name) > 0
        if has_images and not inner:
            continue
        exact, split = name.lower() in SPLITS, split_of(name)
        if split is None or not (exact or (inner and not has_images)):
            continue
        of_kind = found if exact else like
        if split in of_kind:
            raise DataError(f"{root} has both {of_kind[split]}/ and {name}/: keep one of them")
        again = not has_images and len(inner) == 1 and split_of(inner[0]) == split
        of_kind[split] = f"{name}/{inner[0]}" if again else name
    return like | found if "train" in like | found else found


def _check_content(root: Path, scans: Mapping[str, ClassFolders]) -> None:
    if not any(scan.files for scan in scans.values()):
        loose = count_images(root)
        what = f"{loose} images but no class folders" if loose else "no class folders"
        raise DataError(f"{root} holds {what}; {_WANTED}; saw {contents(root)}; {_ELSEWHERE}")
    if not any(any(scan.files.values()) for scan in scans.values()):
        count = sum(len(scan.files) for scan in scans.values())
        raise DataError(
            f"{root}: no image file in {count} class folders; {_WANTED}; saw {contents(root)}"
        )
    filled = sorted(
        {name for scan in scans.values() for name, files in scan.files.items() if files}
    )
    for name in filled:
        inner = _without_outer(root / name)
        below = subfolders(inner) if inner.is_dir() and not count_images(inner) else []
        classes = {name.lower() for name in below} - set(SPLITS)
        if (below and _split_folders(inner)) or (len(filled) == 1 and len(classes) > 1):
            raise DataError(f"{root}: {name}/ is no class, it holds folders; did you mean {inner}?")
    for name, files in (item for scan in scans.values() for item in scan.files.items()):
        masks = masks_beside(map(os.fsdecode, files))
        if 4 * len(masks) > len(files):
            raise DataError(
                f"{root}: {name}/ is no class: {len(masks)} of its {len(files)} images are masks "
                f"of others ({masks[0]}); use masks:{root} with --task segment"
            )
    if {name.lower() for name in filled} <= _NO_CLASSES:
        names = " and ".join(f"{name}/" for name in filled)
        is_split = {name.lower() for name in filled} <= set(SPLITS)
        no_class = "is no class" if len(filled) == 1 else "are no classes"
        what = "contain no class folders" if is_split else no_class
        raise DataError(f"{root}: {names} {what}; {_WANTED}; {_ELSEWHERE}")


def _without_outer(folder: Path) -> Path:
    """Return the first folder, from `folder` on, that holds more than one other, or an image."""
    while folder.is_dir() and len(names := subfolders(folder)) == 1 and not count_images(folder):
        folder /= names[0]
    return folder


def _classes(root: Path, scans: Mapping[str, ClassFolders], need: Sequence[str]) -> tuple[str, ...]:
    """Train's classes where there are any; all classes, sorted, for `check`."""
    union = sorted({name for scan in scans.values() for name in scan.files}, key=os.fsencode)
    if not need or "train" not in scans:
        return tuple(union)
    train = scans["train"].classes
    for split in set(need) & set(scans):
        filled = {name for name, files in scans[split].files.items() if files}
        if extra := sorted(filled - set(train)):
            raise DataError(
                f"{root}: {split} has {len(extra)} classes that train lacks: {shortened(extra)}; "
                f"train has {shortened(train)}"
            )
    return tuple(train)


def _source(root: Path, scan: ClassFolders, classes: tuple[str, ...]) -> AnnotatedSource:
    pairs = [(i, path) for i, name in enumerate(classes) for path in scan.files.get(name, ())]
    labels = np.array([label for label, _ in pairs], dtype=np.int64)
    paths = PathTable([path for _, path in pairs])
    return AnnotatedSource(root, paths, labels, classes, LabelTargets(labels))
