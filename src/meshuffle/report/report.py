"""`report.html`: what a run did, on one page that can be sent around.

The page reads from top to bottom as an engineer asks: how good, how did it get there, what
does it confuse, what do the mistakes look like, and how was it made. It is one file without
scripts and without external parts; the curves also lie in `plots/` as PNG.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path

from meshuffle.data import ImageSource
from meshuffle.files import write_bytes
from meshuffle.infer.evaluate import Evaluation
from meshuffle.report import page
from meshuffle.report.gallery import gallery_of
from meshuffle.report.page import section, text
from meshuffle.report.pipeline_diagram import timeline_section
from meshuffle.report.plots import DARK, LIGHT, draw_chart, epoch_ticks, training_charts
from meshuffle.report.record import Record, flatten, loss_text, number, read_record
from meshuffle.report.sections import sections_of
from meshuffle.tasks import make_task
from meshuffle.tasks.base import Task
from meshuffle.tasks.card import Card

_MAX_ROWS = 20
_MUCH_WAIT = 0.05  # of the time; then decoding limits
_EPOCH_EVENT = re.compile(r"epoch \d+/\d+ ")  # what the curves already show


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
    record = read_record(run)
    task = make_task(card)
    gallery = gallery_of(evaluation, source, task)
    body = "\n".join(
        (
            _headline(record, evaluation, task, split),
            _compared(record, task),
            section("Training", _curves(record, task, run / "plots")),
            timeline_section(run),
            _details(evaluation, task, run / "plots", split),
            section(gallery.worst_title, gallery.worst()),
            section("Sample predictions", gallery.samples()),
            section("Skipped images", _skipped(record, evaluation)),
            '<div class="columns">',
            section("Plan", _plan(record)),
            section("Environment", page.facts(flatten(record.env))),
            "</div>",
            section("Events", _events(record)),
            section("Configuration", page.block(record.config) if record.config else ""),
            f"<footer>Written by Meshuffle, {datetime.now():%Y-%m-%d %H:%M}.</footer>",
        )
    )
    path, title = run / "report.html", task.built or card.model
    if card.data:
        title += f" on {card.data}"
    write_bytes(path, page.page(title, body).encode())
    return path


def _on(split: str) -> str:
    return f" on the {split} split" if split else ""


def _compared(record: Record, task: Task) -> str:
    """Return what a run that began from other weights made of them; of others nothing."""
    listed = record.result.get("compared")
    rows = []
    for entry in listed if isinstance(listed, list) else []:
        if not isinstance(entry, Mapping):
            continue
        where = f"{entry.get('data')} {entry.get('split')}"
        for metric in task.metrics:
            before, after = (
                number((entry.get(when) or {}).get(metric.key)) for when in ("before", "after")
            )
            if before is not None and after is not None:
                numbers = (metric.number(before), metric.number(after))
                rows.append((text(where), text(metric.label), *map(text, numbers)))
    if not rows:
        return ""
    head = ("images", "metric", "before", "after")
    return section("Before and after", page.table(head, rows, 2))


def _details(evaluation: Evaluation, task: Task, folder: Path, split: str) -> str:
    """Return what the task has to say beyond the metrics of the headline."""
    own = sections_of(task, evaluation, folder, _on(split))
    shown = [section(title, html) for title, html in own]
    if evaluation.metrics.keys() - {"loss", *(metric.key for metric in task.metrics)}:
        rows = [(text(key), f"{value:.5g}") for key, value in evaluation.metrics.items()]
        shown.append(section(f"Metrics{_on(split)}", page.table(("metric", "value"), rows, 1)))
    return "".join(shown)


def _headline(record: Record, evaluation: Evaluation, task: Task, split: str) -> str:
    card = task.card
    data = f" <span>on</span> {text(card.data)}" if card.data else ""
    evaluated = f"{evaluation.num_samples:,} images evaluated{_on(split)}"
    size = f"{len(card.classes)} {task.answers} · {evaluated}"
    return (
        f"<header><h1>{text(task.built or card.model)}{data}</h1>"
        f'<p class="note">{text(record.name)} · {text(size)}</p>'
        f'<dl class="big">{"".join(_accuracies(record, evaluation, task, split))}'
        f"{''.join(_efforts(record, card))}</dl></header>"
    )


def _accuracies(record: Record, evaluation: Evaluation, task: Task, split: str) -> Iterator[str]:
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
        yield _big(f"{name} {first.label}", shown, first.unit, " · ".join(notes))
    if not splits:
        yield _big(first.label, None)


def _efforts(record: Record, card: Card) -> Iterator[str]:
    done = [e for row in record.epochs if (e := number(row.get("epoch"))) is not None]
    best = number(record.result.get("best_epoch"))
    note = "" if best is None else f"best: {best:g}"
    epochs = f"{max(done):g}" if done else str(card.epoch) if card.epoch else None
    yield _big("epochs", epochs, "", note)
    yield _big("training time", *_duration(record.seconds))
    rate, wait = record.images_per_s, record.data_wait or 0.0
    note = f"waited for data {page.percent(wait)} of the time" if wait > _MUCH_WAIT else ""
    yield _big("images per second", None if rate is None else f"{rate:,.0f}", "", note)


def _big(label: str, value: str | None, unit: str = "", note: str = "") -> str:
    if value is None:
        value, note = "–", "not recorded"
    return (
        f'<div><dt>{text(label)}</dt><dd>{text(value)} <span class="unit">{text(unit)}</span>'
        f"<small>{text(note)}</small></dd></div>"
    )


def _duration(seconds: float | None) -> tuple[str | None, str]:
    """Return (value, unit) with three figures or so: 43.1 s, 12.5 min, 3.42 h."""
    if seconds is None:
        return None, ""
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g}", unit
    return f"{seconds:.3g}", "s"


def _curves(record: Record, task: Task, folder: Path) -> str:
    pictures, missing = [], []
    ticks = epoch_ticks(record)
    for chart in training_charts(record, task):
        if chart.is_empty:
            missing.append(chart.title.lower().removesuffix(", %"))
            continue
        light, dark = (draw_chart(chart, ticks, theme) for theme in (LIGHT, DARK))
        write_bytes(folder / f"{chart.name}.png", light)
        pictures.append(page.picture(light, dark, f"{chart.title} over the training"))
    if not pictures:
        return ""
    note = f'<p class="missing">not recorded: {text(", ".join(missing))}</p>' if missing else ""
    return f'<div class="charts">{"".join(pictures)}</div>{note}'


def _skipped(record: Record, evaluation: Evaluation) -> str:
    inputs = record.result.get("skipped_inputs")
    listed = [str(entry) for entry in inputs] if isinstance(inputs, list | tuple) else []
    messages = list(dict.fromkeys([*listed, *evaluation.skipped]))
    counted = number(inputs)
    total = max(len(messages), int(counted or 0))
    if not total:
        return '<p class="note">None.</p>'
    items = "".join(f"<li>{text(message)}</li>" for message in messages[: 2 * _MAX_ROWS])
    more = total - min(len(messages), 2 * _MAX_ROWS)
    note = f'<p class="note">and {more:,} more</p>' if items and more else ""
    return f'<p class="note">{total:,} could not be read.</p><ul>{items}</ul>{note}'


def _plan(record: Record) -> str:
    pairs = list(flatten(record.plan))
    for key, label in (
        ("predicted_step_ms", "predicted step"),
        ("measured_step_ms", "measured step"),
    ):
        if (value := number(record.result.get(key))) is not None:
            pairs.append((label, f"{value:,.1f} ms"))
    return page.facts(pairs)


def _events(record: Record) -> str:
    rows = []
    for event in record.events:
        said = str(event.get("text", ""))
        if not _EPOCH_EVENT.match(said):
            at = number(event.get("time"))
            when = "" if at is None else f"{datetime.fromtimestamp(at):%Y-%m-%d %H:%M:%S}"
            rows.append((text(when), text(said)))
    return page.table(("time", "event"), rows[-2 * _MAX_ROWS :]) if rows else ""
