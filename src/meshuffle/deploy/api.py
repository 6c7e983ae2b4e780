"""`meshuffle export` as a function."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from meshuffle.data import open_data
from meshuffle.deploy.formats import find_format
from meshuffle.deploy.formats.base import Calibration, Format, Run
from meshuffle.deploy.int8 import Int8, module_run
from meshuffle.deploy.parity import TOLERANCE, Parity, check_images, check_parity
from meshuffle.deploy.preprocessed import with_preprocessing
from meshuffle.deploy.subject import Subject
from meshuffle.errors import ConfigError, DataError, ImageError, MeshuffleError
from meshuffle.files import disk_errors, replaced_files
from meshuffle.tasks.card import Card
from meshuffle.weights import find_weights, load_model

_NUM_IMAGES = 5


def export(
    target: Path,
    formats: Sequence[str] = ("onnx",),
    *,
    out: Path | None = None,
    data: str | None = None,
    model: str | None = None,
    int8: bool = False,
    max_drop: float | None = None,
    preprocessing: bool = False,
) -> dict[str, tuple[Path, Parity]]:
    """Write the weights of `target` in other formats; returns {format: (file, parity)}.

    Args:
        target: a run folder or a weights file.
        formats: keys of `FORMATS`.
        out: folder of the files; None is `export/` in the run, or beside a weights file.
        data: DATA whose images the files are checked on; None is the training data.
        model: repeats the name of a `package.module:function` model, to allow its import.
        int8: quantise weights and activations to eight bits; the files are `model.int8.*`.
        max_drop: points that an eight-bit file may lose, 1 by default; see
            `deploy.int8.points_lost`.
        preprocessing: write files that take images, uint8 [N, H, W, 3].

    Raises:
        ConfigError: a format is unknown, not installed, or cannot be quantised.
        ParityError: a file computes something else, or loses too much accuracy.
        MeshuffleError: a file cannot be written.
    """
    found = [find_format(name.strip()) for name in formats]
    for one in found:
        one.require(int8)
    if max_drop is not None and not int8:
        raise ConfigError(f"--max-drop {max_drop:g} needs --int8")
    network, card = load_model(target, model)
    images = some_images(card.data_or(data), card)
    views_NCHW = torch.stack([card.preprocess.to_uint8(image) for image in images])
    subject = Subject(network, card, views_NCHW)
    if (int8 or preprocessing) and not subject.takes_images:
        option = "--int8" if int8 else "--with-preprocessing"
        raise ConfigError(f"{option}: what {card.task} exports takes no images; leave it out")
    subjects = {True: subject, False: subject}  # by `any_size`
    if preprocessing:
        for size in {one.any_size for one in found}:
            subjects[size] = with_preprocessing(subject, images, any_size=size)
    eight = Int8(subject, data, max_drop=1.0 if max_drop is None else max_drop) if int8 else None
    folder = out or (target if target.is_dir() else find_weights(target).parent) / "export"
    written = {}
    for one in found:
        path = folder / f"model{'.int8' if int8 else ''}{one.suffix}"
        written[one.name] = (path, write(one, subjects[one.any_size], path, int8=eight))
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
    form: Format,
    subject: Subject,
    path: Path,
    *,
    tolerance: float = TOLERANCE,
    int8: Int8 | None = None,
) -> Parity:
    """Write a file, and keep it only if it agrees with the model.

    It is written to a temporary folder; after an error `path` is as it was before.

    Args:
        tolerance: largest allowed error, relative to the largest output, above 0.
        int8: makes an eight-bit file, which is judged by its metric instead of `tolerance`.

    Returns:
        The difference of the file's outputs from the model's on batches of 1, 2 and 5 images.

    Raises:
        ModelError: the model cannot be exported.
        ParityError: the file computes something else.
        MeshuffleError: the disk refuses the file.
    """
    with disk_errors(path.parent), replaced_files(path) as temporary:
        write_unchecked(form, subject, temporary, int8)
        run = form.open(temporary)
        parity = check_parity(
            subject.module,
            run,
            subject.batches,
            temporary,
            runtime=form.runtime(temporary),
            tolerance=tolerance if int8 is None else None,
            argmax=subject.argmax,
        )
        size = sum(file.stat().st_size for file in temporary.parent.iterdir())
        parity = replace(parity, file_bytes=size, input=subject.input)
        if subject.plain is None:
            alone = run
        else:
            alone = _network_alone(form, subject.plain, int8)
            found = [run(x.numpy()) for x in subject.batches]
            parity = check_images(parity, alone, subject.views, found)
        return parity if int8 is None else replace(parity, change=int8.judge(alone, form.name))


def _network_alone(form: Format, plain: Subject, int8: Int8 | None) -> Run:
    """Return the function that executes the network of a file without its preprocessing."""
    if int8 is None:
        return module_run(plain.module)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"model{form.suffix}")
        write_unchecked(form, plain, path, int8)
        return form.open(path)


def write_unchecked(
    form: Format, subject: Subject, path: Path, calibration: Calibration | None = None
) -> None:
    """Write a file without comparing it, with eight bits if there is a calibration.

    Raises:
        ModelError: the model cannot be exported.
        MeshuffleError: the disk refuses the file.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # toolchains print their progress
            if calibration is None:
                form.write(subject, path)
            else:
                form.write_int8(subject, path, calibration)
    except (MeshuffleError, OSError):
        raise
    except Exception as error:  # a toolchain may raise anything
        raise subject.refusal(error, f" to {form.name}") from error


def some_images(spec: str, card: Card) -> list[Image.Image]:
    """Return up to five readable images of a data set, RGB, at their own sizes."""
    splits = open_data(spec, task=card.task, need=()).splits
    source = next(splits[name] for name in ("test", "val", "train") if name in splits)
    images: list[Image.Image] = []
    for index in range(len(source)):
        try:
            images.append(source.image(index))
        except ImageError:
            continue
        if len(images) == _NUM_IMAGES:
            break
    if not images:
        raise DataError(f"{spec}: no readable image to check the export on; give --data DATA")
    return images
