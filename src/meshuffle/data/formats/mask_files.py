"""Images and their masks: the layouts that tools write, and the label ids that masks hold."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meshuffle.data.annotated import NUM_IDS, Colours, bounded, path_below, read_ids
from meshuffle.data.entries import (
    SPLITS,
    Problems,
    check_names,
    image_names,
    only_split,
    read_text,
    repeated,
    stem,
    suffix,
)
from meshuffle.data.paired import (
    IMAGES,
    Folders,
    in_words,
    is_shared,
    paired_folders,
    split_folders,
)
from meshuffle.data.scan import contents, find_folder, subfolders
from meshuffle.errors import DataError, ImageError

_MASKS = ("masks", "mask", "labels", "label", "annotations", "segmentations")
_FOLDER_ENDS = ("annot", "_annot", "_masks", "_mask", "_labels", "_label", "masks", "labels")
_ENDS = ("_mask", "_label", "-mask", "-label", "_seg", "_gt")
_EXTENSIONS = (".tif", ".tiff", ".gif", ".bmp", ".png")  # the last one wins
_NAMED = re.compile(r"(?P<name>[^:]+):(?P<colour>[\d, ]*):.*")
_COLOUR = re.compile(r"\s*(?P<colour>(\d+\s+){3})(?P<name>\S.*)")
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
    found: dict[str, Pairs] = {}
    for split, (images, masks) in folders.items():
        if split == "test" and split not in need and not _mask_names(root / masks):
            problems.notes.append(f"{images}/: no masks: left out")
        else:
            found[split or only_split(need)] = _pairs(root, images, masks, problems)
    return layout, found


def _layout(root: Path) -> tuple[str, Mapping[str, Folders]]:
    """Return the layout in words, and the folders by split, "" if there is only one."""
    layout, found = paired_folders(root, IMAGES, _MASKS)
    if found:
        return layout, found
    names = split_folders(root)
    others = {name: find_folder(root, [name + end for end in _FOLDER_ENDS]) for name in names}
    if beside := {SPLITS[name.lower()]: (name, other) for name, other in others.items() if other}:
        return in_words(next(iter(beside.values()))), beside
    for folder in (*names, ""):
        if keys := [key for key in _mask_names(root / folder) if _image_stem(key) != key]:
            end = keys[0].removeprefix(_image_stem(keys[0]))
            same = {SPLITS[name.lower()]: (name, name) for name in names if folder}
            return f"x.jpg with x{end}.png", same or {"": ("", "")}
    alike = {SPLITS.get(n.lower(), ""): pair for n in (*names, "") if (pair := _alike(root, n))}
    if alike:
        return in_words(next(iter(alike.values()))), alike
    raise DataError(
        f"{root}: images with masks are not recognised: {_LOOKED_FOR}; saw {contents(root)}"
    )


def _alike(root: Path, folder: str) -> Folders | None:
    """Return the two folders in `folder` if one is called as usual and the other has its names."""
    inner = [name for name in subfolders(root / folder) if image_names(root / folder / name)]
    image, mask = (find_folder(root / folder, names) for names in (IMAGES, _MASKS))
    if len(inner) != 2 or not {image, mask} & {*inner} or (image and mask):
        return None
    (other,) = {*inner} - {image, mask}
    pair = path_below(folder, image or other), path_below(folder, mask or other)
    stems = {stem(name) for name in image_names(root / pair[0])}
    return pair if stems <= {_image_stem(key) for key in _mask_names(root / pair[1])} else None


def masks_beside(files: Iterable[str]) -> list[str]:
    """Return the stems of those files that are called as masks of others among them, sorted."""
    keys = {stem(file) for file in files}
    return sorted(key for key in keys if key.endswith(_ENDS) and _image_stem(key) in keys)


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
    if not is_shared((image_folder, mask_folder)):
        problems.notes += [f"{behind}{name}: no image" for name in masks.values()]
    return Pairs([before + name for name in chosen], [behind + name for name in chosen.values()])


def _no_mask(root: Path, image: str, mask: str) -> str:
    lossy = next((mask + end for end in _LOSSY if (root / f"{mask}{end}").exists()), None)
    if lossy and lossy != image:
        return f"{lossy} is a JPEG, which changes label ids; save it as PNG"
    return f"{image} has no mask {mask}.png"


def read_colours(file: Path) -> tuple[list[str], Colours | None]:
    """Return the names of the classes, by id, and their colours, from the file that a tool writes.

    labelmap.txt has `name:r,g,b:…` in each line, CamVid's label_colors.txt `r g b name`. Without
    any colour there are none.
    """
    names: list[str] = []
    colours: dict[tuple[int, int, int], int] = {}
    for line in read_text(file).splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        found = _COLOUR.fullmatch(line) or _NAMED.fullmatch(line)
        if found is None:
            raise DataError(f"{file}: {line!r} is neither `name:r,g,b::` nor `r g b name`")
        numbers = re.findall(r"\d+", found["colour"])
        if len(numbers) == 3:
            colours[int(numbers[0]), int(numbers[1]), int(numbers[2])] = len(names)
        names.append(found["name"].strip())
    if colours and len(colours) < len(names):
        raise DataError(f"{file}: {len(names)} classes have {len(colours)} different colours")
    check_names(str(file), names)
    return names, colours or None


def count_ids(
    root: Path,
    masks: Sequence[str],
    enough: Collection[int] = (),
    colours: Colours | None = None,
) -> NDArray[np.int64]:
    """Return how many pixels of each id every mask has, int64 [N, 257]; broken masks none.

    The last column counts the ids beyond 255. `enough`: stop, with less than N rows, when each of
    these ids has been seen; () reads all masks.
    """
    counts = np.zeros((len(masks), NUM_IDS + 1), dtype=np.int64)

    def count(i: int) -> None:
        try:
            ids = read_ids(path_below(root, masks[i]), colours)
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
