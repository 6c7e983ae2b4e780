"""Open a data set from its text: one table from prefix to opener.

A new format is one module with an opener and one line in `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

from meshuffle.data.base import Data, ImageSource
from meshuffle.data.formats.digits import open_digits
from meshuffle.data.formats.folder import open_folder
from meshuffle.data.scan import existing_folder
from meshuffle.errors import DataError, did_you_mean

__all__ = ["FORMATS", "Data", "ImageSource", "open_data"]

_LABELS = ("classify", "multilabel")
_INPUT_SIZE = {"detect": 320, "segment": 320}  # pixels, where the format suggests none


@dataclass(frozen=True)
class Format:
    """The opener of a format, and the tasks that its files have targets for."""

    module: str
    opener: str
    tasks: tuple[str, ...] = ("classify",)

    def load(self) -> Callable[..., Data]:
        """Import the opener."""
        opener: Callable[..., Data] = getattr(
            import_module(f"meshuffle.data.formats.{self.module}"), self.opener
        )
        return opener


FORMATS: Mapping[str, Format] = {
    "cifar10": Format("cifar", "open_cifar10"),
    "coco": Format("coco", "open_coco", ("detect", "segment", *_LABELS)),
    "csv": Format("table", "open_csv", (*_LABELS, "regress")),
    "fashion-mnist": Format("mnist", "open_fashion_mnist"),
    "folder": Format("folder", "open_folder"),
    "hf": Format("hf", "open_hf"),
    "imagenet": Format("folder", "open_imagenet"),
    "json": Format("table", "open_json", (*_LABELS, "regress")),
    "masks": Format("masks", "open_masks", ("segment",)),
    "mnist": Format("mnist", "open_mnist"),
    "voc": Format("voc", "open_voc", ("detect", "segment", *_LABELS)),
    "yolo": Format("yolo", "open_yolo", ("detect", *_LABELS)),
}
_ONE_LABEL = Format("folder", "open_folder")


def open_data(
    spec: str, *, task: str = "classify", seed: int = 0, need: Sequence[str] = ("train", "val")
) -> Data:
    """Open the data set that `spec` names; read no image yet.

    `spec`: `digits`, a folder, or `FORMAT:PATH` with a format of `FORMATS`. `task`: the task that
    the targets are for; some formats know several. `seed` chooses the val part where there is
    none. `need`: the splits that must exist, of train, val and test; others are there if the data
    set has them. `need=()` requires nothing and joins the classes of all splits: for looking at a
    data set that may be wrong.

    Raises `DataError`, one line: what is wrong, where, and what to do.
    """
    if not spec:
        raise DataError("the name of the data set is empty; for example digits, or a folder")
    prefix, colon, path = spec.partition(":")
    if spec == "digits":
        _check_task(spec, _ONE_LABEL, task)
        return _finished(open_digits("", seed=seed, need=need), spec, task)
    if not colon or Path(spec).expanduser().exists():
        _check_exists(spec)
        _check_task(spec, _ONE_LABEL, task)
        return _finished(open_folder(spec, seed=seed, need=need), spec, task)
    if prefix not in FORMATS:
        known = ", ".join(f"{name}:" for name in FORMATS)
        hint = did_you_mean(prefix, FORMATS)
        raise DataError(f"unknown data format {prefix!r} in {spec!r}{hint}; known: {known}")
    if not path:
        raise DataError(f"{spec!r} lacks its path: {prefix}:PATH")
    form = FORMATS[prefix]
    _check_task(spec, form, task)
    chosen = {"task": task} if len(form.tasks) > 1 else {}
    return _finished(form.load()(path, seed=seed, need=need, **chosen), spec, task)


def absolute_data(spec: str) -> str:
    """Return DATA, or weights, with an absolute path, so that a run continues from anywhere."""
    prefix, colon, path = spec.partition(":")
    path, mark, options = (path, "", "") if Path(path).exists() else path.partition("?")
    whole, *rest = [spec] if Path(spec).expanduser().exists() else spec.partition("?")
    if Path(whole).expanduser().exists():
        return str(Path(whole).expanduser().resolve()) + "".join(rest)
    if colon and Path(path).expanduser().exists():
        return f"{prefix}:{Path(path).expanduser().resolve()}{mark}{options}"
    return spec


def _check_task(spec: str, form: Format, task: str) -> None:
    """Refuse a task for which the format has no targets; generate needs only images."""
    if task in form.tasks or (task == "generate" and "classify" in form.tasks):
        return
    ways = " or ".join(f"--task {name}" for name in form.tasks)
    raise DataError(f"{spec}: these data have nothing for --task {task}; use {ways}")


def _finished(data: Data, spec: str, task: str) -> Data:
    size = _INPUT_SIZE.get(task, data.input_size)
    return replace(data, spec=spec, task=task, input_size=size)


def _check_exists(spec: str) -> None:
    """Raise `DataError` for a path that does not exist; a word may be a misspelt data set."""
    known = ["digits", *FORMATS]
    if not Path(spec).expanduser().exists() and "/" not in spec:
        if spec in FORMATS:
            raise DataError(f"{spec!r} lacks its path: {spec}:PATH")
        if hint := did_you_mean(spec, known):
            raise DataError(f"no such folder or data set: {spec}{hint}")
    existing_folder(spec)
