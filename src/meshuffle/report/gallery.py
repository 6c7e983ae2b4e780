"""Cards of single images for the report: the picture, what was predicted, and what is true."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from meshuffle.data import ImageSource
from meshuffle.errors import ImageError
from meshuffle.infer.evaluation import Evaluation
from meshuffle.report import page
from meshuffle.tasks.base import Task

_NUM_CARDS = 16
_LARGE = 400  # pixels of the long side of a picture with something drawn in it
_SEED = 0  # of the sample predictions: the same images in every report on the same split


@dataclass(frozen=True)
class Line:
    """A line of a card: `word` in front of `text`, and a probability behind it where known."""

    text: str
    word: str = ""
    share: str = ""


@dataclass(frozen=True)
class Card:
    """One image; `kind` is `right` or `wrong`, and `thumbnail` None where it cannot be read."""

    kind: str
    thumbnail: str | None
    lines: tuple[Line, ...]
    name: str

    @property
    def short_name(self) -> str:
        """The folder and the file of a path."""
        return "/".join(Path(self.name).parts[-2:])


@dataclass(frozen=True)
class Cards:
    """A section of cards; `large`: with something drawn in the images."""

    title: str
    cards: Sequence[Card]
    large: bool = False
    note: str = ""


def gallery_of(evaluation: Evaluation, source: ImageSource, task: Task) -> Gallery:
    """Return the cards that suit the task."""
    kind = LabelGallery if task.name == "classify" else Gallery
    return kind(evaluation, source, task)


class Gallery:
    """Cards with what the task predicts and draws."""

    def __init__(self, evaluation: Evaluation, source: ImageSource, task: Task) -> None:
        self.evaluation, self.source, self.task = evaluation, source, task
        self.rows = evaluation.rows

    def worst(self) -> Cards:
        """Return the samples with the highest loss."""
        # Negated, so that a loss that is not a number still sorts last.
        order = np.argsort(-self.rows.get("losses", np.zeros(0)), kind="stable")
        return self._cards("Largest losses", order[:_NUM_CARDS])

    def samples(self) -> Cards:
        """Return some images, drawn with a fixed seed, in their order."""
        count = self.evaluation.num_samples
        drawn = np.random.default_rng(_SEED).permutation(count)[:_NUM_CARDS]
        return self._cards("Sample predictions", np.sort(drawn))

    def _cards(self, title: str, rows: Iterable[int], note: str = "") -> Cards:
        return Cards(title, [self._card(int(row)) for row in rows], self.task.dense, note)

    def _card(self, row: int) -> Card:
        index = int(self.evaluation.indices[row])
        thumbnail, size = self._thumbnail(index, row)
        kind, lines = self._caption(row, size)
        return Card(kind, thumbnail, lines, self.source.name(index))

    def _thumbnail(self, index: int, row: int) -> tuple[str | None, tuple[int, int]]:
        """Return the picture, and the (width, height) of its image."""
        try:
            image = self.source.image(index)
            truth = self.source.target(index) if self.task.dense else None
        except ImageError:
            return None, (1, 1)
        if not self.task.dense:
            return page.thumbnail(image), image.size
        return page.thumbnail(self.task.picture(image, self.rows, row, truth), _LARGE), image.size

    def _caption(self, row: int, size: tuple[int, int]) -> tuple[str, tuple[Line, ...]]:
        """Return the card's kind and its lines."""
        predicted = Line(self.task.sentence(self.task.prediction(self.rows, row, size)))
        truth = self.task.truth(self.rows, row)
        return "right", (predicted, Line(truth, "is ")) if truth else (predicted,)


class LabelGallery(Gallery):
    """Cards that tell right from wrong, with both probabilities."""

    def __init__(self, evaluation: Evaluation, source: ImageSource, task: Task) -> None:
        super().__init__(evaluation, source, task)
        titles = task.card.titles
        self.names = tuple(titles.get(name, name) for name in evaluation.classes)
        top = self.rows.get("top_classes", np.zeros((0, 1), np.int64))
        self.wrong = top[:, 0] != self.rows.get("labels", np.zeros(0, np.int64))

    def worst(self) -> Cards:
        """Return the wrong predictions with the highest loss."""
        rows, title = np.flatnonzero(self.wrong), "Worst mistakes"
        count = self.evaluation.num_samples
        if not len(rows):
            return Cards(title, (), note=f"No mistake on {count:,} images." if count else "")
        order = np.argsort(-self.rows["losses"][rows], kind="stable")
        shown = f", the {_NUM_CARDS} with the highest loss" if len(rows) > _NUM_CARDS else ""
        note = (
            f"{len(rows):,} of {count:,} images wrong{shown}. "
            "Percentages are the probabilities that the model gives."
        )
        return self._cards(title, rows[order[:_NUM_CARDS]], note)

    def _caption(self, row: int, size: tuple[int, int]) -> tuple[str, tuple[Line, ...]]:
        rows, wrong = self.rows, bool(self.wrong[row])
        guess, true = self.names[rows["top_classes"][row, 0]], self.names[rows["labels"][row]]
        guessed = page.percent(float(rows["top_probabilities"][row, 0]))
        if not wrong:
            return "right", (Line(guess, "✓ ", guessed),)
        # The loss is −ln of the true class's probability.
        truly = page.percent(float(np.exp(-rows["losses"][row])))
        return "wrong", (Line(guess, "✗ ", guessed), Line(true, "is ", truly))
