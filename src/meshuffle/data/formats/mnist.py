"""MNIST and Fashion-MNIST from their idx files on disk, packed by gzip or not.

Format: http://yann.lecun.com/exdb/mnist (magic, sizes as big-endian 32-bit, then bytes).
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from meshuffle.data.base import ArraySource, Data, split_off_val
from meshuffle.data.scan import existing_folder
from meshuffle.errors import DataError

VAL_FRACTION = 0.1
_VAL_SEED = 1998
_MAX_BYTES = 1 << 30  # the real files hold 47 MB
_FILES = {"train": "train", "test": "t10k"}
_FASHION = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def open_mnist(path: str, *, seed: int = 0, need: Sequence[str] = ()) -> Data:
    """Open the folder of MNIST's four idx files (or a folder with MNIST/raw/ in it).

    val is a stratified 10 % of the 60,000 training images, the same for every `seed`.
    """
    splits = _read(path, "mnist", tuple("0123456789"), "MNIST/raw")
    # mean and std of the training pixels, as PyTorch's MNIST example uses them
    return _data(splits, "symbols", 0.1307, 0.3081)


def open_fashion_mnist(path: str, *, seed: int = 0, need: Sequence[str] = ()) -> Data:
    """Open the folder of Fashion-MNIST's four idx files (or with FashionMNIST/raw/ in it)."""
    splits = _read(path, "fashion-mnist", _FASHION, "FashionMNIST/raw")
    return _data(splits, "thumbnails", 0.2860, 0.3530)


def _data(splits: dict[str, ArraySource], style: str, mean: float, std: float) -> Data:
    train = splits["train"]
    return Data(
        spec=train.title,
        classes=train.classes,
        splits={**split_off_val(train, VAL_FRACTION, _VAL_SEED), "test": splits["test"]},
        input_size=32,
        style="symbols" if style == "symbols" else "thumbnails",
        mean=(mean,) * 3,
        std=(std,) * 3,
    )


def _read(path: str, title: str, classes: tuple[str, ...], nested: str) -> dict[str, ArraySource]:
    root = existing_folder(path)
    root = root / nested if (root / nested).is_dir() else root
    sources = {}
    for split, prefix in _FILES.items():
        pixels = _read_idx(root, f"{prefix}-images", 3)
        labels = _read_idx(root, f"{prefix}-labels", 1)
        if len(pixels) != len(labels):
            raise DataError(f"{root}: {len(pixels)} {split} images but {len(labels)} labels")
        if len(labels) and labels.max() >= len(classes):
            raise DataError(f"{root}: {split} label {labels.max()} is not below {len(classes)}")
        sources[split] = ArraySource(f"{title} {split}", classes, pixels, labels.astype(np.int64))
    return sources


def _read_idx(root: Path, stem: str, num_dims: int) -> NDArray[np.uint8]:
    """Read `STEM-idxN-ubyte`, also with a dot for the dash and packed as .gz."""
    names = [f"{stem}{mark}idx{num_dims}-ubyte{end}" for mark in "-." for end in ("", ".gz")]
    file = next((root / name for name in names if (root / name).is_file()), None)
    if file is None:
        raise DataError(f"{root} holds no {names[0]} or {names[1]}")
    try:
        with cast(BinaryIO, gzip.open(file)) if file.suffix == ".gz" else file.open("rb") as stream:
            return _parse_idx(stream, file, num_dims)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def _parse_idx(stream: BinaryIO, file: Path, num_dims: int) -> NDArray[np.uint8]:
    head = np.frombuffer(stream.read(4 * (1 + num_dims)), dtype=">u4")
    magic = 2048 + num_dims  # 0x08 = unsigned bytes, then the number of dimensions
    if len(head) != 1 + num_dims or head[0] != magic:
        found = int(head[0]) if len(head) else "nothing"
        raise DataError(
            f"{file} is not an idx file of images and labels: magic {found}, not {magic}"
        )
    shape = [int(size) for size in head[1:]]
    num_bytes = math.prod(shape)
    if num_bytes > _MAX_BYTES:
        raise DataError(f"{file}: its header says {num_bytes:,} bytes of data, which is too many")
    body = stream.read(num_bytes + 1)  # never more than the header promises
    if len(body) != num_bytes:
        has = f"{len(body):,}" if len(body) < num_bytes else "more"
        raise DataError(f"{file}: {has} bytes of data where its header says {num_bytes:,}")
    return np.frombuffer(body, dtype=np.uint8).reshape(shape)
