"""Helpers of the readers: one error for all problems, checks of files and classes, splits."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meshuffle.data.base import Data, ImageSource, View, shortened, split_off_val
from meshuffle.data.image import EXTENSIONS, IS_POINTER, POINTER
from meshuffle.errors import DataError, did_you_mean
from meshuffle.files import expanded

Need = Sequence[str]
"""The splits that must exist; see `open_data`."""
NEED: Need = ("train", "val")
VAL_FRACTION = 0.2
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
_SHOWN = 3


class Problems:
    """Collects bad entries, for one error that shows the first few.

    `notes` are harmless corrections and omissions, for `Data.ignored`; `notices` are for
    `Data.notices`. `strict`: an object without area is an error as well.
    """

    def __init__(self, where: str, *, strict: bool = False) -> None:
        self.where = where
        self.strict = strict
        self.notes: list[str] = []
        self.notices: list[str] = []
        self._wrong: list[str] = []
        self._empty: list[str] = []

    def add(self, entry: str) -> None:
        """Remember one bad entry, as text: its name and what is wrong with it."""
        self._wrong.append(entry)

    def add_empty(self, entry: str) -> None:
        """Remember an object without any area; see `raise_any`."""
        self._empty.append(entry)

    def raise_any(self) -> None:
        """Raise `DataError` if there are bad entries; note each object without area.

        COCO's own train2017 has two of them among 860,001.
        """
        if self.strict:
            self._wrong += self._empty
        else:
            self.notes += [f"{entry}: left out" for entry in self._empty]
        self._empty = []
        if self._wrong:
            shown = "; ".join(self._wrong[:_SHOWN])
            more = len(self._wrong) - _SHOWN
            text = f"{self.where}: {shown}" + (f"; and {more} more such entries" * (more > 0))
            raise DataError(" ".join(text.split()))


def split_place(path: str) -> tuple[str, str]:
    """Return the path and `?` with what follows; all is the path where that exists."""
    head, mark, tail = path.rpartition("?")
    return (head, mark + tail) if mark and not expanded(path).exists() else (path, "")


def split_options(path: str, known: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Return the path and the options of `PATH?name=value&name=value`.

    >>> split_options("camvid?void=11", ["void"])
    ('camvid', {'void': '11'})
    """
    head, tail = split_place(path)
    if not tail:
        return path, {}
    options: dict[str, str] = {}
    for part in tail[1:].split("&"):
        name, equals, value = part.partition("=")
        if name not in known or not equals or not value:
            hint = did_you_mean(name, known)
            names = " or ".join(f"?{name}=…" for name in known)
            raise DataError(f"{path}: {part!r} is no option{hint}; known: {names}")
        options[name] = value
    return head, options


def existing_file(path: str | Path) -> Path:
    """Return `path` with `~` expanded; raise `DataError` with a suggestion if it is no file."""
    file = expanded(path)
    if file.is_file():
        return file
    if file.is_dir():
        raise DataError(f"{file} is a folder; a file is needed here")
    siblings = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
    raise DataError(f"no such file: {file}{did_you_mean(file.name, siblings)}")


def read_text(file: Path) -> str:
    """Return the content of a file of UTF-8, or of UTF-16 with its byte order mark."""
    return decoded(file)[0]


def decoded(file: Path, fallback: str | None = None) -> tuple[str, str]:
    """Return the content of a file and its encoding, which is `fallback` if it is not Unicode."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    if content.startswith(POINTER):
        raise DataError(f"{file}: {IS_POINTER}")
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if content.startswith((b"PAR1", b"PK\x03\x04")):  # Parquet, Excel
        raise DataError(f"{file} is binary, not text: save it as CSV; hf:FOLDER reads Parquet")
    try:
        if wide:
            return content.decode("utf-16"), "UTF-16"
        return content.decode("utf-8-sig"), "UTF-8"
    except UnicodeDecodeError as error:
        if fallback is None or wide:
            name = "UTF-16" if wide else "UTF-8"
            raise DataError(
                f"{file}: byte {error.start} is not {name} text; save it as UTF-8"
            ) from error
        return content.decode(fallback, "backslashreplace"), fallback


def absent(root: Path, paths: Iterable[str]) -> list[str]:
    """Return those of `paths`, relative to `root`, that are no files; lists each folder once."""
    listings: dict[str, frozenset[str]] = {}
    missing = []
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in listings:
            listings[folder] = _file_names(root / folder)
        if name not in listings[folder]:
            missing.append(path)
    return missing


def with_slashes(root: Path, paths: Sequence[str]) -> list[str]:
    """Return `paths` with / for Windows' backslashes, where the path as written is no file."""
    gone = set(absent(root, [path for path in paths if "\\" in path]))
    return [path.replace("\\", "/") if path in gone else path for path in paths]


