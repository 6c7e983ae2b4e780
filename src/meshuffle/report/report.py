"""`report.html`: what a run did, on one page that can be sent around.

The page reads from top to bottom as an engineer asks: how good, how did it get there, what
does it confuse, what do the mistakes look like, and how was it made. It is one file without
scripts and without external parts; the curves also lie in `plots/` as PNG.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from meshuffle.data import ImageSource
from meshuffle.files import write_bytes
from meshuffle.infer.evaluation import Evaluation
from meshuffle.report import page
from meshuffle.report.gallery import gallery_of
from meshuffle.report.pipeline_diagram import timeline_of
from meshuffle.report.plots import DARK, LIGHT, draw_chart, epoch_ticks, training_charts
from meshuffle.report.record import Record, flatten, loss_text, number, read_record
from meshuffle.report.sections import sections_of
from meshuffle.tasks import make_task
from meshuffle.tasks.base import Task
from meshuffle.tasks.card import Card

_MAX_ROWS = 20
_MUCH_WAIT = 0.05  # of the time; then decoding limits
_EPOCH_EVENT = re.compile(r"epoch \d+/\d+ ")  # what the curves already show


@dataclass(frozen=True)
class Number:
    """One number of the headline; without a value it was not recorded."""

    label: str
    value: str | None
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Skipped:
    """Inputs that could not be read: how many, some of their messages, and how many more."""

    count: int
    messages: Sequence[str]
    more: int


def write_report(
    run: Path, evaluation: Evaluation, source: ImageSource, card: Card, *, split: str = ""
) -> Path:
    """Write `report.html` and `plots/*.png` into the folder of a run; return the page's path.

    Args:
        run: the folder; any of its records may be missing, and the page then says so.
        evaluation: what the model did on `source`.
        source: the split's images; one that cannot be read gets a placeholder.
        card: of the weights that were evaluated.
        split: what to call the split, such as `test`.
    """
    record, task = read_record(run), make_task(card)
    gallery = gallery_of(evaluation, source, task)
    on_split = f" on the {split} split" if split else ""
    curves, absent_curves = _curves(record, task, run / "plots")
    evaluated = f"{evaluation.num_samples:,} images evaluated{on_split}"
    content = page.render(
        "report.html",
        model=task.built or card.model,
        data=card.data,
        run=record.name,
        size=f"{len(card.classes)} {task.answers} · {evaluated}",
        numbers=[*_accuracies(record, evaluation, task, split), *_efforts(record, card)],
        compared=list(_compared(record, task)),
        curves=curves,
        absent_curves=absent_curves if curves else [],
        timeline=timeline_of(run),
        sections=list(sections_of(task, evaluation, run / "plots", on_split)),
        metrics=_other_metrics(evaluation, task),
        on_split=on_split,
        worst=gallery.worst(),
        samples=gallery.samples(),
        skipped=_skipped(record, evaluation),
        plan=_plan(record),
        environment=list(flatten(record.env)),
        events=_events(record),
        config=record.config.expandtabs(4).splitlines(),
        written=f"{datetime.now():%Y-%m-%d %H:%M}",
    )
    write_bytes(run / "report.html", content.encode())
    return run / "report.html"


def _compared(record: Record, task: Task) -> Iterator[tuple[str, ...]]:
    """Yield the metrics before and after of a run that began from other weights."""
    listed = record.result.get("compared")
    for entry in listed if isinstance(listed, list) else []:
        if not isinstance(entry, Mapping):
            continue
        where = f"{entry.get('data')} {entry.get('split')}"
        for metric in task.metrics:
            before, after = (
                number((entry.get(when) or {}).get(metric.key)) for when in ("before", "after")
            )
            if before is not None and after is not None:
                yield where, metric.label, metric.number(before), metric.number(after)


def _other_metrics(evaluation: Evaluation, task: Task) -> list[tuple[str, str]]:
    """Return all metrics, where the task has others than those of the headline."""
    shown = {"loss", *(metric.key for metric in task.metrics)}
    if not evaluation.metrics.keys() - shown:
        return []
    return [(key, f"{value:.5g}") for key, value in evaluation.metrics.items()]


def _accuracies(record: Record, evaluation: Evaluation, task: Task, split: str) -> Iterator[Number]:
    first, *others = task.metrics
    splits = {**record.splits}
    if evaluation.metrics and (split or not splits):
        splits[split or "evaluated"] = evaluation.metrics
    for name, metrics in sorted(splits.items(), key=lambda item: item[0] != "test"):
        known = [(metric, number(metrics.get(metric.key))) for metric in others]
        notes = [metric.text(value) for metric, value in known if value is not None]
        if (loss := number(metrics.get("loss"))) is not None:
            notes.append(f"loss {loss_text(loss)}")
        value = number(metrics.get(first.key))
        shown = None if value is None else f"{value:.{first.digits}f}"
        yield Number(f"{name} {first.label}", shown, first.unit, " · ".join(notes))
    if not splits:
        yield Number(first.label, None)


def _efforts(record: Record, card: Card) -> Iterator[Number]:
    done = [e for row in record.epochs if (e := number(row.get("epoch"))) is not None]
    best = number(record.result.get("best_epoch"))
    note = "" if best is None else f"best: {best:g}"
    epochs = f"{max(done):g}" if done else str(card.epoch) if card.epoch else None
    yield Number("epochs", epochs, "", note)
    yield Number("training time", *_duration(record.seconds))
    rate, wait = record.images_per_s, record.data_wait or 0.0
    note = f"waited for data {page.percent(wait)} of the time" if wait > _MUCH_WAIT else ""
    yield Number("images per second", None if rate is None else f"{rate:,.0f}", "", note)


def _duration(seconds: float | None) -> tuple[str | None, str]:
    """Return (value, unit) with three figures or so: 43.1 s, 12.5 min, 3.42 h."""
    if seconds is None:
        return None, ""
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g}", unit
    return f"{seconds:.3g}", "s"


def _curves(record: Record, task: Task, folder: Path) -> tuple[list[page.Picture], list[str]]:
    """Return the curves that were recorded, also drawn into `folder`, and the titles of others."""
    pictures, absent = [], []
    ticks = epoch_ticks(record)
    for chart in training_charts(record, task):
        if chart.is_empty:
            absent.append(chart.title.lower().removesuffix(", %"))
            continue
        light, dark = (draw_chart(chart, ticks, theme) for theme in (LIGHT, DARK))
        write_bytes(folder / f"{chart.name}.png", light)
        pictures.append(page.Picture.of(light, dark, f"{chart.title} over the training"))
    return pictures, absent


def _skipped(record: Record, evaluation: Evaluation) -> Skipped:
    """Return the inputs that training or this evaluation could not read."""
    listed = record.result.get("skipped")
    training = [str(entry) for entry in listed] if isinstance(listed, list) else []
    messages = list(dict.fromkeys([*training, *evaluation.skipped]))
    count = max(len(messages), int(number(record.result.get("skipped_inputs")) or 0))
    shown = messages[: 2 * _MAX_ROWS]
    return Skipped(count, shown, count - len(shown))


def _plan(record: Record) -> list[tuple[str, str]]:
    pairs = list(flatten(record.plan))
    for key, label in (
        ("predicted_step_ms", "predicted step"),
        ("measured_step_ms", "measured step"),
    ):
        if (value := number(record.result.get(key))) is not None:
            pairs.append((label, f"{value:,.1f} ms"))
    return pairs


def _events(record: Record) -> list[tuple[str, str]]:
    rows = []
    for event in record.events:
        message = str(event.get("text", ""))
        if not _EPOCH_EVENT.match(message):
            at = number(event.get("time"))
            when = "" if at is None else f"{datetime.fromtimestamp(at):%Y-%m-%d %H:%M:%S}"
            rows.append((when, message))
    return rows[-2 * _MAX_ROWS :]
