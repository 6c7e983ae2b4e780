"""Open a data set from its text: one table from prefix to opener.

A new format is one module with an opener and one line in `OPENERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from meshuffle.data.base import Data, ImageSource
from meshuffle.data.cifar import open_cifar10
from meshuffle.data.digits import open_digits
from meshuffle.data.folder import open_folder, open_imagenet
from meshuffle.data.mnist import open_fashion_mnist, open_mnist
from meshuffle.data.scan import existing_folder
from meshuffle.errors import DataError, did_you_mean

__all__ = ["OPENERS", "Data", "ImageSource", "open_data"]

OPENERS: Mapping[str, Callable[..., Data]] = {
    "cifar10": open_cifar10,
    "fashion-mnist": open_fashion_mnist,
    "folder": open_folder,
    "imagenet": open_imagenet,
    "mnist": open_mnist,
}
_LATER = ("coco", "csv", "hf", "json", "masks", "text", "voc", "yolo")


def open_data(spec: str, *, seed: int = 0, need: Sequence[str] = ("train", "val")) -> Data:
    """Open the data set that `spec` names; read no image yet.

    `spec`: `digits`, a folder, or `FORMAT:PATH` with a format of `OPENERS`. `seed` chooses
    the val part of a folder that has none. `need`: the splits that must exist, of train, val
    and test; others are there if the data set has them. `need=()` requires nothing and joins
    the classes of all splits: for looking at a data set that may be wrong.

    Raises `DataError`, one line: what is wrong, where, and what to do.
    """
    if not spec:
        raise DataError("the name of the data set is empty; for example digits, or a folder")
    if spec == "digits":
        return open_digits("", seed=seed, need=need)
    prefix, colon, path = spec.partition(":")
    if not colon or Path(spec).expanduser().exists():
        _check_exists(spec)
        return open_folder(spec, seed=seed, need=need)
    if prefix in _LATER:
        raise DataError(f"{prefix}: data comes with its task, which does not exist yet")
    if prefix not in OPENERS:
        known = ", ".join(f"{name}:" for name in OPENERS)
        hint = did_you_mean(prefix, [*OPENERS, *_LATER])
        raise DataError(f"unknown data format {prefix!r} in {spec!r}{hint}; known: {known}")
    if not path:
        raise DataError(f"{spec!r} lacks its path: {prefix}:PATH")
    return replace(OPENERS[prefix](path, seed=seed, need=need), spec=spec)


def _check_exists(spec: str) -> None:
    """A word that is no folder may be a misspelt data set."""
    known = ["digits", *OPENERS]
    if not Path(spec).expanduser().exists() and "/" not in spec:
        if spec in OPENERS:
            raise DataError(f"{spec!r} lacks its path: {spec}:PATH")
        if hint := did_you_mean(spec, known):
            raise DataError(f"no such folder or data set: {spec}{hint}")
    existing_folder(spec)
