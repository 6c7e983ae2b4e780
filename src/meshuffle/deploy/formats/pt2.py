"""PyTorch's own format: torch.export's program in a `.pt2`, which needs no code of the model.

The metadata are extra files of the archive.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from meshuffle.deploy.formats.base import Format, Precision, Run

if TYPE_CHECKING:
    from meshuffle.deploy.subject import Subject

_KEYS = ("model", "classes", "preprocess", "input", "meshuffle")


class Pt2(Format):
    """The captured program, unchanged."""

    name = "pt2"
    suffix = ".pt2"

    def write(self, subject: Subject, path: Path) -> None:
        """Save the captured program."""
        import torch

        torch.export.save(subject.program(), path, extra_files=dict(subject.metadata))

    def load(self, path: Path, threads: int, precision: Precision) -> Run:
        """Return the function that executes the program; `threads` applies to the whole process."""
        import torch

        if threads:
            torch.set_num_threads(threads)
        module = torch.export.load(path).module()

        @torch.inference_mode()
        def run(x: NDArray[Any]) -> NDArray[np.float32]:
            outputs: NDArray[np.float32] = module(torch.from_numpy(x)).numpy()
            return outputs

        return run

    def metadata(self, path: Path) -> dict[str, str]:
        """Return the contents of the extra files."""
        import torch

        found = dict.fromkeys(_KEYS, "")
        torch.export.load(path, extra_files=found)
        return found

    def runtime(self, path: Path) -> str:
        """Return PyTorch's version."""
        import torch

        return f"PyTorch {torch.__version__.partition('+')[0]}"