def _file_names(folder: Path) -> frozenset[str]:
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries if not entry.is_dir())
    except OSError:  # a folder that does not exist holds no file
        return frozenset()


def image_names(folder: Path) -> list[str]:
    """Return the names of the image files directly in `folder`, sorted by their bytes."""
    names = (name for name in _file_names(folder) if not name.startswith("."))
    return sorted((name for name in names if suffix(name) in EXTENSIONS), key=os.fsencode)


def suffix(name: str) -> str:
    """Return the extension in lower case, `.jpg`, or nothing."""
    return os.path.splitext(name)[1].lower()  # noqa: PTH122


def stem(path: str) -> str:
    """Return the last part of `path` without its extension."""
    return os.path.splitext(path.rpartition("/")[2])[0]  # noqa: PTH122


def repeated(names: Iterable[str]) -> list[str]:
    """Return the names that occur more than once, each of them once."""
    seen: set[str] = set()
    twice: dict[str, None] = {}
    for name in names:
        if name in seen:
            twice[name] = None
        seen.add(name)
    return list(twice)


def split_of(name: str) -> str | None:
    """Return train, val or test for a file or folder named after a split, such as val2017.

    >>> split_of("instances_val2017"), split_of("valid"), split_of("trainval")
    ('val', 'val', None)
    """
    words = re.findall(r"[a-z]+", name.lower())
    found = {SPLITS[word] for word in words if word in SPLITS}
    return found.pop() if len(found) == 1 else None


def only_split(need: Sequence[str]) -> str:
    """Return the split that an unsplit data set is: train, or test if only that is needed."""
    return "test" if tuple(need) == ("test",) else "train"


def check_names(where: str, classes: Sequence[str]) -> None:
    """Raise `DataError` for class names that are empty or occur twice."""
    if "" in classes:
        raise DataError(f"{where}: class {list(classes).index('')} has no name")
    if twice := repeated(classes):
        raise DataError(f"{where}: class names that come twice: {shortened(twice)}")


def _check_two(where: str, classes: Sequence[str]) -> None:
    if len(classes) == 1:
        raise DataError(
            f"{where}: only one class, {classes[0]!r}; a classifier needs two or more: "
            "add images of something else"
        )


def check_filled(where: str, labels: NDArray[np.int64], classes: Sequence[str], entry: str) -> None:
    """Raise `DataError` for classes without any `entry` (image, row, object) in train.

    `labels`: of train's entries, int64 [N].
    """
    if empty := lacking(labels, classes):
        raise DataError(
            f"{where}: {len(empty)} classes without any {entry} in train: "
            f"{shortened(empty)}; remove them, or add images"
        )


def lacking(labels: NDArray[np.int64], classes: Sequence[str]) -> list[str]:
    """Return the classes that do not occur in `labels`, int64 [N], where −1 is no class."""
    counts = np.bincount(labels[labels >= 0], minlength=len(classes))
    return [name for name, count in zip(classes, counts, strict=True) if not count]


def assemble(
    path: str,
    task: str,
    classes: Sequence[str],
    splits: Mapping[str, ImageSource],
    problems: Problems,
    *,
    seed: int,
    need: Need,
    layout: str = "",
    shown: NDArray[np.bool_] | None = None,
) -> Data:
    """Return the data set; if val is missing, 20 % of train, chosen by `seed`, become val.

    With `need=()` nothing is split. `problems` holds the notes and notices. `shown`: which classes
    train's images show, bool [N, C], of a task that needs each in train. Raises `DataError` if a
    needed split has no image, one that is there is empty, or train lacks a class.
    """
    if empty := [key for key in ("val", "test") if key in splits and not len(splits[key])]:
        cut = "; without it a fifth of train becomes val" * (empty[0] == "val")
        raise DataError(
            f"{path}: its {empty[0]} holds no image for {task}: add images, or remove it{cut}"
        )
    found = {key: source for key, source in splits.items() if len(source)}
    if need and "val" not in found and "train" in found:
        found |= split_off_val(found["train"], VAL_FRACTION, seed)
    for split in need:
        if split not in found or not len(found[split]):
            has = ", ".join(f"{key} ({len(source)})" for key, source in found.items())
            raise DataError(f"{path} has no {split} images; it has {has or 'no image'}")
    if "train" in need and task == "classify":
        _check_two(path, classes)
    if "train" in need and shown is not None:
        train = found["train"]
        kept = shown[train.indices] if isinstance(train, View) else shown
        check_filled(path, kept.nonzero()[1], classes, "pixel")
    if not found:
        raise DataError(f"{path} holds no image")
    data = Data(path, tuple(classes), found, task=task, layout=layout)
    return replace(data, ignored=tuple(problems.notes), notices=tuple(problems.notices))
