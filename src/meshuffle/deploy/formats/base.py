"""The interface of the file formats: write a captured model, open the file, read its metadata.

Nothing here imports torch, so that a process that opens a file needs only the file's runtime.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from meshuffle.errors import ConfigError

if TYPE_CHECKING:
    from meshuffle.deploy.subject import Subject

Run = Callable[[NDArray[Any]], NDArray[Any]]
"""A function from inputs of N images to their outputs [N, …], float32.

The inputs are normalised float32 [N, 3, H, W], or uint8 RGB [N, H, W, 3] if the preprocessing is
part of the file.
"""

Precision = Literal["float32", "bfloat16"]

INPUT = "input"
"""The name of the input in every file."""


class Calibration(Protocol):
    """Real inputs, from which an eight-bit file learns the range of each tensor."""

    def inputs(self, batch: int = 1) -> Iterator[NDArray[np.float32]]:
        """Yield the inputs, `batch` images at a time."""


class Format(ABC):
    """A file format and the runtime that executes it.

    Attributes:
        name: value of `--to`.
        suffix: suffix of its files.
        packages: additional packages that it needs: name for pip → name for `import`.
        int8_packages: packages that only `write_int8` needs.
        extra: Meshuffle's extra that installs them.
        precisions: precisions that `open` can compute in.
        max_batch: the largest batch that its files take at once; None is any.
        any_size: whether files with preprocessing take images of any size.
    """

    name: ClassVar[str]
    suffix: ClassVar[str]
    packages: ClassVar[Mapping[str, str]] = {}
    int8_packages: ClassVar[Mapping[str, str]] = {}
    extra: ClassVar[str] = ""
    precisions: ClassVar[tuple[Precision, ...]] = ("float32",)
    max_batch: ClassVar[int | None] = None
    any_size: ClassVar[bool] = True

    @abstractmethod
    def write(self, subject: Subject, path: Path) -> None:
        """Write the model to `path`, and further files beside it; the folder holds nothing else."""

    def write_int8(self, subject: Subject, path: Path, calibration: Calibration) -> None:
        """Write the model with eight-bit weights and activations.

        Args:
            calibration: inputs of the network without preprocessing, which is not quantised.
        """
        raise NotImplementedError

    @abstractmethod
    def load(self, path: Path, threads: int, precision: Precision) -> Run:
        """Return the function that executes the file on up to `max_batch` images; see `open`."""

    @abstractmethod
    def metadata(self, path: Path) -> dict[str, str]:
        """Return the metadata of the file; see `Subject.metadata`."""

    @abstractmethod
    def runtime(self, path: Path) -> str:
        """Return the name and version of the runtime that executes the file."""

    def open(self, path: Path, threads: int = 0, precision: Precision = "float32") -> Run:
        """Return the function that executes the file at `path`, for batches of any size.

        Args:
            threads: CPU threads, ≥ 0; 0 lets the runtime choose.
            precision: precision of the arithmetic; inputs and outputs are float32.

        Raises:
            ConfigError: the runtime is not installed, or does not compute in this precision.
        """
        self.require()
        if precision not in self.precisions:
            known = ", ".join(self.precisions)
            raise ConfigError(f"{self.name} does not compute in {precision}; it knows {known}")
        run = self.load(path, threads, precision)
        return run if self.max_batch is None else _in_pieces(run, self.max_batch)

    def require(self, int8: bool = False) -> None:
        """Raise `ConfigError` if a package is missing, with the command that installs it."""
        if int8 and type(self).write_int8 is Format.write_int8:
            raise ConfigError(
                f"--int8: {self.name} is not supported; use onnx, openvino, executorch"
            )
        packages = {**self.packages, **(self.int8_packages if int8 else {})}
        missing = [pip for pip, module in packages.items() if find_spec(module) is None]
        if missing:
            raise ConfigError(
                f"export to {self.name} needs {' and '.join(missing)}: "
                f"pip install 'meshuffle[{self.extra}]'"
            )


def _in_pieces(run: Run, most: int) -> Run:
    """Return `run` for batches of any size; it gets at most `most` images at a time."""

    def in_pieces(x: NDArray[Any]) -> NDArray[np.float32]:
        if len(x) <= most:
            return run(x)
        return np.concatenate([run(x[i : i + most]) for i in range(0, len(x), most)])

    return in_pieces
