"""The measurements of an earlier start, kept beside the run's other files for serving."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import torch

from meshuffle.comm.device import num_cores
from meshuffle.deploy.serve.backends import Backend, digest_of, is_writable, serve_folder
from meshuffle.deploy.serve.measure import Choice, Layout
from meshuffle.files import write_json
from meshuffle.weights import find_weights, split_key

_RUNTIMES = ("onnxruntime", "openvino")


def file_of(target: Path, names: Sequence[str], num_gpus: int, wanted: Sequence[object]) -> Path:
    """Return the file for the measurements of these weights with these options, on this machine.

    It is in the run's folder, or in a private folder for temporary files if the run's folder cannot
    be written.

    Args:
        names: the possible backends.
        wanted: the options that decide what is measured.
    """
    versions = [_version(name) for name in _RUNTIMES]
    machine = [platform.machine(), num_cores()]
    machine += [torch.cuda.get_device_name(i) for i in range(num_gpus)]
    facts = [
        digest_of(find_weights(target), split_key(target)[1]),
        versions,
        machine,
        list(names),
        *map(str, wanted),
    ]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    folder = serve_folder(target)
    folder = folder if is_writable(folder) else _private_folder()
    return folder / f"measured-{key}.json"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _private_folder() -> Path:
    """Return this user's folder for temporary files; another user's folder is not trusted."""
    folder = Path(tempfile.gettempdir()) / f"meshuffle-serve-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} belongs to another user")
    return folder


def store(file: Path, choice: Choice) -> None:
    """Write the measurements and what was chosen."""
    value = dataclasses.asdict(choice) | {"backend": choice.backend.name}
    write_json(file, {"date": datetime.date.today().isoformat(), **value})


def recall(
    file: Path, names: Sequence[str], prepared: Callable[[str], Backend]
) -> tuple[str, Choice] | None:
    """Return the date and the choice of an earlier start; None if there is none that can be read.

    Args:
        names: the possible backends.
        prepared: makes the chosen one.
    """
    try:
        value = json.loads(file.read_text())
        name, batch = value["backend"], int(value["batch"])
        layout, *tried = (Layout(**one) for one in (value["layout"], *value["layouts"]))
        speeds = {str(key): float(speed) for key, speed in value["speeds"].items()}
        date = str(datetime.date.fromisoformat(value["date"]))
        if name not in names or min(batch, layout.replicas, layout.threads) < 1:
            return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return date, Choice(prepared(name), layout, batch, speeds, tried)
