"""What data a run began with, so that a run that continues on others does not go unnoticed.

`data.json.gz` in the run folder holds the classes and, of each split, the number of images and a
digest of their names, bytes, labels and order. Up to 200,000 images are also listed.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from meshuffle.data import Data, ImageSource
from meshuffle.data.base import shortened
from meshuffle.errors import DataError, RunError
from meshuffle.files import write_bytes

FILE = "data.json.gz"
_MOST_LISTED = 200_000  # images of all splits; more are not asked for their size either
_SHOWN = 3


def write_data_record(run: Path, data: Data) -> None:
    """Write what `data` are into the run folder."""
    write_bytes(run / FILE, gzip.compress(json.dumps(_record(data)).encode(), mtime=0))


def refuse_other_classes(run: Path, data: Data) -> None:
    """Refuse to continue a run on other classes than it began with, or in another order.

    Raises:
        DataError: names the classes, and the command that begins a new run from the weights.
    """
    before = _read(run)
    if before is None or (old := tuple(before["classes"])) == data.classes:
        return
    new, gone = [c for c in data.classes if c not in old], [c for c in old if c not in data.classes]
    parts = [f"new: {shortened(new)}"] * bool(new) + [f"gone: {shortened(gone)}"] * bool(gone)
    raise DataError(
        f"{data.spec} has other classes than {run} began with ({'; '.join(parts) or 'reordered'}): "
        f"it had {shortened(old)}, and now {shortened(data.classes)}; put them back, or begin a "
        f"new run from its weights: meshuffle train {shlex.quote(data.spec)} "
        f"--from {shlex.quote(str(run))}"
    )


def data_changes(run: Path, data: Data) -> list[str]:
    """Return lines about images that were added, removed or changed since the run began."""
    before = _read(run)
    if before is None or (now := _record(data))["splits"] == before["splits"]:
        return []
    if "images" in before and "images" in now:
        found = _differences(before["images"], now["images"])
    else:
        sizes = [{name: split["num"] for name, split in r["splits"].items()} for r in (before, now)]
        found = [f"{k}: {sizes[0].get(k, 0):,} images, now {v:,}" for k, v in sizes[1].items()]
    return [
        f"the data have changed since the run began: {'; '.join(found)}. The run continues on what "
        "is there now, and is no longer the same as one without a stop"
    ]


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return what differs between two lists of images; values are [split, bytes]."""
    both = [name for name in new if name in old]
    kinds = {
        "added": [name for name in new if name not in old],
        "removed": [name for name in old if name not in new],
        "of another size in bytes": [name for name in both if new[name][1] != old[name][1]],
        "moved to another split": [name for name in both if new[name][0] != old[name][0]],
    }
    found = [f"{len(k)} {what} ({shortened(k, _SHOWN)})" for what, k in kinds.items() if k]
    return found or ["other labels or another order"]


def _record(data: Data) -> dict[str, Any]:
    path = data.spec.partition(":")[2].partition("?")[0] or data.spec
    root = f"{path if Path(path).is_dir() else Path(path).parent}{os.sep}"
    listed = sum(len(source) for source in data.splits.values()) <= _MOST_LISTED
    images: dict[str, Any] = {}
    splits = {}
    for split, source in data.splits.items():
        digest = hashlib.sha256(np.ascontiguousarray(source.labels).tobytes())
        for index in range(len(source)):
            name = source.name(index)
            num_bytes = _num_bytes(source, name) if listed else None
            name = name.removeprefix(root)
            digest.update(f"{name}\0{num_bytes}\0".encode(errors="surrogateescape"))
            if listed:
                images[name] = [split, num_bytes]
        splits[split] = {"num": len(source), "sha256": digest.hexdigest()}
    record = {"classes": list(data.classes), "splits": splits}
    return record | ({"images": images} if listed else {})


def _num_bytes(source: ImageSource, name: str) -> int | None:
    """Return the size of the file, or None where an image is none or is gone."""
    try:
        return None if source.in_memory else Path(name).stat().st_size
    except OSError:
        return None


def _read(run: Path) -> dict[str, Any] | None:
    """Return the record; None of a run of an earlier version, which has none."""
    try:
        return dict(json.loads(gzip.decompress((run / FILE).read_bytes())))
    except FileNotFoundError:
        return None
    except (OSError, EOFError, ValueError) as error:
        raise RunError(
            f"{run / FILE}: cannot be read ({error}); delete it to continue without comparing data"
        ) from None
