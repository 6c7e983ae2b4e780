"""From the bytes of images to predictions, as `meshuffle predict` computes them.

Shape suffixes: N images, C channels, H height, W width.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from meshuffle.data import decode_image
from meshuffle.deploy.formats.base import Run
from meshuffle.deploy.serve.limits import MAX_SCANS, Refused
from meshuffle.deploy.serve.upload import Upload
from meshuffle.errors import ImageError
from meshuffle.files import finite
from meshuffle.tasks import make_task
from meshuffle.tasks.base import Rows
from meshuffle.tasks.card import Card

_STATUS = {"large": 413, "unknown": 415, "broken": 422}
_START_OF_SCAN = b"\xff\xda"


@dataclass(frozen=True)
class View:
    """The network's view of an image, uint8 [3, h, w]; `size` is the image's (width, height)."""

    pixels_CHW: Tensor
    size: tuple[int, int]


@dataclass(frozen=True)
class Answer:
    """The prediction for one image, and row `row` of the `rows` that it was made from."""

    prediction: dict[str, Any]
    rows: Rows
    row: int
    size: tuple[int, int]


class Engine:
    """A model that is ready to predict.

    Args:
        card: of the weights.
        run: executes the network: normalised float32 [N, 3, H, W] to its outputs [N, …].
        takes_pixels: `run` takes uint8 images instead, and returns what `Task.answer` takes; see
            `Backend`.
        max_batch: the largest N.
        max_pixels: see `Limits`.
    """

    def __init__(
        self, card: Card, run: Run, *, max_batch: int, max_pixels: int, takes_pixels: bool = False
    ) -> None:
        self.card, self._run, self._max_pixels = card, run, max_pixels
        self._takes_pixels = takes_pixels
        self.task = make_task(card)
        height, width = card.preprocess.size
        self._pixels_NHWC = torch.empty((max_batch, height, width, 3), dtype=torch.uint8)

    def read(self, upload: Upload) -> View:
        """Decode an image and bring it to the network's geometry; threads may call it at once.

        Raises:
            Refused: 413 too many pixels; 415 an unsupported format; 422 a broken image.
        """
        name, content = upload.name, upload.content
        # In compressed data 0xFF is followed by 0, so that this counts the scans and little else.
        if content.startswith(b"\xff\xd8") and content.count(_START_OF_SCAN) > MAX_SCANS:
            raise Refused(422, f"{name}: a JPEG of more than {MAX_SCANS} scans")
        try:
            image = decode_image(content, max_pixels=self._max_pixels, name=name)
        except ImageError as error:
            raise Refused(_STATUS[error.kind], str(error)) from None
        return View(self.card.preprocess.to_uint8(image), image.size)

    @torch.inference_mode()
    def answer(self, views: Sequence[View]) -> list[Answer]:
        """Predict at most `max_batch` images; one thread may call it at a time."""
        num = len(views)
        pixels_NHWC = self._pixels_NHWC[:num]
        for row, view in enumerate(views):
            pixels_NHWC[row] = view.pixels_CHW.permute(1, 2, 0)
        if self._takes_pixels:
            outputs = torch.from_numpy(self._run(pixels_NHWC.numpy()))
        else:
            x_NCHW = self.card.preprocess.normalise(pixels_NHWC.permute(0, 3, 1, 2))
            outputs = torch.from_numpy(self._run(x_NCHW.contiguous().numpy()))
        rows = {name: rows_N.numpy() for name, rows_N in self.task.answer(outputs).items()}
        return [
            Answer(finite(self.task.prediction(rows, i, view.size)), rows, i, view.size)
            for i, view in enumerate(views)
        ]

    def mask(self, answer: Answer) -> str | None:
        """Return the predicted mask as a PNG in base64, or None if the task has no masks.

        Its pixel values are class numbers.
        """
        image = self.task.mask(answer.rows, answer.row, answer.size)
        return None if image is None else base64.b64encode(_png(image)).decode()


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()
