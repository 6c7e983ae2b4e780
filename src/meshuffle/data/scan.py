"""List the image files of a folder of classes, the same on every machine.

Folders and files are visited in the order of their names' bytes; symbolic links are
followed, but a link to a folder that is already open is not entered again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from meshuffle.data.base import shortened
from meshuffle.data.image import EXTENSIONS
from meshuffle.errors import DataError, did_you_mean
from meshuffle.files import expanded


@dataclass
class ClassFolders:
    """One folder of classes; paths are bytes, relative to the data set's root.

    Attributes:
        files: image files of each class, sorted.
        ignored: files left out because they are hidden, have no extension of an image, or lie
            beside the class folders.
    """

    files: dict[str, list[bytes]] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)

    @property
    def classes(self) -> list[str]:
        """All class names, sorted, including those of empty folders."""
        return sorted(self.files, key=os.fsencode)


class PathTable:
    """Many paths in one block of bytes: 1.3 million take 60 MB, which forks share."""

    def __init__(self, paths: list[bytes]) -> None:
        self._text = b"".join(paths)
        self._ends = np.cumsum([0, *map(len, paths)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return os.fsdecode(self._text[self._ends[index] : self._ends[index + 1]])


def existing_folder(path: str | Path) -> Path:
    """Return `path` with `~` expanded; raise `DataError` with a suggestion if it is no folder."""
    folder = expanded(path)
    try:
        if folder.is_dir():
            return folder
        if folder.exists():
            raise DataError(f"{folder} is a file; a folder is needed here")
        siblings = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
    except PermissionError as error:
        raise _unreadable(folder, error) from error
    raise DataError(f"no such folder: {folder}{did_you_mean(folder.name, siblings)}")


def subfolders(folder: Path) -> list[str]:
    """Return the names of the folders in `folder` that are not hidden, sorted."""
    return [entry.name for entry in _entries(folder) if entry.is_dir() and not _hidden(entry)]


def find_folder(root: Path, names: Sequence[str]) -> str | None:
    """Return the folder in `root` that has one of `names`, in any case; the first one wins."""
    there = {name.lower(): name for name in subfolders(root)} if root.is_dir() else {}
    known = (name for name in names if name.lower() in there)
    return next((n if n in there.values() else there[n.lower()] for n in known), None)


def contents(folder: Path) -> str:
    """Return what is in `folder` for a message: `a/, b/, c.txt and 3 more`, or `nothing`."""
    names = [entry.name + "/" * entry.is_dir() for entry in _entries(folder) if not _hidden(entry)]
    return shortened(sorted(names, key=lambda name: not name.endswith("/")), 8) or "nothing"


def scan_classes(root: Path, relative: str = "") -> ClassFolders:
    """List the class folders in `root/relative`; paths are relative to `root`."""
    found = ClassFolders()
    for entry in _entries(root / relative):
        path = os.fsencode(os.path.join(relative, entry.name))  # noqa: PTH118
        if entry.is_dir() and not _hidden(entry):
            images: list[bytes] = []
            for file in _walk(root, path, frozenset()):
                if _is_image(file):
                    images.append(file)
                else:
                    found.ignored.append(os.fsdecode(file))
            found.files[entry.name] = images
        elif not entry.is_dir():
            found.ignored.append(os.fsdecode(path))
    return found


def count_images(folder: Path) -> int:
    """Return how many image files lie directly in `folder`."""
    return sum(_is_image(os.fsencode(entry.name)) for entry in _entries(folder))


def image_paths(folder: Path) -> list[str]:
    """Return the image files below `folder`, relative to it, as every reader lists them."""
    return [os.fsdecode(file) for file in _walk(folder, b"", frozenset()) if _is_image(file)]


def image_files(paths: Sequence[Path]) -> list[Path]:
    """Return the files among `paths`, and the images below the folders among them.

    Raises `DataError` if a path does not exist, or a folder holds no image.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            if not (inside := image_paths(path)):
                known = ", ".join(sorted(EXTENSIONS))
                raise DataError(f"{path}: no image in this folder ({known}); saw {contents(path)}")
            found += [path / name for name in inside]
        elif path.exists():
            found.append(path)
        else:
            raise DataError(f"{path}: no such file or folder")
    return found


def _walk(root: Path, relative: bytes, above: frozenset[tuple[int, int]]) -> Iterator[bytes]:
    folder = root / os.fsdecode(relative)
    here = folder.stat()
    if (identity := (here.st_dev, here.st_ino)) in above:
        return
    for entry in _entries(folder):
        path = os.path.join(relative, os.fsencode(entry.name))  # noqa: PTH118
        if not entry.is_dir():
            yield path
        elif not _hidden(entry):
            yield from _walk(root, path, above | {identity})


def _is_image(file: bytes) -> bool:
    name = os.path.basename(file)  # noqa: PTH119
    extension = os.path.splitext(name)[1].lower()  # noqa: PTH122
    return not name.startswith(b".") and os.fsdecode(extension) in EXTENSIONS


def _hidden(entry: os.DirEntry[str]) -> bool:
    return entry.name.startswith(".")


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: os.fsencode(entry.name))
    except OSError as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: OSError) -> DataError:
    return DataError(f"{folder} cannot be read: {error.strerror}")
