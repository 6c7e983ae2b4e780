"""COCO's mean average precision, by faster-coco-eval (an extra)."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshuffle.errors import ConfigError

_CANVAS = 1000.0  # pixels a side


def require() -> Any:
    """Return the module `faster_coco_eval`.

    Raises:
        ConfigError: it is not installed; with the command that helps.
    """
    try:
        return importlib.import_module("faster_coco_eval")
    except ImportError:
        raise ConfigError(
            "detection is judged by faster-coco-eval, which is not installed: "
            "pip install 'meshuffle[detect]'"
        ) from None


def mean_average_precision(
    boxes_ND6: NDArray[np.float32], truth_NM5: NDArray[np.float32], num_classes: int
) -> dict[str, float]:
    """Return `map` (IoU 0.50, 0.55 … 0.95), `map50` and `map75` in percent; all 0 without objects.

    Averaged over the classes that have objects. Boxes are shares of their image, and are judged on
    a canvas of 1000×1000: an IoU is the same when an axis is scaled. An area is not, so COCO's
    numbers for small, medium and large objects are not given.

    Args:
        boxes_ND6: x1, y1, x2, y2 (0 … 1), score, class; rows of −1 are padding.
        truth_NM5: class, x1, y1, x2, y2; rows of −1 are padding.

    Raises:
        ConfigError: faster-coco-eval is missing, and there is an object.
    """
    images, objects = np.nonzero(truth_NM5[..., 0] >= 0)
    if not len(images):
        return {"map": 0.0, "map50": 0.0, "map75": 0.0}
    library = require()
    rows = truth_NM5[images, objects]
    truth = _entries(images, rows[:, 1:], rows[:, 0], iscrowd=0)
    images, found = np.nonzero(boxes_ND6[..., 5] >= 0)
    rows = boxes_ND6[images, found]
    predicted = _entries(images, rows[:, :4], rows[:, 5])
    for entry, score in zip(predicted, rows[:, 4].tolist(), strict=True):
        entry["score"] = score
    coco = library.COCO(
        {
            "images": [{"id": i + 1} for i in range(len(truth_NM5))],
            "categories": [{"id": c + 1, "name": str(c)} for c in range(num_classes)],
            "annotations": truth,
        }
    )
    judge = library.COCOeval_faster(coco, coco.loadRes(predicted), "bbox")
    judge.run()
    percent = [100 * max(0.0, float(value)) for value in judge.stats[:3]]
    return dict(zip(("map", "map50", "map75"), percent, strict=True))


def _entries(
    images: NDArray[np.int64],
    boxes: NDArray[np.float32],
    classes: NDArray[np.float32],
    **more: Any,
) -> list[dict[str, Any]]:
    """Return COCO's annotations; ids begin at 1, since 0 means "none" to the matching."""
    corners = boxes.astype(np.float64) * _CANVAS
    extents = corners[:, 2:] - corners[:, :2]
    return [
        {
            "id": i + 1,
            "image_id": int(image) + 1,
            "category_id": int(label) + 1,
            "bbox": [*corner, *extent],
            "area": extent[0] * extent[1],
            **more,
        }
        for i, (image, label, corner, extent) in enumerate(
            zip(images, classes, corners[:, :2].tolist(), extents.tolist(), strict=True)
        )
    ]
