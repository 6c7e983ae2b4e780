"""Images and their masks: the layouts that tools write, and the label ids that masks hold."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meshuffle.data.annotated import NUM_IDS, bounded, path_below, read_ids
from meshuffle.data.entries import SPLITS, Problems, image_names, only_split, repeated, stem, suffix
from meshuffle.data.scan import contents, find_folder, subfolders
from meshuffle.errors import DataError, ImageError

_IMAGES = ("images", "image", "imgs", "img")
_MASKS = ("masks", "mask", "labels", "label", "annotations", "segmentations")
_FOLDER_ENDS = ("annot", "_annot", "_masks", "_mask", "_labels", "_label", "masks", "labels")
_ENDS = ("_mask", "_label", "-mask", "-label", "_seg", "_gt")
_EXTENSIONS = (".gif", ".bmp", ".png")  # the last one wins
_LOSSY = (".jpg", ".jpeg")
_CHUNK = 64
_LOOKED_FOR = (
    "looked for images/ with masks/, train/images/ with train/masks/, train/ with trainannot/ or "
    "train_masks/, and x.jpg with x_mask.png or x_label.png"
)


@dataclass(frozen=True)
class Pairs:
    """The images of a split and their masks, in the same order; paths below the root."""

    images: Sequence[str]
    masks: Sequence[str]


def find_pairs(root: Path, need: Sequence[str], problems: Problems) -> tuple[str, dict[str, Pairs]]:
    """Return which layout `root` has, in words, and the pairs of each split.

    A split that is not in `need` and has no mask at all is noted and left out. Raises `DataError`
    for an unknown layout; an image without a mask is added to `problems`.
    """
    layout, folders = _layout(root)
    for split in repeated(SPLITS[name.lower()] for name in folders if name):
        raise DataError(f"{root} has two folders for {split}: keep one of them")
    found: dict[str, Pairs] = {}
    for name, (images, masks) in folders.items():
        split = SPLITS[name.lower()] if name else only_split(need)
        if split not in need and split == "test" and not _mask_names(root / masks):
            problems.notes.append(f"{images}/: no masks: left out")
        else:
            found[split] = _pairs(root, images, masks, problems)
    return layout, found


def _layout(root: Path) -> tuple[str, Mapping[str, tuple[str, str]]]:
    """Return the layout in words, and {split's folder, or "": (folder of images, of masks)}."""
    splits = [name for name in subfolders(root) if name.lower() in SPLITS]
    if inner := _both(root, ""):
        names = [name for name in subfolders(root / inner[0]) if name.lower() in SPLITS]
        split_folders = {name: _inside(root, inner, name) for name in names}
        return f"{inner[0]}/ with {inner[1]}/", split_folders or {"": inner}
    if both := {name: pair for name in splits if (pair := _both(root, name))}:
        images, masks = next(iter(both.values()))
        return f"{images}/ with {masks}/", both
    wanted = {name: find_folder(root, [name + end for end in _FOLDER_ENDS]) for name in splits}
    if beside := {name: (name, other) for name, other in wanted.items() if other}:
        images, masks = next(iter(beside.values()))
        return f"{images}/ with {masks}/", beside
    for name in (*splits, ""):
        if found := [key for key in _mask_names(root / name) if _image_stem(key) != key]:
            mixed = {key: (key, key) for key in (splits if name else ("",))}
            return f"x.jpg with x{found[0].removeprefix(_image_stem(found[0]))}.png", mixed
    raise DataError(f"{root}: images with masks are not recognised: {_LOOKED_FOR}; saw "
                    f"{contents(root)}")  # fmt: skip


def _both(root: Path, folder: str) -> tuple[str, str] | None:
    """Return the folders of images and masks in `root/folder`, relative to `root`."""
    images, masks = (find_folder(root / folder, names) for names in (_IMAGES, _MASKS))
    if not images or not masks:
        return None
    return path_below(folder, images), path_below(folder, masks)


def _inside(root: Path, pair: tuple[str, str], split: str) -> tuple[str, str]:
    images, masks = pair
    return f"{images}/{split}", f"{masks}/{find_folder(root / masks, [split]) or split}"


def _image_stem(key: str) -> str:
    """Return the stem of the image that the mask of stem `key` belongs to."""
    return next((key.removesuffix(end) for end in _ENDS if key.endswith(end)), key)


def _mask_names(folder: Path) -> dict[str, str]:
    """Return {stem: name} of the files in `folder` that may be masks."""
    names = image_names(folder)
    return {stem(name): name for end in _EXTENSIONS for name in names if suffix(name) == end}


def _pairs(root: Path, image_folder: str, mask_folder: str, problems: Problems) -> Pairs:
    images, masks = image_names(root / image_folder), _mask_names(root / mask_folder)
    if image_folder == mask_folder:
        masks = {key: name for key, name in masks.items() if _image_stem(key) != key}
        images = [name for name in images if stem(name) not in masks]
    before, behind = (f"{name}/" if name else "" for name in (image_folder, mask_folder))
    for key in repeated(map(stem, images)):
        problems.add(f"{before}{key} comes twice, with two extensions")
    chosen: dict[str, str] = {}
    for name in images:
        keys = [key for end in ("", *_ENDS) if (key := stem(name) + end) in masks]
        if keys:
            chosen[name] = masks.pop(keys[0])
        else:
            problems.add(_no_mask(root, f"{before}{name}", f"{behind}{stem(name)}"))
    problems.notes += [f"{behind}{name}: no image" for name in masks.values()]
    return Pairs([before + name for name in chosen], [behind + name for name in chosen.values()])


def _no_mask(root: Path, image: str, mask: str) -> str:
    lossy = next((mask + end for end in _LOSSY if (root / f"{mask}{end}").exists()), None)
    if lossy and lossy != image:
        return f"{lossy} is a JPEG, which changes label ids; save it as PNG"
    return f"{image} has no mask {mask}.png"


def count_ids(root: Path, masks: Sequence[str], enough: Collection[int] = ()) -> NDArray[np.int64]:
    """Return how many pixels of each id every mask has, int64 [N, 257]; broken masks none.

    The last column counts the ids beyond 255. `enough`: stop, with less than N rows, when each of
    these ids has been seen; () reads all masks.
    """
    counts = np.zeros((len(masks), NUM_IDS + 1), dtype=np.int64)

    def count(i: int) -> None:
        try:
            ids = read_ids(path_below(root, masks[i]))
        except ImageError:  # it is reported when the mask is read
            return
        counts[i] = np.bincount(bounded(ids).ravel(), minlength=NUM_IDS + 1)

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for start in range(0, len(masks), _CHUNK):
            stop = min(start + _CHUNK, len(masks))
            list(pool.map(count, range(start, stop)))
            if len(enough) and counts[:stop, list(enough)].any(axis=0).all():
                return counts[:stop]
    return counts
