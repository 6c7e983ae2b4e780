"""Cards of single images for the report: the picture, what was said of it, and what is true."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from meshuffle.data import ImageSource
from meshuffle.errors import ImageError
from meshuffle.infer.evaluate import Evaluation
from meshuffle.report import page
from meshuffle.report.page import text
from meshuffle.tasks.base import Task

_NUM_CARDS = 16
_LARGE = 400  # pixels of the long side of a picture with something drawn in it
_SEED = 0  # of the sample predictions: the same images in every report on the same split


def gallery_of(evaluation: Evaluation, source: ImageSource, task: Task) -> Gallery:
    """Return the cards that suit the task."""
    kind = LabelGallery if task.name == "classify" else Gallery
    return kind(evaluation, source, task)


class Gallery:
    """Cards with what the task says and draws."""

    worst_title = "Largest losses"

    def __init__(self, evaluation: Evaluation, source: ImageSource, task: Task) -> None:
        self.evaluation, self.source, self.task = evaluation, source, task
        self.rows = evaluation.rows

    def worst(self) -> str:
        """Return the samples with the highest loss."""
        # Negated, so that a loss that is not a number still sorts last.
        losses = self.rows.get("losses", np.zeros(0))
        return self._cards(np.argsort(-losses, kind="stable")[:_NUM_CARDS]) if len(losses) else ""

    def samples(self) -> str:
        """Return some images, drawn with a fixed seed, in their order."""
        count = self.evaluation.num_samples
        drawn = np.random.default_rng(_SEED).permutation(count)[:_NUM_CARDS]
        return self._cards(np.sort(drawn)) if count else ""

    def _cards(self, rows: Iterable[int]) -> str:
        size = " large" if self.task.dense else ""
        return f'<div class="cards{size}">{"".join(self._card(int(row)) for row in rows)}</div>'

    def _card(self, row: int) -> str:
        index = int(self.evaluation.indices[row])
        name = self.source.name(index)
        frame, size = self._frame(index, row)
        kind, said = self._caption(row, size)
        return (
            f'<figure class="{kind}">{frame}<figcaption>{said}'
            f'<div class="name" title="{text(name)}"><span>{text(_short(name))}</span></div>'
            "</figcaption></figure>"
        )

    def _frame(self, index: int, row: int) -> tuple[str, tuple[int, int]]:
        """Return the picture, and the (width, height) of its image."""
        try:
            image = self.source.image(index)
            truth = self.source.target(index) if self.task.dense else None
        except ImageError:
            return '<div class="frame">cannot be read</div>', (1, 1)
        shown = self.task.picture(image, self.rows, row, truth) if self.task.dense else image
        uri = page.thumbnail(shown, _LARGE) if self.task.dense else page.thumbnail(shown)
        return f'<div class="frame"><img src="{uri}" alt=""></div>', image.size

    def _caption(self, row: int, size: tuple[int, int]) -> tuple[str, str]:
        """Return the card's class and its lines."""
        said = self.task.sentence(self.task.prediction(self.rows, row, size))
        lines = f'<div class="said"><span title="{text(said)}">{text(said)}</span></div>'
        if true := self.task.truth(self.rows, row):
            lines += f'<div><span title="{text(true)}">is {text(true)}</span></div>'
        return "right", lines


class LabelGallery(Gallery):
    """Cards that tell right from wrong, with both probabilities."""

    worst_title = "Worst mistakes"

    def __init__(self, evaluation: Evaluation, source: ImageSource, task: Task) -> None:
        super().__init__(evaluation, source, task)
        titles = task.card.titles
        self.names = tuple(titles.get(name, name) for name in evaluation.classes)
        top = self.rows.get("top_classes", np.zeros((0, 1), np.int64))
        self.wrong = top[:, 0] != self.rows.get("labels", np.zeros(0, np.int64))

    def worst(self) -> str:
        """Return the wrong predictions with the highest loss."""
        rows = np.flatnonzero(self.wrong)
        count = self.evaluation.num_samples
        if not len(rows):
            return f'<p class="note">No mistake on {count:,} images.</p>' if count else ""
        order = np.argsort(-self.rows["losses"][rows], kind="stable")
        note = f'<p class="note">{len(rows):,} of {count:,} images wrong'
        shown = f", the {_NUM_CARDS} with the highest loss" if len(rows) > _NUM_CARDS else ""
        meaning = "Percentages are the probabilities that the model gives."
        return f"{note}{shown}. {meaning}</p>{self._cards(rows[order[:_NUM_CARDS]])}"

    def _caption(self, row: int, size: tuple[int, int]) -> tuple[str, str]:
        rows, wrong = self.rows, bool(self.wrong[row])
        guess, true = self.names[rows["top_classes"][row, 0]], self.names[rows["labels"][row]]
        guessed = page.percent(float(rows["top_probabilities"][row, 0]))
        # The loss is −ln of the true class's probability.
        truly = page.percent(float(np.exp(-rows["losses"][row])))
        said = _verdict("✗ " if wrong else "✓ ", guess, guessed)
        second = f"<div>{_verdict('is ', true, truly)}</div>" if wrong else ""
        return "wrong" if wrong else "right", f'<div class="said">{said}</div>{second}'


def _verdict(word: str, name: str, probability: str) -> str:
    return f'<span title="{text(name)}">{word}<b>{text(name)}</b></span><span>{probability}</span>'


def _short(name: str) -> str:
    """Keep the folder and the file of a path."""
    return "/".join(Path(name).parts[-2:])
