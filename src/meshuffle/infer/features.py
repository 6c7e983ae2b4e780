"""Images as points: the features in front of a model's head, and which images are near."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshuffle.data.scan import image_files
from meshuffle.errors import DataError
from meshuffle.infer.rank import Question, answer

_NEAREST = 5


def features(
    target: Path, images: Sequence[Path], *, batch: int = 64, model: str | None = None
) -> tuple[NDArray[np.float32], list[str], list[str]]:
    """Return the pooled features (N, F) of the readable images, their files, and what was skipped.

    Args:
        target: a run folder or a weights file.
        images: image files, or folders that hold some.

    Raises:
        DataError: a path does not exist, a folder holds no image, or none can be read.
    """
    paths = [str(path) for path in image_files(images)]
    question = Question(str(target), model, batch, files=paths, features=True)
    found, _ = answer(question)
    if not found.num_samples:
        raise DataError(f"none of {len(paths)} images can be read; the first: {found.skipped[0]}")
    values: NDArray[np.float32] = found.rows["features"]
    return values, [paths[i] for i in found.indices], list(found.skipped)


def nearest(
    target: Path,
    images: Sequence[Path],
    folder: Path,
    *,
    batch: int = 64,
    model: str | None = None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return for each image the five of `folder` whose features are nearest, and what was skipped.

    An entry is `{"file", "nearest": [{"file", "similarity"}, …]}`, the cosine 1 for the same
    direction; an image is not its own neighbour.

    Args:
        target, images, batch, model: see `features`.
        folder: images to look in, subfolders too.
    """
    own, files, skipped = features(target, images, batch=batch, model=model)
    theirs, places, skipped_there = features(target, [folder], batch=batch, model=model)
    cosines = _unit(own) @ _unit(theirs).T
    resolved = [Path(place).resolve() for place in places]
    rows = []
    for file, similarities in zip(files, cosines, strict=True):
        itself = Path(file).resolve()
        order = [i for i in np.argsort(-similarities, kind="stable") if resolved[i] != itself]
        near = [{"file": places[i], "similarity": float(similarities[i])} for i in order[:_NEAREST]]
        rows.append({"file": file, "nearest": near})
    return rows, list(dict.fromkeys([*skipped, *skipped_there]))


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the rows as unit vectors, float64; a row of zeros stays."""
    wide = rows.astype(np.float64)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)
