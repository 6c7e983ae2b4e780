"""Characters of a text file as batches; the file is the first argument of the scripts that read it.

Without one, the text is this repository's README.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

README = Path(__file__).parents[1] / "README.md"


def read_text() -> Tensor:
    """Return the bytes of the text, int64 (length,): a vocabulary of 256."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else README
    return torch.tensor(list(path.read_bytes()), dtype=torch.int64)


def batches(text: Tensor, batch: int, length: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (x, y) of (batch, length): y is x one character later. The same on every rank."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(len(text) - length - 1, (batch, 1), generator=generator)
        window = text[starts + torch.arange(length + 1)]
        yield window[:, :-1], window[:, 1:]
