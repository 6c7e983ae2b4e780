"""Open a data set from its text: one table from prefix to opener.

A new format is one module with an opener and one line in `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from meshuffle.data.base import Data, ImageSource
from meshuffle.data.entries import NEED, Need, split_place
from meshuffle.data.formats.digits import open_digits
from meshuffle.data.formats.foreign import foreign_file
from meshuffle.data.scan import existing_folder
from meshuffle.errors import DataError, did_you_mean
from meshuffle.files import expanded

__all__ = ["FORMATS", "Data", "ImageSource", "open_data"]

DIGITS = "digits"
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
    spec: str, *, task: str = "classify", seed: int = 0, need: Need = NEED, strict: bool = False
) -> Data:
    """Open the data set that `spec` names; read no image yet.

    `spec`: `digits`, a folder, or `FORMAT:PATH` with a format of `FORMATS`. `task`: the task that
    the targets are for; some formats know several. `seed` chooses the val part where there is
    none. `need`: the splits that must exist, of train, val and test; others are there if the data
    set has them. `need=()` requires nothing and joins the classes of all splits: for looking at a
    data set that may be wrong. `strict`: an annotation that would be left out is an error.

    Raises `DataError`, one line: what is wrong, where, and what to do.
    """
    prefix, path = parse_data(spec)
    if not prefix:
        _check_task(spec, _ONE_LABEL, task)
        return _finished(open_digits("", seed=seed, need=need), spec, task)
    form = FORMATS[prefix]
    if path == spec:
        _check_exists(spec)
    _check_task(spec, form, task)
    chosen: dict[str, Any] = {"task": task} if len(form.tasks) > 1 else {}
    if "detect" in form.tasks:
        chosen["strict"] = strict
    try:
        return _finished(form.load()(path, seed=seed, need=need, **chosen), spec, task)
    except DataError as error:
        if hint := foreign_file(expanded(split_place(path)[0]), task):
            raise DataError(f"{error}; {hint}") from error
        raise


def parse_data(spec: str) -> tuple[str, str]:
    """Return the format and the path, with its options, that DATA means, for every verb alike.

    `digits` is ("", ""), also where a folder has that name, which is `./digits`. A path that
    exists is a folder, also with a colon in its name. Raises `DataError`.

    >>> parse_data("csv:table.csv?targets=x")
    ('csv', 'table.csv?targets=x')
    """
    if not spec:
        raise DataError("the name of the data set is empty; for example digits, or a folder")
    if spec == DIGITS:
        return "", ""
    prefix, colon, path = spec.partition(":")
    if not colon or expanded(spec).exists():
        return "folder", spec
    if prefix not in FORMATS:
        known = ", ".join(f"{name}:" for name in FORMATS)
        hint = did_you_mean(prefix, FORMATS)
        raise DataError(f"unknown data format {prefix!r} in {spec!r}{hint}; known: {known}")
    if not path.strip():
        raise DataError(f"{spec!r} lacks its path: {prefix}:PATH")
    return prefix, path


def absolute_data(spec: str) -> str:
    """Return DATA with an absolute path, so that a run continues from anywhere."""
    prefix, path = parse_data(spec)
    place, options = split_place(path)
    if not prefix or not expanded(place).exists():
        return spec
    before = "" if path == spec else f"{prefix}:"
    return f"{before}{expanded(place).resolve()}{options}"


def _check_task(spec: str, form: Format, task: str) -> None:
    """Refuse a task for which the format has no targets; generate needs only images."""
    if task in form.tasks or (task == "generate" and "classify" in form.tasks):
        return
    place = expanded(split_place(parse_data(spec)[1])[0])
    if spec != DIGITS and (found := foreign_file(place)):
        raise DataError(f"{found}; then open that as coco:PATH, voc:PATH or yolo:PATH")
    ways = " or ".join(f"--task {name}" for name in form.tasks)
    others = ", ".join(f"{name}:PATH" for name, other in FORMATS.items() if task in other.tasks)
    hint = f", or a format for it: {others}" if others and spec != DIGITS else ""
    raise DataError(f"{spec}: these data have nothing for --task {task}; use {ways}{hint}")


def _finished(data: Data, spec: str, task: str) -> Data:
    size = _INPUT_SIZE.get(task, data.input_size)
    layout = data.layout or data.spec.partition(":")[0]
    notices = data.notices
    if spec == DIGITS and Path(DIGITS).is_dir():
        notices += ("digits is the embedded data set; the folder of that name is ./digits",)
    return replace(data, spec=spec, task=task, input_size=size, layout=layout, notices=notices)


def _check_exists(spec: str) -> None:
    """Raise `DataError` for a path that does not exist; a word may be a misspelt data set."""
    if not expanded(spec).exists() and "/" not in spec:
        if spec in FORMATS:
            raise DataError(f"{spec!r} lacks its path: {spec}:PATH")
        if hint := did_you_mean(spec, [DIGITS, *FORMATS]):
            raise DataError(f"no such folder or data set: {spec}{hint}")
    if expanded(spec).is_file():
        raise DataError(
            f"{spec} is a file; write its format before it: csv:, json:, coco: or yolo:"
        )
    existing_folder(spec)
