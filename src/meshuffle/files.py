"""Writing files that are either whole or not there: temporary name, fsync, rename."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from meshuffle.errors import InputError, MeshuffleError


def expanded(path: str | Path) -> Path:
    """Return `path` with the home folder in place of `~` or `~user`.

    Raises `InputError` for a user that this machine does not know.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = str(path).partition("/")[0]
        raise InputError(
            f"{path}: no home folder is known for {user}; write the whole path, or ./{path} for a "
            "folder of that name here"
        ) from None


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes `path`'s place, durably.

    After an error, or a kill at any instant, `path` holds what it held before.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replaced_files(path: Path) -> Iterator[Path]:
    """Yield a path of the same name in a temporary folder beside `path`.

    On success it, and whatever else was written to the folder, takes its place beside `path`, and
    the file itself comes last. After an error all is as it was before.
    """
    folder = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir(exist_ok=True)
        temporary = folder / path.name
        yield temporary
        files = sorted(folder.iterdir(), key=lambda file: file == temporary)
        for file in files:
            sync(file)
        for file in files:
            file.replace(path.parent / file.name)
        sync(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def disk_errors(folder: Path, *kinds: type[BaseException]) -> Iterator[None]:
    """Turn a failure to write below `folder` into one line; `kinds`: besides OSError."""
    caught: tuple[type[BaseException], ...] = (OSError, *kinds)
    try:
        yield
    except caught as error:
        reason = getattr(error, "strerror", None) or "the write failed, perhaps for lack of space"
        free = shutil.disk_usage(folder if folder.exists() else folder.absolute().anchor).free / 1e6
        raise MeshuffleError(
            f"cannot write to {folder}: {reason} ({free:,.1f} MB are free there); "
            "what was saved before is whole"
        ) from error


def sync(path: Path) -> None:
    """Push a file's content, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in UTF-8; a path in it that is not UTF-8 keeps its bytes."""
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content`."""
    with replaced(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as indented JSON."""
    write_text(path, json.dumps(finite(value), indent=2) + "\n")


def finite(value: Any) -> Any:
    """Return plain data with None for nan and ±inf, which JSON does not have.

    >>> finite({"top1": 50.0, "loss": [float("nan")]})
    {'top1': 50.0, 'loss': [None]}
    """
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
