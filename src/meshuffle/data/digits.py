"""The embedded default: 1,797 real handwritten digits of 8×8 pixels from scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

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
    from sklearn.datasets import load_digits  # two seconds: only for those who need it

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    classes = tuple(str(name) for name in bunch.target_names)
    everything = ArraySource("digits", classes, pixels, bunch.target.astype(np.int64))
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
