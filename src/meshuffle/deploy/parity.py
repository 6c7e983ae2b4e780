"""Check that an exported file computes what the model computes; all formats use it.

Shape suffixes: N batch, C channels (in an image) or classes (in logits), H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from meshuffle.deploy.formats.base import Run
from meshuffle.errors import ParityError

TOLERANCE = 1e-4
"""The largest allowed error, relative to the largest |logit|.

The noise of float32 is near 1e-6, and up to 3e-5 in deep untrained networks, which are as far
from their own float64 result.
"""

IMAGE_TOLERANCE = 0.3
"""The same for a file with preprocessing, from the pixels of the image on.

The largest measured error is 2e-5 on 40 photos whose levels are Pillow's. It is 0.13 if the weights
are random and Pillow 13 resamples the heights first, so that a fifth of the levels are off by one.
"""


@dataclass(frozen=True)
class Change:
    """The task's first metric on the validation split, of the model and of its eight-bit file.

    Attributes:
        metric: key of the metric.
        before, after: its value for the model and for the file.
        points: how much worse the file is; see `int8.points_lost`.
        num_images: size of the split.
        text: all of it in words.
    """

    metric: str
    before: float
    after: float
    points: float
    num_images: int
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Parity:
    """The difference between a file's outputs and the model's, over all batches.

    Attributes:
        max_abs_error: max |file − model| over all logits.
        max_relative_error: `max_abs_error` / max |logit of the model|.
        top1_agreement: percentage of images, or of pixels, with the same most probable class;
            None if the outputs are not classes.
        batch_sizes: sizes of the compared batches.
        file_bytes: size of the file.
        runtime: name and version of the runtime that executed the file.
        input: description of the file's input.
        change: loss of an eight-bit file.
        image_relative_error, image_agreement: `max_relative_error` and `top1_agreement` of a file
            with preprocessing, compared with Pillow and the model on the same images.
    """

    max_abs_error: float
    max_relative_error: float
    top1_agreement: float | None
    batch_sizes: tuple[int, ...]
    file_bytes: int
    runtime: str
    input: str = ""
    change: Change | None = None
    image_relative_error: float | None = None
    image_agreement: float | None = None

    def __str__(self) -> str:
        batches = ", ".join(map(str, self.batch_sizes))
        shares = self.top1_agreement
        agreement = "" if shares is None else f", top-1 agreement {shares:.0f} %"
        more = "" if self.change is None else f"; int8: {self.change}"
        if self.image_relative_error is not None:
            more += f"; takes {self.input}; "
            more += f"against Pillow and the model {self.image_relative_error:.1e}"
            if self.image_agreement is not None:
                more += f", top-1 agreement {self.image_agreement:.0f} %"
        return (
            f"max error {self.max_abs_error:.1e} (relative {self.max_relative_error:.1e})"
            f"{agreement} on batches of {batches} ({self.runtime}){more}"
        )


@torch.inference_mode()
def check_parity(
    model: nn.Module,
    run: Run,
    batches_NCHW: list[Tensor],
    path: Path,
    *,
    runtime: str,
    tolerance: float | None = TOLERANCE,
    argmax: bool = True,
) -> Parity:
    """Compare `run`, which executes the file at `path`, with `model` in eval mode.

    Args:
        run: float32 [N, 3, H, W] to logits float32 [N, C], or other outputs [N, …].
        tolerance: largest allowed `max_relative_error`, above 0; None allows any.
        argmax: the answer is the index of the largest output along dim 1.

    Raises:
        ParityError: the shape differs, a value is not finite, or the error is above `tolerance`.
    """
    expected = [model(x_NCHW).numpy() for x_NCHW in batches_NCHW]
    found = [run(x_NCHW.numpy()) for x_NCHW in batches_NCHW]
    for a_NC, b_NC in zip(expected, found, strict=True):
        if a_NC.shape != b_NC.shape:
            raise ParityError(
                f"{runtime} returns logits of shape {list(b_NC.shape)}, "
                f"the model {list(a_NC.shape)}. Nothing was written"
            )
    error, relative, agreement = compare(expected, found, argmax)
    parity = Parity(
        max_abs_error=error,
        max_relative_error=relative,
        top1_agreement=agreement,
        batch_sizes=tuple(map(len, batches_NCHW)),
        file_bytes=path.stat().st_size,
        runtime=runtime,
    )
    # The comparison is negated so that an error of nan fails too.
    if tolerance is not None and not parity.max_relative_error <= tolerance:
        raise ParityError(
            f"the exported file disagrees with the model: {parity}; the relative error may be at "
            f"most {tolerance:g}. Nothing was written"
        )
    return parity


def compare(
    expected: list[NDArray[np.float32]], found: list[NDArray[np.float32]], argmax: bool
) -> tuple[float, float, float | None]:
    """Return `max_abs_error`, `max_relative_error` and `top1_agreement` of `Parity`."""
    a_NC, b_NC = np.concatenate(expected), np.concatenate(found)
    error = float(np.abs(a_NC - b_NC).max())
    # The floor avoids a division by zero for a model whose outputs are all zero.
    relative = error / max(float(np.abs(a_NC).max()), float(np.finfo(np.float32).tiny))
    agreement = 100.0 * float((a_NC.argmax(1) == b_NC.argmax(1)).mean()) if argmax else None
    return error, relative, agreement


@torch.inference_mode()
def check_images(
    parity: Parity, plain: Run, views: list[Tensor], found: list[NDArray[np.float32]]
) -> Parity:
    """Return `parity` with the comparison with Pillow followed by `plain`.

    Args:
        plain: executes the network without preprocessing, in eight bits if the file is.
        views: batches of images preprocessed by Pillow, float32 [N, 3, H, W].
        found: outputs of the file for the same images, [N, …].

    Raises:
        ParityError: the error is above `IMAGE_TOLERANCE`.
    """
    expected = [plain(x_NCHW.numpy()) for x_NCHW in views]
    _, relative, agreement = compare(expected, found, parity.top1_agreement is not None)
    parity = replace(parity, image_relative_error=relative, image_agreement=agreement)
    if not relative <= IMAGE_TOLERANCE:
        raise ParityError(
            f"the file's preprocessing disagrees with Pillow's: {parity}; that relative error may "
            f"be at most {IMAGE_TOLERANCE:g}. Nothing was written"
        )
    return parity
