"""The pictures of a report, as PNG: training curves and the confusion matrix.

Figures are made without pyplot and settings are given to each artist, so that no global state
of matplotlib changes.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from meshuffle.report.record import Record, number, series
from meshuffle.tasks.base import Metric, Task

_WIDTH, _HEIGHT, _DPI = 4.8, 2.8, 200  # inches: 500 px on a page, at twice its resolution
_MAX_POINTS = 400
_LOG_FROM = 30.0  # ratio of the largest to the smallest value


@dataclass(frozen=True)
class Theme:
    """Colours for one background. `lines`: of train, val and best."""

    paper: str
    ink: str
    muted: str
    grid: str
    lines: tuple[str, str, str]


LIGHT = Theme("#ffffff", "#1b1f24", "#667080", "#e6e9ee", ("#2563eb", "#d9730d", "#1b1f24"))
DARK = Theme("none", "#e4e7eb", "#98a2b3", "#2b323c", ("#6ea8fe", "#f5a94b", "#e4e7eb"))


@dataclass(frozen=True)
class Line:
    """One line of a chart; `x` in steps. `colour` indexes `Theme.lines`; faint for raw steps."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    faint: bool = False


@dataclass(frozen=True)
class Chart:
    """What one picture shows. `name`: of its file; `best`: the step to mark, if any."""

    name: str
    title: str
    lines: tuple[Line, ...]
    digits: int = 3
    may_be_log: bool = False
    from_zero: bool = False
    best: float | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing was recorded for it."""
        return not any(line.x for line in self.lines)


def training_charts(record: Record, task: Task) -> tuple[Chart, ...]:
    """Return loss, the first metric, learning rate and throughput over the steps of a run."""
    epochs, steps, best = record.epochs, record.steps, _best_step(record)
    return (
        Chart(
            "loss",
            "Loss",
            (
                Line("", *series(steps, "step", "loss"), faint=True),
                Line("train", *series(epochs, "step", "train_loss")),
                Line("val", *series(epochs, "step", "val_loss"), colour=1),
            ),
            may_be_log=True,
            best=best,
        ),
        Chart(
            "accuracy",
            _titled(task.metrics[0]),
            (
                Line("train", *series(epochs, "step", f"train_{task.metrics[0].key}")),
                Line("val", *series(epochs, "step", f"val_{task.metrics[0].key}"), colour=1),
            ),
            digits=4,
            best=best,
        ),
        Chart("learning_rate", "Learning rate", (_finest(record, "lr"),)),
        Chart(
            "throughput", "Images per second", (_finest(record, "images_per_s"),), from_zero=True
        ),
    )


def _titled(metric: Metric) -> str:
    label = metric.label
    if label[1:2].islower() or label[1:2] == "-":  # but mAP, mIoU
        label = label[:1].upper() + label[1:]
    label = f"{label} accuracy" if metric.key == "top1" else label
    return f"{label}, {metric.unit}" if metric.unit else label


def epoch_ticks(record: Record) -> tuple[list[float], list[str]]:
    """Return the steps at which round epochs ended, and the numbers of those epochs."""
    steps, epochs = series(record.epochs, "step", "epoch")
    if not epochs:
        return [], []
    if len(epochs) == 1:
        return steps, [f"{epochs[0]:g}"]
    wanted = MaxNLocator(nbins=7, integer=True).tick_values(epochs[0], epochs[-1])
    ticks = [tick for tick in wanted if epochs[0] <= tick <= epochs[-1] and tick == round(tick)]
    return np.interp(ticks, epochs, steps).tolist(), [f"{tick:g}" for tick in ticks]


def draw_chart(chart: Chart, ticks: tuple[list[float], list[str]], theme: Theme) -> bytes:
    """Return the PNG of one chart. `ticks`: what `epoch_ticks` returns; without, it shows steps."""
    figure = Figure(figsize=(_WIDTH, _HEIGHT), dpi=_DPI, facecolor=theme.paper)
    axes = figure.add_axes((0.115, 0.16, 0.855, 0.69))
    for line in chart.lines:
        _draw_line(axes, line, chart.digits, theme)
    _mark_best(axes, chart, theme)
    if chart.may_be_log and _spans_decades(chart):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(_power))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    elif chart.from_zero:
        axes.set_ylim(0, 1.1 * max(max(line.y) for line in chart.lines if line.y) or 1)
    if ticks[0]:
        axes.set_xticks(*ticks)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
    axes.set_xlabel("epoch" if ticks[0] else "step", color=theme.muted, fontsize=8.5)
    _dress(axes, theme)
    axes.set_xlim(0, 1.01 * max(max(line.x) for line in chart.lines if line.x))
    _title(figure, chart.title, theme)
    return png(figure)


def draw_confusion(confusion: NDArray[np.int64], names: Sequence[str]) -> bytes:
    """Return the PNG of a confusion matrix [C, C] (rows true, columns predicted) with counts."""
    side = len(names)
    inches = max(3.2, 1.4 + 0.34 * side)
    figure = Figure(figsize=(inches, inches), dpi=_DPI / 1.25, facecolor="white", layout="tight")
    axes = figure.add_subplot()
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    axes.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1.15)
    for row, column in np.argwhere(confusion):
        colour = "white" if shares[row, column] > 0.4 else LIGHT.ink
        text = str(confusion[row, column])
        axes.text(column, row, text, color=colour, fontsize=7, ha="center", va="center")
    # Class names are not ours: a $ in one must not start a formula.
    axes.set_xticks(range(side), names, rotation=90, fontsize=8, parse_math=False)
    axes.set_yticks(range(side), names, fontsize=8, parse_math=False)
    axes.set_xlabel("predicted", color=LIGHT.muted, fontsize=9)
    axes.set_ylabel("true", color=LIGHT.muted, fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return png(figure)


def _finest(record: Record, column: str) -> Line:
    """Take the logged steps where there are some, otherwise the epochs."""
    x, y = series(record.steps, "step", column)
    return Line("", x, y) if len(x) > 1 else Line("", *series(record.epochs, "step", column))


def _best_step(record: Record) -> float | None:
    best = number(record.result.get("best_epoch"))
    for row in record.epochs:
        if best is not None and number(row.get("epoch")) == best:
            return number(row.get("step"))
    return None


def _draw_line(axes: Axes, line: Line, digits: int, theme: Theme) -> None:
    if not line.x:
        return
    x, y = _thinned(np.asarray(line.x), np.asarray(line.y))
    axes.plot(
        x,
        y,
        color=theme.lines[line.colour],
        label=f"{line.label} {line.y[-1]:.{digits}g}" if line.label else None,
        linewidth=0.8 if line.faint else 1.6,
        alpha=0.35 if line.faint else 1.0,
        marker="o" if len(x) == 1 else None,
        markersize=4,
        solid_capstyle="round",
    )


def _mark_best(axes: Axes, chart: Chart, theme: Theme) -> None:
    """Put a dot on the val line at the step whose weights were kept."""
    for line in chart.lines:
        if line.label == "val" and chart.best is not None and chart.best in line.x:
            y = line.y[list(line.x).index(chart.best)]
            axes.plot(
                [chart.best], [y], "o", markersize=5, label="best", clip_on=False, zorder=5,
                markerfacecolor="none", markeredgecolor=theme.lines[2],
            )  # fmt: skip


def _title(figure: Figure, title: str, theme: Theme) -> None:
    """Put the title and the legend on one line above the axes."""
    middle = 0.93
    style: dict[str, Any] = {
        "color": theme.ink,
        "fontsize": 10,
        "fontweight": "bold",
        "va": "center",
    }
    figure.text(0.02, middle, title, **style)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if labels:
        figure.legend(
            handles, labels, loc="center right", bbox_to_anchor=(0.995, middle), ncols=3,
            frameon=False, fontsize=8.5, labelcolor=theme.ink, handlelength=1.1,
            columnspacing=1.4, borderpad=0, borderaxespad=0,
        )  # fmt: skip


def _thinned(
    x: NDArray[np.float64], y: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Average neighbours until at most `_MAX_POINTS` points are left."""
    if len(x) <= _MAX_POINTS:
        return x, y
    starts = np.linspace(0, len(x), _MAX_POINTS, endpoint=False).astype(int)
    counts = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts


def _spans_decades(chart: Chart) -> bool:
    values = [value for line in chart.lines for value in line.y]
    return min(values) > 0 and max(values) / min(values) >= _LOG_FROM


def _power(value: float, _: int) -> str:
    """Return 1000 as "1000" and 10⁶ as "1e6"."""
    return f"{value:g}".replace("e+0", "e").replace("e-0", "e-")


def _thousands(value: float, _: int) -> str:
    """Return 500 as "500" and 150000 as "150k"."""
    return f"{value / 1000:g}k" if value >= 10_000 else f"{value:g}"


def _dress(axes: Axes, theme: Theme) -> None:
    axes.set_facecolor("none")
    axes.grid(True, axis="y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(theme.muted)
    axes.tick_params(colors=theme.muted, labelsize=8.5, length=0, pad=5)
    axes.tick_params(which="minor", length=0)
    axes.margins(x=0.02)


def png(figure: Figure) -> bytes:
    """Return the PNG of a figure."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        # A class name in a script that matplotlib's font lacks shows as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(file, format="png", facecolor=figure.get_facecolor())
    return file.getvalue()
