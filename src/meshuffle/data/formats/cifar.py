"""CIFAR-10 from its files on disk: the binary version, or the Python version.

The Python version is a pickle, and a pickle can run code. It is read by an unpickler that
can build lists, strings and one-byte integer arrays, and refuses everything else.
Format: A. Krizhevsky, https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshuffle.data.base import ArraySource, Data, split_off_val
from meshuffle.data.scan import existing_folder
from meshuffle.errors import DataError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
VAL_FRACTION = 0.1
_VAL_SEED = 2009
_IMAGE_BYTES = 3 * 32 * 32
_FILES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
_NESTED = ("cifar-10-batches-bin", "cifar-10-batches-py")
_BROKEN_PICKLE = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    IndexError,
    KeyError,
    OverflowError,
    MemoryError,
    struct.error,
)


def open_cifar10(path: str, *, seed: int = 0, need: Sequence[str] = ()) -> Data:
    """Open the folder with CIFAR-10's six batch files (or the folder that holds it).

    val is a stratified 10 % of the 50,000 training images, the same for every `seed`, so
    that test selects nothing. Raises `DataError`.
    """
    root = existing_folder(path)
    root = next((root / name for name in _NESTED if (root / name).is_dir()), root)
    sources = {split: _read_split(root, split) for split in _FILES}
    splits = split_off_val(sources["train"], VAL_FRACTION, _VAL_SEED)
    return Data(
        spec="cifar10",
        classes=CLASSES,
        splits={**splits, "test": sources["test"]},
        input_size=32,
        style="thumbnails",
        mean=(0.4914, 0.4822, 0.4465),  # of the training pixels
        std=(0.2470, 0.2435, 0.2616),
    )


def _read_split(root: Path, split: str) -> ArraySource:
    batches = [_read_batch(root, name) for name in _FILES[split]]
    pixels = np.concatenate([pixels for pixels, _ in batches])
    labels = np.concatenate([labels for _, labels in batches])
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(CLASSES):
        raise DataError(f"{root}: {split} has a label outside 0 … {len(CLASSES) - 1}")
    images = np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return ArraySource(f"cifar10 {split}", CLASSES, images, labels.astype(np.int64))


def _read_batch(root: Path, name: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    readers: dict[str, Callable[[Path], tuple[NDArray[np.uint8], NDArray[np.int64]]]] = {
        f"{name}.bin": _read_binary,
        name: _read_python,
    }
    for file_name, reader in readers.items():
        if (file := root / file_name).is_file():
            try:
                return reader(file)
            except OSError as error:
                raise DataError(f"{file} cannot be read: {error.strerror}") from error
    packed = sorted(root.glob("cifar-10-*.tar.gz"))
    hint = f"; unpack {packed[0].name} first" if packed else ""
    raise DataError(f"{root} holds neither {name}.bin nor {name}{hint}")


def _read_binary(file: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    rows = np.fromfile(file, dtype=np.uint8)
    if rows.size == 0 or rows.size % (1 + _IMAGE_BYTES):
        raise DataError(f"{file}: {rows.size:,} bytes is no multiple of {1 + _IMAGE_BYTES}")
    rows = rows.reshape(-1, 1 + _IMAGE_BYTES)
    return rows[:, 1:], rows[:, 0].astype(np.int64)


def _read_python(file: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    try:
        with file.open("rb") as stream:
            batch = _ArrayUnpickler(stream, encoding="latin1").load()
    except _BROKEN_PICKLE as error:
        raise DataError(f"{file} is not a CIFAR-10 batch: {error}") from error
    pixels = batch.get("data") if isinstance(batch, dict) else None
    labels = batch.get("labels") if isinstance(batch, dict) else None
    if not isinstance(pixels, np.ndarray) or not isinstance(labels, list):
        raise DataError(f"{file} is not a CIFAR-10 batch: no 'data' and 'labels' in it")
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), _IMAGE_BYTES):
        raise DataError(f"{file}: data is {pixels.dtype} {pixels.shape}, labels {len(labels)}")
    if not all(type(label) is int for label in labels):
        raise DataError(f"{file}: a label is no integer")
    return pixels, np.array(labels, dtype=np.int64)


class _ArrayUnpickler(pickle.Unpickler):
    """Replaces four known names by harmless functions, and refuses all others."""

    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Any] = {
            ("numpy", "ndarray"): None,
            ("numpy", "dtype"): _byte_dtype,
            ("multiarray", "_reconstruct"): _empty_array,
            ("_codecs", "encode"): _encode_latin1,
        }
        key = (module.removeprefix("numpy.core.").removeprefix("numpy._core."), name)
        if key not in known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is refused")
        return known[key]


def _empty_array(kind: None, shape: tuple[int, ...], code: object) -> NDArray[np.uint8]:
    return np.empty(0, dtype=np.uint8)  # its state follows and holds the real shape


def _byte_dtype(code: object, *_: object) -> np.dtype[np.uint8]:
    if code not in ("u1", b"u1"):
        raise pickle.UnpicklingError(f"it holds an array of {code!r}, not of bytes")
    return np.dtype("u1", copy=True)


def _encode_latin1(text: str, codec: str) -> bytes:
    if codec != "latin1":
        raise pickle.UnpicklingError(f"it asks for the codec {codec!r}")
    return text.encode("latin1")
