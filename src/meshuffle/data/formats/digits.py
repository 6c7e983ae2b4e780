"""The embedded default: 1,797 real handwritten digits of 8×8 pixels from scikit-learn."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meshuffle.data.base import ArraySource, Data, split_off_val, stratified_split, subset
from meshuffle.errors import DataError

TEST_FRACTION = 0.2
VAL_FRACTION = 0.1
_TEST_SEED = 2107  # fixed before the first training run; no run's seed changes it
_VAL_SEED = 1803


def open_digits(path: str, *, seed: int = 0, need: Sequence[str] = ()) -> Data:
    """Open the digits: a fixed stratified 20 % is test, 10 % of the rest is val.

    Both splits have seeds of their own, whatever `seed` says, and every split is always
    there. Source: E. Alpaydin and C. Kaynak, UCI ML repository, 1998, CC BY 4.0.
    """
    if path:
        raise DataError(f"digits takes no path; got {path!r}")
    images, labels = _load()
    pixels = np.rint(images * (255 / 16)).astype(np.uint8)
    classes = tuple(map(str, range(10)))
    everything = ArraySource("digits", classes, pixels, labels)
    rest, test = stratified_split(everything.labels, TEST_FRACTION, _TEST_SEED)
    splits = split_off_val(subset(everything, rest), VAL_FRACTION, _VAL_SEED)
    splits["test"] = subset(everything, test)
    return Data(
        spec="digits",
        classes=classes,
        splits=splits,
        input_size=48,
        style="symbols",
        mean=(0.305,) * 3,
        std=(0.376,) * 3,
    )


def _load() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return images (1797, 8, 8), 0 … 16, and labels (1797,).

    From scikit-learn's file where it lies where it always has: importing scikit-learn, in each
    rank and each command, takes longer than all else that reads digits.
    """
    package = importlib.util.find_spec("sklearn")
    places = (package and package.submodule_search_locations) or []
    for place in places:
        path = Path(place) / "datasets" / "data" / "digits.csv.gz"
        if path.exists():
            table = np.loadtxt(path, delimiter=",")
            return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return bunch.images, bunch.target.astype(np.int64)
