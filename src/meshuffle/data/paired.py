"""Layouts of two folders, one of images and one of what belongs to each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from meshuffle.data.annotated import path_below
from meshuffle.data.entries import SPLITS, repeated
from meshuffle.data.scan import find_folder, subfolders
from meshuffle.errors import DataError

IMAGES = ("images", "image", "imgs", "img", "data")  # the last one is FiftyOne's
Folders = tuple[str, str]
"""The folder of the images and that of the others, relative to the root."""


def split_folders(folder: Path) -> list[str]:
    """Return the folders in `folder` that are named after a split, in any case.

    Raises `DataError` if two of them are the same split.
    """
    names = [name for name in subfolders(folder) if name.lower() in SPLITS]
    for split in repeated(SPLITS[name.lower()] for name in names):
        same = " and ".join(f"{name}/" for name in names if SPLITS[name.lower()] == split)
        raise DataError(f"{folder} has two folders for {split}, {same}: keep one of them")
    return names


def paired_folders(
    root: Path, images: Sequence[str], others: Sequence[str]
) -> tuple[str, Mapping[str, Folders]]:
    """Return the layout in words, and the folders by split; the split is "" if there is only one.

    Known are images/ with others/, each perhaps with train/ and val/ inside, and train/images/
    with train/others/; others/ may be annotations/xmls/, as in the Oxford pets. The names in
    `images` and `others` match in any case. Where there are none, the answer is ("", {}).
    """
    if (pair := _pair(root, "", images, others)) is not None:
        inner = {
            SPLITS[name.lower()]: (f"{pair[0]}/{name}", _like(root, pair[1], name))
            for name in split_folders(root / pair[0])
        }
        return in_words(pair), inner or {"": pair}
    found: dict[str, Folders] = {}
    for name in split_folders(root):
        if (pair := _pair(root, name, images, others)) is not None:
            found[SPLITS[name.lower()]] = pair
    return in_words(next(iter(found.values()))) if found else "", found


def is_shared(pair: Folders) -> bool:
    """Return whether the second folder holds what belongs to the images of all splits."""
    return pair[0].count("/") > pair[1].count("/")


def in_words(pair: Folders) -> str:
    """Return for example `images/ with masks/`."""
    return f"{pair[0]}/ with {pair[1]}/"


def _pair(root: Path, folder: str, images: Sequence[str], others: Sequence[str]) -> Folders | None:
    image, other = (find_folder(root / folder, names) for names in (images, others))
    if not image or not other:
        return None
    if inner := find_folder(root / folder / other, others):
        other = f"{other}/{inner}"
    return path_below(folder, image), path_below(folder, other)


def _like(root: Path, other: str, name: str) -> str:
    """Return the folder of this split in `other`, which may hold the files of all splits itself.

    A folder of texts alone is YOLO's, and none of them.
    """
    inner = find_folder(root / other, [name])
    is_yolo = inner and {file.suffix for file in (root / other / inner).iterdir()} == {".txt"}
    return f"{other}/{inner}" if inner and not is_yolo else other
