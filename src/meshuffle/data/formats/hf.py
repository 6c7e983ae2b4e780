"""Classification sets of the Hugging Face hub, or saved by its `datasets` library."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from meshuffle.data.base import Data, ImageSource, shortened
from meshuffle.data.entries import (
    SPLITS,
    Problems,
    assemble,
    check_filled,
    only_split,
    split_options,
)
from meshuffle.data.image import decode_image
from meshuffle.errors import DataError, ImageError, did_you_mean
from meshuffle.files import expanded

_OLDEST = 4  # the major version from which on data sets bring no code
_UNLABELLED = -1
_NAMING = ("string", "large_string", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32")


@dataclass(frozen=True, eq=False)
class HubSource:
    """One split of a `datasets.DatasetDict`; the images stay encoded until they are asked for."""

    title: str
    rows: Any
    column: str
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    in_memory: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """Decode image `index` to RGB; raises `ImageError`."""
        return decode_image(self.content(index), name=self.name(index))

    def target(self, index: int) -> int:
        """Return the label."""
        return int(self.labels[index])

    def name(self, index: int) -> str:
        """Return for example `beans/train[17]`."""
        return f"{self.title}[{index}]"

    def content(self, index: int) -> bytes:
        """Return the encoded image; raises `ImageError`."""
        cell = self.rows[index][self.column]
        if cell is None or (cell["bytes"] is None and not cell["path"]):
            raise ImageError(f"{self.name(index)}: has no image")
        if cell["bytes"] is not None:
            return bytes(cell["bytes"])
        try:
            return Path(cell["path"]).read_bytes()
        except OSError as error:
            raise ImageError(f"{self.name(index)}: {cell['path']}: {error.strerror}") from error


def open_hf(path: str, *, seed: int = 0, need: Sequence[str] = ("train", "val")) -> Data:
    """Open a data set by its name on the hub, or a folder that `save_to_disk` wrote.

    It needs a column of images and one of class labels, or of their names; `NAME?label=fine_label`
    chooses among several, `?image=` and `?config=` likewise. Any other folder is opened as
    `load_dataset` does it. Where the set has no validation split, 20 % of train chosen by `seed`
    become val.

    Raises `DataError`, one line, also where `datasets` is not installed, or the hub cannot
    be reached.
    """
    name, options = split_options(path, ["label", "image", "config"])
    library = _library(name)
    problems = Problems(path)
    notes = problems.notes
    tables = _splits(_load(library, name, options.get("config")), name, need, notes)
    features = next(iter(tables.values())).features
    image = _column(name, features, library.Image, "image", options.get("image"))
    usual = "cls" if "cls" in features and "label" not in features else "label"  # WebDataset's
    label = options.get("label") or usual
    classes = _names(tables, label)
    if not classes:
        label = _column(name, features, library.ClassLabel, "label", options.get("label"))
        classes = tuple(features[label].names)
    splits: dict[str, ImageSource] = {}
    for split, table in tables.items():
        labels = _labels(table, label, classes)
        if (labels == _UNLABELLED).all() and split == "test" and split not in need:
            notes.append("the test split has no labels: left out")
            continue
        if unlabelled := int(((labels < 0) | (labels >= len(classes))).sum()):
            raise DataError(f"{name}: {unlabelled} rows of {split} have no label in {label!r}")
        encoded = table.select_columns([image]).cast_column(image, library.Image(decode=False))
        splits[split] = HubSource(f"{name}/{split}", encoded, image, labels, classes)
    if "train" in need and "train" in splits:
        check_filled(f"hf:{name}", splits["train"].labels, classes, "image")
    return assemble(path, "classify", classes, splits, problems, seed=seed, need=need)


def _library(name: str) -> Any:
    try:
        library = import_module("datasets")
    except ImportError as error:
        raise DataError(
            f"hf:{name} needs the datasets library: pip install 'meshuffle[hub]'"
        ) from error
    if int(library.__version__.partition(".")[0]) < _OLDEST:
        raise DataError(
            f"hf:{name}: datasets {library.__version__} would run code that a data set brings; "
            f"wanted: {_OLDEST}.0 or newer: pip install -U datasets"
        )
    return library


def _load(library: Any, name: str, config: str | None) -> Any:
    folder = expanded(name)
    saved = [folder / "dataset_dict.json", folder / "dataset_info.json"]
    try:
        if any(file.is_file() for file in saved):
            return library.load_from_disk(str(folder))
        if folder.is_dir():
            return library.load_dataset(str(folder), config)
        with _offline_where_it_must_be(name):
            return library.load_dataset(name, config)
    except ConnectionError as error:
        raise DataError(
            f"hf:{name}: no such folder, and the hub, which was tried for a data set of this name, "
            "cannot be reached; without a network, open a folder that save_to_disk wrote: hf:FOLDER"
        ) from error
    except (OSError, ValueError, library.exceptions.DatasetsError) as error:
        raise DataError(f"hf:{name}: {_one_line(error)}") from error


@contextmanager
def _offline_where_it_must_be(name: str) -> Iterator[None]:
    """Ask the hub once: `load_dataset` tries for half a minute before it looks into its cache."""
    hub = import_module("huggingface_hub")
    with ExitStack() as stack:
        try:
            hub.HfApi().dataset_info(name, timeout=5)
        except (hub.errors.HfHubHTTPError, ValueError):
            pass  # it answers: load_dataset says what is wrong
        except Exception:  # noqa: BLE001  # of the hub's HTTP library
            for module in (hub.constants, import_module("datasets.config")):
                stack.enter_context(mock.patch.object(module, "HF_HUB_OFFLINE", True))
        yield


def _one_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _splits(loaded: Any, name: str, need: Sequence[str], notes: list[str]) -> dict[str, Any]:
    """Return {train, val, test: table}."""
    if not isinstance(loaded, dict):
        return {only_split(need): loaded}
    found: dict[str, Any] = {}
    for key, table in loaded.items():
        split = SPLITS.get(str(key))
        if split is None or split in found:
            notes.append(f"split {key}: left out")
        else:
            found[split] = table
    if not found:
        raise DataError(f"hf:{name} has the splits {shortened(list(map(str, loaded)))}; no train")
    return found


def _names(tables: Mapping[str, Any], column: str) -> tuple[str, ...]:
    """Return the names in a column of text, as in a metadata.csv, or of whole numbers; else ()."""
    features = [table.features.get(column) for table in tables.values()]
    if any(hasattr(f, "names") or getattr(f, "dtype", "") not in _NAMING for f in features):
        return ()
    found = {name for table in tables.values() for name in table.unique(column)}
    found -= {None, "", _UNLABELLED}
    return tuple(map(str, sorted(found, key=lambda n: n if type(n) is int else os.fsencode(n))))


def _column(
    name: str, features: Mapping[str, Any], kind: type, usual: str, chosen: str | None
) -> str:
    """Return the column of a kind: the chosen, the usual, or the only one."""
    found = [column for column, feature in features.items() if isinstance(feature, kind)]
    wanted = chosen or (usual if usual in found or len(found) != 1 else found[0])
    if wanted in found:
        return wanted
    what = "images" if usual == "image" else "class labels"
    if found:
        hint = did_you_mean(wanted, found)
        raise DataError(f"hf:{name}: choose ?{usual}=… of its {what}: {shortened(found)}{hint}")
    kinds = [f"{n} ({getattr(f, 'dtype', type(f).__name__)})" for n, f in features.items()]
    more = "the type Image" if usual == "image" else "ClassLabel, or text or numbers in ?label=NAME"
    raise DataError(f"hf:{name} has no column of {what} ({more}); it has {shortened(kinds, 12)}")


def _labels(table: Any, column: str, classes: Sequence[str]) -> NDArray[np.int64]:
    label_of = {name: label for label, name in enumerate(classes)}
    cells = table.select_columns([column])[:][column]
    coded = hasattr(table.features[column], "names")
    labels = (cell if coded else label_of.get(str(cell)) for cell in cells)
    return np.array([_UNLABELLED if x is None else x for x in labels], dtype=np.int64)
