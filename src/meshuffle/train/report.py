"""`report.html`: what a run did, on one page that can be sent around.

The page reads from top to bottom as an engineer asks: how good, how did it get there, what
does it confuse, what do the mistakes look like, and how was it made. It is one file without
scripts and without external parts; the curves also lie in `plots/` as PNG.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path

import numpy as np

from meshuffle.data import ImageSource
from meshuffle.errors import ImageError
from meshuffle.train import page
from meshuffle.train.diagram import timeline_section
from meshuffle.train.evaluate import Evaluation
from meshuffle.train.files import replaced
from meshuffle.train.page import section, text
from meshuffle.train.plots import (
    DARK,
    LIGHT,
    draw_chart,
    draw_confusion,
    epoch_ticks,
    training_charts,
)
from meshuffle.train.record import Record, flatten, number, read_record
from meshuffle.train.weights import Card

MAX_MATRIX_CLASSES = 40
_NUM_CARDS = 16
_MAX_ROWS = 20
_SEED = 0  # of the sample predictions: the same images in every report on the same split
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
    names = tuple(card.titles.get(name, name) for name in evaluation.classes)
    gallery = _Gallery(evaluation, source, names)
    body = "\n".join(
        (
            _headline(record, evaluation, card, split),
            section("Training", _curves(record, run / "plots")),
            timeline_section(run),
            section(f"Confusion{_on(split)}", _confusion(evaluation, names, run / "plots")),
            section("Worst mistakes", gallery.mistakes()),
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
    path, title = run / "report.html", " on ".join(filter(None, (card.model, card.data)))
    with replaced(path) as temporary:
        temporary.write_bytes(page.page(title, body).encode())
    return path


def _on(split: str) -> str:
    return f" on the {split} split" if split else ""


def _headline(record: Record, evaluation: Evaluation, card: Card, split: str) -> str:
    data = f" <span>on</span> {text(card.data)}" if card.data else ""
    size = f"{len(card.classes)} classes · {evaluation.num_samples:,} images evaluated{_on(split)}"
    return (
        f"<header><h1>{text(card.model)}{data}</h1>"
        f'<p class="note">{text(record.name)} · {text(size)}</p>'
        f'<dl class="big">{"".join(_accuracies(record, evaluation, split))}'
        f"{''.join(_efforts(record, card))}</dl></header>"
    )


def _accuracies(record: Record, evaluation: Evaluation, split: str) -> Iterator[str]:
    splits = {**record.splits}
    if evaluation.metrics and (split or not splits):
        splits[split or "evaluated"] = evaluation.metrics
    for name, metrics in sorted(splits.items(), key=lambda item: item[0] != "test"):
        notes = []
        if (top5 := number(metrics.get("top5"))) is not None:
            notes.append(f"top-5 {top5:.2f} %")
        if (loss := number(metrics.get("loss"))) is not None:
            notes.append(f"loss {loss:.4f}")
        top1 = number(metrics.get("top1"))
        yield _big(f"{name} top-1", None if top1 is None else f"{top1:.2f}", "%", " · ".join(notes))
    if not splits:
        yield _big("top-1", None)


def _efforts(record: Record, card: Card) -> Iterator[str]:
    done = [e for row in record.epochs if (e := number(row.get("epoch"))) is not None]
    best = number(record.result.get("best_epoch"))
    note = "" if best is None else f"best: {best:g}"
    epochs = f"{max(done):g}" if done else str(card.epoch) if card.epoch else None
    yield _big("epochs", epochs, "", note)
    yield _big("training time", *_duration(record.seconds))
    rate = record.images_per_s
    yield _big("images per second", None if rate is None else f"{rate:,.0f}")


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


def _curves(record: Record, folder: Path) -> str:
    pictures, missing = [], []
    ticks = epoch_ticks(record)
    for chart in training_charts(record):
        if chart.is_empty:
            missing.append(chart.title.lower())
            continue
        light, dark = (draw_chart(chart, ticks, theme) for theme in (LIGHT, DARK))
        _write_png(folder / f"{chart.name}.png", light)
        pictures.append(page.picture(light, dark, f"{chart.title} over the training"))
    if not pictures:
        return ""
    note = f'<p class="missing">not recorded: {text(", ".join(missing))}</p>' if missing else ""
    return f'<div class="charts">{"".join(pictures)}</div>{note}'


def _write_png(path: Path, content: bytes) -> None:
    with replaced(path) as temporary:
        temporary.write_bytes(content)


def _confusion(evaluation: Evaluation, names: tuple[str, ...], folder: Path) -> str:
    if not evaluation.num_samples:
        return ""
    confusion = evaluation.confusion
    if len(names) > MAX_MATRIX_CLASSES:
        left = _confused_pairs(confusion, names)
    else:
        short = [page.printable(name)[:24] for name in names]
        _write_png(folder / "confusion.png", draw_confusion(confusion, short))
        left = _matrix(confusion, names)
    return f'<div class="pair"><div>{left}</div><div>{_per_class(confusion, names)}</div></div>'


def _matrix(confusion: np.ndarray, names: tuple[str, ...]) -> str:
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    levels = np.ceil(9 * np.sqrt(shares)).astype(int)
    rows = []
    for row, name in enumerate(names):
        cells = "".join(
            f'<td class="{"h" if row == column else "m"}{levels[row, column]}">{count}</td>'
            if count
            else "<td></td>"
            for column, count in enumerate(confusion[row].tolist())
        )
        rows.append(f'<tr><th scope="row" title="{text(name)}">{text(name)}</th>{cells}</tr>')
    head = "".join(f'<th scope="col"><span>{text(name)}</span></th>' for name in names)
    is_wide = len(names) > 15
    kind = " wide" if is_wide else ""
    kind += " tall" if max(map(len, names)) > (2 if is_wide else 4) else ""
    return (
        '<h3>Rows: true. Columns: predicted.</h3><div class="scroll">'
        f'<table class="matrix{kind}"><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _confused_pairs(confusion: np.ndarray, names: tuple[str, ...]) -> str:
    errors = confusion.copy()
    np.fill_diagonal(errors, 0)
    totals = confusion.sum(1)
    order = np.argsort(-errors, axis=None, kind="stable")[:_MAX_ROWS]
    pairs = [divmod(int(flat), len(names)) for flat in order]
    rows = [
        (
            text(names[i]),
            text(names[j]),
            f"{errors[i, j]:,}",
            page.percent(errors[i, j] / totals[i]),
        )
        for i, j in pairs
        if errors[i, j]
    ]
    head = ("true", "predicted", "images", "of the class")
    title = f"<h3>Most confused pairs of {len(names):,} classes</h3>"
    return title + (page.table(head, rows, 2) if rows else '<p class="note">none</p>')


def _per_class(confusion: np.ndarray, names: tuple[str, ...]) -> str:
    totals, hits = confusion.sum(1), confusion.diagonal()
    present = np.flatnonzero(totals)
    shares = hits[present] / totals[present]
    order = np.argsort(shares, kind="stable")
    rows = [
        (
            text(names[present[k]]),
            f'<div class="bar"><i style="width:{100 * shares[k]:.1f}%"></i></div>',
            f"{100 * shares[k]:.1f} %",
            f"{hits[present[k]]:,} / {totals[present[k]]:,}",
        )
        for k in order[:_MAX_ROWS]
    ]
    notes = []
    if rest := len(present) - len(rows):
        notes.append(f"{rest:,} more classes at {100 * shares[order[_MAX_ROWS]]:.1f} % or above")
    if absent := len(names) - len(present):
        notes.append(f"{absent:,} classes without images here")
    note = f'<p class="note">{"; ".join(notes)}</p>' if notes else ""
    head = ("class", "", "top-1", "images")
    return f"<h3>Accuracy per class, worst first</h3>{page.table(head, rows, 2)}{note}"


class _Gallery:
    """Cards of single images: the picture, what it was taken for, and what it is."""

    def __init__(self, evaluation: Evaluation, source: ImageSource, names: tuple[str, ...]) -> None:
        self.evaluation, self.source, self.names = evaluation, source, names
        self.wrong = evaluation.top_classes[:, 0] != evaluation.labels

    def mistakes(self) -> str:
        """Return the wrong predictions with the highest loss."""
        rows = np.flatnonzero(self.wrong)
        if not len(rows):
            count = self.evaluation.num_samples
            return f'<p class="note">No mistake on {count:,} images.</p>' if count else ""
        # Negated, so that a loss that is not a number still sorts last.
        order = np.argsort(-self.evaluation.losses[rows], kind="stable")
        note = f'<p class="note">{len(rows):,} of {self.evaluation.num_samples:,} images wrong'
        shown = f", the {_NUM_CARDS} with the highest loss" if len(rows) > _NUM_CARDS else ""
        meaning = "Percentages are the probabilities that the model gives."
        return f"{note}{shown}. {meaning}</p>{self._cards(rows[order[:_NUM_CARDS]])}"

    def samples(self) -> str:
        """Return some images, drawn with a fixed seed, in their order."""
        count = self.evaluation.num_samples
        drawn = np.random.default_rng(_SEED).permutation(count)[:_NUM_CARDS]
        return self._cards(np.sort(drawn)) if count else ""

    def _cards(self, rows: Iterable[int]) -> str:
        return f'<div class="cards">{"".join(self._card(int(row)) for row in rows)}</div>'

    def _card(self, row: int) -> str:
        evaluation, wrong = self.evaluation, bool(self.wrong[row])
        index = int(evaluation.indices[row])
        guess, true = self.names[evaluation.top_classes[row, 0]], self.names[evaluation.labels[row]]
        guessed = page.percent(float(evaluation.top_probabilities[row, 0]))
        # The loss is −ln of the true class's probability.
        truly = page.percent(float(np.exp(-evaluation.losses[row])))
        name = self.source.name(index)
        said = _verdict("✗ " if wrong else "✓ ", guess, guessed)
        second = f"<div>{_verdict('is ', true, truly)}</div>" if wrong else ""
        return (
            f'<figure class="{"wrong" if wrong else "right"}">{self._frame(index)}<figcaption>'
            f'<div class="said">{said}</div>{second}<div class="name" title="{text(name)}">'
            f"<span>{text(_short(name))}</span></div>"
            "</figcaption></figure>"
        )

    def _frame(self, index: int) -> str:
        try:
            image = self.source.image(index)
        except ImageError:
            return '<div class="frame">cannot be read</div>'
        return f'<div class="frame"><img src="{page.thumbnail(image)}" alt=""></div>'


def _verdict(word: str, name: str, probability: str) -> str:
    return f'<span title="{text(name)}">{word}<b>{text(name)}</b></span><span>{probability}</span>'


def _short(name: str) -> str:
    """Keep the folder and the file of a path."""
    return "/".join(Path(name).parts[-2:])


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
