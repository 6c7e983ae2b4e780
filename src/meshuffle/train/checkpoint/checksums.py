"""Checksums of the files of a folder: whether they are still what was written.

`checksums.json` holds the size in bytes and the SHA-256 of every other file. It is written last.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from meshuffle.files import write_json

CHECKSUMS = "checksums.json"


def write_checksums(folder: Path) -> None:
    """Write `checksums.json` for the files that `folder` has."""
    files = sorted(path for path in folder.iterdir() if path.name != CHECKSUMS)
    write_json(folder / CHECKSUMS, {path.name: _facts(path) for path in files})


def find_damage(folder: Path) -> list[str]:
    """Return what is wrong with the files of `folder`, a line for each; empty if nothing is.

    Raises:
        FileNotFoundError: the folder has no checksums.
    """
    try:
        listed: dict[str, Any] = json.loads((folder / CHECKSUMS).read_bytes())
        expected = {name: (int(e["bytes"]), str(e["sha256"])) for name, e in listed.items()}
    except FileNotFoundError:
        raise
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        return [f"{CHECKSUMS} cannot be read ({type(error).__name__})"]
    return [
        damage for name, facts in expected.items() if (damage := _damage(folder / name, *facts))
    ]


def _facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damage(path: Path, num_bytes: int, sha256: str) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    try:
        found_bytes = path.stat().st_size
        if found_bytes != num_bytes:
            return f"{path.name} has {found_bytes:,} bytes, and had {num_bytes:,}"
        changed = _sha256(path) != sha256
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return f"{path.name} has changed: its checksum is another" if changed else None
