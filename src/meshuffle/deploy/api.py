"""What `meshuffle export` does, as a function."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from meshuffle.data import open_data
from meshuffle.deploy import find_format
from meshuffle.deploy.format import Format
from meshuffle.deploy.parity import TOLERANCE, Parity, check_parity
from meshuffle.deploy.subject import Subject
from meshuffle.errors import DataError, ImageError, MeshuffleError
from meshuffle.train.files import disk_errors, replaced_files
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
        formats: keys of `FORMATS`.
        out: folder of the files; None is `export/` in the run, or beside a weights file.
        data: DATA whose images the files are checked on; None is what the model learned.
        model: repeats the name of a `package.module:function` model, to allow its import.

    Raises:
        ConfigError: an unknown format, or one that is not installed; ParityError: a file computes
            something else; MeshuffleError: it cannot be written.
    """
    found = [find_format(name.strip()) for name in formats]
    for one in found:
        one.require()
    network, card = load_model(target, model)
    subject = Subject(network, card, some_images(card.data_or(data), card))
    folder = out or (target if target.is_dir() else find_weights(target).parent) / "export"
    written = {}
    for one in found:
        path = folder / f"model{one.suffix}"
        written[one.name] = (path, write(one, subject, path))
    return written


def write_file(
    form: Format,
    network: nn.Module,
    card: Card,
    path: Path,
    images_NCHW: Tensor,
    *,
    decoded: bool = True,
    tolerance: float = TOLERANCE,
) -> Parity:
    """Write `network` to `path` in one format; see `Subject` and `write`."""
    form.require()
    subject = Subject(network, card, images_NCHW, decoded=decoded)
    return write(form, subject, path, tolerance=tolerance)


def write(
    form: Format, subject: Subject, path: Path, *, tolerance: float | None = TOLERANCE
) -> Parity:
    """Write a file, once it agrees with the model.

    It is written in a temporary folder; after an error `path` is what it was before.

    Args:
        tolerance: largest error as a share of the largest output, above 0.

    Returns:
        How far the file's outputs are from the model's on batches of 1, 2 and 5 images.

    Raises:
        ModelError: the model cannot be exported.
        ParityError: the file computes something else.
        MeshuffleError: the disk does not take it.
    """
    with disk_errors(path.parent), replaced_files(path) as temporary:
        try:
            form.write(subject, temporary)
        except (MeshuffleError, OSError):
            raise
        except Exception as error:  # a toolchain raises what it likes
            raise subject.refusal(error, f" to {form.name}") from error
        return check_parity(
            subject.module,
            form.open(temporary),
            subject.batches,
            temporary,
            runtime=form.runtime(temporary),
            tolerance=tolerance,
            argmax=subject.argmax,
        )


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
