"""What `meshuffle export` does, as a function."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from meshuffle.data import open_data
from meshuffle.deploy import find_exporter
from meshuffle.deploy.parity import Parity
from meshuffle.errors import DataError, ImageError
from meshuffle.train.weights import Card, find_weights, load_model

_NUM_IMAGES = 5


def export(
    target: Path,
    formats: Sequence[str] = ("onnx",),
    *,
    out: Path | None = None,
    data: str | None = None,
    model: str | None = None,
) -> dict[str, tuple[Path, Parity]]:
    """Write the weights of `target` in other formats; returns {format: (file, parity)}.

    Args:
        target: a run folder or a weights file.
        formats: keys of `EXPORTERS`.
        out: folder of the files; None is `export/` in the run, or beside a weights file.
        data: DATA whose images the files are checked on; None is what the model learned.
        model: repeats the name of a `package.module:function` model, to allow its import.

    Raises:
        ConfigError: an unknown format; ParityError: a file computes something else.
    """
    exporters = {name: find_exporter(name.strip()) for name in formats}
    network, card = load_model(target, model)
    images_NCHW = some_images(card.data_or(data), card)
    folder = out or (target if target.is_dir() else find_weights(target).parent) / "export"
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for name, exporter in exporters.items():
        path = folder / f"model{exporter.suffix}"
        written[name] = (path, exporter.load()(network, card, path, images_NCHW))
    return written


def some_images(spec: str, card: Card) -> Tensor:
    """Return a few readable images of a data set in the evaluation view, uint8 [N, 3, H, W]."""
    splits = open_data(spec, task=card.task, need=()).splits
    source = next(splits[name] for name in ("test", "val", "train") if name in splits)
    views = []
    for index in range(len(source)):
        try:
            views.append(card.preprocess.to_uint8(source.image(index)))
        except ImageError:
            continue
        if len(views) == _NUM_IMAGES:
            break
    if not views:
        raise DataError(f"{spec}: no readable image to check the export on; give --data DATA")
    return torch.stack(views)
