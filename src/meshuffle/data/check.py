"""Check a data set before training: counts, broken files, duplicates, a picture."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshuffle.data.base import Data, ImageSource, shortened
from meshuffle.data.grid import draw_grid
from meshuffle.data.source import open_data
from meshuffle.data.target import VOID, Boxes
from meshuffle.errors import DataError, ImageError

Progress = Callable[[int, int], None]
_Shown = tuple[NDArray[np.int64], NDArray[np.int64] | int]
_SHOWN = 10


@dataclass(frozen=True)
class CheckReport:
    """The results of `check_data`.

    Attributes:
        counts: {split: {class: number}}: images, also broken ones; objects, if they have boxes;
            images that show the class, if they have masks; readable images, for regression.
        absent: {split: its classes without any image}.
        unreadable: (name, reason) of each broken image.
        leaks: exact duplicates (name, name) between two splits.
        repeated: exact duplicates within one split.
        ignored, layout, notices: see `Data`.
        images: {split: number of images, also broken ones}.
        smallest, largest: (width, height) of the images with smallest and largest area.
        imbalance: images of the largest class / those of the smallest, in train (or in the only
            split); None if a class is empty.
        grid: path of the picture.
        ranges: {split: {target: (minimum, mean, maximum)}}, for regression.
    """

    spec: str
    classes: tuple[str, ...]
    counts: Mapping[str, Mapping[str, int]]
    absent: Mapping[str, tuple[str, ...]]
    unreadable: tuple[tuple[str, str], ...]
    leaks: tuple[tuple[str, str], ...]
    repeated: tuple[tuple[str, str], ...]
    ignored: tuple[str, ...]
    smallest: tuple[int, int] | None
    largest: tuple[int, int] | None
    imbalance: float | None
    grid: str | None = None
    task: str = "classify"
    layout: str = ""
    notices: tuple[str, ...] = ()
    images: Mapping[str, int] = field(default_factory=dict)
    ranges: Mapping[str, Mapping[str, tuple[float, ...]]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether no problem was found that harms training or evaluation."""
        return not self.problems()

    def problems(self) -> list[str]:
        """Return one line for each kind of problem."""
        lines = [
            f"{split} lacks {len(names)} of {len(self.classes)} classes: {shortened(names)}"
            for split, names in self.absent.items()
        ]
        if self.task == "classify" and len(self.classes) < 2:
            lines.append(f"only {len(self.classes)} class; a classifier needs two or more")
        if self.unreadable:
            lines.append(f"{len(self.unreadable)} unreadable images (training skips them)")
        if self.leaks:
            lines.append(f"{len(self.leaks)} exact duplicates between splits")
        if self.repeated and "train" in self.counts and "val" not in self.counts:
            lines.append(
                f"{len(self.repeated)} exact duplicates within a split: a fifth of train becomes "
                "val, which may then hold copies of what is learned; remove them"
            )
        return lines

    def render(self) -> str:
        """Return the report as text of several lines."""
        one, more = ("target", "targets") if self.task == "regress" else ("class", "classes")
        lines = [f"{self.spec}: {len(self.classes)} {one if len(self.classes) == 1 else more}"]
        lines += [f"layout  {self.layout}"] if self.layout else []
        lines += [f"note: {notice}" for notice in self.notices]
        lines += self._ranges() if self.ranges else self._table()
        sizes = dict.fromkeys([_size(self.smallest), _size(self.largest)])
        lines += [f"sizes: {' … '.join(sizes)} (width×height)"]
        if self.imbalance is not None and self.task != "regress":
            lines.append(f"largest class / smallest class: {self.imbalance:.2f}")
        lines += _section("unreadable", [reason for _, reason in self.unreadable])
        lines += _section("duplicates between splits", [f"{a} = {b}" for a, b in self.leaks])
        lines += _section("duplicates within a split", [f"{a} = {b}" for a, b in self.repeated])
        lines += _section("ignored", self.ignored)
        lines += [f"grid: {self.grid}"] if self.grid else []
        lines += [f"problem: {line}" for line in self.problems()] or ["no problem found"]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data, with `problems`."""
        return {**asdict(self), "problems": self.problems()}

    def _table(self) -> Iterator[str]:
        width = max(map(len, (*self.classes, "images")))
        yield "  ".join([f"{'class':{width}}", *(f"{split:>8}" for split in self.counts)])
        for name in self.classes:
            row = (f"{counts[name]:>8,}" for counts in self.counts.values())
            yield "  ".join([f"{name:{width}}", *row])
        total = (f"{sum(counts.values()):>8,}" for counts in self.counts.values())
        yield "  ".join([f"{'sum':{width}}", *total])
        if self.task not in ("classify", "generate"):
            images = (f"{number:>8,}" for number in self.images.values())
            yield "  ".join([f"{'images':{width}}", *images])

    def _ranges(self) -> Iterator[str]:
        width = max(map(len, (*self.classes, "target")))
        for split, ranges in self.ranges.items():
            heads = (f"{head:>11}" for head in ("minimum", "mean", "maximum"))
            count = f" in {split}: {max(self.counts[split].values()):,} images"
            yield "  ".join([f"{'target':{width}}", *heads, count])
            for name, numbers in ranges.items():
                yield "  ".join([f"{name:{width}}", *(f"{number:>11.5g}" for number in numbers)])


@dataclass(frozen=True)
class _Sample:
    """The facts about one image that are kept; `error` is None for a readable one."""

    name: str
    digest: bytes
    size: tuple[int, int] | None
    error: str | None


def check_data(
    spec: str,
    grid_path: Path | str | None = None,
    progress: Progress | None = None,
    task: str = "classify",
) -> CheckReport:
    """Read every image of `spec` and report; also save a grid of samples as a PNG.

    `progress(done, total)` is called after each image. Raises `DataError` only if the data set
    cannot be opened.
    """
    data = open_data(spec, task=task, need=())
    total = sum(len(source) for source in data.splits.values())
    samples: dict[str, list[_Sample]] = {split: [] for split in data.splits}
    sums = {split: np.zeros(len(data.classes), dtype=np.int64) for split in data.splits}
    done = 0
    for split, source in data.splits.items():
        for sample, shown in _look_at_all(source):
            samples[split].append(sample)
            sums[split][shown[0]] += shown[1]
            done += 1
            if progress is not None:
                progress(done, total)
    if grid_path is not None:
        draw_grid(data, Path(grid_path))
    return _report(data, samples, sums, grid_path)


def require_usable(data: Data, splits: Sequence[str] = ("train", "val")) -> None:
    """Raise `DataError` if no image of a split can be used; read no more than the first that can.

    An image that is broken, or of another size than its annotation, is left out in training: where
    that is all of them, nothing would be learned.
    """
    for split in splits:
        source, reasons = data.splits[split], []
        for index in range(len(source)):
            try:
                source.image(index), source.target(index)
            except ImageError as error:
                reasons.append(str(error))
            else:
                break
        if len(reasons) == len(source):
            raise DataError(
                f"{data.spec}: none of the {len(source)} images of {split} can be used; the first: "
                f"{reasons[0] if reasons else 'there is none'}; `meshuffle data check` lists them"
            )


def _look_at_all(source: ImageSource) -> Iterator[tuple[_Sample, _Shown]]:
    """Yield a sample per image and the classes that it shows, in order.

    It uses threads, because decoding releases the GIL.
    """
    chunk = 256
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for start in range(0, len(source), chunk):
            indices = range(start, min(start + chunk, len(source)))
            yield from pool.map(lambda index: _look_at(source, index), indices)


def _look_at(source: ImageSource, index: int) -> tuple[_Sample, _Shown]:
    name = source.name(index)
    try:
        content = source.content(index)
        digest = hashlib.blake2b(content, digest_size=16).digest()
        image = source.image(index)
        shown = _classes_in(source.target(index))
    except ImageError as error:
        return _Sample(name, b"", None, str(error)), (np.zeros(0, np.int64), 0)
    return _Sample(name, digest, image.size, None), shown


def _classes_in(target: Any) -> _Shown:
    """Return the classes of a target, and how often each is there: its boxes, otherwise once."""
    if isinstance(target, Boxes):
        return np.unique(target.labels, return_counts=True)
    if isinstance(target, np.ndarray) and target.ndim == 1:
        return target.nonzero()[0], 1
    present = np.unique(target)
    return present[present != VOID] if isinstance(target, np.ndarray) else present, 1


def _report(
    data: Data,
    samples: Mapping[str, list[_Sample]],
    sums: Mapping[str, NDArray[np.int64]],
    grid_path: Path | str | None,
) -> CheckReport:
    counts = {
        split: _counts(source, samples[split], sums[split], data.task)
        for split, source in data.splits.items()
    }
    absent = {
        split: tuple(name for name, count in of_split.items() if count == 0)
        for split, of_split in counts.items()
    }
    leaks, repeated = _duplicates(samples)
    everything = [sample for of_split in samples.values() for sample in of_split]
    sizes = sorted((s.size for s in everything if s.size), key=lambda size: size[0] * size[1])
    main = list(counts.get("train", next(iter(counts.values()))).values())
    return CheckReport(
        spec=data.spec,
        classes=data.classes,
        counts=counts,
        absent={split: names for split, names in absent.items() if names},
        unreadable=tuple((s.name, s.error) for s in everything if s.error is not None),
        leaks=tuple(leaks),
        repeated=tuple(repeated),
        ignored=data.ignored,
        smallest=sizes[0] if sizes else None,
        largest=sizes[-1] if sizes else None,
        imbalance=max(main) / min(main) if min(main) else None,
        grid=None if grid_path is None else str(grid_path),
        task=data.task,
        layout=data.layout,
        notices=data.notices,
        images={split: len(of_split) for split, of_split in samples.items()},
        ranges={key: _ranges(data.splits[key]) for key in data.splits if data.task == "regress"},
    )


def _ranges(source: ImageSource) -> dict[str, tuple[float, ...]]:
    """Return {target: (minimum, mean, maximum)}."""
    values = np.array([source.target(index) for index in range(len(source))], dtype=np.float64)
    rows = np.stack([values.min(0), values.mean(0), values.max(0)], axis=1).tolist()
    return dict(zip(source.classes, map(tuple, rows), strict=True))


def _counts(
    source: ImageSource, samples: list[_Sample], sums: NDArray[np.int64], task: str
) -> dict[str, int]:
    """Return {class: number}; `sums`: how often the targets show each class."""
    if task in ("classify", "generate"):
        found = np.bincount(source.labels, minlength=len(source.classes))
    elif task == "regress":
        found = np.full(len(source.classes), sum(sample.error is None for sample in samples))
    else:
        found = sums
    return dict(zip(source.classes, found.tolist(), strict=True))


def _duplicates(
    samples: Mapping[str, list[_Sample]],
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return pairs (first seen, duplicate) between splits and within one."""
    first: dict[bytes, tuple[str, str]] = {}
    leaks, repeated = [], []
    for split, of_split in samples.items():
        for sample in of_split:
            if sample.error is not None:
                continue
            home, name = first.setdefault(sample.digest, (split, sample.name))
            if home != split:
                leaks.append((name, sample.name))
            elif name != sample.name:
                repeated.append((name, sample.name))
    return leaks, repeated


def _size(size: tuple[int, int] | None) -> str:
    return "none" if size is None else f"{size[0]}×{size[1]}"


def _section(title: str, lines: list[str] | tuple[str, ...]) -> list[str]:
    if not lines:
        return []
    more = [f"  … and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return [f"{title}: {len(lines)}", *(f"  {line}" for line in lines[:_SHOWN]), *more]
